"""A volume's backing, on real files, on tmpfs and on a loop device, and with real failures underneath."""

import asyncio
import contextlib
import fcntl
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stortrends_ha.errors import StorageError, SyncFailedError
from stortrends_ha.protocol.nbd_transmission import OP_PUNCH, OP_WRITE, OP_ZERO, Change
from stortrends_ha.storage import backing as backing_module
from stortrends_ha.storage.backing import Backing

SIZE = 256 << 10
BEYOND = b"\xee" * 8192  # of a file that is larger than its volume

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount and make loop devices")


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def loop_device(file: Path, *options: str) -> Iterator[Path]:
    device = run("losetup", "--find", "--show", *options, file)
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def mounted(where: Path, *options: str | Path) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    run("mount", *options, where)
    try:
        yield where
    finally:
        run("umount", where)


@contextlib.contextmanager
def small_ext4(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    image = tmp_path / "ext4.img"
    image.write_bytes(bytes(2 << 20))
    run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", image)
    with mounted(tmp_path / "small", "-o", "loop", image) as where:
        yield where


@pytest.fixture
def tmpfs_path() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["file", "tmpfs", pytest.param("device", marks=needs_root)])
def path(request: pytest.FixtureRequest, tmp_path: Path, tmpfs_path: Path) -> Iterator[Path]:
    """A blank backing; it is larger than the volume."""
    file = (tmpfs_path if request.param == "tmpfs" else tmp_path) / "vm-a"
    with file.open("wb") as new:
        new.truncate(SIZE)
        new.seek(SIZE)
        new.write(BEYOND)
    if request.param != "device":
        yield file
        return
    with loop_device(file) as device:
        yield device


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return sparse(tmp_path / "vm-a", SIZE)


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as new:
        new.truncate(size)
    return path


class Opened(contextlib.ExitStack):
    """Opens backings, and closes them."""

    def __init__(self) -> None:
        super().__init__()
        self.executor = self.enter_context(ThreadPoolExecutor(2))
        self.failures: list[StorageError] = []

    def __call__(self, path: Path, size: int = SIZE, executor: Executor | None = None) -> Backing:
        backing = Backing("vm-a", path, size, executor or self.executor, self.failures.append)
        self.callback(backing.close)
        return backing


@pytest.fixture
def opened() -> Iterator[Opened]:
    with Opened() as stack:
        yield stack


def write(backing: Backing, offset: int, payload: bytes) -> None:
    backing.apply([(OP_WRITE, offset, len(payload), 3)], memoryview(b"..." + payload))


def punch(backing: Backing, offset: int, length: int) -> None:
    backing.apply([(OP_PUNCH, offset, length, 0)], b"")


def zero(backing: Backing, offset: int, length: int) -> None:
    backing.apply([(OP_ZERO, offset, length, 0)], b"")


def allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


# --- Changes ----------------------------------------------------------------------------------

changes = st.lists(
    st.tuples(
        st.sampled_from([OP_WRITE, OP_WRITE, OP_PUNCH, OP_ZERO]),
        st.one_of(st.integers(0, SIZE - 1), st.integers(0, 63).map(lambda n: n * 4096)),
        st.sampled_from([1, 511, 512, 4096, 5000, 66_000, SIZE]),
        st.integers(1, 255),
    ),
    max_size=8,
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=changes)
def test_changes_do_what_they_do_in_memory(path: Path, batch: list[tuple[int, int, int, int]]) -> None:
    model, view, todo = bytearray(SIZE), bytearray(b"?"), list[Change]()
    for op, offset, length, value in batch:
        length = min(length, SIZE - offset)
        payload = bytes([value]) * length if op == OP_WRITE else b""
        todo.append((op, offset, length, len(view)))
        view += payload
        model[offset : offset + length] = payload or bytes(length)
    with Opened() as opened:
        backing = opened(path)
        backing.apply([(OP_PUNCH, 0, SIZE, 0)], b"")
        backing.apply(todo, memoryview(view))
        assert backing.read(0, SIZE) == model
        assert backing.is_blank() == (not any(model))
        for is_data, start, end in extents(backing):
            assert is_data or not any(model[start:end])
        backing.flush_now()
    with path.open("rb") as raw:
        assert raw.read() == model + BEYOND


