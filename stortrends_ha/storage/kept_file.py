"""What a replica had that was given up: a file in the node's state directory, kept until the operator drops it.

    state_dir/kept/GROUP-DATE.blocks

- ``STORHAK1``, the length of the header (4 bytes), the header: a JSON object with ``cluster``, ``group``, ``node``,
  ``lineage`` (of the data that is in here), ``kept_lineage`` (of the data that took its place), ``time`` and
  ``volumes`` (names and sizes in bytes).
- Ranges: kind (1 data, 2 zeroes), number of the volume (2), offset (8), length (4), SHA-256 of the data (32), and the
  data unless it is zeroes. Numbers are big-endian.
- The end: kind 0, and as offset the number of ranges.

Rule 10: a file that has its name is complete and durable; until then it is ``.part``, and removed by the next one. One
that is damaged is said to be so, range by range.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from struct import Struct
from typing import IO, Any, NamedTuple

from stortrends_ha.durable import sync_directory
from stortrends_ha.errors import StorageError
from stortrends_ha.limits import COMPARE_BLOCK_BYTES, COMPARE_GRAIN_BYTES
from stortrends_ha.replication.block_map import BlockMap
from stortrends_ha.replication.interfaces import Store

_MAGIC = b"STORHAK1"
_LENGTH = Struct(">I")
_RANGE = Struct(">BHQI32s")
_END, _DATA, _ZERO = 0, 1, 2
_HEADER_BYTES_MAX = 1 << 20
_PER_RANGE = COMPARE_BLOCK_BYTES // COMPARE_GRAIN_BYTES


class Kept(NamedTuple):
    """A range; ``data`` is None for zeroes."""

    volume: int
    offset: int
    length: int
    data: bytes | None


class KeptFiles:
    """Those of one group on one node."""

    def __init__(self, state_dir: Path, group: str) -> None:
        self.directory = state_dir / "kept"
        self._group = group

    def write(self, header: dict[str, Any], volumes: Sequence[tuple[Store, BlockMap]]) -> Path:
        """Keep these blocks of each volume: durable when it returns. Waits for the disk. Raises StorageError."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for rest in self.directory.glob(f"{self._group}-*.part"):
                rest.unlink()
            self._need(sum(map(_size, volumes)))
            path = self._new_path()
            temporary = path.with_suffix(".part")
            try:
                with temporary.open("xb") as file:
                    _write(file, {**header, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, volumes)
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            temporary.rename(path)
            sync_directory(self.directory)
            sync_directory(self.directory.parent)
        except OSError as e:
            raise StorageError(f"what differs cannot be kept in {self.directory}: {e.strerror}") from None
        return path

    def _need(self, size_bytes: int) -> None:
        found = os.statvfs(self.directory)
        free_bytes = found.f_bavail * found.f_frsize
        if free_bytes < size_bytes:
            mib = 1 << 20
            raise StorageError(
                f"what differs needs {size_bytes / mib:.1f} MiB in {self.directory}, and {free_bytes / mib:.1f} MiB "
                "are free there: make room, or move the directory to another disk and put a symbolic link in its place"
            )

    def _new_path(self) -> Path:
        """The date; a second later if somebody is very quick."""
        at_s = time.time()
        while True:
            path = self.directory / f"{self._group}-{time.strftime('%Y%m%dT%H%M%S', time.localtime(at_s))}.blocks"
            if not path.exists():
                return path
            at_s += 1


def _size(volume: tuple[Store, BlockMap]) -> int:
    """How much it takes, at most."""
    _, blocks = volume
    return blocks.count * (COMPARE_GRAIN_BYTES + _RANGE.size) + _HEADER_BYTES_MAX


def _write(file: IO[bytes], header: dict[str, Any], volumes: Sequence[tuple[Store, BlockMap]]) -> None:
    text = json.dumps(header).encode()
    file.write(_MAGIC + _LENGTH.pack(len(text)) + text)
    ranges = 0
    for number, (store, blocks) in enumerate(volumes):
        first = blocks.next_from(0)
        while first is not None:
            last = blocks.run_end(first, min(first + _PER_RANGE, blocks.blocks) - 1)
            offset = first * COMPARE_GRAIN_BYTES
            data = bytes(store.read(offset, min((last + 1) * COMPARE_GRAIN_BYTES, store.size_bytes) - offset))
            is_zero = data.count(0) == len(data)
            kind = _ZERO if is_zero else _DATA
            file.write(_RANGE.pack(kind, number, offset, len(data), hashlib.sha256(data).digest()))
            if not is_zero:
                file.write(data)
            ranges += 1
            first = blocks.next_from(last + 1)
    file.write(_RANGE.pack(_END, 0, ranges, 0, bytes(32)))


def read_header(file: IO[bytes], path: Path) -> dict[str, Any]:
    """The header, at the beginning of an open file. Raises StorageError."""
    try:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("it does not begin as one")
        (length,) = _LENGTH.unpack(_exactly(file, _LENGTH.size))
        if length > _HEADER_BYTES_MAX:
            raise ValueError("its header is too long")
        header = json.loads(_exactly(file, length))
        volumes = [(str(name), int(size)) for name, size in header["volumes"]]
        found = {key: str(header[key]) for key in ("cluster", "group", "node", "lineage", "kept_lineage", "time")}
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise StorageError(f"{path} is no file of kept blocks: {e}") from None
    return {**found, "volumes": volumes}


def read_ranges(file: IO[bytes], header: dict[str, Any], path: Path) -> Iterator[Kept]:
    """What follows the header, to the end. Raises StorageError where it is damaged, before that range."""
    count = 0
    try:
        while True:
            kind, volume, offset, length, wanted = _RANGE.unpack(_exactly(file, _RANGE.size))
            if kind == _END:
                if offset != count:
                    raise ValueError(f"it says that it has {offset} ranges")
                return
            size = header["volumes"][volume][1]
            if kind not in (_DATA, _ZERO) or length > COMPARE_BLOCK_BYTES or offset + length > size:
                raise ValueError("a range that cannot be")
            data = _exactly(file, length) if kind == _DATA else None
            if data is not None and hashlib.sha256(data).digest() != wanted:
                raise ValueError(f"what was at {offset} has changed")
            yield Kept(volume, offset, length, data)
            count += 1
    except (ValueError, LookupError) as e:
        raise StorageError(f"{path} is damaged after {count} ranges: {e}") from None


def _exactly(file: IO[bytes], length: int) -> bytes:
    """Raises ValueError."""
    data = file.read(length)
    if len(data) != length:
        raise ValueError("it ends too early")
    return data
