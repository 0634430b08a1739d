"""A history: what clients asked for and were answered, and what happened meanwhile. A file of JSON lines.

Times are nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share. An operation began when its request
was about to be sent, and ended when its answer had arrived. One without an answer has no end: what it is to change
may change at any later time, or never. An operation that was answered with an error is as one without an answer.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

# What a read found in a block: the value, or several of them if the block is torn.
Found = int | list[int]
ZEROES = 0
FOREIGN = -1  # what no client of this history wrote
_CLIENT_SHIFT = 32
CHANGES = ("write", "zero", "trim")


@dataclass(slots=True)
class Operation:
    """A request of a client; of a flush: `block` and `count` say nothing."""

    kind: str  # "read", "flush" or one of CHANGES
    client: int
    begin: int
    end: int | None = None
    block: int = 0
    count: int = 1
    value: int = ZEROES  # what a change puts into each of its blocks
    found: list[Found] = field(default_factory=list)  # what a read found, block by block
    fua: bool = False
    error: int = 0

    @property
    def answered(self) -> bool:
        return self.end is not None and not self.error

    @property
    def blocks(self) -> range:
        return range(self.block, self.block + self.count)


@dataclass(slots=True)
class Loss:
    """Nothing of the cluster ran from `begin` to `end`. What had only been cached may be gone, unless a copy kept its
    power. Requests that had been sent before are gone, too."""

    begin: int
    end: int
    cache_kept: bool = False


@dataclass(slots=True)
class Note:
    """What happened, for who reads a history."""

    text: str
    begin: int


Entry = Operation | Loss | Note
_KINDS: dict[str, type[Entry]] = {"operation": Operation, "loss": Loss, "note": Note}


@dataclass(slots=True)
class History:
    """The entries, sorted by kind and time."""

    operations: list[Operation]
    losses: list[Loss]
    notes: list[Note]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> "History":
        ordered = sorted(entries, key=lambda entry: entry.begin)
        return cls(
            [entry for entry in ordered if isinstance(entry, Operation)],
            [entry for entry in ordered if isinstance(entry, Loss)],
            [entry for entry in ordered if isinstance(entry, Note)],
        )


def unique_value(client: int, number: int) -> int:
    """What the client's write of this number, from 1 on, puts into its blocks."""
    return client << _CLIENT_SHIFT | number


def name_of(value: int) -> str:
    """A value in words."""
    if value in (ZEROES, FOREIGN):
        return "zeroes" if value == ZEROES else "foreign data"
    return f"{value >> _CLIENT_SHIFT}#{value & (1 << _CLIENT_SHIFT) - 1}"


def to_line(entry: Entry) -> str:
    """Without what is as by default."""
    (kind,) = (name for name, of in _KINDS.items() if isinstance(entry, of))
    defaults: dict[str, Any] = {one.name: [] if one.name == "found" else one.default for one in fields(entry)}
    return json.dumps(
        {"is": kind} | {name: value for name, value in asdict(entry).items() if value != defaults[name]},
        separators=(",", ":"),
    )


def from_line(line: str) -> Entry:
    content: dict[str, Any] = json.loads(line)
    return _KINDS[content.pop("is")](**content)


def load(path: Path) -> Iterator[Entry]:
    """The entries of a file."""
    with path.open() as file:
        yield from map(from_line, file)
