"""A resync: what is copied, compared, trimmed or left alone; what is clean when; that interruptions do not undo it."""

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
from fakes import MemoryStore, no_differences
from hypothesis import given, settings
from hypothesis import strategies as st

from stortrends_ha.errors import ProtocolError
from stortrends_ha.protocol.nbd_transmission import OP_PUNCH, OP_WRITE, Change
from stortrends_ha.replication import differences as differences_module
from stortrends_ha.replication import resync as resync_module
from stortrends_ha.replication.interfaces import Buffer
from stortrends_ha.replication.resync import Resync, digest

BLOCK, RUN, REGION = 8 << 10, 32 << 10, 64 << 10
SIZE = 2 * REGION - 4096
BLOCKS = 16


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    with (
        patch.multiple(
            resync_module,
            COMPARE_BLOCK_BYTES=RUN,
            COMPARE_BLOCKS_IN_FLIGHT=3,
            RESYNC_FLUSH_BYTES=RUN,
            ZERO_PIECE_BYTES=REGION,
            WRITE_PIECE_BYTES=BLOCK,
        ),
        patch.multiple(
            differences_module,
            INTENT_REGION_BYTES=REGION,
            _REGION_SHIFT=16,
        ),
    ):
        yield


class Pair:
    """Two replicas of two volumes, and a stream between them that has no delay but for results and flushes."""

    def __init__(self, block_bytes: int = BLOCK) -> None:
        self.own, self.its = ([MemoryStore(SIZE) for _ in range(2)] for _ in range(2))
        self.differences = [no_differences(SIZE, block_bytes) for _ in range(2)]
        self.put_ops: list[tuple[int, int, int, int]] = []
        self.compared: list[tuple[int, int, int]] = []
        self.results: list[tuple[int, int, int, bool]] = []
        self.flushes: list[Callable[[], None]] = []

    def begin(self, *, blank: bool = False, compare: bool = False) -> Resync:
        for differences in self.differences:
            differences.begin_session(sync=True)
        self.results.clear()
        self.flushes.clear()
        return Resync(self, self.own, self.differences, blank=blank, compare=compare)

    def fill(self, volume: int, byte: bytes, first: int = 0, last: int = BLOCKS - 1) -> None:
        """Blocks of the owner's replica."""
        end = min((last + 1) * BLOCK, SIZE)
        self.own[volume].data[first * BLOCK : end] = byte * (end - first * BLOCK)

    def write(self, volume: int, offset: int, byte: bytes) -> None:
        """A change of a client, in the stream."""
        changes: list[Change] = [(OP_WRITE, offset, 1, 0)]
        for store in (self.own[volume], self.its[volume]):
            store.apply(changes, byte)
        self.differences[volume].written(changes)

    # What a resync asks of the primary

    def put(self, volume: int, op: int, offset: int, length: int, data: Buffer) -> None:
        assert len(data) == (length if op == OP_WRITE else 0)
        self.put_ops.append((volume, op, offset, length))
        self.its[volume].apply([(op, offset, length, 0)], data)

    def compare(self, volume: int, offset: int, length: int, theirs: bytes) -> None:
        assert length <= RUN
        self.compared.append((volume, offset, length))
        equal = digest(self.its[volume].read(offset, length)) == theirs
        self.results.append((volume, offset, length, equal))

    def flush_everywhere(self, volume: int, done: Callable[[], None]) -> None:  # noqa: ARG002
        self.flushes.append(done)

    # The world

    def go_on(self, resync: Resync, steps: int = 1 << 30) -> None:
        while steps and not resync.waiting:
            resync.step()
            steps -= 1

    def end_flushes(self) -> None:
        flushes, self.flushes = self.flushes, []
        for done in flushes:
            done()

    def give_results(self, resync: Resync) -> None:
        results, self.results = self.results, []
        for result in results:
            resync.result(*result)

    def finish(self, resync: Resync) -> None:
        for _ in range(100):
            self.go_on(resync)
            self.give_results(resync)
            if resync.finished:
                break
        assert resync.finished

    def left(self, volume: int = 0) -> set[int]:
        return {*self.differences[volume].dirty, *self.differences[volume].doubtful}


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_nothing_is_done_where_nothing_differs(pair: Pair) -> None:
    pair.fill(0, b"x")
    resync = pair.begin()
    assert resync.waiting
    assert resync.finished
    assert (pair.put_ops, pair.compared, resync.total_bytes) == ([], [], 0)


def test_dirty_blocks_are_sent_and_no_others(pair: Pair) -> None:
    pair.fill(0, b"x")
    pair.differences[0].dirty.add(3, 4)
    pair.differences[0].dirty.add(15, 15)
    resync = pair.begin()
    pair.finish(resync)
    assert pair.put_ops == [
        (0, OP_WRITE, 3 * BLOCK, BLOCK), (0, OP_WRITE, 4 * BLOCK, BLOCK), (0, OP_WRITE, 15 * BLOCK, BLOCK - 4096),
    ]  # fmt: skip
    assert pair.compared == []
    assert resync.copied_bytes == resync.done_bytes == 3 * BLOCK - 4096


