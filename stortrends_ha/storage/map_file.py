"""A bitmap on stable storage: pages of 4 KiB that are written where they are, each with what proves that it is whole.

    page 0       what the file is: its format, and the number and size of the blocks that its bits stand for
    page 1 + n   bits of page n of ``replication.block_map``, its number, and a digest of both; zeroes if there are none

Invariants: ``write`` returns when the pages are stable, if asked to. All bits that ``open`` finds are stable when it
returns: a process that was killed, or whose sync failed, may have left some in the page cache only, and a region that
seems to be in the intent log is not logged again (rule 8). A page that was cut in two by a loss of power, or is damaged
in any other way, is told as such (None), never as empty; so is what was cut off a file, and everything in one that is
missing, though it must have been there. To write a page again needs no other one, so dying anywhere in it leaves each
of them old, new or damaged.

The space of all pages is reserved when a file is opened: a disk that gets full later fails no write. Where it cannot
be, as the disk is full already, the group does not start there. A file of blocks of another size is put into these, in
a new file that replaces it when it is whole and stable.
"""

import asyncio
import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path

from stortrends_ha.durable import sync_directory
from stortrends_ha.errors import StorageError
from stortrends_ha.replication.block_map import PAGE_BLOCKS, PAGE_BYTES, BlockMap

_PAGE = 4096
_NUMBER_BYTES, _DIGEST_BYTES = 8, 24
_FORMAT = "stortrends-ha block map 1"
_TOGETHER = 256  # pages that are read, or written, by one call
_NO_BITS, _EMPTY, _ALL_EMPTY = bytes(PAGE_BYTES), bytes(_PAGE), bytes(_TOGETHER * _PAGE)

assert PAGE_BYTES + _NUMBER_BYTES + _DIGEST_BYTES == _PAGE


class MapFile:
    """The file of one map of one volume."""

    def __init__(self, path: Path, what: str, blocks: int, block_bytes: int) -> None:
        self._path = path
        self._what = what
        self._blocks, self._block_bytes = blocks, block_bytes
        self._end = _PAGE + -(-blocks // PAGE_BLOCKS) * _PAGE
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
        header = os.pread(self._fd, _PAGE, 0)
        if other := self._other_blocks(header):
            return self._rescaled(*other)
        if header == with_header:
            pages = self._load()
            loaded = BlockMap.load(self._blocks, pages)
            self.write({number: loaded.page(number) for number in pages}, durable=True)
            self._reserve()
            found: BlockMap | None = loaded
        else:
            os.ftruncate(self._fd, 0)
            found = None if expected else BlockMap(self._blocks)
            if expected:  # durable, so that it is still known to be lost at the next start
                full = BlockMap(self._blocks)
                full.fill()
                self.write(full.pages_to_save(), durable=True)
            self._reserve()
            os.pwrite(self._fd, with_header, 0)
        os.fsync(self._fd)
        sync_directory(self._path.parent)
        return found

    def _other_blocks(self, header: bytes) -> tuple[int, int] | None:
        """The number and size of the blocks of a file of the same volume that has others than this is to have."""
        content = (_unsealed(-1, header) or b"").rstrip(b"\0")
        if content in (b"", self._header):
            return None
        said = json.loads(content)
        blocks, size = said["blocks"], said["block_bytes"]
        least, most = (self._blocks - 1) * self._block_bytes, self._blocks * self._block_bytes
        fits = said["format"] == _FORMAT and (blocks - 1) * size < most and least < blocks * size
        return (blocks, size) if fits else None

    def _rescaled(self, blocks: int, block_bytes: int) -> BlockMap:
        """The configuration has changed: put a file of the new blocks in the place of this one, at once."""
        old = MapFile(self._path, self._what, blocks, block_bytes)
        old._fd = self._fd
        found = BlockMap.load(blocks, old._load()).rescaled(block_bytes, self._blocks, self._block_bytes)
        old.close()
        new = MapFile(self._path.with_name(f"{self._path.name}.new"), self._what, self._blocks, self._block_bytes)
        new._path.unlink(missing_ok=True)
        new._open(expected=False)
        new.write(found.pages_to_save(), durable=True)
        new._path.replace(self._path)
        sync_directory(self._path.parent)
        self._fd = new._fd
        return found

    def _reserve(self) -> None:
        try:
            os.posix_fallocate(self._fd, 0, self._end)
        except OSError as error:
            raise self._failure(f"reserve {self._end} bytes for", error) from None

    def _load(self) -> dict[int, bytes | None]:
        """The pages that are not empty: None for what is damaged or cut off."""
        length, at = os.fstat(self._fd).st_size, _PAGE
        pages: dict[int, bytes | None] = dict.fromkeys(range(max(length // _PAGE - 1, 0), self._end // _PAGE - 1))
        while (at := max(at, self._next_data(at) // _PAGE * _PAGE)) < self._end:
            wanted = min(_TOGETHER * _PAGE, self._end - at)
            content = os.pread(self._fd, wanted, at)
            if content != _ALL_EMPTY[:wanted]:
                for offset in range(0, wanted, _PAGE):
                    page = content[offset : offset + _PAGE]
                    if page != _EMPTY:
                        number = (at + offset) // _PAGE - 1
                        pages[number] = _unsealed(number, page)
            at += wanted
        return pages

    def _next_data(self, at: int) -> int:
        try:
            return os.lseek(self._fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return self._end

    def write(self, pages: Mapping[int, bytes], *, durable: bool) -> None:
        """Save pages; ``durable``: they are stable when this returns. In any thread. Raises StorageError."""
        try:
            for run in _runs(sorted(pages)):
                sealed = [_sealed(number + 1, pages[number]) for number in run]
                if os.pwritev(self._fd, sealed, (run[0] + 1) * _PAGE) != len(run) * _PAGE:
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


def _runs(numbers: list[int]) -> Iterator[list[int]]:
    """Those that follow each other, put together."""
    run: list[int] = []
    for number in numbers:
        if run and (number != run[-1] + 1 or len(run) == _TOGETHER):
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def _sealed(number: int, page: bytes) -> bytes:
    if page == _NO_BITS:
        return _EMPTY
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
        self._executor.submit(self._write, asyncio.get_running_loop(), pages, durable, waiting)

    def _write(
        self,
        loop: asyncio.AbstractEventLoop,
        pages: Mapping[int, bytes],
        durable: bool,
        waiting: list[Callable[[], None]],
    ) -> None:
        """In a thread. Clients wait for it: so the loop is told without a future, which would take it another turn."""
        failure: StorageError | None = None
        try:
            self.file.write(pages, durable=durable)
        except StorageError as error:
            failure = error
        except Exception as error:
            failure = StorageError(repr(error))
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(self._written, failure, waiting)

    def _written(self, failure: StorageError | None, waiting: list[Callable[[], None]]) -> None:
        self._running = False
        if failure is not None:
            self._failed = True
            self._report_failure(failure)
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
