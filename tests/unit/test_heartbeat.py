"""Datagrams between supervisors: what they carry, and who is refused."""

import json
from dataclasses import replace

import pytest

from stortrends_ha.errors import ProtocolError
from stortrends_ha.limits import (
    HEARTBEAT_DATAGRAM_BYTES,
    HEARTBEAT_FRAME_BYTES,
    HEARTBEAT_GREETS,
    HEARTBEAT_GROUP_BYTES,
    HEARTBEAT_GROUPS,
    HEARTBEAT_REASON_BYTES,
)
from stortrends_ha.protocol import heartbeat
from stortrends_ha.protocol.heartbeat import Answer, Ask, GroupBeat, Heartbeat, Message, clip, decode, encode
from stortrends_ha.record import EPOCHS, Record

KEY = b"k" * 32
RECORD = Record(7, "node-a", ("node-a", "node-b"))
GROUP = GroupBeat("vms", RECORD, "leading", False, "", False, True, True, "")
SECTIONS = (("arbiter", "0a1b2c3d"), ("limits", "ffffffff"))
BEAT = Heartbeat("lab", "node-a", 2**64 - 1, 12, 5, 11, ((9, 3),), False, True, "1.0", (GROUP,), SECTIONS)
ASK = Ask("lab", "node-a", 1, 2, 3, "vms", RECORD, RECORD.owned_alone("node-a"))
ANSWER = Answer("lab", "node-b", 2, 1, 3, False, RECORD)
MESSAGES = [BEAT, ASK, ANSWER, replace(ANSWER, granted=True, current=None)]


def signed(body: bytes, kind: int = 1, version: int = heartbeat.VERSION) -> bytes:
    """A datagram of somebody who has the key but does not keep to the form."""
    header = heartbeat.PREFACE + bytes((version, kind))
    return header + heartbeat._mac(KEY, header, body) + body


def fields_of(message: Message) -> dict[str, object]:
    body: dict[str, object] = json.loads(encode(KEY, message)[heartbeat._BODY_AT :])
    return body


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    assert decode(KEY, encode(KEY, message)) == message


def test_a_group_is_found_by_its_name() -> None:
    assert BEAT.group("vms") == GROUP
    assert BEAT.group("other") is None


@pytest.mark.parametrize("message", MESSAGES)
def test_every_bit_is_signed(message: Message) -> None:
    data = encode(KEY, message)
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises(ProtocolError):
            decode(KEY, changed)
    for end in range(len(data)):
        with pytest.raises(ProtocolError):
            decode(KEY, data[:end])


def test_another_key_is_refused() -> None:
    with pytest.raises(ProtocolError, match="not signed with this cluster's key"):
        decode(b"x" * 32, encode(KEY, BEAT))


def test_another_version_is_told_from_garbage() -> None:
    with pytest.raises(ProtocolError, match="format 2; this node speaks format 1"):
        decode(KEY, signed(b"who knows", version=2))


def test_what_a_newer_version_adds_is_ignored() -> None:
    body = {**fields_of(BEAT), "mood": "fine"}
    assert decode(KEY, signed(json.dumps(body).encode())) == BEAT


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cluster", ""), ("cluster", "a b"), ("cluster", "x" * 65), ("cluster", 1), ("node", None), ("node", "näme"),
        ("incarnation", 0), ("incarnation", 2**64), ("incarnation", True), ("incarnation", 1.0), ("incarnation", "1"),
        ("seq", 0), ("seq", -1), ("seq", 2**63), ("echo_incarnation", -1), ("echo_seq", None),
        ("greets", None), ("greets", [1]), ("greets", [[1]]), ("greets", [[0, 1]]), ("greets", [[1, 0]]),
        ("greets", [[1, 2, 3]]), ("greets", [[1, True]]), ("greets", [[1, 1]] * (HEARTBEAT_GREETS + 1)),
        ("drained", 0), ("stopping", "no"), ("version", "a\nb"), ("version", "\ud800"), ("version", "x" * 65),
        ("sections", None), ("sections", [1]), ("sections", [["arbiter"]]), ("sections", [["a", "b c"]]),
        ("sections", [["a", "b"]] * 9),
        ("groups", {}), ("groups", [1]), ("groups", [{}]), ("groups", [fields_of(BEAT)["groups"][0]] * 2),  # type: ignore[index]
    ],
)  # fmt: skip
def test_a_beat_with_a_bad_field_is_refused(key: str, value: object) -> None:
    with pytest.raises(ProtocolError):
        decode(KEY, signed(json.dumps({**fields_of(BEAT), key: value}).encode()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", ".."), ("record", None), ("record", {}), ("record", {"epoch": 0, "owner": "a", "in_sync": ["a"]}),
        ("record", {"epoch": EPOCHS, "owner": "a", "in_sync": ["a"]}),
        ("record", {"epoch": 1, "owner": "a", "in_sync": ["b"]}),
        ("record", {"epoch": 1, "owner": "a", "in_sync": ["a", "b", "c"]}),
        ("record", {"epoch": 1, "owner": "a/b", "in_sync": ["a/b"]}),
        ("phase", "x" * 33), ("promise", 1), ("fit", "x" * (HEARTBEAT_REASON_BYTES + 1)), ("lost", None),
        ("leading", "true"), ("serving", []), ("want", "give"), ("want", []), ("want", None),
    ],
)  # fmt: skip
def test_a_group_with_a_bad_field_is_refused(key: str, value: object) -> None:
    group = {**heartbeat._group_body(GROUP), key: value}
    with pytest.raises(ProtocolError):
        decode(KEY, signed(json.dumps({**fields_of(BEAT), "groups": [group]}).encode()))


