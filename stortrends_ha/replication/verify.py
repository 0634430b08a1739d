"""Comparing two replicas that are in sync, while clients write, and repairing what differs from the owner's copy. Pure.

Rule 7 makes it right: a comparison has its place in the stream. The digest is of the owner's replica at that moment, so
everything that the owner has applied to the range must be on the link already (``is_sent``): then the secondary
compares at the same instant of the stream, and no write under way looks like a difference. A range with a change that
waits for the link is put off.

A range that differs is cut into parts and compared again, down to blocks of the dirty map's size. A hole of the owner
is one question, however long it is: whether the secondary has a hole there, too; only if not, it is compared.

Repair: the block, read at the owner when its turn in the stream has come, is put on the stream as a change; before that
its region is durably in the intent log (rule 8). It is repaired when both nodes have flushed it and it was compared
once more. The secondary's copy is never a source: the group is moved there first, so that it is the owner's.

``Findings`` is what is known to differ, on both nodes, over deaths: from the comparison that found it until one finds
it equal. If the owner dies, or the session ends, so does the verify; nothing has to be undone, as a repair is a change
like any other.

Bounds: ``VERIFY_BLOCKS_IN_FLIGHT`` comparisons under way, ``VERIFY_PUT_OFF`` ranges put off and the parts of those that
differ, ``REPAIR_FLUSH_BYTES`` between two flushes; one piece per ``step``; ``budget_bytes`` as in ``resync``.
"""

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Protocol

from stortrends_ha.errors import ProtocolError
from stortrends_ha.limits import (
    COMPARE_BLOCK_BYTES,
    COMPARE_GRAIN_BYTES,
    HOLE_COMPARE_BYTES,
    REPAIR_FLUSH_BYTES,
    VERIFY_BLOCKS_IN_FLIGHT,
    VERIFY_PARTS,
    VERIFY_PUT_OFF,
    VERIFY_RANGES,
)
from stortrends_ha.protocol.link import HOLE, Purpose, Verdict
from stortrends_ha.protocol.nbd_transmission import OP_PUNCH, OP_WRITE, Change
from stortrends_ha.replication.block_map import BlockMap
from stortrends_ha.replication.differences import Differences, MapWriter, Range, blocks_of
from stortrends_ha.replication.interfaces import Buffer, Store
from stortrends_ha.replication.pace import UNLIMITED
from stortrends_ha.replication.resync import digest

# So far behind what was renewed last, it is still what the disk gave.
_RECENT_BYTES = 2 * VERIFY_BLOCKS_IN_FLIGHT * COMPARE_BLOCK_BYTES

Piece = tuple[int, int, int]
"""Volume, offset, length."""


class Stream(Protocol):
    """What a verify needs of the primary."""

    def put(self, volume: int, op: int, offset: int, length: int, data: Buffer) -> None:
        """Put one change on the stream, now."""

    def compare(self, volume: int, offset: int, length: int, digest: bytes, purpose: Purpose) -> None:
        """Put a comparison on the stream, now."""

    def is_sent(self, volume: int, offset: int, length: int) -> bool:
        """Whether everything that was ever applied to a range is on the link."""

    def flush_everywhere(self, volume: int, done: Callable[[], None]) -> None:
        """Call ``done`` when all that was put on the stream before is stable on both nodes."""


class Repair(Enum):
    """What is repaired."""

    NOTHING = "nothing"
    UNREADABLE = "unreadable"  # what the secondary's disk reports an error for: only one side has it
    ALL = "all"


