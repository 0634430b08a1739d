"""What a node durably knows of one group's replica: a small JSON file, replaced atomically.

    lineage        the identity of the data; empty until the replica first led, or joined its peer
    boot_id        the host's boot since which writes may be cached only; empty after an orderly end, which flushes.
                   Another one at a start means that the cache is lost
    mounts         of each volume the mount that it was on then, likewise (``storage.mounted``)
    lost_cache     so it was found at a start, and no sync has mended it since
    needs_sync     a sync of this replica has begun and not ended
    filling        the name of a copying of everything to this replica that has begun and not ended; else empty
    fills          the name of the one from here to the peer of which the dirty map has what is left; else empty
    given_up_for   the lineage of the owner's data for which the operator has given this replica up: what is on it may
                   be overwritten by a copying of everything from there, by nothing else; empty when that has begun
    lineages       when this replica got which lineage, and how: the newest last, for people
    settled_epoch  the newest epoch at which this node owned alone and all that was cached before had become stable:
                   since then it wrote through, so while the record has it alone at that epoch a lost cache lost nothing
    verified       of each volume when a verify on this node came to its end last, in seconds since 1970
    backings       of each volume the identity of the file that holds this data, where files have one

The group's record is not in it: the supervisor keeps that, and tells it with every command.

``save`` returns when the file is on stable storage; the process may die anywhere in it and the next start
finds the old or the new version whole.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from stortrends_ha.durable import sync_directory
from stortrends_ha.errors import StorageError
from stortrends_ha.replication.session import typed

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """See the module."""

    lineage: str = ""
    boot_id: str = ""
    lost_cache: bool = False
    needs_sync: bool = False
    filling: str = ""
    fills: str = ""
    given_up_for: str = ""
    lineages: tuple[str, ...] = ()
    settled_epoch: int = 0
    backings: Mapping[str, str] = field(default_factory=dict)
    mounts: Mapping[str, str] = field(default_factory=dict)
    verified: Mapping[str, float] = field(default_factory=dict)


class StateFile:
    """The state of one group's replica on this node, and the file that holds it."""

    def __init__(self, path: Path, group: str) -> None:
        self.path = path
        self._group = group
        self._boot_id = BOOT_ID.read_text().strip()
        self._saved = False  # since the process started
        self.state = self._load()
        if self.state.boot_id not in ("", self._boot_id):
            self.update(lost_cache=True, boot_id=self._boot_id)

    def update(self, **changes: Any) -> None:
        """Change fields, durably. Raises StorageError."""
        new = replace(self.state, **changes)
        if new != self.state:
            self._save(new)
            self.state = new

    def begin(self, **changes: Any) -> None:
        """As ``update``; and from now on there may be writes that are only cached: before the first of them."""
        self.update(boot_id=self._boot_id, **changes)

    def _load(self) -> ReplicaState:
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return ReplicaState()
        except (OSError, UnicodeDecodeError) as e:
            raise StorageError(f"group {self._group}: cannot read its state {self.path}: {e}") from None
        try:
            value = json.loads(text)
            if value.pop("group") != self._group:
                raise ValueError("it is of another group")
            if "record" in value:
                raise StorageError(
                    f"group {self._group}: its state {self.path} was written by a version that kept the record in it: "
                    'stop both nodes, take out "record" and put in "settled_epoch": 0 on both; or, if the data is not '
                    "needed, remove the file and replace the backing files by empty ones"
                )
            return _decode(value)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise StorageError(
                f"group {self._group}: its state {self.path} is damaged ({e}): restore the file; without it, "
                "this replica can only be made blank and synced anew"
            ) from None

    def _save(self, state: ReplicaState) -> None:
        text = json.dumps({"group": self._group, **asdict(state)}, indent=1) + "\n"
        temporary = self.path.with_suffix(".new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            sync_directory(self.path.parent)
            if not self._saved:  # it may be the first file in a new directory
                sync_directory(self.path.parent.parent)
            self._saved = True
        except OSError as e:
            raise StorageError(f"group {self._group}: cannot write its state {self.path}: {e.strerror}") from None


def _decode(value: dict[str, Any]) -> ReplicaState:
    """Raises LookupError, TypeError if the file does not say what it should."""
    return ReplicaState(
        lineage=typed(value["lineage"], str),
        boot_id=typed(value["boot_id"], str),
        settled_epoch=typed(value["settled_epoch"], int),
        lineages=tuple(typed(line, str) for line in value.get("lineages", [])),
        backings=_strings(value.get("backings", {})),
        mounts=_strings(value.get("mounts", {})),
        verified={str(key): typed(at, float) for key, at in value.get("verified", {}).items()},
        **{key: typed(value[key], bool) for key in ("lost_cache", "needs_sync")},
        **{key: typed(value.get(key, ""), str) for key in ("filling", "fills", "given_up_for")},
    )


def _strings(value: Any) -> dict[str, str]:
    return {str(key): typed(one, str) for key, one in value.items()}
