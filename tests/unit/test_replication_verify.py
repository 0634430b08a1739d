"""A verify between the real ends of a stream: what it finds and repairs while clients write, and what it must not."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
from fakes import WRITE, MemoryClient, MemoryMap, MemoryStore, frames_of, kinds, load_differences, request
from hypothesis import given, settings
from hypothesis import strategies as st

from stortrends_ha.errors import ProtocolError, StorageError
from stortrends_ha.limits import VERIFY_BLOCKS_IN_FLIGHT
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Kind, Verdict
from stortrends_ha.protocol.nbd_transmission import Decoder, Geometry
from stortrends_ha.replication import differences as differences_module
from stortrends_ha.replication import primary as primary_module
from stortrends_ha.replication import secondary as secondary_module
from stortrends_ha.replication import stream as stream_module
from stortrends_ha.replication import verify as verify_module
from stortrends_ha.replication.block_map import BlockMap
from stortrends_ha.replication.interfaces import Buffer
from stortrends_ha.replication.primary import Primary
from stortrends_ha.replication.secondary import Secondary
from stortrends_ha.replication.session import Plan
from stortrends_ha.replication.verify import Findings, FreshReads, Repair, Verify, ranges_of

EPOCH = 7
BLOCK, PIECE, REGION = 8 << 10, 32 << 10, 64 << 10
BACKLOG = 16 << 10
SIZE = 6 * REGION - 4096
BLOCKS = 48
SMALL: dict[Any, dict[str, Any]] = {
    verify_module: {
        "COMPARE_GRAIN_BYTES": BLOCK, "COMPARE_BLOCK_BYTES": PIECE, "HOLE_COMPARE_BYTES": 4 * PIECE, "VERIFY_PARTS": 2,
        "REPAIR_FLUSH_BYTES": 2 * BLOCK, "VERIFY_PUT_OFF": 3, "_RECENT_BYTES": 2 * PIECE,
    },
    differences_module: {
        "INTENT_REGION_BYTES": REGION, "_REGION_SHIFT": 16,
    },
    secondary_module: {"COMPARE_BLOCK_BYTES": PIECE, "HOLE_COMPARE_BYTES": 4 * PIECE},
    stream_module: {"LINK_BACKLOG_BYTES": BACKLOG},
    primary_module: {"LINK_BACKLOG_BYTES": BACKLOG},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    with ExitStack() as stack:
        for module, names in SMALL.items():
            stack.enter_context(patch.multiple(module, **names))
        yield


class Wire:
    """One direction of a connection. Implements ``Link``."""

    def __init__(self) -> None:
        self.queue = bytearray()

    @property
    def backlog_bytes(self) -> int:
        return len(self.queue)

    def send(self, buffers: list[Buffer], length: int) -> None:
        data = b"".join(map(bytes, buffers))
        assert len(data) == length
        self.queue += data

    def take(self, nbytes: int = 1 << 30) -> bytes:
        """What the network brings to the other end."""
        data = bytes(self.queue[:nbytes])
        del self.queue[:nbytes]
        return data


class Pair:
    """Two nodes in sync, two volumes of equal content, and a connection that delivers when it is told."""

    def __init__(self, *, logs_at_once: bool = True) -> None:
        self.own, self.its = ([MemoryStore(SIZE) for _ in range(2)] for _ in range(2))
        for store in (*self.own, *self.its):
            store.flush_at_once = True
            store.data[: SIZE // 2] = b"d" * (SIZE // 2)  # the rest is a hole
        self.logs = [MemoryMap(logs_at_once) for _ in range(2)]
        self.primary = Primary(
            self.own, [load_differences(SIZE, log, MemoryMap(), block_bytes=BLOCK) for log in self.logs], EPOCH,
            alone=False, window_changes=1000, window_bytes=1 << 30, failed=self._failed,
        )  # fmt: skip
        self.failures: list[StorageError] = []
        self.client = MemoryClient()
        self.primary.attach(self.client)
        self.findings, self.its_findings = (
            [Findings(BlockMap(BLOCKS), MemoryMap()) for _ in range(2)] for _ in range(2)
        )
        self.planted: set[tuple[int, int]] = set()  # (volume, block)
        self.written: set[tuple[int, int]] = set()
        self.ended = 0
        self.connect()

    def _failed(self, error: StorageError) -> None:
        self.failures.append(error)

    def connect(self) -> None:
        self.to_its, self.to_own, self.rest = Wire(), Wire(), b""
        self.secondary = Secondary(
            self.its, EPOCH, self.to_own, self.primary.acked + 1, lambda: None, verified=self._its_compared
        )
        self.primary.open_session(self.to_its, Plan.RESUME)

    def _its_compared(self, volume: int, offset: int, length: int, verdict: Verdict) -> None:
        self.its_findings[volume].note(offset, length, verdict)

    def _compared(self, volume: int, offset: int, length: int, verdict: Verdict) -> None:
        self.findings[volume].note(offset, length, verdict)

    def _ended(self) -> None:
        self.ended += 1

    # What happens

    def begin(self, repair: Repair = Repair.NOTHING, volumes: tuple[int, ...] = (0, 1)) -> Verify:
        verify = Verify(
            self.primary, self.own, self.primary._differences, volumes, repair, self._compared, self._ended
        )  # fmt: skip
        self.primary.begin_verify(verify)
        return verify

    def begin_held(self) -> Verify:
        """Without a budget."""

        def hold() -> None:
            assert self.primary.verify is not None
            self.primary.verify.budget_bytes = 0

        with patch.object(self.primary, "job_begun", hold):
            return self.begin()

    def plant(self, volume: int, block: int, at: int = 0) -> None:
        """Something that the secondary's disk made of a block by itself."""
        offset = min(block * BLOCK + at, SIZE - 1)
        self.its[volume].data[offset] ^= 0xA5
        self.planted.add((volume, offset // BLOCK))

    def write(self, volume: int, offset: int, payload: bytes) -> None:
        payload = payload[: SIZE - offset]
        stream = request(WRITE, 1, offset, payload=payload)
        batch = Decoder(Geometry(SIZE)).decode(memoryview(stream), len(stream))
        while not self.primary.logged(volume, batch.changes, lambda: None):
            pass
        self.primary.submit(self.client, volume, batch, memoryview(stream))
        self.written |= {(volume, block) for block in range(offset // BLOCK, (offset + len(payload) - 1) // BLOCK + 1)}

    def deliver(self, nbytes: int = 1 << 30) -> None:
        """The secondary gets so much; its answers come back."""
        self.receive(self.to_its.take(nbytes))
        self.primary.pump()
        if data := self.to_own.take():
            assert self.primary.receive(memoryview(data), len(data)) == len(data)

    def receive(self, data: bytes) -> None:
        """The secondary's end."""
        data = self.rest + data
        used = self.secondary.receive(memoryview(data + b"\xaa" * 64), len(data))
        self.rest = data[used:]

    def finish(self) -> None:
        for _ in range(2000):
            if self.primary.verify is None:
                return
            self.deliver()
        raise AssertionError("the verify does not end")

    @staticmethod
    def block(store: MemoryStore, block: int) -> bytearray:
        return store.data[block * BLOCK : (block + 1) * BLOCK]

    def found(self, verify: Verify) -> set[tuple[int, int]]:
        return {(volume, block) for volume, blocks in verify.found.items() for block in blocks}

    def known(self) -> list[int]:
        return [findings.nbytes // BLOCK for findings in (*self.findings, *self.its_findings)]


@pytest.fixture
def pair() -> Pair:
    return Pair()


# --- What is found ----------------------------------------------------------------------------


def test_equal_replicas_are_found_equal_and_holes_are_not_read(pair: Pair) -> None:
    verify = pair.begin()
    pair.finish()
    assert (verify.why, pair.ended, pair.found(verify)) == ("", 1, set())
    assert verify.done_bytes == verify.total_bytes == 2 * SIZE
    data = SIZE // 2 + PIECE  # to the end of the piece in which the hole begins
    for store in (*pair.own, *pair.its):
        assert sum(length for _, length in store.renewed) <= data + 2 * PIECE


@pytest.mark.parametrize("block", [0, 3, 11, 22, 25, 47])
def test_one_byte_that_differs_is_found_by_both_nodes_to_the_block(pair: Pair, block: int) -> None:
    pair.plant(1, block)
    verify = pair.begin()
    pair.finish()
    assert pair.found(verify) == {(1, block)}
    assert pair.known() == [0, 1, 0, 1]
    for findings in (pair.findings[1], pair.its_findings[1]):
        assert findings.ranges() == [(block * BLOCK, BLOCK)]


def test_only_the_volumes_that_were_asked_for_are_compared(pair: Pair) -> None:
    pair.plant(0, 5)
    verify = pair.begin(volumes=(1,))
    pair.finish()
    assert (pair.found(verify), verify.total_bytes) == (set(), SIZE)


def test_what_was_found_is_known_until_it_is_found_equal(pair: Pair) -> None:
    pair.plant(0, 5)
    pair.plant(0, 6)
    pair.begin()
    pair.finish()
    assert pair.findings[0].ranges() == [(5 * BLOCK, 2 * BLOCK)]
    pair.write(0, 5 * BLOCK, b"n" * BLOCK)  # a client makes them equal
    assert pair.known() == [2, 0, 2, 0]
    again = pair.begin()
    pair.finish()
    assert pair.found(again) == {(0, 6)}
    assert pair.known() == [1, 0, 1, 0]


def test_what_is_known_is_saved() -> None:
    file = MemoryMap()
    findings = Findings(BlockMap(BLOCKS), file)
    findings.note(3 * BLOCK, BLOCK, Verdict.DIFFERS)
    findings.note(4 * BLOCK, BLOCK, Verdict.UNREADABLE)
    findings.note(0, PIECE, Verdict.DIFFERS)  # too coarse to say where
    assert [*file.load(BLOCKS, power_lost=True)] == [3, 4]
    findings.note(0, PIECE, Verdict.EQUAL)
    assert [*file.load(BLOCKS, power_lost=True)] == [4]


def test_told_ranges_are_bounded() -> None:
    blocks = BlockMap(1000)
    for block in range(0, 1000, 2):
        blocks.add(block, block)
    assert ranges_of(blocks) == [(block * BLOCK, BLOCK) for block in range(0, 64, 2)]


# --- One instant of the stream (rule 7) -----------------------------------------------------------


def compares(frames: list[wire.Frame]) -> list[tuple[int, int]]:
    return [(frame.volume, wire.decode_compare(frame.payload)[0]) for frame in frames if frame.kind == Kind.COMPARE]


def crowd(pair: Pair, content: bytes = b"n") -> None:
    """The link is full, and a write to the first block waits for it; then the link has room again."""
    for at in range(3):
        pair.write(1, at * BLOCK, b"w" * BLOCK)
    pair.write(0, 0, content * BLOCK)
    assert pair.primary._unsent
    pair.receive(pair.to_its.take())


def test_nothing_is_compared_ahead_of_a_change_to_it_that_waits_for_the_link(pair: Pair) -> None:
    verify = pair.begin()
    pair.finish()
    assert not pair.found(verify)
    verify = pair.begin_held()
    crowd(pair)
    verify.budget_bytes = 1 << 30
    assert pair.primary._step(pair.to_its)  # before anything else is sent
    while pair.primary._step(pair.to_its):
        pass
    sent = frames_of(bytes(pair.to_its.queue))
    assert set(kinds(sent)) == {Kind.COMPARE}
    assert (0, 0) not in compares(sent)
    assert (0, 2 * PIECE) in compares(sent)  # where nobody is writing (in a region) nothing waits


@pytest.mark.parametrize("waits", [True, False])
def test_comparing_what_waits_for_the_link_would_find_what_is_no_difference(pair: Pair, waits: bool) -> None:
    """With the rule, and with the rule taken out."""
    with ExitStack() as stack:
        if not waits:
            stack.enter_context(patch.object(Primary, "is_sent", lambda *_: True))
        verify = pair.begin_held()
        for content in b"abcdefgh":  # the link is never without something that waits for it
            crowd(pair, bytes([content]))
            verify.budget_bytes = 1 << 30
            pair.deliver()
        pair.finish()
    assert pair.found(verify) == (set() if waits else {(0, 0)})


def test_a_long_hole_that_is_written_before_it_is_asked_about_is_compared_in_parts(pair: Pair) -> None:
    with patch.object(pair.primary, "is_sent", lambda *_: False):  # put off, as if the link were full
        verify = pair.begin(volumes=(0,))
    pair.write(0, SIZE - 3 * PIECE, b"n" * PIECE)
    pair.finish()
    assert (verify.why, pair.found(verify)) == ("", set())


# --- Repair ---------------------------------------------------------------------------------------


def test_repair_makes_both_replicas_the_same(pair: Pair) -> None:
    for block in (0, 1, 2, 7, 30, 47):
        pair.plant(0, block)
    verify = pair.begin(Repair.ALL)
    pair.finish()
    assert pair.own[0].data == pair.its[0].data == bytearray(pair.its[0].stable)
    assert pair.found(verify) == pair.planted
    assert verify.repaired_bytes == {0: 6 * BLOCK - 4096, 1: 0}
    assert pair.known() == [0, 0, 0, 0]


def test_repaired_is_told_after_both_have_flushed(pair: Pair) -> None:
    pair.plant(0, 2)
    for store in (pair.own[0], pair.its[0]):
        store.flush_at_once = False
    verify = pair.begin(Repair.ALL)
    for _ in range(10):
        pair.deliver()
    assert pair.own[0].data == pair.its[0].data
    assert (verify.repaired_bytes[0], verify.finished, pair.findings[0].nbytes) == (0, False, BLOCK)
    for store in (pair.its[0], pair.own[0]):
        store.end_flushes()
    pair.finish()
    assert (verify.repaired_bytes[0], pair.findings[0].nbytes) == (BLOCK, 0)


def test_nothing_is_repaired_before_its_region_is_in_the_intent_log() -> None:
    """Rule 8."""
    pair = Pair(logs_at_once=False)
    pair.plant(0, 9)
    pair.begin(Repair.ALL)
    for _ in range(10):
        pair.deliver()
    assert pair.its[0].applied == []
    assert pair.findings[0].nbytes == BLOCK
    pair.logs[0].end_writes()
    pair.finish()
    assert pair.own[0].data == pair.its[0].data
    assert 9 * BLOCK // REGION in pair.logs[0].load(6, power_lost=True)


def test_without_a_source_only_what_the_secondary_cannot_read_is_repaired(pair: Pair) -> None:
    pair.plant(0, 4)
    pair.plant(0, 9)
    bad, read = range(9 * BLOCK, 10 * BLOCK), pair.its[0].read

    def failing(offset: int, length: int) -> Buffer:
        if offset < bad.stop and offset + length > bad.start and pair.its[0].data[bad.start] == 0xA5 ^ ord("d"):
            raise StorageError("volume v: the disk is bad there")
        return read(offset, length)

    with patch.object(pair.its[0], "read", failing):
        verify = pair.begin(Repair.UNREADABLE)
        pair.finish()
    assert pair.found(verify) == {(0, 4), (0, 9)}
    assert (verify.unreadable_bytes, verify.repaired_bytes[0]) == (BLOCK, BLOCK)
    assert pair.findings[0].ranges() == [(4 * BLOCK, BLOCK)]


def test_repair_that_does_not_help_is_no_loop(pair: Pair) -> None:
    pair.plant(0, 4)
    with patch.object(Secondary, "_apply", lambda _self, _view, at, end: end - at):  # a disk that forgets
        verify = pair.begin(Repair.ALL)
        pair.finish()
    assert (pair.found(verify), verify.repaired_bytes[0]) == ({(0, 4)}, 0)
    assert pair.known() == [1, 0, 1, 0]


# --- The end, bounds --------------------------------------------------------------------------------


def test_it_ends_with_the_session_and_says_so(pair: Pair) -> None:
    pair.plant(0, 2)
    verify = pair.begin(Repair.ALL)
    pair.primary.close_session()
    assert (verify.why, pair.ended, pair.primary.verify) == ("the link broke", 1, None)
    pair.connect()
    again = pair.begin(Repair.ALL)
    pair.finish()
    assert (again.why, pair.ended, pair.found(again)) == ("", 2, {(0, 2)})


def test_it_ends_when_the_own_disk_fails_in_it(pair: Pair) -> None:
    pair.own[1].broken = True
    verify = pair.begin()
    pair.finish()
    assert verify.why == "this node's replica has failed, or serves no more"
    assert (len(pair.failures), pair.ended) == (1, 1)


@pytest.mark.parametrize("turns", range(6))
def test_one_that_is_stopped_ends_when_nothing_of_it_is_under_way(pair: Pair, turns: int) -> None:
    for block in range(8):
        pair.plant(0, block)
    verify = pair.begin(Repair.ALL)
    for _ in range(turns):
        pair.deliver()
    assert not verify.finished
    verify.stop("it was stopped")
    pair.finish()
    assert (verify.why, pair.ended) == ("it was stopped", 1)
    pair.write(0, 0, b"n")
    pair.deliver()
    assert pair.primary.connected
    assert pair.primary.idle


def test_result_that_was_not_asked_for_is_refused(pair: Pair) -> None:
    pair.begin()
    result = wire.encode_result(EPOCH, 0, 4096, BLOCK, Verdict.EQUAL)
    with pytest.raises(ProtocolError, match="were not to be compared"):
        pair.primary.receive(memoryview(result), len(result))


def test_comparisons_under_way_and_bytes_read_are_bounded(pair: Pair) -> None:
    verify = pair.begin_held()
    assert not pair.to_its.queue
    verify.budget_bytes = 2 * BLOCK + 1
    pair.primary.pump()
    assert compares(frames_of(bytes(pair.to_its.queue))) == [(0, 0), (0, 2 * BLOCK)]
    assert verify.budget_bytes == 1 - BLOCK
    verify.budget_bytes = 1 << 30
    pair.primary.pump()
    assert len(compares(frames_of(bytes(pair.to_its.queue)))) == VERIFY_BLOCKS_IN_FLIGHT


def test_nothing_is_compared_while_the_window_is_full(pair: Pair) -> None:
    with patch.object(Primary, "full", True):
        verify = pair.begin()
        pair.deliver()
        assert (verify.done_bytes, pair.primary.job_waits) == (
            0, "the window is full of what the secondary has not applied yet",
        )  # fmt: skip
    pair.finish()
    assert verify.done_bytes == 2 * SIZE


def test_everything_is_read_from_the_disk_once_and_ahead() -> None:
    store = MemoryStore(SIZE)
    fresh = FreshReads(store)
    for _ in range(2):  # two verifies in one session
        store.renewed.clear()
        for offset in range(0, 6 * PIECE, PIECE):
            fresh.read(offset, PIECE)
            assert max(at + length for at, length in store.renewed) >= min(offset + 2 * PIECE, SIZE)
        fresh.read(5 * PIECE, BLOCK)  # once more, where it differed
        fresh.read(9 * PIECE, PIECE)  # beyond a hole
        renewed = [at for start, length in store.renewed for at in range(start, start + length, BLOCK)]
        assert len(renewed) == len(set(renewed))
        assert {*range(0, 6 * PIECE, BLOCK), *range(9 * PIECE, 10 * PIECE, BLOCK)} <= set(renewed)


# --- While clients write ----------------------------------------------------------------------------

places = st.tuples(st.integers(0, 1), st.integers(0, BLOCKS - 1), st.integers(0, BLOCK - 1))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 1), st.integers(0, SIZE - 1), st.integers(1, 3 * BLOCK)),
        st.tuples(st.just("deliver"), st.integers(1, 3 * BLOCK)),
        st.tuples(st.just("flush"), st.integers(0, 1)),
        st.tuples(st.just("checkpoint")),
        st.tuples(st.just("pump")),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=150)
@given(st.lists(places, max_size=8), steps, st.sampled_from([Repair.NOTHING, Repair.ALL]))
def test_everything_that_differs_is_found_and_nothing_else(
    planted: list[tuple[int, int, int]], script: list[tuple[Any, ...]], repair: Repair
) -> None:
    pair = Pair()
    for place in dict.fromkeys(planted):
        pair.plant(*place)
    verify = pair.begin(repair)
    for number, step in enumerate(script):
        match step:
            case ("write", volume, offset, length):
                pair.write(volume, offset, bytes([number + 1]) * length)
            case ("deliver", nbytes):
                pair.deliver(nbytes)
            case ("flush", volume):
                pair.primary.flush(pair.client, volume, [])
            case ("checkpoint",):
                pair.primary.checkpoint()
            case ("pump",):
                pair.primary.pump()
    for _ in range(200):
        pair.deliver()
    assert verify.finished
    assert (verify.why, pair.ended) == ("", 1)
    found = pair.found(verify)
    assert found <= pair.planted
    assert found >= pair.planted - pair.written
    differ = {
        (volume, block)
        for volume in range(2)
        for block in range(BLOCKS)
        if pair.block(pair.own[volume], block) != pair.block(pair.its[volume], block)
    }
    assert differ <= (set() if repair is Repair.ALL else found)
    assert [of.nbytes for of in pair.findings] == [of.nbytes for of in pair.its_findings]
