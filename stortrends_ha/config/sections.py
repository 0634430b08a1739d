"""Whether two nodes have the same cluster file: a digest of each part of it, small enough for every heartbeat. Pure.

``BINDING`` parts must be the same, or two nodes could own a group: with two arbiters both could be granted it, and with
two lengths of a lease one could take over while the other still answers (rules 2 and 5). Of the others a difference is
told, and what it concerns is refused where it matters, such as a volume of another size.
"""

import hmac
import json
from dataclasses import fields, is_dataclass
from typing import Any

from stortrends_ha.config.model import Cluster

BINDING = ("arbiter", "timing")

Sections = tuple[tuple[str, str], ...]
"""Name and digest."""


def sections(cluster: Cluster, key: bytes) -> Sections:
    """Of all of the file but for the path of the key, which nodes have proven to share. Nobody without the key can find
    out from a digest what is in the file, such as the password of a fence agent."""
    failover = _plain(cluster.failover)
    hold_down = failover.pop("hold_down_s", None)
    parts = {
        "arbiter": [type(cluster.arbiter).__name__, _plain(cluster.arbiter)],
        "timing": failover,
        "nodes": _plain(cluster.nodes),
        "groups": [hold_down, _plain(cluster.groups)],
        "limits": _plain(cluster.limits),
    }
    return tuple((name, _digest(key, part)) for name, part in parts.items())


def _plain(value: Any) -> Any:
    """Without what has its default: a newer version that knows of more keys has the same digest."""
    if is_dataclass(value):
        return {
            field.name: _plain(getattr(value, field.name))
            for field in fields(value)
            if getattr(value, field.name) != field.default
        }
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _digest(key: bytes, part: object) -> str:
    return hmac.digest(key, json.dumps(part, sort_keys=True, default=str).encode(), "sha256").hex()[:8]
