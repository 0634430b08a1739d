"""The status of a node, as the control socket gives it.

Job: put together what the configuration says and what the data processes report.
Invariants: every group and volume of the configuration is there, with every key, from the first moment on;
what a data process has not said yet, or has not renewed, is said in words in `why`.
"""

import os
from collections.abc import Iterable
from typing import TypedDict

from stortrends_ha import __version__
from stortrends_ha.config import Cluster, Group, Volume
from stortrends_ha.node.children import View
from stortrends_ha.node.messages import (
    Counters,
    LinkStatus,
    Resync,
    Role,
    State,
    Status,
    VolumeStatus,
    Window,
)
from stortrends_ha.node.rates import NO_RATES, VolumeRates

# Data processes report once a second: after this, one of them is stuck.
STALE_AFTER_S = 5.0


class NodeState(TypedDict):
    """A node, as this one sees it."""

    state: str


class VolumeView(VolumeStatus):
    """A volume's status, with what the node adds."""

    uri: str
    rates: VolumeRates


class GroupView(TypedDict):
    """A group's status, with what the node adds."""

    group: str
    role: Role
    state: State
    why: str
    epoch: int
    owner: str
    in_sync: list[str]
    link: LinkStatus
    resync: Resync | None
    window: Window
    clients: int
    counters: Counters
    volumes: dict[str, VolumeView]
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
    groups: dict[str, GroupView]


def node_status(cluster: Cluster, name: str, uptime_s: float, views: Iterable[View]) -> NodeStatus:
    """The status of node `name`."""
    views = list(views)
    peer = cluster.peer_of(name).name
    return {
        "cluster": cluster.name,
        "node": name,
        "version": __version__,
        "pid": os.getpid(),
        "uptime_s": round(uptime_s, 1),
        "nodes": {node: {"state": _peer_state(views) if node == peer else "up"} for node in cluster.nodes},
        "groups": {view.group: group_view(cluster, name, view) for view in views},
    }


def _peer_state(views: list[View]) -> str:
    """Up when any link to it is connected; unknown before any data process has reported."""
    links = [view.status["link"]["state"] for view in views if view.status]
    if "connected" in links:
        return "up"
    return "not answering" if links else "unknown"


def group_view(cluster: Cluster, name: str, view: View) -> GroupView:
    """The status of one group on node `name`."""
    group = cluster.groups[view.group]
    status = view.status or _unreported(cluster, name, group, view)
    volumes = {volume.name: _idle(volume) for volume in group.volumes} | status["volumes"]
    nbd = f"nbd://{group.nbd}"
    return {
        **status,
        "why": _why(view),
        "volumes": {
            volume: {**of, "uri": f"{nbd}/{volume}", "rates": view.rates.get(volume, NO_RATES)}
            for volume, of in volumes.items()
        },
        "nbd": nbd,
        "pid": view.pid,
        "restarts": view.restarts,
        "report_age_s": round(view.report_age_s, 1),
    }


def _why(view: View) -> str:
    if view.report_age_s > STALE_AFTER_S:
        stuck = f"its data process (pid {view.pid}) has not reported for {view.report_age_s:.0f} s"
        return f"{stuck}; its last word was: {view.why}" if view.why else stuck
    return view.why


def _unreported(cluster: Cluster, name: str, group: Group, view: View) -> Status:
    """What the configuration alone knows of a group."""
    peer = cluster.peer_of(name)
    primary = group.preferred_owner == name
    return {
        "group": group.name,
        "role": "primary" if primary else "secondary",
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
