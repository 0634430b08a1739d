"""What a node durably knows of one group's replica: a small JSON file, replaced atomically.

    record       the newest record this node has seen; written before it is acted on
    lineage      the identity of the data; empty until the replica first joined its peer
    open         a session is or was open; on the owner: there may be changes that were not answered
    boot_id      the host's boot since which writes may be cached only; empty after an orderly stop, which flushes.
                 Another one at a start means that the cache is lost
    lost_cache   so it was found at a start, and no sync has mended it since
    needs_sync   a full sync of this replica has begun and not ended

``save`` returns when the file is on stable storage; the process may die anywhere in it and the next start
finds the old or the new version whole.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stortrends_ha.errors import StorageError
from stortrends_ha.replication.session import Record, typed

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """See the module."""

    record: Record
    lineage: str = ""
    open: bool = False
    boot_id: str = ""
    lost_cache: bool = False
    needs_sync: bool = False


class StateFile:
    """The state of one group's replica on this node, and the file that holds it."""

    def __init__(self, path: Path, group: str, initial: Record) -> None:
        self._path = path
        self._group = group
        self._boot_id = BOOT_ID.read_text().strip()
        self.state = self._load(initial)
        self.was_open = self.state.open
        if self.state.boot_id not in ("", self._boot_id):
            self.update(lost_cache=True, boot_id=self._boot_id)

    def update(self, **changes: Any) -> None:
        """Change fields, durably. Raises StorageError."""
        if changes.get("open"):
            changes["boot_id"] = self._boot_id
        new = replace(self.state, **changes)
        if new != self.state:
            self._save(new)
            self.state = new

    def _load(self, initial: Record) -> ReplicaState:
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return ReplicaState(initial)
        except (OSError, UnicodeDecodeError) as e:
            raise StorageError(f"group {self._group}: cannot read its state {self._path}: {e}") from None
        try:
            value = json.loads(text)
            if value.pop("group") != self._group:
                raise ValueError("it is of another group")
            return _decode(value)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise StorageError(
                f"group {self._group}: its state {self._path} is damaged ({e}): restore the file; without it, "
                "this replica can only be made blank and synced anew"
            ) from None

    def _save(self, state: ReplicaState) -> None:
        text = json.dumps({"group": self._group, **asdict(state)}, indent=1) + "\n"
        temporary = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
            _sync_directory(self._path.parent)
            _sync_directory(self._path.parent.parent)  # it may be the first file in a new directory
        except OSError as e:
            raise StorageError(f"group {self._group}: cannot write its state {self._path}: {e.strerror}") from None


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _decode(value: dict[str, Any]) -> ReplicaState:
    """Raises LookupError, TypeError if the file does not say what it should."""
    record = value["record"]
    return ReplicaState(
        Record(
            typed(record["epoch"], int),
            typed(record["owner"], str),
            tuple(typed(name, str) for name in typed(record["in_sync"], list)),
        ),
        lineage=typed(value["lineage"], str),
        boot_id=typed(value["boot_id"], str),
        **{key: typed(value[key], bool) for key in ("open", "lost_cache", "needs_sync")},
    )
