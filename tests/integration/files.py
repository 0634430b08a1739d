"""Backing files: made, measured and compared, without reading holes."""

import os
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20


def make_sparse(path: Path, size_bytes: int) -> None:
    """A file that is one hole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.truncate(size_bytes)


def allocated_bytes(path: Path) -> int:
    """What a file takes on its disk."""
    return os.stat(path).st_blocks * 512


def differences(one: Path, other: Path) -> str:
    """Where two files differ first, in words; empty if they are identical. What is a hole in both is not read."""
    if one.stat().st_size != other.stat().st_size:
        return f"{one} has {one.stat().st_size} bytes and {other} has {other.stat().st_size}"
    with one.open("rb") as a, other.open("rb") as b:
        for at, end in (*data_ranges(a.fileno()), *data_ranges(b.fileno())):
            for offset in range(at, end, MIB):
                length = min(MIB, end - offset)
                left, right = (os.pread(file.fileno(), length, offset) for file in (a, b))
                if left != right:
                    first = next(n for n, (x, y) in enumerate(zip(left, right, strict=True)) if x != y)
                    return f"{one} and {other} differ at byte {offset + first}"
    return ""


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """The (start, end) of everything in a file that is not a hole."""
    size, at = os.fstat(fd).st_size, 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # only a hole follows
            return
        start, at = at, os.lseek(fd, at, os.SEEK_HOLE)
        yield start, at
