"""The secondary's end of a session: what it applies, when it acknowledges, what it refuses."""

import hashlib
from collections.abc import Callable

import pytest
from fakes import FUA, NO_HOLE, TRIM, WRITE, WRITE_ZEROES, MemoryLink, MemoryStore, kinds, request

from stortrends_ha.errors import ProtocolError, StorageError
from stortrends_ha.limits import CHANGES_FRAME_BYTES, COMPARE_BLOCK_BYTES, HOLE_COMPARE_BYTES
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import HOLE, Kind, Purpose, Verdict
from stortrends_ha.protocol.nbd_transmission import OP_PUNCH, OP_WRITE, OP_ZERO
from stortrends_ha.replication import secondary as secondary_module
from stortrends_ha.replication.secondary import Secondary

EPOCH = 7
SIZE = 1 << 20


class Session:
    """A session with two volumes; the first change has number 10."""

    def __init__(self) -> None:
        self.stores = [MemoryStore(SIZE), MemoryStore(2 * SIZE)]
        self.link = MemoryLink()
        self.synced = 0
        self.verified: list[tuple[int, int, int, Verdict]] = []
        self.secondary = Secondary(
            self.stores, EPOCH, self.link, 10, self._synced, verified=lambda *outcome: self.verified.append(outcome)
        )
        self.rest = b""

    def _synced(self) -> None:
        self.synced += 1

    def receive(self, data: bytes) -> None:
        data = self.rest + data
        used = self.secondary.receive(memoryview(data + b"\xaa" * 100), len(data))
        assert 0 <= used <= len(data)
        self.rest = data[used:]

    def answers(self) -> list[tuple[Kind, int]]:
        return [(Kind(frame.kind), frame.seq) for frame in self.link.frames()]

    def refuses(self, data: bytes, match: str) -> None:
        with pytest.raises(ProtocolError, match=match):
            self.receive(data)
        assert not self.stores[0].applied
        assert not self.stores[1].applied
        assert self.answers() == []


@pytest.fixture
def session() -> Session:
    return Session()


def changes(first: int, *requests: bytes, volume: int = 0, epoch: int = EPOCH) -> bytes:
    payload = b"".join(requests)
    return wire.changes_header(epoch, first, volume, len(payload)) + payload


def write(offset: int, payload: bytes) -> bytes:
    return request(WRITE, 1, offset, payload=payload)


# --- Changes ----------------------------------------------------------------------------------


def test_changes_are_applied_in_order_and_acknowledged_with_one_frame(session: Session) -> None:
    session.receive(
        changes(10, write(0, b"aaaa"), write(2, b"bb"))
        + changes(12, write(0, b"c"), volume=1)
        + changes(13, request(TRIM, 1, 1, 1))
    )
    assert bytes(session.stores[0].data[:4]) == b"a\0bb"
    assert session.stores[1].data[:1] == b"c"
    assert session.answers() == [(Kind.ACK, 13)]


@pytest.mark.parametrize(
    ("data", "applied"),
    [
        (request(WRITE, 1, 512, payload=b"x", flags=FUA), (OP_WRITE, 512, 1)),
        (request(TRIM, 1, 512, 512, FUA), (OP_PUNCH, 512, 512)),
        (request(WRITE_ZEROES, 1, 512, 512), (OP_PUNCH, 512, 512)),
        (request(WRITE_ZEROES, 1, 0, SIZE, NO_HOLE | FUA), (OP_ZERO, 0, SIZE)),
    ],
)
def test_changes_with_flags_are_applied(session: Session, data: bytes, applied: tuple[int, int, int]) -> None:
    session.receive(changes(10, data))
    assert session.stores[0].applied == [applied]


def test_change_is_applied_only_when_all_of_it_is_there(session: Session) -> None:
    data = changes(10, write(0, b"a" * 100), write(0, b"b" * 100))
    session.receive(data[: 24 + 128])
    assert session.stores[0].applied == [(OP_WRITE, 0, 100)]
    assert session.answers() == [(Kind.ACK, 10)]
    session.receive(data[24 + 128 : -1])
    assert len(session.stores[0].applied) == 1
    assert session.answers() == []
    session.receive(data[-1:])
    assert session.answers() == [(Kind.ACK, 11)]
    assert session.stores[0].data[:100] == b"b" * 100


