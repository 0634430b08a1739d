"""Checks a history: each block a linearizable register, no torn blocks, nothing lost that had to be kept.

    python -m tests.history.check FILE...

A request of several blocks counts for each of them alone. The files are parts of one history. It exits with 1 if the
history cannot be, and says for each block why, with the operations that contradict each other.
"""

import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from .durability import Life, check_lives
from .operations import CHANGES, FOREIGN, Entry, History, Loss, Note, Operation, load, name_of
from .register import NEVER, Access, Contradiction, began_at, ended_at

_NS = 10**9


def check(history: History) -> list[str]:
    """What cannot be, in words; empty if all can."""
    of_block: dict[int, list[Access]] = {}
    problems = []
    for operation in history.operations:
        if operation.error:
            problems.append(_in_words(history, Contradiction(f"error {operation.error}", (_access(operation),))))
        for block, access in _accesses(operation):
            if isinstance(access, Contradiction):
                problems.append(_in_words(history, access, block))
            else:
                of_block.setdefault(block, []).append(access)
    stable = _Stable(history.operations)
    for block, accesses in sorted(of_block.items()):
        if found := check_lives(list(_lives(accesses, history.losses, stable))):
            problems.append(_in_words(history, found, block))
    return problems


def _access(operation: Operation, value: int = 0) -> Access:
    end = ended_at(operation.end) if operation.answered else NEVER
    return Access(operation, operation.kind == "read", value, began_at(operation.begin), end)


def _accesses(operation: Operation) -> Iterator[tuple[int, Access | Contradiction]]:
    """(block, what is done to it)."""
    if operation.kind in CHANGES:
        for block in operation.blocks:
            yield block, _access(operation, operation.value)
    elif operation.kind == "read" and operation.answered:
        for block, found in zip(operation.blocks, operation.found, strict=True):
            values = found if isinstance(found, list) else [found]
            access = _access(operation, values[0])
            if len(values) > 1:
                yield block, Contradiction(f"torn: {', '.join(map(name_of, values))} in one block", (access,))
            elif values == [FOREIGN]:
                yield block, Contradiction("foreign data: no client of this history wrote it", (access,))
            else:
                yield block, access


class _Stable:
    """When the changes became stable."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._flushes = sorted(began_at(one.begin) for one in operations if one.kind == "flush" and one.answered)

    def at(self, access: Access) -> int:
        """When it is known to be so: the beginning of what made it so."""
        if access.end < NEVER and access.operation is not None and access.operation.fua:
            return access.begin
        flush = bisect_right(self._flushes, access.end)
        return self._flushes[flush] if flush < len(self._flushes) else NEVER


def _lives(accesses: list[Access], losses: list[Loss], stable: _Stable) -> Iterator[Life]:
    """What began before a loss took place before it, or never."""
    begins = [access.begin for access in accesses]
    starts = [0, *(bisect_left(begins, began_at(loss.begin)) for loss in losses), len(begins)]
    for number, loss in enumerate(losses):
        end = ended_at(loss.begin)
        lived = [
            Access(one.operation, one.reads, one.value, one.begin, min(one.end, end) if one.end < NEVER else NEVER)
            for one in accesses[starts[number] : starts[number + 1]]
        ]
        kept = frozenset(
            one
            for one in lived
            if not one.reads and one.end < NEVER and (loss.cache_kept or stable.at(one) < began_at(loss.begin))
        )
        yield Life(_beginning(losses, number), end, lived, kept)
    yield Life(_beginning(losses, len(losses)), NEVER, accesses[starts[-2] :])


def _beginning(losses: list[Loss], number: int) -> int:
    return began_at(losses[number - 1].begin) if number else 0


# --- In words ---------------------------------------------------------------------------------------------------------


def _begin(entry: Entry) -> int:
    return entry.begin


def _in_words(history: History, found: Contradiction, block: int | None = None) -> str:
    """The contradiction, with the operations and what happened in the meantime, in the order of time."""
    operations = {id(one.operation): one.operation for one in found.accesses if one.operation is not None}.values()
    begin = min(map(_begin, operations), default=0)
    end = max((one.end or one.begin for one in operations), default=0)
    events: list[Entry] = [*history.notes, *history.losses]
    meanwhile = [one for one in events if begin <= one.begin <= end]
    start = min(map(_begin, [*history.operations, *events]))
    lines = [_line(one, start) for one in sorted([*operations, *meanwhile], key=_begin)]
    where = "" if block is None else f"block {block}: "
    return "\n".join([f"{where}{found.why}", *lines])


def _line(entry: Entry, start: int) -> str:
    begin = f"{(entry.begin - start) / _NS:11.6f}"
    if isinstance(entry, Note):
        return f"  {begin} {'':11}  {entry.text}"
    end = "         -" if entry.end is None else f"{(entry.end - start) / _NS:.6f}"
    if isinstance(entry, Loss):
        return f"  {begin} {end:>11}  power is lost{', but one copy kept it' if entry.cache_kept else ''}"
    blocks = f"{entry.block}" if entry.count == 1 else f"{entry.block}-{entry.blocks[-1]}"
    what = {"write": f" = {name_of(entry.value)}", "read": f" found {_found(entry)}"}.get(entry.kind, "")
    outcome = ", no answer" if entry.end is None else f", error {entry.error}" if entry.error else ""
    return (
        f"  {begin} {end:>11}  client {entry.client}: {entry.kind} {blocks}{what}{' FUA' if entry.fua else ''}{outcome}"
    )


def _found(read: Operation) -> str:
    values = (one if isinstance(one, list) else [one] for one in read.found)
    return ", ".join("/".join(map(name_of, of_block)) for of_block in values)


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    history = History.of(chain.from_iterable(load(Path(name)) for name in sys.argv[1:]))
    problems = check(history)
    kinds = Counter(operation.kind for operation in history.operations)
    unanswered = sum(not operation.answered for operation in history.operations)
    print(f"{dict(kinds)}, {unanswered} of them without an answer, {len(history.losses)} losses of power")
    print("\n\n".join(problems) if problems else "linearizable, and nothing was lost")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
