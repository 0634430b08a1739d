"""One volume's backing file or block device.

What is called from the hot path (``apply``, ``read_into``) works inline: a write into the page cache takes a
few microseconds, a hop to a thread tens. What can wait for the disk goes to a thread: ``fdatasync``, and
reads that miss the page cache (``RWF_NOWAIT`` tells).

Invariants:
- ``apply`` applies changes in the given order, wholly, or raises StorageError: then the replica has failed.
- Trims and zeroes read as zeroes afterwards on every kind of backing, so that two replicas stay identical.
- A flush covers everything applied before it was asked for. Those asked for while one is running share the
  next (at most two at any time). A failed fdatasync is never retried (rule 13).
"""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path

from stortrends_ha.errors import StorageError, SyncFailedError
from stortrends_ha.limits import BLOCK_STATUS_EXTENTS, PREFETCH_BYTES, WRITE_PIECE_BYTES
from stortrends_ha.protocol.nbd_transmission import OP_PUNCH, OP_WRITE, OP_ZERO, Change
from stortrends_ha.replication.interfaces import Buffer
from stortrends_ha.storage.mounted import mount_identity

# linux/falloc.h
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_MODE_OF_OP = {OP_PUNCH: _PUNCH_HOLE | _KEEP_SIZE, OP_ZERO: _ZERO_RANGE | _KEEP_SIZE}
_BLKROGET, _FS_IOC_GETVERSION = 0x125E, 0x80087601  # linux/fs.h
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY)
_SHORTER = "it has become shorter than the volume"
_ZEROES = bytes(WRITE_PIECE_BYTES)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """The system call, which the ``os`` module lacks: 0 or an errno."""
    while _libc.fallocate(fd, mode, offset, length):
        if (error := ctypes.get_errno()) != errno.EINTR:
            return error
    return 0


