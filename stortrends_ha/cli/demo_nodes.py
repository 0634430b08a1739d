"""The demo's node processes: started, watched, and stopped, whoever started them.

Invariants: a node started here gets SIGTERM when the demo dies, by whatever means; a node that a person
started again in its place is found through its control socket, and is stopped with the others.
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
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from stortrends_ha.cli import client
from stortrends_ha.cli.client import NoAnswer, NodeStatus
from stortrends_ha.cli.demo_layout import Layout
from stortrends_ha.errors import StartError
from stortrends_ha.node.process import describe_end

# A node lets its data processes end within 12 s.
STOP_S = 15.0
LOG_TAIL_BYTES = 4096

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)


@dataclass(slots=True)
class DemoNode:
    """One node of the demo; `pid` is the process that is the node now, None while it is gone."""

    name: str
    layout: Layout
    command: list[str] = field(init=False)
    pid: int | None = field(init=False, default=None)
    _process: subprocess.Popen[bytes] | None = field(init=False, default=None)
    _log_start_bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Fix the command, so that it is the same when it is printed and when it is run."""
        self.command = [*own_command(), "node", "--config", str(self.layout.config), "--name", self.name]

    def start(self) -> None:
        """Run the command, with its log in the node's directory."""
        with self.layout.log(self.name).open("ab") as log:
            self._log_start_bytes = log.tell()
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then stops the nodes
                preexec_fn=_die_with_parent,
            )  # fmt: skip
        self.pid = self._process.pid

    def status(self) -> NodeStatus | None:
        """What the node says of itself, or None if it does not answer."""
        with contextlib.suppress(NoAnswer):
            return client.status(self.layout.control(self.name))
        return None

    def look(self) -> str | None:
        """See whether the node went or came back; the news in a sentence, or None without any."""
        if self._process and self._process.poll() is not None:
            end, self._process, self.pid = describe_end(self._process.returncode), None, None
            return f"{self.name} {end}. The demo goes on; to start it again:\n  {shlex.join(self.command)}"
        if self._process:
            return None
        status, before = self.status(), self.pid
        self.pid = status["pid"] if status else None
        if self.pid == before:
            return None
        return f"{self.name} runs again (pid {self.pid})." if self.pid else f"{self.name} is gone again."

    def require_running(self) -> None:
        """Raise `StartError`, with what it logged, if the process that was started has ended."""
        if self._process and self._process.poll() is not None:
            raise StartError(f"{self.name} {describe_end(self._process.returncode)}. {self.last_words()}")

    def last_words(self) -> str:
        """The end of what it logged since it was started."""
        path = self.layout.log(self.name)
        with path.open("rb") as log:
            size_bytes = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start_bytes, size_bytes - LOG_TAIL_BYTES))
            text = log.read().decode(errors="replace").rstrip()
        return f"Its log {path} ends with:\n{text}" if text else f"Its log {path} is empty."

    def reap(self) -> None:
        """Collect the exit code of the process that was started here."""
        if self._process:
            self._process.wait()


def own_command() -> list[str]:
    """The command that runs this program, from any directory."""
    typed = shutil.which(sys.argv[0]) if Path(sys.argv[0]).name == "stortrends-ha" else None
    for script in (typed, Path(sys.executable).with_name("stortrends-ha")):
        if script and os.access(script, os.X_OK):
            return [os.path.abspath(script)]
    return [sys.executable, "-m", "stortrends_ha"]


def _die_with_parent() -> None:
    """In the child, before it becomes the node: the demo's blocked signals are not for it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def stop(nodes: Iterable[DemoNode]) -> None:
    """Stop whatever is a node of the demo now: SIGTERM, and SIGKILL for what remains after `STOP_S`."""
    nodes = list(nodes)
    for node in nodes:
        node.look()
    with contextlib.ExitStack() as stack:
        pidfds = [fd for node in nodes if node.pid and (fd := _pidfd(node.pid)) is not None]
        for fd in pidfds:
            stack.callback(os.close, fd)
            _send(fd, signal.SIGTERM)
        for fd in _still_running(pidfds, STOP_S):
            _send(fd, signal.SIGKILL)
        _still_running(pidfds, STOP_S)
    for node in nodes:
        node.reap()


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
