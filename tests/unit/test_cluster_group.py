"""The state machine of a group, event by event: what it wants, and what it refuses to do."""

import pytest
from machine import BOTH, MS, A, B, Machine, S, following, leading, only, releasing

from stortrends_ha.cluster import effects as do
from stortrends_ha.cluster.answers import Granted, Known, Refused, Unreachable
from stortrends_ha.cluster.phases import TRANSITIONS, IllegalMove, Phase
from stortrends_ha.record import Record

NOT_ASKED = Unreachable("the witness does not answer", asked=False)
UNKNOWN = Unreachable("the witness did not answer in time", asked=True)


def mirrored(epoch: int = 5, owner: str = A) -> Record:
    return Record(epoch, owner, BOTH)


def alone(epoch: int = 5, owner: str = A) -> Record:
    return Record(epoch, owner, (owner,))


# --- The beginning ------------------------------------------------------------------------------


def test_a_new_group_is_given_to_the_arbiter_by_both_nodes_and_saved_before_it_is_served() -> None:
    machine = Machine(Record(1, A, (A,)), alone_since=0)
    read = only(machine.step(), do.Read)
    assert machine.answered(read, Known(None)) == []  # the peer is not here: nothing is seeded
    machine.passes(S)
    machine.peer_is(promise=True)
    read = only(machine.step(), do.Read)
    seed = only(machine.answered(read, Known(None)), do.Seed)
    save = only(machine.answered(seed, Granted()), do.Save)
    lead = only(machine.saved(save), do.Lead)
    assert (lead.record, lead.not_before_ns) == (Record(1, A, (A,)), 0)


def test_an_owner_of_a_new_group_that_is_restarted_before_it_ever_served_leads_by_the_first_record() -> None:
    machine = Machine(Record(1, A, (A,)))
    machine.replica_is(has_data=False)
    assert only(machine.step(), do.Lead).record == Record(1, A, (A,))


def test_a_node_that_lost_its_state_learns_the_record_instead_of_beginning_anew() -> None:
    machine = Machine(Record(1, A, (A,)), alone_since=0)
    read = only(machine.step(), do.Read)
    save = only(machine.answered(read, Known(mirrored(7, B))), do.Save)
    follow = only(machine.saved(save), do.Follow)
    assert follow.record == mirrored(7, B)


def test_a_restarted_owner_in_sync_leads_with_the_promise_of_its_peer_only() -> None:
    machine = Machine(mirrored())
    machine.peer_is(promise=False)
    assert machine.step() == []
    machine.peer_is(promise=True)
    assert only(machine.step(), do.Lead).record == mirrored()


def test_a_restarted_owner_alone_first_settles_what_an_earlier_life_may_have_proposed() -> None:
    machine = Machine(alone())
    machine.peer_is(promise=True)
    propose = only(machine.step(), do.Propose)
    assert propose.new == alone(6)
    save = only(machine.answered(propose, Granted()), do.Save)
    assert save.saved.alone_since == 5  # it has been alone without a break: what had settled is settled
    assert only(machine.saved(save), do.Lead).record == alone(6)


def test_a_restarted_owner_alone_that_was_joined_meanwhile_learns_it_before_it_serves() -> None:
    machine = Machine(alone())
    machine.peer_is(promise=True)
    propose = only(machine.step(), do.Propose)
    save = only(machine.answered(propose, Refused(mirrored(6))), do.Save)
    assert save.saved.record == mirrored(6)


# --- Takeover -----------------------------------------------------------------------------------


def test_a_takeover_stops_listening_then_proposes_then_saves_then_leads_after_the_old_lease() -> None:
    machine = following(mirrored(owner=B))
    machine.peer_is_silent(2 * S)
    idle = only(machine.step(), do.Idle)
    assert not machine.group.promise(machine.view)
    propose = only(machine.done(idle), do.Propose)
    assert propose.new == alone(6)
    save = only(machine.answered(propose, Granted()), do.Save)
    lead = only(machine.saved(save), do.Lead)
    assert lead.not_before_ns == machine.view.may_serve_from_ns
    only(machine.done(lead), do.Claim)  # clients can connect, and wait
    machine.replica_is(epoch=6, leading=True, serving=True)
    machine.step()
    assert machine.moved == [do.Moved("takeover", 2 * S)]  # since the old owner was heard last


