"""`stortrends-ha check`: is the configuration file right, and what does it describe?

Invariant: judges the file alone, so it can run on any machine, before anything is started.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from stortrends_ha.config import Cluster, Group, Node, Volume, load
from stortrends_ha.errors import ConfigError


def check(config: Path) -> int:
    """Say what the file describes, or every problem in it; returns the exit code."""
    try:
        cluster = load(config)
    except ConfigError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        print(f"{config}: {_count(len(error.problems), 'problem')}", file=sys.stderr)
        return 1
    print(*_description(config, cluster), sep="\n")
    return 0


def _description(config: Path, cluster: Cluster) -> Iterator[str]:
    volumes = [volume for group in cluster.groups.values() for volume in group.volumes]
    counts = f"{_count(len(cluster.groups), 'group')}, {_count(len(volumes), 'volume')}"
    total = _size(sum(volume.size_bytes for volume in volumes))
    yield f"{config} is right: cluster {cluster.name} with {counts}, {total} in all."
    yield "Nodes"
    yield from _columns([_node(node) for node in cluster.nodes.values()])
    for group in cluster.groups.values():
        yield f"Group {group.name}, owned by {group.preferred_owner} when both nodes are well"
        yield from _columns(_group(group))
        yield from _columns([_volume(group, volume) for volume in group.volumes])


def _node(node: Node) -> list[str]:
    metrics = f"metrics on http://{node.metrics}/metrics"
    return [node.name, node.address, f"state in {node.state_dir}", metrics]


def _group(group: Group) -> Iterator[list[str]]:
    ports = ", ".join(f"port {port} on {node}" for node, port in group.link_ports.items())
    yield ["replication", ports]
    for node, path in group.nbd_unix.items():
        yield ["Unix socket", f"{path} on {node}"]


def _volume(group: Group, volume: Volume) -> list[str]:
    paths = [f"{path} on {node}" for node, path in volume.backing.items()]
    if len(set(volume.backing.values())) == 1:
        paths = [f"{next(iter(volume.backing.values()))} on both nodes"]
    access = "read-only" if volume.read_only else "read-write"
    uri = f"nbd://{group.nbd}/{volume.name}"
    return [volume.name, _size(volume.size_bytes), access, uri, ", ".join(paths)]


def _columns(rows: Iterable[list[str]]) -> Iterator[str]:
    """Lines in which the cells stand below each other."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _size(size_bytes: int) -> str:
    for unit, unit_bytes in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= unit_bytes:
            return f"{round(size_bytes / unit_bytes, 2):g} {unit}"
    return f"{size_bytes} bytes"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
