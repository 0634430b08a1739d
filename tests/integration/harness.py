"""Real nodes for the integration tests: started from a cluster file on free ports, asked, killed, compared.

Job: one `Cluster` is two `stortrends-ha node` processes, and a witness if it is to decide by itself, with their state
in one directory.
Invariants: whatever a test does, `close` leaves no process behind, and fails the test if a log holds a traceback.
Waiting is always for a condition, with a deadline.
"""

import contextlib
import copy
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from files import MIB, differences, make_sparse

import stortrends_ha
from stortrends_ha.unix_path import address_of

GROUP = "rg-a"
OWNER, SECONDARY = "node-a", "node-b"
PROGRAM = (sys.executable, "-m", "stortrends_ha")
SOURCE_DIR = str(Path(stortrends_ha.__file__).parents[1])
# A loaded machine with two cores: Python itself takes more than a second to start there.
PATIENCE_S = 30.0
POLL_S = 0.02
# Longer than a node takes to be killed and started again.
PATIENT = {"suspect_after_s": 20, "lease_s": 25}
# Below the range from which Linux takes the ports of outgoing connections.
_PORTS = range(11000, 32000)
T = TypeVar("T")


def program_environment() -> dict[str, str]:
    """The environment in which `PROGRAM` finds the package, installed or not."""
    return {**os.environ, "PYTHONPATH": SOURCE_DIR}


def wait_for(what: str, probe: Callable[[], T | None], within_s: float = PATIENCE_S) -> T:
    """The first true result of `probe`."""
    deadline_s = time.monotonic() + within_s
    while not (found := probe()):
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        time.sleep(POLL_S)
    return found


def free_ports(count: int) -> list[int]:
    """So many consecutive ports of 127.0.0.1 that nobody uses."""
    while True:
        first = random.choice(_PORTS)
        ports = list(range(first, first + count))
        if all(_is_free(port) for port in ports):
            return ports


def _is_free(port: int) -> bool:
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            for probe in (tcp, udp):
                probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def make_key(path: Path) -> Path:
    """A new key file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o600)
    path.write_text(os.urandom(32).hex())
    return path


def command(control: Path, **request: Any) -> dict[str, Any]:
    """What the node behind a control socket answers to a command."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_S)
        with address_of(control) as address:
            connection.connect(address)
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile() as file:
            answer: dict[str, Any] = json.loads(file.readline())
    assert answer["ok"], answer
    return answer


