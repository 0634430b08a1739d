"""`group move`, `group force-own`, `drain`, `undrain`: ask a node, follow how it goes, say how long clients were held.

Invariants: a command returns 0 only when what was asked for is so, else 1 with what the nodes say of it. What has begun
is not taken back: Ctrl-C (130), or the end of this patience, ends the watching only. How long clients were held is
always of this very move: a node's word counts only if that move has ended since the command began.
With the nodes on two machines, one control socket answers here. Both nodes measure a handover; where nobody who answers
has (a heartbeat was lost), an upper bound is said instead.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stortrends_ha.cli.asking import Nodes, View, answering, cluster_of, newest_of, request, the_node, views_of
from stortrends_ha.cli.status import ask
from stortrends_ha.cli.words import sentence
from stortrends_ha.config import Cluster
from stortrends_ha.errors import StorTrendsError

# The nodes forget the wish after 30 s; a drain moves one group after the other, each in well under a second.
PATIENCE_S = 35.0
# A move takes some ten milliseconds, and looking costs the node less than one; after a second there is no hurry.
LOOK_AGAIN_S = 0.02
LOOK_AGAIN_LATER_S = 0.2
# The old owner hears with the next heartbeat that the new one serves, and knows then how long clients were held.
LAST_WORD_S = 1.0
# What has to wait for something says so after this.
SAY_WHY_AFTER_S = 1.5

_STAGES = {
    "releasing": "{node} answers what is under way, and takes no more requests",
    "handing": "{node} has stopped, and the record is being changed",
    "stopping": "{node} stops listening to the old owner",
    "standing": "{node} asks for the record that makes it the owner",
}


# --- The commands ---------------------------------------------------------------------------------


def move(config: Path, group: str, to: str) -> int:
    """Move a group to the node ``to``; either node can be asked; returns the exit code."""
    cluster = cluster_of(config, groups=[group], nodes=[to])
    nodes = answering(cluster, config)
    views = views_of(nodes, group)
    if not views:
        raise StorTrendsError(f"{' and '.join(nodes)} do not know group {group}: started with another cluster file?")
    owner = newest_of(views)["owner"]
    asked = owner if owner in nodes else next(iter(nodes))
    began_s = time.monotonic()
    answer = request(cluster, asked, {"command": "move", "group": group, "to": to})
    if answer["already"]:
        return _already(nodes, group, to)
    print(f"Group {group}: {asked} is asked to move it from {owner} to {to}.", flush=True)
    moving = Moving(group, to, answer["epoch"], began_s, once=asked == owner)
    interrupted = f"The nodes go on with the move of {group}; `stortrends-ha status` shows how it ends."
    if _watch(cluster, [moving], interrupted):
        return 0
    return _failed(cluster, [moving], f"Group {group} has not moved to {to}.", "The nodes try no longer: ask again.")


def force_own(config: Path, group: str, name: str | None, *, accept_data_loss: bool) -> int:
    """Rule 11's override: make this machine's node the owner, whatever may be lost; returns the exit code."""
    cluster = cluster_of(config, groups=[group], nodes=[name] if name else [])
    node = the_node(cluster, config, name, "group force-own")
    peer, began_s = cluster.peer_of(node).name, time.monotonic()
    answer = request(cluster, node, {"command": "force_own", "group": group, "accept_data_loss": accept_data_loss})
    print(*answer["risk"], f"Group {group}: {node} makes itself the owner.", sep="\n", flush=True)
    moving = Moving(group, node, answer["epoch"], began_s, override=True)
    if not _watch(cluster, [moving], f"{node} goes on with it; `stortrends-ha status` shows how it ends."):
        return _failed(cluster, [moving], f"{node} does not own group {group}.", f"{node} tries no longer: ask again.")
    if answer["new_lineage"]:
        print(f"The data has a new lineage. When {peer} is back, on {peer}: stortrends-ha group diff {group}, and")
        print(f"stortrends-ha group resolve {group} --keep {node}: what differs there is kept, and it is synced.")
    return 0


def drain(config: Path, name: str) -> int:
    """Move everything away from this machine's node, and keep it away; returns the exit code."""
    cluster = cluster_of(config, nodes=[name])
    node = the_node(cluster, config, name, "drain")
    peer, began_s = cluster.peer_of(node).name, time.monotonic()
    groups: dict[str, View] = request(cluster, node, {"command": "drain"})["groups"]
    print(f"Node {node} is drained: nothing moves to it until: stortrends-ha undrain {node}", flush=True)
    movings = [Moving(group, peer, of["epoch"], began_s) for group, of in groups.items() if not of["why"]]
    interrupted = f"{node} stays drained, and goes on moving its groups; `stortrends-ha status` shows how it ends."
    arrived = _watch(cluster, movings, interrupted)
    for group, of in groups.items():
        if of["why"]:
            serving = "which goes on serving it" if of["serving"] else "which does not serve it now"
            print(f"Group {group} stays on {node}, {serving}: {of['why']}.", file=sys.stderr)
            print(f"  It moves by itself when {of['until']}.", file=sys.stderr)
    if not arrived:
        return _failed(
            cluster, movings, f"Not every group has moved to {peer}.", "They move by themselves as they can."
        )
    if len(movings) < len(groups):
        return 1
    print(f"{node} owns {'nothing now' if groups else 'no group'}: it can be stopped without a pause for any client.")
    return 0


