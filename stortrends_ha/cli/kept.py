"""`group resolve --list`, `--extract`, `--drop`: the files of what was different in a copy that was given up.

No node is asked: they are files in the state directories of this machine's nodes (``storage.kept_file``).
"""

import contextlib
import os
from pathlib import Path
from typing import IO

from stortrends_ha.cli.asking import cluster_of
from stortrends_ha.cli.repair import confirm
from stortrends_ha.durable import sync_directory
from stortrends_ha.errors import StorTrendsError
from stortrends_ha.storage.kept_file import KeptFiles, read_header, read_ranges

_MIB = 1 << 20


def show(config: Path, group: str) -> int:
    """What there is of a group on this machine; returns the exit code."""
    cluster = cluster_of(config, groups=[group])
    directories = [KeptFiles(node.state_dir, group).directory for node in cluster.nodes.values()]
    paths = sorted(path for directory in directories for path in directory.glob(f"{group}-*.blocks"))
    for path in paths:
        with _opened(path) as file:
            header = read_header(file, path)
        print(
            f"{path}: {path.stat().st_size / _MIB:.1f} MiB of {header['node']}, given up at {header['time']}: lineage "
            f"{header['lineage'][:8]}, for {header['kept_lineage'][:8]}"
        )
    if not paths:
        print(f"Nothing of group {group} is kept on this machine.")
    return 0


def extract(path: Path, to: Path | None) -> int:
    """Write what is in a file into images, one a volume; returns the exit code."""
    if to is None:
        raise StorTrendsError("Say with --to in which directory the images shall be made.")
    with _opened(path) as file, contextlib.ExitStack() as stack:
        header = read_header(file, path)
        images: dict[int, int] = {}
        try:
            to.mkdir(parents=True, exist_ok=True)
            for volume, offset, length, data in read_ranges(file, header, path):
                if volume not in images:
                    name, size_bytes = header["volumes"][volume]
                    images[volume] = _image(to / f"{name}.img", size_bytes, stack)
                os.pwrite(images[volume], data if data is not None else bytes(length), offset)
            for image in images.values():
                os.fsync(image)
        except OSError as e:
            raise StorTrendsError(f"What is in {path} cannot be written to {to}: {e.strerror}.") from None
    for volume in images:
        name = header["volumes"][volume][0]
        print(f"{to / name}.img has what was different in volume {name} on {header['node']}, at its place.")
    if not images:
        print("Nothing was different.")
    return 0


def _image(path: Path, size_bytes: int, stack: contextlib.ExitStack) -> int:
    """An image that is there is used: a copy of the volume as it is now becomes what it was on the other node."""
    image = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    stack.callback(os.close, image)
    if os.fstat(image).st_size < size_bytes:
        os.ftruncate(image, size_bytes)
    return image


def drop(path: Path, *, confirmed: bool) -> int:
    """Remove a file for good; returns the exit code."""
    with _opened(path) as file:
        header = read_header(file, path)
    print(f"{path} has what was different in the copy of group {header['group']} on {header['node']}. It is removed.")
    if not confirmed:
        confirm()
    try:
        path.unlink()
        sync_directory(path.parent)
    except OSError as e:
        raise StorTrendsError(f"{path} cannot be removed: {e.strerror}.") from None
    return 0


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as e:
        raise StorTrendsError(f"{path} cannot be read: {e.strerror}.") from None
