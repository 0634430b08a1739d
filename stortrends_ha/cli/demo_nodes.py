"""The demo's processes, two nodes and a witness: started, watched, and stopped, whoever started them.

Invariants: a process started here gets SIGTERM when the demo dies, by whatever means; one that a person started again
in its place is found, a node through its control socket and the witness by its arguments, and is stopped with the
others. Looking never takes longer than `LOOK_S` for a process, even if that hangs.
"""

import contextlib
import ctypes
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from stortrends_ha.cli import client
from stortrends_ha.cli.client import NoAnswer, NodeStatus
from stortrends_ha.cli.demo_layout import NODES, Layout
from stortrends_ha.errors import StartError
from stortrends_ha.node.process import describe_end

# A node lets its data processes end within 12 s.
STOP_S = 15.0
LOOK_S = 0.5
LOG_TAIL_BYTES = 4096

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)


class DemoProcess(ABC):
    """One process of the demo; `pid` is the process that plays this part now, None while it is gone."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self.command = [*own_command(), *arguments]  # the same when it is printed and when it is run
        self.pid: int | None = None
        self._log = log
        self._log_start_bytes = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run the command, with its log in a file."""
        with self._log.open("ab") as log:
            self._log_start_bytes = log.tell()
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then stops the others
                preexec_fn=_die_with_parent,
            )  # fmt: skip
        self.pid = self._process.pid

    @abstractmethod
    def find(self) -> int | None:
        """The pid of the process that a person started again in its place."""

    def look(self) -> str | None:
        """See whether the process went or came back; the news in a sentence, or None without any."""
        if self._process and self._process.poll() is not None:
            end, self._process, self.pid = describe_end(self._process.returncode), None, None
            return f"{self.name} {end}. The demo goes on; to start it again:\n  {shlex.join(self.command)}"
        if self._process:
            return None
        before, self.pid = self.pid, self.find()
        if self.pid == before:
            return None
        return f"{self.name} runs again (pid {self.pid})." if self.pid else f"{self.name} is gone again."

    def require_running(self) -> None:
        """Raise `StartError`, with what it logged, if the process that was started has ended."""
        if self._process and self._process.poll() is not None:
            raise StartError(f"{self.name} {describe_end(self._process.returncode)}. {self.last_words()}")

    def last_words(self) -> str:
        """The end of what it logged since it was started."""
        with self._log.open("rb") as log:
            size_bytes = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start_bytes, size_bytes - LOG_TAIL_BYTES))
            text = log.read().decode(errors="replace").rstrip()
        return f"Its log {self._log} ends with:\n{text}" if text else f"Its log {self._log} is empty."

    def reap(self) -> None:
        """Collect the exit code of the process that was started here."""
        if self._process:
            self._process.wait()


class DemoNode(DemoProcess):
    """One node of the demo."""

    def __init__(self, name: str, layout: Layout) -> None:
        super().__init__(name, ["node", "--config", str(layout.config), "--name", name], layout.log(name))
        self._control = layout.control(name)

    def status(self) -> NodeStatus | None:
        """What the node says of itself, or None if it does not answer."""
        with contextlib.suppress(NoAnswer):
            return client.status(self._control, LOOK_S)
        return None

    def find(self) -> int | None:
        """Who answers at the node's control socket."""
        status = self.status()
        return status["pid"] if status else None


class DemoWitness(DemoProcess):
    """The witness of the demo."""

    def __init__(self, layout: Layout) -> None:
        self._arguments = ["witness", "--listen", layout.witness, "--state", str(layout.witness_dir)]
        super().__init__("The witness", self._arguments, layout.witness_log)

    def find(self) -> int | None:
        """Who runs with the witness's arguments."""
        ends = b"".join(os.fsencode(argument) + b"\0" for argument in ["", *self._arguments])
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if path.read_bytes().endswith(ends):
                    return int(path.parent.name)
        return None


class Demo:
    """All of it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.witness = DemoWitness(layout)
        self.nodes = [DemoNode(name, layout) for name in NODES]

    @property
    def processes(self) -> list[DemoProcess]:
        """In the order in which they are started."""
        return [self.witness, *self.nodes]


def own_command() -> list[str]:
    """The command that runs this program, from any directory."""
    typed = shutil.which(sys.argv[0]) if Path(sys.argv[0]).name == "stortrends-ha" else None
    for script in (typed, Path(sys.executable).with_name("stortrends-ha")):
        if script and os.access(script, os.X_OK):
            return [os.path.abspath(script)]
    return [sys.executable, "-m", "stortrends_ha"]


def _die_with_parent() -> None:
    """In the child, before it becomes the daemon: the demo's blocked signals are not for it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def stop(processes: Iterable[DemoProcess]) -> None:
    """Stop whatever plays a part in the demo now: SIGTERM, and SIGKILL for what remains after `STOP_S`."""
    processes = list(processes)
    for process in processes:
        process.look()
    with contextlib.ExitStack() as stack:
        pidfds = [fd for process in processes if process.pid and (fd := _pidfd(process.pid)) is not None]
        for fd in pidfds:
            stack.callback(os.close, fd)
            _send(fd, signal.SIGTERM)
        for fd in _still_running(pidfds, STOP_S):
            _send(fd, signal.SIGKILL)
        _still_running(pidfds, STOP_S)
    for process in processes:
        process.reap()


def _pidfd(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.pidfd_open(pid)
    return None


def _send(pidfd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def _still_running(pidfds: Iterable[int], patience_s: float) -> set[int]:
    """Wait for the processes to end; those that have not after `patience_s`."""
    running, deadline_s = set(pidfds), time.monotonic() + patience_s
    while running and (left_s := deadline_s - time.monotonic()) > 0:
        running.difference_update(select.select(running, (), (), left_s)[0])
    return running