def test_an_owner_is_given_time_to_go_on_alone_before_the_secondary_reaches_for_it() -> None:
    machine = following(mirrored(owner=B))
    machine.peer_is_silent(S + 199 * MS)
    assert machine.step() == []
    machine.peer_is_silent(S + 200 * MS)
    only(machine.step(), do.Idle)


@pytest.mark.parametrize(
    ("record", "replica"),
    [
        (alone(owner=B), {}),
        (mirrored(owner=B), {"lost_cache": True}),
        (mirrored(owner=B), {"needs_sync": True}),
        (mirrored(owner=B), {"failure": "vm-a: Input/output error"}),
        (mirrored(owner=B), {"has_data": False}),
    ],
)
def test_a_copy_that_may_lack_acknowledged_writes_is_never_proposed(record: Record, replica: dict[str, object]) -> None:
    machine = following(record)
    machine.replica_is(**replica)
    machine.peer_is_silent(20 * S)
    for _ in range(10):
        assert all(isinstance(effect, do.Read) for effect in machine.step())  # it may look, to say who has the data
        machine.passes(S)


def test_a_node_that_is_being_stopped_does_not_take_over() -> None:
    machine = following(mirrored(owner=B))
    machine.now(stopping=True)
    machine.peer_is_silent()
    assert machine.step() == []


def test_a_takeover_that_lost_the_race_follows_the_winner() -> None:
    machine = following(mirrored(owner=B))
    machine.peer_is_silent()
    propose = only(machine.done(only(machine.step(), do.Idle)), do.Propose)
    save = only(machine.answered(propose, Refused(alone(6, B))), do.Save)
    assert only(machine.saved(save), do.Follow).record == alone(6, B)


def test_a_takeover_that_was_surely_not_asked_for_goes_back_to_following() -> None:
    machine = following(mirrored(owner=B))
    machine.peer_is_silent()
    propose = only(machine.done(only(machine.step(), do.Idle)), do.Propose)
    only(machine.answered(propose, NOT_ASKED), do.Follow)
    machine.passes(S)
    only(machine.step(), do.Read)  # it looks for the arbiter before it stops listening again


def test_a_takeover_of_unknown_outcome_is_proposed_again_until_there_is_an_answer() -> None:
    machine = following(mirrored(owner=B))
    machine.peer_is_silent()
    propose = only(machine.done(only(machine.step(), do.Idle)), do.Propose)
    for _ in range(3):
        assert machine.answered(propose, UNKNOWN) == []
        machine.passes(300 * MS)
        propose = only(machine.step(), do.Propose)
        assert propose.new == alone(6)
    only(machine.answered(propose, Granted()), do.Save)


def test_an_owner_that_is_back_is_followed_again_though_the_takeover_may_have_been_granted() -> None:
    machine = following(mirrored(owner=B))
    machine.peer_is_silent()
    propose = only(machine.done(only(machine.step(), do.Idle)), do.Propose)
    machine.answered(propose, UNKNOWN)
    machine.passes(300 * MS)
    machine.peer_is(leading=False, promise=False)  # it has been restarted, and waits for a promise
    only(machine.step(), do.Follow)
    assert machine.group.promise(machine.view)
    machine.peer_is(alone(6), promise=True)  # it was granted: the owner has learnt it
    only(machine.step(), do.Save)


def test_a_new_owner_answers_at_once_when_the_old_one_says_by_the_new_record_that_it_does_not_serve() -> None:
    machine = following(mirrored(owner=B))
    machine.peer_is(leading=False, unfit="its disk failed", promise=False)
    propose = only(machine.done(only(machine.step(), do.Idle)), do.Propose)
    lead = only(machine.saved(only(machine.answered(propose, Granted()), do.Save)), do.Lead)
    assert lead.not_before_ns > 0  # what it said by the old record is worth nothing
    machine.done(lead)
    machine.peer_is(alone(6), leading=False)
    assert only(machine.step(), do.Lead).not_before_ns == 0


# --- The owner ----------------------------------------------------------------------------------


def test_an_owner_that_misses_its_peer_goes_on_alone_only_when_that_is_granted() -> None:
    machine = leading(mirrored())
    machine.peer_is_silent()
    propose = only(machine.step(), do.Propose)
    assert propose.new == alone(6)
    assert machine.answered(propose, NOT_ASKED) == []
    machine.passes(300 * MS)
    propose = only(machine.step(), do.Propose)
    save = only(machine.answered(propose, Granted()), do.Save)
    lead = only(machine.saved(save), do.Lead)
    assert lead.record == alone(6)
    machine.done(lead)
    assert machine.moved == []
    machine.replica_is(epoch=6, leading=True, serving=True)
    machine.step()
    assert machine.moved == [do.Moved("alone", 2 * S + 300 * MS)]  # since the secondary was heard last


