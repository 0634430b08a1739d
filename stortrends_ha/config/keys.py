"""Every key of the configuration file, in one table: what it means, how it is read, its default and why.

The reader, the hint for a misspelt key, docs/configuration.md and the test of config/cluster.example.yaml all
work from `FILE`, so a key added here is read, and has to be documented.
"""

from collections.abc import Mapping
from typing import Any

from stortrends_ha.config import values
from stortrends_ha.config.kinds import EMPTY, EMPTY_LIST, Choice, Key, ListOf, Named, NodeName, Options, PerNode, Table
from stortrends_ha.config.model import Address
from stortrends_ha.limits import HEARTBEAT_GROUPS

NODES_CHECKED_MAX = 16  # with more (a problem of its own) nothing is compared with each of them any more
HEARTBEAT_PORT = 7800


def _own_address(node: Mapping[str, Any]) -> tuple[Address, ...] | None:
    """The only heartbeat path of a node for which none is given."""
    return (Address(node["address"], HEARTBEAT_PORT),) if "address" in node else None


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
        "heartbeat": Key(
            ListOf(values.PEER_ADDRESS, 1, 4),
            "Addresses and ports (UDP) of the heartbeat, one for each path between the nodes: the first of one node "
            "talks to the first of the other, and so on. A node is gone only when every path is silent.",
            default=f"[<address>:{HEARTBEAT_PORT}]",
            reason="one path is always there",
            derive=_own_address,
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
        "cache": Key(
            values.one_of("mirrored", "always", "never"),
            "When a write is answered before it is on stable storage: mirrored, while both nodes have it in their "
            "page caches; always, also while one node is alone; never. A client's flush always reaches stable "
            "storage.",
            default="mirrored",
            reason="no failure of a single machine loses a write, and few writes wait for a disk",
        ),
    }
)

