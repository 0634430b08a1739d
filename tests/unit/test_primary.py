"""The owner's end of the mirror: what is answered when, what is sent again, what is bounded; and the whole pair.

The last part runs the real primary and the real secondary against each other, through connections that
break anywhere, and checks the safety rules after every step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
from fakes import (
    FUA,
    TRIM,
    WRITE,
    MemoryClient,
    MemoryLink,
    MemoryMap,
    MemoryStore,
    kinds,
    load_differences,
    no_differences,
    request,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stortrends_ha.errors import PeerFailedError, ProtocolError, StorageError
from stortrends_ha.limits import LINK_BACKLOG_BYTES
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Frame, Kind
from stortrends_ha.protocol.nbd_transmission import OP_WRITE, Decoder, Geometry
from stortrends_ha.replication import differences as differences_module
from stortrends_ha.replication import primary as primary_module
from stortrends_ha.replication import resync as resync_module
from stortrends_ha.replication import stream as stream_module
from stortrends_ha.replication.primary import Primary
from stortrends_ha.replication.secondary import Secondary
from stortrends_ha.replication.session import Plan
from stortrends_ha.replication.write_through import Cache

EPOCH = 7
SIZE = 1 << 20


class Owner:
    """A primary of two volumes, with a client and a link that are looked at."""

    def __init__(
        self,
        window_changes: int = 1000,
        window_bytes: int = 1 << 30,
        alone: bool = False,
        caches: tuple[Cache, Cache] = (Cache.MIRRORED, Cache.MIRRORED),
    ) -> None:
        self.stores = [MemoryStore(SIZE), MemoryStore(SIZE)]
        self.failures: list[StorageError] = []
        self.settled: list[int] = []
        self.uncopied: list[StorageError] = []
        self.client = MemoryClient()
        self.link = MemoryLink()
        self.differences = [no_differences(SIZE, 8 << 10), no_differences(SIZE, 8 << 10)]
        self.primary = Primary(
            self.stores,
            self.differences,
            EPOCH,
            alone=alone,
            window_changes=window_changes,
            window_bytes=window_bytes,
            failed=self.failures.append,
            settled=self.settled.append,
            uncopied=self.uncopied.append,
            caches=caches,
        )
        self.primary.attach(self.client)

    def open(self, plan: Plan = Plan.RESUME, room_bytes: int | None = None) -> None:
        """``Plan.SYNC``: of everything, which is compared."""
        self.link = MemoryLink(room_bytes)
        fill = (lambda: None) if plan is Plan.SYNC else None
        self.primary.open_session(self.link, plan, compare=plan is Plan.SYNC, fill=fill)
        if plan is not Plan.RESUME:
            self.receive(wire.end_of_regions(EPOCH, blank=False))

    def drained(self) -> None:
        self.link.backlog_bytes = 0
        self.primary.pump()

    def submit(self, *requests: bytes, volume: int = 0, client: MemoryClient | None = None) -> int:
        stream = b"".join(requests)
        batch = Decoder(Geometry(SIZE)).decode(memoryview(stream), len(stream))
        assert batch.consumed == len(stream)
        return self.primary.submit(client or self.client, volume, batch, memoryview(stream))

    def write(self, cookie: int, offset: int = 0, payload: bytes = b"x", flags: int = 0) -> None:
        self.submit(request(WRITE, cookie, offset, flags=flags, payload=payload))

    def flush(self, volume: int = 0) -> None:
        self.primary.flush(self.client, volume, [b"\x67\x44\x66\x98\0\0\0\0" + (99).to_bytes(8)])

    def receive(self, *frames: bytes) -> None:
        data = b"".join(frames)
        assert self.primary.receive(memoryview(data), len(data)) == len(data)

    def ack(self, seq: int) -> None:
        self.receive(wire.frame(Kind.ACK, EPOCH, seq))

    def flushed(self, number: int) -> None:
        self.receive(wire.frame(Kind.FLUSHED, EPOCH, number))


@pytest.fixture(scope="module", autouse=True)
def nothing_is_kept_in_the_log() -> Iterator[None]:
    """But what a checkpoint must not let go."""
    with patch.object(differences_module, "INTENT_KEPT_CHECKPOINTS", 0):
        yield


@pytest.fixture
def owner() -> Owner:
    owner = Owner()
    owner.open()
    return owner


# --- Answers ----------------------------------------------------------------------------------


def test_change_is_answered_when_the_secondary_has_acknowledged_it(owner: Owner) -> None:
    owner.submit(request(WRITE, 5, payload=b"x"), request(TRIM, 6, 0, 1))
    assert owner.client.answered() == []
    assert not owner.primary.idle
    owner.ack(2)
    assert owner.client.answered() == [5, 6]
    assert owner.primary.idle


def test_part_of_a_batch_is_answered_if_only_that_was_acknowledged(owner: Owner) -> None:
    owner.submit(*(request(WRITE, n, n, payload=b"x") for n in range(1, 6)))
    for seq, answered in ((2, [1, 2]), (3, [3]), (5, [4, 5])):
        owner.ack(seq)
        assert owner.client.answered() == answered
    assert owner.primary.bytes_in_flight == 0


def test_each_client_gets_its_own_answers(owner: Owner) -> None:
    other = MemoryClient()
    owner.write(1)
    owner.submit(request(WRITE, 2, payload=b"x"), client=other)
    owner.write(3)
    owner.ack(3)
    assert owner.client.answered() == [1, 3]
    assert other.answered() == [2]


def test_own_replica_has_the_change_at_once(owner: Owner) -> None:
    owner.submit(request(WRITE, 1, 512, payload=b"data"), volume=1)
    assert owner.stores[1].data[512:516] == b"data"


@pytest.mark.parametrize("first", ["local", "peer"])
def test_flush_is_answered_when_both_replicas_are_stable(owner: Owner, first: str) -> None:
    owner.flush()
    for one in (first, "peer" if first == "local" else "local"):
        assert owner.client.answered() == []
        assert not owner.primary.idle
        if one == "local":
            owner.stores[0].end_flushes()
        else:
            owner.flushed(1)
    assert owner.client.answered() == [99]
    assert owner.primary.idle


def test_fua_is_answered_by_the_flush_and_not_by_the_acknowledgement(owner: Owner) -> None:
    owner.submit(request(WRITE, 1, payload=b"x", flags=FUA), request(WRITE, 2, payload=b"y"))
    assert kinds(owner.link.frames()) == [Kind.CHANGES, Kind.FLUSH]
    owner.ack(2)
    assert owner.client.answered() == [2]
    owner.stores[0].end_flushes()
    assert owner.client.answered() == []
    owner.flushed(1)
    assert owner.client.answered() == [1]


def test_flush_covers_writes_of_other_clients_and_goes_behind_them_on_the_link(owner: Owner) -> None:
    other = MemoryClient()
    owner.submit(request(WRITE, 1, payload=b"x"), client=other)
    owner.flush()
    assert kinds(owner.link.frames()) == [Kind.CHANGES, Kind.FLUSH]


# --- Without a session ------------------------------------------------------------------------


def test_without_a_session_changes_are_applied_and_held() -> None:
    owner = Owner()
    owner.write(1)
    owner.flush()
    owner.stores[0].end_flushes()
    assert owner.stores[0].data[:1] == b"x"
    assert owner.client.answered() == []
    owner.open()
    assert kinds(owner.link.frames()) == [Kind.CHANGES, Kind.FLUSH]
    owner.ack(1)
    owner.flushed(1)
    assert owner.client.answered() == [1, 99]


def test_what_is_unanswered_is_sent_again_from_its_first_change_on(owner: Owner) -> None:
    owner.submit(*(request(WRITE, n, n, payload=b"abc"[n : n + 1]) for n in range(3)))
    owner.write(9, 100)
    owner.ack(1)
    owner.primary.close_session()
    assert not owner.primary.connected
    owner.open()
    sent = owner.link.frames()
    assert [(frame.kind, frame.seq) for frame in sent] == [(Kind.CHANGES, 2), (Kind.CHANGES, 4)]
    assert [len(frame.payload) for frame in sent] == [2 * 29, 29]
    owner.ack(4)
    assert owner.client.answered() == [0, 1, 2, 9]


def test_what_is_sent_again_has_the_content_of_now(owner: Owner) -> None:
    owner.write(1, 0, b"old")
    owner.write(2, 0, b"new")
    owner.link.take()
    owner.primary.close_session()
    owner.open()
    assert [frame.payload[28:] for frame in owner.link.frames()] == [b"new", b"new"]


def test_flush_that_the_peer_has_ended_is_not_asked_for_again(owner: Owner) -> None:
    owner.flush()
    owner.flush()
    owner.flushed(1)
    owner.primary.close_session()
    owner.open()
    assert [(frame.kind, frame.seq) for frame in owner.link.frames()] == [(Kind.FLUSH, 2)]
    owner.stores[0].end_flushes()
    assert owner.client.answered() == [99]


# --- A slow link ------------------------------------------------------------------------------


def test_nothing_is_added_to_a_backlog_above_its_bound() -> None:
    owner = Owner()
    owner.open(room_bytes=0)
    big = b"x" * (256 << 10)
    for n in range(20):
        owner.write(n, 0, big)
    assert LINK_BACKLOG_BYTES < owner.link.backlog_bytes <= LINK_BACKLOG_BYTES + len(big) + 100
    sent = len(owner.link.frames())
    owner.drained()
    frames = owner.link.frames()
    assert frames[0].seq == sent + 1


def test_flush_is_not_starved_by_writes_that_come_after_it() -> None:
    owner = Owner()
    owner.open(room_bytes=0)
    big = b"x" * (LINK_BACKLOG_BYTES + 1)
    owner.write(1, 0, b"first")
    for _ in range(2):
        owner.link.backlog_bytes = LINK_BACKLOG_BYTES + 1
        owner.write(2)
    owner.flush()
    frames = list[Frame]()
    with patch.object(owner.stores[0], "read", lambda _offset, _length: big):  # each fills the link anew
        for n in range(10):
            owner.write(3 + n)
            owner.drained()
            frames += owner.link.frames()
    flush = kinds(frames).index(Kind.FLUSH)
    assert frames[flush - 1].seq == 3


def test_waiting_changes_leave_in_order_when_the_link_has_drained() -> None:
    owner = Owner()
    owner.open(room_bytes=0)
    owner.link.backlog_bytes = LINK_BACKLOG_BYTES + 1
    for n in range(5):
        owner.write(n, n, b"%d" % n)
    assert owner.link.frames() == []
    owner.drained()
    assert [(frame.seq, frame.payload[28:]) for frame in owner.link.frames()] == [(n + 1, b"%d" % n) for n in range(5)]


# --- Bounds -----------------------------------------------------------------------------------


def test_client_is_paused_at_the_bound_of_changes_and_goes_on_below_it() -> None:
    owner = Owner(window_changes=3)
    owner.open()
    for n in (1, 2):
        owner.write(n)
        assert not owner.client.paused
    owner.write(3)
    assert owner.client.paused
    owner.ack(1)
    assert not owner.client.paused


def test_client_is_paused_at_the_bound_of_bytes_and_goes_on_below_it() -> None:
    owner = Owner(window_bytes=1000)
    owner.open()
    owner.submit(request(TRIM, 1, 0, SIZE), request(WRITE, 2, payload=b"x" * 999))
    assert not owner.client.paused
    owner.write(3)
    assert owner.client.paused
    owner.ack(3)
    assert not owner.client.paused
    assert owner.primary.bytes_in_flight == 0


def test_flushes_and_waiting_reads_count_as_changes_do() -> None:
    owner = Owner(window_changes=3)
    owner.open()
    owner.write(1)
    owner.primary.when_settled(lambda: None)
    owner.flush()
    assert owner.client.paused
    owner.ack(1)
    assert not owner.client.paused


def test_all_clients_are_paused_and_go_on_together() -> None:
    owner, other, gone = Owner(window_changes=2), MemoryClient(), MemoryClient()
    owner.open()
    owner.primary.attach(other)
    owner.primary.attach(gone)
    owner.write(1)
    owner.primary.detach(gone)
    owner.write(2)
    late = MemoryClient()
    owner.primary.attach(late)
    assert (owner.client.paused, other.paused, gone.paused, late.paused) == (True, True, False, True)
    owner.ack(2)
    assert (owner.client.paused, other.paused, gone.paused, late.paused) == (False, False, False, False)


def test_before_the_first_session_clients_wait_and_after_it_they_do_not() -> None:
    owner = Owner()
    assert owner.client.paused
    owner.open()
    assert not owner.client.paused
    owner.primary.close_session()
    assert not owner.client.paused


def test_who_stops_taking_pauses_all_clients_for_good_and_still_answers(owner: Owner) -> None:
    owner.write(1)
    owner.primary.stop_taking()
    assert owner.client.paused
    owner.ack(1)
    assert owner.client.answered() == [1]
    assert owner.client.paused


# --- Reads ------------------------------------------------------------------------------------


def test_read_waits_for_changes_in_flight_that_it_overlaps(owner: Owner) -> None:
    owner.write(1, 0)
    assert owner.primary.in_flight(0, 0, 1)
    assert not owner.primary.in_flight(0, SIZE - 1, 1)
    assert not owner.primary.in_flight(1, 0, 1)
    calls = list[str]()
    owner.primary.when_settled(lambda: calls.append("read"))
    owner.write(2, 0)
    owner.ack(1)
    assert calls == ["read"]
    assert owner.primary.in_flight(0, 0, 1)
    owner.ack(2)
    assert not owner.primary.in_flight(0, 0, 1)
    assert calls == ["read"]


# --- What the peer must not do ----------------------------------------------------------------


@pytest.mark.parametrize("seq", [3, 4, 2**64 - 1])
def test_acknowledgement_of_what_was_not_sent_is_refused(owner: Owner, seq: int) -> None:
    owner.write(1)
    owner.write(2)
    with pytest.raises(ProtocolError, match=f"an acknowledgement of change {seq}"):
        owner.ack(seq)
    assert owner.client.answered() == []


def test_acknowledgement_of_what_waits_for_the_link_is_refused() -> None:
    owner = Owner()
    owner.open(room_bytes=0)
    owner.write(1)
    owner.link.backlog_bytes = LINK_BACKLOG_BYTES + 1
    owner.write(2)
    with pytest.raises(ProtocolError):
        owner.ack(2)


def test_acknowledgement_that_goes_back_is_refused(owner: Owner) -> None:
    owner.write(1)
    owner.write(2)
    owner.ack(2)
    with pytest.raises(ProtocolError):
        owner.ack(1)


@pytest.mark.parametrize("number", [0, 2, 2**64 - 1])
def test_end_of_a_flush_that_was_not_begun_is_refused(owner: Owner, number: int) -> None:
    owner.flush()
    with pytest.raises(ProtocolError, match=f"flush number {number}"):
        owner.flushed(number)


def test_end_of_a_flush_that_was_not_sent_is_refused() -> None:
    owner = Owner()
    owner.open(room_bytes=0)
    owner.link.backlog_bytes = LINK_BACKLOG_BYTES + 1
    owner.write(1)
    owner.flush()
    owner.stores[0].end_flushes()
    with pytest.raises(ProtocolError):
        owner.flushed(1)
    owner.drained()
    assert owner.client.answered() == []


def test_end_of_a_flush_that_was_sent_in_an_earlier_session_only_is_refused(owner: Owner) -> None:
    owner.flush()
    owner.primary.close_session()
    owner.link = MemoryLink()
    owner.link.backlog_bytes = LINK_BACKLOG_BYTES + 1
    owner.write(1)
    owner.primary.open_session(owner.link, Plan.RESUME)
    assert kinds(owner.link.frames()) == [Kind.FLUSH]  # it covers nothing, so it need not wait
    owner.flushed(1)
    with pytest.raises(ProtocolError):
        owner.flushed(1)


@pytest.mark.parametrize(
    "result",
    [(0, 0, 4096, True), (7, 0, 4096, False), (0, 1 << 40, 4096, False), (0, 0, 2**32 - 1, False)],
)
def test_result_that_answers_no_comparison_is_refused(result: tuple[int, int, int, bool]) -> None:
    for plan in (Plan.SYNC, Plan.RECONCILE, Plan.RESUME):
        owner = Owner(alone=plan is Plan.SYNC)
        owner.stores[0].data[:] = b"x" * SIZE
        owner.open(plan)
        with pytest.raises(ProtocolError):
            owner.receive(wire.encode_result(EPOCH, *result))
        assert owner.failures == []


def test_result_that_comes_twice_is_refused() -> None:
    owner = Owner(alone=True)
    owner.stores[0].data[:] = b"x" * SIZE
    owner.open(Plan.SYNC)
    compare = next(frame for frame in owner.link.frames() if frame.kind == Kind.COMPARE)
    offset, length, _ = wire.decode_compare(compare.payload)
    owner.receive(wire.encode_result(EPOCH, 0, offset, length, True))
    with pytest.raises(ProtocolError):
        owner.receive(wire.encode_result(EPOCH, 0, offset, length, True))


@pytest.mark.parametrize(
    "kind", sorted(set(Kind) - {Kind.ACK, Kind.FLUSHED, Kind.PONG, Kind.FAILED, Kind.RESULT, Kind.CHANGES, Kind.VERIFY})
)
def test_frames_that_a_secondary_does_not_send_are_refused(owner: Owner, kind: Kind) -> None:
    with pytest.raises(ProtocolError, match=f"an unexpected {kind.name} frame"):
        owner.receive(wire.frame(kind, EPOCH))


def test_changes_from_a_secondary_are_refused(owner: Owner) -> None:
    data = wire.changes_header(EPOCH, 1, 0, 0)
    with pytest.raises(ProtocolError, match="CHANGES"):
        owner.primary.receive(memoryview(data), len(data))


def test_frame_of_another_epoch_is_refused(owner: Owner) -> None:
    owner.write(1)
    with pytest.raises(ProtocolError, match="epoch"):
        owner.receive(wire.frame(Kind.ACK, EPOCH + 1, 1))
    assert owner.client.answered() == []


def test_unfinished_frame_waits_for_its_rest(owner: Owner) -> None:
    owner.write(1)
    data = wire.frame(Kind.ACK, EPOCH, 1) + wire.frame(Kind.PONG, EPOCH, 77)
    assert owner.primary.receive(memoryview(data), 40) == 24
    assert owner.client.answered() == [1]
    assert owner.primary.pong == 0
    owner.receive(data[24:])
    assert owner.primary.pong == 77


def test_failure_of_the_peer_is_told_in_its_words(owner: Owner) -> None:
    with pytest.raises(PeerFailedError, match="the disk of node-b is broken"):
        owner.receive(wire.encode_object(Kind.FAILED, EPOCH, {"reason": "the disk of node-b is broken"}))


# --- The own disk fails -----------------------------------------------------------------------


def test_change_that_the_own_disk_refused_is_never_answered(owner: Owner) -> None:
    owner.stores[0].broken = True
    owner.write(1)
    assert len(owner.failures) == 1
    assert owner.primary.failed
    assert not owner.primary.connected
    assert owner.client.answered() == []
    assert owner.client.paused


def test_read_that_waits_is_not_answered_any_more_when_the_own_disk_has_failed(alone: Owner) -> None:
    calls = list[str]()
    alone.write(1)
    alone.primary.when_settled(lambda: calls.append("read"))
    alone.stores[0].broken = True
    alone.write(2)
    alone.stores[0].end_flushes()
    alone.primary.stop_taking()
    assert (calls, alone.client.answered()) == ([], [])


def test_own_disk_that_fails_when_data_is_sent_again_ends_the_session() -> None:
    owner = Owner()
    owner.write(1)
    owner.stores[0].broken = True
    owner.open()
    assert len(owner.failures) == 1
    assert not owner.primary.connected


def test_only_good_copy_that_cannot_be_read_for_a_resync_is_served_on() -> None:
    owner = Owner(alone=True)
    owner.stores[0].data[:1] = b"x"
    owner.open(Plan.SYNC)
    owner.stores[0].broken = True
    compare = next(frame for frame in owner.link.frames() if frame.kind == Kind.COMPARE)
    offset, length, _ = wire.decode_compare(compare.payload)
    owner.receive(wire.encode_result(EPOCH, 0, offset, length, False))
    assert len(owner.uncopied) == 1
    assert not owner.failures
    assert not owner.primary.failed


# --- Alone ------------------------------------------------------------------------------------


@pytest.fixture
def alone() -> Owner:
    owner = Owner(alone=True)
    for store in owner.stores:
        store.end_flushes()
    return owner


def synced(owner: Owner) -> None:
    """A full sync of equal, empty replicas up to the word of the secondary that it is durable there."""
    owner.open(Plan.SYNC)
    for _ in range(20):
        for frame in owner.link.frames():
            if frame.kind == Kind.FLUSH:
                owner.flushed(frame.seq)
            elif frame.kind == Kind.COMPARE:
                offset, length, _ = wire.decode_compare(frame.payload)
                owner.receive(wire.encode_result(EPOCH, frame.volume, offset, length, True))
            elif frame.kind == Kind.SYNCED:
                owner.receive(wire.frame(Kind.SYNCED, EPOCH))
                return
        if owner.primary.issued != owner.primary.acked:
            owner.ack(owner.primary.issued)
        for store in owner.stores:
            store.end_flushes()
    raise AssertionError("no SYNCED")


def test_alone_a_change_is_answered_when_it_is_stable_here(alone: Owner) -> None:
    alone.write(1)
    assert alone.client.answered() == []
    alone.stores[0].end_flushes()
    assert alone.client.answered() == [1]
    assert alone.stores[0].stable[:1] == b"x"
    assert alone.primary.idle


def test_alone_one_flush_covers_all_that_was_applied_before_it(alone: Owner) -> None:
    for n in range(10):
        alone.write(n, n)
    assert len(alone.stores[0].flushes) == 1
    alone.stores[0].end_flushes()
    assert alone.client.answered() == [0]
    assert len(alone.stores[0].flushes) == 1
    alone.stores[0].end_flushes()
    assert alone.client.answered() == list(range(1, 10))
    assert alone.stores[0].flushes == []


def test_alone_a_slow_disk_holds_only_its_own_volume(alone: Owner) -> None:
    alone.submit(request(WRITE, 1, payload=b"x"), volume=0)
    alone.submit(request(WRITE, 2, payload=b"x"), volume=1)
    alone.stores[1].end_flushes()
    assert alone.client.answered() == [2]


def test_alone_a_flush_waits_for_this_node_only(alone: Owner) -> None:
    alone.flush()
    assert alone.client.answered() == []
    alone.stores[0].end_flushes()
    assert alone.client.answered() == [99]


def test_alone_a_read_of_what_is_not_stable_waits(alone: Owner) -> None:
    calls = list[str]()
    alone.submit(request(WRITE, 1, payload=b"x", flags=FUA))
    assert alone.primary.changing
    assert alone.primary.in_flight(0, 0, 1)
    assert not alone.primary.in_flight(0, SIZE - 1, 1)
    alone.primary.when_settled(lambda: calls.append("read"))
    alone.stores[0].end_flushes()
    assert not alone.primary.in_flight(0, 0, 1)
    assert not alone.primary.changing
    assert (calls, alone.client.answered()) == (["read"], [1])


def test_alone_clients_are_paused_at_the_bounds() -> None:
    for window_changes, window_bytes in ((2, 1000), (1000, 2)):
        owner = Owner(window_changes, window_bytes, alone=True)
        assert not owner.client.paused
        owner.write(1)
        owner.write(2)
        assert owner.client.paused
        owner.stores[0].end_flushes()
        owner.stores[0].end_flushes()
        assert not owner.client.paused


def test_going_alone_answers_what_was_held_as_soon_as_it_is_stable(owner: Owner) -> None:
    owner.write(1)
    owner.submit(request(WRITE, 2, payload=b"y", flags=FUA))
    owner.flush()
    owner.primary.close_session()
    owner.stores[0].end_flushes()
    assert owner.client.answered() == []
    owner.write(3)
    owner.primary.change_record(EPOCH + 1, alone=True)
    assert sorted(owner.client.answered()) == [2, 99]  # their own flush has ended
    owner.stores[0].end_flushes()
    assert owner.client.answered() == [1, 3]
    assert owner.primary.idle


def test_owner_is_settled_when_all_that_was_cached_before_is_stable(owner: Owner) -> None:
    owner.primary.close_session()
    owner.primary.change_record(EPOCH + 1, alone=True)
    owner.stores[0].end_flushes()
    assert owner.settled == []
    owner.stores[1].end_flushes()
    assert owner.settled == [EPOCH + 1]


def test_owner_that_is_joined_before_it_has_settled_has_not(alone: Owner) -> None:
    synced(alone)
    alone.primary.lock()
    alone.primary.close_session()
    alone.primary.change_record(EPOCH + 1, alone=True)
    alone.primary.change_record(EPOCH + 2, alone=False)
    alone.stores[0].end_flushes()
    alone.stores[1].end_flushes()
    assert alone.settled == [EPOCH]


def test_volume_that_is_always_cached_is_answered_at_once_when_alone() -> None:
    owner = Owner(alone=True, caches=(Cache.ALWAYS, Cache.MIRRORED))
    owner.write(1)
    assert owner.client.answered() == [1]
    owner.submit(request(WRITE, 2, payload=b"x", flags=FUA))
    owner.flush()
    assert owner.client.answered() == []
    owner.stores[0].end_flushes()
    assert owner.client.answered() == [2, 99]


@pytest.mark.parametrize("is_alone", [False, True])
def test_volume_that_is_never_cached_makes_every_write_stable_before_its_answer(is_alone: bool) -> None:
    owner = Owner(alone=is_alone, caches=(Cache.NEVER, Cache.MIRRORED))
    if not is_alone:
        owner.open()
    owner.write(1)
    if not is_alone:
        assert kinds(owner.link.frames()) == [Kind.CHANGES, Kind.FLUSH]
        owner.ack(1)
        owner.flushed(1)
    assert owner.client.answered() == []
    owner.stores[0].end_flushes()
    assert owner.client.answered() == [1]
    assert owner.primary.idle


# --- Joining ----------------------------------------------------------------------------------


def test_while_a_sync_runs_answers_do_not_wait_for_the_peer(alone: Owner) -> None:
    alone.stores[0].data[:] = b"x" * SIZE
    alone.open(Plan.SYNC)
    alone.write(1)
    alone.stores[0].end_flushes()
    assert alone.client.answered() == [1]
    assert alone.primary.issued > alone.primary.acked
    assert not alone.primary.joinable
    alone.primary.close_session()
    assert alone.primary.issued == alone.primary.acked
    assert alone.primary.bytes_in_flight == 0


def test_when_everything_is_copied_answers_wait_for_both_nodes(alone: Owner) -> None:
    synced(alone)
    assert alone.primary.joinable
    alone.write(1)
    alone.stores[0].end_flushes()
    assert alone.client.answered() == []
    alone.ack(alone.primary.issued)
    assert alone.client.answered() == [1]
    alone.write(2)
    alone.ack(alone.primary.issued)
    assert alone.client.answered() == []
    alone.stores[0].end_flushes()
    assert alone.client.answered() == [2]


def test_session_that_breaks_before_anybody_was_told_lets_the_owner_go_on_alone(alone: Owner) -> None:
    synced(alone)
    alone.write(1)
    alone.flush()
    alone.stores[0].end_flushes()
    alone.primary.close_session()
    assert sorted(alone.client.answered()) == [1, 99]
    assert not alone.primary.joinable


def test_session_that_breaks_after_the_supervisor_was_told_holds_every_answer(alone: Owner) -> None:
    synced(alone)
    alone.primary.lock()
    alone.primary.close_session()
    assert alone.primary.held
    alone.write(1)
    alone.flush()
    alone.stores[0].end_flushes()
    assert alone.client.answered() == []
    alone.primary.change_record(EPOCH, alone=True)
    assert not alone.primary.held
    assert sorted(alone.client.answered()) == [1, 99]


def test_joined_owner_sends_what_the_secondary_lacks_and_answers_as_mirrored(alone: Owner) -> None:
    synced(alone)
    alone.primary.lock()
    alone.write(1)
    alone.primary.close_session()
    alone.primary.change_record(EPOCH + 1, alone=False)
    alone.write(2)
    assert not alone.primary.ahead
    alone.link = MemoryLink()
    alone.primary.open_session(alone.link, Plan.RESUME)
    first = alone.primary.acked + 1
    sent = alone.link.frames()
    assert [(frame.kind, frame.seq) for frame in sent] == [(Kind.CHANGES, first), (Kind.CHANGES, first + 1)]
    alone.receive(wire.frame(Kind.ACK, EPOCH + 1, first + 1))
    assert alone.client.answered() == [2]  # the one before is still written through
    alone.stores[0].end_flushes()
    assert alone.client.answered() == [1]


def test_record_that_adds_a_secondary_which_was_not_joinable_leaves_the_owner_ahead(alone: Owner) -> None:
    alone.primary.change_record(EPOCH + 1, alone=False)
    assert alone.primary.ahead
    alone.primary.change_record(EPOCH + 2, alone=True)
    assert not alone.primary.ahead


def test_synced_that_was_not_asked_for_is_refused(alone: Owner) -> None:
    alone.stores[0].data[:] = b"x" * SIZE
    alone.open(Plan.SYNC)
    with pytest.raises(ProtocolError, match="SYNCED"):
        alone.receive(wire.frame(Kind.SYNCED, EPOCH))


def test_regions_are_told_once_in_a_session_that_copies(alone: Owner) -> None:
    alone.open(Plan.SYNC)
    with pytest.raises(ProtocolError, match="REGIONS"):
        alone.receive(wire.end_of_regions(EPOCH, blank=False))


def test_nothing_is_copied_before_the_secondary_has_said_what_it_knows_and_all_of_it_is_dirty_durably() -> None:
    owner, calls = Owner(alone=True), list[str]()
    dirty = [MemoryMap(at_once=False), MemoryMap(at_once=False)]
    for differences, file in zip(owner.differences, dirty, strict=True):
        differences._dirty_file = file
    owner.link = MemoryLink()
    owner.primary.open_session(owner.link, Plan.SYNC, fill=lambda: calls.append("filled"))
    owner.receive(wire.end_of_regions(EPOCH, blank=False))
    dirty[0].end_writes()
    assert (calls, owner.primary.resync) == ([], None)
    dirty[1].end_writes()
    assert calls == ["filled"]
    assert owner.primary.resync is not None


def test_what_the_secondary_says_may_differ_is_compared() -> None:
    owner = Owner(alone=True)
    owner.stores[1].data[:] = b"x" * SIZE
    owner.link = MemoryLink()
    owner.primary.open_session(owner.link, Plan.SYNC)
    for message in wire.encode_regions(EPOCH, 1, [(0, 8192)]):
        owner.receive(message)
    assert owner.link.frames() == []
    owner.receive(wire.end_of_regions(EPOCH, blank=False))
    [compare] = owner.link.frames()
    assert (compare.volume, wire.decode_compare(compare.payload)[:2]) == (1, (0, 8192))


# --- The intent log ---------------------------------------------------------------------------


def logged_write(owner: Owner) -> None:
    calls = list[str]()
    while not owner.primary.logged(0, [(OP_WRITE, 0, 1, 0)], lambda: calls.append("again")):
        assert calls == ["again"]
    owner.write(1)


def test_region_leaves_the_log_when_both_have_flushed(owner: Owner) -> None:
    logged_write(owner)
    owner.ack(1)
    owner.primary.checkpoint()
    assert owner.client.answered() == [1]
    assert owner.primary.unanswered == 0
    owner.stores[0].end_flushes()
    assert owner.differences[0].regions == 1
    owner.flushed(1)
    assert owner.differences[0].regions == 0


def test_without_a_session_nothing_leaves_the_log_of_who_is_mirrored(owner: Owner) -> None:
    logged_write(owner)
    owner.primary.checkpoint()
    owner.primary.close_session()
    owner.primary.checkpoint()
    owner.stores[0].end_flushes()
    assert owner.differences[0].regions == 1
    owner.primary.change_record(EPOCH + 1, alone=True)
    for _ in range(3):
        owner.primary.checkpoint()
        owner.stores[0].end_flushes()
    assert owner.differences[0].ranges()


def test_alone_a_region_leaves_the_log_when_the_dirty_map_has_it(alone: Owner) -> None:
    logged_write(alone)
    assert alone.differences[0].regions == 1
    alone.primary.checkpoint()
    assert alone.differences[0].regions == 0
    assert list(alone.differences[0].dirty) == [0]


def test_what_the_secondary_has_not_flushed_stays_in_the_log_while_it_is_added(alone: Owner) -> None:
    synced(alone)
    alone.primary.lock()
    logged_write(alone)
    alone.primary.checkpoint()
    alone.ack(alone.primary.issued)
    for _ in range(3):
        alone.stores[0].end_flushes()
    alone.primary.close_session()
    alone.primary.checkpoint()
    alone.stores[0].end_flushes()
    alone.primary.change_record(EPOCH + 1, alone=False)
    assert not alone.differences[0].any
    assert alone.differences[0].regions == 1


def test_break_of_a_session_ends_no_checkpoint_that_waited_for_the_secondary(alone: Owner) -> None:
    synced(alone)
    logged_write(alone)
    alone.primary.checkpoint()
    alone.primary.close_session()
    for _ in range(3):
        alone.stores[0].end_flushes()
    assert alone.differences[0].regions == 1


# --- Release ----------------------------------------------------------------------------------


def test_drained_owner_has_answered_everything_and_flushed_both_replicas(owner: Owner) -> None:
    calls = list[str]()
    owner.write(1)
    owner.primary.drain(lambda: calls.append("drained"))
    assert owner.client.paused
    assert kinds(owner.link.frames()) == [Kind.CHANGES]
    owner.ack(1)
    assert owner.client.answered() == [1]
    assert kinds(owner.link.frames()) == [Kind.FLUSH, Kind.FLUSH]
    for store in owner.stores:
        store.end_flushes()
    owner.flushed(1)
    assert calls == []
    owner.flushed(2)
    assert calls == ["drained"]
    assert owner.client.paused
    owner.primary.take_again()
    assert not owner.client.paused


# --- The pair ---------------------------------------------------------------------------------

REGION = 64 << 10
VOLUME = 2 * REGION


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    with (
        patch.multiple(
            resync_module,
            COMPARE_BLOCK_BYTES=16 << 10,
            COMPARE_BLOCKS_IN_FLIGHT=3,
            RESYNC_FLUSH_BYTES=24 << 10,
            ZERO_PIECE_BYTES=32 << 10,
            WRITE_PIECE_BYTES=8 << 10,
        ),
        patch.multiple(
            differences_module,
            INTENT_REGION_BYTES=32 << 10,
            INTENT_AHEAD=2,
            _REGION_SHIFT=15,
        ),
    ):
        yield


@dataclass
class Written:
    """A change that a client sent: its bytes are ``version``; 0 is a trim."""

    offset: int
    length: int
    version: int
    number: int
    answered: bool = False
    lost: bool = False  # the owner was killed before it answered


@dataclass
class Pipe:
    """A connection's way in one direction; what is in it is lost when it breaks. Implements ``Link``."""

    queue: bytearray = field(default_factory=bytearray)

    @property
    def backlog_bytes(self) -> int:
        return len(self.queue)

    def send(self, buffers: list[bytes | bytearray | memoryview], length: int) -> None:
        data = b"".join(map(bytes, buffers))
        assert len(data) == length
        self.queue += data