@pytest.mark.parametrize("key", list(fields_of(BEAT)))
def test_no_field_of_a_beat_may_be_missing(key: str) -> None:
    body = fields_of(BEAT)
    del body[key]
    with pytest.raises(ProtocolError):
        decode(KEY, signed(json.dumps(body).encode()))


@pytest.mark.parametrize(("kind", "message"), [(2, ASK), (3, ANSWER)])
def test_consent_with_a_bad_field_is_refused(kind: int, message: Message) -> None:
    for key in fields_of(message):
        with pytest.raises(ProtocolError):
            decode(KEY, signed(json.dumps({**fields_of(message), key: -1}).encode(), kind))


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"\xff", b"[" * 50_000, b"1" * 50_000, b"{}", b'{"seq": NaN}'])
def test_an_authentic_datagram_that_is_no_object_is_refused(body: bytes) -> None:
    for kind in range(5):
        with pytest.raises(ProtocolError):
            decode(KEY, signed(body, kind))


def test_a_reason_is_cut_and_made_printable() -> None:
    text = "the disk\n\x00\ud800 " + "ü€😀" * 100
    arrived = decode(KEY, encode(KEY, replace(BEAT, groups=(replace(GROUP, fit=text),))))
    assert isinstance(arrived, Heartbeat)
    assert arrived.groups[0].fit == clip(text)
    assert clip(text).startswith("the disk    ü€😀")
    assert len(clip(text).encode()) <= HEARTBEAT_REASON_BYTES


def longest_beat() -> Heartbeat:
    record = Record(EPOCHS - 1, "n" * 64, ("m" * 64, "n" * 64))
    group = GroupBeat("g" * 64, record, '"' * 32, False, '"' * 999, False, False, False, "move")
    named = tuple(replace(group, name=f"{number:g>64}") for number in range(HEARTBEAT_GROUPS))
    greets = ((2**64 - 1, 2**63 - 1),) * HEARTBEAT_GREETS
    return Heartbeat(
        "c" * 64, "n" * 64, 2**64 - 1, 2**63 - 1, 2**64 - 1, 2**63 - 1, greets, False, False, '"' * 64, named
    )


def test_the_longest_beat_fits_a_datagram() -> None:
    beat = longest_beat()
    data = encode(KEY, beat)
    assert len(data) <= HEARTBEAT_DATAGRAM_BYTES
    frame_bytes = len(encode(KEY, replace(beat, groups=())))
    assert frame_bytes <= HEARTBEAT_FRAME_BYTES
    assert len(data) - frame_bytes <= HEARTBEAT_GROUPS * HEARTBEAT_GROUP_BYTES
    arrived = decode(KEY, data)
    assert isinstance(arrived, Heartbeat)
    assert len(arrived.groups) == HEARTBEAT_GROUPS


def test_too_long_a_datagram_is_refused_at_both_ends() -> None:
    with pytest.raises(ProtocolError, match="more than"):
        decode(KEY, bytes(HEARTBEAT_DATAGRAM_BYTES + 1))
    with pytest.raises(ValueError, match="a datagram of"):
        encode(KEY, replace(BEAT, groups=(replace(GROUP, phase="x" * HEARTBEAT_DATAGRAM_BYTES),)))
