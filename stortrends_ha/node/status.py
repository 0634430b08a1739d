"""The status of a node, as the control socket gives it.

Job: put together what the configuration says and what the data processes report.
Invariants: every group and volume of the configuration is there, with every key, from the first moment on;
what a data process has not said yet, or has not renewed, is said in words in `why`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from stortrends_ha import __version__
from stortrends_ha.boottime import now_ns
from stortrends_ha.cluster.membership import Membership
from stortrends_ha.config import Address, Cluster, Group, Volume
from stortrends_ha.node.children import View
from stortrends_ha.node.groups import GroupRunner, Wishes
from stortrends_ha.node.heartbeats import PathView
from stortrends_ha.node.messages import (
    STATES,
    Counters,
    State,
    Status,
    VolumeStatus,
)
from stortrends_ha.node.rates import NO_RATES, VolumeRates
from stortrends_ha.record import Record

# Data processes report once a second: after this, one of them is stuck.
STALE_AFTER_S = 5.0


class VolumeView(VolumeStatus):
    """A volume's status, with what the node adds."""

    uri: str
    rates: VolumeRates


class NodeState(TypedDict):
    """A node, as this one sees it."""

    state: str
    drained: bool
    stopping: bool
    other_sections: list[str]  # parts of the cluster file that are not the same there, as it said last


class HeartbeatPath(TypedDict):
    """One path of the heartbeats; counts are of datagrams since the start of the node."""

    own: str
    peer: str
    silent_s: float
    sent: int
    received: int
    dropped: int  # forged, replayed, reordered, or of somebody else
    why: str


class LastMove(TypedDict):
    """The newest change of owner that this node has seen to its end."""

    kind: str
    duration_ms: float
    ago_s: float


@dataclass(frozen=True, slots=True)
class Ownership:
    """What the node's decisions about a group are at one moment."""

    record: Record
    phase: str
    state: State | None  # what they add to the data process's state and why; None if nothing
    why: str
    waits_for: str  # what the arbiter did not answer, a clause
    moves: Mapping[str, int]
    last_move: LastMove | None
    addresses: str

    @staticmethod
    def of(runner: GroupRunner, addresses: str) -> "Ownership":
        """``addresses``: what keeps the group's floating addresses from being here."""
        state, why = runner.explain()
        core, last = runner.core, runner.last_move
        ago_s = (now_ns() - last.ended_ns) / 1e9 if last else 0.0
        return Ownership(
            record=core.record,
            phase=core.phase.value,
            state=state if state in STATES else None,
            why=why,
            waits_for=core.waits_for,
            moves=dict(runner.moves),
            last_move=LastMove(kind=last.kind, duration_ms=last.duration_ms, ago_s=ago_s) if last else None,
            addresses=addresses,
        )


class GroupView(Status):
    """A group's status, with what the node adds; ``epoch``, ``owner`` and ``in_sync`` are the saved record's."""

    phase: str
    arbiter: str  # why the arbiter did not grant what is needed; empty if it did, or nothing is
    moves: dict[str, int]
    last_move: LastMove | None
    addresses: str
    nbd: str
    pid: int | None
    restarts: int
    report_age_s: float


class NodeStatus(TypedDict):
    """Everything that a node tells about itself."""

    cluster: str
    node: str
    version: str
    pid: int
    uptime_s: float
    nodes: dict[str, NodeState]
    heartbeats: list[HeartbeatPath]
    groups: dict[str, GroupView]


def node_status(
    cluster: Cluster,
    name: str,
    uptime_s: float,
    views: Iterable[View],
    ownership: Mapping[str, Ownership],
    *,
    wishes: Wishes,
    membership: Membership,
    paths: Sequence[PathView],
) -> NodeStatus:
    """The status of node `name`."""
    return {
        "cluster": cluster.name,
        "node": name,
        "version": __version__,
        "pid": os.getpid(),
        "uptime_s": round(uptime_s, 1),
        "nodes": {
            node: {"state": "up", "drained": wishes.draining, "stopping": wishes.stopping, "other_sections": []}
            if node == name
            else _peer_state(membership)
            for node in cluster.nodes
        },
        "heartbeats": [_path(path) for path in paths],
        "groups": {view.group: group_view(cluster, name, view, ownership[view.group]) for view in views},
    }