def extents(backing: Backing, offset: int = 0, length: int = SIZE) -> list[tuple[bool, int, int]]:
    """(whether it holds data, start, end): they cover the range without gaps."""
    found = []
    for is_data, extent in backing.extents(offset, length):
        assert extent > 0
        found.append((is_data, offset, offset + extent))
        offset += extent
    return found


def test_writes_may_come_from_any_buffer(file: Path, opened: Opened) -> None:
    backing = opened(file)
    for view in (b"abc", bytearray(b"abc"), memoryview(b"abc")):
        backing.apply([(OP_PUNCH, 0, 9, 0), (OP_WRITE, 5, 2, 1)], view)
        assert backing.read(4, 4) == b"\0bc\0"


def test_places_beyond_4_gib(tmp_path: Path, opened: Opened) -> None:
    size = 9 << 30
    backing = opened(sparse(tmp_path / "large", size), size)
    write(backing, size - 4, b"last")
    write(backing, (5 << 30) - 2, b"data")
    punch(backing, 5 << 30, 2**32 - 1)
    assert backing.read(size - 4, 4) == b"\0\0\0t"
    assert backing.read((5 << 30) - 3, 6) == b"\0da\0\0\0"
    assert sum(end for _, end in backing.extents(0, size)) == size


# --- What is allocated ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "tmpfs"])
def test_punched_range_is_given_back_and_zeroed_range_is_kept(
    kind: str, tmp_path: Path, tmpfs_path: Path, opened: Opened
) -> None:
    path = sparse((tmp_path if kind == "file" else tmpfs_path) / "vm-a", SIZE)
    backing = opened(path)
    before = allocated_bytes(path)
    write(backing, 0, b"x" * SIZE)
    backing.flush_now()
    full = allocated_bytes(path)
    assert full >= before + SIZE
    zero(backing, 0, SIZE)
    backing.flush_now()
    assert allocated_bytes(path) >= before + SIZE
    assert backing.is_blank()
    punch(backing, 0, SIZE)
    assert allocated_bytes(path) <= before + 8192
    zero(backing, 4096, 65536)
    backing.flush_now()
    assert allocated_bytes(path) >= before + 65536
    assert backing.is_blank()


def test_zeroes_go_on_where_the_file_system_cannot_do_it(tmpfs_path: Path, opened: Opened) -> None:
    """tmpfs has no ZERO_RANGE."""
    backing = opened(sparse(tmpfs_path / "vm-a", SIZE))
    assert backing.can_punch
    assert not backing.can_zero_allocated_fast
    write(backing, 0, b"x" * SIZE)
    zero(backing, 100, SIZE - 101)
    assert backing.read(0, SIZE) == b"x" * 100 + bytes(SIZE - 101) + b"x"


@needs_root
def test_device_promises_neither_trims_nor_fast_zeroes(path: Path, opened: Opened) -> None:
    backing = opened(path)
    is_device = path.is_block_device()
    assert backing.can_punch != is_device
    assert not (is_device and (backing.can_zero_fast or backing.can_zero_allocated_fast))


def test_opening_changes_nothing(path: Path, opened: Opened) -> None:
    before, content = path.stat(), path.read_bytes()
    opened(path)
    after = path.stat()
    assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)
    assert path.read_bytes() == content


# --- Reads ------------------------------------------------------------------------------------


def test_what_was_written_is_read_from_the_cache(path: Path, opened: Opened) -> None:
    backing = opened(path)
    write(backing, 1000, b"data")
    buffer = bytearray(b"?" * 10)
    if backing.read_into(memoryview(buffer)[2:8], 999):
        assert buffer == b"??\0data\0??"
    else:  # a kernel that cannot tell sends every read to a thread
        assert backing.read(999, 6) == b"\0data\0"


