"""What the rest of the project knows of the configuration: frozen, complete, already checked.

Invariants (established by `load`): exactly two nodes; every name that refers to a node is one of them;
`backing` and `link_ports` have an entry for each node; every path is absolute; volume names are unique in
the cluster.
The defaults here serve code that builds these by hand; a test holds them equal to those in `keys`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONTROL_SOCKET = "control.sock"


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address: an IP address or host name, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        """As it is written in the file and in URIs; IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Node:
    """One of the two machines."""

    name: str
    address: str
    state_dir: Path
    metrics: Address

    @property
    def control(self) -> Path:
        """The Unix socket on which the supervisor answers the command line."""
        return self.state_dir / CONTROL_SOCKET


@dataclass(frozen=True, slots=True)
class Volume:
    """One mirrored disk: an NBD export, and the file or block device behind it on each node."""

    name: str
    backing: Mapping[str, Path]
    size_bytes: int
    read_only: bool = False
    minimum_block_bytes: int = 1
    preferred_block_bytes: int = 4096
    maximum_payload_bytes: int = 32 * 1024 * 1024
    description: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Volumes that move together, behind one NBD address."""

    name: str
    preferred_owner: str
    nbd: Address
    nbd_unix: Mapping[str, Path]
    link_ports: Mapping[str, int]
    volumes: tuple[Volume, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that hold for every group; each is explained in `keys`."""

    connections: int = 256
    handshake_timeout_s: float = 10.0
    window_changes: int = 65536
    window_bytes: int = 64 * 1024 * 1024
    link_timeout_s: float = 3.0
    link_retry_s: float = 0.2


@dataclass(frozen=True, slots=True)
class Cluster:
    """The whole file."""

    name: str
    nodes: Mapping[str, Node]
    groups: Mapping[str, Group]
    limits: Limits = field(default_factory=Limits)

    def peer_of(self, node: str) -> Node:
        """The node that is not `node`."""
        if node not in self.nodes:
            raise KeyError(node)
        return next(peer for name, peer in self.nodes.items() if name != node)


def build(values: Mapping[str, Any]) -> Cluster:
    """The cluster, from values in which no problem was found."""
    return Cluster(
        name=values["cluster"],
        nodes={name: Node(name=name, **node) for name, node in values["nodes"].items()},
        groups={name: _group(name, group) for name, group in values["groups"].items()},
        limits=Limits(**values["limits"]),
    )


def _group(name: str, values: Mapping[str, Any]) -> Group:
    volumes = tuple(_volume(volume, of) for volume, of in values["volumes"].items())
    return Group(name=name, **{**values, "volumes": volumes})


def _volume(name: str, values: Mapping[str, Any]) -> Volume:
    block = values["block"]
    return Volume(
        name=name,
        backing=values["backing"],
        size_bytes=values["size"],
        read_only=values["read_only"],
        minimum_block_bytes=block["minimum"],
        preferred_block_bytes=block["preferred"],
        maximum_payload_bytes=block["maximum"],
        description=values["description"],
    )
