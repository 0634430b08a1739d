"""What an owner that is alone owes its clients: answers to changes that are applied, and not yet stable. Pure.

Rule 1: an owner that is alone writes through: a change is answered when it is stable here. One flush under way per
volume covers all that was applied before it began (group commit), so a slow disk makes larger groups, not more flushes.
A volume that is cached ``always`` needs no flush. While the secondary is about to be added, an answer waits for its
acknowledgement, too: ``limit`` says up to which number there are acknowledgements.

*Settled* means that what was cached before this owner went alone is stable as well. If this process dies before, the
state file does not say so, and after a loss of power this copy is not trusted (rule 3).

Bounds: ``changes`` and ``nbytes`` count in the bounds of the window.
"""

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import NamedTuple

from stortrends_ha.replication.interfaces import Client, Store
from stortrends_ha.replication.pace import Probe

UNLIMITED = 1 << 64


class Cache(Enum):
    """When a write to a volume may rest in the page cache only."""

    MIRRORED = "mirrored"  # while it is in those of two nodes
    ALWAYS = "always"  # always: a loss of power takes what was not flushed, as with a disk that has a cache
    NEVER = "never"  # never: every write is as if FUA


class Owed(NamedTuple):
    """An answer: to changes ``first`` to ``last``."""

    first: int
    last: int
    nbytes: int
    client: Client
    replies: bytes


class WriteThrough:
    """The answers that are owed, by volume. ``advanced`` is called when something has become stable."""

    def __init__(
        self, stores: Sequence[Store], cached: Sequence[bool], advanced: Callable[[], None], probe: Probe
    ) -> None:
        self._stores = stores
        self._probe = probe
        self._advanced = advanced
        self._owed: list[deque[Owed]] = [deque() for _ in stores]
        self._stable = [UNLIMITED if always else 0 for always in cached]  # the newest change that needs no flush
        self._committing = [False for _ in stores]
        self._settling: set[int] = set()
        self._settle_number = 0
        self.changes = 0
        self.nbytes = 0

    def owe(self, volume: int, owed: Owed) -> None:
        """A change has been applied, and nothing is answered yet. ``commit`` must follow."""
        self._probe.begin(volume, owed.last)
        self._owed[volume].append(owed)
        self.changes += owed.last - owed.first + 1
        self.nbytes += owed.nbytes

    def commit(self, volume: int) -> None:
        """Make stable what is owed, if that is not being done."""
        owed = self._owed[volume]
        if self._committing[volume] or not owed or owed[-1].last <= self._stable[volume]:
            return
        self._committing[volume] = True
        covered = owed[-1].last
        self._stores[volume].start_flush(lambda: self._committed(volume, covered))

    def _committed(self, volume: int, covered: int) -> None:
        self._committing[volume] = False
        self._stable[volume] = covered
        self._advanced()
        self.commit(volume)

    def settle(self, settled: Callable[[], None]) -> None:
        """Make stable everything that was applied before, then call ``settled``, unless this is called again first."""
        self._settle_number += 1
        number, self._settling = self._settle_number, set(range(len(self._stores)))
        for volume, store in enumerate(self._stores):
            store.start_flush(partial(self._flushed, volume, number, settled))

    def _flushed(self, volume: int, number: int, settled: Callable[[], None]) -> None:
        if number != self._settle_number:
            return
        self._settling.discard(volume)
        if not self._settling:
            settled()

    def unsettle(self) -> None:
        """The owner is not alone any longer: a ``settle`` that is under way is forgotten."""
        self._settle_number += 1

    def answers(self, limit: int) -> dict[Client, list[bytes]]:
        """Take out what may be answered by now, up to change ``limit``."""
        found: dict[Client, list[bytes]] = {}
        for volume, owed in enumerate(self._owed):
            newest = min(self._stable[volume], limit)
            while owed and owed[0].last <= newest:
                one = owed.popleft()
                self.changes -= one.last - one.first + 1
                self.nbytes -= one.nbytes
                found.setdefault(one.client, []).append(one.replies)
                self._probe.answered(volume, one.last)
        return found

    def before(self, volume: int, otherwise: int) -> int:
        """The number before the first change to a volume that is owed; ``otherwise`` if none is."""
        owed = self._owed[volume]
        return owed[0].first - 1 if owed else otherwise

    def before_all(self, otherwise: int) -> int:
        """The number before the first change that is owed."""
        return min(self.before(volume, otherwise) for volume in range(len(self._owed)))