def test_an_owner_in_doubt_whether_it_was_itself_asleep_does_not_go_alone() -> None:
    machine = leading(mirrored())
    machine.now(alive=False, suspected=False)
    assert machine.step() == []


def test_an_owner_whose_peer_is_back_before_anything_was_asked_goes_on_as_before() -> None:
    machine = leading(mirrored())
    machine.peer_is_silent()
    machine.answered(only(machine.step(), do.Propose), NOT_ASKED)
    machine.passes(300 * MS)
    machine.peer_is()
    assert machine.step() == []
    assert machine.moved == []


@pytest.mark.parametrize("trouble", ["no link", "unfit"])
def test_an_owner_whose_peer_lives_but_does_not_mirror_goes_alone(trouble: str) -> None:
    machine = leading(mirrored())
    machine.peer_is()
    machine.step()
    if trouble == "unfit":
        machine.replica_is(session=False, peer_unfit="the host of node-b restarted")
    else:
        machine.replica_is(session=False)
        assert machine.step() == []
        machine.passes(S)
        machine.peer_is()
    assert only(machine.step(), do.Propose).new == alone(6)


def test_an_owner_goes_alone_before_its_peer_is_stopped_in_an_orderly_way() -> None:
    machine = leading(mirrored())
    machine.peer_is()
    machine.now(peer_stopping=True)
    assert only(machine.step(), do.Propose).new == alone(6)
    assert "node-b is being stopped" in machine.log[-1]


def test_a_follower_that_is_stopped_waits_until_its_owner_does_not_need_it() -> None:
    machine = following(Record(5, B, BOTH))
    machine.peer_is(leading=True, serving=True)
    machine.now(stopping=True)
    assert machine.group.leaving(machine.view)
    machine.peer_is(leading=True, serving=False)
    assert not machine.group.leaving(machine.view)  # it would not be held by it
    machine.peer_is(Record(6, B, (B,)), leading=True, serving=True)
    machine.saved(only(machine.step(), do.Save))
    assert not machine.group.leaving(machine.view)


def test_a_group_is_taken_from_an_owner_that_lives_but_never_takes_it() -> None:
    machine = following(Record(5, B, BOTH))
    behind = Record(4, A, BOTH)
    machine.peer_is(behind)
    machine.step()
    for _ in range(12):
        machine.passes(100 * MS)
        machine.peer_is(behind)
        before = machine.step()
    only(before, do.Idle)
    assert "node-b has not taken the group for 1.2 s: it could not save its record" in machine.log[-1]


def test_a_group_is_not_taken_from_an_owner_that_has_just_learnt_of_it() -> None:
    machine = following(Record(5, B, BOTH))
    machine.passes(10 * S)
    for leads in (True, False):
        machine.peer_is(Record(4, A, BOTH), leading=leads)
        assert machine.step() == []
        machine.passes(1100 * MS)


def test_an_owner_with_neither_lease_nor_grant_drops_its_address_and_claims_it_again_with_the_next_lease() -> None:
    machine = leading(mirrored())
    machine.passes(2 * S)
    machine.peer_is_silent()
    effects = machine.step()
    assert [type(effect) for effect in effects] == [do.Unclaim, do.Propose]
    machine.done(effects[0])
    machine.answered(effects[1], NOT_ASKED)
    machine.peer_is()
    assert do.Claim() in machine.step()


def test_a_deposed_owner_saves_the_newer_record_and_follows() -> None:
    machine = leading(mirrored())
    machine.peer_is(alone(6, B), leading=True)
    save = only(machine.step(), do.Save)
    assert [type(effect) for effect in machine.saved(save)] == [do.Unclaim, do.Follow]
    assert machine.group.leading  # until the data process has said that it stopped


