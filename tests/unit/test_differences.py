"""Where the replicas may differ: nothing that does is ever forgotten, and nothing else is kept for long.

The first part has an example for each promise of the module, the last part anything that can happen in any order.
"""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
from fakes import MemoryMap, load_differences
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stortrends_ha.protocol.nbd_transmission import OP_PUNCH, OP_WRITE, Change
from stortrends_ha.replication import differences as differences_module
from stortrends_ha.replication.block_map import BlockMap
from stortrends_ha.replication.differences import Differences

BLOCK, REGION = 1 << 10, 4 << 10
SIZE = 10 * REGION - 100  # the last block, and the last region, are shorter
BLOCKS, REGIONS = 40, 10
INTENTS = 6


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    with patch.multiple(
        differences_module,
        INTENT_REGION_BYTES=REGION,
        INTENT_REGIONS=INTENTS,
        INTENT_AHEAD=2,
        INTENT_KEPT_CHECKPOINTS=0,
        _REGION_SHIFT=12,
    ):
        yield


def change(offset: int, length: int = 1) -> list[Change]:
    return [(OP_WRITE, offset, min(length, SIZE - offset), 0)]


class Volume:
    """Its differences, and their files."""

    def __init__(self, at_once: bool = True) -> None:
        self.intents, self.map = MemoryMap(at_once), MemoryMap(at_once)
        self.differences = load_differences(SIZE, self.intents, self.map, block_bytes=BLOCK)

    def log(self, *changes: Change) -> bool:
        """Whether it is in the log by now."""
        return self.differences.log(list(changes), lambda: None) or self.differences.logged(list(changes))

    def restarted(self, power_lost: bool = False) -> Differences:
        return load_differences(SIZE, self.intents, self.map, block_bytes=BLOCK, power_lost=power_lost)

    def checkpoint(self) -> None:
        """While both are in sync: both have flushed."""
        self.differences.end_checkpoint(self.differences.begin_checkpoint())

    def checkpoint_alone(self) -> None:
        number = self.differences.begin_checkpoint()
        self.differences.save_dirty(lambda: self.differences.end_checkpoint(number))

    def copied(self, *blocks: int) -> None:
        """In a session: these were copied, and both have flushed."""
        todo = BlockMap(BLOCKS)
        self.differences.unflushed.update(blocks)
        self.differences.begin_flush()
        self.differences.clean(todo)


@pytest.fixture
def volume() -> Volume:
    return Volume()


def blocks_of_regions(*regions: int) -> list[int]:
    return [block for region in regions for block in range(4 * region, 4 * region + 4)]


# --- The intent log ---------------------------------------------------------------------------


def test_region_is_durable_before_a_change_of_it_may_be_made() -> None:
    volume = Volume(at_once=False)
    calls = list[str]()
    assert not volume.differences.log(change(5), lambda: calls.append("again"))
    assert not volume.differences.logged(change(5))
    assert calls == []
    volume.intents.end_writes()
    assert calls == ["again"]
    assert volume.differences.logged(change(5))
    assert list(volume.restarted(power_lost=True).doubtful) == blocks_of_regions(0)


def test_all_regions_of_a_change_are_logged(volume: Volume) -> None:
    volume.log(*change(REGION - 1, 2 * REGION))
    for offset in (0, REGION, 2 * REGION):
        assert volume.differences.logged(change(offset))
    assert not volume.differences.logged(change(3 * REGION))
    assert not volume.differences.logged(change(2 * REGION, REGION + 1))
    assert not volume.differences.logged([*change(0), (OP_PUNCH, 5 * REGION, 1, 0)])
    assert volume.restarted(power_lost=True).ranges() == [(n * REGION, REGION) for n in range(3)]


def test_region_that_two_ask_for_is_not_taken_for_durable_with_the_next_one() -> None:
    volume = Volume(at_once=False)
    for _ in range(2):
        volume.log(*change(0))
    volume.intents.end_writes(1)
    assert volume.differences.logged(change(0))
    volume.log(*change(5 * REGION))
    while not volume.differences.logged(change(5 * REGION)):
        volume.intents.end_writes(1)
    assert 20 in volume.restarted(power_lost=True).doubtful


