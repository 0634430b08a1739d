"""A map on real files: what was saved is found, and damage is told as such, never as an empty map."""

import asyncio
import itertools
import os
import random
import resource
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stortrends_ha.errors import StorageError
from stortrends_ha.replication.block_map import PAGE_BLOCKS, PAGE_BYTES, BlockMap
from stortrends_ha.storage.map_file import MapFile, QueuedMapFile

BLOCKS = 2 * PAGE_BLOCKS + 100
PAGE = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "groups" / "rg-a.vm-a.dirty"


def reopened(path: Path, *, expected: bool = True, blocks: int = BLOCKS, block_bytes: int = 65536) -> set[int] | None:
    found = opened(path, expected=expected, blocks=blocks, block_bytes=block_bytes)
    return None if found is None else set(found)


def opened(path: Path, *, expected: bool = True, blocks: int = BLOCKS, block_bytes: int = 65536) -> BlockMap | None:
    file = MapFile(path, "volume vm-a", blocks, block_bytes)
    found = file.open(expected=expected)
    file.close()
    return found


def save(path: Path, *blocks: int) -> None:
    file = MapFile(path, "volume vm-a", BLOCKS, 65536)
    map_ = file.open(expected=False)
    assert map_ is not None
    for block in blocks:
        map_.add(block, block)
    file.write(map_.pages_to_save(), durable=True)
    file.close()


def blocks_of_page(number: int) -> set[int]:
    return set(range(number * PAGE_BLOCKS, min((number + 1) * PAGE_BLOCKS, BLOCKS)))


# --- Kept -------------------------------------------------------------------------------------


def test_new_file_is_empty(path: Path) -> None:
    assert reopened(path, expected=False) == set()
    assert reopened(path) == set()


def test_what_was_saved_is_found(path: Path) -> None:
    save(path, 0, 5, PAGE_BLOCKS, BLOCKS - 1)
    assert reopened(path) == {0, 5, PAGE_BLOCKS, BLOCKS - 1}


def test_pages_that_were_never_written_are_empty(path: Path) -> None:
    save(path, BLOCKS - 1)
    assert path.stat().st_size == 4 * PAGE
    assert reopened(path) == {BLOCKS - 1}


def test_page_that_is_written_again_is_as_written_last(path: Path) -> None:
    save(path, 5)
    file = MapFile(path, "volume vm-a", BLOCKS, 65536)
    map_ = file.open(expected=True)
    assert map_ is not None
    map_.discard(5)
    map_.add(6, 6)
    for _ in range(2):
        file.write({0: map_.page(0)}, durable=False)
    file.close()
    assert reopened(path) == {6}


def test_page_that_was_emptied_is_zeroes(path: Path) -> None:
    save(path, 5, PAGE_BLOCKS)
    file = MapFile(path, "volume vm-a", BLOCKS, 65536)
    map_ = file.open(expected=True)
    assert map_ is not None
    map_.discard(5)
    file.write(map_.pages_to_save(), durable=True)
    file.close()
    assert not any(path.read_bytes()[PAGE : 2 * PAGE])
    assert reopened(path) == {PAGE_BLOCKS}


@pytest.mark.parametrize("blocks", [1, PAGE_BLOCKS, 300 * PAGE_BLOCKS, 600 * PAGE_BLOCKS + 1])
def test_runs_of_pages_are_written_and_read_together(path: Path, blocks: int) -> None:
    file = MapFile(path, "volume vm-a", blocks, 65536)
    map_ = file.open(expected=False)
    assert map_ is not None
    for page in (*range(290), *range(400, 410, 3), 600):
        map_.add(page * PAGE_BLOCKS + page, page * PAGE_BLOCKS + page)
    file.write(map_.pages_to_save(), durable=True)
    file.close()
    assert reopened(path, blocks=blocks) == set(map_)