@pytest.mark.parametrize("size", [512, RUN])
def test_blocks_may_be_small_or_as_large_as_what_is_compared_at_once(size: int) -> None:
    pair = Pair(size)
    pair.fill(0, b"x")
    pair.its[0].data[:] = pair.own[0].data
    last = -(-SIZE // size) - 1
    for block in (1, 2, last):
        pair.own[0].apply([(OP_WRITE, block * size, 1, 0)], b"y")
        pair.differences[0].dirty.add(block, block)
    resync = pair.begin()
    pair.finish(resync)
    assert pair.own[0].data == pair.its[0].data
    assert resync.copied_bytes == SIZE - last * size + 2 * size
    for _ in range(2):
        resync.flush()
        pair.end_flushes()
    assert not pair.differences[0].any


@pytest.mark.parametrize("equal", [True, False])
def test_doubtful_blocks_are_compared_and_sent_only_if_they_differ(pair: Pair, equal: bool) -> None:
    pair.fill(0, b"x")
    if equal:
        pair.its[0].data[:] = pair.own[0].data
    pair.differences[0].doubt([(4 * BLOCK, 2 * BLOCK)])
    resync = pair.begin()
    pair.finish(resync)
    assert pair.compared == [(0, 4 * BLOCK, 2 * BLOCK)]
    assert resync.copied_bytes == (0 if equal else 2 * BLOCK)
    assert pair.its[0].data[4 * BLOCK : 6 * BLOCK] == b"x" * 2 * BLOCK


def test_dirty_blocks_are_compared_if_the_secondary_may_have_most_of_them(pair: Pair) -> None:
    pair.fill(0, b"x")
    pair.its[0].data[:] = pair.own[0].data
    pair.differences[0].doubt_all(lambda: None)
    resync = pair.begin(compare=True)
    pair.finish(resync)
    assert len(pair.compared) == 4
    assert resync.copied_bytes == 0


def test_holes_are_trims(pair: Pair) -> None:
    pair.its[0].data[:] = b"y" * SIZE
    pair.differences[0].dirty.add(2, 9)
    pair.finish(pair.begin())
    assert {op for _, op, _, _ in pair.put_ops} == {OP_PUNCH}
    assert pair.its[0].data[2 * BLOCK : 10 * BLOCK] == bytes(8 * BLOCK)
    assert pair.its[0].data[: 2 * BLOCK] == b"y" * 2 * BLOCK
    assert pair.its[0].data[10 * BLOCK :] == b"y" * (SIZE - 10 * BLOCK)


def test_holes_are_left_alone_at_a_secondary_that_is_blank(pair: Pair) -> None:
    pair.fill(0, b"x", 5, 6)
    for differences in pair.differences:
        differences.doubt_all(lambda: None)
    resync = pair.begin(blank=True)
    pair.finish(resync)
    assert [(volume, op) for volume, op, _, _ in pair.put_ops] == [(0, OP_WRITE)] * 2
    assert pair.own[0].data == pair.its[0].data
    assert resync.done_bytes == resync.total_bytes == 2 * SIZE


def test_what_is_written_into_a_hole_of_a_blank_secondary_meanwhile_is_not_clean_before_it_is_flushed(
    pair: Pair,
) -> None:
    pair.differences[0].doubt_all(lambda: None)
    resync = pair.begin(blank=True)
    assert not resync.waiting  # the hole was seen
    pair.write(0, 3 * BLOCK, b"z")
    pair.finish(resync)
    assert pair.own[0].data == pair.its[0].data
    assert 3 in pair.left()
    resync.flush()
    pair.end_flushes()
    assert pair.left() == set()


def test_what_is_written_into_a_long_hole_meanwhile_is_compared_in_pieces(pair: Pair) -> None:
    pair.differences[0].doubt([(0, SIZE)])
    resync = pair.begin()
    assert not resync.waiting
    pair.fill(0, b"z", 1, 15)
    pair.finish(resync)
    assert pair.own[0].data == pair.its[0].data


def test_nothing_is_clean_before_both_have_flushed_after_it_was_copied(pair: Pair) -> None:
    pair.fill(0, b"x")
    pair.differences[0].dirty.add(0, 1)
    resync = pair.begin()
    resync.flush()
    assert pair.flushes == []  # there is nothing to flush for
    pair.finish(resync)
    assert pair.left() == {0, 1}
    resync.flush()
    assert pair.left() == {0, 1}
    pair.write(0, BLOCK, b"y")
    pair.end_flushes()
    assert pair.left() == {1}
    resync.flush()
    pair.end_flushes()
    assert pair.left() == set()


def test_flushes_come_by_themselves_and_one_at_a_time(pair: Pair) -> None:
    pair.fill(0, b"x")
    pair.differences[0].dirty.fill()
    resync = pair.begin()
    pair.finish(resync)
    assert len(pair.flushes) == 1
    pair.end_flushes()
    assert pair.left() == set(range(4, BLOCKS))


def test_comparison_without_a_result_leaves_its_blocks_not_clean(pair: Pair) -> None:
    pair.fill(0, b"x")
    pair.differences[0].doubt([(0, RUN)])
    resync = pair.begin()
    pair.go_on(resync)
    assert not resync.finished
    resync.flush()
    pair.end_flushes()
    assert pair.left() == {0, 1, 2, 3}
    pair.give_results(resync)
    assert resync.finished
    assert pair.left() == {0, 1, 2, 3}
    pair.end_flushes()
    assert pair.left() == set()


def test_comparisons_under_way_are_bounded(pair: Pair) -> None:
    pair.fill(0, b"x")
    pair.differences[0].doubt([(0, SIZE)])
    resync = pair.begin()
    pair.go_on(resync)
    assert len(pair.results) == 3
    resync.result(*pair.results.pop())
    pair.go_on(resync)
    assert len(pair.results) == 3


def test_nothing_is_read_beyond_the_budget(pair: Pair) -> None:
    pair.fill(0, b"x")
    pair.differences[0].dirty.fill()
    resync = pair.begin()
    resync.budget_bytes = 0
    assert resync.waiting
    resync.budget_bytes = 1
    pair.go_on(resync)
    piece = resync.copied_bytes
    assert 0 < piece < RUN
    assert not resync.finished
    resync.budget_bytes += 2 * RUN
    pair.go_on(resync)
    assert piece < resync.copied_bytes <= 2 * RUN + piece
    resync.budget_bytes = SIZE
    pair.finish(resync)


def test_holes_cost_no_budget(pair: Pair) -> None:
    pair.differences[0].dirty.fill()
    resync = pair.begin()
    resync.budget_bytes = 1
    pair.finish(resync)


@pytest.mark.parametrize("result", [(0, 0, RUN, True), (0, 1, RUN, False), (9, 0, RUN, True)])
def test_result_that_was_not_asked_for_is_refused(pair: Pair, result: tuple[int, int, int, bool]) -> None:
    with pytest.raises(ProtocolError):
        pair.begin().result(*result)


def test_resync_that_is_interrupted_a_thousand_times_ends(pair: Pair) -> None:
    for volume in range(2):
        pair.fill(volume, b"x")
        pair.differences[volume].doubt_all(lambda: None)
    total, before = 0, 2 * BLOCKS
    for sessions in range(1000):
        resync = pair.begin()
        if not resync.total_bytes:
            break
        pair.go_on(resync, 1)
        total += resync.copied_bytes
        if sessions % 3:
            resync.flush()
            pair.end_flushes()
        now = len(pair.left(0)) + len(pair.left(1))
        assert now <= before
        before = now
        for differences in pair.differences:
            differences.end_session()
    assert (pair.left(0), pair.left(1)) == (set(), set())
    assert [store.data for store in pair.own] == [store.data for store in pair.its]
    assert total <= 2 * 2 * SIZE  # only what was not flushed is sent again


blocks = st.sets(st.integers(0, BLOCKS - 1))
script = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("write"), st.integers(0, SIZE - 1)),
        st.tuples(st.sampled_from(["flush", "flushed", "results", "break"]), st.just(0)),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=200)