def test_empty_frame_of_changes_is_nothing(session: Session) -> None:
    session.receive(changes(10) + changes(10, write(0, b"x")))
    assert session.answers() == [(Kind.ACK, 10)]


@pytest.mark.parametrize("first", [0, 9, 11, 12, 2**64 - 1])
def test_gap_or_repetition_in_the_numbers_is_refused(session: Session, first: int) -> None:
    session.refuses(changes(first, write(0, b"x")), f"change {first} came after change 9")


def test_repetition_of_what_was_applied_is_refused(session: Session) -> None:
    session.receive(changes(10, write(0, b"x")))
    with pytest.raises(ProtocolError, match="change 10 came after change 10"):
        session.receive(changes(10, write(0, b"y")))
    assert session.stores[0].data[:1] == b"x"


@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (2**64 - 1, 1), (2**64 - 1, 2**32 - 1), (0, 0), (SIZE, 0)],
)
@pytest.mark.parametrize("kind", [TRIM, WRITE_ZEROES, WRITE])
def test_change_outside_the_volume_or_of_nothing_is_refused(
    session: Session, kind: int, offset: int, length: int
) -> None:
    session.refuses(changes(10, request(kind, 1, offset, length)), f"a change of {length} bytes at {offset}")


def test_the_volume_decides_what_is_outside(session: Session) -> None:
    session.receive(changes(10, write(2 * SIZE - 1, b"x"), volume=1))
    assert session.stores[1].data[-1:] == b"x"


@pytest.mark.parametrize("volume", [2, 3, 65535])
def test_unknown_volume_is_refused(session: Session, volume: int) -> None:
    session.refuses(changes(10, write(0, b"x"), volume=volume), f"volume number {volume} of 2")
    session.refuses(wire.frame(Kind.FLUSH, EPOCH, 1, volume), f"volume number {volume} of 2")
    session.refuses(wire.encode_compare(EPOCH, volume, 0, 512, bytes(32)), f"volume number {volume} of 2")


@pytest.mark.parametrize("kind", [0, 2, 3, 5, 7, 8, 65535])
def test_request_that_is_no_change_is_refused(session: Session, kind: int) -> None:
    session.refuses(changes(10, request(kind, 1, 0, 512)), "a change that begins with 0x25609513")


def test_change_with_the_wrong_magic_is_refused(session: Session) -> None:
    session.refuses(changes(10, request(WRITE, payload=b"x", magic=0x25609512)), "0x25609512")


def test_write_longer_than_its_frame_is_refused_as_soon_as_that_is_known(session: Session) -> None:
    data = write(0, b"x" * 100)
    session.refuses(wire.changes_header(EPOCH, 10, 0, len(data) - 1) + data[:28], "longer than the frame")


@pytest.mark.parametrize("extra", [1, 27])
def test_frame_that_ends_in_the_middle_of_a_change_is_refused(session: Session, extra: int) -> None:
    data = write(0, b"x")
    with pytest.raises(ProtocolError, match="ends in the middle"):
        session.receive(wire.changes_header(EPOCH, 10, 0, len(data) + extra) + data)
    assert session.answers() == []


@pytest.mark.parametrize("length", [1, 27])
def test_frame_too_short_for_a_change_is_refused_at_once(session: Session, length: int) -> None:
    session.refuses(wire.changes_header(EPOCH, 10, 0, length) + bytes(1), "ends in the middle")


def test_oversized_frame_of_changes_is_refused(session: Session) -> None:
    session.refuses(
        wire.changes_header(EPOCH, 10, 0, CHANGES_FRAME_BYTES + 1),
        f"{CHANGES_FRAME_BYTES + 1} bytes is longer",
    )


def test_nothing_of_another_epoch_is_applied(session: Session) -> None:
    session.refuses(changes(10, write(0, b"x"), epoch=EPOCH - 1), "epoch 6 in a session of epoch 7")
    session.refuses(changes(10, write(0, b"x"), epoch=EPOCH + 1), "epoch 8 in a session of epoch 7")


def test_what_failed_on_the_disk_is_not_acknowledged(session: Session) -> None:
    session.stores[0].broken = True
    with pytest.raises(StorageError):
        session.receive(changes(10, write(0, b"x")))
    assert session.answers() == []


