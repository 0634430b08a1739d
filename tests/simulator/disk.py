"""A disk under a page cache: a loss of power takes what was not synced, or any part of it, block by block."""

from collections.abc import Callable
from random import Random

BLOCK_BYTES = 512
ZEROES = bytes(BLOCK_BYTES)


class Disk:
    """One volume of a host; it outlives processes. ``changed`` is called with the blocks that a write has changed."""

    def __init__(self, blocks: int, identity: str, changed: Callable[[range], None]) -> None:
        self.identity = identity
        self._changed = changed
        # Of each block: what is stable, then all that was written since, each with its number. Any of these versions
        # may be there after a loss of power.
        self._versions: list[list[tuple[int, bytes]]] = [[(0, ZEROES)] for _ in range(blocks)]
        self._is_data = bytearray(blocks)  # else a hole
        self.written = 0  # the number of the newest write
        self.losses = 0  # of its cache

    @property
    def size_bytes(self) -> int:
        """Of the volume."""
        return len(self._versions) * BLOCK_BYTES

    def read(self, offset: int, length: int) -> bytes:
        """What the cache holds."""
        blocks = range(offset // BLOCK_BYTES, (offset + length) // BLOCK_BYTES)
        return b"".join([self._versions[block][-1][1] for block in blocks])

    def write(self, offset: int, data: bytes, *, is_data: bool = True) -> None:
        """Into the cache: whole blocks."""
        assert not offset % BLOCK_BYTES
        assert not len(data) % BLOCK_BYTES
        self.written += 1
        first = offset // BLOCK_BYTES
        for at in range(0, len(data), BLOCK_BYTES):
            block = first + at // BLOCK_BYTES
            content = data[at : at + BLOCK_BYTES]
            self._versions[block].append((self.written, content))
            self._is_data[block] = is_data
        self._changed(range(first, first + len(data) // BLOCK_BYTES))

    def next_extent(self, offset: int, *, is_data: bool) -> int:
        """Where the next data, or the next hole, begins; or the end."""
        found = self._is_data.find(is_data, offset // BLOCK_BYTES)
        return self.size_bytes if found < 0 else max(offset, found * BLOCK_BYTES)

    def sync(self, until: int) -> None:
        """What was written up to that number is stable now; what came later need not be."""
        for versions in self._versions:
            stable = max((at for at, (number, _) in enumerate(versions) if number <= until), default=0)
            del versions[:stable]

    def lose_cache(self, random: Random) -> None:
        """Each block is at some moment since it was stable."""
        self.losses += 1
        for block, versions in enumerate(self._versions):
            versions[:] = [(0, random.choice(versions)[1])]
            self._is_data[block] = True

    # --- For the checks -------------------------------------------------------------------------------

    def values(self) -> list[int]:
        """What each block holds now, as the number that a client wrote into it."""
        return [int.from_bytes(versions[-1][1][:8]) for versions in self._versions]

    def surely_as(self, other: "Disk", block: int) -> bool:
        """Whether a block is the same on both, whichever of them loses its cache."""
        own, its = self._versions[block], other._versions[block]
        if len(own) == len(its) == 1:
            return own[0][1] == its[0][1]
        return len({content for _, content in own} | {content for _, content in its}) == 1

    def only_cached(self, block: int, value: int) -> bool:
        """Whether a loss of power could take this value."""
        return any(value == int.from_bytes(content[:8]) for _, content in self._versions[block][1:])
