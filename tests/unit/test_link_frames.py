"""Frames of the link. Their layout is written out here, independently of the code."""

import json
import struct

import pytest
from fakes import frames_of

from stortrends_ha.errors import ProtocolError
from stortrends_ha.limits import LINK_FRAME_BYTES
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Frame, Kind, Verdict

EPOCH = 7


def raw(kind: int, epoch: int = EPOCH, seq: int = 0, volume: int = 0, payload: bytes = b"", zero: int = 0) -> bytes:
    return struct.pack(">BBHIQQ", kind, zero, volume, len(payload), epoch, seq) + payload


def parse(data: bytes, epoch: int | None = EPOCH) -> Frame | None:
    return wire.next_frame(memoryview(data), 0, len(data), epoch)


def test_preface_and_the_kinds_of_the_opening_talk_keep_their_form() -> None:
    assert wire.PREFACE == b"STORHA\r\n"
    assert [Kind.HELLO, Kind.REFUSE] == [1, 2]
    assert wire.HEADER.size == 24


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.CHANGES])
def test_frame_comes_back_as_it_was_made(kind: Kind) -> None:
    data = wire.frame(kind, EPOCH, 2**64 - 1, 65535, b"payload")
    assert data == raw(kind, EPOCH, 2**64 - 1, 65535, b"payload")
    assert parse(data) == (kind, 65535, 2**64 - 1, 7, b"payload")


def test_frame_that_is_not_all_there_is_none_at_every_length() -> None:
    data = raw(Kind.PING, payload=b"payload")
    assert [parse(data[:length]) for length in range(len(data))] == [None] * len(data)


def test_frame_is_looked_for_where_it_should_be_and_no_further() -> None:
    data = memoryview(b"xyz" + raw(Kind.PING, seq=1) + raw(Kind.PING, seq=2))
    found = [wire.next_frame(data, at, len(data), EPOCH) for at in (3, 27)]
    assert [frame and frame.seq for frame in found] == [1, 2]
    assert wire.next_frame(data, 27, len(data) - 1, EPOCH) is None


def test_changes_are_known_by_their_header_alone() -> None:
    header = wire.changes_header(EPOCH, 42, 3, 1 << 20)
    assert header == struct.pack(">BBHIQQ", 5, 0, 3, 1 << 20, EPOCH, 42)
    assert parse(header) == (Kind.CHANGES, 3, 42, 1 << 20, b"")


@pytest.mark.parametrize("kind", [0, 18, 99, 255])
def test_unknown_kind_is_refused(kind: int) -> None:
    with pytest.raises(ProtocolError, match=f"unknown kind {kind}"):
        parse(raw(kind))


def test_frame_with_something_where_zero_belongs_is_refused() -> None:
    with pytest.raises(ProtocolError):
        parse(raw(Kind.PING, zero=1))


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("epoch", [EPOCH - 1, EPOCH + 1, 0, 2**64 - 1])
def test_frame_of_another_epoch_is_refused(kind: Kind, epoch: int) -> None:
    with pytest.raises(ProtocolError, match=f"epoch {epoch} in a session of epoch {EPOCH}"):
        parse(raw(kind, epoch))
    assert parse(raw(kind, epoch), epoch=None) is not None


def test_oversized_frame_is_refused_before_it_is_all_there() -> None:
    data = raw(Kind.HELLO, payload=bytes(LINK_FRAME_BYTES + 1))
    with pytest.raises(ProtocolError, match=f"HELLO frame of {LINK_FRAME_BYTES + 1} bytes"):
        parse(data[:24])
    assert parse(raw(Kind.HELLO, payload=bytes(LINK_FRAME_BYTES))) is not None


def test_object_comes_back_as_it_was_made() -> None:
    value = {"reason": "volume ö", "list": [1, {"x": None}], "epoch": 2**70}
    [frame] = frames_of(wire.encode_object(Kind.REFUSE, EPOCH, value))
    assert (frame.kind, wire.decode_object(frame.payload)) == (Kind.REFUSE, value)


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"{", b"[]", b"1", b"null", b'"x"', b"\xff\xfe", b"\0{}", b"{}{}", b'{"a":}', b"\xef\xbb\xbf{",
        b"[" * 60_000, b'{"a":' * 10_000, b"9" * 60_000, b'{"a": %s}' % (b"9" * 5000), b"\x80",
    ],
)  # fmt: skip
def test_payload_that_is_no_object_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_object(payload)


