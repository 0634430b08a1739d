"""Every key of the configuration file, in one table: what it means, how it is read, its default and why.

The reader, the hint for a misspelt key, docs/configuration.md and the test of config/cluster.example.yaml all
work from `FILE`, so a key added here is read, and has to be documented.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from stortrends_ha.config import values
from stortrends_ha.config.values import Value


@dataclass(frozen=True, slots=True)
class NodeName:
    """The name of one of the cluster's nodes."""

    expected: str = "the name of a node"


@dataclass(frozen=True, slots=True)
class PerNode:
    """A value for each node: a mapping of node names to values."""

    value: Value
    every_node: bool = True
    or_one_for_both: bool = False

    @property
    def expected(self) -> str:
        """As in "expected ..."."""
        nodes = "each node" if self.every_node else "any of the nodes"
        alternative = ", or one for both" if self.or_one_for_both else ""
        return f"for {nodes} {self.value.expected}{alternative}"


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping with the keys given here and no others."""

    keys: Mapping[str, "Key"]

    @property
    def expected(self) -> str:
        """As in "expected ..."."""
        return f"a mapping with the keys {', '.join(self.keys)}"


@dataclass(frozen=True, slots=True)
class Named:
    """A mapping of names, chosen by the user, to tables of one kind."""

    thing: str
    table: Table
    count_min: int = 1
    count_max: int | None = None

    @property
    def expected(self) -> str:
        """As in "expected ..."."""
        if self.count_min == self.count_max:
            return f"exactly {self.count_min} {self.thing}s by name"
        return f"at least {self.count_min} {self.thing} by name"


Kind = Value | NodeName | PerNode | Table | Named


@dataclass(frozen=True, slots=True)
class Key:
    """One key. `default` is written as in the file; None means that the key is required."""

    kind: Kind
    doc: str
    default: str | None = None
    reason: str = ""
    unit: str = ""


NODES_CHECKED_MAX = 16  # with more (a problem of its own) nothing is compared with each of them any more
EMPTY = "{}"  # the default of an optional mapping: as if it were written without any key

NODE = Table(
    {
        "address": Key(
            values.NODE_ADDRESS,
            "IP address or host name at which the other node reaches this one for replication.",
        ),
        "state_dir": Key(
            values.PATH,
            "Directory for the node's own state, its lock and its control socket (control.sock).",
            default="/var/lib/stortrends-ha",
            reason="where Linux keeps the state of services",
        ),
        "metrics": Key(
            values.ADDRESS,
            "Address and port of the Prometheus metrics (HTTP).",
            default="127.0.0.1:9811",
            reason="not reachable from other machines until somebody decides so",
        ),
    }
)

BLOCK = Table(
    {
        "minimum": Key(
            values.size("1", "64KiB", power_of_two=True),
            "Smallest unit of access; requests must be multiples of it, and so must the volume's size.",
            default="1",
            reason="every client works, whatever it asks for",
            unit="bytes",
        ),
        "preferred": Key(
            values.size("512", "32MiB", power_of_two=True),
            "Unit of access that clients are advised to use; at least block.minimum.",
            default="4KiB",
            reason="the page size, below which a write has to read first",
            unit="bytes",
        ),
        "maximum": Key(
            values.size("512", "32MiB"),
            "Largest read or write in one request; a multiple of block.minimum and at least block.preferred.",
            default="32MiB",
            reason="what clients assume of every NBD server",
            unit="bytes",
        ),
    }
)

VOLUME = Table(
    {
        "size": Key(
            values.VOLUME_SIZE,
            "Size of the disk that clients see. The backing files must be at least this large.",
            unit="bytes",
        ),
        "backing": Key(
            PerNode(values.PATH, or_one_for_both=True),
            "File or block device that holds the data, for each node; a single path means the same on both.",
        ),
        "read_only": Key(
            values.BOOLEAN,
            "Whether clients may only read.",
            default="false",
            reason="a disk is for writing",
        ),
        "block": Key(BLOCK, "Block sizes told to clients.", default=EMPTY, reason="see its keys"),
        "description": Key(
            values.DESCRIPTION,
            "One line for people; NBD clients show it when they list the exports.",
            default='""',
            reason="the name is often enough",
        ),
    }
)

GROUP = Table(
    {
        "preferred_owner": Key(NodeName(), "Node that serves the group when both are well."),
        "nbd": Key(
            values.ADDRESS,
            "Address and port at which the group's owner serves its volumes to NBD clients (TCP).",
        ),
        "nbd_unix": Key(
            PerNode(values.PATH, every_node=False),
            "Unix socket that serves the same to clients on the owner's own machine; per node.",
            default=EMPTY,
            reason="only a hypervisor on the node itself can use it",
        ),
        "link_ports": Key(
            PerNode(values.PORT),
            "TCP port of the group's replication link, on each node's address.",
        ),
        "volumes": Key(
            Named("volume", VOLUME),
            "Volumes of the group. A volume's name is its NBD export name, unique in the cluster.",
        ),
    }
)

LIMITS = Table(
    {
        "connections": Key(
            values.whole_number(1, 65535),
            "NBD connections to one group at a time; more are refused.",
            default="256",
            reason="several per virtual machine for dozens of them, within the usual 1024 open files",
            unit="connections",
        ),
        "handshake_timeout_s": Key(
            values.seconds(0.1, 3600),
            "Time a client has from connecting to choosing an export.",
            default="10",
            reason="ample for a slow network, and idle connections cannot use up the limit for long",
            unit="seconds",
        ),
        "window_changes": Key(
            values.whole_number(1, 1048576),
            "Writes, trims and zeroes of a group that the peer has not answered yet; beyond it clients wait.",
            default="65536",
            reason="far above any usual queue depth",
            unit="changes",
        ),
        "window_bytes": Key(
            values.size("64KiB", "4GiB"),
            "Data of a group's writes under way; beyond it clients wait. At least the largest block.maximum.",
            default="64MiB",
            reason="fills a 10 Gbit/s link for 50 ms, and keeps a data process small",
            unit="bytes",
        ),
        "link_timeout_s": Key(
            values.seconds(0.1, 3600),
            "Silence after which a replication link is dropped and made again.",
            default="3",
            reason="longer than a short stall, far shorter than the 30 s of a guest's disk driver",
            unit="seconds",
        ),
        "link_retry_s": Key(
            values.seconds(0.01, 3600),
            "Pause between attempts to make a replication link.",
            default="0.2",
            reason="held writes go on soon after the peer is back, and five attempts a second cost nothing",
            unit="seconds",
        ),
    }
)

FILE = Table(
    {
        "cluster": Key(
            values.NAME,
            "Name of the cluster. The nodes compare it, so that no node joins a foreign one.",
        ),
        "nodes": Key(Named("node", NODE, 2, 2), "The two machines."),
        "groups": Key(Named("group", GROUP), "Groups of volumes, each served as a whole by one node."),
        "limits": Key(LIMITS, "Bounds that hold for every group.", default=EMPTY, reason="see its keys"),
    }
)


def walk(table: Table = FILE, above: str = "") -> Iterator[tuple[str, Key]]:
    """Every key with its path, in order; a name that the user chooses is written as <thing>."""
    for name, key in table.keys.items():
        path = above + name
        yield path, key
        if isinstance(key.kind, Table):
            yield from walk(key.kind, f"{path}.")
        elif isinstance(key.kind, Named):
            yield from walk(key.kind.table, f"{path}.<{key.kind.thing}>.")
