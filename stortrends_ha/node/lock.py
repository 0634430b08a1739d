"""The lock on a node's state directory: one supervisor, and no data process of an earlier one beside it.

Invariants: the lock is an flock that the data processes inherit, so it is free only when the supervisor *and*
all of its data processes have ended. Two processes therefore never serve the same backing file, even when a
killed node is started again at once. The lock is never released by hand, only by the end of its holders.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

from stortrends_ha.errors import StartError, StorageError

LOCK_FILE = "lock"
# One that is just ending is not "another node": look twice before saying so.
RIVAL_S = 1.0
# A killed supervisor's data processes end at once, unless a disk holds them.
LEFTOVERS_S = 10.0
RETRY_S = 0.05


@contextlib.asynccontextmanager
async def hold(state_dir: Path) -> AsyncIterator[int]:
    """Hold the lock; gives its descriptor for the data processes to inherit."""
    fd = _open(state_dir)
    try:
        await _take(fd, state_dir)
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        yield fd
    finally:
        os.close(fd)


def _open(state_dir: Path) -> int:
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(state_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"The state directory {state_dir} cannot be used: {error.strerror}.") from error


async def _take(fd: int, state_dir: Path) -> None:
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    while not _try(fd):
        pid, waited_s = _recorded_pid(fd), loop.time() - started_s
        if waited_s > RIVAL_S and pid and _runs(pid):
            raise StartError(f"Another node (pid {pid}) already runs on the state directory {state_dir}.")
        if waited_s > LEFTOVERS_S:
            raise StartError(
                f"Data processes of an earlier node (pid {pid or 'unknown'}) still hold the state directory"
                f" {state_dir}; they have not ended within {LEFTOVERS_S:g} s."
            )
        await asyncio.sleep(RETRY_S)


def _try(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _recorded_pid(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _runs(pid: int) -> bool:
    """Whether the process exists and is more than a zombie that waits for its parent."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")
