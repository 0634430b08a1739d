"""A disk under a page cache: a loss of power takes what was not flushed, or any part of it."""

from random import Random


class Disk:
    """Blocks that hold one value each."""

    def __init__(self, blocks: int) -> None:
        # Of each block: what is stable, then all that was written since. Any of them may be there after a power loss.
        self._versions: list[list[int]] = [[0] for _ in range(blocks)]
        self._dropped = [0] * blocks  # how many versions were before those

    @property
    def blocks(self) -> int:
        """How many."""
        return len(self._versions)

    def read(self, block: int) -> int:
        """What is there now."""
        return self._versions[block][-1]

    def write(self, block: int, value: int) -> None:
        """Into the cache."""
        self._versions[block].append(value)

    def begin_flush(self) -> list[int]:
        """What the flush that begins now makes stable: to be given to ``end_flush``."""
        return [dropped + len(versions) - 1 for dropped, versions in zip(self._dropped, self._versions, strict=True)]

    def end_flush(self, flushed: list[int]) -> None:
        """It has ended: nothing older than what it began with is left."""
        for block, number in enumerate(flushed):
            if number > self._dropped[block]:
                del self._versions[block][: number - self._dropped[block]]
                self._dropped[block] = number

    def lose_power(self, random: Random) -> None:
        """Each block is at some moment since it was stable."""
        for block, versions in enumerate(self._versions):
            self._dropped[block] += len(versions)  # so a flush that was under way does nothing any more
            versions[:] = [random.choice(versions)]

    def contents(self) -> list[int]:
        """All blocks as they are now."""
        return [versions[-1] for versions in self._versions]
