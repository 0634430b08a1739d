"""The same verdict by trying all orders of all operations on one block: slow, and hard to get wrong."""

from collections.abc import Iterator, Sequence

from .operations import CHANGES, History, Loss, Operation

# What a block holds of which nothing is known.
_UNKNOWN = -2


def is_possible(history: History) -> bool:
    """Whether there is an order that explains all reads."""
    rest = [one for one in history.operations if one.kind in CHANGES or (one.kind == "read" and one.answered)]
    flushes = [one for one in history.operations if one.kind == "flush" and one.answered]
    held = {_UNKNOWN}
    for loss in history.losses:
        life, rest = [one for one in rest if one.begin < loss.begin], [one for one in rest if one.begin >= loss.begin]
        held = {after for before in held for after in _came_back(life, before, loss, flushes)}
    return any(True for before in held for _ in _orders(rest, before))


def _came_back(life: list[Operation], before: int, loss: Loss, flushes: list[Operation]) -> set[int]:
    """With what a block may come back after a loss."""
    found = set()
    stable = {id(one) for one in life if _is_stable(one, loss, flushes)}
    for order in _orders(life, before):
        held = [before]
        for one in order:
            held.append(held[-1] if one.kind == "read" else one.value)
        needed = max((number for number, one in enumerate(order, 1) if id(one) in stable), default=0)
        found.update(held[needed:])
    return found


def _is_stable(change: Operation, loss: Loss, flushes: list[Operation]) -> bool:
    if change.kind not in CHANGES or change.end is None or change.error:
        return False
    flushed = any(change.end < flush.begin < loss.begin for flush in flushes)
    return change.fua or flushed or loss.cache_kept


def _orders(operations: Sequence[Operation], held: int) -> Iterator[list[Operation]]:
    """All orders that explain all reads; a change without an answer may be missing."""
    if all(not one.answered for one in operations):
        yield []
    for number, one in enumerate(operations):
        if any(other.answered and (other.end or 0) < one.begin for other in operations):
            continue  # that one comes first
        if one.kind == "read" and one.found != [held]:
            continue
        for rest in _orders(
            [*operations[:number], *operations[number + 1 :]], held if one.kind == "read" else one.value
        ):
            yield [one, *rest]