class Backing:
    """An open backing file or device of ``size_bytes``. Implements ``replication.interfaces.Store``."""

    def __init__(
        self,
        volume: str,
        path: Path,
        size_bytes: int,
        executor: Executor,
        failed: Callable[[StorageError], None],
        *,
        had_data: bool = False,
    ) -> None:
        """``had_data``: whether there is data of the group on it, or was. Raises StorageError."""
        self.volume = volume
        self.path = path
        self.size_bytes = size_bytes
        self.executor = executor
        self._report_failure = failed
        self.fd = _open(volume, path, size_bytes, had_data)
        self._is_device = stat.S_ISBLK(os.fstat(self.fd).st_mode)
        self.identity = "" if self._is_device else _identity(self.fd)
        self.mount = mount_identity(self.fd)
        self.can_punch = self._probe(_PUNCH_HOLE | _KEEP_SIZE)
        self.can_zero_fast = self.can_punch and not self._is_device
        self.can_zero_allocated_fast = self.can_zero_fast and self._probe(_ZERO_RANGE | _KEEP_SIZE)
        self._dirty = True  # something may have been applied since the last flush began
        self._flush_running = False
        self._flush_waiting: list[Callable[[], None]] = []
        self._sync_failed = False

    def _probe(self, mode: int) -> bool:
        """Whether fallocate can do this here: tried beyond the end of the file, where nothing is changed."""
        if self._is_device:
            return False
        end = os.fstat(self.fd).st_size
        error = _fallocate(self.fd, mode, end, 4096)
        with contextlib.suppress(OSError):
            os.ftruncate(self.fd, end)  # gives back what a probe has allocated there
        return error not in _UNSUPPORTED

    # --- Changes ------------------------------------------------------------------------------

    def apply(self, changes: Sequence[Change], view: Buffer) -> None:
        """Apply changes in order; their payloads are in ``view``. Raises StorageError."""
        self._dirty = True
        fd, pwrite = self.fd, os.pwrite
        try:
            for op, offset, length, at in changes:
                if op == OP_WRITE:
                    if (done := pwrite(fd, view[at : at + length], offset)) != length:
                        self._write_rest(view[at + done : at + length], offset + done)
                else:
                    self._zero(op, offset, length)
        except OSError as e:
            raise self._failure("write to", e) from None

    def _write_rest(self, data: Buffer, offset: int) -> None:
        """A short write: the next attempt says why, or goes on."""
        while data:
            done = os.pwrite(self.fd, data, offset)
            data, offset = data[done:], offset + done

    def _zero(self, op: int, offset: int, length: int) -> None:
        error = _fallocate(self.fd, _MODE_OF_OP[op], offset, length)
        if error in _UNSUPPORTED or (error and self._is_device):
            for at in range(offset, offset + length, len(_ZEROES)):
                self._write_rest(_ZEROES[: offset + length - at], at)
        elif error:
            raise OSError(error, os.strerror(error))

    # --- Reads --------------------------------------------------------------------------------

    def read_into(self, view: memoryview, offset: int) -> bool:
        """Fill ``view`` from the page cache; False if that needs the disk. Raises StorageError."""
        try:
            cached = os.preadv(self.fd, [view], offset, os.RWF_NOWAIT) == len(view)
        except BlockingIOError:
            return False
        except OSError as e:
            if e.errno not in _UNSUPPORTED:
                raise self._failure("read", e) from None
            return False
        if self._sync_failed:
            raise self._dropped()
        return cached

    def read(self, offset: int, length: int) -> bytearray:
        """Read from cache or disk, whichever it takes. Safe in any thread. Raises StorageError."""
        buffer = bytearray(length)
        view, done = memoryview(buffer), 0
        try:
            while done < length:
                count = os.preadv(self.fd, [view[done:]], offset + done)
                if not count:
                    raise OSError(errno.EIO, _SHORTER)
                done += count
        except OSError as e:
            raise self._failure("read", e) from None
        if self._sync_failed:
            raise self._dropped()
        return buffer

    def _dropped(self) -> SyncFailedError:
        """A read came after a failed sync, which may have dropped what it should have found (rule 13)."""
        return SyncFailedError(f"volume {self.volume}: cannot read {self.path}: an earlier sync failed")

    def prefetch(self, offset: int, length: int) -> None:
        """Start to read the beginning of a range into the page cache: a hint, so what goes wrong does not matter."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.fd, offset, min(length, PREFETCH_BYTES), os.POSIX_FADV_WILLNEED)

    def renew(self, offset: int, length: int) -> None:
        """Forget what the page cache has of a range, but for what is not on the disk yet, and start to read it from the
        disk: a hint, so what goes wrong does not matter."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def forget_cache(self) -> None:
        """Read from the disk from now on: after a failed sync the cache has what the disk may lack."""
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    # --- Extents ------------------------------------------------------------------------------

    def extent(self, offset: int) -> tuple[bool, int]:
        """(whether it holds data, its end) of the extent at ``offset``. Raises StorageError."""
        if self._is_device:
            return True, self.size_bytes
        try:
            data = self._next_data(offset)
            if data > offset:
                return False, min(data, self.size_bytes)
            return True, min(os.lseek(self.fd, offset, os.SEEK_HOLE), self.size_bytes)
        except OSError as e:
            raise self._failure("find the extents of", e) from None

    def _next_data(self, offset: int) -> int:
        try:
            return os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            # No data up to the end of the file, which must not have moved: what is missing is no hole.
            if os.fstat(self.fd).st_size < self.size_bytes:
                raise OSError(errno.EIO, _SHORTER) from None
            return self.size_bytes

    def extents(self, offset: int, length: int) -> list[tuple[bool, int]]:
        """(whether it holds data, length) of the extents of a range, from its start; not all, if they are many."""
        found: list[tuple[bool, int]] = []
        end = offset + length
        while offset < end and len(found) < BLOCK_STATUS_EXTENTS:
            is_data, stop = self.extent(offset)
            stop = min(stop, end)
            found.append((is_data, stop - offset))
            offset = stop
        return found

    def is_blank(self) -> bool:
        """Whether all of it reads as zeroes."""
        offset = 0
        while offset < self.size_bytes:
            is_data, end = self.extent(offset)
            while is_data and offset < end:
                length = min(len(_ZEROES) * 16, end - offset)
                if self.read(offset, length).count(0) != length:
                    return False
                offset += length
            offset = end
        return True

    # --- Stability ----------------------------------------------------------------------------

    def start_flush(self, done: Callable[[], None]) -> None:
        """Call ``done`` when all that was applied before is on stable storage."""
        if self._sync_failed:
            return
        if not self._dirty and not self._flush_running:
            done()
            return
        self._flush_waiting.append(done)
        if not self._flush_running:
            self._flush_next()

    def _flush_next(self) -> None:
        if self._sync_failed or not self._flush_waiting:
            return
        waiting, self._flush_waiting = self._flush_waiting, []
        self._dirty, self._flush_running = False, True
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self.executor, self._sync)
        future.add_done_callback(lambda done: self._flush_ended(done, waiting))

    def _sync(self) -> None:
        """In any thread. The kernel tells of an error once, so it is remembered at once. Raises SyncFailedError."""
        try:
            if self._sync_failed:
                raise OSError(errno.EIO, "an earlier sync failed")
            os.fdatasync(self.fd)
            if not self._is_device and os.fstat(self.fd).st_size < self.size_bytes:  # writes make it longer again
                raise OSError(errno.EIO, _SHORTER)
        except OSError as e:
            self._sync_failed = True
            raise SyncFailedError(str(self._failure("sync", e))) from None

    def _flush_ended(self, future: "asyncio.Future[None]", waiting: list[Callable[[], None]]) -> None:
        self._flush_running = False
        error = future.exception()
        if error is not None:
            self._report_failure(
                error if isinstance(error, StorageError) else SyncFailedError(f"a sync failed: {error!r}")
            )
            return
        for done in waiting:
            done()
        self._flush_next()

    def flush_now(self) -> None:
        """Flush, and wait for it. For the end of the process, when no thread works any more. Raises SyncFailedError."""
        self._sync()

    def close(self) -> None:
        """Close the file; without a flush, and nobody hears of those that were asked for."""
        self._flush_waiting.clear()
        os.close(self.fd)

    def _failure(self, what: str, error: BaseException) -> StorageError:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return StorageError(f"volume {self.volume}: cannot {what} {self.path}: {reason}")