class FreshReads:
    """Reads of one store, from its start to its end, that do not take the page cache's word for what is on the disk.

    While one range is compared, the disk reads the next one. What was read a moment ago is not read from it again.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._end = 0  # of what was renewed last

    def read(self, offset: int, length: int) -> Buffer:
        """See ``Store``."""
        goes_on = offset and self._end - _RECENT_BYTES <= offset <= self._end
        start, ahead = self._end if goes_on else offset, min(offset + 2 * length, self._store.size_bytes)
        if start < ahead:
            self._store.renew(start, ahead - start)
            self._end = ahead
        return self._store.read(offset, length)


class Findings:
    """Where the replicas of one volume are known to differ."""

    def __init__(self, blocks: BlockMap, file: MapWriter) -> None:
        """``blocks`` as saved in ``file``."""
        self._blocks = blocks
        self._file = file

    def note(self, offset: int, length: int, verdict: Verdict) -> None:
        """A range was compared; one that differs counts when it is as small as one block."""
        first, last = _blocks(offset, length)
        if verdict is Verdict.EQUAL:
            self._blocks.remove(first, last)
        elif first == last:
            self._blocks.add(first, last)
        if self._blocks.changed:
            self._file.start_write(self._blocks.pages_to_save(), durable=True, done=_nothing)

    @property
    def nbytes(self) -> int:
        """How much differs, in whole blocks."""
        return self._blocks.count * COMPARE_GRAIN_BYTES

    def ranges(self) -> list[Range]:
        """The first VERIFY_RANGES of them."""
        return ranges_of(self._blocks)


class Verify:
    """One pass over some volumes of a group."""

    def __init__(
        self,
        stream: Stream,
        stores: Sequence[Store],
        differences: Sequence[Differences],
        volumes: Sequence[int],
        repair: Repair,
        compared: Callable[[int, int, int, Verdict], None],
        ended: Callable[[], None],
    ) -> None:
        """``compared`` is told every outcome: volume, offset, length, verdict. ``ended``: see ``end``."""
        self._stream = stream
        self._stores = stores
        self._differences = differences
        self._repair = repair
        self._compared = compared
        self._ended = ended
        self._fresh = [FreshReads(store) for store in stores]
        self._volumes = deque(volumes)  # that are not done; of the first, up to ``_cursor``
        self._cursor = 0
        self._again: deque[Piece] = deque()  # to be compared, before the walk goes on: parts, and what was put off
        self._repaired: set[Piece] = set()  # of these, what was repaired
        self._results: set[Piece] = set()  # to come
        self._repairs: deque[Piece] = deque()  # to be put on the stream
        self._logging = False  # the first of them waits for the intent log
        self._unflushed: list[Piece] = []  # repaired
        self._flushing = 0
        self.why = ""  # why it ended before everything was compared, a clause
        self.found = {volume: BlockMap(blocks_of(stores[volume].size_bytes, COMPARE_GRAIN_BYTES)) for volume in volumes}
        self.repaired_bytes = dict.fromkeys(volumes, 0)
        self.unreadable_bytes = 0  # at the secondary
        self.total_bytes = sum(stores[volume].size_bytes for volume in volumes)
        self.done_bytes = 0
        self.copied_bytes = 0
        self.budget_bytes = UNLIMITED

    # --- Going on -----------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether nothing can be done before something arrives, or is allowed."""
        return self.budget_bytes <= 0 or len(self._results) >= VERIFY_BLOCKS_IN_FLIGHT

    @property
    def comparing(self) -> bool:
        """Whether it waits for results of the secondary."""
        return bool(self._results)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do, and nothing to wait for."""
        return not (self._volumes or self._again or self._results or self._repairs or self._unflushed or self._flushing)

    def stop(self, why: str) -> None:
        """Begin nothing more; what is under way ends by itself."""
        self.why = self.why or why
        for work in (self._volumes, self._again, self._repairs, self._unflushed):
            work.clear()

    def end(self, why: str = "") -> None:
        """It has finished; or it cannot go on, for this reason."""
        if not self.finished:
            self.why = self.why or why
        self._ended()

    def step(self) -> bool:
        """Put one thing on the stream; false if there is nothing for which it is time. Only while not ``waiting``."""
        if self._repairs and self._put_repair():
            return True
        piece = self._next()
        if piece is not None:
            self._compare(piece)
            return True
        if not (self._again or self._results or self._repairs):
            self._flush()
        return False

    def _next(self) -> Piece | None:
        """What to compare next, of what is on the link."""
        for _ in range(min(len(self._again), VERIFY_PUT_OFF)):
            piece = self._again.popleft()
            if self._stream.is_sent(*piece):
                return piece
            self._again.append(piece)
        while self._volumes and len(self._again) < VERIFY_PUT_OFF:
            piece = self._walk()
            if self._stream.is_sent(*piece):
                return piece
            self._again.append(piece)
        return None

    def _walk(self) -> Piece:
        """The next piece of the volumes, one after the other: whole blocks, and no more than is allowed, as clients of
        both nodes wait while it is read."""
        volume, offset = self._volumes[0], self._cursor
        store = self._stores[volume]
        is_data, end = store.extent(offset)
        if end < store.size_bytes:
            end -= end % COMPARE_GRAIN_BYTES
        if is_data or end - offset < COMPARE_BLOCK_BYTES:
            allowed = max(self.budget_bytes // COMPARE_GRAIN_BYTES, 1) * COMPARE_GRAIN_BYTES
            whole = offset - offset % COMPARE_BLOCK_BYTES + COMPARE_BLOCK_BYTES
            end = min(whole, offset + allowed, store.size_bytes)
        end = min(end, offset + HOLE_COMPARE_BYTES)
        self.done_bytes += end - offset
        self._cursor = end
        if end == store.size_bytes:
            self._volumes.popleft()
            self._cursor = 0
        return volume, offset, end - offset

    def _compare(self, piece: Piece) -> None:
        volume, offset, length = piece
        if length > COMPARE_BLOCK_BYTES:
            is_data, end = self._stores[volume].extent(offset)
            if is_data or end < offset + length:  # it was written since
                self._divide(piece)
                return
            content = HOLE
        else:
            self.budget_bytes -= length
            read = self._fresh[volume].read(offset, length)
            content = digest(read)
        repairing = self._repair is not Repair.NOTHING and piece not in self._repaired
        self._results.add(piece)
        self._stream.compare(volume, offset, length, content, Purpose.REPAIR if repairing else Purpose.VERIFY)

    def _divide(self, piece: Piece) -> None:
        """Its parts are next."""
        volume, offset, length = piece
        grain = COMPARE_BLOCK_BYTES if length > COMPARE_BLOCK_BYTES else COMPARE_GRAIN_BYTES
        size = -(-length // (grain * VERIFY_PARTS)) * grain
        end = offset + length
        parts = [(volume, at, min(size, end - at)) for at in range(offset, end, size)]
        self._again.extendleft(reversed(parts))

    # --- What comes of it -----------------------------------------------------------------------

    def result(self, volume: int, offset: int, length: int, verdict: Verdict) -> None:
        """The secondary has compared a piece. Raises ProtocolError."""
        piece = volume, offset, length
        if piece not in self._results:
            raise ProtocolError(f"a result for {length} bytes at {offset} that were not to be compared")
        self._results.remove(piece)
        was_repaired = piece in self._repaired
        self._repaired.discard(piece)
        if verdict is not Verdict.EQUAL and length > COMPARE_GRAIN_BYTES:
            if not self.why:
                self._divide(piece)
            return
        self._compared(volume, offset, length, verdict)
        if was_repaired:
            self.repaired_bytes[volume] += length if verdict is Verdict.EQUAL else 0
        elif verdict is not Verdict.EQUAL:
            self._differs(piece, verdict)

    def _differs(self, piece: Piece, verdict: Verdict) -> None:
        volume, offset, length = piece
        self.found[volume].add(*_blocks(offset, length))
        unreadable = verdict is Verdict.UNREADABLE
        self.unreadable_bytes += length if unreadable else 0
        if (self._repair is Repair.ALL or (self._repair is Repair.UNREADABLE and unreadable)) and not self.why:
            self._repairs.append(piece)

    # --- Repair ---------------------------------------------------------------------------------

    def _put_repair(self) -> bool:
        """Put the first one on the stream if its region is in the intent log (rule 8); whether that was so."""
        volume, offset, length = self._repairs[0]
        if self._logging or not self._logged(volume, [(OP_WRITE, offset, length, 0)]):
            return False
        store = self._stores[volume]
        is_data, end = store.extent(offset)
        if is_data or end < offset + length:
            self._stream.put(volume, OP_WRITE, offset, length, store.read(offset, length))
        else:
            self._stream.put(volume, OP_PUNCH, offset, length, b"")
        self.budget_bytes -= length
        self.copied_bytes += length
        self._unflushed.append(self._repairs.popleft())
        if len(self._unflushed) * COMPARE_GRAIN_BYTES >= REPAIR_FLUSH_BYTES:
            self._flush()
        return True

    def _logged(self, volume: int, changes: list[Change]) -> bool:
        differences = self._differences[volume]
        self._logging = True
        if differences.logged(changes) or differences.log(changes, self._log_moved):
            self._logging = False
            return True
        return False

    def _log_moved(self) -> None:
        self._logging = False

    def _flush(self) -> None:
        """Make stable what was repaired; then it is compared once more."""
        pieces, self._unflushed = self._unflushed, []
        for volume in dict.fromkeys(volume for volume, _, _ in pieces):
            self._flushing += 1
            of_volume = [piece for piece in pieces if piece[0] == volume]
            self._stream.flush_everywhere(volume, partial(self._flushed, of_volume))

    def _flushed(self, pieces: list[Piece]) -> None:
        self._flushing -= 1
        if not self.why:
            self._repaired.update(pieces)
            self._again.extendleft(pieces)


def ranges_of(blocks: BlockMap) -> list[Range]:
    """The first VERIFY_RANGES of what is in a map; the last block of a volume counts as a whole one."""
    found, first = list[Range](), blocks.next_from(0)
    while first is not None and len(found) < VERIFY_RANGES:
        last = blocks.run_end(first, blocks.blocks - 1)
        found.append((first * COMPARE_GRAIN_BYTES, (last + 1 - first) * COMPARE_GRAIN_BYTES))
        first = blocks.next_from(last + 1)
    return found


def _blocks(offset: int, length: int) -> tuple[int, int]:
    return offset // COMPARE_GRAIN_BYTES, (offset + length - 1) // COMPARE_GRAIN_BYTES


def _nothing() -> None:
    """Nobody waits for it."""
