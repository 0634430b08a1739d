"""Which node of this machine to ask, and asking it: for all commands that a node carries out.

With the nodes on two machines, one control socket answers here.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stortrends_ha.cli import client
from stortrends_ha.cli.client import NoAnswer, NodeStatus
from stortrends_ha.cli.status import ask
from stortrends_ha.config import Cluster, load
from stortrends_ha.errors import ConfigError, StorTrendsError

# What is asked for may be written to the disk before it is answered.
REQUEST_S = 10.0

Nodes = dict[str, NodeStatus]
View = dict[str, Any]


def cluster_of(config: Path, *, groups: Iterable[str] = (), nodes: Iterable[str] = ()) -> Cluster:
    """The cluster of a file, which must have these groups and nodes. Raises ConfigError."""
    cluster = load(config)
    for thing, names, known in (("group", groups, cluster.groups), ("node", nodes, cluster.nodes)):
        for name in names:
            if name not in known:
                raise ConfigError([f"{config} has no {thing} {name!r}; its {thing}s are {' and '.join(known)}."])
    return cluster


def answering(cluster: Cluster, config: Path) -> Nodes:
    """The nodes that answer on this machine."""
    nodes, silent = ask(cluster, cluster.nodes)
    if not nodes:
        reasons = "; ".join(f"{control}: {why}" for control, why in silent.items())
        raise StorTrendsError(f"No node of {config} answers on this machine ({reasons}).")
    return nodes


def the_node(cluster: Cluster, config: Path, name: str | None, command: str) -> str:
    """The node of this machine, which must be the named one."""
    nodes = answering(cluster, config)
    if name is None and len(nodes) > 1:
        raise StorTrendsError(f"Both {' and '.join(nodes)} run on this machine: say which one with --name.")
    if name is not None and name not in nodes:
        raise StorTrendsError(
            f"Node {name} does not answer on this machine, only {' and '.join(nodes)} does. `stortrends-ha {command}` "
            f"is given on the machine of {name} itself, while {name} runs."
        )
    return name or next(iter(nodes))


def request(cluster: Cluster, node: str, command: Mapping[str, Any], timeout_s: float = REQUEST_S) -> dict[str, Any]:
    """The node's answer. Raises StorTrendsError, also with the node's refusal."""
    control = cluster.nodes[node].control
    try:
        return client.request(control, dict(command), timeout_s)
    except NoAnswer as error:
        raise StorTrendsError(
            f"Node {node} gave no answer at {control}: {error}. Whether it does what was asked is not known: see "
            "`stortrends-ha status`."
        ) from error


def views_of(nodes: Nodes, group: str) -> dict[str, View]:
    """What each node says of a group, if it knows it."""
    return {node: status["groups"][group] for node, status in nodes.items() if group in status["groups"]}


def newest_of(views: Mapping[str, View]) -> View:
    """What the node says that has the newest record, the owner by it if that answers."""
    return max(views.items(), key=lambda item: (item[1]["epoch"], item[0] == item[1]["owner"]))[1]