def test_what_is_not_in_the_cache_is_read_from_the_disk(file: Path, opened: Opened) -> None:
    backing = opened(file)
    write(backing, 0, b"x" * SIZE)
    backing.flush_now()
    backing.forget_cache()
    assert not backing.read_into(memoryview(bytearray(SIZE)), 0)
    backing.prefetch(0, SIZE)
    assert backing.read(0, SIZE) == b"x" * SIZE
    assert backing.read_into(memoryview(bytearray(SIZE)), 0)


# --- Extents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "tmpfs"])
def test_extents_tell_data_from_holes(kind: str, tmp_path: Path, tmpfs_path: Path, opened: Opened) -> None:
    backing = opened(sparse((tmp_path if kind == "file" else tmpfs_path) / "vm-a", SIZE))
    assert extents(backing) == [(False, 0, SIZE)]
    write(backing, 65536, b"x" * 65536)
    expected = [(False, 0, 65536), (True, 65536, 131072), (False, 131072, SIZE)]
    assert extents(backing) == expected
    assert extents(backing, 70_000, 5) == [(True, 70_000, 70_005)]
    assert extents(backing, 65535, 2) == [(False, 65535, 65536), (True, 65536, 65537)]
    assert backing.extent(SIZE - 1) == (False, SIZE)
    assert backing.extent(70_000) == (True, 131072)


def test_extents_end_with_the_volume_and_not_with_its_backing(tmp_path: Path, opened: Opened) -> None:
    for name, payload in (("data", b"x" * 2 * SIZE), ("hole", b"")):
        large = sparse(tmp_path / name, 2 * SIZE)
        with large.open("r+b") as new:
            new.write(payload)
        backing = opened(large)
        assert backing.extent(0) == (bool(payload), SIZE)
        assert extents(backing) == [(bool(payload), 0, SIZE)]


def test_number_of_extents_is_bounded_and_what_there_is_begins_at_the_start(file: Path, opened: Opened) -> None:
    backing = opened(file)
    for at in range(0, SIZE, 8192):
        write(backing, at, b"x" * 4096)
    with patch.object(backing_module, "BLOCK_STATUS_EXTENTS", 5):
        found = extents(backing)
    assert [start for _, start, _ in found] == [0, 4096, 8192, 12288, 16384]
    assert len(extents(backing)) == SIZE // 4096


@needs_root
def test_device_is_all_data(tmp_path: Path, opened: Opened) -> None:
    with loop_device(sparse(tmp_path / "image", SIZE)) as device, Opened() as opened:
        assert extents(opened(device), 5, 1000) == [(True, 5, 1005)]


