"""What clients were told, checked as it happens: every block is a linearizable register, also of a longer request.

Each write has a value of its own. The operations on one value (the write and the reads that returned it) are a
*cluster*. Some of them ended first, at ``ended``; some began last, at ``began``. If ``ended < began`` the block must
have held that value all that time; else it must have held it at some moment between the two. So (Gibbons and Korach,
"Testing Shared Memories", 1997) a history is linearizable exactly if no two of the former overlap, and none of the
latter lies within one of the former. A write that was never answered takes part only once somebody has read it.

Zeroes look all the same: each zeroing has a value below zero here, and a read of zeroes must fit to one of them, or to
those that were there at the beginning (0). Only if it fits to a single one does it become a part of that cluster.

When both nodes have lost their caches, or after the operator's override, a block may go back (``go_back``), in the
former case not behind what was stable.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

NEVER = 1 << 62


class Violation(AssertionError):
    """A rule was broken."""


@dataclass(slots=True)
class Operation:
    """What a client asked for."""

    kind: str  # "read", "write", "trim", "zero" or "flush"
    block: int  # counted over all volumes; of a flush: the first of its volume, as ``length`` is that of the volume
    value: int  # what a change writes
    began: int
    length: int = 1  # in blocks
    durable: bool = False  # a change that is stable when it is answered
    covers: list[tuple[int, int]] = field(default_factory=list)  # flush: (block, value) answered before it began
    done: bool = False

    @property
    def blocks(self) -> range:
        """Those that it is about."""
        return range(self.block, self.block + self.length)

    def __str__(self) -> str:
        where = "+".join(map(str, self.blocks))
        durable = " durably" if self.durable else ""
        return f"{self.kind} {where}" + (f"={self.value}{durable}" if self.value else "")


@dataclass(slots=True)
class _Cluster:
    value: int
    wrote: int  # when the write began
    ended: int = NEVER
    began: int = 0
    touched: int = 0  # when the newest of its operations was answered


class _Block:
    def __init__(self, value: int, now: int) -> None:
        self.clusters = {value: _Cluster(value, -1, now, now, now)}
        self.floor: dict[int, int] = {}  # value that is stable -> bit mask of nodes on which it certainly is
        self.gone: set[int] = set()  # values that were answered or read, and are lost


class History:
    """All that was asked and answered."""

    def __init__(self, blocks: int) -> None:
        self._time = 0
        self._value = 0
        self._blocks = [_Block(0, 0) for _ in range(blocks)]
        self._unflushed: dict[tuple[int, int], None] = {}
        self.answered = 0
        self.went_back = 0

    def _tick(self) -> int:
        self._time += 1
        return self._time

    def begin(self, kind: str, block: int, length: int = 1, *, durable: bool = False) -> Operation:
        """A client asks."""
        value = 0
        if kind in ("write", "trim", "zero"):
            self._value += 1
            value = self._value if kind == "write" else -self._value
        operation = Operation(kind, block, value, self._tick(), length, durable)
        if value:
            for number in operation.blocks:
                self._blocks[number].clusters[value] = _Cluster(value, operation.began)
        elif kind == "flush":
            operation.covers = [one for one in self._unflushed if one[0] in operation.blocks]
        return operation

    def end(self, operation: Operation, values: list[int], stable_on: int) -> None:
        """A client is answered; ``values``: what a read has found. ``stable_on``: a mask of the nodes on which a write
        is stable at this time."""
        assert not operation.done
        operation.done = True
        self.answered += 1
        now = self._tick()
        if operation.kind == "flush":
            for block, flushed in operation.covers:
                self._unflushed.pop((block, flushed), None)
                self._stable(block, flushed, 3)
        elif operation.kind == "read":
            for block, value in zip(operation.blocks, values, strict=True):
                self._was_read(operation, block, value, now)
        else:
            for block in operation.blocks:
                self._wrote(operation, block, now, stable_on)

    def _wrote(self, operation: Operation, block: int, now: int, stable_on: int) -> None:
        self._took_place(operation, self._blocks[block].clusters[operation.value], block, now)
        if not operation.durable:
            self._unflushed[block, operation.value] = None
        self._stable(block, operation.value, 3 if operation.durable else stable_on)

    def _stable(self, block: int, value: int, nodes: int) -> None:
        floor = self._blocks[block].floor
        if nodes and value in self._blocks[block].clusters:
            floor[value] = floor.get(value, 0) | nodes

    def _was_read(self, operation: Operation, number: int, value: int, now: int) -> None:
        block = self._blocks[number]
        if value:
            cluster = block.clusters.get(value)
            if cluster is None:
                what = "was lost before" if value in block.gone else "was never written there"
                raise Violation(f"{operation} returned {value}, which {what}")
            self._took_place(operation, cluster, number, now)
            return
        fit = self._zeroings_that_fit(operation, block, now)
        first = next(fit, None)
        if first is None:
            raise Violation(f"{operation} was answered with zeroes, which does not fit to block {number}")
        if next(fit, None) is None:
            self._took_place(operation, first, number, now)

    @staticmethod
    def _zeroings_that_fit(operation: Operation, block: _Block, now: int) -> Iterator[_Cluster]:
        for zeroes in reversed(block.clusters.values()):
            if zeroes.value <= 0 and not _clashing(block, _later(zeroes, operation, now)):
                yield zeroes

    def _took_place(self, operation: Operation, cluster: _Cluster, number: int, now: int) -> None:
        block = self._blocks[number]
        del block.clusters[cluster.value]  # they are kept in the order in which they were touched
        cluster = _later(cluster, operation, now)
        if (other := _clashing(block, cluster)) is not None:
            raise Violation(
                f"{operation} was answered with {cluster.value}, which does not fit: block {number} cannot have "
                f"held {cluster.value} {_span(cluster)} and {other.value} {_span(other)}"
            )
        block.clusters[cluster.value] = cluster

    # --- Losses that the rules allow ------------------------------------------------------------------

    def go_back(self, contents: list[int], node: int, *, forced: bool, first: int = 0) -> None:
        """A copy without some of what was answered counts from now on. ``node``: its bit. ``contents``: from block
        ``first`` on."""
        now = self._tick()
        self.went_back += 1
        for number, value in enumerate(contents, first):
            block = self._blocks[number]
            kept = [one for one in block.clusters.values() if one.value == value or one.value < 0 == value]
            # What was only cached when a copy was made to count may be lost from it, too, if nothing was stable since.
            returned = value in block.gone and (forced or not block.floor)
            if not kept and not returned:
                what = "was lost before" if value in block.gone else "was never written there"
                raise Violation(f"block {number} came back as {value}, which {what}")
            if kept and not forced and not any(self._above_floor(block, cluster, node) for cluster in kept):
                raise Violation(f"block {number} went back to {value}, though {list(block.floor)} were stable")
            self._blocks[number] = self._restarted(block, value, now)
        for one in [one for one in self._unflushed if one[0] - first in range(len(contents))]:
            del self._unflushed[one]

    @staticmethod
    def _above_floor(block: _Block, kept: _Cluster, node: int) -> bool:
        return not any(
            nodes & node and stable != kept.value and kept.ended < block.clusters[stable].began
            for stable, nodes in block.floor.items()
        )

    @staticmethod
    def _restarted(block: _Block, value: int, now: int) -> _Block:
        new = _Block(value, now)
        new.gone = block.gone - {value}
        for cluster in block.clusters.values():
            if cluster.value != value:
                if cluster.ended < NEVER:
                    new.gone.add(cluster.value)
                else:
                    new.clusters[cluster.value] = cluster
        return new


def _later(cluster: _Cluster, operation: Operation, now: int) -> _Cluster:
    """With this operation on its value, which has been answered now."""
    began = max(cluster.began, operation.began, cluster.wrote)
    return _Cluster(cluster.value, cluster.wrote, min(cluster.ended, now), began, now)


def _clashing(block: _Block, cluster: _Cluster) -> _Cluster | None:
    """Another one of the block that cannot be, if this is."""
    for other in reversed(block.clusters.values()):
        if other.touched <= cluster.ended and other.ended < NEVER:
            break
        alike = other.value == cluster.value or (other.value <= 0 and cluster.value <= 0)
        if not alike and other.ended < NEVER and _clash(cluster, other):
            return other
    return None


def _clash(one: _Cluster, other: _Cluster) -> bool:
    """Each must have been there before the other was."""
    return one.ended < other.began and other.ended < one.began


def _span(cluster: _Cluster) -> str:
    if cluster.ended < cluster.began:
        return f"all the time from {cluster.ended} to {cluster.began}"
    return f"at some time from {cluster.began} to {cluster.ended}"
