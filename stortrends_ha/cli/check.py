"""`stortrends-ha check`: is the configuration file right, and what does it describe?

Invariant: judges the file and those key files that are on this machine, so it can run anywhere, before anything is
started. A key file that is elsewhere is no mistake; that it was not checked is said.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from stortrends_ha.config import (
    Arbiter,
    Cluster,
    Etcd,
    Fencing,
    Group,
    Manual,
    Node,
    Volume,
    Witness,
    load,
    read_key,
)
from stortrends_ha.errors import ConfigError


def check(config: Path) -> int:
    """Say what the file describes, or every problem in it; returns the exit code."""
    try:
        cluster = load(config)
        _check_keys(cluster)
    except ConfigError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        print(f"{config}: {_count(len(error.problems), 'problem')}", file=sys.stderr)
        return 1
    print(*_description(config, cluster), sep="\n", flush=True)
    for path in dict.fromkeys(cluster.key_file.values()):
        if why := _why_unseen(path):
            print(f"Not checked: the key file {path}, which {why}.", file=sys.stderr)
    return 0


def _why_unseen(path: Path) -> str:
    """Why a key file cannot be judged here; empty if it can."""
    if os.access(path, os.R_OK):
        return ""
    return "you are not allowed to read" if os.access(path, os.F_OK) else "is not on this machine"


def _check_keys(cluster: Cluster) -> None:
    """Raise `ConfigError` with what is wrong with the key files that are here."""
    keys: dict[bytes, str] = {}
    problems: dict[str, None] = {}
    for node, path in cluster.key_file.items():
        if _why_unseen(path):
            continue
        try:
            keys.setdefault(read_key(path), node)
        except ConfigError as error:
            problems.update(dict.fromkeys(f"key_file: {problem}" for problem in error.problems))
    if len(keys) > 1:
        problems[f"key_file: {' and '.join(keys.values())} have different keys, expected the same"] = None
    if problems:
        raise ConfigError(list(problems))


def _description(config: Path, cluster: Cluster) -> Iterator[str]:
    volumes = [volume for group in cluster.groups.values() for volume in group.volumes]
    counts = f"{_count(len(cluster.groups), 'group')}, {_count(len(volumes), 'volume')}"
    total = _size(sum(volume.size_bytes for volume in volumes))
    yield f"{config} is right: cluster {cluster.name} with {counts}, {total} in all."
    yield "Nodes"
    yield from _columns([_node(node) for node in cluster.nodes.values()])
    yield f"Who may go on alone is decided by {_arbiter(cluster.arbiter)}"
    for group in cluster.groups.values():
        yield f"Group {group.name}, owned by {group.preferred_owner} when both nodes are well"
        yield from _columns(_group(group))
        yield from _columns([_volume(group, volume) for volume in group.volumes])


def _node(node: Node) -> list[str]:
    heartbeat = f"heartbeat at {' and '.join(map(str, node.heartbeat))}"
    metrics = f"metrics on http://{node.metrics}/metrics"
    return [node.name, node.address, heartbeat, f"state in {node.state_dir}", metrics]


def _arbiter(arbiter: Arbiter) -> str:
    match arbiter:
        case Witness(address):
            return f"the witness at {address}"
        case Etcd(endpoints):
            return f"etcd at {' and '.join(endpoints)}"
        case Fencing(agents):
            return f"a fence agent: {', '.join(f'{agent.agent} for {node}' for node, agent in agents.items())}"
        case Manual():
            return "the operator"


def _group(group: Group) -> Iterator[list[str]]:
    ports = ", ".join(f"port {port} on {node}" for node, port in group.link_ports.items())
    yield ["failback", group.failback]
    yield ["replication", ports]
    for floating in group.floating:
        where = [f"on {interface} of {node}" for node, interface in floating.interface.items()]
        yield ["floating address", f"{floating.address} {', '.join(where)}"]
    for node, path in group.nbd_unix.items():
        yield ["Unix socket", f"{path} on {node}"]


def _volume(group: Group, volume: Volume) -> list[str]:
    paths = [f"{path} on {node}" for node, path in volume.backing.items()]
    if len(set(volume.backing.values())) == 1:
        paths = [f"{next(iter(volume.backing.values()))} on both nodes"]
    access = "read-only" if volume.read_only else "read-write"
    cache = f"cache {volume.cache}"
    return [volume.name, _size(volume.size_bytes), access, cache, group.uri(volume.name), ", ".join(paths)]


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