FLOATING = Table(
    {
        "address": Key(
            values.INTERFACE_ADDRESS,
            "The address with the prefix length of its network. No machine may have it otherwise.",
        ),
        "interface": Key(
            PerNode(values.INTERFACE, or_one_for_both=True),
            "Network interface that gets it, for each node; a single name means the same on both.",
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
        "floating": Key(
            ListOf(FLOATING, 0, 16),
            "Addresses that are on the group's owner, and move with it, so that clients find it on either machine.",
            default=EMPTY_LIST,
            reason="adding addresses needs root; without, `nbd` is a loopback address or one that both nodes have",
        ),
        "nbd_unix": Key(
            PerNode(values.PATH, every_node=False),
            "Unix socket that serves the same to clients on the owner's own machine; per node.",
            default=EMPTY,
            reason="only a hypervisor on the node itself can use it",
        ),
        "failback": Key(
            values.one_of("manual", "automatic"),
            "Whether the group goes back to its preferred owner when that is in sync again: only when told to, or by "
            "itself.",
            default="manual",
            reason="each move is a pause, and whatever took the node away may not be over",
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

FENCE_AGENT = Table(
    {
        "agent": Key(values.AGENT, "Fence agent that turns this node off, run on the other one."),
        "options": Key(
            Options(),
            "The agent's options, as it takes them on its standard input. Passwords are better in a file that the "
            "agent reads (its option password_script).",
            default=EMPTY,
            reason="some agents need none",
        ),
    }
)

ARBITER = Choice(
    "What decides: witness, a daemon of ours on a third machine; etcd, an etcd cluster; fencing, a fence agent that "
    "turns the other node off, without a third machine; manual, the operator.",
    {
        "witness": Table(
            {
                "address": Key(
                    values.PEER_ADDRESS,
                    "Kind witness: address and port of the witness (TCP), on a machine that is neither node.",
                ),
            }
        ),
        "etcd": Table(
            {
                "endpoints": Key(
                    ListOf(values.URL, 1, 7),
                    "Kind etcd: where its members serve clients; one that answers is enough.",
                ),
            }
        ),
        "fencing": Table(
            {
                "agents": Key(PerNode(FENCE_AGENT), "Kind fencing: how each node is turned off by the other."),
                "timeout_s": Key(
                    values.seconds(1, 3600),
                    "Kind fencing: time for an agent to turn a node off and to be sure of it.",
                    default="60",
                    reason="management controllers of servers often need half of it",
                    unit="seconds",
                ),
            }
        ),
        "manual": Table({}),
    },
)

FAILOVER = Table(
    {
        "heartbeat_interval_s": Key(
            values.seconds(0.01, 10),
            "Pause between heartbeats, on each path.",
            default="0.1",
            reason="ten small datagrams a second cost nothing",
            unit="seconds",
        ),
        "suspect_after_s": Key(
            values.seconds(0.03, 600),
            "Silence of the other node on every path after which it is taken for gone. At least three heartbeat "
            "intervals.",
            default="0.7",
            reason="seven beats lost in a row mean more than a stall, and a client that tries to reconnect after a "
            "second finds the new owner",
            unit="seconds",
        ),
        "lease_s": Key(
            values.seconds(0.05, 600),
            "How long an owner answers clients after the other node last promised not to take over. More than "
            "suspect_after_s and two heartbeat intervals; a takeover waits for it.",
            default="1.2",
            reason="leaves an owner half a second to ask to go on alone, before it has to stop",
            unit="seconds",
        ),
        "hold_down_s": Key(
            values.seconds(0, 86400),
            "How long the preferred owner must be in sync without a break before the group goes back to it by itself.",
            default="60",
            reason="a node that comes and goes does not take the group with it",
            unit="seconds",
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
        "disk_timeout_s": Key(
            values.seconds(0.1, 3600),
            "Time without an answer after which a disk counts as failed, if the other node has everything.",
            default="20",
            reason="longer than most arrays take to change paths, shorter than the 30 s of a guest's disk driver",
            unit="seconds",
        ),
        "resync_latency_factor": Key(
            values.factor(1.1, 1000),
            "How much longer the slowest requests of clients (p99) may take while a resync or a verify runs. It goes "
            "as fast as that allows, and without a limit while clients are idle.",
            default="2",
            reason="few applications notice, and a second good copy is there soon",
            unit="times",
        ),
        "resync_min_rate": Key(
            values.size("64KiB", "64GiB"),
            "What a resync or a verify gets through at least, however busy clients are.",
            default="16MiB",
            reason="1 TiB within a day, at a tenth of what a hard disk can",
            unit="bytes a second",
        ),
        "dirty_block": Key(
            values.size("4KiB", "512KiB", power_of_two=True),
            "What one small write while the other node is away costs in the resync. Half of it is twice the map: "
            "1 TiB in blocks of 64 KiB takes 2 MiB of memory and of the state directory. It may be changed at any "
            "start of a node, and need not be the same on both.",
            default="64KiB",
            reason="small beside what a resync does in a second, and maps that are no burden",
            unit="bytes",
        ),
    }
)

FILE = Table(
    {
        "cluster": Key(
            values.NAME,
            "Name of the cluster. The nodes compare it, so that no node joins a foreign one.",
        ),
        "key_file": Key(
            PerNode(values.PATH, or_one_for_both=True),
            "File with the cluster's key, a secret of at least 32 bytes (hex, base64 or raw) that only its owner may "
            "read (mode 0600), for each node; a single path means the same on both. The nodes and the witness hold "
            "the same key.",
        ),
        "nodes": Key(Named("node", NODE, 2, 2), "The two machines."),
        "arbiter": Key(ARBITER, "What decides who may go on when the nodes do not reach each other."),
        "groups": Key(
            Named("group", GROUP, 1, HEARTBEAT_GROUPS),
            "Groups of volumes, each served as a whole by one node.",
        ),
        "failover": Key(FAILOVER, "When a node is taken for gone.", default=EMPTY, reason="see its keys"),
        "limits": Key(LIMITS, "Bounds that hold for every group.", default=EMPTY, reason="see its keys"),
    }
)