def test_blank_is_what_reads_as_zeroes_and_nothing_else(path: Path, opened: Opened) -> None:
    backing = opened(path)
    assert backing.is_blank()
    write(backing, 0, bytes(SIZE))
    assert backing.is_blank()
    for at in (0, SIZE // 2, SIZE - 1):
        write(backing, at, b"\1")
        assert not backing.is_blank()
        write(backing, at, b"\0")
    assert backing.is_blank()


def test_last_byte_of_a_large_sparse_file_is_seen(tmp_path: Path, opened: Opened) -> None:
    size = (1 << 40) + 5
    backing = opened(sparse(tmp_path / "large", size), size)
    assert backing.is_blank()
    write(backing, size - 1, b"\1")
    assert not backing.is_blank()


# --- What cannot be opened --------------------------------------------------------------------


def refused(opened: Opened, path: Path, size: int = SIZE) -> str:
    """What is said; and nothing stays open."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(StorageError) as raised:
        opened(path, size)
    assert os.listdir("/proc/self/fd") == before
    message = str(raised.value)
    assert message.startswith("volume vm-a: ")
    assert str(path) in message
    return message


def test_missing_file_is_said_with_the_command_that_makes_it(tmp_path: Path, opened: Opened) -> None:
    path = tmp_path / "missing"
    message = refused(opened, path)
    assert f"'truncate -s {SIZE} {path}'" in message
    run("truncate", "-s", str(SIZE), path)
    opened(path)


def test_dangling_link_is_said_to_be_missing(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    assert "does not exist" in refused(opened, tmp_path / "link")


def test_backing_that_is_too_small_is_said_with_both_sizes(path: Path, opened: Opened) -> None:
    actual = SIZE + len(BEYOND)
    message = refused(opened, path, actual + 1)
    assert f"has {actual} bytes" in message
    assert f"configured with {actual + 1}" in message
    opened(path, actual)


@pytest.mark.parametrize("what", ["directory", "fifo", "socket", "/dev/full", "/dev/null", "/dev/zero"])
def test_what_is_no_file_or_device_is_said(what: str, tmp_path: Path, opened: Opened) -> None:
    path = Path(what) if what.startswith("/") else tmp_path / what
    expected = "is neither a file nor a block device"
    if what == "directory":
        path.mkdir()
        expected = "Is a directory"
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "socket":
        os.mknod(path, 0o140600)
        expected = "No such device or address"
    assert expected in refused(opened, path)


def test_backing_in_use_is_said_and_can_be_used_afterwards(path: Path, opened: Opened) -> None:
    with Opened() as other:
        other(path)
        message = refused(opened, path)
        assert "another process uses" in message or "busy" in message
    opened(path)


def test_file_that_another_process_has_locked_is_said(file: Path, opened: Opened) -> None:
    with file.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert "another process uses" in refused(opened, file)


@needs_root
def test_device_that_is_mounted_is_refused(tmp_path: Path, opened: Opened) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(2 << 20))
    run("mkfs.ext4", "-q", "-F", image)
    with loop_device(image) as device, mounted(tmp_path / "mount", device):
        assert "busy" in refused(opened, device)


@needs_root
def test_file_on_a_read_only_file_system_is_said(tmp_path: Path, opened: Opened) -> None:
    with mounted(tmp_path / "ro", "-t", "tmpfs", "none") as where:
        file = sparse(where / "vm-a", SIZE)
        run("mount", "-o", "remount,ro", where)
        assert "Read-only file system" in refused(opened, file)


@needs_root
def test_read_only_device_is_said(tmp_path: Path, opened: Opened) -> None:
    with loop_device(sparse(tmp_path / "image", SIZE), "--read-only") as device:
        assert "read-only" in refused(opened, device)


# --- What fails later -------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(length: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fails(what: str, path: Path, why: str, do: Callable[[], object]) -> None:
    with pytest.raises(StorageError) as raised:
        do()
    assert str(raised.value) == f"volume vm-a: cannot {what} {path}: {why}"


@pytest.mark.parametrize("offset", [8192, 8190])
def test_write_that_is_refused_wholly_or_in_part_is_a_failure(file: Path, opened: Opened, offset: int) -> None:
    backing = opened(file)
    with largest_file(8192):
        fails("write to", file, "File too large", lambda: write(backing, offset, b"data"))
        write(backing, 8188, b"fits")
    assert backing.read(8188, 4)[:2] == b"fi"


@needs_root
def test_full_file_system_is_a_failure_for_writes_and_zeroes_but_not_for_trims(tmp_path: Path, opened: Opened) -> None:
    with small_ext4(tmp_path) as where, Opened() as opened:
        file = sparse(where / "vm-a", 8 << 20)
        backing = opened(file, 8 << 20)
        write(backing, 0, b"x" * 65536)
        with contextlib.suppress(StorageError):
            for at in range(0, 8 << 20, 65536):
                write(backing, at, b"x" * 65536)
        fails("write to", file, "No space left on device", lambda: write(backing, 7 << 20, b"x" * 65536))
        fails("write to", file, "No space left on device", lambda: zero(backing, 6 << 20, 1 << 20))
        punch(backing, 0, 65536)
        assert backing.read(0, 65536) == bytes(65536)


def test_file_that_was_truncated_underneath_is_no_hole(file: Path, opened: Opened) -> None:
    backing = opened(file)
    write(backing, 0, b"x" * SIZE)
    os.truncate(file, SIZE // 2)
    shorter = "it has become shorter than the volume"
    assert not backing.read_into(memoryview(bytearray(4096)), SIZE - 4096)
    assert not backing.read_into(memoryview(bytearray(4096)), SIZE // 2 - 2048)
    fails("read", file, shorter, lambda: backing.read(SIZE - 4096, 4096))
    fails("read", file, shorter, lambda: backing.read(SIZE // 2 - 2048, 4096))
    fails("find the extents of", file, shorter, lambda: backing.extent(SIZE // 2))
    fails("find the extents of", file, shorter, lambda: backing.extents(0, SIZE))


def test_blank_file_that_was_truncated_underneath_is_not_blank(file: Path, opened: Opened) -> None:
    backing = opened(file)
    os.truncate(file, SIZE - 1)
    fails("find the extents of", file, "it has become shorter than the volume", backing.is_blank)


def test_file_that_is_gone_from_its_directory_is_still_served(file: Path, opened: Opened) -> None:
    backing = opened(file)
    file.unlink()
    write(backing, 0, b"data")
    assert backing.read(0, 4) == b"data"


# --- Flushes ----------------------------------------------------------------------------------


class StepExecutor(Executor):
    """Carries out a job when it is told to, or lets it fail."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append((future, lambda: fn(*args, **kwargs)))
        return future

    async def step(self) -> None:
        """Finish the oldest job, and let the loop hear of it."""
        future, job = self.jobs.pop(0)
        try:
            result = job()
        except Exception as e:
            future.set_exception(e)
        else:
            future.set_result(result)
        for _ in range(5):  # callbacks of callbacks, all in this thread
            await asyncio.sleep(0)


@contextlib.contextmanager
def unsyncable(backing: Backing) -> Iterator[None]:
    """A pipe in the place of the file: the kernel cannot sync it."""
    real = backing.fd
    backing.fd, write_end = os.pipe()
    try:
        yield
    finally:
        os.close(backing.fd)
        os.close(write_end)
        backing.fd = real


class Flushing:
    """A backing whose flushes are looked at."""

    def __init__(self, opened: Opened, path: Path) -> None:
        self.executor = StepExecutor()
        self.backing = opened(path, executor=self.executor)
        self.done: list[str] = []

    def start(self, name: str) -> None:
        self.backing.start_flush(lambda: self.done.append(name))

    @property
    def running(self) -> int:
        return len(self.executor.jobs)


async def test_flush_ends_when_the_disk_has_synced(path: Path, opened: Opened) -> None:
    ended = asyncio.Event()
    backing = opened(path)
    write(backing, 0, b"data")
    backing.start_flush(ended.set)
    await ended.wait()
    assert not opened.failures


async def test_flushes_asked_for_while_one_runs_share_the_next(file: Path, opened: Opened) -> None:
    flushing = Flushing(opened, file)
    flushing.start("first")
    write(flushing.backing, 0, b"x")
    for name in ("second", "third"):
        flushing.start(name)
    assert (flushing.running, flushing.done) == (1, [])
    await flushing.executor.step()
    assert (flushing.running, flushing.done) == (1, ["first"])
    flushing.start("fourth")
    await flushing.executor.step()
    assert (flushing.running, flushing.done) == (1, ["first", "second", "third"])
    await flushing.executor.step()
    assert (flushing.running, flushing.done) == (0, ["first", "second", "third", "fourth"])


async def test_nothing_to_flush_ends_at_once(file: Path, opened: Opened) -> None:
    flushing = Flushing(opened, file)
    flushing.start("what was there before it was opened")
    assert flushing.running == 1
    await flushing.executor.step()
    flushing.start("nothing")
    assert (flushing.running, len(flushing.done)) == (0, 2)
    for op in (OP_WRITE, OP_PUNCH, OP_ZERO):
        flushing.backing.apply([(op, 0, 1, 0)], b"x")
        flushing.start("something")
        assert flushing.running == 1
        await flushing.executor.step()


async def test_change_during_a_flush_needs_another(file: Path, opened: Opened) -> None:
    flushing = Flushing(opened, file)
    flushing.start("first")
    write(flushing.backing, 0, b"x")
    await flushing.executor.step()
    flushing.start("second")
    assert (flushing.running, flushing.done) == (1, ["first"])


async def test_flush_asked_for_by_the_end_of_another_is_carried_out(file: Path, opened: Opened) -> None:
    flushing = Flushing(opened, file)

    def again() -> None:
        write(flushing.backing, 0, b"x")
        flushing.start("second")

    flushing.backing.start_flush(again)
    await flushing.executor.step()
    assert (flushing.running, flushing.done) == (1, [])
    await flushing.executor.step()
    assert (flushing.running, flushing.done) == (0, ["second"])


async def test_nothing_is_called_stable_after_a_failed_sync(file: Path, opened: Opened) -> None:
    """Rule 13: the kernel tells of a lost write once; the next fdatasync would succeed."""
    flushing = Flushing(opened, file)
    flushing.start("first")
    flushing.start("second")
    with unsyncable(flushing.backing):
        await flushing.executor.step()
    assert [str(error) for error in opened.failures] == [f"volume vm-a: cannot sync {file}: Invalid argument"]
    for name in ("third", "fourth"):
        flushing.start(name)
        write(flushing.backing, 0, b"x")
    assert (flushing.running, flushing.done) == (0, [])
    with pytest.raises(StorageError):
        flushing.backing.flush_now()


async def test_nothing_is_read_after_a_failed_sync(file: Path, opened: Opened) -> None:
    """Rule 13: the kernel may have dropped what was answered; that holds before anybody has been told of it."""
    backing = opened(file)
    view = memoryview(bytearray(512))
    backing.read(0, 512)
    assert backing.read_into(view, 0)
    with unsyncable(backing), pytest.raises(SyncFailedError):
        await asyncio.get_running_loop().run_in_executor(opened.executor, backing.flush_now)
    assert opened.failures == []
    for read in (lambda: backing.read_into(view, 0), lambda: backing.read(0, 512)):
        with pytest.raises(SyncFailedError, match="an earlier sync failed"):
            read()


@needs_root
async def test_sync_that_really_fails_is_reported_once_and_never_called_a_success(
    tmp_path: Path, opened: Opened
) -> None:
    """A loop device over a full tmpfs takes writes into the cache and cannot write them back."""
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=256k", "none"))
        device = stack.enter_context(loop_device(sparse(where / "image", 4 << 20)))
        failures: asyncio.Queue[StorageError] = asyncio.Queue()
        backing = Backing("vm-a", device, 4 << 20, opened.executor, failures.put_nowait)
        stack.callback(backing.close)
        done = list[str]()
        write(backing, 0, b"x" * (2 << 20))
        backing.start_flush(lambda: done.append("first"))
        failure = await failures.get()
        backing.start_flush(lambda: done.append("second"))
        assert done == []
        assert failures.empty()
        assert str(failure).startswith(f"volume vm-a: cannot sync {device}: ")


async def test_flush_at_the_end_waits_for_the_disk_and_tells_of_a_failure(file: Path, opened: Opened) -> None:
    backing = opened(file)
    write(backing, 0, b"x")
    backing.flush_now()
    with unsyncable(backing):
        fails("sync", file, "Invalid argument", backing.flush_now)
