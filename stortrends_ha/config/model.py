"""What the rest of the project knows of the configuration: frozen, complete, already checked.

Invariants (established by `load`): exactly two nodes; every name that refers to a node is one of them;
`key_file`, `backing`, `link_ports`, a floating address's `interface` and a fencing arbiter's `agents` have an
entry for each node; both nodes have the same number of heartbeat addresses, at least one; every path is absolute;
volume names are unique in the cluster.
The defaults here serve code that builds these by hand; a test holds them equal to those in `keys`.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONTROL_SOCKET = "control.sock"


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP or UDP address: an IP address or host name, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        """As it is written in the file and in URIs; IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_wildcard(host: str) -> bool:
    """Whether listening on this host means listening on every address."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Node:
    """One of the two machines."""

    name: str
    address: str
    state_dir: Path
    metrics: Address
    heartbeat: tuple[Address, ...] = ()
    """UDP, one for each path: path i of one node talks to path i of the other."""

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
    cache: str = "mirrored"
    """Whether writes may rest in the page cache: "mirrored" (while two nodes have them), "always" or "never"."""


@dataclass(frozen=True, slots=True)
class Floating:
    """An address that follows the owner of a group."""

    address: str
    """With its prefix length, such as 192.0.2.21/24."""
    interface: Mapping[str, str]

    @property
    def host(self) -> str:
        """The address without its prefix length."""
        return self.address.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Group:
    """Volumes that move together, behind one NBD address."""

    name: str
    preferred_owner: str
    nbd: Address
    nbd_unix: Mapping[str, Path]
    link_ports: Mapping[str, int]
    volumes: tuple[Volume, ...]
    floating: tuple[Floating, ...] = ()
    failback: str = "manual"
    """Whether a group goes back to its preferred owner by itself: "manual" or "automatic"."""

    @property
    def clients_host(self) -> str:
        """Where clients find the group: the host that it listens on, or a floating address if that is every one."""
        hosts = [each.host for each in self.floating if (":" in each.host) == (":" in self.nbd.host)]
        return hosts[0] if hosts and is_wildcard(self.nbd.host) else self.nbd.host

    def uri(self, volume: str) -> str:
        """The NBD URI of one of its volumes, for clients."""
        return f"nbd://{Address(self.clients_host, self.nbd.port)}/{volume}"


@dataclass(frozen=True, slots=True)
class Witness:
    """The arbiter is a daemon of ours on a third machine."""

    address: Address


@dataclass(frozen=True, slots=True)
class Etcd:
    """The arbiter is an etcd cluster."""

    endpoints: tuple[str, ...]
    """URLs such as http://192.0.2.31:2379, without a path."""


@dataclass(frozen=True, slots=True)
class FenceAgent:
    """How to fence one of the nodes; the options can hold passwords."""

    agent: str
    options: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Fencing:
    """The arbiter is the peer's consent, or a fence agent that has turned the peer off."""

    agents: Mapping[str, FenceAgent]
    """By the node that is to be fenced."""
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Manual:
    """The arbiter is the operator."""


Arbiter = Witness | Etcd | Fencing | Manual


@dataclass(frozen=True, slots=True)
class Failover:
    """When a node is taken for gone; each is explained in `keys`."""

    heartbeat_interval_s: float = 0.1
    suspect_after_s: float = 0.7
    lease_s: float = 1.2
    hold_down_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that hold for every group; each is explained in `keys`."""

    connections: int = 256
    handshake_timeout_s: float = 10.0
    window_changes: int = 65536
    window_bytes: int = 64 * 1024 * 1024
    link_timeout_s: float = 3.0
    link_retry_s: float = 0.2
    disk_timeout_s: float = 20.0
    resync_latency_factor: float = 2.0
    resync_min_rate: int = 16 * 1024 * 1024
    dirty_block: int = 64 * 1024


@dataclass(frozen=True, slots=True)
class Cluster:
    """The whole file."""

    name: str
    nodes: Mapping[str, Node]
    groups: Mapping[str, Group]
    limits: Limits = field(default_factory=Limits)
    key_file: Mapping[str, Path] = field(default_factory=dict)
    arbiter: Arbiter = field(default_factory=Manual)
    failover: Failover = field(default_factory=Failover)

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
        key_file=values["key_file"],
        arbiter=_arbiter(values["arbiter"]),
        failover=Failover(**values["failover"]),
    )


def _arbiter(values: Mapping[str, Any]) -> Arbiter:
    match values["kind"]:
        case "witness":
            return Witness(values["address"])
        case "etcd":
            return Etcd(values["endpoints"])
        case "fencing":
            agents = {node: FenceAgent(**agent) for node, agent in values["agents"].items()}
            return Fencing(agents, values["timeout_s"])
    return Manual()


def _group(name: str, values: Mapping[str, Any]) -> Group:
    volumes = tuple(_volume(volume, of) for volume, of in values["volumes"].items())
    floating = tuple(Floating(**of) for of in values["floating"])
    return Group(name=name, **{**values, "volumes": volumes, "floating": floating})


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
        cache=values["cache"],
    )
