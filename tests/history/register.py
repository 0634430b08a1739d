"""Is what was done to one block linearizable? Pure, exact, in n log n.

Each write has a value of its own. The accesses of one value (the write and the reads that found it) are a *cluster*;
they follow each other without anything else of the block between them. One of them ended first, at `ended`; one began
last, at `began`. If `ended < began` the block held the value all that time: the cluster is *fixed*. Else it may have
held it only for an instant, somewhere between `began` and `ended`: the cluster is *loose*. So (Gibbons and Korach,
"Testing Shared Memories", 1997) a history is linearizable exactly if no two of the fixed overlap, and no loose one lies
within a fixed one. A write that was never answered takes part only if its value was found.

Zeroes look all the same, so they are no clusters. The rest of the time is free: there loose clusters and zeroings are
instants, which can be put anywhere. A read of zeroes needs a zeroing that took place before, at `place`, with nothing
else since: no fixed cluster, and no loose one that lies completely between the two (others give way). So zeroes last
from `place` to a moment that grows with it, and the later a zeroing took place the better for all reads that end after
it. Hence we go through the reads in the order of their ends. Zeroings that have ended by then took place as late as
they could; if that does not do, one that is still under way takes place right at the end of the read: the one that ends
first, as the others are of more use later. No other choice serves more reads.
"""

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from .operations import ZEROES, Operation, name_of

NEVER = 1 << 80
# Moments are finer than times: what began when something else ended began before that, and there is room between them.
_FINER, _END = 8, 4