def undrain(config: Path, name: str) -> int:
    """Let groups be owned by this machine's node again; returns the exit code."""
    cluster = cluster_of(config, nodes=[name])
    node = the_node(cluster, config, name, "undrain")
    owned = request(cluster, node, {"command": "undrain"})["groups"]
    coming = [
        group.name
        for group in cluster.groups.values()
        if (group.preferred_owner, group.failback) == (node, "automatic") and group.name not in owned
    ]
    print(f"Node {node} may own groups again; what moved away stays where it is until it is moved.")
    if coming:
        well_s = cluster.failover.hold_down_s
        print(f"By automatic failback come back, when all has been well for {well_s:g} s: {', '.join(coming)}")
    return 0


def _already(nodes: Nodes, group: str, to: str) -> int:
    print(f"Group {group} is on {to} already.")
    if to not in nodes or nodes[to]["groups"][group]["serving"]:
        return 0
    print(f"stortrends-ha: But {to} does not serve it now.", *_reasons(nodes, group), sep="\n", file=sys.stderr)
    return 1


# --- Following what the nodes do ------------------------------------------------------------------


@dataclass(slots=True)
class Moving:
    """One group on its way to node ``to``, as the nodes that answer on this machine show it.

    ``epoch``: of the record before; ``began_s``: monotonic time before the command was given; ``once``: whether the
    nodes try only once; ``override``: whether clients have been held since long before, so the time does not matter.
    """

    group: str
    to: str
    epoch: int
    began_s: float
    once: bool = False
    override: bool = False
    arrived: bool = False
    failed: bool = False
    _said: set[str] = field(default_factory=set)
    _left: str = ""  # the node that has begun to give it away
    _served_s: float = 0.0  # when the new owner was seen serving first

    def look(self, nodes: Nodes, now_s: float) -> str:
        """What is new, a sentence to tell; empty if nothing is."""
        views = views_of(nodes, self.group)
        if not views:
            return ""
        if ended := self._ended(views, now_s):
            self.arrived = True
            return f"Group {self.group} {ended}"
        self._notice_failure(views)
        stage = self._stage(views, now_s)
        if not stage or _gist(stage) in self._said:
            return ""
        self._said.add(_gist(stage))
        return sentence(f"Group {self.group}: {stage}")

    def _ended(self, views: Mapping[str, View], now_s: float) -> str:
        """What came of it, to stand after the group's name; empty while it is under way."""
        newest = newest_of(views)
        if newest["owner"] != self.to or newest["epoch"] <= self.epoch:
            return ""
        last = self._last_move(views, now_s)
        if self.to not in views:  # the old owner says so when the new one has told it that it serves
            return self._in_words(last) if last else ""
        if not views[self.to]["serving"]:
            return ""
        self._served_s = self._served_s or now_s
        if self.override:
            return f"is served by {self.to} now. Clients were held {self._until(last)}."
        if last:
            return self._in_words(last)
        if len(views) > 1 and now_s < self._served_s + LAST_WORD_S:
            return ""
        bound_ms = (self._served_s - self.began_s) * 1000
        return f"is on {self.to} now. Clients were held for less than {bound_ms:.0f} ms."

    def _until(self, last: View | None) -> str:
        """Until when an override let them wait; since when is known only to an owner that has lost its peer."""
        if last and last["kind"] == "alone":
            return f"for {last['duration_ms']:.0f} ms"
        took_ms = last["duration_ms"] if last else (self._served_s - self.began_s) * 1000
        return f"until {took_ms:.0f} ms after it was given"

    def _last_move(self, views: Mapping[str, View], now_s: float) -> View | None:
        """The end of this very move, as a node saw it."""
        moves = [view["last_move"] for view in views.values() if view["last_move"]]
        return max(
            (last for last in moves if last["ago_s"] < now_s - self.began_s),
            key=lambda last: last["duration_ms"],
            default=None,
        )

    def _in_words(self, last: View) -> str:
        how = ", which took over by itself" if last["kind"] == "takeover" else ""
        return f"is on {self.to} now{how}. Clients were held for {last['duration_ms']:.0f} ms."

    def _notice_failure(self, views: Mapping[str, View]) -> None:
        """An owner that stopped for the move and then serves again has given it up."""
        for node, view in views.items():
            if view["phase"] in ("releasing", "handing"):
                self._left = node
            elif node == self._left and view["phase"] == "leading" and self.once:
                self.failed = True

    def _stage(self, views: Mapping[str, View], now_s: float) -> str:
        """What is being done, or what it waits for."""
        newest = newest_of(views)
        if newest["owner"] == self.to and newest["epoch"] > self.epoch:
            late = now_s >= self.began_s + SAY_WHY_AFTER_S and newest["why"]
            return f"{self.to} owns it now, {f'but does not serve yet: {late}' if late else 'and begins to serve'}"
        for node, view in views.items():
            if view["phase"] in _STAGES:
                return _STAGES[view["phase"]].format(node=node)
        if now_s < self.began_s + SAY_WHY_AFTER_S:
            return ""
        why = newest["why"] or newest["arbiter"]
        return f"not yet, {why}" if why else f"waiting until {newest['owner']} can hand it over"


