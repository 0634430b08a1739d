"""What the operator can ask of a node over the control socket: move, drain, undrain, force-own, verify.

Each command is checked here and then only *begun*; how it goes is in the status, which the command line follows. What
cannot work is refused at once with a sentence that says why, and what would make it work. Nothing is decided here: the
group's state machine does the same as if this node had come to the wish by itself.

The answers, by name of the command (`cli.ownership` and `cli.verify` read them):
    move        {"already": bool, "epoch": int}; the epoch is that of the record before the move
    drain       {"groups": {GROUP: {"epoch": int, "why": str, "until": str, "serving": bool}}}: those that are owned
                here. ``why`` is what keeps one from moving now, a clause, or empty; ``until`` would change that,
                after "when"; ``serving``: whether clients are answered meanwhile
    undrain     {"groups": [GROUP, ...]}: those that are owned here
    force_own   {"epoch": int, "risk": [sentence, ...], "new_lineage": bool}: what may be lost in this very case, and
                whether the peer's copy can be synced again only by `group resolve`
    verify      {"run": str}: the name that this verify has in the status
    end_verify  {}
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from stortrends_ha.cluster.answers import Known, Unreachable
from stortrends_ha.cluster.explain import duration, silence
from stortrends_ha.cluster.phases import Phase
from stortrends_ha.cluster.view import View
from stortrends_ha.config import Cluster
from stortrends_ha.errors import StorTrendsError
from stortrends_ha.node.groups import GroupRunner, Wishes
from stortrends_ha.node.records import Records
from stortrends_ha.record import Record

Command = Callable[[dict[str, Any]], dict[str, Any] | Awaitable[dict[str, Any]]]


class Operator:
    """The commands of one node."""

    def __init__(
        self,
        me: str,
        cluster: Cluster,
        runners: Mapping[str, GroupRunner],
        records: Records,
        wishes: Wishes,
        changed: Callable[[], None],
    ) -> None:
        self._me = me
        self._peer = cluster.peer_of(me).name
        self._histories = cluster.nodes[me].state_dir / "records"
        self._runners = runners
        self._records = records
        self._wishes = wishes
        self._changed = changed

    def commands(self) -> dict[str, Command]:
        """By name."""
        return {
            "move": self.move,
            "drain": self.drain,
            "undrain": self.undrain,
            "force_own": self.force_own,
            "verify": self.verify,
            "end_verify": self.end_verify,
        }

    # --- Planned moves --------------------------------------------------------------------------

    def move(self, request: dict[str, Any]) -> dict[str, Any]:
        """Begin to move a group to a node; either node can be asked. Raises StorTrendsError."""
        runner = self._runner(request)
        to = request.get("to")
        if to not in (self._me, self._peer):
            raise StorTrendsError(f"There is no node {str(to)[:70]!r}; the nodes are {self._me} and {self._peer}.")
        record = runner.core.record
        if to == record.owner:
            return {"already": True, "epoch": record.epoch}
        why, until = self._obstacle(runner, str(to))
        if why:
            raise StorTrendsError(f"Group {runner.name} cannot move to {to} now: {why}. Ask again when {until}.")
        runner.move(str(to))
        return {"already": False, "epoch": record.epoch}

    async def drain(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Everything away from this node, and nothing back. Raises StorTrendsError."""
        await self._records.drain(True)
        owned = {name: runner for name, runner in self._runners.items() if runner.core.record.owner == self._me}
        self._wishes.draining = True
        self._changed()
        groups = {}
        for name, runner in owned.items():
            why, until = self._obstacle(runner, self._peer)
            groups[name] = {
                "epoch": runner.core.record.epoch,
                "why": why,
                "until": until,
                "serving": runner.serving,
            }
        return {"groups": groups}

    async def undrain(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Groups may be owned here again; none comes back by itself, but by its automatic failback."""
        await self._records.drain(False)
        self._wishes.draining = False
        self._changed()
        return {"groups": [name for name, runner in self._runners.items() if runner.core.record.owner == self._me]}

    def _obstacle(self, runner: GroupRunner, to: str) -> tuple[str, str]:
        """Why a group cannot move to a node now, and what would change that, after "when"; empty if it can.

        What passes in moments is no obstacle: the wish waits for it."""
        core, view = runner.core, runner.view()
        peer, here = view.peer, to == self._me
        if view.draining if here else view.peer_draining:
            return f"{to} is drained", f"{to} may own groups again (stortrends-ha undrain {to})"
        if not view.alive:
            takes_over = f"; if {to} has everything it takes over by itself" if here else ""
            return f"{silence(self._peer, view)}{takes_over}", f"{self._peer} is back and in sync"
        if view.stopping if here else view.peer_stopping:
            return f"{to} is being stopped", f"{to} is back and in sync"
        if to not in core.record.in_sync:
            return f"{to} is not in sync", f"{to} is in sync"
        unfit = runner.unfit if here else peer.unfit if peer else ""
        if unfit:
            return f"{to} must not own it, as {unfit}", "that is over"
        if core.waits_for and not here:  # the owner looks every few seconds; the secondary's word may be old
            return f"its record cannot be changed ({core.waits_for})", "it can be changed"
        return "", ""

    # --- Verify -----------------------------------------------------------------------------------

    async def verify(self, request: dict[str, Any]) -> dict[str, Any]:
        """Begin to compare the replicas of a group; either node can be asked. Raises StorTrendsError."""
        runner = self._runner(request)
        volumes, source = request.get("volumes"), request.get("from", "")
        if not isinstance(volumes, list) or not all(isinstance(name, str) for name in volumes):
            raise StorTrendsError("A verify needs a list of volumes.")
        run, repair = uuid.uuid4().hex, request.get("repair") is True
        why = await runner.ask("verify", run=run, volumes=volumes, repair=repair, source=str(source))
        if why:
            raise StorTrendsError(why)
        return {"run": run}

    async def end_verify(self, request: dict[str, Any]) -> dict[str, Any]:
        """End the verify that is under way. Raises StorTrendsError."""
        if why := await self._runner(request).ask("end_verify"):
            raise StorTrendsError(why)
        return {}

    # --- The override (rule 11) -----------------------------------------------------------------

    async def force_own(self, request: dict[str, Any]) -> dict[str, Any]:
        """Own a group here whatever may be lost. Raises StorTrendsError, without ``accept_data_loss`` with what that
        would be."""
        runner = self._runner(request)
        history = self._histories / f"{runner.name}.history"
        never, since = await asyncio.to_thread(out_of_sync_since, history, self._me)
        record, unknown = await self._newest_record(runner)
        self._refuse_needless(runner)
        core, view = runner.core, runner.view()
        leads = core.phase is Phase.LEADING  # then it goes on alone with the data that it has
        sentences = risk(self._me, self._peer, record, view, since, never=never, unknown=unknown)
        if request.get("accept_data_loss") is not True:
            raise StorTrendsError("\n".join(self._warning(runner.name, sentences, leads=leads)))
        runner.force()
        return {"epoch": core.record.epoch, "risk": sentences, "new_lineage": not leads}

    async def _newest_record(self, runner: GroupRunner) -> tuple[Record, str]:
        """The arbiter may know that the peer went on alone; and, if it does not answer, why, a clause."""
        own = runner.core.record
        answer = await runner.arbiter.read(runner.name) if runner.arbiter else Known(None)
        if isinstance(answer, Unreachable):
            return own, answer.why
        newer = answer.current is not None and answer.current.epoch > own.epoch
        return (answer.current if newer and answer.current else own), ""

    def _refuse_needless(self, runner: GroupRunner) -> None:
        """What the override would not help, or is not needed for."""
        core, view, name = runner.core, runner.view(), runner.name
        if core.record.owner == self._me and core.phase is Phase.LEADING and (core.record.alone or not view.suspected):
            held = " It does not serve it now: `stortrends-ha status` says what ends that."
            raise StorTrendsError(f"Node {self._me} owns group {name} already.{'' if runner.serving else held}")
        if view.alive and view.peer and view.peer.leading and not view.peer.serving:
            raise StorTrendsError(
                f"Node {self._peer} owns group {name} and is there, but does not serve it now: `stortrends-ha status` "
                "says what ends that."
            )
        if view.alive and view.peer and view.peer.leading:
            raise StorTrendsError(
                f"Node {self._peer} serves group {name}, so nothing has to be lost: "
                f"stortrends-ha group move {name} --to {self._me}"
            )
        if view.replica is None:
            raise StorTrendsError(f"Group {name} has no data process on {self._me}: `stortrends-ha status` says why.")
        if view.replica.failure:
            raise StorTrendsError(
                f"Node {self._me} cannot serve group {name}, as its disk failed ({view.replica.failure}): mend it, and "
                "start the node again."
            )

    def _warning(self, group: str, risk: list[str], *, leads: bool) -> list[str]:
        lineage = (
            f" The data gets a new lineage then: the copy of {self._peer} is not overwritten, and is synced again only "
            f"after: stortrends-ha group resolve {group} --keep {self._me}"
        )
        return [
            f"Nothing was done. What it would mean to own group {group} on {self._me}:",
            *risk,
            f"If there is no better way, add --accept-data-loss.{'' if leads else lineage}",
        ]

    def _runner(self, request: dict[str, Any]) -> GroupRunner:
        group = request.get("group")
        if not isinstance(group, str) or group not in self._runners:
            raise StorTrendsError(f"There is no group {str(group)[:70]!r}; the groups are: {', '.join(self._runners)}.")
        return self._runners[group]


def risk(
    me: str, peer: str, record: Record, view: View, since: str, *, never: bool = False, unknown: str = ""
) -> list[str]:
    """What may be lost if ``me`` owns the group now: sentences.

    ``since``: when ``me`` learnt that the record had dropped it, if that is known; the peer may have gone on alone long
    before. ``never``: it was never in sync, as far as it knows. ``unknown``: why there may be a newer record."""
    replica = view.replica
    said = []
    if me not in record.in_sync:
        lost = f"what {peer} has acknowledged since the two were connected last would be lost"
        if never:
            said.append(f"{me} has never been in sync, as far as it knows: its copy may be empty.")
        else:
            learnt = f" (it learnt of it at {since})" if since else ""
            said.append(f"{me} is out of sync{learnt}: {lost}.")
    if replica is not None and replica.needs_sync:
        said.append(f"A sync of {me} has begun and did not end: its copy is a mixture of old and new data.")
    if me not in record.in_sync:
        said.append(f"{peer} alone has everything.")
    elif replica is not None and replica.lost_cache:
        said.append(
            f"The host of {me} restarted, or its disk failed: writes that were acknowledged but not flushed may be "
            "missing here. What clients have flushed is here."
        )
    elif not said:
        said.append(
            f"By the newest record that is known here {me} has everything. If {peer} went on alone since it was heard "
            "last, what it has acknowledged since then would be lost."
        )
    if unknown and me in record.in_sync:
        said.append(f"Whether {peer} went on alone is not known now: {unknown}.")
    said.append(_whereabouts(peer, record, view))
    return said


def _whereabouts(peer: str, record: Record, view: View) -> str:
    """How the peer is, and what to try first."""
    if not view.alive:
        heard = f"was heard last {duration(view.silent_ns)} ago"
        if view.peer is None:
            heard = f"has not been heard since this node started, {duration(view.silent_ns)} ago"
        better = " To bring it back instead loses nothing." if peer in record.in_sync else ""
        return f"{peer} {heard}. Be sure that it is off.{better}"
    if view.peer is not None and view.peer.unfit:
        return f"{peer} is there but must not serve, as {view.peer.unfit}."
    return f"{peer} is there and does not serve the group now."


def out_of_sync_since(history: Path, node: str) -> tuple[bool, str]:
    """(whether the node was never in sync, when the newest record that has it so was followed by one that has not).

    From the lines of `node.records`: when a record was saved, and the record. An unreadable history says nothing."""
    try:
        lines = history.read_text().splitlines()
        rotated = history.with_suffix(".history.1").exists()
    except (OSError, ValueError):
        return False, ""
    in_sync = ever = False
    since = ""
    for line in lines:
        when, _, record = line.partition(" ")
        before, in_sync = in_sync, node in record.partition(", in sync ")[2].split(" and ")
        ever |= in_sync
        if before and not in_sync:
            since = when.replace("T", " ", 1)
    return bool(lines) and not ever and not rotated, since
