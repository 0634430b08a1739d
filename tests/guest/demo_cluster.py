"""The demo as the cluster of the guest's disk: its nodes and its witness killed, started again, asked.

Invariants: `close` leaves nothing behind and fails the test if a node's log holds a traceback. Which node owns the
group is asked of the nodes, never assumed.
"""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from harness import PATIENCE_S, PROGRAM, ask, free_ports, is_running, program_environment, wait_for

from stortrends_ha.cli.demo_layout import PORTS

from .machine import Endpoint

VOLUME = "vm-a"
READY_S = 180.0
# A replica of 1 GiB is compared block by block, while an emulator takes a core.
IN_SYNC_S = 300.0
MOVE_S = 60.0


class DemoCluster:
    """A running `stortrends-ha demo`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        first = free_ports(PORTS)[0]
        self._log_path = directory.with_suffix(".log")
        with self._log_path.open("wb") as log:
            self._demo = subprocess.Popen(
                [*PROGRAM, "demo", "--json", "--dir", str(directory), "--port-base", str(first)],
                env=program_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self._said: dict[str, Any] = {}
        self._by_hand: list[subprocess.Popen[bytes]] = []

    def wait_ready(self) -> "DemoCluster":
        """Wait for its line of JSON."""
        assert self._demo.stdout is not None
        line = self._demo.stdout.readline()
        assert line, self._log_path.read_text()
        self._said = json.loads(line)
        return self

    # --- What there is ---

    @property
    def nodes(self) -> list[str]:
        return list(self._said["nodes"])

    @property
    def group(self) -> str:
        name: str = self._said["volumes"][VOLUME]["group"]
        return name

    def endpoint(self) -> Endpoint:
        """Where the volume is served, whoever owns it."""
        uri = urlsplit(self._said["volumes"][VOLUME]["uri"])
        assert uri.hostname is not None
        assert uri.port is not None
        return Endpoint(uri.hostname, uri.port, uri.path.removeprefix("/"))

    def replicas(self) -> list[Path]:
        return [Path(node["backing"][VOLUME]) for node in self._said["nodes"].values()]

    def _status(self, node: str) -> dict[str, Any]:
        """Empty while the node is not there."""
        try:
            return ask(Path(self._said["nodes"][node]["control"]))
        except (OSError, ValueError):
            return {}

    def _views(self) -> dict[str, dict[str, Any]]:
        """The status of all groups on each node that is there."""
        statuses = {node: self._status(node) for node in self.nodes}
        return {node: status["groups"] for node, status in statuses.items() if status}

    def owner(self) -> str:
        """Who owns the group, once the nodes that are there agree and one of them is it."""

        def probe() -> str | None:
            views = self._views()
            owners = {groups[self.group]["owner"] for groups in views.values()}
            return owners.pop() if len(owners) == 1 and owners <= set(views) else None

        return wait_for("the group has an owner", probe)

    def other(self, node: str) -> str:
        return next(name for name in self.nodes if name != node)

    # --- What happens to it ---

    def kill(self, node: str) -> None:
        """SIGKILL to a node; returns when its data processes are gone, too."""
        status = self._status(node)
        assert status, f"{node} does not run"
        os.kill(status["pid"], signal.SIGKILL)
        pids = [group["pid"] for group in status["groups"].values() if group["pid"]]
        wait_for(f"{node} is gone", lambda: not any(is_running(pid) for pid in (status["pid"], *pids)))

    def kill_data_process(self, node: str) -> None:
        """SIGKILL to the group's data process on a node."""
        pid = self._views()[node][self.group]["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_for("the data process is gone", lambda: not is_running(pid))

    def start_again(self, node: str) -> None:
        """Run the `command` of a node that is gone, as a person would."""
        self._start(self._said["nodes"][node]["command"], self._directory / node / "node.log")

    def kill_witness(self) -> None:
        pid = self._said["witness"]["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_for("the witness is gone", lambda: not is_running(pid))

    def start_witness_again(self) -> None:
        """Returns when it can be asked."""
        command = self._said["witness"]["command"]
        self._start(command, self._directory / "witness" / "witness.log")
        host, _, port = command[command.index("--listen") + 1].rpartition(":")

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex((host, int(port))) == 0

        wait_for("the witness listens", listens)

    def _start(self, command: list[str], log_path: Path) -> None:
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                command, env=program_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._by_hand.append(process)

    def move(self, to: str) -> None:
        """Hand the group over, as a person would."""
        subprocess.run(
            [*PROGRAM, "group", "move", self.group, "--to", to, "--config", self._said["config"]],
            env=program_environment(), stdin=subprocess.DEVNULL, timeout=MOVE_S, check=True,
        )  # fmt: skip

    def wait_in_sync(self, *groups: str) -> None:
        """Wait until both nodes are there and some groups in sync; without any, all: any node may be killed next."""

        def in_sync() -> bool:
            views = self._views().values()
            chosen = [{name: view for name, view in each.items() if name in groups or not groups} for each in views]
            states = {view["state"] for each in chosen for view in each.values()}
            # Of one record: a node that has not noticed yet what happened says in-sync of the record before.
            epochs = [{name: view["epoch"] for name, view in each.items()} for each in chosen]
            return len(views) == len(self.nodes) and states == {"in-sync"} and epochs[0] == epochs[1]

        try:
            wait_for("in sync", in_sync, IN_SYNC_S)
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self._in_words()}") from None

    def _in_words(self) -> str:
        return "\n".join(
            f"{name} on {node}: epoch {group['epoch']} of {group['owner']}, {group['state']}: {group['why']}"
            for node, groups in self._views().items()
            for name, group in groups.items()
        )

    # --- Its end ---

    def stop(self) -> None:
        """Orderly; then the replicas can be looked at."""
        self._demo.terminate()
        self._demo.communicate(timeout=PATIENCE_S)
        for node in self._by_hand:
            node.wait(PATIENCE_S)

    def close(self) -> None:
        """End whatever still runs, then look for tracebacks."""
        try:
            if self._demo.poll() is None:
                self.stop()
        finally:
            self._demo.kill()
            self._demo.communicate()
            for node in self._by_hand:
                node.kill()
                node.wait()
        for log in (self._log_path, *self._directory.glob("*/*.log")):
            assert "Traceback" not in log.read_text(), log.read_text()