def _peer_state(membership: Membership) -> NodeState:
    beat = membership.peer
    state = "up" if membership.alive(now_ns()) else "not answering" if beat else "unknown"
    return {
        "state": state,
        "drained": bool(beat and beat.drained),
        "stopping": bool(beat and beat.stopping),
        "other_sections": list(membership.other_sections),
    }


def _path(path: PathView) -> HeartbeatPath:
    return {
        "own": str(path.own),
        "peer": str(path.peer),
        "silent_s": round(path.silent_s, 2),
        "sent": path.sent,
        "received": path.received,
        "dropped": path.forged + path.old + path.unproven + path.strange,
        "why": path.problem or path.refused,
    }


def group_view(cluster: Cluster, name: str, view: View, ownership: Ownership) -> GroupView:
    """The status of one group on node `name`."""
    group = cluster.groups[view.group]
    status = view.status or _unreported(cluster, name, group, view)
    volumes = {volume.name: _idle(volume) for volume in group.volumes} | status["volumes"]
    return {
        **status,
        "state": ownership.state or status["state"],
        "why": ownership.why or _why(view),
        "epoch": ownership.record.epoch,
        "owner": ownership.record.owner,
        "in_sync": list(ownership.record.in_sync),
        "phase": ownership.phase,
        "arbiter": ownership.waits_for,
        "moves": dict(ownership.moves),
        "last_move": ownership.last_move,
        "addresses": ownership.addresses,
        "volumes": {volume: _volume(group, view, volume, of) for volume, of in volumes.items()},
        "nbd": f"nbd://{Address(group.clients_host, group.nbd.port)}",
        "pid": view.pid,
        "restarts": view.restarts,
        "report_age_s": round(view.report_age_s, 1),
    }


def _volume(group: Group, view: View, volume: str, of: VolumeStatus) -> VolumeView:
    return {**of, "uri": group.uri(volume), "rates": view.rates.get(volume, NO_RATES)}


def _why(view: View) -> str:
    if view.report_age_s > STALE_AFTER_S:
        stuck = f"its data process (pid {view.pid}) has not reported for {view.report_age_s:.0f} s"
        return f"{stuck}; its last word was: {view.why}" if view.why else stuck
    return view.why


def _unreported(cluster: Cluster, name: str, group: Group, view: View) -> Status:
    """What the configuration alone knows of a group."""
    peer = cluster.peer_of(name)
    return {
        "group": group.name,
        "role": "idle",
        "session": False,
        "joinable": False,
        "peer_unfit": "",
        "owner_lineage": "",
        "fit": {
            "lineage": "",
            "blank": False,
            "lost_cache": False,
            "needs_sync": False,
            "settled_epoch": 0,
            "differs": False,
            "failure": "",
        },
        "serving": False,
        "cannot_listen": "",
        "endpoints": [],
        "state": view.state,
        "why": view.why,
        "epoch": 0,
        "owner": group.preferred_owner,
        "in_sync": [],
        "link": {
            "state": "connecting",
            "peer": peer.name,
            "address": f"{peer.address}:{group.link_ports[peer.name]}",
            "why": "",
            "round_trip_ms": None,
            "protocol": None,
            "peer_version": None,
        },
        "resync": None,
        "verify": {"running": None, "last": None, "volumes": {}},
        "comparison": None,
        "window": {"changes": 0, "bytes": 0, "oldest_ms": 0.0},
        "clients": 0,
        "counters": _no_counters(),
        "volumes": {},
    }


def _no_counters() -> Counters:
    return {
        "connections_accepted": 0,
        "connections_refused": 0,
        "nbd_bad_input": 0,
        "link_bad_input": 0,
        "link_sessions": 0,
        "disk_errors": 0,
    }


def _idle(volume: Volume) -> VolumeStatus:
    """A volume that serves nobody: on the secondary, and before the first report."""
    return {
        "size_bytes": volume.size_bytes,
        "read_only": volume.read_only,
        "in_flight": 0,
        "intent_regions": 0,
        "dirty_bytes": 0,
        "counters": {
            "reads": 0,
            "read_bytes": 0,
            "writes": 0,
            "written_bytes": 0,
            "flushes": 0,
            "trims": 0,
            "zeroes": 0,
            "errors": 0,
        },
    }