def test_who_writes_one_region_after_the_other_does_not_wait_for_each(volume: Volume) -> None:
    volume.log(*change(0))
    volume.log(*change(REGION))
    assert volume.differences.logged(change(2 * REGION))
    assert not volume.differences.logged(change(3 * REGION))


def test_region_leaves_the_log_by_a_checkpoint_that_was_ended(volume: Volume) -> None:
    volume.log(*change(0))
    number = volume.differences.begin_checkpoint()
    assert volume.differences.regions == 1
    volume.differences.end_checkpoint(number)
    assert volume.differences.regions == 0
    assert not volume.restarted().any
    assert not volume.differences.logged(change(0))


def test_region_that_is_written_during_a_checkpoint_stays(volume: Volume) -> None:
    volume.log(*change(0), *change(5 * REGION))
    number = volume.differences.begin_checkpoint()
    assert volume.log(*change(0))
    volume.differences.end_checkpoint(number)
    assert volume.differences.ranges() == [(0, REGION)]
    assert volume.restarted().ranges() == [(0, REGION)]


def test_checkpoint_counts_only_if_no_other_has_begun(volume: Volume) -> None:
    volume.log(*change(0))
    first = volume.differences.begin_checkpoint()
    second = volume.differences.begin_checkpoint()
    volume.differences.end_checkpoint(first)
    assert volume.differences.regions == 1
    volume.differences.end_checkpoint(second)
    assert volume.differences.regions == 0


@pytest.mark.parametrize("what", ["doubt_log", "settle", "void_checkpoint"])
def test_checkpoint_does_not_count_if_the_peer_was_dropped_or_added_meanwhile(volume: Volume, what: str) -> None:
    volume.log(*change(0))
    number = volume.differences.begin_checkpoint()
    getattr(volume.differences, what)()
    volume.differences.end_checkpoint(number)
    assert volume.differences.ranges() == [(0, REGION)]


def test_checkpoint_of_nothing_has_no_number(volume: Volume) -> None:
    assert volume.differences.begin_checkpoint() == 0
    volume.log(*change(0))
    assert volume.differences.begin_checkpoint()


@pytest.fixture
def keeping() -> Iterator[Volume]:
    with patch.object(differences_module, "INTENT_KEPT_CHECKPOINTS", 2):
        yield Volume()


def test_region_that_was_written_lately_stays_and_nothing_is_flushed_for_it(keeping: Volume) -> None:
    keeping.log(*change(0), *change(5 * REGION))
    for _ in range(2):
        assert keeping.differences.begin_checkpoint() == 0
    assert keeping.log(*change(0))
    number = keeping.differences.begin_checkpoint()
    assert number
    keeping.differences.end_checkpoint(number)
    assert keeping.differences.ranges() == keeping.restarted().ranges() == [(0, REGION)]
    for left in (1, 0):  # that flush was of both
        assert keeping.differences.begin_checkpoint() == 0
        assert keeping.differences.regions == left