# --- Flush, compare, synced, ping ------------------------------------------------------------


def test_flushed_is_sent_when_the_flush_has_ended(session: Session) -> None:
    session.receive(changes(10, write(0, b"x")) + wire.frame(Kind.FLUSH, EPOCH, 5, 1))
    assert session.answers() == [(Kind.ACK, 10)]
    assert session.stores[0].flushes == []
    session.stores[1].end_flushes()
    [flushed] = session.link.frames()
    assert (flushed.kind, flushed.seq, flushed.volume) == (Kind.FLUSHED, 5, 1)


def test_flush_begins_after_everything_before_it_was_applied(session: Session) -> None:
    seen = list[int]()
    store = session.stores[0]
    start: Callable[[Callable[[], None]], None] = store.start_flush

    class Watching(MemoryStore):
        def start_flush(self, done: Callable[[], None]) -> None:
            seen.append(len(self.applied))
            start(done)

    store.__class__ = Watching
    session.receive(
        changes(10, write(0, b"x"), write(1, b"y"))
        + wire.frame(Kind.FLUSH, EPOCH, 1)
        + changes(12, write(0, b"z"))
        + wire.frame(Kind.FLUSH, EPOCH, 2)
    )
    assert seen == [2, 3]


@pytest.mark.parametrize("offset", [0, SIZE - 4096])
def test_comparison_tells_whether_the_block_is_equal(session: Session, offset: int) -> None:
    session.receive(changes(10, write(offset, b"data")))
    session.link.take()
    data = b"data" + bytes(4092)
    for block, verdict in ((data, Verdict.EQUAL), (bytes(4096), Verdict.DIFFERS)):
        session.receive(wire.encode_compare(EPOCH, 0, offset, 4096, hashlib.sha256(block).digest()))
        [result] = session.link.frames()
        assert (result.kind, result.volume) == (Kind.RESULT, 0)
        assert wire.decode_result(result.payload) == (offset, 4096, verdict)


def test_comparison_sees_what_came_before_it_in_the_stream_and_not_what_comes_after(session: Session) -> None:
    compare = wire.encode_compare(EPOCH, 0, 0, 1, hashlib.sha256(b"b").digest())
    session.receive(
        changes(10, write(0, b"a"))
        + compare
        + changes(11, write(0, b"b"))
        + compare
        + changes(12, write(0, b"c"))
        + compare
    )
    results = [wire.decode_result(frame.payload)[2] for frame in session.link.frames() if frame.kind == Kind.RESULT]
    assert results == [Verdict.DIFFERS, Verdict.EQUAL, Verdict.DIFFERS]


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (0, COMPARE_BLOCK_BYTES + 1), (SIZE, 1), (SIZE - 1, 2), (2**64 - 1, 2)]
)
def test_comparison_outside_the_volume_or_too_long_is_refused(session: Session, offset: int, length: int) -> None:
    session.refuses(wire.encode_compare(EPOCH, 0, offset, length, b"d" * 32), f"a comparison of {length} bytes")


@pytest.mark.parametrize(("offset", "length"), [(0, HOLE_COMPARE_BYTES + 1), (SIZE, 1), (2**64 - 1, 2)])
def test_question_for_a_hole_outside_the_volume_or_too_long_is_refused(
    session: Session, offset: int, length: int
) -> None:
    session.refuses(wire.encode_compare(EPOCH, 0, offset, length, HOLE), f"a comparison of {length} bytes")


def test_a_hole_is_told_without_reading_it_and_nothing_else_is_taken_for_one(session: Session) -> None:
    session.receive(changes(10, write(8192, b"data")))
    session.link.take()
    for offset, length, verdict in ((0, 8192, Verdict.EQUAL), (0, 8193, Verdict.DIFFERS), (12288, 4096, Verdict.EQUAL)):
        session.receive(wire.encode_compare(EPOCH, 0, offset, length, HOLE, Purpose.VERIFY))
        [result] = session.link.frames()
        assert wire.decode_result(result.payload) == (offset, length, verdict)


