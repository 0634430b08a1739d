"""How the demo's groups are, put together from what its nodes say.

Invariant: a group is in sync only when both nodes are there, agree on its record, and say so; who owns it is never
assumed, because the owner may have changed in an earlier run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stortrends_ha.cli.client import NodeStatus
from stortrends_ha.cli.demo_layout import NODES

IN_SYNC = "in-sync"
TROUBLE = ("held", "failed")  # in these states a node says what somebody has to know


@dataclass(frozen=True, slots=True)
class GroupState:
    """One group; `owner` is "" while nobody who is there owns it, and `state` is a word as in the status."""

    owner: str
    state: str
    why: str = ""

    @property
    def in_sync(self) -> bool:
        """Whether every write is on both nodes."""
        return self.state == IN_SYNC

    def __str__(self) -> str:
        """In words, to stand after the group's name."""
        owner = f"{self.owner} owns it, {self.state}" if self.owner else self.state
        return f"{owner} ({self.why})" if self.why and not self.in_sync else owner


def group_state(name: str, statuses: Mapping[str, NodeStatus]) -> GroupState:
    """How a group is, from the status of those nodes that answer."""
    views: dict[str, Any] = {node: status["groups"][name] for node, status in statuses.items()}
    if not views:
        return GroupState("", f"waiting for {' and '.join(NODES)}")
    newest = max(views.values(), key=lambda view: view["epoch"])
    owner: str = newest["owner"]
    if owner not in views or views[owner]["owner"] != owner:
        why = newest["why"] if newest["state"] in TROUBLE else ""
        return GroupState("", f"waiting for {owner or 'an owner'}", why)
    own = views[owner]
    if own["state"] != IN_SYNC:
        return GroupState(owner, own["state"], own["why"])
    for node in NODES:
        if node not in views:
            return GroupState(owner, f"waiting for {node}")
        view = views[node]
        if (view["epoch"], view["state"]) != (newest["epoch"], IN_SYNC):
            return GroupState(owner, f"waiting for {node}", view["why"])
    return GroupState(owner, IN_SYNC)
