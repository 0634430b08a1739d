"""The sentences that say why a group is not simply in sync, and what would end that."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine import BOTH, MS, WELL, A, B, Machine, S, following, leading, only

from stortrends_ha.cluster import effects as do
from stortrends_ha.cluster.answers import Answer, Granted, Known, Refused, Unreachable
from stortrends_ha.cluster.explain import duration, explain
from stortrends_ha.cluster.group import Group
from stortrends_ha.cluster.phases import Phase
from stortrends_ha.cluster.view import Peer, Replica, View
from stortrends_ha.node.messages import STATES
from stortrends_ha.record import Record

AWAY = "the witness at 192.0.2.9:7801 cannot be asked: Connection refused"
MIRRORED, OTHERS = Record(5, A, BOTH), Record(5, B, BOTH)
ALONE, OTHERS_ALONE = Record(5, A, (A,)), Record(5, B, (B,))


def said(machine: Machine) -> tuple[str, str]:
    return explain(machine.group, B, machine.view)


# --- When all is well ---------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [leading(MIRRORED), leading(ALONE), following(OTHERS), following(OTHERS_ALONE)])
def test_what_is_well_needs_no_words(machine: Machine) -> None:
    assert said(machine) == ("", "")


# --- The secondary ------------------------------------------------------------------------------


def test_a_secondary_that_may_take_over_says_that_it_will() -> None:
    machine = following(OTHERS)
    machine.peer_is_silent(1100 * MS)
    assert said(machine) == ("held", "node-b has not been heard for 1.1 s, and this node is about to take over")
    machine.peer_is_silent()
    machine.step()
    assert said(machine) == ("held", "node-b has not been heard for 2.0 s, and this node is taking over")


def test_a_secondary_without_an_arbiter_says_what_it_waits_for() -> None:
    machine = following(OTHERS)
    machine.peer_is_silent()
    propose = only(machine.done(only(machine.step(), do.Idle)), do.Propose)
    machine.answered(propose, Unreachable(AWAY, asked=False))
    assert said(machine) == (
        "held",
        f"node-b has not been heard for 2.0 s, and taking over is not granted ({AWAY}); "
        "it goes on when it is, or when node-b is back",
    )


@pytest.mark.parametrize(
    ("record", "replica", "why", "override"),
    [
        (OTHERS_ALONE, {}, "node-b alone has every acknowledged write", True),
        (OTHERS, {"needs_sync": True}, "a sync of its copy did not end", True),
        (OTHERS, {"failure": "vm-a: I/O error"}, "its disk failed: vm-a: I/O error", False),
    ],
)
def test_a_secondary_that_must_not_take_over_says_why_and_what_the_operator_can_do(
    record: Record, replica: dict[str, Any], why: str, override: bool
) -> None:
    machine = following(record)
    machine.replica_is(**replica)
    machine.peer_is_silent(300 * S)
    ends = "it goes on when node-b is back"
    if override:
        ends += ", or by the operator, losing what only node-b has: stortrends-ha group force-own rg"
    assert said(machine) == (
        "held",
        f"node-b has not been heard for 5 min, and this node must not take over, as {why}; {ends}",
    )


def test_a_secondary_that_lost_its_cache_says_that_it_does_not_know_whether_the_owner_went_on_alone() -> None:
    """Row 11: both lost power, one returned, and so did no arbiter."""
    machine = following(OTHERS)
    machine.replica_is(lost_cache=True)
    machine.peer_is_silent(300 * S)
    machine.answered(only(machine.step(), do.Read), Unreachable(AWAY, asked=False))
    _, why = said(machine)
    unfit = "its host restarted or its disk failed, so its copy may lack acknowledged writes"
    unknown = f"whether node-b went on alone before is not known ({AWAY})"
    assert f"this node must not take over, as {unfit}; {unknown}; it goes on when node-b is back, or by the" in why


def test_a_secondary_whose_owner_is_there_but_cannot_serve_passes_on_why() -> None:
    machine = following(OTHERS)
    machine.replica_is(needs_sync=True)
    machine.peer_is(unfit="its disk failed: vm-a: I/O error")
    state, why = said(machine)
    assert state == "held"
    assert why.startswith("node-b cannot serve, as its disk failed: vm-a: I/O error, and this node must not take over")


# --- The owner ----------------------------------------------------------------------------------


def test_an_owner_that_lost_its_secondary_holds_until_it_may_go_on_alone() -> None:
    machine = leading(MIRRORED)
    machine.peer_is_silent()
    assert said(machine) == ("held", "node-b has not been heard for 2.0 s, and this node asks to go on alone")
    machine.answered(only(machine.step(), do.Propose), Unreachable(AWAY))
    assert said(machine) == (
        "held",
        f"node-b has not been heard for 2.0 s, and going on alone is not granted ({AWAY}); "
        "it goes on when it is, or when node-b is back",
    )


def test_an_owner_without_a_link_that_may_not_go_on_alone_says_so() -> None:
    machine = leading(MIRRORED)
    machine.replica_is(session=False, serving=False)
    machine.passes(2 * S)
    machine.peer_is()
    machine.answered(only(machine.step(), do.Propose), Unreachable(AWAY))
    state, why = said(machine)
    assert state == "held"
    assert why.startswith(f"there is no link to node-b, and going on alone is not granted ({AWAY})")


def test_an_owner_that_was_killed_does_not_wait_for_its_peer_but_for_the_arbiter() -> None:
    """What it had not answered may be on one replica only: that its peer is there does not help."""
    machine = leading(MIRRORED)
    killed = "node-a was killed while it owned"
    machine.replica_is(session=False, serving=False, peer_unfit=killed)
    machine.answered(only(machine.step(), do.Propose), Unreachable(AWAY))
    assert said(machine) == (
        "held",
        f"{killed}, and going on alone is not granted ({AWAY}); it goes on when it is",
    )


@pytest.mark.parametrize("record", [MIRRORED, ALONE])
def test_an_owner_to_which_nobody_can_connect_says_that_first(record: Record) -> None:
    machine = leading(record)
    machine.peer_is_silent()
    machine.replica_is(serving=False, cannot_listen="cannot listen on 192.0.2.21:10809 for NBD")
    assert said(machine) == ("held", "this node cannot listen on 192.0.2.21:10809 for NBD")


def test_an_owner_that_is_alone_says_since_when_and_leaves_the_state_to_its_data_process() -> None:
    machine = leading(ALONE)
    machine.peer_is_silent(7300 * S)
    assert said(machine) == ("", "node-b has not been heard for 2 h; it is synced when it is back")


def test_a_peer_that_cannot_be_added_without_the_arbiter_is_said() -> None:
    machine = leading(ALONE)
    machine.replica_is(joinable=True)
    machine.answered(only(machine.step(), do.Propose), Unreachable(AWAY))
    assert said(machine) == ("", f"node-b has everything, and adding it is not granted yet ({AWAY})")
    machine.peer_is_silent()
    machine.replica_is(joinable=False, session=False)
    state, why = said(machine)
    assert state == ""
    assert why.startswith("node-b was lost while it was being added: it must be known whether it was")


@pytest.mark.parametrize(
    ("peer", "replica", "ends"),
    [
        ({}, {}, "node-b takes over"),
        ({"unfit": "its disk failed: vm-a"}, {}, "node-b must not either, as its disk failed: vm-a; by the operator"),
        ({"unfit": "its disk failed: vm-a"}, {"failure": "vm-b"}, "node-b must not either, as its disk failed: vm-a"),
        (None, {}, "it goes on when node-b is back, or by the operator, losing what is not here: stortrends-ha"),
        (None, {"failure": "vm-b"}, "it goes on when node-b is back"),
    ],
)
def test_an_owner_that_must_not_serve_says_who_can(
    peer: dict[str, Any] | None, replica: dict[str, Any], ends: str
) -> None:
    machine = Machine(MIRRORED, replica=replace(WELL, **({"needs_sync": True} | replica)))
    machine.peer_is_silent() if peer is None else machine.peer_is(**peer)
    machine.step()
    state, why = said(machine)
    assert state == "held"
    assert why.startswith("this node owns it but must not serve it, as ")
    assert f"; {ends}" in why
    assert ("force-own" in why) == ("operator" in ends)


def test_the_only_good_copy_is_for_the_operator() -> None:
    machine = Machine(ALONE, replica=replace(WELL, lost_cache=True))
    machine.peer_is_silent()
    machine.step()
    assert said(machine)[1].endswith("; by the operator, losing what is not here: stortrends-ha group force-own rg")
    machine.replica_is(failure="vm-a: I/O error")
    assert said(machine)[1].endswith("; no other node has everything: mend the disk and start this node again")


def test_a_new_group_says_what_it_waits_for() -> None:
    machine = Machine(Record(1, A, (A,)), alone_since=0)
    machine.answered(only(machine.step(), do.Read), Known(None))
    state, why = said(machine)
    assert state == "held"
    assert why.startswith("the group is new: its first record is made when both nodes see each other")


def test_a_handover_is_said() -> None:
    machine = leading(MIRRORED)
    read = only(machine.group.move(machine.view, B), do.Read)
    release = only(machine.answered(read, Known(MIRRORED)), do.Release)
    assert said(machine) == ("held", "it is being handed over to node-b: what is under way is answered first")
    machine.done(release)
    assert said(machine) == ("held", "it is being handed over to node-b: this node has stopped")


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (59.96, "60.0 s"), (150, "2 min"), (7200, "2 h"), (180_000, "2 days")]
)
def test_durations_are_in_the_unit_that_people_would_use(seconds: float, words: str) -> None:
    assert duration(round(seconds * S)) == words


# --- Another cluster file on the peer -------------------------------------------------------------


def test_a_peer_with_another_arbiter_is_said_on_both_nodes() -> None:
    owner, secondary, restarted = leading(MIRRORED), following(OTHERS), Machine(MIRRORED)
    restarted.peer_is(promise=False)
    for machine in (owner, secondary, restarted):
        machine.now(differs="arbiter")
    trouble = "the cluster file on node-b has another arbiter"
    assert said(owner) == ("held", f"{trouble}, and this node asks to go on alone")
    assert said(restarted) == ("held", f"{trouble}, and this node asks to go on alone")
    assert said(secondary) == ("", f"{trouble}; this node is in sync again when both have the same")
    owner = leading(ALONE)
    owner.now(differs="arbiter")
    assert said(owner) == ("", f"{trouble}; it is in sync again when both have the same")


# --- Whatever happens ---------------------------------------------------------------------------

_RECORDS = st.sampled_from([Record(epoch, owner, sync) for epoch in (1, 5) for owner, sync in (
    (A, (A,)), (B, (B,)), (A, BOTH), (B, BOTH))])  # fmt: skip
_YES = st.booleans()
_REPLICAS = st.none() | st.builds(
    Replica, epoch=st.sampled_from([0, 4, 5]), leading=_YES, session=_YES, serving=_YES, joinable=_YES,
    peer_unfit=st.sampled_from(["", "it was killed while it owned"]), failure=st.sampled_from(["", "vm-a: I/O error"]),
    lost_cache=_YES, needs_sync=_YES, settled_epoch=st.sampled_from([0, 5]),
    cannot_listen=st.sampled_from(["", "cannot listen on 192.0.2.21:10809"]),
)  # fmt: skip
_PEERS = st.none() | st.builds(
    Peer, record=_RECORDS, leading=_YES, serving=_YES, promise=_YES,
    unfit=st.sampled_from(["", "a sync of its copy did not end"]), lost=_YES, wants=_YES,
)  # fmt: skip


@st.composite
def _views(draw: st.DrawFn) -> View:
    silent_ns = draw(st.sampled_from([0, 100 * MS, 2 * S, 10**15]))
    alive = silent_ns < S and draw(_YES)
    return View(
        now_ns=100 * S, alive=alive, suspected=silent_ns >= S and draw(_YES), silent_ns=silent_ns, peer=draw(_PEERS),
        lease_until_ns=0, may_serve_from_ns=102 * S, draining=draw(_YES), peer_draining=draw(_YES),
        stopping=draw(_YES), peer_stopping=draw(_YES), replica=draw(_REPLICAS),
        differs=draw(st.sampled_from(["", "arbiter and another timing"])),
    )  # fmt: skip


def check(group: Group, view: View) -> None:
    """What holds of every explanation."""
    state, why = explain(group, B, view)
    assert state == "" or (state in STATES and why), (state, why)
    assert not why.endswith((".", ",", ":", ";", " ")), why
    assert "  " not in why, why
    assert "( " not in why, why
    assert "()" not in why, why
    if group.phase is Phase.FOLLOWING and view.suspected:
        assert state == "held", "nobody who serves is seen"
    if group.phase not in (Phase.FOLLOWING, Phase.LEADING) and view.replica is not None:
        assert state in ("held", "connecting"), "it has no role in which its data process could say anything"
    if view.replica is not None and view.replica.failure:
        assert "force-own" not in why, "a failed disk cannot be served"


@given(_RECORDS, st.sampled_from(Phase), _views())
def test_any_phase_and_view_is_explained(record: Record, phase: Phase, view: View) -> None:
    machine = Machine(record)
    machine.group.phase = phase
    check(machine.group, view)


_SILENCE: list[Answer] = [Unreachable(AWAY), Unreachable(AWAY, asked=False)]
_READ: list[Answer] = [Known(None), Known(OTHERS), *_SILENCE]
_DECIDED: list[Answer] = [Granted(), Refused(None), Refused(OTHERS_ALONE), *_SILENCE]


@given(st.data())
def test_whatever_happens_to_a_group_is_explained(data: st.DataObject) -> None:
    """A walk: the peer comes and goes, the arbiter answers or does not, the operator moves and overrides."""
    machine = Machine(data.draw(_RECORDS), alone_since=data.draw(st.sampled_from([0, 5])))
    wanted: list[do.Effect] = []
    for _ in range(data.draw(st.integers(1, 25))):
        wanted += _happens(data, machine, wanted)
        check(machine.group, machine.view)


def _happens(data: st.DataObject, machine: Machine, wanted: list[do.Effect]) -> list[do.Effect]:
    """One event; what is wanted then, besides what was."""
    answers = data.draw(_YES)
    if wanted and answers:
        return _answered(data, machine, wanted.pop(0))
    match data.draw(st.sampled_from(["heard", "silent", "replica", "move", "force", "time"])):
        case "heard":
            known = machine.group.record if data.draw(_YES) else None
            machine.peer_is(known, leading=data.draw(_YES), unfit=data.draw(st.sampled_from(["", "its disk failed"])))
        case "silent":
            machine.peer_is_silent(data.draw(st.sampled_from([100 * MS, 2 * S])))
        case "replica":
            machine.now(replica=data.draw(_REPLICAS))
        case "move":
            return machine._sorted(machine.group.move(machine.view, data.draw(st.sampled_from(BOTH))))
        case "force":
            return machine._sorted(machine.group.force(machine.view))
        case "time":
            machine.passes(data.draw(st.sampled_from([10 * MS, S, 10 * S])))
    return machine.step()


def _answered(data: st.DataObject, machine: Machine, effect: do.Effect) -> list[do.Effect]:
    match effect:
        case do.Save():
            return machine.saved(effect)
        case do.Read():
            return machine.answered(effect, data.draw(st.sampled_from(_READ)))
        case do.Propose() | do.Seed() | do.Force():
            return machine.answered(effect, data.draw(st.sampled_from(_DECIDED)))
        case do.Follow() | do.Lead() | do.Idle() | do.Release() | do.Unclaim():
            return machine.done(effect, data.draw(st.sampled_from(["", "it could not"])))
    return machine.step()
