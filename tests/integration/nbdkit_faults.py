"""A plugin of nbdkit: a file whose requests fail, or wait, as long as a file in `faults` says so.

A file there is named for a kind of request (read, write, flush, zero), and holds the name of an error, or "hang". One
with the name "sector" holds an offset: whatever reads the 4 KiB there fails, until something is written there.
"""

import builtins
import errno
import os
import time
from pathlib import Path

import nbdkit  # type: ignore[import-not-found]

API_VERSION = 2
HANG = "hang"
SECTOR = "sector"
POLL_S = 0.02
_settings: dict[str, Path] = {}


def config(key: str, value: str) -> None:
    _settings[key] = Path(value)


def thread_model() -> int:
    model: int = nbdkit.THREAD_MODEL_PARALLEL
    return model


def open(readonly: bool) -> int:  # noqa: ARG001
    return os.open(_settings["image"], os.O_RDWR)


def get_size(file: int) -> int:
    return os.fstat(file).st_size


def _suffer(kind: str) -> None:
    fault = _settings["faults"] / kind
    try:
        with builtins.open(fault) as file:
            what = file.read()
    except FileNotFoundError:
        return
    while what == HANG:
        if not fault.exists():
            return
        time.sleep(POLL_S)
    nbdkit.set_error(getattr(errno, what))
    raise OSError(what)


def _is_bad(offset: int, length: int) -> bool:
    try:
        at = int((_settings["faults"] / SECTOR).read_text())
    except FileNotFoundError:
        return False
    return offset < at + 4096 and offset + length > at


def pread(file: int, buffer: bytearray, offset: int, flags: int) -> None:  # noqa: ARG001
    _suffer("read")
    if _is_bad(offset, len(buffer)):
        nbdkit.set_error(errno.EIO)
        raise OSError("a bad sector")
    os.preadv(file, [buffer], offset)


def pwrite(file: int, buffer: bytes, offset: int, flags: int) -> None:  # noqa: ARG001
    _suffer("write")
    if _is_bad(offset, len(buffer)):
        (_settings["faults"] / SECTOR).unlink()
    os.pwrite(file, buffer, offset)


def flush(file: int, flags: int) -> None:  # noqa: ARG001
    _suffer("flush")
    os.fdatasync(file)


def zero(file: int, count: int, offset: int, flags: int) -> None:  # noqa: ARG001
    _suffer("zero")
    os.pwrite(file, bytes(count), offset)


trim = zero
