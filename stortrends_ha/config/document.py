"""A YAML file as a plain tree with line numbers, and the list of problems found in it.

Invariants: every scalar stays the text that was written, so a node may be called ``no`` or ``1`` without
quotes, and each key decides what its value means. Work and memory are bounded by the size of the file: it is
at most `FILE_BYTES_MAX` long and `DEPTH_MAX` deep, a list has at most `ITEMS_MAX` items, and anchors and
aliases are refused. What makes the rest unreadable (broken syntax, an alias) is reported alone; a key given
twice is noted and reading goes on.
Built from PyYAML's events instead of its loader, which would guess types, merge duplicate keys and recurse.
"""

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from stortrends_ha.errors import ConfigError

FILE_BYTES_MAX = 1024 * 1024
DEPTH_MAX = 16  # the deepest key of ours is at 6
ITEMS_MAX = 256  # the longest list of ours has 16
SHOWN_CHARACTERS_MAX = 80
NOTHING = ("", "~", "null", "Null", "NULL")


@dataclass(slots=True)
class Scalar:
    """A single value as it was written; None when nothing was written."""

    text: str | None


@dataclass(slots=True)
class Mapping:
    """Keys and their values."""

    entries: dict[str, "Tree"] = field(default_factory=dict)


@dataclass(slots=True)
class Sequence:
    """A list. The path of an item is the list's with its place, counted from 0, in brackets."""

    items: list["Tree"] = field(default_factory=list)


Tree = Scalar | Mapping | Sequence


@dataclass(slots=True)
class Problems:
    """Collects problems by the path of the key, and says them in the order of the file."""

    _found: list[tuple[int, str]] = field(default_factory=list)
    _lines: dict[str, int] = field(default_factory=dict)

    def locate(self, path: str, line: int) -> None:
        """Note the line on which a path stands."""
        self._lines.setdefault(path, line)

    def add(self, path: str, message: str) -> None:
        """Note a problem; a path that is not in the file is placed at its nearest parent's line."""
        line = self._line(path)
        where = f" (line {line})" if line else ""
        self._found.append((line, f"{path}: {message}{where}"))

    def raise_if_any(self) -> None:
        """Raise `ConfigError` with all that was noted."""
        if self._found:
            raise ConfigError([text for _, text in sorted(self._found, key=lambda found: found[0])])

    def _line(self, path: str) -> int:
        while path and path not in self._lines:
            path = path.rpartition(".")[0]
        return self._lines.get(path, 0)


def shown(text: str) -> str:
    """Foreign text, quoted, on one line and not too long."""
    return repr(text if len(text) <= SHOWN_CHARACTERS_MAX else text[:SHOWN_CHARACTERS_MAX] + "...")


def join(path: str, *keys: str) -> str:
    """The path of a key below `path`."""
    return ".".join(([path] if path else []) + [key if _is_plain(key) else shown(key) for key in keys])


def _is_plain(key: str) -> bool:
    return 0 < len(key) <= SHOWN_CHARACTERS_MAX and key.isprintable() and not set(key) & set(" '\":")


def read_text(path: Path) -> str:
    """The text of the file, or `ConfigError` with a sentence that names it."""
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError([f"{path}: the file cannot be read: {reason}"]) from error
    if len(content) > FILE_BYTES_MAX:
        raise ConfigError([f"{path}: the file is larger than 1 MiB, which no configuration needs"])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}: the file is not UTF-8 text (line {line})"]) from error


def parse(text: str, problems: Problems) -> Tree:
    """The tree; `ConfigError` with one problem when it cannot be read as YAML."""
    builder = _Builder(problems)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.take(event)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _unreadable(line, f"the character {chr(error.character)!r} is not allowed") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(filter(None, (error.context, error.problem)))
        raise _unreadable(mark.line + 1 if mark else 1, reason) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML lets through "\UFFFFFFFF"
        raise _unreadable(builder.line, str(error)) from error
    return builder.root


def _unreadable(line: int, reason: str) -> ConfigError:
    on_one_line = "".join(c if c.isprintable() else " " for c in reason)
    return ConfigError([f"line {line}: not readable as YAML: {on_one_line}"])


@dataclass(slots=True)
class _Open:
    """A mapping or list whose end has not been seen; `key` waits for its value."""

    tree: Mapping | Sequence
    path: str
    key: str | None = None
    key_line: int = 0


class _Builder:
    """Puts the tree together from the events, without recursion."""

    def __init__(self, problems: Problems) -> None:
        self.root: Tree = Scalar(None)
        self.line = 1
        self._problems = problems
        self._open: list[_Open] = []
        self._documents = 0

    def take(self, event: yaml.Event) -> None:
        self.line = event.start_mark.line + 1 if event.start_mark else self.line
        if isinstance(event, yaml.NodeEvent):
            self._refuse_indirection(event)
        if isinstance(event, yaml.ScalarEvent):
            is_nothing = event.style is None and event.value in NOTHING
            self._scalar(event.value, is_nothing)
        elif isinstance(event, yaml.MappingStartEvent):
            self._collection(Mapping())
        elif isinstance(event, yaml.SequenceStartEvent):
            self._collection(Sequence())
        elif isinstance(event, yaml.CollectionEndEvent):
            self._open.pop()
        elif isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise _unreadable(self.line, "a second document begins here, expected one only")

    def _refuse_indirection(self, event: yaml.NodeEvent) -> None:
        if event.anchor is not None:
            raise _unreadable(self.line, "anchors (&) and aliases (*) are not allowed, write the value out")
        if getattr(event, "tag", None) is not None:
            raise _unreadable(self.line, "tags (!) are not allowed, write the value alone")

    def _scalar(self, text: str, is_nothing: bool) -> None:
        parent = self._open[-1] if self._open else None
        if parent and isinstance(parent.tree, Mapping) and parent.key is None:
            parent.key, parent.key_line = text, self.line
        else:
            self._put(Scalar(None if is_nothing else text))

    def _collection(self, tree: Mapping | Sequence) -> None:
        path = self._put(tree)
        self._open.append(_Open(tree, path))
        if len(self._open) > DEPTH_MAX:
            raise _unreadable(self.line, f"more than {DEPTH_MAX} levels deep")

    def _put(self, tree: Tree) -> str:
        """Add a value to what is open; returns its path."""
        if not self._open:
            self.root = tree
            return ""
        parent = self._open[-1]
        if isinstance(parent.tree, Sequence):
            if len(parent.tree.items) == ITEMS_MAX:
                raise _unreadable(self.line, f"a list of more than {ITEMS_MAX} items")
            path = f"{parent.path}[{len(parent.tree.items)}]"
            parent.tree.items.append(tree)
            self._problems.locate(path, self.line)
            return path
        if parent.key is None:
            raise _unreadable(self.line, "a mapping or list as a key, expected a plain name")
        path = join(parent.path, parent.key)
        if parent.key in parent.tree.entries:
            self._problems.add(path, f"given again on line {parent.key_line}, expected once")
        else:
            parent.tree.entries[parent.key] = tree
            self._problems.locate(path, parent.key_line)
        parent.key = None
        return path
