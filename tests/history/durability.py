"""Is what was done to one block linearizable, and was nothing lost that had to be kept? Pure, exact.

A loss of power ends a *life* of the block; each life has to be linearizable. What the block holds in the next one is
what it held at some moment of this one, when all that was stable had taken place: so there must be a linearization
with such a moment. What took place later is gone for good. Stable is what was answered with FUA, or before a flush
began that was answered; and, if a copy kept its power, all that was answered.

With what the block came back is known only by what was found later: each such value is tried, or none at all. To
try a moment is to check the register with a read of the value right then, before which all that was stable has to
end. Most moments need not be tried: see `_moments`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from .operations import ZEROES, name_of
from .register import NEVER, Access, Contradiction, check_register, clusters_of

# Right after an event: first the end of what is stable, then a read.
_STABLE, _READ, _READ_END = 1, 2, 3
_ROOM = 4  # for these


@dataclass(frozen=True, slots=True)
class Life:
    """The accesses of a block until a loss, or until the end of the history; the changes that were `stable` then."""

    begin: int
    end: int
    accesses: list[Access]
    stable: frozenset[Access] = frozenset()

    def beginning_with(self, value: int) -> "Life":
        """With what it came back."""
        before = Access(None, False, value, self.begin - 2 * _ROOM, self.begin - _ROOM)
        return replace(self, accesses=[before, *self.accesses])


def check_lives(lives: Sequence[Life]) -> Contradiction | None:
    """Why a block cannot have been so."""
    life, later = lives[0], lives[1:]
    if not later:
        return check_register(life.accesses)
    if found := check_register(life.accesses):
        return found
    if not (refused := check_lives(later)):
        return None  # nobody found what it came back with
    for value, found_by in _candidates(life, later).items():
        if not (found := _check_end(life, value, found_by)):
            found = check_lives([later[0].beginning_with(value), *later[1:]])
        if not found:
            return None
        refused = found
    return refused


def _candidates(life: Life, later: Iterable[Life]) -> dict[int, Access]:
    """The values of this life that somebody found later, and who did first."""
    had = {access.value for access in life.accesses if not access.reads}
    candidates: dict[int, Access] = {}
    for access in chain.from_iterable(next_.accesses for next_ in later):
        if access.reads and access.value in had:
            candidates.setdefault(access.value, access)
    return candidates


def _check_end(life: Life, value: int, found_by: Access) -> Contradiction | None:
    """Why a life cannot have ended in such a way that the block came back with the value."""
    for moment in _moments(life, value):
        read = Access(None, True, value, moment + _READ, moment + _READ_END)
        accesses = [
            replace(access, end=min(access.end, moment + _STABLE)) if access in life.stable else access
            for access in life.accesses
        ]
        if not check_register([*accesses, read]):
            return None
    write = next(access for access in life.accesses if access.value == value and not access.reads)
    stable = max(life.stable, key=lambda access: access.begin)
    why = f"after a loss of power the block held {name_of(value)} again, though {name_of(stable.value)} was stable"
    return Contradiction(why, (write, stable, found_by))


def _moments(life: Life, value: int) -> Iterator[int]:
    """The events right after which it may have been so, the last one first.

    Not before all that was stable had begun. A value of its own need not have been there longer than until the last of
    its accesses began, or, if it is loose, until the first of them ended.
    """
    clusters = clusters_of(life.accesses)
    assert not isinstance(clusters, Contradiction)
    begin = max(
        (access.begin for access in life.stable if access.value != value or value == ZEROES), default=life.begin
    )
    end = life.end
    if value != ZEROES:
        own = next((cluster for cluster in clusters if cluster.write.value == value), None)
        write = next(access for access in life.accesses if access.value == value and not access.reads)
        began, ended = (own.began, own.ended) if own else (write.begin, NEVER)
        begin, end = max(begin, began), max(began, min(end, ended))
    events = {event for access in life.accesses for event in (access.begin, access.end) if begin <= event <= end}
    yield from sorted(events | {begin}, reverse=True)
