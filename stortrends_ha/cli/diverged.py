"""`group diff` and `group resolve --keep`: two copies of a group that have no common history.

The node that does not own does the work; this asks it, follows it, and shows what it found. Ctrl-C ends the work, too:
what was not overwritten by then will not be.
"""

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stortrends_ha.cli.asking import Nodes, answering, cluster_of, request, the_node
from stortrends_ha.cli.repair import have_it_done
from stortrends_ha.config import Address, Cluster
from stortrends_ha.errors import StorTrendsError

LOOK_AGAIN_S = 0.3
# The node ends an export that nobody asks for any more after ten seconds.
RENEW_S = 2.0
# A data process that is not there, or has another role now, says nothing of it any more.
SILENT_S = 5.0
_MIB = 1 << 20

Comparison = dict[str, Any]


def diff(config: Path, group: str, *, as_json: bool) -> int:
    """Show where two copies differ, and the history of both; returns the exit code."""
    cluster = cluster_of(config, groups=[group])
    node = _secondary(cluster, config, group)
    request(cluster, node, {"command": "diff", "group": group})
    found = _follow(cluster, node, group, quiet=as_json)
    if as_json:
        json.dump({"group": group, "node": node, **found}, sys.stdout)
        print()
    else:
        _show(group, cluster.peer_of(node).name, node, found)
    return 0


def resolve(config: Path, group: str, keep: str, *, confirmed: bool) -> int:
    """Keep the copy of one node; what is different in the other one goes to a file. Returns the exit code."""
    cluster = cluster_of(config, groups=[group], nodes=[keep])
    node = _secondary(cluster, config, group)
    have_it_done(cluster, node, {"command": "resolve", "group": group, "keep": keep}, confirmed=confirmed)
    found = _follow(cluster, node, group)
    print(f"Kept: {found['file']} ({found['differing_bytes'] / _MIB:.1f} MiB differed).")
    print(f"{keep} copies group {group} to {node} now: `stortrends-ha status` says how far it is.")
    print(f"What was on {node} can be had by: stortrends-ha group resolve {group} --extract FILE --to DIR")
    return 0


def export(config: Path, group: str, node: str, listen: Address) -> int:
    """Serve the copy of this machine's node read-only until Ctrl-C; returns the exit code."""
    cluster = cluster_of(config, groups=[group], nodes=[node])
    command = {"command": "show", "group": group, "host": listen.host, "port": listen.port}
    the_node(cluster, config, node, "group diff --export")
    request(cluster, node, command)
    for volume in cluster.groups[group].volumes:
        print(
            f"nbd://{listen}/{volume.name} is volume {volume.name} as it is on {node}, read-only, until Ctrl-C.",
            flush=True,
        )
    try:
        while True:
            time.sleep(RENEW_S)
            request(cluster, node, command)
    except KeyboardInterrupt:
        with contextlib.suppress(StorTrendsError):
            request(cluster, node, {"command": "end_diff", "group": group})
        raise


def _secondary(cluster: Cluster, config: Path, group: str) -> str:
    """The node of this machine that does not own; if only the owner answers, that, which says what to do."""
    nodes: Nodes = answering(cluster, config)
    for node, status in nodes.items():
        if group in status["groups"] and status["groups"][group]["owner"] != node:
            return node
    return next(iter(nodes))


def _follow(cluster: Cluster, node: str, group: str, *, quiet: bool = False) -> Comparison:
    """What was found, once it is done. Raises StorTrendsError if it ends otherwise."""
    progress = Progress(sys.stderr.isatty() and not quiet)
    heard_s = time.monotonic()
    try:
        while True:
            found = request(cluster, node, {"command": "comparison", "group": group})["comparison"]
            heard_s = time.monotonic() if found else heard_s
            if found and found["state"] == "done":
                return dict(found)
            if found and found["state"] == "failed":
                raise StorTrendsError(f"The copies of group {group} were not compared to the end: {found['why']}.")
            if time.monotonic() > heard_s + SILENT_S:
                raise StorTrendsError(f"{node} compares no more: `stortrends-ha status` says what it is doing.")
            if found:
                progress.show(found)
            time.sleep(LOOK_AGAIN_S)
    except KeyboardInterrupt:
        with contextlib.suppress(StorTrendsError):
            request(cluster, node, {"command": "end_diff", "group": group})
        raise
    finally:
        progress.end()


class Progress:
    """A line on the terminal that is overwritten."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._shown = False

    def show(self, found: Comparison) -> None:
        """How far it is."""
        if not self._wanted:
            return
        part = 100 * found["done_bytes"] / max(found["total_bytes"], 1)
        differs = f"{found['differing_bytes'] / _MIB:.1f} MiB differ"
        print(f"\r\033[K{found['state']}: {part:.0f}%, {differs} {found['why']}", end="", file=sys.stderr, flush=True)
        self._shown = True

    def end(self) -> None:
        """Nothing more comes."""
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _show(group: str, owner: str, node: str, found: Comparison) -> None:
    for name in (owner, node):
        role = "which owns and serves it" if name == owner else "which does not own it"
        print(f"Group {group} on {name}, {role}:")
        past = found["past"].get(name, {})
        for line in (*past.get("lineages", []), *past.get("records", [])[-10:]):
            print(f"  {line}")
    for volume, of in found["volumes"].items():
        _show_volume(volume, of)
    print(
        f"To keep the copy of {owner}: stortrends-ha group resolve {group} --keep {owner}   (on the machine of {node})"
    )


def _show_volume(volume: str, of: Mapping[str, Any]) -> None:
    if not of["ranges"] and not of["more_ranges"]:
        print(f"Volume {volume}: no difference.")
        return
    print(
        f"Volume {volume}: {of['differing_bytes'] / _MIB:.2f} of {of['size_bytes'] / _MIB:.0f} MiB differ, at offsets:"
    )
    for offset, length in of["ranges"]:
        print(f"  {offset:>16} to {offset + length - 1:<16} {length} bytes")
    if of["more_ranges"]:
        print(f"  and {of['more_ranges']} ranges more")
