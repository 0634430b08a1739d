"""The threads that wait for one disk, and for how long it has not answered them (row 14).

What waits for an answer is a request that a thread is carrying out, not one that waits for a thread. A disk that has
much to do (the flush of a full page cache may take minutes) does not hang: where the kernel counts what a device has
finished, the time begins anew whenever it has finished anything. There is no such count for files on tmpfs, FUSE, NFS,
btrfs or zfs: there no single request may take longer.
"""

import os
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Documentation/admin-guide/iostats.rst: reads, writes, discards and flushes that were completed.
_COMPLETED = (0, 4, 11, 15)


class DiskThreads(Executor):
    """Some of the threads of ``pool``, for one disk."""

    def __init__(self, pool: Executor, path: Path) -> None:
        """``path`` is that of a device, or of something on the disk."""
        self.path = path
        self._pool = pool
        self._counters = _counters(path)
        self._began: dict[int, float] = {}
        self._counted: list[str] = []
        self._finished_s = 0.0

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See ``Executor``."""
        return self._pool.submit(self._carry_out, fn, *args, **kwargs)  # type: ignore[arg-type]

    def _carry_out(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        thread = threading.get_ident()
        self._began[thread] = time.monotonic()
        try:
            return fn(*args, **kwargs)
        finally:
            del self._began[thread]

    def silent_s(self) -> float:
        """For how long something has been waited for, and the disk has finished nothing; 0 if nothing is. To be called
        now and then."""
        began = list(self._began.values())
        now_s = time.monotonic()
        if not began:
            return 0.0
        counted = self._count()
        if counted != self._counted:
            self._counted, self._finished_s = counted, now_s
        return now_s - max(min(began), self._finished_s)

    def _count(self) -> list[str]:
        try:
            fields = self._counters.read_text().split()
        except OSError:  # nothing is counted
            return []
        return [fields[at] for at in _COMPLETED if at < len(fields)]


def _counters(path: Path) -> Path:
    try:
        status = os.stat(path)
    except OSError:  # whoever opens it says so
        return Path(os.devnull)
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
