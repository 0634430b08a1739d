"""Copying to the secondary what it may lack, inside the ordered stream, without locks. Pure.

Rule 7 makes it simple: a COMPARE frame, a trim for a hole, a block read at the owner all take their place in the
stream, so a block can never overwrite a newer write.
Rule 9: what is to be copied is in ``differences``: dirty blocks are sent, doubtful ones as a digest first, and as data
only if that differs; holes as trims, or not at all to a secondary that is blank. The secondary counts as synced when
everything has been copied *and flushed on it*, and it said so durably.

A block is no longer to be copied when both have flushed after it was (``flushing``): so whatever ends a resync, and
however often, the next one goes on where it was.

Bounds: ``COMPARE_BLOCKS_IN_FLIGHT`` comparisons under way, and one piece of one run of blocks per ``step``;
``budget_bytes`` is what may be read before somebody allows more: it may be less than nothing by what comparisons
under way found to differ.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from stortrends_ha.errors import ProtocolError
from stortrends_ha.limits import (
    COMPARE_BLOCK_BYTES,
    COMPARE_BLOCKS_IN_FLIGHT,
    RESYNC_FLUSH_BYTES,
    WRITE_PIECE_BYTES,
    ZERO_PIECE_BYTES,
)
from stortrends_ha.protocol.nbd_transmission import OP_PUNCH, OP_WRITE
from stortrends_ha.replication.block_map import BlockMap
from stortrends_ha.replication.differences import Differences, blocks_of
from stortrends_ha.replication.interfaces import Buffer, Store
from stortrends_ha.replication.pace import UNLIMITED


def digest(block: Buffer) -> bytes:
    """What two nodes compare instead of a block: 32 bytes."""
    return hashlib.sha256(block).digest()


class Stream(Protocol):
    """What a resync needs of the primary."""

    def put(self, volume: int, op: int, offset: int, length: int, data: Buffer) -> None:
        """Put one change on the stream, now."""

    def compare(self, volume: int, offset: int, length: int, digest: bytes) -> None:
        """Put a comparison on the stream, now."""

    def flush_everywhere(self, volume: int, done: Callable[[], None]) -> None:
        """Call ``done`` when all that was put on the stream before is stable on both nodes."""


class _Run:
    """Blocks of one volume side by side that are copied together."""

    __slots__ = ("comparing", "end", "first", "is_hole", "last", "volume")

    def __init__(self, volume: int, first: int, last: int, end: int, *, is_hole: bool) -> None:
        self.volume, self.first, self.last = volume, first, last
        self.end = end  # in bytes
        self.is_hole = is_hole  # all of it
        self.comparing = 0  # pieces without a result


class Resync:
    """One pass over what the secondary may lack, of all volumes of a group."""

    def __init__(
        self,
        stream: Stream,
        stores: Sequence[Store],
        differences: Sequence[Differences],
        *,
        blank: bool,
        compare: bool,
    ) -> None:
        """``blank``: the secondary has nothing but zeroes. ``compare``: it may have most of what is dirty."""
        self._stream = stream
        self._stores = stores
        self._differences = differences
        self._blank = blank
        self._compare = compare
        self._todo = [_todo(store, of) for store, of in zip(stores, differences, strict=True)]
        self._volume = 0
        self._cursor = 0  # the block from which the next run is looked for
        self._run: _Run | None = None  # the one of which there are more pieces
        self._offset = 0  # of its next piece
        self._results: dict[tuple[int, int, int], _Run] = {}  # (volume, offset, length) of pieces without a result
        self._flushing = 0
        self._since_flush = 0  # bytes that were done since the last flush began
        self.ending: int | None = None  # volumes that are still to be flushed, once everything has been copied
        self.total_bytes = sum(self._bytes(volume, map_.count) for volume, map_ in enumerate(self._todo))
        self.done_bytes = 0
        self.copied_bytes = 0
        self.budget_bytes = UNLIMITED

    def _bytes(self, volume: int, blocks: int) -> int:
        return min(blocks * self._differences[volume].block_bytes, self._stores[volume].size_bytes)

    # --- Going on -----------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether nothing can be done before something arrives, or is allowed."""
        if self.budget_bytes <= 0 or len(self._results) >= COMPARE_BLOCKS_IN_FLIGHT:
            return True
        return self._run is None and not self._find()

    @property
    def comparing(self) -> bool:
        """Whether it waits for results of the secondary."""
        everything_sent = self._volume == len(self._stores)
        return len(self._results) >= COMPARE_BLOCKS_IN_FLIGHT or (everything_sent and bool(self._results))

    @property
    def finished(self) -> bool:
        """Whether everything has been put on the stream."""
        return self._volume == len(self._stores) and not self._results

    @property
    def ended(self) -> bool:
        """Whether everything is flushed on both, and the secondary has been told so."""
        return self.ending == 0

    def _find(self) -> bool:
        """The next run; whether there is one."""
        while self._volume < len(self._stores):
            todo = self._todo[self._volume]
            first = todo.next_from(self._cursor)
            if first is None:
                self._volume, self._cursor = self._volume + 1, 0
                continue
            self._run = self._run_at(first, todo)
            self._offset, self._cursor = first * self._differences[self._volume].block_bytes, self._run.last + 1
            return True
        return False

    def _run_at(self, first: int, todo: BlockMap) -> _Run:
        """A hole, which takes one change however long it is, or a few blocks of one kind."""
        store, differences = self._stores[self._volume], self._differences[self._volume]
        dirty, size = differences.dirty, differences.block_bytes
        is_data, end = store.extent(first * size)
        whole = blocks_of(end, size) if end == store.size_bytes else end // size
        is_hole = not is_data and whole > first
        if is_hole:
            longest = whole if self._blank else ZERO_PIECE_BYTES // size
            last = todo.run_end(first, min(whole, first + longest) - 1)
        else:
            per_run = COMPARE_BLOCK_BYTES // size
            last = todo.run_end(first, first // per_run * per_run + per_run - 1)
            if first in dirty:
                last = dirty.run_end(first, last)
            elif (other := dirty.next_from(first)) is not None:
                last = min(last, other - 1)
        end = min((last + 1) * size, store.size_bytes)
        return _Run(self._volume, first, last, end, is_hole=is_hole)

    def step(self) -> None:
        """Copy or compare the next piece. Only while not ``waiting``."""
        run, offset = self._run, self._offset
        assert run is not None
        store = self._stores[run.volume]
        is_data, end = store.extent(offset)
        end = min(end, run.end)
        if is_data:  # a long hole may have been written since it was seen
            end = min(end, offset - offset % COMPARE_BLOCK_BYTES + COMPARE_BLOCK_BYTES)
        if not is_data:
            if not self._blank:
                self._stream.put(run.volume, OP_PUNCH, offset, end - offset, b"")
        elif run.first in self._differences[run.volume].dirty and not self._compare:
            allowed = max(self.budget_bytes // WRITE_PIECE_BYTES, 1) * WRITE_PIECE_BYTES
            end = min(end, offset + allowed)
            self._copy(run.volume, offset, end)
        else:
            run.comparing += 1
            self.budget_bytes -= end - offset
            self._results[run.volume, offset, end - offset] = run
            self._stream.compare(run.volume, offset, end - offset, digest(store.read(offset, end - offset)))
        self._offset = end
        if end == run.end:
            self._run = None
            if not run.comparing:
                self._done(run)

    def _copy(self, volume: int, offset: int, end: int) -> None:
        self.copied_bytes += end - offset
        self.budget_bytes -= end - offset
        for at in range(offset, end, WRITE_PIECE_BYTES):
            size = min(WRITE_PIECE_BYTES, end - at)
            self._stream.put(volume, OP_WRITE, at, size, self._stores[volume].read(at, size))

    def result(self, volume: int, offset: int, length: int, equal: bool) -> None:
        """The secondary has compared a piece: copy it, as it is by now, if it differed. Raises ProtocolError."""
        run = self._results.pop((volume, offset, length), None)
        if run is None:
            raise ProtocolError(f"a result for {length} bytes at {offset} that were not to be compared")
        if not equal:
            self._copy(volume, offset, offset + length)
        run.comparing -= 1
        if not run.comparing and run is not self._run:
            self._done(run)

    def _done(self, run: _Run) -> None:
        """All of a run is on the stream: it is clean as soon as both have flushed."""
        differences = self._differences[run.volume]
        size = run.end - run.first * differences.block_bytes
        self.done_bytes += size
        self._since_flush += size
        self._todo[run.volume].remove(run.first, run.last)
        if run.is_hole and self._blank:  # there is nothing to be flushed
            differences.has_nothing(run.first, run.last)
            return
        differences.unflushed.update(range(run.first, run.last + 1))
        if self._since_flush >= RESYNC_FLUSH_BYTES:
            self.flush()

    # --- What is clean --------------------------------------------------------------------------

    def flush(self) -> None:
        """Make stable on both what was copied, and written, since this was done last: then it is clean."""
        if self._flushing:
            return
        self._since_flush = 0
        for volume, differences in enumerate(self._differences):
            if differences.begin_flush():
                self._flushing += 1
                self._stream.flush_everywhere(volume, partial(self._flushed, volume))

    def _flushed(self, volume: int) -> None:
        self._flushing -= 1
        self._differences[volume].clean(self._todo[volume])


def _todo(store: Store, differences: Differences) -> BlockMap:
    todo = BlockMap(blocks_of(store.size_bytes, differences.block_bytes))
    todo.update(differences.dirty)
    todo.update(differences.doubtful)
    todo.changed.clear()
    return todo
