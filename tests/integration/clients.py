"""The NBD clients of Debian as subprocesses: bounded in time, and a missing one is said with its package."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

PACKAGES = {
    "nbdsh": "python3-libnbd",
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "nbdfuse": "libnbd-bin",
    "fusermount3": "fuse3",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "fio": "fio",
    "nbd-client": "nbd-client",
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "losetup": "mount",
    "mount": "mount",
    "umount": "mount",
}
# Debian's own Python must run nbdsh, not that of a virtual environment.
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {"PATH": PATH}
TIMEOUT_S = 60.0
LOAD_S_MAX = 600  # it is ended long before
_FIO_INTERRUPTED = 128  # its exit code after SIGINT, when nothing else went wrong


def require(tool: str) -> str:
    """The path of a client."""
    found = shutil.which(tool, path=PATH)
    assert found, f"{tool} is missing: apt-get install {PACKAGES[tool]}"
    return found


def run(tool: str, *arguments: str | Path, expect: int = 0, text_in: str | None = None) -> str:
    """Run a client to its end; what it said on stdout."""
    done = subprocess.run(
        [require(tool), *map(str, arguments)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S, input=text_in,
    )  # fmt: skip
    assert done.returncode == expect, f"{tool} {arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def nbdsh(script: str, *arguments: str) -> str:
    """Run a Python script in which `h` is a libnbd handle that is not connected and `uri` its arguments."""
    return run("nbdsh", "-c", f"uri = {list(arguments)!r}", "-c", script)


def qemu_io(uri: str, *commands: str) -> str:
    """Run qemu-io's commands; one that fails, or finds another pattern, fails the test."""
    options = [part for command in commands for part in ("-c", command)]
    said = run("qemu-io", "-f", "raw", *options, uri)
    assert "failed" not in said, said
    return said


def start(tool: str, *arguments: str | Path, stdout: IO[str] | int = subprocess.PIPE) -> "subprocess.Popen[str]":
    """Start a client in the background; one that says much needs a file as its stdout, as nobody empties the pipe."""
    return subprocess.Popen(
        [require(tool), *map(str, arguments)],
        env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _fio_command(uri: str, options: dict[str, object]) -> list[str]:
    fixed = {"name": "test", "ioengine": "nbd", "uri": uri, "output-format": "json", "verify_state_save": 0}
    given: dict[str, object] = {**fixed, **options}
    return [f"--{key}={value}" for key, value in given.items()]


def _fio_result(said: str, code: int, stderr: str, good: int = 0) -> Sequence[dict[str, Any]]:
    assert code == good, f"fio ended with {code}:\n{stderr}\n{said[:3000]}"
    jobs: list[dict[str, Any]] = json.loads(said[said.index("{") :])["jobs"]
    assert [job["error"] for job in jobs] == [0] * len(jobs), stderr
    return jobs


def fio(uri: str, **options: object) -> Sequence[dict[str, Any]]:
    """Run fio to its end, without errors; its jobs' results."""
    arguments = _fio_command(uri, {key.replace("__", "-"): value for key, value in options.items()})
    done = subprocess.run(
        [require("fio"), *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S, cwd="/tmp"
    )
    return _fio_result(done.stdout, done.returncode, done.stderr)


class Load:
    """A running fio that writes and verifies; `finish` ends it and fails if it saw an error."""

    def __init__(self, uri: str, jobs: int = 2, size: str = "8M") -> None:
        options = {
            "rw": "randwrite", "bs": "4k", "iodepth": 8, "numjobs": jobs, "size": size, "offset_increment": size,
            "verify": "crc32c", "verify_fatal": 1, "verify_backlog": 128, "time_based": 1, "runtime": LOAD_S_MAX,
        }  # fmt: skip
        self._process = subprocess.Popen(
            [require("fio"), *_fio_command(uri, options)],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/tmp",
        )  # fmt: skip

        deadline_s = time.monotonic() + TIMEOUT_S
        while self.running and len(self._jobs()) < jobs and time.monotonic() < deadline_s:
            time.sleep(0.01)  # a signal before it has made its jobs would simply end it

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def _jobs(self) -> list[str]:
        pid = self._process.pid
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    def finish(self) -> Sequence[dict[str, Any]]:
        """Let it finish what it has under way."""
        assert self.running, f"fio has ended by itself: {self._process.communicate()}"
        self._process.send_signal(signal.SIGINT)
        said, stderr = self._process.communicate(timeout=TIMEOUT_S)
        return _fio_result(said, self._process.returncode, stderr, good=_FIO_INTERRUPTED)

    def end(self) -> None:
        """Whatever happened. Each of its jobs is a process in a session of its own."""
        jobs: list[str] = []
        if self.running:
            self._process.send_signal(signal.SIGSTOP)
            jobs = self._jobs()
        for pid in jobs:
            os.kill(int(pid), signal.SIGKILL)
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def load(uri: str, jobs: int = 2, size: str = "8M") -> Iterator[Load]:
    """Write and verify in the background."""
    running = Load(uri, jobs, size)
    try:
        yield running
    finally:
        running.end()
