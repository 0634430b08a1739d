"""Whether two nodes have the same cluster file: a digest of each part of it, small enough for every heartbeat. Pure.

``BINDING`` parts must be the same, or two nodes could own a group: with two arbiters both could be granted it, and with
two lengths of a lease one could take over while the other still answers (rules 2 and 5). Of the others a difference is
told, and what it concerns is refused where it matters, such as a volume of another size.
"""

import hashlib
import json
from dataclasses import asdict

from stortrends_ha.config.model import Cluster

BINDING = ("arbiter", "timing")

Sections = tuple[tuple[str, str], ...]
"""Name and digest."""


def sections(cluster: Cluster) -> Sections:
    """Of all of the file but for the path of the key, which nodes have proven to share."""
    failover = asdict(cluster.failover)
    hold_down = failover.pop("hold_down_s")
    parts = {
        "arbiter": [type(cluster.arbiter).__name__, asdict(cluster.arbiter)],
        "timing": failover,
        "nodes": {name: asdict(node) for name, node in cluster.nodes.items()},
        "groups": [hold_down, {name: asdict(group) for name, group in cluster.groups.items()}],
        "limits": asdict(cluster.limits),
    }
    return tuple((name, _digest(part)) for name, part in parts.items())


def _digest(part: object) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()[:8]