def test_the_peer_is_added_only_when_it_has_everything_and_its_promise_holds() -> None:
    machine = leading(alone())
    assert machine.step() == []
    machine.replica_is(joinable=True)
    machine.peer_is(promise=False)
    assert machine.step() == []
    machine.peer_is(promise=True)
    machine.now(lease_until_ns=machine.view.now_ns)
    assert machine.step() == []
    machine.peer_is(promise=True)
    propose = only(machine.step(), do.Propose)
    assert propose.new == mirrored(6)
    save = only(machine.answered(propose, Granted()), do.Save)
    assert only(machine.saved(save), do.Lead).record == mirrored(6)


def test_a_join_of_unknown_outcome_is_never_taken_back_by_a_read() -> None:
    machine = leading(alone())
    machine.replica_is(joinable=True)
    propose = only(machine.step(), do.Propose)
    machine.answered(propose, UNKNOWN)
    machine.passes(300 * MS)
    machine.replica_is(joinable=False, session=False)
    machine.peer_is_silent()
    barrier = only(machine.step(), do.Propose)
    assert barrier.new == alone(6)  # at the same epoch: only one of the two can be granted
    save = only(machine.answered(barrier, Refused(mirrored(6))), do.Save)
    assert save.saved.record == mirrored(6)


def test_a_data_process_that_was_ready_to_join_is_told_when_nothing_came_of_it() -> None:
    machine = leading(alone())
    machine.replica_is(joinable=True)
    machine.answered(only(machine.step(), do.Propose), NOT_ASKED)
    machine.replica_is(joinable=False)
    assert only(machine.step(), do.Lead).record == alone()


# --- Another arbiter, or other leases, on the peer (row 22) ---------------------------------------


def test_with_another_arbiter_on_the_peer_nothing_is_promised() -> None:
    machine = following(mirrored(owner=B))
    assert machine.group.promise(machine.view)
    machine.now(differs="arbiter")
    assert not machine.group.promise(machine.view)


def test_an_owner_with_another_arbiter_is_not_followed_while_it_lives() -> None:
    machine = following(mirrored(owner=B))
    machine.now(differs="arbiter")
    idle = only(machine.step(), do.Idle)
    assert machine.done(idle) == []
    assert machine.step() == []
    machine.now(differs="")
    only(machine.step(), do.Follow)


def test_an_owner_goes_on_without_a_peer_that_has_another_arbiter() -> None:
    machine = leading(mirrored())
    machine.now(differs="arbiter")
    assert only(machine.step(), do.Propose).new == alone(6)
    assert "because the cluster file on node-b has another arbiter" in machine.log[-1]


def test_a_restarted_owner_asks_its_own_arbiter_instead_of_waiting_for_a_promise() -> None:
    machine = Machine(mirrored())
    machine.peer_is(promise=False)
    machine.now(differs="timing")
    assert only(machine.step(), do.Propose).new == alone(6)


def test_a_secondary_takes_over_from_an_owner_that_does_not_serve_as_its_arbiter_is_another() -> None:
    machine = following(mirrored(owner=B))
    machine.now(differs="arbiter")
    idle = only(machine.step(), do.Idle)
    machine.done(idle)
    machine.peer_is(promise=False)
    idle = only(machine.step(), do.Idle)
    assert only(machine.done(idle), do.Propose).new == alone(6)


def test_an_arbiter_that_the_peer_does_not_have_is_given_no_record() -> None:
    machine = Machine(Record(1, A, (A,)), alone_since=0)
    machine.peer_is(promise=True)  # as it said before it knew
    machine.now(differs="arbiter")
    read = only(machine.step(), do.Read)
    assert machine.answered(read, Known(None)) == []
    machine.now(differs="")
    machine.passes(S)
    read = only(machine.step(), do.Read)
    only(machine.answered(read, Known(None)), do.Seed)


# --- Planned moves ------------------------------------------------------------------------------


def test_a_handover_releases_drops_the_address_proposes_follows_and_drops_the_clients_when_the_peer_serves() -> None:
    machine = leading(mirrored())
    machine.peer_is(wants=True)
    release = releasing(machine)
    unclaim = only(machine.done(release), do.Unclaim)
    propose = only(machine.done(unclaim), do.Propose)
    assert propose.new == mirrored(6, B)
    save = only(machine.answered(propose, Granted()), do.Save)
    follow = only(machine.saved(save), do.Follow)
    machine.done(follow)
    machine.peer_is(mirrored(6, B), leading=True)
    assert machine.step() == []
    machine.peer_is(mirrored(6, B), leading=True, serving=True)
    only(machine.step(), do.Drop)
    assert [moved.kind for moved in machine.moved] == ["handover"]