def test_compare_and_result_come_back_as_they_were_made() -> None:
    [ask] = frames_of(wire.encode_ask(EPOCH, 3, 2**63, 2**40))
    assert (ask.kind, ask.volume, wire.decode_ask(ask.payload)) == (Kind.ASK, 3, (2**63, 2**40))
    for digests in (b"", bytes(range(64))):
        [answer] = frames_of(wire.encode_digests(EPOCH, 3, 2**63, 2**40, digests))
        assert (answer.kind, answer.volume) == (Kind.DIGESTS, 3)
        assert wire.decode_digests(answer.payload) == (2**63, 2**40, digests)
    [compare] = frames_of(wire.encode_compare(EPOCH, 3, 2**63, 2**32 - 1, bytes(range(32))))
    assert (compare.kind, compare.volume) == (Kind.COMPARE, 3)
    assert wire.decode_compare(compare.payload) == (2**63, 2**32 - 1, bytes(range(32)))
    for verdict in Verdict:
        [result] = frames_of(wire.encode_result(EPOCH, 3, 512, 4096, verdict))
        assert (result.kind, result.volume) == (Kind.RESULT, 3)
        assert wire.decode_result(result.payload) == (512, 4096, verdict)


def test_result_with_an_unknown_verdict_is_refused() -> None:
    [result] = frames_of(wire.encode_result(EPOCH, 0, 0, 4096, 3))
    with pytest.raises(ProtocolError, match="unknown verdict 3"):
        wire.decode_result(result.payload)


def test_connections_of_clients_come_back_and_of_too_many_as_many_as_a_frame_holds() -> None:
    some: list[wire.Endpoint] = [("192.0.2.9", 40000, "192.0.2.21", 10809), ("2001:db8::1", 1, "2001:db8::2", 65535)]
    for endpoints in ([], some, some * 5000):
        [found] = frames_of(wire.encode_clients(EPOCH, endpoints))
        assert (found.kind, found.length <= LINK_FRAME_BYTES) == (Kind.CLIENTS, True)
        decoded = wire.decode_clients(found.payload)
        assert decoded == endpoints[: len(decoded)]
        assert len(decoded) == len(endpoints) or len(found.payload) > LINK_FRAME_BYTES // 2


@pytest.mark.parametrize(
    "endpoints",
    [None, {}, [[]], [["a", 1, "b"]], [["a", 1, "b", "2"]], [["a", True, "b", 2]], [["a", 0, "b", 2]],
     [["a", 1, "b", 65536]], ["abcd"], [[1, 1, "b", 2]]],
)  # fmt: skip
def test_connections_that_are_none_are_refused(endpoints: object) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_clients(json.dumps({"endpoints": endpoints}).encode())


@pytest.mark.parametrize("count", [0, 1, 2, 3999, 4000, 4001, 9000])
def test_regions_come_back_in_order_in_frames_that_are_not_too_long(count: int) -> None:
    ranges = [(n << 22, min(1 << 22, n + 1)) for n in range(count)]
    found = list[tuple[int, int]]()
    for data in wire.encode_regions(EPOCH, 3, ranges):
        [frame] = frames_of(data)
        assert (frame.kind, frame.volume, frame.length <= LINK_FRAME_BYTES) == (Kind.REGIONS, 3, True)
        assert frame.payload  # one without any is the end
        found += wire.decode_regions(frame.payload)
    assert found == ranges


@pytest.mark.parametrize("blank", [False, True])
def test_end_of_the_regions_has_none_and_says_whether_there_is_nothing(blank: bool) -> None:
    data = wire.end_of_regions(EPOCH, blank)
    assert data == raw(16, seq=int(blank))
    assert wire.decode_regions(frames_of(data)[0].payload) == []


@pytest.mark.parametrize("length", [1, 8, 15, 17, 31])
def test_regions_of_the_wrong_length_are_refused(length: int) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_regions(bytes(length))


@pytest.mark.parametrize("length", [0, 12, 13, 14, 43, 45, 100])
def test_compare_and_result_of_the_wrong_length_are_refused(length: int) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_compare(bytes(length))
    if length != 13:
        with pytest.raises(ProtocolError):
            wire.decode_result(bytes(length))


def test_objects_are_readable_by_any_json_parser() -> None:
    data = wire.encode_object(Kind.FAILED, EPOCH, {"reason": "x"})
    assert json.loads(data[24:]) == {"reason": "x"}


@pytest.mark.parametrize("length", [0, 15, 17, 24])
def test_questions_and_digests_of_a_wrong_length_are_refused(length: int) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_ask(bytes(length))
    with pytest.raises(ProtocolError):
        wire.decode_digests(bytes(length))