@pytest.mark.parametrize("purpose", Purpose)
def test_what_cannot_be_read_is_a_failure_unless_it_will_be_repaired(session: Session, purpose: Purpose) -> None:
    session.stores[0].broken = True
    compare = wire.encode_compare(EPOCH, 0, 0, 4096, bytes([1]) * 32, purpose)
    if purpose is not Purpose.REPAIR:
        with pytest.raises(StorageError):
            session.receive(compare)
        assert session.link.take() == b""
        return
    session.receive(compare)
    [result] = session.link.frames()
    assert wire.decode_result(result.payload) == (0, 4096, Verdict.UNREADABLE)


def test_outcomes_of_a_verify_are_told_and_those_of_a_sync_are_not(session: Session) -> None:
    for purpose in Purpose:
        session.receive(wire.encode_compare(EPOCH, 1, 4096, 4096, hashlib.sha256(bytes(4096)).digest(), purpose))
    assert session.verified == [(1, 4096, 4096, Verdict.EQUAL)] * 2


def test_malformed_comparison_is_refused(session: Session) -> None:
    session.refuses(wire.frame(Kind.COMPARE, EPOCH, payload=bytes(43)), "wrong length")


def test_synced_is_told_once_for_each_frame(session: Session) -> None:
    session.receive(wire.frame(Kind.SYNCED, EPOCH))
    assert session.synced == 1
    assert session.answers() == [(Kind.SYNCED, 0)]


def test_synced_that_cannot_be_made_durable_is_not_answered(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk() -> None:
        raise StorageError("no space is left")

    monkeypatch.setattr(session.secondary, "_synced", full_disk)
    with pytest.raises(StorageError):
        session.receive(wire.frame(Kind.SYNCED, EPOCH))
    assert session.answers() == []


def test_first_change_says_its_number_if_the_session_did_not(session: Session) -> None:
    session.secondary = Secondary(session.stores, EPOCH, session.link, 0, session._synced)
    session.receive(changes(77, write(0, b"a")) + changes(78, write(1, b"b")))
    assert session.answers()[-1] == (Kind.ACK, 78)
    with pytest.raises(ProtocolError, match="change 80 came after change 78"):
        session.receive(changes(80, write(0, b"x")))


def test_connections_of_the_owners_clients_are_told(session: Session) -> None:
    told = list[list[wire.Endpoint]]()
    session.secondary = Secondary(session.stores, EPOCH, session.link, 1, session._synced, told.append)
    session.receive(wire.encode_clients(EPOCH, [("192.0.2.9", 40000, "192.0.2.21", 10809)]))
    session.receive(wire.encode_clients(EPOCH, []))
    assert told == [[("192.0.2.9", 40000, "192.0.2.21", 10809)], []]


def test_ping_is_answered_with_its_number(session: Session) -> None:
    session.receive(wire.frame(Kind.PING, EPOCH, 99))
    assert session.answers() == [(Kind.PONG, 99)]


@pytest.mark.parametrize(
    "kind",
    sorted(set(Kind) - {Kind.CHANGES, Kind.FLUSH, Kind.COMPARE, Kind.SYNCED, Kind.PING, Kind.CLIENTS, Kind.VERIFY}),
)
def test_frames_that_an_owner_does_not_send_are_refused(session: Session, kind: Kind) -> None:
    session.refuses(wire.frame(kind, EPOCH), f"an unexpected {kind.name} frame")


def test_acknowledgement_comes_after_a_ping_that_was_sent_later_is_no_error(session: Session) -> None:
    session.receive(wire.frame(Kind.PING, EPOCH, 1) + changes(10, write(0, b"x")) + wire.frame(Kind.PING, EPOCH, 2))
    assert sorted(kinds(session.link.frames())) == [Kind.ACK, Kind.PONG, Kind.PONG]


# --- Not falling silent -----------------------------------------------------------------------


def test_long_zeroing_is_done_over_several_calls_and_acknowledged_in_between(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secondary_module, "ZERO_PIECE_BYTES", 1000)
    zeroes = [request(TRIM, 1, 600 * at, 600) for at in range(5)]
    session.receive(changes(10, *zeroes) + changes(15, write(0, b"end")))
    acked = []
    while True:
        acked.append(session.answers()[-1])
        if not session.secondary.behind:
            break
        session.receive(b"")
    assert acked == [(Kind.ACK, 11), (Kind.ACK, 13), (Kind.ACK, 15)]
    assert session.rest == b""
