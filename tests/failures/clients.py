"""Clients that work all the time: raw NBD, QEMU and libnbd, each in a part of the volume of its own.

Invariants: `under_load` ends only when every client has got every answer, without a single error, and has read back
all that it wrote; then the replicas are compared. Whatever happens in it, no client is left behind.
Neighbours: `load` and `libnbd_load` are the programs; QEMU's NBD client is the one of `qemu-storage-daemon`, which
gives the volume on to a raw client over a Unix socket.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import PATIENCE_S, program_environment, wait_for

from .blocks import BLOCK_BYTES
from .cluster import FAILOVER_S, GROUP, VOLUME_BYTES, Cluster
from .network import Machine

# Each of the clients has a part of this size.
PART_BLOCKS = VOLUME_BYTES // BLOCK_BYTES // 4
# Requests a second of each client: so few that a test's machine is not busy with them.
RAW_RATE, QEMU_RATE, LIBNBD_RATE = 500, 200, 100
# An answer that came after an event is one of these; more, so that the queue has been answered, too.
ANSWERS_AFTER = 40
# A stall of a planned move, or of what is no reason to move, is shorter by far; on a busy machine it may take this.
PLANNED_S = 2.0
# Each of the clients asks several times between the first and the last of these.
HELD_LOOKS = 6
# QEMU repeats the requests that a lost connection left unanswered for so long: longer than anything here takes.
QEMU_RECONNECT_S = 60
DEBIAN_PYTHON = "/usr/bin/python3"


@dataclass(frozen=True, slots=True)
class Report:
    """What a client has seen so far; times of CLOCK_MONOTONIC."""

    answered: int
    connects: int
    finished: bool
    errors: list[str]
    stalls: list[tuple[float, float]]

    def stall_since(self, moment_s: float) -> float:
        """The longest time without an answer that ended after that moment."""
        return max((end - begin for begin, end in self.stalls if end >= moment_s), default=0.0)


class Load:
    """A client as a program on the client's machine."""

    def __init__(self, name: str, machine: Machine, command: Sequence[str | Path], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                machine.command(command),
                env=program_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )

    def _ask(self, word: str) -> Report:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise AssertionError(f"{self.name} has ended:\n{self._log.read_text()}") from None
        line = self._process.stdout.readline()
        assert line, f"{self.name} has ended:\n{self._log.read_text()}"
        return Report(**json.loads(line))

    def report(self) -> Report:
        return self._ask("report")

    def wait_answers(self, count: int = ANSWERS_AFTER, within_s: float = FAILOVER_S) -> Report:
        """Wait for so many more answers."""
        before = self.report().answered
        wait_for(f"{self.name} gets answers", lambda: self.report().answered >= before + count, within_s)
        return self.report()

    def finish(self) -> Report:
        """It reads back all it wrote; what it has seen."""
        self._ask("finish")
        wait_for(f"{self.name} has read back what it wrote", lambda: self.report().finished)
        return self.report()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Clients:
    """All clients of a test."""

    def __init__(self, cluster: Cluster, loads: Sequence[Load]) -> None:
        self._cluster = cluster
        self.loads = loads

    def wait_answers(self, within_s: float = FAILOVER_S) -> None:
        """Everybody gets answers."""
        for load in self.loads:
            load.wait_answers(within_s=within_s)

    def reports(self) -> dict[str, Report]:
        return {load.name: load.report() for load in self.loads}

    def assert_no_errors(self) -> None:
        errors = {name: report.errors for name, report in self.reports().items() if report.errors}
        assert not errors, errors

    def wait_known(self) -> "Clients":
        """All nodes that run know them, to tell them to reconnect when they hear nothing of their owner, not even its
        end."""

        def known() -> bool:
            connected = self._cluster.client.connections(self._cluster.nbd())
            every = [node.known_clients() for node in self._cluster.nodes.values() if node.running]
            return len(connected) == len(self.loads) and all(each == connected for each in every)

        wait_for("the nodes know all clients", known)
        return self

    @contextmanager
    def event(self, within_s: float = FAILOVER_S, *, stall_s: float | None = None) -> Iterator[dict[str, float]]:
        """What happens in the block, and how long each client waited: known after it, when all get answers again.
        None may have waited for `stall_s`."""
        stalls: dict[str, float] = {}
        began_s = time.monotonic()
        yield stalls
        self.wait_answers(within_s)
        stalls.update({name: report.stall_since(began_s) for name, report in self.reports().items()})
        self.assert_no_errors()
        assert stall_s is None or max(stalls.values()) < stall_s, stalls

    def wait_held(self) -> None:
        """Nobody gets an answer, at so many looks: by then everybody has asked, and all that was sent has arrived."""
        seen: list[list[int]] = []

        def held() -> bool:
            seen.append([report.answered for report in self.reports().values()])
            return len(seen) >= HELD_LOOKS and all(of == seen[-1] for of in seen[-HELD_LOOKS:])

        wait_for("clients are held", held)

    def finish(self) -> None:
        for load in self.loads:
            load.finish()
        self.assert_no_errors()