class Pair:
    """Two nodes and the record of the one that owns. Every step checks what may never be wrong."""

    def __init__(self, own: bytes, its: bytes) -> None:
        self.own, self.its = MemoryStore(VOLUME), MemoryStore(VOLUME)
        for store, content in ((self.own, own), (self.its, its)):
            store.data[:] = b"".join(bytes([value]) * (VOLUME // len(content)) for value in content)
            store.stable = bytes(store.data)
        self.epoch = EPOCH
        self.in_sync = own == its  # by the record
        self.its_lost = False  # what was only cached at the secondary
        self.must_fill = not self.in_sync
        self.intents, self.dirty = MemoryMap(at_once=False), MemoryMap(at_once=False)
        self.written: list[Written] = []
        self.waiting: list[tuple[int, int, bool, int]] = []  # writes that wait for the log
        self.flushing: list[list[Written]] = []
        self.secondary: Secondary | None = None
        self._start()

    def _start(self) -> None:
        self.differences = load_differences(VOLUME, self.intents, self.dirty, block_bytes=8 << 10)
        self.primary = Primary(
            [self.own],
            [self.differences],
            self.epoch,
            alone=not self.in_sync,
            window_changes=20,
            window_bytes=1 << 20,
            failed=self._failed,
        )
        self.primary.attach(self)
        self._forget_link()

    def _forget_link(self) -> None:
        self.to_secondary, self.to_owner = Pipe(), Pipe()
        self.rest = {"secondary": b"", "owner": b""}
        self.secondary = None

    # What the primary calls

    def answer(self, replies: bytes) -> None:
        for at in range(0, len(replies), 16):
            cookie = int.from_bytes(replies[at + 8 : at + 16])
            if cookie < 1000:
                self._write_answered(self.written[cookie])
            else:
                self._flush_answered(self.flushing[cookie - 1000])

    @staticmethod
    def _failed(error: StorageError) -> None:
        raise AssertionError(error)

    def pause(self) -> None:
        """The script goes on: a bound is no matter of safety."""

    def resume(self) -> None:
        """See ``pause``."""

    # Checks

    def _newest(self, at: int, number: int) -> set[int]:
        """What may be at a place once change ``number`` is there: that, or something newer."""
        return {w.version for w in self.written if w.number >= number and w.offset <= at < w.offset + w.length}

    @property
    def _needs_secondary(self) -> bool:
        """Also while it is not known whether the record adds it (``locked``). It had the change when it said so: what
        it has lost with its power since keeps it from owning (rule 3), if the owner's is stable."""
        return (self.in_sync or self.primary.locked) and not self.its_lost

    def _write_answered(self, written: Written) -> None:
        """Rule 1: it is on both replicas; or stable on the owner, when that is alone. While it is not known which of
        them the record says, both."""
        assert not written.answered
        written.answered = True
        for at in (written.offset, written.offset + written.length - 1):
            allowed = self._newest(at, written.number)
            assert self.own.data[at] in allowed
            if self._needs_secondary:
                assert self.its.data[at] in allowed
            if not self.in_sync or self.its_lost:
                assert self.own.stable[at] in allowed

    def _flush_answered(self, covered: list[Written]) -> None:
        for written in covered:
            for at in (written.offset, written.offset + written.length - 1):
                allowed = self._newest(at, written.number)
                assert self.own.stable[at] in allowed
                if self._needs_secondary:
                    assert self.its.stable[at] in allowed

    def check_read(self, offset: int, length: int) -> None:
        """What a read returns, a failover or a loss of power does not take back; until it has settled, an owner that
        went alone does not own after a loss of power (rule 3), and shows what was answered before."""
        if self.primary.in_flight(0, offset, length) or not self.primary.opened or self.its_lost:
            return
        found = self.own.data[offset : offset + length]
        if self.in_sync:
            assert found == self.its.data[offset : offset + length]
        else:
            for at, (shown, stable) in enumerate(
                zip(found, self.own.stable[offset : offset + length], strict=True), offset
            ):
                assert shown == stable or shown in {written.version for written in self._answered_at(at)}

    def _answered_at(self, at: int) -> list[Written]:
        return [of for of in self.written if of.answered and of.offset <= at < of.offset + of.length]

    # Steps

    def write(self, offset: int, length: int, trim: bool = False, flags: int = 0) -> None:
        self.waiting.append((offset, min(length, VOLUME - offset), trim, flags))
        self._submit()

    def _submit(self) -> None:
        """Rule 8: what is in the log is submitted."""
        while self.waiting:
            offset, length, trim, flags = self.waiting[0]
            cookie = len(self.written)
            version = 0 if trim else cookie + 1
            payload = b"" if trim else bytes([version % 256]) * length
            stream = request(TRIM if trim else WRITE, cookie, offset, length, flags, payload)
            batch = Decoder(Geometry(VOLUME)).decode(memoryview(stream), len(stream))
            if not self.primary.logged(0, batch.changes, self._submit):
                return
            del self.waiting[0]
            self.written.append(Written(offset, length, version % 256, cookie))
            for region in range(offset >> 15, ((offset + length - 1) >> 15) + 1):
                assert region in self.intents.load(VOLUME >> 15, power_lost=True)
            self.primary.submit(self, 0, batch, memoryview(stream))

    def flush(self) -> None:
        self.flushing.append([written for written in self.written if written.answered])
        cookie = 1000 + len(self.flushing) - 1
        self.primary.flush(self, 0, [bytes(8) + cookie.to_bytes(8)])

    def break_link(self) -> None:
        if self.primary.connected:
            self.primary.close_session()
            self._forget_link()

    def kill(self) -> None:
        """The owner's process dies, and is started again; the page cache stays, and the kernel writes it back."""
        if self.primary.locked and not self.its_lost:  # the record was changed before the supervisor heard of it
            self.epoch += 1
            self.in_sync = True
        for written in self.written:
            written.lost = not written.answered
        self.waiting.clear()
        for file in (self.intents, self.dirty):
            file.pending.clear()
        self.own.flushes.clear()
        self.own.stable = bytes(self.own.data)
        self._start()

    def its_power(self) -> None:
        """The secondary's host is restarted."""
        self.break_link()
        self.its.flushes.clear()
        self.its.data[:] = self.its.stable
        self.its_lost = True

    def go_alone(self) -> None:
        """Rule 2: granted, when the link is lost."""
        if self.in_sync and not self.primary.connected:
            self.epoch += 1
            self.in_sync = False
            self.primary.change_record(self.epoch, alone=True)

    def tell(self) -> None:
        """The supervisor hears whether the secondary may be added."""
        self.primary.lock()

    def join(self) -> None:
        """Rule 9: the record adds the secondary, which was ``joinable``, whatever became of the session since."""
        if not self.in_sync and self.primary.locked:
            self.break_link()
            for at in range(0, VOLUME, 512):
                written = [one for one in self.written if one.offset <= at < one.offset + one.length]
                if self.its_lost:
                    continue
                if all(one.answered or one.lost for one in written):
                    assert self.its.data[at] == self.own.data[at]
                if not written:
                    assert self.its.stable[at] == self.own.data[at]
            self.epoch += 1
            self.in_sync = True
            self.primary.change_record(self.epoch, alone=False)
            assert not self.primary.ahead

    def stay_alone(self) -> None:
        """The record did not add it."""
        if self.primary.held:
            self.primary.change_record(self.epoch, alone=True)

    def connect(self) -> None:
        if self.primary.connected or self.primary.held:
            return
        if self.in_sync and self.its_lost:  # UNFIT
            self.go_alone()
        plan = Plan.SYNC if not self.in_sync else Plan.RECONCILE if self.differences.any else Plan.RESUME
        fill = self._filled if self.must_fill else None
        first = 0 if plan is Plan.SYNC else self.primary.acked + 1
        self.secondary = Secondary([self.its], self.epoch, self.to_owner, first, self._synced)
        self.primary.open_session(self.to_secondary, plan, compare=fill is not None, fill=fill)
        if plan is not Plan.RESUME:
            self.to_owner.queue += wire.end_of_regions(self.epoch, blank=False)

    def _filled(self) -> None:
        self.must_fill = False

    def _synced(self) -> None:
        self.its_lost = False
        assert not self.must_fill

    def deliver_to_secondary(self, length: int) -> None:
        if self.secondary is not None:
            data = self.rest["secondary"] + bytes(self.to_secondary.queue[:length])
            del self.to_secondary.queue[:length]
            self.rest["secondary"] = data[self.secondary.receive(memoryview(data), len(data)) :]
            if not self.to_secondary.queue:
                self.primary.pump()

    def deliver_to_owner(self, length: int) -> None:
        if self.secondary is not None:
            data = self.rest["owner"] + bytes(self.to_owner.queue[:length])
            del self.to_owner.queue[:length]
            self.rest["owner"] = data[self.primary.receive(memoryview(data), len(data)) :]

    def go_on(self, rounds: int = 1) -> None:
        """Whatever is under way comes further."""
        for _ in range(rounds):
            self.intents.end_writes()
            self.dirty.end_writes()
            self.own.end_flushes()
            self.its.end_flushes()
            self.deliver_to_secondary(1 << 30)
            self.deliver_to_owner(1 << 30)

    def finish(self) -> None:
        """Everything goes well from now on: everything is answered, and the replicas are the same."""
        self.join()
        for _ in range(1000):
            self.stay_alone()
            self.connect()
            self.go_on()
            self.tell()
            self.join()
            if self.primary.idle and self.primary.resync is None and self.in_sync and self.primary.connected:
                break
        assert self.primary.idle
        assert self.primary.resync is None
        assert self.in_sync
        assert all(written.answered or written.lost for written in self.written)
        assert not self.waiting
        self.deliver_to_secondary(1 << 30)
        assert self.own.data == self.its.data
        self._be_quiet()

    def _be_quiet(self) -> None:
        """Bounded: nothing is left where the replicas may differ, once both have flushed."""
        for _ in range(2):
            self.primary.checkpoint()
            self.go_on(3)
        assert not self.differences.any
        assert self.differences.regions == 0
        assert self.its.stable == self.own.stable == self.own.data
        assert not load_differences(VOLUME, self.intents, self.dirty, block_bytes=8 << 10).any


places = st.one_of(st.integers(0, VOLUME - 1), st.sampled_from([0, REGION - 1, REGION]))
lengths = st.sampled_from([1, 512, 5000, 30_000, VOLUME])
bytes_delivered = st.sampled_from([1, 20, 60, 3000, 50_000, 1 << 30])
steps = st.one_of(
    st.tuples(st.just("write"), places, lengths),
    st.tuples(st.just("write"), places, lengths),
    st.tuples(st.just("fua"), places, lengths),
    st.tuples(st.just("trim"), places, lengths),
    st.tuples(st.just("flush")),
    st.tuples(st.just("to secondary"), bytes_delivered),
    st.tuples(st.just("to secondary"), bytes_delivered),
    st.tuples(st.just("to owner"), bytes_delivered),
    st.tuples(st.just("own disk")),
    st.tuples(st.just("its disk")),
    st.tuples(st.just("break")),
    st.tuples(st.just("connect")),
    st.tuples(st.just("connect")),
    st.tuples(st.just("go alone")),
    st.tuples(st.just("tell")),
    st.tuples(st.just("join")),
    st.tuples(st.just("stay alone")),
    st.tuples(st.just("read"), places),
    st.tuples(st.just("log file")),
    st.tuples(st.just("log file")),
    st.tuples(st.just("dirty file")),
    st.tuples(st.just("go on"), st.sampled_from([1, 2, 20])),
    st.tuples(st.just("go on"), st.sampled_from([1, 2, 20])),
    st.tuples(st.just("go on"), st.sampled_from([1, 2, 20])),
    st.tuples(st.just("small write"), st.integers(0, 15)),
    st.tuples(st.just("small write"), st.integers(0, 15)),
    st.tuples(st.just("checkpoint")),
    st.tuples(st.just("kill")),
    st.tuples(st.just("its power")),
)
# A list strategy alone rarely makes long ones.
scripts = st.integers(0, 120).flatmap(lambda n: st.lists(steps, min_size=n, max_size=n))
# What each eighth of a replica is full of at the start.
contents = st.lists(st.sampled_from([0, 251, 252]), min_size=8, max_size=8).map(bytes)


def carry_out(pair: Pair, step: tuple[object, ...]) -> None:
    what = step[0]
    numbers = [value for value in step[1:] if isinstance(value, int)]
    if what in ("write", "fua", "trim"):
        pair.write(numbers[0], numbers[1], trim=what == "trim", flags=FUA if what == "fua" else 0)
    elif what == "read":
        pair.check_read(numbers[0], min(5000, VOLUME - numbers[0]))
    elif what == "small write":
        pair.write(numbers[0] << 13, 512)
    elif what == "go on":
        pair.go_on(*numbers)
    elif what == "to secondary":
        pair.deliver_to_secondary(*numbers)
    elif what == "to owner":
        pair.deliver_to_owner(*numbers)
    else:
        {
            "connect": pair.connect,
            "go alone": pair.go_alone,
            "tell": pair.tell,
            "join": pair.join,
            "stay alone": pair.stay_alone,
            "flush": pair.flush,
            "own disk": pair.own.end_flushes,
            "its disk": pair.its.end_flushes,
            "break": pair.break_link,
            "log file": lambda: pair.intents.end_writes(1),
            "dirty file": lambda: pair.dirty.end_writes(1),
            "checkpoint": pair.primary.checkpoint,
            "kill": pair.kill,
            "its power": pair.its_power,
        }[str(what)]()


@settings(deadline=None, max_examples=300)
@given(contents, contents, st.booleans(), scripts, st.sampled_from([100, 40_000, 1 << 20]))
@example(
    bytes(8),
    bytes(8),
    False,
    [
        *[("flush",)] * 11, ("its power",), ("connect",), ("write", 0, 1), ("go on", 20), *[("write", 0, 1)] * 3,
        ("tell",), ("go on", 1), ("write", 0, 1), ("join",), ("its power",), ("go on", 1),
    ],
    100,
)  # fmt: skip
@example(
    b"\0",
    b"\xfb",
    False,
    [("connect",), ("write", 0, VOLUME), ("to secondary", 1 << 30), ("break",)],
    100,
)
@example(
    b"\0",
    b"\0",
    True,
    [
        ("connect",),
        ("write", 0, 512),
        ("fua", 0, 512),
        ("to secondary", 1 << 30),
        ("break",),
        ("trim", 0, 1),
        ("write", 0, 1),
    ],
    100,
)
def test_pair_keeps_the_rules_whatever_happens_to_the_link(
    own: bytes, its: bytes, same: bool, script: list[tuple[object, ...]], backlog_bytes: int
) -> None:
    with (
        patch.object(primary_module, "LINK_BACKLOG_BYTES", backlog_bytes),
        patch.object(stream_module, "LINK_BACKLOG_BYTES", backlog_bytes),
    ):
        pair = Pair(own, own if same else its)
        for step in script:
            carry_out(pair, step)
        pair.finish()


def test_what_a_resync_has_under_way_does_not_count_as_held_for_clients() -> None:
    owner = Owner(alone=True)
    owner.open(Plan.SYNC)
    assert owner.primary.issued > owner.primary.acked  # the trims of holes
    assert owner.primary.unanswered == 0
    assert not owner.primary.idle
