"""Copying to the secondary whatever differs, inside the ordered stream, without locks. Pure.

Rule 7 makes it simple: a COMPARE frame, a trim for a hole, a block read at the owner all take their place
in the stream, so a block can never overwrite a newer write. Holes are sent as trims, data as its digest
first, and as data only where the digests differ.
Rule 9: the secondary counts as synced when everything has been copied *and flushed on it*, and it said so durably.

Bounds: ``COMPARE_BLOCKS_IN_FLIGHT`` comparisons, and one block of work per ``step``. If the session ends, so
does the resync; the secondary still says ``needs_sync`` and the next session starts it again.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from stortrends_ha.errors import ProtocolError
from stortrends_ha.limits import (
    COMPARE_BLOCK_BYTES,
    COMPARE_BLOCKS_IN_FLIGHT,
    WRITE_PIECE_BYTES,
    ZERO_PIECE_BYTES,
)
from stortrends_ha.protocol.nbd_transmission import OP_PUNCH, OP_WRITE
from stortrends_ha.replication.interfaces import Buffer, Store


def digest(block: Buffer) -> bytes:
    """What two nodes compare instead of a block: 32 bytes."""
    return hashlib.sha256(block).digest()


class Stream(Protocol):
    """What a resync needs of the primary."""

    def put(self, volume: int, op: int, offset: int, length: int, data: Buffer) -> None:
        """Put one change on the stream, now."""

    def compare(self, volume: int, offset: int, length: int, digest: bytes) -> None:
        """Put a comparison on the stream, now."""


class Resync:
    """One pass over all volumes of a group."""

    def __init__(self, stream: Stream, stores: Sequence[Store]) -> None:
        self._stream = stream
        self._stores = stores
        self._volume = 0
        self._offset = 0
        self._in_flight: set[tuple[int, int, int]] = set()  # (volume, offset, length)
        self.flushing: int | None = None  # volumes that are still to be flushed, once everything has been copied
        self.done_bytes = 0
        self.total_bytes = sum(store.size_bytes for store in stores)
        self.copied_bytes = 0

    @property
    def waiting(self) -> bool:
        """Whether nothing can be done before a result arrives."""
        return len(self._in_flight) >= COMPARE_BLOCKS_IN_FLIGHT or self._volume == len(self._stores)

    @property
    def finished(self) -> bool:
        """Whether everything has been put on the stream."""
        return self._volume == len(self._stores) and not self._in_flight

    @property
    def ended(self) -> bool:
        """Whether everything is flushed on both, and the secondary has been told so."""
        return self.flushing == 0

    def step(self) -> None:
        """Compare the next block, or trim the next hole. Only while not ``waiting``."""
        store, offset = self._stores[self._volume], self._offset
        is_data, end = store.extent(offset)
        if is_data:
            end = min(end, offset - offset % COMPARE_BLOCK_BYTES + COMPARE_BLOCK_BYTES)
            self._in_flight.add((self._volume, offset, end - offset))
            self._stream.compare(self._volume, offset, end - offset, digest(store.read(offset, end - offset)))
        else:
            end = min(end, offset + ZERO_PIECE_BYTES)
            self._stream.put(self._volume, OP_PUNCH, offset, end - offset, b"")
            self.done_bytes += end - offset
        self._offset = end
        if end == store.size_bytes:
            self._volume, self._offset = self._volume + 1, 0

    def result(self, volume: int, offset: int, length: int, equal: bool) -> None:
        """The secondary has compared a block: copy it, as it is by now, if it differed. Raises ProtocolError."""
        if (volume, offset, length) not in self._in_flight:
            raise ProtocolError(f"a result for {length} bytes at {offset} that were not to be compared")
        self._in_flight.remove((volume, offset, length))
        self.done_bytes += length
        if not equal:
            self.copied_bytes += length
            for at in range(offset, offset + length, WRITE_PIECE_BYTES):
                size = min(WRITE_PIECE_BYTES, offset + length - at)
                self._stream.put(volume, OP_WRITE, at, size, self._stores[volume].read(at, size))