def _identity(fd: int) -> str:
    """What no other file has, and this one keeps over renaming, remounting and rebooting; empty where files have none
    (not every file system keeps inode numbers, but those that count their generations do)."""
    try:
        generation = int.from_bytes(fcntl.ioctl(fd, _FS_IOC_GETVERSION, bytes(8))[:4], sys.byteorder)
    except OSError:
        return ""
    return f"inode {os.fstat(fd).st_ino}, generation {generation}"


def _open(volume: str, path: Path, size_bytes: int, had_data: bool) -> int:
    """Open the backing for this process alone. Raises StorageError."""
    try:
        # O_EXCL without O_CREAT: of a block device, the kernel refuses one that is mounted or in use.
        exclusive = os.O_EXCL if path.is_block_device() else 0
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | exclusive)
    except FileNotFoundError:
        create = f"'truncate -s {size_bytes} {path}'"
        raise StorageError(
            f"volume {volume}: its backing file {path} does not exist: "
            + (
                f"mount its disk, or correct its path. If it is lost, make an empty one with {create}, which is then "
                "filled by the other node"
                if had_data
                else f"create it, for example with {create}, or correct its path"
            )
        ) from None
    except OSError as e:
        raise StorageError(
            f"volume {volume}: cannot open its backing {path} for reading and writing: {e.strerror}"
        ) from None
    try:
        _check(volume, path, size_bytes, fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check(volume: str, path: Path, size_bytes: int, fd: int) -> None:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise StorageError(f"volume {volume}: its backing {path} is neither a file nor a block device")
    if stat.S_ISBLK(mode) and any(fcntl.ioctl(fd, _BLKROGET, bytes(4))):
        raise StorageError(f"volume {volume}: its backing device {path} is read-only")
    actual = os.lseek(fd, 0, os.SEEK_END)
    if actual < size_bytes:
        raise StorageError(
            f"volume {volume}: its backing {path} has {actual} bytes, but the volume is configured with {size_bytes}: "
            "enlarge the one or correct the other"
        )
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(f"volume {volume}: another process uses its backing {path}") from None


assert sys.platform == "linux"
