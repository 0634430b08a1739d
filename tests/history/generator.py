"""Large histories that are right by construction, and mistakes to put into them, each of which makes one block wrong.

Every operation takes place at one moment between its beginning and its end; so a list of these moments, in the order
of time, is what the block really held.
"""

import heapq
import random
from dataclasses import dataclass, field

from .operations import ZEROES, Entry, History, Loss, Operation, unique_value

_LONGEST = 40  # an operation; another one begins at each moment
_LOSS_TAKES = 100


@dataclass(slots=True)
class Generated:
    """The entries, and the changes that took place in each block, in this order."""

    entries: list[Entry] = field(default_factory=list)
    changes: dict[int, list[Operation]] = field(default_factory=dict)

    def history(self) -> History:
        return History.of(self.entries)

    # --- Mistakes: they tell the block in which they are ---

    def stale_read(self, rng: random.Random) -> int:
        """A read finds what had been overwritten when it began."""
        read, old, _ = rng.choice(self._chains())
        read.found = [old.value]
        return read.block

    def lost_write(self, rng: random.Random) -> int:
        """All reads find what was there before a write, and never what it wrote."""
        read, old, lost = rng.choice(self._chains())
        for one in self._reads(read.block):
            if one.found == [lost.value]:
                one.found = [old.value]
        return read.block

    def read_from_the_future(self, rng: random.Random) -> int:
        read, _, _ = rng.choice(self._chains())
        later = [one for one in self.changes[read.block] if one.begin > (read.end or 0) and one.kind == "write"]
        read.found = [later[0].value]
        return read.block

    def torn_block(self, rng: random.Random) -> int:
        read, old, new = rng.choice(self._chains())
        read.found = [[old.value, new.value]]
        return read.block

    def lost_flushed_write(self, rng: random.Random) -> int:
        """After the loss, until the next write, there is what was there before one that was stable."""
        (loss,) = (entry for entry in self.entries if isinstance(entry, Loss))
        stable = [(old, new) for read, old, new in self._chains() if new.fua and (read.end or 0) < loss.begin]
        old, new = rng.choice(stable)
        self.entries = [one for one in self.entries if isinstance(one, Loss) or one.begin < loss.begin]
        self.entries.append(Operation("read", 1, loss.end, loss.end + 1, new.block, found=[old.value]))
        return new.block

    def _reads(self, block: int) -> list[Operation]:
        return [
            one
            for one in self.entries
            if isinstance(one, Operation)
            and one.kind == "read"
            and one.answered
            and one.blocks == range(block, block + 1)
        ]

    def _chains(self) -> list[tuple[Operation, Operation, Operation]]:
        """(read, older, newer): it found the newer write, which began when the older one had been answered, and was
        answered when the read began. Only such of one block, in the first life, with more to come."""
        limit = min((entry.begin for entry in self.entries if isinstance(entry, Loss)), default=1 << 62)
        chains = []
        for block, changes in self.changes.items():
            writes = [one for one in changes if one.kind == "write" and one.answered and one.count == 1]
            by_value = {one.value: one for one in writes}
            for read in self._reads(block)[:-20]:
                newer = by_value.get(read.found[0]) if isinstance(read.found[0], int) else None
                if newer is None or (newer.end or 0) >= read.begin or (read.end or 0) >= limit:
                    continue
                if older := next((one for one in reversed(writes) if (one.end or 0) < newer.begin), None):
                    chains.append((read, older, newer))
        return chains


def generate(rng: random.Random, count: int, *, blocks: int = 40, losses: int = 0) -> Generated:
    """So many operations of eight clients."""
    return _Generator(rng, blocks).run(count, losses)


class _Generator:
    def __init__(self, rng: random.Random, blocks: int) -> None:
        self._rng = rng
        self._blocks = blocks
        self._now = 0
        self._made = Generated(changes={block: [] for block in range(blocks)})
        self._held = [ZEROES] * blocks
        # Of each block: what it held since the newest change that is stable, that one first.
        self._cached: list[list[int]] = [[ZEROES] for _ in range(blocks)]
        self._to_happen: list[tuple[int, int, Operation]] = []  # (moment, number, operation)

    def run(self, count: int, losses: int) -> Generated:
        self._made.entries.append(Operation("zero", 0, self._now, self._now + 1, count=self._blocks, fua=True))
        self._now += 2
        lose_at = {count * (number + 1) // (losses + 1) for number in range(losses)}
        for number in range(1, count):
            self._begin(number)
            if number in lose_at:
                self._lose_power()
            self._now += 1
            self._happen(self._now)
        self._happen(1 << 62)
        return self._made

    def _begin(self, number: int) -> None:
        rng = self._rng
        kind = rng.choices(["read", "write", "zero", "trim", "flush"], [50, 42, 3, 2, 3])[0]
        block = rng.randrange(self._blocks)
        length = 1 if rng.random() < 0.9 else min(3, self._blocks - block)
        end = self._now + rng.randrange(1, _LONGEST)
        one = Operation(kind, number % 8, self._now, end, block, length)
        if kind == "write":
            one.value = unique_value(one.client, number)
        one.fua = kind in ("write", "zero", "trim") and rng.random() < 0.2
        moment = rng.randrange(self._now, end)
        if kind == "flush":
            one.block, one.count = 0, 1
        elif rng.random() < 0.02:
            one.end, one.fua = None, False
            moment += rng.choice([0, 0, 1000, 1 << 61])
        self._made.entries.append(one)
        heapq.heappush(self._to_happen, (moment, number, one))

    def _happen(self, until: int) -> None:
        while self._to_happen and self._to_happen[0][0] < until:
            moment, _, one = heapq.heappop(self._to_happen)
            if moment < 1 << 61:
                self._happens(one)

    def _happens(self, one: Operation) -> None:
        if one.kind == "read":
            one.found = [self._held[block] for block in one.blocks]
        elif one.kind == "flush":
            self._cached = [cached[-1:] for cached in self._cached]
        else:
            for block in one.blocks:
                self._held[block] = one.value
                self._made.changes[block].append(one)
                self._cached[block] = [one.value] if one.fua else [*self._cached[block], one.value]

    def _lose_power(self) -> None:
        """Right now: what is under way has not taken place, and is not answered any more."""
        begin = self._now + 1
        for _, _, one in self._to_happen:
            one.end, one.fua = None, False
        self._to_happen.clear()
        self._now = begin + _LOSS_TAKES
        self._made.entries.append(Loss(begin, self._now))
        self._held = [self._rng.choice(cached) for cached in self._cached]
        self._cached = [[held] for held in self._held]