def test_the_node_that_a_group_is_handed_to_serves_at_once() -> None:
    machine = following(mirrored(owner=B))
    machine.peer_is(mirrored(6), leading=False)
    save = only(machine.step(), do.Save)
    assert only(machine.saved(save), do.Lead).not_before_ns == 0


def test_clients_are_not_held_for_a_move_that_the_arbiter_could_not_grant() -> None:
    machine = leading(mirrored())
    machine.peer_is(wants=True)
    for _ in range(10):
        machine.answered(only(machine.step(), do.Read), NOT_ASKED)
        machine.passes(300 * MS)
        machine.peer_is(wants=True)
    releasing(machine)


def test_a_release_that_fails_goes_on_serving() -> None:
    machine = leading(mirrored())
    machine.peer_is(wants=True)
    release = releasing(machine)
    machine.peer_is()
    assert only(machine.done(release, "the link broke"), do.Lead).record == mirrored()


def test_a_handover_that_was_surely_not_asked_for_goes_on_serving() -> None:
    machine = leading(mirrored())
    machine.peer_is(wants=True)
    unclaim = only(machine.done(releasing(machine)), do.Unclaim)
    propose = only(machine.done(unclaim), do.Propose)
    assert only(machine.answered(propose, NOT_ASKED), do.Lead).record == mirrored()


def test_a_handover_of_unknown_outcome_serves_again_only_by_another_granted_record() -> None:
    machine = leading(mirrored())
    machine.peer_is(wants=True)
    unclaim = only(machine.done(releasing(machine)), do.Unclaim)
    propose = only(machine.done(unclaim), do.Propose)
    assert machine.answered(propose, UNKNOWN) == []
    machine.passes(300 * MS)
    machine.peer_is_silent()
    other = only(machine.step(), do.Propose)
    assert other.new == alone(6)
    assert only(machine.saved(only(machine.answered(other, Granted()), do.Save)), do.Lead).record == alone(6)


@pytest.mark.parametrize("why", ["stopping", "draining"])
def test_a_node_that_stops_or_is_drained_hands_over(why: str) -> None:
    machine = leading(mirrored())
    machine.now(**{why: True})
    releasing(machine)


def test_an_owner_that_cannot_listen_for_clients_can_be_moved_away() -> None:
    machine = leading(mirrored())
    machine.replica_is(serving=False, cannot_listen="cannot listen on 192.0.2.21:10809: Address already in use")
    machine.peer_is(wants=True)
    releasing(machine)


def test_nothing_is_handed_to_a_peer_that_is_stopping_or_cannot_own() -> None:
    for changes in ({"unfit": "its disk failed"}, {"promise": False}):
        machine = leading(mirrored())
        machine.now(draining=True)
        machine.peer_is(**changes)
        assert machine.step() == []
    machine = leading(mirrored())
    machine.now(draining=True, stopping=True, peer_stopping=True)
    assert machine.step() == []


def well_for_a_second(machine: Machine) -> list[do.Effect]:
    """A second passes in which the arbiter answers; what is wanted then but questions to it."""
    machine.passes(S)
    machine.peer_is()
    wanted: list[do.Effect] = []
    for effect in machine.step():
        wanted += machine.answered(effect, Known(machine.group.record)) if isinstance(effect, do.Read) else [effect]
    return wanted


def test_automatic_failback_waits_until_all_has_been_well_for_the_hold_down() -> None:
    machine = leading(mirrored(), failback=True)
    for _ in range(59):
        assert well_for_a_second(machine) == []
    machine.replica_is(session=False)  # a flap begins it anew
    machine.step()
    machine.replica_is(session=True)
    for _ in range(59):
        assert well_for_a_second(machine) == []
    assert [type(effect) for effect in well_for_a_second(machine) + well_for_a_second(machine)] == [do.Release]


# --- Lost caches, disks, processes ---------------------------------------------------------------


def test_an_owner_that_lost_its_cache_does_not_serve_what_its_peer_has() -> None:
    machine = Machine(mirrored())
    machine.replica_is(lost_cache=True)
    machine.peer_is()
    only(machine.step(), do.Read)  # somebody else may own it by now
    assert machine.group.phase is Phase.RESTING
    assert "may lack acknowledged writes" in machine.group.unfit(machine.view.replica)