def test_space_of_a_file_is_reserved_when_it_is_opened(path: Path) -> None:
    assert reopened(path, expected=False) == set()
    assert path.stat().st_size == 4 * PAGE
    assert path.stat().st_blocks * 512 >= 4 * PAGE
    path.write_bytes(path.read_bytes()[:PAGE])
    os.truncate(path, 4 * PAGE)  # as a copy may leave it
    assert path.stat().st_blocks * 512 < 4 * PAGE
    assert reopened(path) == set()
    assert path.stat().st_blocks * 512 >= 4 * PAGE


def test_file_that_cannot_be_reserved_is_said(path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PAGE, before[1]))
    try:
        with pytest.raises(StorageError, match=rf"volume vm-a: cannot reserve 16384 bytes for {path}: File too large"):
            reopened(path, expected=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_durable_write_is_stable_when_it_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MapFile(path, "volume vm-a", BLOCKS, 65536)
    file.open(expected=False)
    seen = list[str]()

    def watched(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any) -> Any:
            seen.append(name)
            return real(*args)

        return call

    for name in ("pwritev", "fdatasync"):
        monkeypatch.setattr(os, name, watched(name))
    file.write({0: bytes(PAGE_BYTES), 1: bytes(PAGE_BYTES)}, durable=False)
    assert seen == ["pwritev"]
    file.write({0: bytes(PAGE_BYTES)}, durable=True)
    assert seen[1:] == ["pwritev", "fdatasync"]
    file.close()


# --- Damage -----------------------------------------------------------------------------------


def test_page_with_any_byte_wrong_has_all_its_blocks_and_no_other_has(path: Path) -> None:
    save(path, 5, PAGE_BLOCKS + 1)
    good = path.read_bytes()
    for at in range(PAGE, 2 * PAGE):
        wrong = bytearray(good)
        wrong[at] ^= 1 << at % 8
        with path.open("r+b") as file:
            file.seek(PAGE)
            file.write(wrong[PAGE : 2 * PAGE])
        found = opened(path)
        assert found is not None
        assert found.count == PAGE_BLOCKS + 1, at
        assert found.run_end(0, BLOCKS - 1) == PAGE_BLOCKS - 1
        assert PAGE_BLOCKS + 1 in found


def test_file_with_any_byte_of_its_header_wrong_is_lost_as_a_whole(path: Path) -> None:
    for at in range(0, PAGE, 7):
        path.unlink(missing_ok=True)
        save(path, 5)
        with path.open("r+b") as file:
            byte = file.read(at + 1)[-1]
            file.seek(at)
            file.write(bytes([byte ^ 0x10]))
        assert reopened(path) is None, at


def test_page_that_was_cut_in_two_by_a_loss_of_power_has_all_its_blocks(path: Path) -> None:
    save(path, *range(0, PAGE_BLOCKS, 3))
    before = path.read_bytes()
    save(path, *range(0, PAGE_BLOCKS, 2))
    after = path.read_bytes()
    for cut in (512, 2048, 3584, PAGE - 1):
        for one, other in ((before, after), (after, before)):
            path.write_bytes(one[: PAGE + cut] + other[PAGE + cut :])
            assert reopened(path) == blocks_of_page(0)


def test_page_of_another_place_has_all_its_blocks(path: Path) -> None:
    save(path, 5, PAGE_BLOCKS + 1)
    data = path.read_bytes()
    path.write_bytes(data[:PAGE] + data[2 * PAGE : 3 * PAGE] + data[PAGE : 2 * PAGE] + data[3 * PAGE :])
    assert reopened(path) == blocks_of_page(0) | blocks_of_page(1)


def test_damaged_page_is_mended_when_it_is_saved_again(path: Path) -> None:
    save(path, 5)
    with path.open("r+b") as raw:
        raw.seek(PAGE + 9)
        raw.write(b"x")
    file = MapFile(path, "volume vm-a", BLOCKS, 65536)
    map_ = file.open(expected=True)
    assert map_ is not None
    map_.remove(7, BLOCKS - 1)
    file.write(map_.pages_to_save(), durable=True)
    file.close()
    assert reopened(path) == set(range(7))


@pytest.mark.parametrize("length", [0, 1, PAGE - 1])
def test_file_that_is_cut_in_its_header_is_lost(path: Path, length: int) -> None:
    save(path, 5)
    os.truncate(path, length)
    assert reopened(path) is None


@pytest.mark.parametrize("length", [PAGE + 40, 2 * PAGE - 1])
def test_pages_that_are_cut_off_have_all_their_blocks_from_then_on(path: Path, length: int) -> None:
    save(path, *range(0, PAGE_BLOCKS, 5))
    os.truncate(path, length)
    for _ in range(2):
        assert reopened(path) == set(range(BLOCKS))


def test_pages_that_are_cut_off_as_a_whole_are_not_taken_for_empty(path: Path) -> None:
    save(path, 5, PAGE_BLOCKS + 1)
    os.truncate(path, 2 * PAGE)
    assert reopened(path) == {5} | blocks_of_page(1) | blocks_of_page(2)


def spoil(path: Path, how: str) -> None:
    save(path, 5)
    if how == "missing":
        path.unlink()
    elif how == "noise":
        path.write_bytes(random.Random(1).randbytes(3 * PAGE))
    elif how == "zeroes":
        path.write_bytes(bytes(3 * PAGE))


@pytest.mark.parametrize("how", ["missing", "noise", "zeroes"])
@pytest.mark.parametrize("expected", [False, True])
def test_lost_file_is_told_if_there_must_have_been_one(path: Path, how: str, expected: bool) -> None:
    spoil(path, how)
    assert reopened(path, expected=expected) == (None if expected else set())


@pytest.mark.parametrize("other", [{"blocks": BLOCKS + 1}, {"blocks": BLOCKS - 1}, {"block_bytes": 4096}])
def test_file_of_blocks_of_another_number_or_size_is_lost(path: Path, other: dict[str, Any]) -> None:
    save(path, 5)
    assert reopened(path, **other) is None


SMALLER: dict[str, Any] = {"blocks": BLOCKS * 16, "block_bytes": 4096}
LARGER: dict[str, Any] = {"blocks": -(-BLOCKS // 8), "block_bytes": 8 * 65536}


def test_blocks_of_another_size_have_what_was_saved(path: Path) -> None:
    save(path, 5, PAGE_BLOCKS, BLOCKS - 1)
    of_5, last = set(range(80, 96)), set(range(16 * (BLOCKS - 1), 16 * BLOCKS))
    assert reopened(path, **SMALLER) == of_5 | set(range(16 * PAGE_BLOCKS, 16 * PAGE_BLOCKS + 16)) | last
    assert reopened(path) == {5, PAGE_BLOCKS, BLOCKS - 1}
    assert reopened(path, **LARGER) == {0, PAGE_BLOCKS // 8, (BLOCKS - 1) // 8}
    assert reopened(path, **LARGER) == {0, PAGE_BLOCKS // 8, (BLOCKS - 1) // 8}
    assert reopened(path) == {*range(8), *range(PAGE_BLOCKS, PAGE_BLOCKS + 8), *range(BLOCKS // 8 * 8, BLOCKS)}
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_damaged_page_has_all_its_blocks_in_another_size_too(path: Path) -> None:
    save(path, 5, PAGE_BLOCKS)
    data = bytearray(path.read_bytes())
    data[PAGE + 77] ^= 1
    path.write_bytes(data)
    assert reopened(path, **LARGER) == {*range(PAGE_BLOCKS // 8), PAGE_BLOCKS // 8}


class KilledError(Exception):
    """In the middle of a start."""


def killed_before(fatal: int, call: Callable[..., Any], calls: Iterator[int]) -> Callable[..., Any]:
    def instead(*arguments: Any, **more: Any) -> Any:
        if next(calls) == fatal:
            raise KilledError
        return call(*arguments, **more)

    return instead


def test_death_anywhere_in_changing_the_size_of_blocks_loses_nothing(path: Path) -> None:
    names = ("ftruncate", "pwrite", "pwritev", "fdatasync", "fsync", "close", "replace")
    for fatal in itertools.count():
        save(path, 5, PAGE_BLOCKS)
        calls = itertools.count()
        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                patch.setattr(os, name, killed_before(fatal, getattr(os, name), calls))
            try:
                opened(path, **LARGER)
            except KilledError:
                pass
            else:
                break
        assert reopened(path, **LARGER) == {0, PAGE_BLOCKS // 8}
        path.unlink()
    assert fatal > len(names)


def test_file_of_another_format_is_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(path, 5)
    monkeypatch.setattr("stortrends_ha.storage.map_file._FORMAT", "stortrends-ha block map 2")
    assert reopened(path) is None


def test_what_was_lost_is_everything_at_the_next_start_too(path: Path) -> None:
    spoil(path, "missing")
    assert reopened(path) is None
    assert reopened(path) == set(range(BLOCKS))


def test_lost_file_is_lost_until_its_replacement_has_everything(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before any of the calls that make it."""
    names = ("open", "ftruncate", "pwrite", "pwritev", "posix_fallocate", "fdatasync", "fsync")
    real: dict[str, Any] = {name: getattr(os, name) for name in names}
    for killed_at in range(30):
        spoil(path, "noise")
        calls = iter(range(killed_at))

        def call(*args: Any, real: Any, calls: Any = calls, **kwargs: Any) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            for name, function in real.items():
                patch.setattr(os, name, lambda *args, f=function, c=call, **kw: c(*args, real=f, **kw))
            try:
                assert reopened(path) is None
            except KeyboardInterrupt:
                pass
            else:
                return
        found = reopened(path)
        assert found is None or found == set(range(BLOCKS)), killed_at
    raise AssertionError("it never got to its end")


def test_file_that_cannot_be_opened_or_written_is_said(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(StorageError, match=f"volume vm-a: cannot open {path}: Is a directory"):
        reopened(path)
    path.rmdir()
    file = MapFile(path, "volume vm-a", BLOCKS, 65536)
    file.open(expected=False)
    file.close()
    with pytest.raises(StorageError, match=f"volume vm-a: cannot write {path}: Bad file"):
        file.write({0: bytes(PAGE_BYTES)}, durable=True)


# --- In a thread ------------------------------------------------------------------------------


class HeldExecutor(Executor):
    """Does nothing until it is told to."""

    def __init__(self) -> None:
        self.held: list[tuple[Any, Future[Any]]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future = Future[Any]()
        self.held.append((lambda: fn(*args, **kwargs), future))
        return future

    async def go_on(self) -> None:
        function, future = self.held.pop(0)
        try:
            future.set_result(function())
        except StorageError as e:
            future.set_exception(e)
        for _ in range(3):
            await asyncio.sleep(0)


class WatchedFile(MapFile):
    """Remembers what is written."""

    def __init__(self) -> None:
        self.writes: list[tuple[dict[int, bytes], bool]] = []
        self.error: StorageError | None = None
        self.is_closed = False

    def write(self, pages: Mapping[int, bytes], *, durable: bool) -> None:
        if self.error is not None:
            raise self.error
        self.writes.append((dict(pages), durable))

    def close(self) -> None:
        self.is_closed = True


async def test_writes_are_made_in_their_order_and_what_waits_is_written_together() -> None:
    file, executor, calls = WatchedFile(), HeldExecutor(), list[str]()
    queued = QueuedMapFile(file, executor, lambda error: calls.append(str(error)))
    queued.start_write({0: b"a"}, durable=False, done=lambda: calls.append("first"))
    queued.start_write({0: b"b", 1: b"b"}, durable=True, done=lambda: calls.append("second"))
    queued.start_write({1: b"c"}, durable=False, done=lambda: calls.append("third"))
    assert (file.writes, calls, len(executor.held)) == ([], [], 1)
    await executor.go_on()
    assert (file.writes, calls) == ([({0: b"a"}, False)], ["first"])
    queued.start_write({2: b"d"}, durable=False, done=lambda: calls.append("fourth"))
    await executor.go_on()
    assert file.writes[1:] == [({0: b"b", 1: b"c"}, True)]
    assert calls == ["first", "second", "third"]
    await executor.go_on()
    assert file.writes[2:] == [({2: b"d"}, False)]
    assert calls[3:] == ["fourth"]
    assert executor.held == []


async def test_what_is_asked_for_when_a_write_ends_is_written_too() -> None:
    file, executor, calls = WatchedFile(), HeldExecutor(), list[str]()
    queued = QueuedMapFile(file, executor, lambda error: calls.append(str(error)))

    def again() -> None:
        calls.append("first")
        queued.start_write({1: b"b"}, durable=True, done=lambda: calls.append("second"))

    queued.start_write({0: b"a"}, durable=True, done=again)
    await executor.go_on()
    assert len(executor.held) == 1
    await executor.go_on()
    assert (file.writes, calls) == ([({0: b"a"}, True), ({1: b"b"}, True)], ["first", "second"])


async def test_write_that_fails_is_reported_once_and_nobody_hears_that_it_was_made() -> None:
    file, executor, calls = WatchedFile(), HeldExecutor(), list[str]()
    queued = QueuedMapFile(file, executor, lambda error: calls.append(str(error)))
    file.error = StorageError("the disk is broken")
    queued.start_write({0: b"a"}, durable=True, done=lambda: calls.append("first"))
    queued.start_write({1: b"a"}, durable=True, done=lambda: calls.append("second"))
    await executor.go_on()
    assert calls == ["the disk is broken"]
    assert executor.held == []


async def test_failed_map_is_not_taken_for_saved_by_later_writes() -> None:
    """Rule 13: a failed fsync is never tried again as if it could succeed."""
    file, executor, calls = WatchedFile(), HeldExecutor(), list[str]()
    queued = QueuedMapFile(file, executor, lambda error: calls.append(str(error)))
    file.error = StorageError("the disk is broken")
    queued.start_write({0: b"a"}, durable=True, done=lambda: calls.append("first"))
    await executor.go_on()
    file.error = None
    queued.start_write({1: b"a"}, durable=True, done=lambda: calls.append("second"))
    while executor.held:
        await executor.go_on()
    assert calls == ["the disk is broken"]


def test_what_is_left_at_the_end_is_written_and_the_file_closed_even_if_that_fails() -> None:
    file = WatchedFile()
    QueuedMapFile(file, HeldExecutor(), lambda _: None).close()
    assert file.is_closed
    failing = WatchedFile()
    failing.error = StorageError("the disk is broken")
    with pytest.raises(StorageError):
        QueuedMapFile(failing, HeldExecutor(), lambda _: None).close()
    assert failing.is_closed


async def test_map_is_saved_by_a_real_thread(path: Path) -> None:
    file = MapFile(path, "volume vm-a", BLOCKS, 65536)
    map_ = file.open(expected=False)
    assert isinstance(map_, BlockMap)
    ended, threads = asyncio.Event(), set[int]()
    with ThreadPoolExecutor(1) as executor:
        queued = QueuedMapFile(file, executor, lambda error: pytest.fail(str(error)))
        map_.add(7, 9)

        def done() -> None:
            threads.add(threading.get_ident())
            ended.set()

        queued.start_write(map_.pages_to_save(), durable=True, done=done)
        await asyncio.wait_for(ended.wait(), 10)
    queued.close()
    assert threads == {threading.get_ident()}
    assert reopened(path) == {7, 8, 9}
