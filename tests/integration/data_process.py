"""Real data processes without a supervisor: a test spawns the two of a group, orders them about and watches them.

Job: what `stortrends_ha.node` does with its end of the channel, as a test needs it. Invariants: every message is kept;
waiting is for a condition, with a deadline; `close` leaves no process behind and fails for a traceback in a log.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from files import MIB, differences, make_sparse
from harness import GROUP, OWNER, PATIENCE_S, SECONDARY, free_ports, program_environment, wait_for

from stortrends_ha.record import Record

A, B = OWNER, SECONDARY
BOTH = (A, B)
Status = dict[str, Any]


def boottime_ns() -> int:
    """The clock of leases."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class OrderRefused(AssertionError):
    """The process answered an order with an error."""


class DataProcess:
    """One data process, running."""

    def __init__(self, name: str, config: Path, log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self._sock, theirs = socket.socketpair()
        with theirs, log_path.open("ab") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "stortrends_ha.dataplane", "--config", str(config), "--node", name,
                 "--group", GROUP, "--channel", str(theirs.fileno()), "--parent", str(os.getpid())],
                pass_fds=[theirs.fileno()], env=program_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.status: Status = {}
        self.statuses: list[Status] = []
        self.failed = ""
        self._ready = threading.Event()
        self._done: dict[int, queue.Queue[str]] = {}
        self._changed = threading.Condition()
        self._number = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def _read(self) -> None:
        with self._sock.makefile("rb") as lines, contextlib.suppress(ConnectionError):
            for line in lines:
                self._take(json.loads(line))

    def _take(self, message: dict[str, Any]) -> None:
        kind = message.pop("type")
        if kind == "done":
            self._done[message["id"]].put(message["error"])
        elif kind == "ready":
            self._ready.set()
        else:
            with self._changed:
                if kind == "failed":
                    self.failed = message["message"]
                else:
                    self.status = message
                    self.statuses.append(message)
                self._changed.notify_all()

    # --- Commands -------------------------------------------------------------------------------

    def wait_ready(self) -> "DataProcess":
        assert self._ready.wait(PATIENCE_S), self.failed + self.log
        return self

    def send(self, kind: str, **message: Any) -> None:
        with self._changed:
            self._sock.sendall(json.dumps({"type": kind, **message}).encode() + b"\n")

    def begin(self, kind: str, **message: Any) -> Callable[[], str]:
        """Order something; the function waits for its answer and returns the error."""
        self._number += 1
        answers = self._done[self._number] = queue.Queue()
        self.send(kind, id=self._number, **message)
        return lambda: answers.get(timeout=PATIENCE_S)

    def order(self, kind: str, **message: Any) -> None:
        if error := self.begin(kind, **message)():
            raise OrderRefused(error)

    def lead(
        self,
        record: Record,
        not_before_ns: int = 0,
        forced: bool = False,
        clears_loss: bool = False,
        lease: bool = True,
    ) -> None:
        answer = self.begin(
            "lead", record=record.encode(), not_before_ns=not_before_ns, forced=forced, clears_loss=clears_loss
        )
        if error := answer():
            raise OrderRefused(error)
        if lease:
            self.lease()

    def follow(self, record: Record) -> None:
        self.order("follow", record=record.encode())

    def lease(self, for_s: float = 3600) -> None:
        self.send("lease", until_ns=boottime_ns() + int(for_s * 1e9))

    # --- Watching -------------------------------------------------------------------------------

    def wait(self, what: str, is_so: Callable[[Status], object], within_s: float = PATIENCE_S) -> Status:
        """The first status that is so; the newest counts."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.status and is_so(self.status), within_s):
                raise AssertionError(f"{self.name}: not within {within_s:g} s: {what}\n{self.status}\n{self.log}")
            return self.status

    def wait_state(self, state: str) -> Status:
        return self.wait(f"is {state}", lambda status: status["state"] == state)

    def state_file(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.log_path.parent / self.name / "groups" / f"{GROUP}.json").read_text())
        return found

    @property
    def log(self) -> str:
        return self.log_path.read_text()[-4000:]

    # --- The end --------------------------------------------------------------------------------

    def stop(self) -> None:
        self.send("stop")
        assert self._popen.wait(PATIENCE_S) == 0, self.log
        self._reader.join(PATIENCE_S)
        self._sock.close()

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._reader.join(PATIENCE_S)
        self._sock.close()

    @property
    def running(self) -> bool:
        return self._popen.poll() is None


class Pair:
    """The two data processes of a group, each started when it is asked for."""

    def __init__(self, directory: Path, limits: Mapping[str, Any] | None = None, **volume: Any) -> None:
        self.directory = directory
        self.ports = free_ports(9)
        self.volume = volume
        self.config = directory / "cluster.yaml"
        self.configure(limits or {})
        (directory / "cluster.key").write_text(os.urandom(32).hex())
        (directory / "cluster.key").chmod(0o600)
        for node in BOTH:
            if not self.backing(node).exists():
                make_sparse(self.backing(node), 16 * MIB)
        self._processes: dict[str, DataProcess] = {}
        self.sockets: list[socket.socket] = []  # of clients; they are closed with the pair

    def configure(self, limits: Mapping[str, Any]) -> None:
        """For data processes that are started from now on."""
        self.config.write_text(json.dumps(self._spec(limits)))

    def _spec(self, limits: Mapping[str, Any]) -> dict[str, Any]:
        nodes = {
            node: {
                "address": "127.0.0.1",
                "state_dir": str(self.directory / node),
                "metrics": f"127.0.0.1:{self.ports[3 + at]}",
                "heartbeat": [f"127.0.0.1:{self.ports[5 + at]}"],
            }
            for at, node in enumerate(BOTH)
        }
        volume = {"size": 16 * MIB, "backing": {node: str(self.backing(node)) for node in BOTH}, **self.volume}
        group = {
            "preferred_owner": A,
            "nbd": f"127.0.0.1:{self.ports[0]}",
            "link_ports": {A: self.ports[1], B: self.ports[2]},
            "volumes": {"vm-a": volume},
        }
        return {
            "cluster": "test",
            "key_file": str(self.directory / "cluster.key"),
            "arbiter": {"kind": "manual"},
            "nodes": nodes,
            "groups": {GROUP: group},
            "limits": {"link_timeout_s": 1, **limits},
        }

    @property
    def nbd_port(self) -> int:
        return self.ports[0]

    def backing(self, node: str) -> Path:
        return self.directory / node / "vm-a.img"

    def start(self, name: str) -> DataProcess:
        before = self._processes.get(name)
        assert before is None or not before.running
        process = DataProcess(name, self.config, self.directory / f"{name}.log")
        self._processes[name] = process
        return process.wait_ready()

    def in_sync(self) -> tuple[DataProcess, DataProcess, Record]:
        """Both started, filled and joined, node-a the owner: what a supervisor does with a new group."""
        first = Record(1, A, (A,))
        owner, secondary = self.start(A), self.start(B)
        owner.lead(first)
        secondary.follow(first)
        return owner, secondary, self.join(owner, secondary, first)

    @staticmethod
    def join(owner: DataProcess, secondary: DataProcess, record: Record) -> Record:
        """Add the secondary to the record, when it has everything."""
        owner.wait("the secondary can be added", lambda status: status["joinable"])
        joined = record.joined_by(secondary.name)
        secondary.follow(joined)
        owner.lead(joined)
        owner.wait("is in sync", lambda status: status["state"] == "in-sync" and status["serving"])
        secondary.wait_state("in-sync")
        return joined

    def assert_identical(self) -> None:
        found = differences(self.backing(A), self.backing(B))
        assert not found, found

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for process in self._processes.values():
            process.kill()
        for connection in self.sockets:
            connection.close()
        if error is None:
            for process in self._processes.values():
                assert "Traceback" not in process.log_path.read_text(), process.log


def wait_exists(path: Path) -> None:
    """Until a file is there."""
    wait_for(f"{path} exists", path.exists)