def _watch(cluster: Cluster, movings: Sequence[Moving], interrupted: str) -> bool:
    """Tell how the groups get to their node; whether they all did. ``interrupted``: what to say at Ctrl-C."""
    began_s = time.monotonic()
    silent = False
    try:
        while left := [moving for moving in movings if not moving.arrived]:
            now_s = time.monotonic()
            if now_s > began_s + PATIENCE_S or any(moving.failed for moving in left):
                return False
            nodes, _ = ask(cluster, cluster.nodes)
            if not nodes and not silent:
                print("No node answers on this machine any more; waiting for one.", file=sys.stderr)
            silent = not nodes
            for moving in left:
                if news := moving.look(nodes, time.monotonic()):
                    print(news, flush=True)
            time.sleep(LOOK_AGAIN_S if now_s < began_s + 1 else LOOK_AGAIN_LATER_S)
    except KeyboardInterrupt:
        print(f"\nNot watched any longer. {interrupted}", file=sys.stderr)
        raise
    return True


def _failed(cluster: Cluster, movings: Iterable[Moving], what: str, next_step: str) -> int:
    """Say why, as far as the nodes know; returns the exit code."""
    nodes, _ = ask(cluster, cluster.nodes)
    print(f"stortrends-ha: {what}", file=sys.stderr)
    for moving in movings:
        if not moving.arrived:
            print(*_reasons(nodes, moving.group), sep="\n", file=sys.stderr)
    print(next_step, file=sys.stderr)
    return 1


def _reasons(nodes: Nodes, group: str) -> Iterator[str]:
    """How each node sees a group."""
    if not nodes:
        yield "  No node answers on this machine."
    for node, view in views_of(nodes, group).items():
        why = view["why"]
        if view["arbiter"] and view["arbiter"] not in why:
            why = f"{why}; {view['arbiter']}" if why else view["arbiter"]
        yield sentence(f"  {node} says: {view['owner']} owns {group}; here it is {view['state']}{why and f': {why}'}")


def _gist(sentence: str) -> str:
    """Without the numbers, which change all the time."""
    return "".join(character for character in sentence if not character.isdigit())
