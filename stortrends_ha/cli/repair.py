"""`volume replace`: what is done to the copy of a node that does not own.

The node says what would be overwritten, or why it refuses; nothing is done before the operator has confirmed that.
"""

import sys
from pathlib import Path
from typing import Any

from stortrends_ha.cli.asking import cluster_of, request, the_node
from stortrends_ha.config import Cluster
from stortrends_ha.errors import StorTrendsError

# Its data process may have to be started again first.
REPLACE_S = 45.0


def replace(config: Path, volume: str, node: str, *, confirmed: bool) -> int:
    """Make the copy of a volume on this machine's node anew, from the other node; returns the exit code."""
    cluster = cluster_of(config, nodes=[node])
    command = {"command": "replace", "volume": volume, "node": the_node(cluster, config, node, "volume replace")}
    have_it_done(cluster, node, command, confirmed=confirmed)
    return 0


def have_it_done(cluster: Cluster, node: str, command: dict[str, Any], *, confirmed: bool) -> None:
    """Say what the node would do, have it confirmed, have it done. Raises StorTrendsError if it is not."""
    print(*request(cluster, node, command)["says"], sep="\n", flush=True)
    if not confirmed:
        confirm()
    for sentence in request(cluster, node, {**command, "confirmed": True}, REPLACE_S)["says"]:
        print(sentence)


def confirm() -> None:
    """Go on only if whoever sits there says so. Raises StorTrendsError."""
    if not sys.stdin.isatty():
        raise StorTrendsError("Nothing was done: nobody can be asked here. If it is meant so, add --yes.")
    if input("Go on? Type yes: ").strip().lower() != "yes":
        raise StorTrendsError("Nothing was done.")
