"""A cluster on machines of its own: real daemons, what can happen to them, and what they say.

Job: write the cluster file, run the nodes and the arbiter, kill and stop them, ask them, put all right again.
Invariants: whatever a test does, `close` leaves no process behind, and fails if a log holds a traceback. Waiting is
always for a condition, with a deadline.
Neighbours: `network` has the machines, `clients` the load on them.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from files import MIB, differences, make_sparse
from harness import PATIENCE_S, PROGRAM, ask, is_running, make_key, program_environment, wait_for

from .network import IPV4, LAN, NODES, Addressing, Machine, Network, endpoint

GROUP, VOLUME = "rg-a", "vm-a"
OTHER_GROUP, OTHER_VOLUME = "rg-b", "vm-b"
NBD_PORT, LINK_PORT, HEARTBEAT_PORT, WITNESS_PORT = 10809, 7802, 7800, 7801
CLUSTER = "failures"
VOLUME_BYTES = 16 * MIB
# Long enough for any takeover on a busy machine, not so long that a group which never comes back goes unnoticed.
FAILOVER_S = 40.0


class Daemon:
    """A process on a machine, with its log."""

    def __init__(self, machine: Machine, command: Sequence[str | Path], log: Path) -> None:
        self.machine = machine
        self.log_path = log
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self._process is None
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.machine.command(self._command),
                env=program_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # with a share of a busy machine of its own, like a service
            )

    @property
    def running(self) -> bool:
        """Whether it was started and has not been seen to end."""
        return self._process is not None and self._process.poll() is None

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

    def reap(self) -> int:
        """Its exit code, when it has ended."""
        assert self._process is not None
        process, self._process = self._process, None
        return process.wait(PATIENCE_S)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            os.kill(self.pid, signal.SIGKILL)
            self.reap()

    def terminate(self) -> None:
        """SIGTERM; returns when it has ended, which it must do well."""
        os.kill(self.pid, signal.SIGTERM)
        code = self.reap()
        assert code == 0, f"{self._command} ended with {code}:\n{self.log[-3000:]}"


class Node(Daemon):
    """One `stortrends-ha node` on its machine."""

    def __init__(self, machine: Machine, directory: Path, config: Path) -> None:
        self.name = machine.name
        self.state_dir = directory / self.name
        self.state_dir.mkdir()
        command = [*PROGRAM, "node", "--config", str(config), "--name", self.name]
        super().__init__(machine, command, directory / f"{self.name}.log")

    # --- What it says ---

    def status(self) -> dict[str, Any]:
        """Its status; empty while it does not answer."""
        try:
            status: dict[str, Any] = ask(self.state_dir / "control.sock")
        except (OSError, ValueError):
            return {}
        return status

    def group(self, name: str = GROUP) -> dict[str, Any]:
        """Its status of a group; empty while it does not answer."""
        group: dict[str, Any] = self.status().get("groups", {}).get(name, {})
        return group

    def wait(
        self, what: str, is_so: Callable[[dict[str, Any]], object], group: str = GROUP, within_s: float = PATIENCE_S
    ) -> dict[str, Any]:
        """Wait until its status of the group is so."""
        last: dict[str, Any] = {}

        def probe() -> dict[str, Any] | None:
            last.clear()
            last.update(self.group(group))
            return dict(last) if last and is_so(last) else None

        try:
            return wait_for(f"{self.name} {what}", probe, within_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\nstatus: {last}\nlog of {self.name}:\n{self.log[-4000:]}") from None

    def wait_serving(self, group: str = GROUP, within_s: float = FAILOVER_S) -> dict[str, Any]:
        return self.wait(
            "owns the group and serves", lambda of: of["owner"] == self.name and of["serving"], group, within_s
        )

    def wait_held(self, why: str, group: str = GROUP, within_s: float = FAILOVER_S) -> dict[str, Any]:
        """It holds, and says that it is for this."""
        return self.wait(f"is held, as {why}", lambda of: of["state"] == "held" and why in of["why"], group, within_s)

    def wait_path_silent(self, peer_ip: str) -> None:
        """It has not heard its peer on this path for longer than a peer is trusted."""
        peer = f"{peer_ip}:{HEARTBEAT_PORT}"
        wait_for(
            f"{self.name} hears nothing of {peer}",
            lambda: any(of["peer"] == peer and of["silent_s"] > 1 for of in self.status()["heartbeats"]),
        )

    # --- What happens to it ---

    def known_clients(self, group: str = GROUP) -> set[int]:
        """The ports of the clients that it would tell to reconnect, as it keeps them."""
        try:
            return {port for _, port, _, _ in json.loads((self.state_dir / "records" / f"{group}.clients").read_text())}
        except (OSError, ValueError):
            return set()

    def data_pid(self, group: str = GROUP) -> int:
        pid: int = self.wait("has a data process", lambda of: of["pid"], group)["pid"]
        return pid

    def family(self) -> list[int]:
        """Its processes: the supervisor first. Each of its threads has children of its own."""
        threads = Path(f"/proc/{self.pid}/task").iterdir()
        return [self.pid, *(int(child) for thread in threads for child in (thread / "children").read_text().split())]

    def kill(self) -> None:
        """SIGKILL to the supervisor; returns when its data processes are gone, too."""
        if self._process is None:
            return
        family = self.family() if self.running else []
        super().kill()
        wait_for("its data processes die with the node", lambda: not any(map(is_running, family)), 10)

    def kill_data_process(self, group: str = GROUP) -> None:
        os.kill(self.data_pid(group), signal.SIGKILL)

    def signal(self, number: signal.Signals, pids: Sequence[int] = ()) -> None:
        """To all its processes, or to these."""
        for pid in pids or self.family():
            os.kill(pid, number)

    def power_off(self) -> None:
        """Nothing of it is heard again, and it runs no more; what its host had cached is lost to it."""
        self.machine.cables_out()
        self.machine.kill_all()
        if self._process is not None:
            self.reap()
        self.machine.forget_floating_addresses()
        self.machine.new_boot()

    def power_on(self) -> None:
        self.machine.cables_in()
        self.start()


class Witness(Daemon):
    """The witness on its machine."""

    def __init__(
        self, machine: Machine, directory: Path, key: Path, name: str = "witness", port: int = WITNESS_PORT
    ) -> None:
        self.address = endpoint(machine.lan_ip, port)
        self.state_dir = directory / name
        keys = self.state_dir / "keys"
        keys.mkdir(parents=True, mode=0o700)
        own_key = keys / f"{CLUSTER}.key"
        own_key.touch(0o600)
        own_key.write_text(key.read_text())
        command = [*PROGRAM, "witness", "--listen", self.address, "--state", str(self.state_dir)]
        super().__init__(machine, command, directory / f"{name}.log")

    def lose_disk(self) -> None:
        """All its registers; not the keys, which are configuration."""
        for path in self.state_dir.iterdir():
            if path.name != "keys":
                shutil.rmtree(path) if path.is_dir() else path.unlink()


class Cluster:
    """Two nodes, a client's machine, and a witness unless another arbiter is given. The group is at first on node-a."""

    def __init__(
        self,
        directory: Path,
        *,
        arbiter: Mapping[str, Any] | Callable[["Cluster"], Mapping[str, Any]] | None = None,
        two_groups: bool = False,
        backing: Mapping[str, Path] | None = None,
        failback: str = "manual",
        hold_down_s: float = 60,
        addressing: Addressing = IPV4,
    ) -> None:
        """`arbiter` may be made when the machines are there; `backing`: another directory for a node's replicas."""
        self.directory = directory
        self.network = Network(directory, addressing)
        self._addressing = addressing
        self.key = make_key(directory / "cluster.key")
        self.config = directory / "cluster.yaml"
        self._backing = dict(backing or {})
        machines = self.network.machines
        self.nodes = {name: Node(machines[name], directory, self.config) for name in NODES}
        self.witness = None if arbiter else Witness(machines["witness"], directory, self.key)
        witness = {"kind": "witness", "address": self.witness.address} if self.witness else {}
        self.groups = {GROUP: self._group(0, VOLUME, failback)}
        if two_groups:
            self.groups[OTHER_GROUP] = self._group(1, OTHER_VOLUME, failback)
        self._spec = {
            "cluster": CLUSTER,
            "key_file": str(self.key),
            "nodes": {name: self._node(node) for name, node in self.nodes.items()},
            "arbiter": dict(arbiter(self) if callable(arbiter) else arbiter or witness),
            "failover": {"hold_down_s": hold_down_s},
            "groups": self.groups,
        }
        self.change_file()

    def change_file(self, **changes: Any) -> None:
        """Of the cluster file: for what is started from now on."""
        self._spec |= changes
        self.config.write_text(json.dumps(self._spec))

    def _node(self, node: Node) -> dict[str, Any]:
        machine = node.machine
        return {
            "address": machine.link_ip,
            "state_dir": str(node.state_dir),
            "heartbeat": [endpoint(ip, HEARTBEAT_PORT) for ip in (machine.link_ip, machine.lan_ip)],
        }

    def _group(self, number: int, volume: str, failback: str) -> dict[str, Any]:
        """The second group is at first on node-b; its address is the next one."""
        ip = self._addressing.floating(number)
        backing = {name: self._backing.get(name, self.directory / name) / f"{volume}.img" for name in NODES}
        for path in backing.values():
            if not path.exists():
                make_sparse(path, VOLUME_BYTES)
        return {
            "preferred_owner": NODES[number],
            "failback": failback,
            "nbd": endpoint(ip, NBD_PORT),
            "nbd_unix": {name: str(self.directory / name / f"{volume}.nbd") for name in NODES},
            "floating": [{"address": f"{ip}/{self._addressing.prefix_length}", "interface": LAN}],
            "link_ports": dict.fromkeys(NODES, LINK_PORT + number),
            "volumes": {volume: {"size": VOLUME_BYTES, "backing": {name: str(path) for name, path in backing.items()}}},
        }

    # --- What there is ---

    @property
    def client(self) -> Machine:
        return self.network.client

    def owner(self, group: str = GROUP) -> Node:
        """Who serves the group now."""
        serving = [node for node in self.nodes.values() if (of := node.group(group)) and of["serving"]]
        assert len(serving) == 1, f"{[node.name for node in serving]} serve {group}"
        return serving[0]

    def peer_of(self, node: Node) -> Node:
        return next(other for other in self.nodes.values() if other is not node)

    def pair(self) -> tuple[Node, Node]:
        """(owner, secondary)."""
        owner = self.owner()
        return owner, self.peer_of(owner)

    def backing(self, node: str, group: str = GROUP) -> Path:
        (volume,) = self.groups[group]["volumes"].values()
        return Path(volume["backing"][node])

    def volume(self, group: str = GROUP) -> str:
        (name,) = self.groups[group]["volumes"]
        return str(name)

    def nbd(self, group: str = GROUP) -> str:
        """Where clients find the group."""
        return str(self.groups[group]["nbd"])

    def nbd_unix(self, node: Node) -> Path:
        """The node's Unix socket for clients."""
        return Path(self.groups[GROUP]["nbd_unix"][node.name])

    def command(self, *words: str) -> str:
        """A `stortrends-ha` command on the nodes' machine; what it says. It must succeed."""
        command = [*PROGRAM, *words, "--config", str(self.config)]
        done = subprocess.run(command, env=program_environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def move(self, to: Node) -> None:
        self.command("group", "move", GROUP, "--to", to.name)

    # --- What happens to it ---

    def start(self) -> "Cluster":
        for daemon in self._daemons():
            if not daemon.running:
                daemon.start()
        return self.wait_in_sync()

    def wait_in_sync(self) -> "Cluster":
        for node in self.nodes.values():
            for group in self.groups:
                node.wait("is in sync", lambda of: of["state"] == "in-sync" and len(of["in_sync"]) == 2, group)
        return self

    def cut(self, one: Node, other: Node, *, both_ways: bool = True) -> None:
        """What `one` sends to `other` is lost, on every path; the other way, too, if not said otherwise."""
        other.machine.drop([one.machine.lan_ip, one.machine.link_ip])
        if both_ways:
            one.machine.drop([other.machine.lan_ip, other.machine.link_ip])

    def repair(self) -> "Cluster":
        """Whatever has happened to it: everything runs, reaches everything, and is in sync."""
        self.network.heal()
        for node in self.nodes.values():
            if node.running:
                node.signal(signal.SIGCONT)
            elif node._process is not None:
                node.reap()
        return self.start()

    def _daemons(self) -> Iterator[Daemon]:
        if self.witness is not None:
            yield self.witness
        yield from self.nodes.values()

    def assert_identical(self) -> None:
        """When all is right again and nothing is under way any more, both replicas are the same."""
        self.repair()
        for group in self.groups:
            self.owner(group).wait(
                "has nothing in flight",
                lambda of: of["clients"] == of["window"]["changes"] == of["window"]["bytes"] == 0,
                group,
            )
            found = differences(*(self.backing(name, group) for name in NODES))
            assert not found, f"the replicas differ: {found}"

    def logs(self) -> str:
        """The end of each log."""
        return "\n".join(f"--- {daemon.log_path.name}\n{daemon.log[-4000:]}" for daemon in self._daemons())

    def close(self) -> None:
        """End everything, then look for tracebacks."""
        self.network.close()
        for daemon in self._daemons():
            with contextlib.suppress(AssertionError):
                daemon.reap()
        for daemon in self._daemons():
            assert "Traceback" not in daemon.log, daemon.log
