"""What a key of the configuration file can hold: kinds of values, and the keys themselves.

Job: the words in which `keys` says what the file looks like; the reader has a method for each kind, and the
documentation takes from each what is expected.
Invariant: `expected` completes the sentence "found 'x', expected ...".
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stortrends_ha.config.values import Value, one_of

EMPTY = "{}"  # the default of an optional mapping: as if it were written without any key
EMPTY_LIST = "[]"


@dataclass(frozen=True, slots=True)
class NodeName:
    """The name of one of the cluster's nodes."""

    expected: str = "the name of a node"


@dataclass(frozen=True, slots=True)
class PerNode:
    """A value for each node: a mapping of node names to values."""

    value: "Value | Table"
    every_node: bool = True
    or_one_for_both: bool = False

    @property
    def expected(self) -> str:
        """As in "expected ..."."""
        nodes = "each node" if self.every_node else "any of the nodes"
        alternative = ", or one for both" if self.or_one_for_both else ""
        return f"for {nodes} {self.value.expected}{alternative}"


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping with the keys given here and no others."""

    keys: Mapping[str, "Key"]

    @property
    def expected(self) -> str:
        """As in "expected ..."."""
        return f"a mapping with the keys {', '.join(self.keys)}"


@dataclass(frozen=True, slots=True)
class Named:
    """A mapping of names, chosen by the user, to tables of one kind."""

    thing: str
    table: Table
    count_min: int = 1
    count_max: int | None = None

    @property
    def expected(self) -> str:
        """As in "expected ..."."""
        if self.count_min == self.count_max:
            return f"exactly {self.count_min} {self.thing}s by name"
        if self.count_max is not None:
            return f"{self.count_min} to {self.count_max} {self.thing}s by name"
        return f"at least {self.count_min} {self.thing} by name"


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list of values or tables of one kind."""

    item: Value | Table
    count_min: int
    count_max: int

    @property
    def expected(self) -> str:
        """As in "expected ..."."""
        count = f"{self.count_min} to {self.count_max}" if self.count_min else f"up to {self.count_max}"
        return f"a list of {count}, each {self.item.expected}"


@dataclass(frozen=True, slots=True)
class Options:
    """A mapping of names that we do not know to texts."""

    expected: str = "a mapping of options to their values"


@dataclass(frozen=True, slots=True)
class Choice:
    """A mapping whose key `kind` says which table has its other keys; `doc` is that of `kind`."""

    doc: str
    tables: Mapping[str, Table]

    @property
    def kind(self) -> "Key":
        """The key that is always there."""
        return Key(one_of(*self.tables), self.doc)

    @property
    def expected(self) -> str:
        """As in "expected ..."."""
        return f"a mapping with the key kind ({self.kind.kind.expected}) and those of that kind"

    def table(self, *kinds: str) -> Table:
        """All keys of some kinds, `kind` first."""
        keys = {"kind": self.kind}
        for kind in kinds:
            keys |= self.tables[kind].keys
        return Table(keys)


Kind = Value | NodeName | PerNode | Table | Named | ListOf | Options | Choice


@dataclass(frozen=True, slots=True)
class Key:
    """One key. `default` is written as in the file; None means that the key is required.

    A default that depends on other keys is what `derive` makes of those that stand before it in their table; it
    returns None when they could not be read.
    """

    kind: Kind
    doc: str
    default: str | None = None
    reason: str = ""
    unit: str = ""
    derive: Callable[[Mapping[str, Any]], Any] | None = None


def walk(table: Table, above: str = "") -> Iterator[tuple[str, Key]]:
    """Every key with its path, in order; what the user names is written as <thing>, a place in a list as []."""
    for name, key in table.keys.items():
        path = above + name
        yield path, key
        for below, keys in tables_below(key.kind):
            yield from walk(keys, path + below)


def tables_below(kind: Kind) -> Iterator[tuple[str, Table]]:
    """The tables in a value of this kind, each with what stands between its path and those of the table's keys."""
    match kind:
        case Table():
            yield ".", kind
        case Named():
            yield f".<{kind.thing}>.", kind.table
        case PerNode(Table() as table):
            yield ".<node>.", table
        case ListOf(Table() as table):
            yield "[].", table
        case Choice():
            yield ".", kind.table(*kind.tables)
