"""Who lives and who holds a lease, from beats that may be replays.

Invariants tested against somebody who holds every datagram ever sent: a peer is alive only if it sent something a
moment ago; no lease holds once the peer may serve; what is known of the peer never goes back to an earlier beat or
life; and as soon as the network is honest, two nodes find each other within two intervals.
"""

from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stortrends_ha.cluster.lease import Timing, may_serve_from_ns
from stortrends_ha.cluster.membership import Membership
from stortrends_ha.limits import HEARTBEAT_GREETS, HEARTBEAT_RETIRED, HEARTBEAT_SENT
from stortrends_ha.protocol.heartbeat import Answer, Ask, GroupBeat, Heartbeat
from stortrends_ha.record import Record

MS = 1_000_000
TIMING = Timing()
INTERVAL, SUSPECT, LEASE = TIMING.interval_ns, TIMING.suspect_after_ns, TIMING.lease_ns
RECORD = Record(1, "a", ("a", "b"))


def group(promise: bool, record: Record = RECORD) -> GroupBeat:
    return GroupBeat("g", record, "following", promise, "", False, False, False, "")


def node(me: str, life: int, now_ns: int = 0, paths: int = 1) -> Membership:
    return Membership("lab", me, "b" if me == "a" else "a", life, TIMING, now_ns, paths)


def met(now_ns: int = 0, paths: int = 1) -> tuple[Membership, Membership]:
    """Two nodes that have met, in the shortest way: three beats."""
    a, b = node("a", 11, now_ns, paths), node("b", 21, now_ns, paths)
    assert not b.heard(a.compose(now_ns), 0, now_ns)
    assert a.heard(b.compose(now_ns), 0, now_ns)
    assert b.heard(a.compose(now_ns), 0, now_ns)
    return a, b


# --- Meeting ----------------------------------------------------------------------------------


def test_a_beat_that_proves_nothing_is_no_sign_of_life_but_is_greeted() -> None:
    a, b = node("a", 11), node("b", 21)
    assert not b.heard(a.compose(0), 0, 5 * MS)
    assert (b.alive(5 * MS), b.peer, b.peer_incarnation, b.owes_beat) == (False, None, 0, True)
    beat = b.compose(6 * MS)
    assert (beat.greets, beat.echo_incarnation, beat.echo_seq, b.owes_beat) == (((11, 1),), 0, 0, False)
    assert b.counters(0).unproven == 1


def test_three_beats_make_two_nodes_meet() -> None:
    a, b = met()
    assert a.alive(0)
    assert b.alive(0)
    assert (a.peer_incarnation, b.peer_incarnation) == (21, 11)
    assert b.peer is not None
    assert b.peer.echo_incarnation == 21
    assert b.compose(0).greets == ()


def test_a_life_that_is_greeted_is_noticed_before_it_is_a_sign_of_life() -> None:
    """It may know this node from then on: that it is off must not be believed any longer."""
    a, _ = met()
    assert a.last_noticed_ns == a.last_heard_ns == 0
    again = node("b", 22, 50 * MS)
    assert not a.heard(again.compose(50 * MS), 0, 51 * MS)
    assert (a.last_heard_ns, a.last_noticed_ns) == (0, 51 * MS)
    a.meets_nobody = True
    assert not a.heard(again.compose(52 * MS), 0, 53 * MS)
    assert (a.last_noticed_ns, a.compose(54 * MS).greets) == (51 * MS, ())


def test_which_parts_of_the_cluster_file_are_not_the_same_is_known_from_the_first_beat_that_counts() -> None:
    a, b = node("a", 11), node("b", 21)
    a.sections, b.sections = (("arbiter", "1"), ("limits", "2")), (("arbiter", "1"), ("limits", "3"))
    b.heard(a.compose(0), 0, 0)
    assert not b.other_sections
    a.heard(b.compose(0), 0, 0)
    b.heard(a.compose(0), 0, 0)
    assert (a.other_sections, b.other_sections) == (("limits",), ("limits",))
    b.sections = a.sections
    a.heard(b.compose(MS), 0, MS)
    assert not a.other_sections