@dataclass(frozen=True, slots=True, eq=False)
class Access:
    """What an operation does to one block, between two moments; without an operation: made up by who checks."""

    operation: Operation | None
    reads: bool
    value: int
    begin: int
    end: int = NEVER


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Accesses that cannot all be true."""

    why: str
    accesses: tuple[Access, ...] = ()


def began_at(time: int) -> int:
    return time * _FINER


def ended_at(time: int | None) -> int:
    return NEVER if time is None else time * _FINER + _END


@dataclass(frozen=True, slots=True)
class Cluster:
    """The accesses of one value; see the module."""

    write: Access
    first: Access  # the one that ended first
    last: Access  # the one that began last

    @property
    def ended(self) -> int:
        return self.first.end

    @property
    def began(self) -> int:
        return self.last.begin

    @property
    def fixed(self) -> bool:
        return self.ended < self.began

    @property
    def accesses(self) -> tuple[Access, ...]:
        return tuple(dict.fromkeys((self.write, self.first, self.last)))


def clusters_of(accesses: Iterable[Access]) -> list[Cluster] | Contradiction:
    """Those that took place."""
    of_value: dict[int, list[Access]] = {}
    for access in accesses:
        if access.value != ZEROES:
            of_value.setdefault(access.value, []).append(access)
    clusters = []
    for value, members in of_value.items():
        writes = [member for member in members if not member.reads]
        first = min(members, key=lambda member: member.end)
        if not writes:
            return Contradiction(f"{name_of(value)} was found, which could not be there", (first,))
        if len(writes) > 1:
            return Contradiction(f"{name_of(value)} was written twice, so this cannot be checked", tuple(writes))
        (write,) = writes
        if first.end < write.begin:
            return Contradiction(f"{name_of(value)} was found before it was written", (first, write))
        if first.end < NEVER:
            clusters.append(Cluster(write, first, max(members, key=lambda member: member.begin)))
    return clusters


def check_register(accesses: Sequence[Access]) -> Contradiction | None:
    """Why the accesses of one block are not linearizable; reads without an answer must not be among them."""
    clusters = clusters_of(accesses)
    if isinstance(clusters, Contradiction):
        return clusters
    fixed = sorted((cluster for cluster in clusters if cluster.fixed), key=lambda cluster: cluster.ended)
    for one, other in pairwise(fixed):
        if other.ended < one.began:
            names = f"{name_of(one.write.value)} and {name_of(other.write.value)}"
            return Contradiction(f"{names} must have been there at the same time", one.accesses + other.accesses)
    times = _Times(fixed, [cluster for cluster in clusters if not cluster.fixed])
    zeroes = [access for access in accesses if access.value == ZEROES]
    zeroings, reads = [one for one in zeroes if not one.reads], [one for one in zeroes if one.reads]
    return times.check_loose() or times.check_zeroes(zeroings, reads)


class _Times:
    """When a block held what. `fixed` clusters are in order and do not overlap."""

    def __init__(self, fixed: list[Cluster], loose: list[Cluster]) -> None:
        self._fixed = fixed
        self._starts = [cluster.ended for cluster in fixed]
        self._loose = sorted(loose, key=lambda cluster: cluster.began)
        self._begins = [cluster.began for cluster in self._loose]
        # The end of the first to end of those from here on.
        self._first_ends = [*accumulate((cluster.ended for cluster in reversed(self._loose)), min)][::-1]

    def check_loose(self) -> Contradiction | None:
        for cluster in self._loose:
            if found := self._within_fixed(
                cluster.began, cluster.ended, name_of(cluster.write.value), cluster.accesses
            ):
                return found
        return None

    def check_zeroes(self, zeroings: list[Access], reads: list[Access]) -> Contradiction | None:
        for access in (*zeroings, *reads):
            if found := self._within_fixed(access.begin, access.end, "zeroes", (access,)):
                return found
        to_begin = sorted((one.begin, self._last_free(one.end), n) for n, one in enumerate(zeroings))
        to_begin.reverse()
        under_way: list[tuple[int, int]] = []  # (the last moment at which it may take place, number)
        place, newest = -1, None  # when the newest zeroing took place, and which
        for end, begin, number in sorted((self._last_free(of.end), of.begin, n) for n, of in enumerate(reads)):
            while to_begin and to_begin[-1][0] < end:
                _, last, which = to_begin.pop()
                heapq.heappush(under_way, (last, which))
            while under_way and under_way[0][0] <= end:
                last, which = heapq.heappop(under_way)
                if last > place:
                    place, newest = last, zeroings[which]
            if newest is not None and (place >= begin or self._until(place) > begin):
                continue
            if not under_way:
                return self._no_zeroes(reads[number], newest, place)
            newest = zeroings[heapq.heappop(under_way)[1]]
            place = end
        return None

    def _no_zeroes(self, read: Access, zeroing: Access | None, place: int) -> Contradiction:
        if zeroing is None:
            return Contradiction("zeroes were found before there were any", (read,))
        until = self._until(place)
        since = next(
            cluster for cluster in (*self._fixed, *self._loose) if cluster.ended == until and cluster.began >= place
        )
        why = f"zeroes were found, though {name_of(since.write.value)} had been there since they were written"
        return Contradiction(why, (zeroing, *since.accesses, read))

    def _until(self, place: int) -> int:
        """When zeroes that were written then are gone at last."""
        fixed, loose = bisect_left(self._starts, place), bisect_left(self._begins, place)
        return min(
            self._starts[fixed] if fixed < len(self._starts) else NEVER,
            self._first_ends[loose] if loose < len(self._loose) else NEVER,
        )

    # --- Fixed clusters ---

    def _around(self, moment: int) -> Cluster | None:
        """The fixed cluster in which a moment lies."""
        number = bisect_left(self._starts, moment) - 1
        return self._fixed[number] if number >= 0 and moment < self._fixed[number].began else None

    def _last_free(self, moment: int) -> int:
        around = self._around(moment)
        return moment if around is None else around.ended

    def _within_fixed(self, begin: int, end: int, what: str, accesses: tuple[Access, ...]) -> Contradiction | None:
        around = self._around(begin)
        if around is None or end > around.began:
            return None
        why = f"{what} must have been there while {name_of(around.write.value)} was there without a break"
        return Contradiction(why, around.accesses + accesses)
