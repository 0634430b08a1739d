"""`stortrends-ha status`: ask the nodes of this machine and show what they say.

Invariants: nodes are asked only through their control sockets; a node that does not answer is normal (the
other machine's never does), and only when none does is that an error.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from stortrends_ha.cli import client, report
from stortrends_ha.cli.client import NoAnswer, NodeStatus
from stortrends_ha.config import Cluster, load
from stortrends_ha.errors import ConfigError, StorTrendsError


def status_of_socket(control: Path, *, as_json: bool, verbose: bool = False) -> int:
    """Show the node behind one control socket; returns the exit code."""
    try:
        found = client.status(control)
    except NoAnswer as error:
        raise StorTrendsError(f"No node answers at {control}: {error}.") from error
    return _show({found["node"]: found}, as_json, verbose)


def status_of_cluster(config: Path, name: str | None, *, as_json: bool, verbose: bool = False) -> int:
    """Show the nodes of a cluster that answer on this machine, or the named one; returns the exit code."""
    cluster = load(config)
    if name is not None and name not in cluster.nodes:
        raise ConfigError([f"{config} has no node {name!r}; its nodes are {' and '.join(cluster.nodes)}."])
    nodes, silent = ask(cluster, [name] if name else cluster.nodes)
    if not nodes:
        reasons = "; ".join(f"{control}: {why}" for control, why in silent.items())
        who = f"Node {name}" if name else "No node"
        verb = "does not answer" if name else "answers"
        raise StorTrendsError(
            f"{who} of {config} {verb} on this machine ({reasons}).\n"
            f"A node is started with: stortrends-ha node --config {config} --name {name or 'NAME'}"
        )
    return _show(nodes, as_json, verbose)


def ask(cluster: Cluster, names: Iterable[str]) -> tuple[dict[str, NodeStatus], dict[Path, str]]:
    """The status of each of the nodes that answers, and why the other control sockets do not."""
    nodes: dict[str, NodeStatus] = {}
    silent: dict[Path, str] = {}
    wanted = list(names)
    for control in dict.fromkeys(cluster.nodes[name].control for name in wanted):
        try:
            found = client.status(control)
        except NoAnswer as error:
            silent[control] = str(error)
            continue
        if found["node"] in wanted:
            nodes[found["node"]] = found
        else:  # on two machines, both nodes usually have the same path
            silent[control] = f"it is {found['node']} that answers there"
    return nodes, silent


def _show(nodes: Mapping[str, NodeStatus], as_json: bool, verbose: bool = False) -> int:
    if as_json:
        json.dump({"nodes": nodes}, sys.stdout)
        print()
    else:
        report.show(nodes, verbose=verbose)
    return 0