def test_when_both_caches_are_lost_the_last_owners_copy_wins() -> None:
    machine = Machine(mirrored())
    machine.replica_is(lost_cache=True)
    machine.peer_is(lost=True)
    propose = only(machine.step(), do.Propose)
    lead = only(machine.saved(only(machine.answered(propose, Granted()), do.Save)), do.Lead)
    assert (lead.record, lead.clears_loss) == (alone(6), True)


@pytest.mark.parametrize(("settled_epoch", "serves"), [(5, True), (6, True), (4, False)])
def test_an_owner_alone_that_lost_its_cache_serves_if_everything_had_settled(settled_epoch: int, serves: bool) -> None:
    machine = Machine(alone(6), alone_since=5)
    machine.replica_is(lost_cache=True, settled_epoch=settled_epoch)
    wanted = [type(effect) for effect in machine.step()]
    assert wanted == ([do.Propose] if serves else [do.Read])


def test_an_owner_whose_disk_fails_stops_and_its_peer_takes_over() -> None:
    machine = leading(mirrored())
    machine.replica_is(failure="vm-a: Input/output error")
    effects = machine.step()
    assert [type(effect) for effect in effects] == [do.Idle, do.Unclaim]
    assert machine.group.leading
    machine.done(effects[0])
    assert not machine.group.leading
    assert machine.group.unfit(machine.view.replica).startswith("its disk failed")


def test_an_owner_whose_disk_fails_while_its_peer_is_away_leaves_it_in_sync() -> None:
    machine = leading(mirrored())
    machine.peer_is_silent()
    machine.replica_is(failure="vm-a: Input/output error", session=False)
    machine.step()
    assert machine.group.phase is Phase.RESTING
    for _ in range(10):
        machine.passes(S)
        assert not [effect for effect in machine.step() if isinstance(effect, do.Propose)]


def test_an_owner_whose_disk_fails_in_a_release_is_stopped_and_says_so() -> None:
    machine = leading(mirrored())
    machine.peer_is(wants=True)
    release = releasing(machine)
    machine.replica_is(failure="vm-a: Input/output error")
    idle = next(effect for effect in machine.done(release, "the disk failed") if isinstance(effect, do.Idle))
    assert machine.group.leading
    machine.done(idle)
    assert not machine.group.leading
    assert machine.group.phase is Phase.RESTING


@pytest.mark.parametrize("how", ["its disk fails", "its data process ends"])
def test_a_copy_that_fails_after_it_has_stopped_listening_is_not_proposed(how: str) -> None:
    machine = following(mirrored(owner=B))
    machine.peer_is_silent()
    propose = only(machine.done(only(machine.step(), do.Idle)), do.Propose)
    machine.answered(propose, UNKNOWN)
    machine.passes(300 * MS)
    if how == "its disk fails":
        machine.replica_is(failure="vm-a: Input/output error", lost_cache=True)
        only(machine.step(), do.Follow)
    else:
        machine.now(replica=None)
        assert machine.step() == []


def test_a_data_process_that_ends_while_its_peer_is_being_added_does_not_lead_before_that_is_settled() -> None:
    machine = leading(alone())
    machine.replica_is(joinable=True)
    only(machine.step(), do.Propose)
    replica = machine.view.replica
    machine.now(replica=None)
    machine.step()
    machine.now(replica=replica)
    assert not [effect for effect in machine.step() if isinstance(effect, do.Lead)]


def test_an_owner_whose_data_process_ends_leaves_the_group_to_its_peer() -> None:
    machine = leading(mirrored())
    machine.now(replica=None)
    only(machine.step(), do.Unclaim)
    assert not machine.group.leading
    assert machine.group.unfit(None) == "its data process does not run"


def test_an_owner_whose_data_process_cannot_lead_stops_it_and_tries_again_later() -> None:
    machine = Machine(mirrored())
    machine.peer_is()
    lead = only(machine.step(), do.Lead)
    idle = only(machine.done(lead, "its disk has just failed"), do.Idle)
    assert machine.group.phase is Phase.RESTING
    assert machine.done(idle) == []
    machine.passes(300 * MS)
    only(machine.step(), do.Lead)


def test_an_arbiter_that_lost_its_registers_gets_the_record_on_which_both_nodes_agree() -> None:
    machine = leading(mirrored())
    machine.passes(6 * S)
    machine.peer_is()
    read = only(machine.step(), do.Read)
    seed = only(machine.answered(read, Known(None)), do.Seed)
    assert seed.record == mirrored()
    assert machine.answered(seed, Granted()) == []


