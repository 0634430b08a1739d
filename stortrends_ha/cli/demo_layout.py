"""What the demo's cluster looks like on disk and on 127.0.0.1.

Job: its cluster file, key, backing files and ports, from a directory and the first port.
Invariants: existing backing files and an existing key are never touched, so a directory can be used again with its
data; the two nodes and the witness differ in every port and path, because all live on one machine. A death in between
leaves nothing that the next start does not put right: a file appears under its name when it is complete.
"""

import base64
import contextlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from stortrends_ha.errors import StartError, StorageError

HOST = "127.0.0.1"
NODES = ("node-a", "node-b")
CLUSTER = "demo"
VOLUME_BYTES = 1 << 30
KEY_BYTES = 32
PORTS = 11


@dataclass(frozen=True, slots=True)
class DemoGroup:
    """A group of the demo, with its only volume; `preferred_owner` owns it at first."""

    name: str
    volume: str
    preferred_owner: str
    nbd_port: int
    link_ports: dict[str, int]

    @property
    def uri(self) -> str:
        """Where NBD clients find the volume."""
        return f"nbd://{HOST}:{self.nbd_port}/{self.volume}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Every path and port of the demo; `directory` is absolute.

    Ports from the first one on: NBD of both groups, two replication links of each, then for each node its metrics, for
    each its heartbeat, and the witness.
    """

    directory: Path
    port_base: int

    @property
    def config(self) -> Path:
        """The cluster file."""
        return self.directory / "cluster.yaml"

    @property
    def key(self) -> Path:
        """The cluster's key, of both nodes."""
        return self.directory / "cluster.key"

    @property
    def witness_dir(self) -> Path:
        """Everything of the witness."""
        return self.directory / "witness"

    @property
    def witness_key(self) -> Path:
        """Where the witness looks for the cluster's key."""
        return self.witness_dir / "keys" / f"{CLUSTER}.key"

    @property
    def witness_log(self) -> Path:
        """Where the witness's stderr goes."""
        return self.witness_dir / "witness.log"

    @property
    def witness(self) -> str:
        """The host and port of the witness."""
        return f"{HOST}:{self.port_base + 10}"

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

    def heartbeat(self, node: str) -> str:
        """The host and port of the node's heartbeat."""
        return f"{HOST}:{self.port_base + 8 + NODES.index(node)}"

    def prepare(self) -> None:
        """Make what is missing: directories, key, cluster file, sparse backing files."""
        try:
            for node in NODES:
                self.state_dir(node).mkdir(parents=True, exist_ok=True)
                for group in self.groups:
                    _make_sparse(self.backing(node, group.volume))
            self._make_keys()
            _replace(self.config, self.config_text().encode(), 0o644)
        except OSError as error:
            raise StorageError(f"{error.filename or self.directory} cannot be used: {error.strerror}.") from error

    def _make_keys(self) -> None:
        """A key of its own for each demo, which the witness gets, too."""
        if not self.key.exists():
            _replace(self.key, base64.b64encode(os.urandom(KEY_BYTES)) + b"\n", 0o600)
        for directory in (self.witness_dir, self.witness_key.parent):
            directory.mkdir(mode=0o700, exist_ok=True)
        _replace(self.witness_key, self.key.read_bytes(), 0o600)

    def config_text(self) -> str:
        """The cluster file; JSON's quoting is valid in YAML, so any directory name will do."""
        lines = [
            "# Written by `stortrends-ha demo`; written anew at each start.",
            f"cluster: {CLUSTER}",
            f"key_file: {json.dumps(str(self.key))}",
            "nodes:",
        ]
        for node in NODES:
            lines += self._node_lines(node)
        lines += [f"arbiter: {{kind: witness, address: {self.witness}}}", "groups:"]
        for group in self.groups:
            lines += self._group_lines(group)
        return "\n".join(lines) + "\n"

    def _node_lines(self, node: str) -> list[str]:
        return [
            f"  {node}:",
            f"    address: {HOST}",
            f"    state_dir: {json.dumps(str(self.state_dir(node)))}",
            f"    metrics: {self.metrics(node)}",
            f"    heartbeat: [{self.heartbeat(node)}]",
        ]

    def _group_lines(self, group: DemoGroup) -> list[str]:
        links = ", ".join(f"{node}: {port}" for node, port in group.link_ports.items())
        backing = [f"          {node}: {json.dumps(str(self.backing(node, group.volume)))}" for node in NODES]
        return [
            f"  {group.name}:",
            f"    preferred_owner: {group.preferred_owner}",
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


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Write a file that is seen complete, or as it was before."""
    new = path.with_name(f"{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
        file.write(content)
    new.rename(path)


def _is_free(port: int) -> bool:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            for probe in (tcp, udp):
                probe.bind((HOST, port))
        except OSError:
            return False
    return True
