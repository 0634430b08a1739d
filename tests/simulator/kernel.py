"""The system calls of the production code that are not those of sockets: of the disk, and of the clock.

Each stands for the function of that name in ``os``, ``time`` or ``select``; a call is made for the process whose event
loop runs. The process may be killed at each of them.
"""

import asyncio
import errno
import os
import select
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from stortrends_ha.replication.interfaces import Buffer

from .disk import BLOCK_BYTES
from .metadata import PAGE_BYTES, MapPages

if TYPE_CHECKING:
    from .data_process import DataProcess
    from .process_loop import ProcessLoop
    from .sockets import Socket

ALL = 1 << 62  # the number of a write that nothing comes after
_MISS_SHARE = 0.1  # of reads that are not in the page cache


def running() -> "DataProcess":
    """The process that runs now."""
    return cast("ProcessLoop", asyncio.get_running_loop()).process


class File:
    """An open volume, where the production code has a file descriptor."""

    def __init__(self, volume: str) -> None:
        self.process = running()
        self.host = self.process.host
        self.disk = self.host.disks[self.process.world.volumes.index(volume)]
        self.random = self.process.world.random


class Os:
    """Of ``os``, what a volume needs."""

    SEEK_DATA, SEEK_HOLE, RWF_NOWAIT, POSIX_FADV_WILLNEED, POSIX_FADV_DONTNEED = (
        os.SEEK_DATA, os.SEEK_HOLE, os.RWF_NOWAIT, os.POSIX_FADV_WILLNEED, os.POSIX_FADV_DONTNEED
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
    def posix_fadvise(file: File, offset: int, length: int, advice: int) -> None:
        """What is not stable stays in the cache, what is stable is read as before."""

    @staticmethod
    def fdatasync(file: File) -> None:
        """In a thread, it covers what was written before it was started; a failure drops some of it."""
        file.process.point()
        if file.host.disk_fails:
            file.disk.lose_cache(file.random)
            raise OSError(errno.EIO, "simulated")
        file.disk.sync(file.process.loop.synced_until.get(file.disk, ALL))
        file.process.point()

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
    if file.host.zeroes_by_writing:
        return errno.EOPNOTSUPP
    if offset < file.disk.size_bytes:
        file.process.point()
        if file.host.disk_fails:
            return errno.EIO
        file.disk.write(offset, bytes(length), is_data=not mode & 2)  # FALLOC_FL_PUNCH_HOLE
        file.process.point()
    return 0


class MapFile:
    """An open map file; without ``pages``, the directory that they are in."""

    def __init__(self, name: str, flags: int) -> None:
        self.process = running()
        self.host = self.process.host
        self.pages: MapPages | None = self.host.metadata.open(name) if flags & os.O_CREAT else None

    def check(self) -> None:
        """A call that may fail, or be the last one."""
        self.process.point()
        if self.host.metadata_fails:
            raise OSError(errno.EIO, "simulated")


class MapOs:
    """Of ``os``, what a map file needs."""

    O_RDWR, O_CREAT, O_CLOEXEC, O_RDONLY, SEEK_DATA = os.O_RDWR, os.O_CREAT, os.O_CLOEXEC, os.O_RDONLY, os.SEEK_DATA
    strerror = staticmethod(os.strerror)

    @staticmethod
    def open(path: Path, flags: int, _mode: int = 0) -> MapFile:
        """One of them, or their directory."""
        file = MapFile(path.name, flags)
        file.check()
        return file

    @staticmethod
    def pread(file: MapFile, length: int, offset: int) -> bytes:
        """Pages."""
        assert file.pages is not None
        return b"".join(map(file.pages.read, range(offset // PAGE_BYTES, (offset + length) // PAGE_BYTES)))

    @staticmethod
    def pwritev(file: MapFile, buffers: list[bytes], offset: int) -> int:
        """Pages."""
        return sum(MapOs.pwrite(file, page, offset + number * PAGE_BYTES) for number, page in enumerate(buffers))

    @staticmethod
    def posix_fallocate(file: MapFile, _offset: int, length: int) -> None:
        """The file is at least that long."""
        assert file.pages is not None
        file.check()
        file.pages.extend(length // PAGE_BYTES)
        file.process.point()

    @staticmethod
    def pwrite(file: MapFile, data: bytes, offset: int) -> int:
        """A page."""
        assert file.pages is not None
        file.check()
        file.pages.write(offset // PAGE_BYTES, data)
        file.process.point()
        return len(data)

    @staticmethod
    def fdatasync(file: MapFile) -> None:
        """All of it; or it fails, and drops what was written."""
        try:
            file.check()
        except OSError:
            if file.pages is not None:
                file.pages.fail()
            raise
        if file.pages is None:
            file.host.metadata.sync_names()
        else:
            file.pages.sync()
        file.process.point()

    fsync = fdatasync

    @staticmethod
    def lseek(file: MapFile, offset: int, _whence: int) -> int:
        """To data."""
        assert file.pages is not None
        page = file.pages.next_data(offset // PAGE_BYTES)
        if page not in file.pages.pages:
            raise OSError(errno.ENXIO, "no data")
        return max(offset, page * PAGE_BYTES)

    @staticmethod
    def fstat(file: MapFile) -> SimpleNamespace:
        """Its size."""
        assert file.pages is not None
        return SimpleNamespace(st_size=(max(file.pages.pages, default=-1) + 1) * PAGE_BYTES)

    @staticmethod
    def ftruncate(file: MapFile, _size: int) -> None:
        """To nothing."""
        assert file.pages is not None
        file.check()
        file.pages.truncate()

    @staticmethod
    def close(_file: MapFile) -> None:
        """Nothing is left of it."""


class Time:
    """Of ``time``: the clock of the host."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

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

    def submit(self, func: Callable[..., Any], *args: Any) -> None:
        """Nobody waits for its result."""
        running().loop.run_in_executor(self, func, *args)

    def silent_s(self) -> float:
        """No disk hangs."""
        return 0.0

    def shutdown(self, **_: bool) -> None:
        """Nothing is left of it."""


def new_lineage() -> SimpleNamespace:
    """``uuid.uuid4``."""
    return SimpleNamespace(hex=f"{running().world.random.getrandbits(128):032x}")


def new_filling() -> SimpleNamespace:
    """``uuid.uuid4``, for names of which a node never makes two at one moment."""
    return SimpleNamespace(hex=f"{running().host.clock.now_ns():032x}")
