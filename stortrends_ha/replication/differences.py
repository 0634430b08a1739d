"""Where the two replicas of a volume may differ, as this node knows it (rules 8 and 9). Pure but for its two files.

- The *intent log*: regions of 4 MiB. One is durably in it before its first write reaches either replica, and leaves it
  by a *checkpoint* only: when both replicas have flushed since its last write, or, on an owner that is alone, when the
  dirty map durably has what was written there. It stays for as long as it was written in one of the last
  ``INTENT_KEPT_CHECKPOINTS``, as it would soon be logged again; a log that gets crowded keeps none of these.
- The *dirty map*: blocks of ``limits.dirty_block`` that were written while the peer was away. They are to be copied.
- *Doubtful* blocks: whatever was in the log when this node started, went alone or was told by its peer. Nobody knows
  whether they differ, so they are to be compared. They stay in the log until that is done.

So at every moment log, dirty map and doubtful blocks together have every difference; after a death, what the files have
does. A block leaves when it was copied, or found equal, and the peer has flushed it since, and since its last write
(``unflushed`` has those for which it has not). What cannot be read of a file is all doubtful.

If this node dies between a write to the log and the write to the replica, a region is compared in vain. A checkpoint
that is not ended leaves more in the log than need be. Neither file is ever written out of order (``MapWriter``).
Bounds: ``INTENT_REGIONS`` in the log, besides those that are doubtful: then new ones wait for a checkpoint.
On the hot path: ``logged``, once a batch.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

from stortrends_ha.limits import (
    INTENT_AHEAD,
    INTENT_KEPT_CHECKPOINTS,
    INTENT_REGION_BYTES,
    INTENT_REGIONS,
)
from stortrends_ha.protocol.nbd_transmission import Change
from stortrends_ha.replication.block_map import BlockMap

_REGION_SHIFT = INTENT_REGION_BYTES.bit_length() - 1

Range = tuple[int, int]
"""Offset and length in bytes."""


class MapWriter(Protocol):
    """A file that keeps a map. Writes are carried out in their order."""

    def start_write(self, pages: Mapping[int, bytes], *, durable: bool, done: Callable[[], None]) -> None:
        """Save pages, then call ``done``; never if it fails."""


def _nothing() -> None:
    """Nobody waits for it."""


def blocks_of(size_bytes: int, block_bytes: int) -> int:
    """How many blocks a volume has."""
    return -(-size_bytes // block_bytes)


class Differences:
    """Of one volume."""

    def __init__(
        self,
        size_bytes: int,
        block_bytes: int,
        intents: BlockMap | None,
        dirty: BlockMap | None,
        intent_file: MapWriter,
        dirty_file: MapWriter,
    ) -> None:
        """``block_bytes``: of the dirty map, a power of two, a region or less. ``intents`` and ``dirty`` as saved; None
        if that is not known, and everything is saved instead."""
        blocks = blocks_of(size_bytes, block_bytes)
        self.block_bytes = block_bytes
        self._block_shift = block_bytes.bit_length() - 1
        self._region_blocks = INTENT_REGION_BYTES // block_bytes
        self._size_bytes = size_bytes
        self._log = intents or _full(blocks_of(size_bytes, INTENT_REGION_BYTES))  # as it is, or is being, saved
        self._log_file, self._dirty_file = intent_file, dirty_file
        self.dirty = dirty or _full(blocks)
        self.doubtful = BlockMap(blocks)
        self._inherited: set[int] = set()  # regions of the log that have doubtful blocks
        self._durable = set(self._log)  # all that are durably in the log
        self._fresh: set[int] = set()  # of these, those that were written since a checkpoint began
        self._old: set[int] = set()  # and those that were written before it, and not made stable by one since
        self._recent: deque[set[int]] = deque(maxlen=INTENT_KEPT_CHECKPOINTS)  # written before each checkpoint
        self._leaving: set[int] = set()  # at the end of the checkpoint that is under way
        self._wanted: set[int] = set()
        self._committing: set[int] = set()
        self._forgotten = False  # nobody has asked for what is committed since ``forget``
        self._waiting: list[Callable[[], None]] = []
        self.unflushed: set[int] = set()
        self.flushing: set[int] = set()  # a flush of these is under way
        self._checkpoint = 0  # the number of the newest one that counts
        self.crowded: Callable[[], None] = _nothing  # a checkpoint should be made soon
        self.in_session = False  # a peer that lacks something is getting it
        self.doubt_log()
        self.unknown = intents is None or dirty is None  # what may differ: all of it
        if self.unknown:
            self.doubtful.fill()

    @property
    def any(self) -> bool:
        """Whether the replicas may differ by more than what is in flight."""
        return bool(self.dirty.count or self.doubtful.count)

    @property
    def regions(self) -> int:
        """How many are in the log."""
        return len(self._durable)

    # --- Rule 8: before a change ----------------------------------------------------------------

    def logged(self, changes: Sequence[Change]) -> bool:
        """Whether all regions of these changes are in the log; if not, ask ``log``."""
        fresh = self._fresh
        for _, offset, length, _ in changes:
            region = offset >> _REGION_SHIFT
            if region not in fresh:
                return False
            last = (offset + length - 1) >> _REGION_SHIFT
            if last != region and not fresh.issuperset(range(region + 1, last + 1)):
                return False
        return True

    def log(self, changes: Sequence[Change], then: Callable[[], None]) -> bool:
        """See to it that all regions of these changes are in the log: true if they are; else call ``then`` later, when
        it is worth asking again."""
        wanted: set[int] = set()
        for _, offset, length, _ in changes:
            wanted.update(range(offset >> _REGION_SHIFT, ((offset + length - 1) >> _REGION_SHIFT) + 1))
        self._fresh |= wanted & self._durable
        missing = wanted - self._durable
        if not missing:
            return True
        for region in missing:
            if region - 1 in self._fresh:  # whoever writes one after the other need not wait for each
                missing = missing | set(range(region, min(region + INTENT_AHEAD, self._log.blocks))) - self._durable
        self._wanted |= missing
        self._forgotten = False
        self._waiting.append(then)
        self._commit()
        return False

    @property
    def full(self) -> bool:
        """Whether new regions wait for a checkpoint."""
        return self._counted >= INTENT_REGIONS

    @property
    def _crowded(self) -> bool:
        return self._counted >= INTENT_REGIONS // 2

    @property
    def _counted(self) -> int:
        """Those that count for the bound."""
        return len(self._durable) - len(self._inherited)

    def _commit(self) -> None:
        self._wanted -= self._durable
        if self._committing or not self._wanted or self.full:
            return
        self._committing, self._wanted = self._wanted, set()
        for region in self._committing:
            self._log.add(region, region)
        self._log_file.start_write(self._log.pages_to_save(), durable=True, done=self._committed)

    def _committed(self) -> None:
        committed, self._committing = self._committing, set()
        self._durable |= committed
        if self._forgotten:
            self._leave(committed)
        else:
            self._fresh |= committed
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then()
        self._commit()
        if self._crowded and not self._leaving:
            self.crowded()

    # --- Checkpoints ----------------------------------------------------------------------------

    def begin_checkpoint(self) -> int:
        """What was not written for a while may leave the log at the end of the checkpoint; its number, 0 if there is
        nothing that has to become stable before."""
        self._checkpoint += 1
        self._old |= self._fresh
        self._recent.append(self._fresh)
        self._fresh = set()
        if self._crowded:
            self._recent.clear()
        self._leaving = self._durable.difference(self._inherited, *self._recent)
        if self._leaving & self._old:
            return self._checkpoint
        self._end_leaving()
        return 0

    def save_dirty(self, done: Callable[[], None]) -> None:
        """Make the dirty map durable, then call ``done``."""
        self._dirty_file.start_write(self.dirty.pages_to_save(), durable=True, done=done)

    def end_checkpoint(self, number: int) -> None:
        """Both replicas have flushed, or the dirty map was saved, all of it after ``begin_checkpoint``. It does not
        count if another has begun, or the peer was dropped or added meanwhile."""
        if number == self._checkpoint:
            self._old = set()
            self._end_leaving()

    def void_checkpoint(self) -> None:
        """The one that is under way does not count: the peer, whose flush it waits for, has been lost."""
        self._checkpoint += 1
        self._leaving = set()

    def _end_leaving(self) -> None:
        leaving, self._leaving = self._leaving, set()
        self._leave(leaving - self._fresh - self._inherited)

    def _leave(self, regions: Collection[int]) -> None:
        self._durable.difference_update(regions)
        for region in regions:
            self._log.discard(region)
        if self._log.changed:
            self._log_file.start_write(self._log.pages_to_save(), durable=True, done=_nothing)
        self._commit()

    # --- Alone, and together again ----------------------------------------------------------------

    def doubt_log(self) -> None:
        """Whatever is in the log may differ: at the start, and when the peer is dropped."""
        self.void_checkpoint()
        for region in self._durable:
            self.doubtful.add(*self._blocks_of(region))
        self._inherited |= self._durable
        self._commit()

    def doubt(self, ranges: Iterable[Range]) -> None:
        """The peer says that these may differ."""
        for offset, length in ranges:
            if length:
                self.doubtful.add(offset >> self._block_shift, (offset + length - 1) >> self._block_shift)

    def doubt_all(self, done: Callable[[], None]) -> None:
        """The peer has nothing of it, or nobody knows what; ``done`` when that is durable."""
        self.dirty.fill()
        self.save_dirty(done)

    def begin_session(self, *, sync: bool) -> None:
        """A session has begun; ``sync``: the peer gets what it lacks."""
        self.unflushed, self.flushing, self.in_session = set(), set(), sync

    def end_session(self) -> None:
        """What was not flushed at the peer stays dirty."""
        self.in_session = False

    def begin_flush(self) -> set[int]:
        """What is clean when both have flushed, once that is told by ``clean``."""
        self.flushing, self.unflushed = self.unflushed, set()
        return self.flushing

    def written(self, changes: Sequence[Change]) -> None:
        """These were written, or are being, while the record has the peer not in sync."""
        for _, offset, length, _ in changes:
            first, last = offset >> self._block_shift, (offset + length - 1) >> self._block_shift
            self.dirty.add(first, last)
            if self.in_session:
                self.unflushed.update(range(first, last + 1))

    def clean(self, todo: BlockMap) -> None:
        """The peer has flushed: clean is what it has, but for what is still to be copied, or to be flushed again."""
        regions, blocks = set(), self.flushing
        self.flushing = set()
        for block in blocks:
            if block not in self.unflushed and block not in todo:
                self.dirty.discard(block)
                self.doubtful.discard(block)
                regions.add(block // self._region_blocks)
        done = {region for region in regions & self._inherited if not self.doubtful.any_in(*self._blocks_of(region))}
        self._inherited -= done
        self._leave(done - self._fresh - self._old)
        if self.dirty.changed:
            self._dirty_file.start_write(self.dirty.pages_to_save(), durable=True, done=_nothing)

    def has_nothing(self, first: int, last: int) -> None:
        """These blocks are empty on both, and were when the resync began, but for what was written since."""
        self.dirty.remove(first, last)
        for block in self.unflushed | self.flushing:
            if first <= block <= last:
                self.dirty.add(block, block)

    def settle(self) -> None:
        """The peer has everything, and the record says so. What it may not have flushed yet is in the log."""
        self.void_checkpoint()
        self.unknown = False
        self.dirty.clear()
        self.doubtful.clear()
        self._inherited = set()
        self._old |= self._durable - self._fresh
        if self.dirty.changed:
            self._dirty_file.start_write(self.dirty.pages_to_save(), durable=True, done=_nothing)

    def forget(self) -> None:
        """Both replicas have the same, and have flushed it."""
        self.settle()
        self._forgotten = True
        self._old = self._fresh = set()
        self._recent.clear()
        self.unflushed = set()
        self._leave(set(self._durable))

    def ranges(self) -> list[Range]:
        """What may differ, for the peer: regions."""
        found = self._durable | self._regions_of(self.dirty) | self._regions_of(self.doubtful)
        return [(region * INTENT_REGION_BYTES, self._region_bytes(region)) for region in sorted(found)]

    def _region_bytes(self, region: int) -> int:
        return min(INTENT_REGION_BYTES, self._size_bytes - region * INTENT_REGION_BYTES)

    def _blocks_of(self, region: int) -> tuple[int, int]:
        """The first and the last."""
        first = region * self._region_blocks
        return first, first + self._region_blocks - 1

    def _regions_of(self, blocks: BlockMap) -> set[int]:
        found, block = set[int](), blocks.next_from(0)
        while block is not None:
            region = block // self._region_blocks
            found.add(region)
            block = blocks.next_from((region + 1) * self._region_blocks)
        return found


def _full(blocks: int) -> BlockMap:
    full = BlockMap(blocks)
    full.fill()
    full.changed.clear()
    return full