@pytest.mark.parametrize("offset_ms", [0, 1, 50, 99])
def test_two_nodes_meet_within_two_intervals_whenever_they_start(offset_ms: int) -> None:
    a, b = node("a", 11, 0), node("b", 21, offset_ms * MS)
    for now_ms in range(offset_ms + 2 * INTERVAL // MS + 1):
        for sender, receiver, start_ms in ((a, b, 0), (b, a, offset_ms)):
            if now_ms >= start_ms and (now_ms - start_ms) % 100 == 0:
                beat = sender.compose(now_ms * MS)
                if now_ms >= offset_ms:
                    receiver.heard(beat, 0, now_ms * MS)
    assert a.alive((offset_ms + 200) * MS)
    assert b.alive((offset_ms + 200) * MS)


def test_a_peer_that_has_started_again_is_met_and_its_former_life_retired() -> None:
    a, b = met()
    old_beat = b.compose(0)
    again = node("b", 22, 50 * MS)
    again.heard(a.compose(50 * MS), 0, 50 * MS)
    assert a.heard(again.compose(51 * MS), 0, 51 * MS)
    assert again.heard(a.compose(52 * MS), 0, 52 * MS)
    assert (a.peer_incarnation, again.alive(52 * MS)) == (22, True)
    assert not a.heard(old_beat, 0, 53 * MS)
    assert a.counters(0).old == 1
    assert a.peer_incarnation == 22
    assert a.compose(53 * MS).greets == ()


def test_a_life_that_ended_before_the_present_one_was_met_never_comes_back() -> None:
    """Not even one that was never heard, nor when the table of retired lives has forgotten it."""
    a = node("a", 11)
    first = a.compose(0)
    unheard = node("b", 20)
    unheard.heard(first, 0, 0)
    held_back = [unheard.compose(MS * now) for now in range(3)]
    a, b = a, node("b", 21, 10 * MS)
    b.heard(a.compose(10 * MS), 0, 10 * MS)
    assert a.heard(b.compose(11 * MS), 0, 11 * MS)
    for beat in held_back:
        assert not a.heard(beat, 0, 12 * MS)
    assert (a.peer_incarnation, a.alive(12 * MS)) == (21, True)


def test_replays_of_unknown_lives_take_nothing_from_the_peer_that_is_met() -> None:
    a, b = met()
    for life in range(100, 200):
        assert not a.heard(node("b", life).compose(0), 0, MS)
    beat = a.compose(2 * MS)
    assert (beat.echo_incarnation, beat.echo_seq) == (21, 1)
    assert len(beat.greets) == HEARTBEAT_GREETS
    assert b.heard(beat, 0, 3 * MS)
    assert a.compose(MS + SUSPECT + 1).greets == ()


def test_replays_of_former_lives_do_not_keep_two_nodes_from_meeting() -> None:
    """The new life of b is met although beats of as many former lives as fit are replayed all the time."""
    a = node("a", 11)
    former = [node("b", life).compose(0) for life in range(100, 100 + HEARTBEAT_GREETS - 1)]
    b = node("b", 21)
    for now_ns in (0, INTERVAL):
        for beat in former:
            a.heard(beat, 0, now_ns)
        a.heard(b.compose(now_ns), 0, now_ns)
        for beat in former:
            a.heard(beat, 0, now_ns)
        b.heard(a.compose(now_ns), 0, now_ns)
    a.heard(b.compose(2 * INTERVAL), 0, 2 * INTERVAL)
    assert a.alive(2 * INTERVAL)
    assert b.alive(2 * INTERVAL)


def test_as_many_restarts_as_one_likes_are_bounded_in_memory() -> None:
    a = node("a", 11)
    for life in range(1000, 1000 + HEARTBEAT_RETIRED + 10):
        b = node("b", life)
        b.heard(a.compose(0), 0, 0)
        assert a.heard(b.compose(0), 0, 0)
    assert len(a._retired) == HEARTBEAT_RETIRED


def test_beats_of_others_are_strange() -> None:
    a, b = met()
    elsewhere = group(True, Record(1, "c", ("b", "c")))
    for beat in (
        replace(b.compose(0), cluster="other"),
        replace(b.compose(0), node="a"),
        replace(b.compose(0), node="c"),
        replace(b.compose(0), groups=(elsewhere,)),
    ):
        assert not a.heard(beat, 0, 0)
    assert a.counters(0).strange == 4


# --- Signs of life ----------------------------------------------------------------------------


def test_an_overtaken_or_repeated_beat_is_old() -> None:
    a, b = met()
    first, second = b.compose(0), b.compose(0)
    assert a.heard(second, 0, 0)
    assert not a.heard(second, 0, 0)
    assert not a.heard(first, 0, 0)
    assert a.peer == second
    assert (a.counters(0).received, a.counters(0).old) == (2, 2)


def test_each_path_has_its_own_signs_of_life() -> None:
    a, b = met(paths=2)
    beat = b.compose(10 * MS)
    assert a.heard(beat, 0, 10 * MS)
    assert not a.heard(beat, 1, 30 * MS), "it is no news, but a sign of life of the path"
    assert (a.silent_ns(0, 40 * MS), a.silent_ns(1, 40 * MS)) == (30 * MS, 10 * MS)
    assert a.last_heard_ns == 30 * MS
    assert not a.heard(beat, 1, 50 * MS)
    assert a.last_heard_ns == 30 * MS


def test_a_peer_is_suspected_when_it_has_been_silent_for_long_enough() -> None:
    a, b = met()
    for now_ns in range(0, SUSPECT + 1, INTERVAL):
        a.compose(now_ns)
    assert (a.alive(SUSPECT - 1), a.suspected(SUSPECT - 1)) == (True, False)
    assert (a.alive(SUSPECT), a.suspected(SUSPECT)) == (False, True)
    assert b.alive(SUSPECT - 1)


def test_a_node_that_has_just_started_suspects_nobody() -> None:
    a = node("a", 11, 7 * SUSPECT)
    for now_ns in range(7 * SUSPECT, 8 * SUSPECT, INTERVAL):
        a.compose(now_ns)
        assert not a.alive(now_ns)
        assert not a.suspected(now_ns)
    a.compose(8 * SUSPECT)
    assert a.suspected(8 * SUSPECT)


def test_a_node_that_was_stopped_itself_suspects_nobody_at_once() -> None:
    a, _ = met()
    woken_ns = 60 * SUSPECT
    assert not a.alive(woken_ns)
    assert not a.suspected(woken_ns), "nothing has been sent since it woke up"
    for now_ns in range(woken_ns, woken_ns + SUSPECT, INTERVAL):
        a.compose(now_ns)
        assert not a.suspected(now_ns)
    a.compose(woken_ns + SUSPECT)
    assert a.suspected(woken_ns + SUSPECT)


def test_beats_that_were_held_back_keep_nobody_alive() -> None:
    a, b = met()
    held_back = [b.compose(MS) for _ in range(10)]
    now_ns = SUSPECT + 1
    a.compose(now_ns)
    for beat in held_back:
        assert a.heard(beat, 0, now_ns), "still it is news"
    assert not a.alive(now_ns)
    assert a.counters(0).late == 10


def test_a_beat_that_names_a_beat_not_yet_sent_proves_nothing() -> None:
    a, b = met()
    assert a.heard(replace(b.compose(0), echo_seq=99), 0, 0)
    assert a.counters(0).late == 1
    assert a.peer_saw_seq == 0


def test_what_the_peer_has_seen_is_known() -> None:
    a, b = met()
    assert a.next_seq == 3
    b.heard(a.compose(0), 0, 0)
    a.heard(b.compose(0), 0, 0)
    assert (a.peer_saw_seq, a.next_seq) == (3, 4)


# --- Leases -----------------------------------------------------------------------------------


def test_a_lease_lasts_from_the_sending_of_the_beat_that_is_acknowledged() -> None:
    a, b = met()
    beat = a.compose(100 * MS)
    b.heard(beat, 0, 130 * MS)
    assert a.lease_until_ns("g") == 0
    a.heard(b.compose(200 * MS, [group(promise=True)]), 0, 230 * MS)
    assert a.lease_until_ns("g") == 100 * MS + LEASE
    assert a.lease_until_ns("other") == 0
    assert b.last_promise_heard_ns("g") == 130 * MS
    assert may_serve_from_ns(b.last_promise_heard_ns("g"), TIMING) > a.lease_until_ns("g")


def test_without_a_promise_there_is_no_more_lease_and_nothing_more_to_wait_for() -> None:
    a, b = met()
    b.heard(a.compose(MS), 0, MS)
    a.heard(b.compose(MS, [group(promise=True)]), 0, MS)
    for now_ns in range(INTERVAL, LEASE, INTERVAL):
        b.heard(a.compose(now_ns), 0, now_ns)
        a.heard(b.compose(now_ns, [group(promise=False)]), 0, now_ns)
    assert b.alive(LEASE)
    assert a.lease_until_ns("g") == MS + LEASE
    assert b.last_promise_heard_ns("g") == MS


def test_a_greeting_gives_no_lease() -> None:
    a, b = node("a", 11), node("b", 21)
    b.heard(a.compose(0), 0, 0)
    a.heard(b.compose(0, [group(promise=True)]), 0, 0)
    assert a.alive(0)
    assert a.lease_until_ns("g") == 0


def test_an_old_promise_that_arrives_late_extends_no_lease() -> None:
    a, b = met()
    b.heard(a.compose(0), 0, 0)
    promise = b.compose(0, [group(promise=True)])
    for now_ns in range(INTERVAL, LEASE + INTERVAL, INTERVAL):
        a.compose(now_ns)
    a.heard(promise, 0, LEASE + INTERVAL)
    assert a.lease_until_ns("g") <= LEASE


def test_a_new_life_waits_as_if_it_had_promised_when_it_started() -> None:
    assert node("b", 21, 5 * LEASE).last_promise_heard_ns("g") == 5 * LEASE


def test_the_wait_covers_the_drift_of_the_clocks() -> None:
    assert may_serve_from_ns(1000, TIMING) >= 1000 + LEASE * 1.1
    assert may_serve_from_ns(1000, Timing(clock_drift=0)) > 1000 + LEASE


def test_an_acknowledgement_to_a_former_life_proves_nothing_and_gives_no_lease() -> None:
    a, b = met()
    b.heard(a.compose(0), 0, 0)
    to_former = b.compose(0, [group(promise=True)])
    a = node("a", 12, 2 * MS)
    for _ in range(3):
        b.heard(a.compose(2 * MS), 0, 2 * MS)
    assert not a.heard(to_former, 0, 3 * MS)
    greeting = b.compose(3 * MS, [group(promise=True)])
    assert (greeting.echo_incarnation, greeting.echo_seq, greeting.greets) == (11, 3, ((12, 3),))
    assert a.heard(greeting, 0, 3 * MS)
    assert a.lease_until_ns("g") == 0, "what was promised was promised to the former life"


def test_send_times_are_remembered_for_as_long_as_they_count() -> None:
    a = node("a", 11)
    for now_ns in range(0, 100 * LEASE, INTERVAL):
        a.compose(now_ns)
    assert len(a._sent_ns) == LEASE // INTERVAL + 1
    for _ in range(HEARTBEAT_SENT + 10):
        a.compose(100 * LEASE)
    assert len(a._sent_ns) == HEARTBEAT_SENT


@pytest.mark.parametrize(
    "values",
    [{"heartbeat_interval_s": 0}, {"suspect_after_s": 0.2}, {"lease_s": 0.89}, {"clock_drift": 1}, {"clock_drift": -1}],
)
def test_durations_that_do_not_fit_together_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        Timing(**values)


# --- Consent ----------------------------------------------------------------------------------


def test_questions_and_answers_count_between_the_present_lives_only() -> None:
    a, _ = met()
    ask = Ask("lab", "b", 21, 11, 1, "g", RECORD, RECORD)
    assert a.current(ask)
    assert a.current(Answer("lab", "b", 21, 11, 1, True, None))
    for changed in (
        replace(ask, cluster="x"),
        replace(ask, node="a"),
        replace(ask, incarnation=20),
        replace(ask, echo_incarnation=10),
    ):
        assert not a.current(changed)


# --- Against somebody who holds every datagram -------------------------------------------------


@dataclass(frozen=True)
class Datagram:
    """What was really so, beside what it says."""

    beat: Heartbeat
    sender: int
    life_number: int  # of the sender: 0 for its first one
    sent_ns: int  # true time


@dataclass
class Machine:
    """A node with its clock: it goes at ``rate`` of true time, from an offset, through all lives."""

    name: str
    rate_percent: int
    offset_ns: int
    life_number: int = -1
    membership: Membership = field(init=False)
    started_ns: int = 0
    promising: bool = True
    arrivals: list[tuple[int, int]] = field(default_factory=list)  # when sent, when it first came on some path
    came: set[tuple[int, int, int]] = field(default_factory=set)
    leases: set[int] = field(default_factory=set)  # from when on, of all that were given to this life
    known: tuple[int, int] = (-1, 0)

    def clock(self, true_ns: int) -> int:
        return self.offset_ns + true_ns * self.rate_percent // 100

    def start(self, true_ns: int) -> None:
        self.life_number += 1
        self.started_ns = true_ns
        life = (1000 if self.name == "a" else 2000) + self.life_number
        self.membership = node(self.name, life, self.clock(true_ns), paths=2)
        self.arrivals, self.came, self.leases, self.known = [], set(), set(), (-1, 0)


class World:
    def __init__(self, slow_percent: int) -> None:
        self.now_ns = 0
        self.machines = [Machine("a", slow_percent, 5_000_000_000), Machine("b", 100, 77)]
        self.sent: list[Datagram] = []
        self.sent_at: dict[tuple[int, int], int] = {}  # (life, seq) -> when, on the sender's clock
        for machine in self.machines:
            machine.start(0)

    def beat(self, number: int) -> Datagram:
        machine = self.machines[number]
        groups = [group(machine.promising)]
        beat = machine.membership.compose(machine.clock(self.now_ns), groups)
        self.sent.append(Datagram(beat, number, machine.life_number, self.now_ns))
        self.sent_at[beat.incarnation, beat.seq] = machine.clock(self.now_ns)
        return self.sent[-1]

    def deliver(self, datagram: Datagram, path: int) -> None:
        receiver = self.machines[1 - datagram.sender]
        beat = datagram.beat
        if (beat.incarnation, beat.seq, path) not in receiver.came:
            receiver.came.add((beat.incarnation, beat.seq, path))
            recent = [arrival for arrival in receiver.arrivals if self.now_ns - arrival[1] < 2 * SUSPECT]
            receiver.arrivals = [*recent, (datagram.sent_ns, self.now_ns)]
        if beat.groups[0].promise and beat.echo_incarnation == receiver.membership.incarnation:
            receiver.leases.add(self.sent_at[beat.echo_incarnation, beat.echo_seq])
        receiver.membership.heard(beat, path, receiver.clock(self.now_ns))

    def restart(self, number: int) -> None:
        self.now_ns += MS  # lives do not overlap
        self.machines[number].start(self.now_ns)

    def check(self) -> None:
        for machine, other in (self.machines, reversed(self.machines)):
            self.check_alive(machine)
            self.check_lease(machine, other)
            self.check_known(machine)

    def check_alive(self, machine: Machine) -> None:
        """It came, for the first time, within the time, and had been sent within the time before, in this life."""
        clock = machine.clock
        if machine.membership.alive(clock(self.now_ns)):
            assert any(
                clock(self.now_ns) - clock(arrived_ns) < SUSPECT
                and clock(arrived_ns) - clock(sent_ns) <= SUSPECT
                and sent_ns >= machine.started_ns
                for sent_ns, arrived_ns in machine.arrivals
            )

    def check_lease(self, machine: Machine, other: Machine) -> None:
        """Rule 5: never may the one answer while the other, having taken over, may answer, too."""
        until_ns = machine.membership.lease_until_ns("g")
        if machine.clock(self.now_ns) < until_ns:
            may_serve_ns = may_serve_from_ns(other.membership.last_promise_heard_ns("g"), TIMING)
            assert other.clock(self.now_ns) < may_serve_ns
            assert until_ns - LEASE in machine.leases, "it is due to a promise, and to when that beat was sent"

    def check_known(self, machine: Machine) -> None:
        """What is known of the peer only goes forward: in its lives, and within a life."""
        beat = machine.membership.peer
        if beat is not None:
            known = (beat.incarnation, beat.seq)
            assert known >= machine.known
            assert beat.incarnation == machine.membership.peer_incarnation
            machine.known = known

    def be_honest(self) -> None:
        """Nobody in between for two intervals; the second node's beats are half an interval later."""
        for _ in range(3):
            for number in (0, 1):
                self.deliver(self.beat(number), 0)
                self.check()
                self.now_ns += INTERVAL // 2


class Adversary:
    """Holds every datagram; a mixture of honest talk, silence, restarts and whatever can be done with datagrams."""

    def __init__(self, world: World, random: Random) -> None:
        self.world = world
        self.random = random

    def step(self) -> None:
        """One thing of several, the usual ones more often."""
        acts = (self.talk, self.talk, self.one_way, self.wait, self.replay, self.replay, self.flood, self.change)
        self.random.choice(acts)()
        self.world.check()

    def talk(self) -> None:
        """Both hear each other, a few times; the way takes its time and now and then two beats change places."""
        for _ in range(self.random.randint(1, 4)):
            beats = [self.world.beat(number) for number in self.random.choices((0, 1), k=3)]
            self.world.now_ns += self.random.choice((0, MS, 30 * MS))
            self.random.shuffle(beats)
            for beat in beats:
                self.world.deliver(beat, self.random.randrange(2))
                self.world.check()

    def one_way(self) -> None:
        """Only one of them is heard."""
        number = self.random.randrange(2)
        for _ in range(self.random.randint(1, 4)):
            self.world.deliver(self.world.beat(number), 0)
            self.world.beat(1 - number)
            self.world.now_ns += INTERVAL

    def wait(self) -> None:
        self.world.now_ns += self.random.choice((MS, INTERVAL, SUSPECT // 2, SUSPECT, LEASE, 2 * LEASE))

    def replay(self) -> None:
        """Any datagram; rather one of the newest."""
        for _ in range(min(5, len(self.world.sent))):
            newest_first = int(self.random.expovariate(0.2)) % len(self.world.sent)
            self.world.deliver(self.world.sent[-1 - newest_first], self.random.randrange(2))
            self.world.check()

    def flood(self) -> None:
        """Everything that was ever sent, to everybody, in some order."""
        path = self.random.randrange(2)
        for datagram in self.shuffled():
            self.world.deliver(datagram, path)
            self.world.check()

    def shuffled(self) -> list[Datagram]:
        sent = list(self.world.sent)
        if (order := self.random.randrange(3)) == 1:
            sent.reverse()
        elif order == 2:
            self.random.shuffle(sent)
        return sent

    def change(self) -> None:
        number = self.random.randrange(2)
        if self.random.random() < 0.5:
            self.world.machines[number].promising ^= True
        elif self.world.machines[number].life_number < HEARTBEAT_GREETS - 2:
            self.world.restart(number)


@given(st.sampled_from([91, 100, 110]), st.integers(0, 2**32))
def test_who_holds_every_datagram_can_neither_revive_nor_roll_back(slow_percent: int, seed: int) -> None:
    world = World(slow_percent)
    adversary = Adversary(world, Random(seed))
    for _ in range(40):
        adversary.step()
    world.be_honest()
    assert all(machine.membership.alive(machine.clock(world.now_ns)) for machine in world.machines)