def ask(control: Path) -> dict[str, Any]:
    """The status of the node behind a control socket."""
    status: dict[str, Any] = command(control, command="status")["status"]
    return status


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def memory_mib(pid: int, what: str) -> float:
    """`VmHWM` (the most there ever was) or `VmRSS` of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) / 1024


class Daemon:
    """One process of ours, which may be running or not."""

    def __init__(self, name: str, log_path: Path, command: list[str]) -> None:
        self.name = name
        self.log_path = log_path
        self.command = command
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Start it. Does not wait."""
        assert self._process is None
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, env=program_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def log_since(self) -> Callable[[], str]:
        """What it will have logged from now on."""
        start = len(self.log)
        return lambda: self.log[start:]

    def end(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def ask_to_stop(self) -> None:
        """SIGTERM. Does not wait."""
        assert self._process is not None
        self._process.terminate()

    def stop(self) -> None:
        """SIGTERM; it must end cleanly."""
        self.ask_to_stop()
        self.wait_stopped()

    def wait_stopped(self) -> None:
        """It was asked to stop, and must end cleanly."""
        process, self._process = self._process, None
        assert process is not None
        try:
            code = process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        assert code == 0, f"{self.name} ended with {code}:\n{self.log[-3000:]}"

    def ended(self, within_s: float = PATIENCE_S) -> int:
        """Its exit code, once it has ended by itself."""
        assert self._process is not None
        code = self._process.wait(within_s)
        self._process = None
        return code

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None


class Witness(Daemon):
    """The third machine's daemon."""

    def __init__(self, directory: Path, port: int, key_file: Path) -> None:
        state = directory / "witness"
        command = [*PROGRAM, "witness", "--listen", f"127.0.0.1:{port}", "--state", str(state)]
        super().__init__("witness", directory / "witness.log", command)
        keys = state / "keys"
        keys.mkdir(parents=True)
        (keys / "test.key").touch(0o600)
        (keys / "test.key").write_text(key_file.read_text())


class Node(Daemon):
    """One `stortrends-ha node`, which may be running or not."""

    def __init__(self, name: str, directory: Path, spec: Mapping[str, Any]) -> None:
        self.spec = spec
        self.config = directory / f"{name}.yaml"
        self.state_dir = directory / name
        self.control = self.state_dir / "control.sock"
        super().__init__(
            name, directory / f"{name}.log", [*PROGRAM, "node", "--config", str(self.config), "--name", name]
        )

    def start(self, spec: Mapping[str, Any] | None = None) -> None:
        """Start it, with its own idea of the cluster if a `spec` is given. Does not wait."""
        self.config.write_text(json.dumps(spec or self.spec))
        self.launch()

    def status(self) -> dict[str, Any]:
        return ask(self.control)

    def group(self) -> dict[str, Any]:
        """Its status of the group; empty while it does not answer."""
        try:
            group: dict[str, Any] = self.status()["groups"][GROUP]
        except (OSError, ValueError):
            return {}
        return group

    def wait(
        self, what: str, is_so: Callable[[dict[str, Any]], object], within_s: float = PATIENCE_S
    ) -> dict[str, Any]:
        """Wait until the status of the group is so."""
        last: dict[str, Any] = {}

        def probe() -> dict[str, Any] | None:
            last.clear()
            last.update(self.group())
            return dict(last) if last and is_so(last) else None

        try:
            return wait_for(f"{self.name} {what}", probe, within_s)
        except AssertionError as e:
            raise AssertionError(f"{e}\nstatus: {last}\nlog of {self.name}:\n{self.log[-3000:]}") from None

    def wait_state(self, state: str, within_s: float = PATIENCE_S) -> dict[str, Any]:
        return self.wait(f"is {state}", lambda group: group["state"] == state, within_s)

    def wait_ready(self) -> None:
        wait_for(f"{self.name} is ready", lambda: f"Node {self.name} is ready" in self.log)

    @property
    def data_pid(self) -> int:
        pid: int = self.wait("has a data process", lambda group: group["pid"])["pid"]
        return pid

    def kill(self) -> None:
        """SIGKILL to the node; returns when its data processes are gone, too."""
        data_pid = self.group().get("pid")
        self.end()
        if data_pid:
            wait_for("its data process dies with the node", lambda: not is_running(data_pid), 10)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """SIGSTOP to the node and its data process, as if the machine hung; continued at the end."""
        pids = (self.data_pid, self.pid)
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def ask_to_stop_for_good(self) -> bool:
        """At the end of a test, whatever happened to it; whether it can be expected to stop."""
        if not self.running or not (data_pid := self.group().get("pid")):
            return False  # not there, still starting, or stuck
        os.kill(data_pid, signal.SIGCONT)
        self.ask_to_stop()
        return True


def _serves(group: Mapping[str, Any]) -> bool:
    return bool(group) and group["role"] == "primary" and group["serving"]


class Cluster:
    """Two nodes with one group of volumes, at first owned by node-a.

    Without ``witness`` the arbiter is the consent of both nodes: when one is away, nothing changes by itself.
    ``failover`` as in the configuration; PATIENT: what is quickly back is not missed.
    """

    def __init__(
        self,
        directory: Path,
        volumes: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        size_bytes: int = 64 * MIB,
        limits: Mapping[str, Any] | None = None,
        failover: Mapping[str, Any] | None = None,
        witness: bool = False,
        unix_socket: bool = False,
    ) -> None:
        self.directory = directory
        self.ports = free_ports(8)
        self.key_file = make_key(directory / "cluster.key")
        self.spec = self._spec(volumes or {"vm-a": {}}, size_bytes, unix_socket) | {
            "arbiter": {"kind": "witness", "address": f"127.0.0.1:{self.ports[7]}"} if witness else {"kind": "manual"},
            "failover": dict(failover or {}),
            "limits": dict(limits or {}),
        }
        for volume in self.volumes:
            for node in (OWNER, SECONDARY):
                make_sparse(self.backing(node, volume), self.size_bytes(volume))
        self.nodes = {name: Node(name, directory, self.spec) for name in (OWNER, SECONDARY)}
        self.witness = Witness(directory, self.ports[7], self.key_file) if witness else None

    def _spec(self, volumes: Mapping[str, Mapping[str, Any]], size_bytes: int, unix_socket: bool) -> dict[str, Any]:
        group: dict[str, Any] = {
            "preferred_owner": OWNER,
            "nbd": f"127.0.0.1:{self.ports[0]}",
            "link_ports": {OWNER: self.ports[1], SECONDARY: self.ports[2]},
            "volumes": {
                name: {
                    "size": size_bytes,
                    "backing": {node: str(self.directory / node / f"{name}.img") for node in (OWNER, SECONDARY)},
                    **keys,
                }
                for name, keys in volumes.items()
            },
        }
        if unix_socket:
            group["nbd_unix"] = {node: str(self.directory / f"{node}.nbd") for node in (OWNER, SECONDARY)}
        nodes = {
            node: {
                "address": "127.0.0.1",
                "state_dir": str(self.directory / node),
                "metrics": f"127.0.0.1:{metrics}",
                "heartbeat": [f"127.0.0.1:{heartbeat}"],
            }
            for node, metrics, heartbeat in zip((OWNER, SECONDARY), self.ports[3:5], self.ports[5:7], strict=True)
        }
        return {"cluster": "test", "key_file": str(self.key_file), "nodes": nodes, "groups": {GROUP: group}}

    def changed_spec(self, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """A copy of the cluster file's content, changed."""
        spec = copy.deepcopy(self.spec)
        change(spec)
        return spec

    # --- What there is ---

    @property
    def volumes(self) -> dict[str, Any]:
        found: dict[str, Any] = self.spec["groups"][GROUP]["volumes"]
        return found

    def size_bytes(self, volume: str = "vm-a") -> int:
        size: int = self.volumes[volume]["size"]
        return size

    def backing(self, node: str, volume: str = "vm-a") -> Path:
        return Path(self.volumes[volume]["backing"][node])

    def backings(self, volume: str = "vm-a") -> Iterator[Path]:
        return (self.backing(node, volume) for node in (OWNER, SECONDARY))

    @property
    def owner(self) -> Node:
        """node-a, the preferred owner."""
        return self.nodes[OWNER]

    @property
    def secondary(self) -> Node:
        """node-b."""
        return self.nodes[SECONDARY]

    def wait_served_by(self, name: str) -> dict[str, Any]:
        """Wait until a node answers clients."""
        return self.nodes[name].wait("serves", _serves)

    @property
    def serving(self) -> Node:
        """The node that answers clients, as soon as there is one."""
        return wait_for(
            "a node serves", lambda: next((node for node in self.nodes.values() if _serves(node.group())), None)
        )

    @property
    def nbd_port(self) -> int:
        return self.ports[0]

    @property
    def link_port(self) -> int:
        """Where the secondary listens for the owner."""
        return self.ports[2]

    def uri(self, volume: str = "vm-a") -> str:
        return f"nbd://127.0.0.1:{self.nbd_port}/{volume}"

    def unix_uri(self, volume: str = "vm-a") -> str:
        return f"nbd+unix:///{volume}?socket={self.unix_path}"

    @property
    def unix_path(self) -> str:
        """Of the owner's NBD socket."""
        path: str = self.spec["groups"][GROUP]["nbd_unix"][OWNER]
        return path

    def state_file(self, node: str) -> Path:
        return self.nodes[node].state_dir / "groups" / f"{GROUP}.json"

    # --- What happens to it ---

    def start(self) -> "Cluster":
        """Start whatever does not run and wait until both nodes are in sync."""
        if self.witness and not self.witness.running:
            self.witness.launch()
        for node in self.nodes.values():
            if not node.running:
                node.start()
        return self.wait_in_sync()

    def wait_in_sync(self, within_s: float = PATIENCE_S) -> "Cluster":
        """Wait until both nodes say so, the owner has its lease, and they mean the same record."""
        for node in self.nodes.values():
            node.wait_state("in-sync", within_s)
        wait_for("both have the same record", lambda: len({node.group()["epoch"] for node in self.nodes.values()}) == 1)
        return self

    def move(self, to: str) -> None:
        """Hand the group over, if it is not there; returns when it is served there, in sync."""
        command(self.nodes[to].control, command="move", group=GROUP, to=to)
        self.wait_served_by(to)
        self.wait_in_sync()

    def counter(self, name: str, node: str = OWNER) -> int:
        value: int = self.nodes[node].group()["counters"][name]
        return value

    def written(self) -> int:
        """How many writes of clients the node that serves has taken, since its data process started."""
        count: int = self.serving.group()["volumes"]["vm-a"]["counters"]["writes"]
        return count

    def settle(self) -> None:
        """Wait until all clients are gone and nothing of theirs is in flight, as a status newer than this call says."""
        serving = self.serving
        before = self.counter("connections_accepted", serving.name)
        with socket.create_connection(("127.0.0.1", self.nbd_port), PATIENCE_S):
            pass
        serving.wait(
            "has nothing in flight",
            lambda group: (
                group["counters"]["connections_accepted"] > before
                and group["state"] == "in-sync"
                and group["clients"] == group["window"]["changes"] == group["window"]["bytes"] == 0
            ),
        )

    def assert_identical(self) -> None:
        """Both replicas of every volume, byte for byte."""
        for volume in self.volumes:
            found = differences(*self.backings(volume))
            assert not found, f"the replicas of {volume} differ: {found}"

    def assert_holds(self, offset: int, data: bytes, volume: str = "vm-a") -> None:
        """Both replicas of a volume hold these bytes."""
        for path in self.backings(volume):
            with path.open("rb") as file:
                file.seek(offset)
                assert file.read(len(data)) == data, f"{path} does not hold what was written at {offset}"

    def close(self) -> None:
        """End whatever still runs, then look for tracebacks."""
        daemons: list[Daemon] = [*self.nodes.values(), *([self.witness] if self.witness else [])]
        try:
            # Both at once, so that nothing is handed over on the way.
            for node in [node for node in self.nodes.values() if node.ask_to_stop_for_good()]:
                node.wait_stopped()
        finally:
            for daemon in daemons:
                if daemon.running:
                    daemon.end()
        for daemon in daemons:
            assert "Traceback" not in daemon.log, daemon.log
