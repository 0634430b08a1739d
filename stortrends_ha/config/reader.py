"""Reads the tree of the file by the table of keys.

Invariants: every mistake is noted and reading goes on, so that one run shows them all. What could not be read
is absent from the result, and its absence has been noted as a problem; what has a default is present.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from stortrends_ha.config.document import Mapping, Problems, Scalar, Sequence, Tree, join, shown
from stortrends_ha.config.keys import FILE, NODES_CHECKED_MAX
from stortrends_ha.config.kinds import (
    EMPTY,
    EMPTY_LIST,
    Choice,
    Key,
    Kind,
    ListOf,
    Named,
    NodeName,
    Options,
    PerNode,
    Table,
)
from stortrends_ha.config.values import NAME, OPTION_NAME, TEXT, Value

NOTHING_READ: None = None  # no kind of value reads as None


def read(tree: Tree, base: Path, problems: Problems) -> dict[str, Any]:
    """The file's values, nested as in the file; relative paths are taken from `base`."""
    if not isinstance(tree, Mapping) and tree != Scalar(None):
        problems.add("the file", f"found {_found(tree)}, expected {FILE.expected}")
        return {}
    return _Reader(tree, base, problems).table(FILE, tree, "")


def _found(tree: Tree) -> str:
    match tree:
        case Mapping():
            return "a mapping"
        case Sequence():
            return "a list"
        case Scalar(text):
            return "nothing" if text is None else shown(text)