def raw_client(
    cluster: Cluster, *, part: int = 0, group: str = GROUP, to: str = "", name: str = "raw", **options: Any
) -> Load:
    """A raw client of the group's address, or of the Unix socket `to`."""
    options = {"to": to or cluster.nbd(group), "depth": 8, "rate": RAW_RATE, "flush_every": 50, **options}
    return _start(cluster, name, [sys.executable, "-m", "tests.failures.load"], cluster.volume(group), part, options)


def libnbd_client(cluster: Cluster, *, part: int, name: str = "libnbd", **options: Any) -> Load:
    options = {"to": cluster.nbd(), "rate": LIBNBD_RATE, **options}
    return _start(cluster, name, [DEBIAN_PYTHON, "-m", "tests.failures.libnbd_load"], cluster.volume(), part, options)


def _start(cluster: Cluster, name: str, program: list[str], volume: str, part: int, more: dict[str, Any]) -> Load:
    options = {"export": volume, "first": part * PART_BLOCKS, "blocks": PART_BLOCKS, **more}
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    return Load(name, cluster.client, [*program, *arguments], cluster.directory / f"{name}.log")


@contextmanager
def qemu_client(cluster: Cluster, *, part: int, name: str = "qemu", **options: Any) -> Iterator[Load]:
    """QEMU's NBD client, which hides a lost connection from whoever uses its disk; here a raw client."""
    directory = cluster.directory
    socket, pidfile = directory / f"{name}.sock", directory / f"{name}.pid"
    for path in (socket, pidfile):
        path.unlink(missing_ok=True)
    host, _, port = cluster.nbd().rpartition(":")
    command: list[str | Path] = [
        "qemu-storage-daemon", "--pidfile", pidfile,
        "--blockdev", f"driver=nbd,node-name=disk,server.type=inet,server.host={host.strip('[]')},server.port={port},"
        f"export={cluster.volume()},reconnect-delay={QEMU_RECONNECT_S}",
        "--nbd-server", f"addr.type=unix,addr.path={socket}",
        "--export", f"type=nbd,id=export,node-name=disk,name={cluster.volume()},writable=on",
    ]  # fmt: skip
    with (directory / f"{name}-daemon.log").open("ab") as log:
        daemon = subprocess.Popen(
            cluster.client.command(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for("QEMU has attached the volume", lambda: pidfile.exists() and socket.exists())
        load = raw_client(cluster, part=part, to=str(socket), name=name, rate=QEMU_RATE, **options)
        try:
            yield load
        finally:
            load.close()
    finally:
        daemon.terminate()
        try:
            daemon.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


@contextmanager
def under_load(cluster: Cluster, *, compare: bool = True, blocks: int = PART_BLOCKS) -> Iterator[Clients]:
    """See the module; `compare`: whether both replicas are to be the same at the end; `blocks`: each client works on so
    many."""
    with ExitStack() as stack:
        loads = [raw_client(cluster, part=0, blocks=blocks), libnbd_client(cluster, part=2, blocks=blocks)]
        for load in loads:
            stack.callback(load.close)
        loads.append(stack.enter_context(qemu_client(cluster, part=1, blocks=blocks)))
        clients = Clients(cluster, loads)
        clients.wait_answers()
        yield clients
        clients.finish()
        reports = clients.reports()
        assert reports["qemu"].connects == 1, "QEMU's own client was disconnected"
    if compare:
        cluster.assert_identical()