# --- The override -------------------------------------------------------------------------------


def test_an_override_stops_listening_and_forces_the_record_and_takes_a_new_lineage() -> None:
    machine = following(alone(owner=B))
    machine.peer_is_silent()
    idle = only(machine._sorted(machine.group.force(machine.view)), do.Idle)
    force = only(machine.done(idle), do.Force)
    assert force.record == alone(6)
    lead = only(machine.saved(only(machine.answered(force, Granted()), do.Save)), do.Lead)
    assert lead.forced


def test_an_override_of_a_record_that_is_no_more_is_dropped() -> None:
    machine = following(mirrored(owner=B))
    machine.peer_is_silent()
    force = only(machine.done(only(machine._sorted(machine.group.force(machine.view)), do.Idle)), do.Force)
    follow = only(machine.saved(only(machine.answered(force, Refused(alone(6, B))), do.Save)), do.Follow)
    machine.done(follow)
    for _ in range(5):
        machine.passes(S)
        assert all(isinstance(effect, do.Read) for effect in machine.step())


def test_a_takeover_after_an_override_that_came_to_nothing_is_an_ordinary_one() -> None:
    machine = following(mirrored(owner=B))
    machine.peer_is_silent()
    force = only(machine.done(only(machine._sorted(machine.group.force(machine.view)), do.Idle)), do.Force)
    machine.answered(force, NOT_ASKED)
    machine.passes(31 * S)
    machine.peer_is(leading=True)
    machine.step()
    machine.peer_is_silent()
    machine.passes(6 * S)
    machine.replica_is(lost_cache=True)
    for _ in range(5):
        assert not [effect for effect in machine.step() if isinstance(effect, do.Propose | do.Lead)]
        machine.passes(S)


def test_what_is_granted_after_an_override_was_given_up_is_led_as_if_there_had_been_none() -> None:
    machine = Machine(mirrored())
    machine.peer_is_silent()
    force = only(machine.done(only(machine._sorted(machine.group.force(machine.view)), do.Idle)), do.Force)
    machine.answered(force, UNKNOWN)
    machine.passes(31 * S)
    machine.step()
    machine.passes(S)
    propose = only(machine.step(), do.Propose)
    lead = only(machine.saved(only(machine.answered(propose, Granted()), do.Save)), do.Lead)
    assert (lead.record, lead.forced) == (alone(6), False)
    machine.replica_is(epoch=6, leading=True, serving=True)
    machine.done(lead)
    assert not machine.moved


def test_an_override_lets_an_owner_go_on_alone_without_its_arbiter_and_loses_nothing() -> None:
    machine = leading(mirrored())
    machine.peer_is_silent()
    machine.answered(only(machine.step(), do.Propose), NOT_ASKED)
    machine.passes(300 * MS)
    force = only(machine._sorted(machine.group.force(machine.view)), do.Force)
    lead = only(machine.saved(only(machine.answered(force, Granted()), do.Save)), do.Lead)
    assert (lead.record, lead.forced) == (alone(6), False)


def test_the_history_says_that_a_record_was_forced_and_what_led_to_any_other() -> None:
    machine = Machine(mirrored())
    machine.peer_is_silent()
    force = only(machine.done(only(machine._sorted(machine.group.force(machine.view)), do.Idle)), do.Force)
    saved = only(machine.answered(force, Granted()), do.Save).saved
    assert saved.why == "the operator overrides, and accepts that acknowledged writes may be lost"
    machine = leading(mirrored())
    machine.peer_is_silent()
    saved = only(machine.answered(only(machine.step(), do.Propose), Granted()), do.Save).saved
    assert saved.why == "the arbiter granted it"


def test_an_override_never_takes_a_group_from_a_peer_that_serves_it() -> None:
    machine = following(mirrored(owner=B))
    assert machine._sorted(machine.group.force(machine.view)) == []


# --- The table ----------------------------------------------------------------------------------


def test_a_move_that_the_table_does_not_have_is_a_bug() -> None:
    machine = Machine(mirrored(owner=B))
    with pytest.raises(IllegalMove, match="from learning to handing"):
        machine.group._to(Phase.HANDING)


def test_every_phase_has_its_row_and_can_be_left() -> None:
    assert set(TRANSITIONS) == set(Phase)
    assert all(TRANSITIONS.values())
