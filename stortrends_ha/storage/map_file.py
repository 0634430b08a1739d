"""A bitmap on stable storage: pages of 4 KiB that are written where they are, each with what proves that it is whole.

    page 0       what the file is: its format, and the number and size of the blocks that its bits stand for
    page 1 + n   bits of page n of ``replication.block_map``, its number, and a digest of both

Invariants: ``write`` returns when the pages are stable, if asked to; what ``open`` finds is stable when it returns. A
page that was cut in two by a loss of power, or is damaged in any other way, is told as such (None), never as empty; so
is everything in a file that is missing, though it must have been there. A page that was never written has no bits. To
write a page again needs no other one, so dying anywhere in it leaves each of them old, new or damaged.
"""

import asyncio
import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from stortrends_ha.durable import sync_directory
from stortrends_ha.errors import StorageError
from stortrends_ha.replication.block_map import PAGE_BLOCKS, PAGE_BYTES, BlockMap

_PAGE = 4096
_NUMBER_BYTES, _DIGEST_BYTES = 8, 24
_FORMAT = "stortrends-ha block map 1"

assert PAGE_BYTES + _NUMBER_BYTES + _DIGEST_BYTES == _PAGE


class MapFile:
    """The file of one map of one volume."""

    def __init__(self, path: Path, what: str, blocks: int, block_bytes: int) -> None:
        self._path = path
        self._what = what
        self._blocks = blocks
        self._header = json.dumps({"format": _FORMAT, "blocks": blocks, "block_bytes": block_bytes}).encode()
        self._fd = -1

    def open(self, *, expected: bool) -> BlockMap | None:
        """What was saved; None if that is not known: the file is damaged as a whole, or missing though ``expected``.
        A new file is made where there is none to be used: full, if it was ``expected``. Raises StorageError."""
        try:
            return self._open(expected)
        except OSError as error:
            raise self._failure("open", error) from None

    def _open(self, expected: bool) -> BlockMap | None:
        with_header = _sealed(0, self._header.ljust(PAGE_BYTES, b"\0"))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.pread(self._fd, _PAGE, 0) == with_header:
            pages = self._load()
            found: BlockMap | None = BlockMap.load(self._blocks, pages)
            # A process that was killed, or whose sync failed, has left some of them in the page cache only.
            self.write({number: page for number, page in pages.items() if page is not None}, durable=True)
        else:
            os.ftruncate(self._fd, 0)
            found = None if expected else BlockMap(self._blocks)
            if expected:  # durable, so that it is still known to be lost at the next start
                full = BlockMap(self._blocks)
                full.fill()
                self.write(full.pages_to_save(), durable=True)
            os.pwrite(self._fd, with_header, 0)
            os.fsync(self._fd)
        sync_directory(self._path.parent)
        return found

    def _load(self) -> dict[int, bytes | None]:
        """The pages that were ever written."""
        pages: dict[int, bytes | None] = {}
        end, at = os.fstat(self._fd).st_size, _PAGE
        while at < end:
            at = max(at, self._next_data(at, end) // _PAGE * _PAGE)
            if at >= end:
                break
            number = at // _PAGE - 1
            if number * PAGE_BLOCKS < self._blocks:
                page = os.pread(self._fd, _PAGE, at)
                if page.count(0) != len(page):
                    pages[number] = _unsealed(number, page)
            at += _PAGE
        return pages

    def _next_data(self, at: int, end: int) -> int:
        try:
            return os.lseek(self._fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return end

    def write(self, pages: Mapping[int, bytes], *, durable: bool) -> None:
        """Save pages; ``durable``: they are stable when this returns. In any thread. Raises StorageError."""
        try:
            for number, page in pages.items():
                sealed = _sealed(number + 1, page)
                if os.pwrite(self._fd, sealed, (number + 1) * _PAGE) != _PAGE:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fdatasync(self._fd)
        except OSError as error:
            raise self._failure("write", error) from None

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _failure(self, what: str, error: OSError) -> StorageError:
        return StorageError(f"{self._what}: cannot {what} {self._path}: {error.strerror}")


def _sealed(number: int, page: bytes) -> bytes:
    body = page + number.to_bytes(_NUMBER_BYTES, "little")
    return body + hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()


def _unsealed(number: int, page: bytes) -> bytes | None:
    content = page[:PAGE_BYTES]
    return content if page == _sealed(number + 1, content) else None


class QueuedMapFile:
    """A map file that is written by a thread, one write after the other. Implements ``differences.MapWriter``.

    What comes while one is under way is written together, as it is by then. Bound: every page once.
    """

    def __init__(self, file: MapFile, executor: Executor, failed: Callable[[StorageError], None]) -> None:
        self.file = file
        self._executor = executor
        self._report_failure = failed
        self._pages: dict[int, bytes] = {}
        self._durable = False
        self._waiting: list[Callable[[], None]] = []
        self._running = False
        self._failed = False  # for good: what a write that failed has left is not known

    def start_write(self, pages: Mapping[int, bytes], *, durable: bool, done: Callable[[], None]) -> None:
        """See ``MapWriter``."""
        if self._failed:
            return
        self._pages.update(pages)
        self._durable = self._durable or durable
        self._waiting.append(done)
        if not self._running:
            self._next()

    def _next(self) -> None:
        pages, durable, waiting = self._pages, self._durable, self._waiting
        self._pages, self._durable, self._waiting = {}, False, []
        self._running = True
        write = partial(self.file.write, pages, durable=durable)
        future = asyncio.get_running_loop().run_in_executor(self._executor, write)
        future.add_done_callback(lambda done: self._written(done, waiting))

    def _written(self, future: "asyncio.Future[None]", waiting: list[Callable[[], None]]) -> None:
        self._running = False
        if future.cancelled():
            return
        if (error := future.exception()) is not None:
            self._failed = True
            self._report_failure(error if isinstance(error, StorageError) else StorageError(repr(error)))
            return
        for done in waiting:
            done()
        if self._waiting and not self._running:
            self._next()

    def close(self) -> None:
        """Write what is left, now: no thread works any more. Raises StorageError."""
        try:
            if not self._failed:
                self.file.write(self._pages, durable=True)
        finally:
            self.file.close()
