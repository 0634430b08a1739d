"""The system calls of the production code that are not those of sockets: of the disk, and of the clock.

Each stands for the function of that name in ``os``, ``time`` or ``select``; a call is made for the process whose event
loop runs. The process may be killed at each of them.
"""

import asyncio
import errno
import os
import select
import stat
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from stortrends_ha.replication.interfaces import Buffer

from .disk import BLOCK_BYTES

if TYPE_CHECKING:
    from .data_process import DataProcess
    from .process_loop import ProcessLoop
    from .sockets import Socket

_MISS_SHARE = 0.1  # of reads that are not in the page cache


def running() -> "DataProcess":
    """The process that runs now."""
    return cast("ProcessLoop", asyncio.get_running_loop()).process


class File:
    """An open volume, where the production code has a file descriptor."""

    def __init__(self) -> None:
        self.process = running()
        self.host = self.process.host
        self.disk = self.host.disk
        self.random = self.process.world.random


class Os:
    """Of ``os``, what a volume needs."""

    SEEK_DATA, SEEK_HOLE, RWF_NOWAIT, POSIX_FADV_WILLNEED = (
        os.SEEK_DATA, os.SEEK_HOLE, os.RWF_NOWAIT, os.POSIX_FADV_WILLNEED
    )  # fmt: skip
    strerror = staticmethod(os.strerror)

    @staticmethod
    def pwrite(file: File, data: Buffer, offset: int) -> int:
        """Now and then only a part of it."""
        file.process.point()
        if file.host.disk_fails:
            raise OSError(errno.EIO, "simulated")
        length = len(data)
        if length > BLOCK_BYTES and file.random.random() < 0.2:
            length = BLOCK_BYTES
        file.disk.write(offset, bytes(data[:length]))
        file.process.point()
        return length

    @staticmethod
    def preadv(file: File, views: list[memoryview], offset: int, flags: int = 0) -> int:
        """All of it; with RWF_NOWAIT, if it is in the page cache."""
        if flags and file.random.random() < _MISS_SHARE:
            raise BlockingIOError
        views[0][:] = file.disk.read(offset, len(views[0]))
        return len(views[0])

    @staticmethod
    def fdatasync(file: File) -> None:
        """In a thread, it covers what was written before it was started; a failure drops some of it."""
        file.process.point()
        if file.host.disk_fails:
            file.disk.lose_cache(file.random)
            raise OSError(errno.EIO, "simulated")
        file.disk.sync(file.process.loop.synced_until)

    @staticmethod
    def lseek(file: File, offset: int, whence: int) -> int:
        """To data or a hole."""
        found = file.disk.next_extent(offset, is_data=whence == os.SEEK_DATA)
        if whence == os.SEEK_DATA and found == file.disk.size_bytes:
            raise OSError(errno.ENXIO, "no data")
        return found

    @staticmethod
    def fstat(file: File) -> SimpleNamespace:
        """A regular file."""
        return SimpleNamespace(st_mode=stat.S_IFREG, st_size=file.disk.size_bytes)

    @staticmethod
    def ftruncate(_file: File, _size: int) -> None:
        """After a probe, which has changed nothing."""

    @staticmethod
    def close(_file: File) -> None:
        """Nothing is left of it."""


def fallocate(file: File, mode: int, offset: int, length: int) -> int:
    """Punch a hole, or write zeroes; also as a probe behind the end."""
    if offset < file.disk.size_bytes:
        file.process.point()
        file.disk.write(offset, bytes(length), is_data=not mode & 2)  # FALLOC_FL_PUNCH_HOLE
    return 0


class Time:
    """Of ``time``: the clock of the host."""

    @staticmethod
    def clock_gettime_ns(_clock: int) -> int:
        """Any clock."""
        return running().host.clock.now_ns()

    @staticmethod
    def monotonic() -> float:
        """In seconds."""
        return running().host.clock.now_ns() / 1e9


class Poll:
    """``select.poll``, for who has hung up."""

    POLLRDHUP = select.POLLRDHUP

    def __init__(self) -> None:
        self._sockets: list[Socket] = []

    def register(self, fd: int, _events: int) -> None:
        """Look at this one."""
        self._sockets.append(running().loop.sockets[fd])

    def poll(self, _timeout: int) -> list[tuple[int, int]]:
        """Now."""
        return [(sock.fileno(), select.POLLRDHUP) for sock in self._sockets if sock.hung_up]


class NoThreads:
    """An executor: the loop runs what it is given, as events."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def shutdown(self) -> None:
        """Nothing is left of it."""


def new_lineage() -> SimpleNamespace:
    """``uuid.uuid4``."""
    return SimpleNamespace(hex=f"{running().world.random.getrandbits(128):032x}")