def test_crowded_log_keeps_nothing(keeping: Volume) -> None:
    for region in range(INTENTS // 2):
        keeping.log(*change(region * REGION))
    number = keeping.differences.begin_checkpoint()
    assert number
    keeping.differences.end_checkpoint(number)
    assert keeping.differences.regions == 0


def test_more_regions_than_the_bound_wait_for_a_checkpoint(volume: Volume) -> None:
    calls = list[str]()
    volume.differences.crowded = lambda: calls.append("crowded")
    for region in range(INTENTS):
        assert volume.log(*change(region * REGION))
    assert volume.differences.full
    assert calls
    assert not volume.differences.log(change(9 * REGION), lambda: calls.append("again"))
    assert "again" not in calls
    volume.checkpoint()
    assert "again" in calls
    assert volume.differences.logged(change(9 * REGION))


def test_regions_that_are_doubtful_do_not_count_for_the_bound(volume: Volume) -> None:
    calls = list[str]()
    for region in range(INTENTS):
        volume.log(*change(region * REGION))
    volume.differences.log(change(9 * REGION), lambda: calls.append("again"))
    assert calls == []
    volume.differences.doubt_log()
    assert calls == ["again"]
    assert volume.differences.logged(change(9 * REGION))


# --- Doubtful blocks --------------------------------------------------------------------------


def test_what_is_in_the_log_at_a_start_is_doubtful_and_stays_in_the_log_until_it_was_compared(volume: Volume) -> None:
    volume.log(*change(0), *change(9 * REGION))
    volume.differences = volume.restarted()
    assert volume.differences.any
    assert list(volume.differences.doubtful) == blocks_of_regions(0, 9)
    volume.checkpoint()
    volume.checkpoint_alone()
    assert list(volume.restarted(power_lost=True).doubtful) == blocks_of_regions(0, 9)
    volume.differences.begin_session(sync=False)
    volume.copied(0, 1, 2)
    assert list(volume.restarted().doubtful) == blocks_of_regions(0, 9)
    volume.copied(3)
    assert list(volume.restarted().doubtful) == blocks_of_regions(9)


@pytest.mark.parametrize("is_alone", [False, True])
def test_what_was_in_the_log_when_the_peer_was_dropped_stays_until_it_was_compared(
    volume: Volume, is_alone: bool
) -> None:
    volume.log(*change(0))
    volume.differences.doubt_log()
    for _ in range(2):
        if is_alone:
            volume.checkpoint_alone()
        else:
            volume.checkpoint()
    assert list(volume.differences.doubtful) == list(volume.restarted().doubtful) == blocks_of_regions(0)


def test_region_that_was_compared_stays_in_the_log_for_what_was_written_before_a_checkpoint(volume: Volume) -> None:
    volume.log(*change(0))
    volume.differences.doubt_log()
    volume.differences.begin_session(sync=False)
    volume.checkpoint()
    volume.copied(0, 1, 2, 3)
    assert volume.differences.ranges() == [(0, REGION)]
    volume.checkpoint()
    assert volume.differences.ranges() == []


def test_what_the_peer_tells_is_doubtful(volume: Volume) -> None:
    volume.differences.doubt([(0, 1), (3 * BLOCK - 1, 2), (7 * BLOCK, 0), (SIZE - 1, 1 << 63), (1 << 63, 1 << 63)])
    assert list(volume.differences.doubtful) == [0, 2, 3, 39]
    assert volume.differences.any


def test_doubtful_region_that_is_written_again_stays_in_the_log_when_it_was_compared(volume: Volume) -> None:
    volume.log(*change(0))
    volume.differences.doubt_log()
    volume.log(*change(0))
    volume.differences.begin_session(sync=False)
    volume.copied(0, 1, 2, 3)
    assert not volume.differences.any
    assert volume.differences.ranges() == [(0, REGION)]
    volume.checkpoint()
    assert volume.differences.ranges() == []


@pytest.mark.parametrize("lost", ["log", "dirty map", "both"])
def test_everything_is_doubtful_if_a_file_is_lost_until_it_is_settled(lost: str) -> None:
    log = None if lost != "dirty map" else BlockMap(REGIONS)
    dirty = None if lost != "log" else BlockMap(BLOCKS)
    differences = Differences(SIZE, BLOCK, log, dirty, MemoryMap(), MemoryMap())
    assert differences.unknown
    assert list(differences.doubtful) == list(range(BLOCKS))
    differences.settle()
    assert not differences.unknown
    assert not differences.any
    assert not Volume().differences.unknown


# --- The dirty map ----------------------------------------------------------------------------


def test_what_is_written_alone_is_dirty_and_leaves_the_log_when_that_is_durable() -> None:
    volume = Volume(at_once=False)
    volume.log(*change(0))
    volume.intents.end_writes()
    volume.differences.written(change(BLOCK - 1, 2))
    assert list(volume.differences.dirty) == [0, 1]
    volume.checkpoint_alone()
    volume.intents.end_writes()
    assert volume.differences.regions == 1
    volume.map.end_writes()
    volume.intents.end_writes()
    assert volume.differences.regions == 0
    found = volume.restarted(power_lost=True)
    assert list(found.dirty) == [0, 1]


def test_block_is_clean_when_it_was_copied_and_flushed_since(volume: Volume) -> None:
    volume.differences.written([*change(0), *change(BLOCK), *change(2 * BLOCK)])
    volume.differences.begin_session(sync=True)
    todo = BlockMap(BLOCKS)
    todo.add(2, 2)
    volume.differences.unflushed.update((0, 1, 2))
    volume.differences.begin_flush()
    volume.differences.written(change(BLOCK))  # not flushed yet
    volume.differences.clean(todo)
    assert list(volume.differences.dirty) == [1, 2]
    todo.clear()
    volume.copied(1, 2)
    assert not volume.differences.any
    assert not volume.restarted(power_lost=True).dirty.count or volume.map.load(BLOCKS).count == 0


def test_what_was_not_flushed_when_the_session_ends_stays_dirty(volume: Volume) -> None:
    volume.differences.written(change(0))
    volume.differences.begin_session(sync=True)
    volume.differences.unflushed.add(0)
    volume.differences.begin_flush()
    volume.differences.end_session()
    volume.differences.begin_session(sync=True)
    volume.copied()
    assert list(volume.differences.dirty) == [0]


def test_holes_that_both_have_are_clean_but_for_what_was_written_since(volume: Volume) -> None:
    volume.differences.doubt_all(lambda: None)
    volume.differences.begin_session(sync=True)
    volume.differences.written(change(2 * BLOCK))
    volume.differences.begin_flush()
    volume.differences.written(change(3 * BLOCK))
    volume.differences.has_nothing(0, 7)
    assert list(volume.differences.dirty) == [2, 3, *range(8, BLOCKS)]


def test_everything_is_dirty_durably_when_the_peer_has_nothing() -> None:
    volume, calls = Volume(at_once=False), list[str]()
    volume.differences.doubt_all(lambda: calls.append("durable"))
    assert calls == []
    volume.map.end_writes()
    assert calls == ["durable"]
    assert volume.restarted(power_lost=True).dirty.count == BLOCKS


def test_who_is_added_has_everything_but_what_is_in_the_log_is_not_flushed_there(volume: Volume) -> None:
    volume.differences.written(change(5 * REGION))
    volume.log(*change(0))
    volume.differences.begin_session(sync=True)
    volume.differences.written(change(0))
    volume.differences.settle()
    assert not volume.differences.any
    assert volume.differences.ranges() == [(0, REGION)]
    volume.checkpoint()
    assert volume.differences.ranges() == []
    assert not volume.restarted().any


def test_nothing_is_left_when_both_are_the_same(volume: Volume) -> None:
    volume.log(*change(0), *change(SIZE - 1))
    volume.differences.doubt_log()
    volume.log(*change(REGION))
    volume.differences.written(change(7))
    volume.differences.forget()
    assert volume.differences.ranges() == []
    assert not volume.differences.any
    assert volume.restarted().ranges() == []


def test_ranges_for_the_peer_are_all_regions_where_anything_may_differ(volume: Volume) -> None:
    volume.log(*change(0))
    volume.differences.written(change(3 * REGION + 7))
    volume.differences.doubt([(9 * REGION, 1)])
    assert volume.differences.ranges() == [(0, REGION), (3 * REGION, REGION), (9 * REGION, REGION - 100)]


# --- Anything ---------------------------------------------------------------------------------


class Everything(RuleBasedStateMachine):
    """An owner, as ``Primary`` uses its differences, over all that can happen to it.

    The truth: ``unequal`` blocks may differ for long, ``unstable`` ones were written on both and may not be stable on
    one of them yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.intents, self.map = MemoryMap(at_once=False), MemoryMap(at_once=False)
        with patch.object(differences_module, "INTENT_KEPT_CHECKPOINTS", 1):
            self.differences = load_differences(SIZE, self.intents, self.map, block_bytes=BLOCK)
        self.unequal, self.unstable = set[int](), set[int]()
        self.alone = self.late = self.session = False
        self.asking: list[list[Change]] = []
        self.checkpoint: tuple[int, set[int]] | None = None  # its number, and what is stable when it ends
        self.todo: BlockMap | None = None
        self.flush: set[int] | None = None  # what is the same on both when the flush ends

    # Writes

    @rule(offset=st.integers(0, SIZE - 1), length=st.sampled_from([1, BLOCK, REGION, 3 * REGION]))
    def ask(self, offset: int, length: int) -> None:
        self.asking.append(change(offset, length))
        self._write()

    def _write(self) -> None:
        """As clients do: who is told to wait asks again when it is called."""
        for changes in list(self.asking):
            if not (self.differences.logged(changes) or self.differences.log(changes, self._write)):
                continue
            self.asking.remove(changes)
            [(_, offset, length, _)] = changes
            blocks = set(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))
            (self.unequal if self.alone and not self.late else self.unstable).update(blocks)
            for under_way in (self.flush, self.checkpoint and self.checkpoint[1]):
                if under_way:
                    under_way -= blocks
            if self.alone:
                self.differences.written(changes)

    @rule(count=st.integers(1, 3))
    def log_file(self, count: int) -> None:
        self.intents.end_writes(count)

    @rule(count=st.integers(1, 3))
    def dirty_file(self, count: int) -> None:
        self.map.end_writes(count)

    # Checkpoints

    @rule()
    def begin_checkpoint(self) -> None:
        number = self.differences.begin_checkpoint()
        self.checkpoint = None
        if number and self.alone and not self.late:
            self.differences.save_dirty(lambda: self.differences.end_checkpoint(number))
        elif number:
            self.checkpoint = number, set(self.unstable)

    @precondition(lambda self: self.checkpoint is not None)
    @rule()
    def end_checkpoint(self) -> None:
        """Both have flushed what was written before."""
        assert self.checkpoint is not None
        (number, stable), self.checkpoint = self.checkpoint, None
        self.unstable -= stable
        self.differences.end_checkpoint(number)

    # Going alone, and together again

    @precondition(lambda self: not self.alone)
    @rule()
    def go_alone(self) -> None:
        self._end_session()
        self.differences.doubt_log()
        self._peer_is_gone()

    def _peer_is_gone(self) -> None:
        self.alone, self.late, self.checkpoint = True, False, None
        self.unequal |= self.unstable
        self.unstable.clear()

    def _end_session(self) -> None:
        self.session, self.todo, self.flush = False, None, None
        self.differences.end_session()

    @precondition(lambda self: not self.session)
    @rule(told=st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, REGION)), max_size=2))
    def open_session(self, told: list[tuple[int, int]]) -> None:
        self.session = True
        self.differences.begin_session(sync=self.alone)
        self.differences.doubt(told)
        self.todo = BlockMap(BLOCKS)
        self.todo.update(self.differences.dirty)
        self.todo.update(self.differences.doubtful)

    @precondition(lambda self: self.session)
    @rule()
    def break_session(self) -> None:
        self._end_session()
        if self.alone:
            self.differences.void_checkpoint()
            self._peer_is_gone()

    @precondition(lambda self: self.todo is not None and self.todo.count)
    @rule(count=st.integers(1, 50))
    def copy(self, count: int) -> None:
        assert self.todo is not None
        for block in list(self.todo)[:count]:
            self.todo.discard(block)
            self.differences.unflushed.add(block)

    @precondition(lambda self: self.todo is not None and self.flush is None)
    @rule()
    def begin_flush(self) -> None:
        assert self.todo is not None
        self.flush = (self.unequal | self.unstable) - set(self.todo)
        self.differences.begin_flush()

    @precondition(lambda self: self.flush is not None)
    @rule()
    def end_flush(self) -> None:
        """What was in the stream before the flush is stable on both."""
        assert self.flush is not None
        assert self.todo is not None
        self.unequal -= self.flush
        self.unstable -= self.flush
        self.flush = None
        self.differences.clean(self.todo)

    @precondition(lambda self: self.todo is not None and not self.todo.count and self.flush is None and not self.late)
    @rule()
    def synced(self) -> None:
        """All was copied, then flushed on both; from then on answers wait for both."""
        self.unequal.clear()
        self.unstable.clear()
        if self.alone:
            self.late = True
        else:
            self._settle()

    @precondition(lambda self: self.late)
    @rule()
    def join(self) -> None:
        self.alone = self.late = False
        self._settle()

    def _settle(self) -> None:
        self._end_session()
        self.checkpoint = None
        self.differences.settle()

    # Deaths

    @rule(power_lost=st.booleans(), ended=st.integers(0, 3))
    def die(self, power_lost: bool, ended: int) -> None:
        self.intents.end_writes(ended)
        for file in (self.intents, self.map):
            file.pending.clear()
            if power_lost:
                file.pages = dict(file.stable)
        self.asking.clear()
        self._end_session()
        self.unequal |= self.unstable
        self.unstable.clear()
        self.late, self.checkpoint = False, None
        self.differences = load_differences(SIZE, self.intents, self.map, block_bytes=BLOCK)

    # What must hold

    @invariant()
    def nothing_is_forgotten(self) -> None:
        assert self.unequal | self.unstable <= covered(self.differences)
        if self.todo is not None and not self.late:  # this session makes all equal
            both = {*self.todo, *self.differences.unflushed, *self.differences.flushing}
            assert self.unequal <= both | set(self.differences.dirty) if self.alone else self.unequal <= both

    @invariant()
    def nothing_would_be_forgotten_by_a_death(self) -> None:
        for power_lost in (False, True):
            found = load_differences(SIZE, self.intents, self.map, block_bytes=BLOCK, power_lost=power_lost)
            assert self.unequal | self.unstable <= covered(found)

    @invariant()
    def log_is_bounded(self) -> None:
        assert self.differences.regions <= REGIONS

    @invariant()
    def counts_are_right(self) -> None:
        for map_ in (self.differences.dirty, self.differences.doubtful):
            assert map_.count == len(list(map_))

    def teardown(self) -> None:
        """Bounded: when all is quiet, and the peer has everything, nothing is left."""
        self._be_quiet()
        if self.late:
            self.join()
        if not self.session:
            self.open_session([])
        self.copy(BLOCKS)
        for _ in range(2):
            if self.flush is None:
                self.begin_flush()
            self.end_flush()
        assert not self.differences.any
        self.synced()
        if self.late:
            self.join()
        self._be_quiet()
        assert not self.differences.any
        assert self.differences.regions == 0
        found = load_differences(SIZE, self.intents, self.map, block_bytes=BLOCK)
        assert not found.any
        assert found.regions == 0

    def _be_quiet(self) -> None:
        for _ in range(6):
            self.intents.end_writes()
            self.begin_checkpoint()
            self.map.end_writes()
            if self.checkpoint is not None:
                self.end_checkpoint()
            self.intents.end_writes()
        assert not self.asking


def covered(differences: Differences) -> set[int]:
    """Every block that is in the log, dirty or doubtful."""
    regions = {block for offset, _ in differences.ranges() for block in range(offset // BLOCK, offset // BLOCK + 4)}
    exact = set(differences.dirty) | set(differences.doubtful)
    assert exact <= regions
    return regions & set(range(BLOCKS))


TestEverything = Everything.TestCase
TestEverything.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
