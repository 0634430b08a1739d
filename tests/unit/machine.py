"""Drives one ``cluster.group.Group`` by hand: a view to change, the effects that it wants, answers to give."""

import re
from dataclasses import replace
from typing import Any, TypeVar

from stortrends_ha.cluster import effects as do
from stortrends_ha.cluster.answers import Answer, Known
from stortrends_ha.cluster.group import Group
from stortrends_ha.cluster.phases import Phase
from stortrends_ha.cluster.view import Peer, Replica, Saved, Timing, View
from stortrends_ha.record import Record

E = TypeVar("E", bound=do.Effect)
MS = 1_000_000
S = 1000 * MS
A, B = "node-a", "node-b"
BOTH = (A, B)
TIMING = Timing(
    suspect_after_ns=S, takeover_delay_ns=200 * MS, retry_ns=250 * MS, check_ns=5 * S, hold_down_ns=60 * S,
    move_timeout_ns=30 * S,
)  # fmt: skip
WELL = Replica(
    epoch=0, leading=False, session=False, serving=False, joinable=False, peer_unfit="", failure="",
    lost_cache=False, needs_sync=False, settled_epoch=0,
)  # fmt: skip


class Machine:
    """A group on node-a with its peer node-b; effects that nobody asks for (log, lease) are kept apart."""

    def __init__(
        self, record: Record, *, alone_since: int | None = None, failback: bool = False, replica: Replica = WELL
    ) -> None:
        since = record.epoch if alone_since is None else alone_since
        self.group = Group("rg", A, B, Saved(record, since), TIMING, failback=failback)
        self.log: list[str] = []
        self.leases: list[int] = []
        self.moved: list[do.Moved] = []
        self.view = View(
            now_ns=100 * S, alive=False, suspected=False, silent_ns=0, peer=None, lease_until_ns=0,
            may_serve_from_ns=102 * S, draining=False, peer_draining=False, stopping=False, peer_stopping=False,
            replica=replica,
        )  # fmt: skip

    # --- The world ------------------------------------------------------------------------------

    def peer_is(self, record: Record | None = None, **changes: Any) -> None:
        """The peer is heard, a follower that is well unless ``changes`` say otherwise."""
        known = Peer(
            record=record or self.group.record, leading=False, serving=False, promise=True, unfit="", lost=False,
            wants=False,
        )  # fmt: skip
        self.view = replace(
            self.view, alive=True, suspected=False, silent_ns=0, peer=replace(known, **changes),
            lease_until_ns=self.view.now_ns + 3 * S // 2,
        )  # fmt: skip

    def peer_is_silent(self, for_ns: int = 2 * S) -> None:
        self.view = replace(self.view, alive=False, suspected=for_ns >= S, silent_ns=for_ns)

    def passes(self, ns: int) -> None:
        self.view = replace(self.view, now_ns=self.view.now_ns + ns)

    def replica_is(self, **changes: Any) -> None:
        self.view = replace(self.view, replica=replace(self.view.replica or WELL, **changes))

    def now(self, **changes: Any) -> None:
        self.view = replace(self.view, **changes)

    # --- Events: each returns what is wanted then ----------------------------------------------

    def step(self) -> list[do.Effect]:
        return self._sorted(self.group.step(self.view))

    def saved(self, effect: do.Save) -> list[do.Effect]:
        return self._sorted(self.group.saved(effect.saved, self.view))

    def done(self, effect: Any, error: str = "") -> list[do.Effect]:
        return self._sorted(self.group.done(effect.number, error, self.view))

    def answered(self, effect: Any, answer: Answer) -> list[do.Effect]:
        return self._sorted(self.group.arbiter_said(effect.number, answer, self.view))

    def _sorted(self, effects: list[do.Effect]) -> list[do.Effect]:
        for effect in effects:
            match effect:
                case do.Decision(text):
                    assert re.search(r" \(epoch \d+\)$", text), f"the log must say at which epoch: {text}"
                    self.log.append(text)
                case do.Lease(until_ns):
                    self.leases.append(until_ns)
                case do.Moved():
                    self.moved.append(effect)
        return [effect for effect in effects if not isinstance(effect, do.Decision | do.Lease | do.Moved)]


def only(effects: list[do.Effect], kind: type[E]) -> E:
    """The only effect, which is of this kind."""
    assert len(effects) == 1, effects
    assert isinstance(effects[0], kind), effects
    return effects[0]


def leading(record: Record, **options: Any) -> Machine:
    """A machine that leads by a record which it got in this life, with a peer that follows."""
    before = Record(record.epoch - 1, B, BOTH) if record.alone else Record(record.epoch - 1, A, (A,))
    machine = Machine(before, **options)
    machine.peer_is(record)
    save = only(machine.step(), do.Save)
    lead = only(machine.saved(save), do.Lead)
    machine.replica_is(epoch=record.epoch, leading=True, session=True, serving=True, settled_epoch=record.epoch)
    claim = machine.done(lead)
    assert [type(effect) for effect in claim] == [do.Claim]
    assert machine.group.phase is Phase.LEADING
    return machine


def releasing(machine: Machine) -> do.Release:
    """What a machine that has a reason to hand over wants: first to know that the arbiter is there."""
    read = only(machine.step(), do.Read)
    return only(machine.answered(read, Known(machine.group.record)), do.Release)


def following(record: Record, **options: Any) -> Machine:
    """A machine that follows node-b by a record."""
    machine = Machine(record, **options)
    machine.peer_is(leading=True, serving=True, promise=False)
    follow = only(machine.step(), do.Follow)
    machine.replica_is(epoch=record.epoch, session=True)
    assert machine.done(follow) == []
    return machine
