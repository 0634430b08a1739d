"""`stortrends-ha release-addresses`: remove a node's floating addresses, after the node has ended in whatever way.

Job: what systemd runs when a node has ended (ExecStopPost), so that nothing waits for addresses to expire.
Invariant: does the same however often it is run. A running node puts the addresses of its groups back in a moment.
"""

from pathlib import Path

from stortrends_ha.config import load
from stortrends_ha.errors import ConfigError
from stortrends_ha.network.floating import floating_addresses


def release_addresses(config: Path, name: str) -> int:
    """Remove them from every interface of this machine, and say from which; returns the exit code."""
    cluster = load(config)
    if name not in cluster.nodes:
        raise ConfigError([f"{config} has no node {name!r}; its nodes are {' and '.join(cluster.nodes)}."])
    placed = floating_addresses(cluster, name)
    if not placed:
        return 0
    from stortrends_ha.network.kernel import remove_all  # loads what most clusters do without

    for found in remove_all({floating.ip for addresses in placed.values() for floating in addresses}):
        print(f"{found.ip} has been removed from {found.interface}.")
    return 0