class _Reader:
    def __init__(self, tree: Tree, base: Path, problems: Problems) -> None:
        nodes = tree.entries.get("nodes") if isinstance(tree, Mapping) else None
        names = list(nodes.entries) if isinstance(nodes, Mapping) else []
        self._nodes = names if len(names) <= NODES_CHECKED_MAX else []
        self._base = base
        self._problems = problems

    def table(self, kind: Table, tree: Tree, path: str) -> dict[str, Any]:
        entries = self._entries(kind, tree, path)
        if entries is None:
            return {}
        for name in entries:
            if name not in kind.keys:
                self._problems.add(join(path, name), _unknown_key(name, kind))
        values: dict[str, Any] = {}
        for name, key in kind.keys.items():
            value = self._key(key, entries.get(name), join(path, name), values)
            if value is not NOTHING_READ:
                values[name] = value
        return values

    def _key(self, key: Key, tree: Tree | None, path: str, before: dict[str, Any]) -> Any:
        """The value of a key; `before` has those that stand before it in its table."""
        if tree is None or tree == Scalar(None):
            if key.derive:
                return key.derive(before)
            if key.default is None:
                self._problems.add(path, f"missing, expected {key.kind.expected}")
                return NOTHING_READ
            tree = _default(key.default)
        return self._read(key.kind, tree, path)

    def _read(self, kind: Kind, tree: Tree, path: str) -> Any:
        match kind:
            case Value():
                return self._value(kind, tree, path)
            case NodeName():
                return self._node_name(tree, path)
            case PerNode():
                return self._per_node(kind, tree, path)
            case Table():
                return self.table(kind, tree, path)
            case Named():
                return self._named(kind, tree, path)
            case ListOf():
                return self._list(kind, tree, path)
            case Options():
                return self._options(kind, tree, path)
            case Choice():
                return self._choice(kind, tree, path)

    def _value(self, kind: Value, tree: Tree, path: str) -> Any:
        if isinstance(tree, Scalar) and tree.text is not None:
            try:
                value = kind.parse(tree.text)
            except ValueError:
                pass
            else:
                return self._base / value if isinstance(value, Path) else value
        self._problems.add(path, f"found {_found(tree)}, expected {kind.expected}")
        return NOTHING_READ

    def _node_name(self, tree: Tree, path: str) -> str | None:
        if isinstance(tree, Scalar) and tree.text is not None and self._may_be_node(tree.text):
            return tree.text
        self._problems.add(path, f"found {_found(tree)}, expected {self._any_node()}")
        return NOTHING_READ

    def _may_be_node(self, name: str) -> bool:
        """Whether there is such a node. While none is known, that is the mistake, and is noted."""
        return not self._nodes or name in self._nodes

    def _any_node(self) -> str:
        return f"one of the nodes {', '.join(map(shown, self._nodes))}".rstrip()

    def _per_node(self, kind: PerNode, tree: Tree, path: str) -> dict[str, Any]:
        if kind.or_one_for_both and isinstance(tree, Scalar):
            value = self._read(kind.value, tree, path)
            return {} if value is NOTHING_READ else dict.fromkeys(self._nodes, value)
        entries = self._entries(kind, tree, path)
        if entries is None:
            return {}
        self._check_node_names(kind, entries, path)
        values = {name: self._read(kind.value, of, join(path, name)) for name, of in entries.items()}
        return {name: value for name, value in values.items() if value is not NOTHING_READ}

    def _check_node_names(self, kind: PerNode, entries: dict[str, Tree], path: str) -> None:
        for name in entries:
            if not self._may_be_node(name):
                self._problems.add(join(path, name), f"found an unknown node, expected {self._any_node()}")
        for node in self._nodes:
            if kind.every_node and node not in entries:
                self._problems.add(join(path, node), f"missing, expected {kind.value.expected}")

    def _list(self, kind: ListOf, tree: Tree, path: str) -> tuple[Any, ...] | None:
        """The items; nothing if one could not be read, so that no place changes."""
        if not isinstance(tree, Sequence):
            self._problems.add(path, f"found {_found(tree)}, expected {kind.expected}")
            return NOTHING_READ
        count = len(tree.items)
        if not kind.count_min <= count <= kind.count_max:
            self._problems.add(path, f"found {count}, expected {kind.expected}")
        values = [self._read(kind.item, of, f"{path}[{place}]") for place, of in enumerate(tree.items)]
        return NOTHING_READ if NOTHING_READ in values else tuple(values)

    def _options(self, kind: Options, tree: Tree, path: str) -> dict[str, str]:
        values = {}
        for name, of in (self._entries(kind, tree, path) or {}).items():
            try:
                OPTION_NAME.parse(name)
            except ValueError:
                message = f"found {shown(name)} as an option's name, expected {OPTION_NAME.expected}"
                self._problems.add(join(path, name), message)
            if (value := self._option(of, join(path, name))) is not NOTHING_READ:
                values[name] = value
        return values

    def _option(self, tree: Tree, path: str) -> str | None:
        """The text of an option, which may be a password, so that it is never shown."""
        if isinstance(tree, Scalar) and tree.text is not None:
            try:
                return str(TEXT.parse(tree.text))
            except ValueError:
                self._problems.add(path, f"found a text, expected {TEXT.expected}")
                return NOTHING_READ
        self._problems.add(path, f"found {_found(tree)}, expected {TEXT.expected}")
        return NOTHING_READ

    def _choice(self, kind: Choice, tree: Tree, path: str) -> dict[str, Any]:
        entries = self._entries(kind, tree, path)
        if entries is None:
            return {}
        chosen = self._key(kind.kind, entries.get("kind"), join(path, "kind"), {})
        return {} if chosen is NOTHING_READ else self.table(kind.table(chosen), tree, path)

    def _named(self, kind: Named, tree: Tree, path: str) -> dict[str, Any]:
        entries = self._entries(kind, tree, path)
        if entries is None:
            return {}
        count = len(entries)
        if count < kind.count_min or (kind.count_max is not None and count > kind.count_max):
            self._problems.add(path, f"found {count}, expected {kind.expected}")
        values = {}
        for name, of in entries.items():
            self._check_name(kind, name, join(path, name))
            values[name] = self.table(kind.table, of, join(path, name))
        return values

    def _check_name(self, kind: Named, name: str, path: str) -> None:
        try:
            NAME.parse(name)
        except ValueError:
            message = f"found {shown(name)} as the {kind.thing}'s name, expected {NAME.expected}"
            self._problems.add(path, message)

    def _entries(self, kind: Kind, tree: Tree, path: str) -> dict[str, Tree] | None:
        """The entries of a mapping; empty when nothing is written; None, and noted, when it is none."""
        if isinstance(tree, Mapping):
            return tree.entries
        if tree == Scalar(None):
            return {}
        self._problems.add(path, f"found {_found(tree)}, expected {kind.expected}")
        return None


def _default(text: str) -> Tree:
    empty: dict[str, Tree] = {EMPTY: Mapping(), EMPTY_LIST: Sequence()}
    return empty.get(text) or Scalar(text.strip('"'))


def _unknown_key(name: str, table: Table) -> str:
    near = get_close_matches(name[:64], table.keys, n=1, cutoff=0.5)
    if near:
        return f"found an unknown key, expected {shown(near[0])} (the nearest known key)"
    return f"found an unknown key, expected one of {', '.join(table.keys)}"
