"""What the demo's cluster looks like on disk and on 127.0.0.1.

Job: its cluster file, backing files and ports, from a directory and the first port.
Invariants: existing backing files are never touched, so a directory can be used again with its data; the two
nodes differ in every port and path, because both live on one machine.
"""

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from stortrends_ha.errors import StartError, StorageError

HOST = "127.0.0.1"
NODES = ("node-a", "node-b")
VOLUME_BYTES = 1 << 30
PORTS = 8


@dataclass(frozen=True, slots=True)
class DemoGroup:
    """A group of the demo, with its only volume."""

    name: str
    volume: str
    owner: str
    nbd_port: int
    link_ports: dict[str, int]

    @property
    def uri(self) -> str:
        """Where NBD clients find the volume."""
        return f"nbd://{HOST}:{self.nbd_port}/{self.volume}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Every path and port of the demo; `directory` is absolute."""

    directory: Path
    port_base: int

    @property
    def config(self) -> Path:
        """The cluster file."""
        return self.directory / "cluster.yaml"

    @property
    def groups(self) -> tuple[DemoGroup, DemoGroup]:
        """Both groups, one owned by each node."""
        base = self.port_base
        return (
            DemoGroup("rg-a", "vm-a", "node-a", base, {"node-a": base + 2, "node-b": base + 3}),
            DemoGroup("rg-b", "vm-b", "node-b", base + 1, {"node-a": base + 4, "node-b": base + 5}),
        )

    def state_dir(self, node: str) -> Path:
        """Everything of one node."""
        return self.directory / node

    def control(self, node: str) -> Path:
        """The node's control socket."""
        return self.state_dir(node) / "control.sock"

    def log(self, node: str) -> Path:
        """Where the node's stderr goes."""
        return self.state_dir(node) / "node.log"

    def backing(self, node: str, volume: str) -> Path:
        """The node's replica of a volume."""
        return self.state_dir(node) / f"{volume}.img"

    def metrics(self, node: str) -> str:
        """The host and port of the node's metrics."""
        return f"{HOST}:{self.port_base + 6 + NODES.index(node)}"

    def prepare(self) -> None:
        """Make what is missing: directories, cluster file, sparse backing files."""
        try:
            for node in NODES:
                self.state_dir(node).mkdir(parents=True, exist_ok=True)
                for group in self.groups:
                    _make_sparse(self.backing(node, group.volume))
            self.config.write_text(self.config_text())
        except OSError as error:
            raise StorageError(f"{error.filename or self.directory} cannot be used: {error.strerror}.") from error

    def config_text(self) -> str:
        """The cluster file; JSON's quoting is valid in YAML, so any directory name will do."""
        lines = ["# Written by `stortrends-ha demo`; written anew at each start.", "cluster: demo", "nodes:"]
        for node in NODES:
            state_dir = json.dumps(str(self.state_dir(node)))
            lines.append(f"  {node}: {{address: {HOST}, state_dir: {state_dir}, metrics: {self.metrics(node)}}}")
        lines.append("groups:")
        for group in self.groups:
            lines += self._group_lines(group)
        return "\n".join(lines) + "\n"

    def _group_lines(self, group: DemoGroup) -> list[str]:
        links = ", ".join(f"{node}: {port}" for node, port in group.link_ports.items())
        backing = [f"          {node}: {json.dumps(str(self.backing(node, group.volume)))}" for node in NODES]
        return [
            f"  {group.name}:",
            f"    preferred_owner: {group.owner}",
            f"    nbd: {HOST}:{group.nbd_port}",
            f"    link_ports: {{{links}}}",
            "    volumes:",
            f"      {group.volume}:",
            f"        size: {VOLUME_BYTES}",
            "        backing:",
            *backing,
        ]

    def check_ports(self) -> None:
        """Raise `StartError` if one of the ports is taken."""
        taken = [str(port) for port in range(self.port_base, self.port_base + PORTS) if not _is_free(port)]
        if taken:
            raise StartError(
                f"The demo needs the ports {self.port_base} to {self.port_base + PORTS - 1} on {HOST}, and"
                f" {', '.join(taken)} {'are' if len(taken) > 1 else 'is'} in use: is another demo running?"
                " Other ports are chosen with --port-base."
            )


def _make_sparse(path: Path) -> None:
    try:
        with path.open("xb") as file:
            os.truncate(file.fileno(), VOLUME_BYTES)
    except FileExistsError:
        return


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
