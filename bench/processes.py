"""Processes: those of the servers that are measured, and how much CPU time they use.

Invariant: every process started here is stopped by `Processes.stop`, the last first, with its descendants.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.errors import BenchError

PACKAGES = {
    "fio": "fio",
    "ip": "iproute2",
    "nbdkit": "nbdkit",
    "nft": "nftables",
    "qemu-storage-daemon": "qemu-system-common",
}
STOP_S = 20.0
POLL_S = 0.05
LOG_TAIL_CHARACTERS = 800


class Used(NamedTuple):
    """A process's parent, and the CPU time that it and those of its children that have ended used."""

    parent: int
    cpu_s: float


def require(program: str) -> None:
    """Raise BenchError if a program is not installed."""
    if not shutil.which(program):
        raise BenchError(f"{program} is missing (Debian package {PACKAGES[program]})")


class Processes:
    """Servers as child processes, with their output in files of `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(self, name: str, command: Sequence[str | Path]) -> int:
        """Start a server; returns its pid. `output` has what it prints."""
        with self.output(name).open("wb") as out, self._log(name).open("wb") as err:
            # In a session of its own: Ctrl-C reaches the benchmark alone, which then stops the servers.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        self._running.append((name, process))
        return process.pid

    def output(self, name: str) -> Path:
        """The file with a server's stdout."""
        return self.directory / f"{name}.out"

    def wait_until(self, ready: Callable[[], bool], name: str, timeout_s: float) -> None:
        """Wait until `ready`; BenchError if the server `name` ends before or takes too long."""
        deadline_s = time.monotonic() + timeout_s
        while not ready():
            self._check(name)
            if time.monotonic() > deadline_s:
                raise BenchError(f"{name} was not ready within {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End all that was started."""
        while self._running:
            name, process = self._running.pop()
            family = _family([process.pid], _table())
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
                continue
            print(f"{name} did not end within {STOP_S:.0f} s: killed.", flush=True)
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    def _check(self, name: str) -> None:
        code = dict(self._running)[name].poll()
        if code is not None:
            said = self._log(name).read_text(errors="replace").strip()[-LOG_TAIL_CHARACTERS:]
            raise BenchError(f"{name} ended with status {code}: {said}")

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.err"


def cpu_seconds(pids: Sequence[int]) -> float:
    """What these processes and all their descendants have used."""
    table = _table()
    return sum(table[pid].cpu_s for pid in _family(pids, table))


def machine_cpu_seconds() -> float:
    """What everything on the machine has used, and on a virtual machine its neighbours."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def memory_available_mib() -> int:
    """What the page cache can grow to without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) // 1024


def _table() -> dict[int, Used]:
    table = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            # proc(5): from the third field on; before it is the name, in which anything may stand.
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            ticks = sum(map(int, fields[11:15]))
            table[int(stat.parent.name)] = Used(int(fields[1]), ticks / os.sysconf("SC_CLK_TCK"))
    return table


def _family(pids: Sequence[int], table: dict[int, Used]) -> set[int]:
    found = set(pids) & table.keys()
    while more := {pid for pid, used in table.items() if used.parent in found} - found:
        found |= more
    return found