@given(blocks, blocks, blocks, blocks, st.booleans(), st.booleans(), script)
def test_replicas_are_the_same_in_the_end_and_whatever_differs_is_known_all_the_time(
    data: set[int], its_data: set[int], dirty: set[int], doubtful: set[int], compare: bool, blank: bool,
    steps: list[tuple[str, int]],
) -> None:  # fmt: skip
    pair = Pair()
    for block in data:
        pair.fill(0, b"x", block, block)
    pair.its[0].data[:] = bytes(SIZE) if blank else pair.own[0].data
    for block in range(BLOCKS) if blank else dirty | doubtful:
        for of, chosen in ((pair.differences[0].dirty, dirty), (pair.differences[0].doubtful, doubtful)):
            if block in chosen or blank:
                of.add(block, block)
        if block in its_data and not blank:
            end = min((block + 1) * BLOCK, SIZE)
            pair.its[0].data[block * BLOCK : end] = b"y" * (end - block * BLOCK)
    resync = pair.begin(blank=blank, compare=compare and not blank)
    for number, (what, argument) in enumerate(steps):
        if what == "step":
            pair.go_on(resync, argument)
        elif what == "write":
            pair.write(0, argument, bytes([number + 1]))
        elif what == "flush":
            resync.flush()
        elif what == "flushed":
            pair.end_flushes()
        elif what == "results":
            pair.give_results(resync)
        else:
            resync = pair.begin(compare=compare)
        for block in range(BLOCKS):
            place = slice(block * BLOCK, (block + 1) * BLOCK)
            assert pair.own[0].data[place] == pair.its[0].data[place] or block in pair.left()
    pair.finish(resync)
    assert pair.own[0].data == pair.its[0].data
    for _ in range(3):
        resync.flush()
        pair.end_flushes()
    if not blank:  # else doubtful blocks in holes stay until it is settled
        assert pair.left() == set()
