"""Whether the peer lives, what it said last, and which lease its promises give: from beats that may be replays. Pure.

Somebody may hold every datagram that was ever sent and deliver any of them, any number of times, in any order, on any
path. Each run of a node is a *life* with a random number (incarnation) and numbers its beats (seq). A beat *proves*
that it is fresh by naming the newest beat of my present life that its sender has seen: it was sent after that one.

Invariants:
- A life of the peer is met (``peer_incarnation``) only by a beat that proves itself with a beat which I sent after I
  met the life before. Lives of one node do not overlap (its state directory is locked), so the one which can know that
  beat is the later one: no former life ever comes back. Remembering retired lives only saves greeting them.
- Of the life that is met, only a beat newer than all before counts as news, and, by path, only once as a sign of life.
- A sign of life proves itself with a beat which I sent within ``suspect_after``: held-back datagrams do not keep a
  dead peer alive. So ``alive``: a datagram arrived within ``suspect_after``, sent within ``suspect_after`` before that.
- A lease counts from when I sent the beat that is acknowledged, by a peer that has met me, in a beat with the promise.
- ``compose`` notes what the beat that it makes promises; so ``last_promise_heard_ns`` covers every lease given.

How two lives meet, in any order of starting, within two intervals: A's beat is heard by B, which does not know that
life, as *unproven*. B's next beat *greets* it, naming the beat: that proves B to A, which meets B. A's next beat echoes
B's: that proves A to B. Greetings stand beside the echo, so an unproven life takes nothing from the one that is met.
Their number is bounded: who replays beats of more than ``HEARTBEAT_GREETS`` unknown lives, in less than an interval,
can keep two nodes that have not met from meeting, but nodes that have met do not notice.

Neighbours: ``node.heartbeats`` carries beats; ``cluster.group`` decides from what is known here.
Bounds: ``limits``, "Heartbeats". A restart forgets everything here, and ``lease`` says why that is safe: the new life
waits as if it had promised right before it started.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from stortrends_ha.cluster.lease import Timing, lease_until_ns
from stortrends_ha.limits import HEARTBEAT_GREETS, HEARTBEAT_RETIRED, HEARTBEAT_SENT
from stortrends_ha.protocol.heartbeat import LEFT, Answer, Ask, GroupBeat, Heartbeat

__all__ = ["Membership", "PathCounters", "Timing"]


@dataclass(slots=True)
class PathCounters:
    """Authentic beats that came on one path, by what they were."""

    received: int = 0  # of the peer's present life, not seen on this path before
    late: int = 0  # of those: no sign of life, as they prove nothing recent (held up, or the peer does not hear me)
    old: int = 0  # seen before, overtaken, or of a former life: reordered or replayed
    unproven: int = 0  # of a life not met: the peer has just started, or this is a replay
    strange: int = 0  # of another cluster, node or set of nodes: a mistake in somebody's configuration


@dataclass(slots=True)
class _Path:
    newest_seq: int = 0  # of the life that is met
    heard_ns: int | None = None  # when the last sign of life came
    counters: PathCounters = field(default_factory=PathCounters)


class Membership:
    """What node ``me`` of ``cluster`` knows of ``peer``; ``incarnation``: 64 random bits, not 0, new at each start."""

    def __init__(
        self, cluster: str, me: str, peer: str, incarnation: int, timing: Timing, now_ns: int, paths: int = 1
    ) -> None:
        self.cluster, self.me, self.peer_name = cluster, me, peer
        self.incarnation = incarnation
        self.timing = timing
        self.sections: tuple[tuple[str, str], ...] = ()  # of this node's cluster file, for its beats
        self.peer: Heartbeat | None = None  # the newest beat; it stays when the peer has fallen silent
        self.peer_incarnation = 0  # the life that I have met; 0: none yet
        self.peer_saw_seq = 0  # the newest of my beats which that life has seen, as of ``peer``
        # While the peer is being fenced no new life of it may get to know this node: one that has seen its peer may
        # fence it, and would take over from the record that is about to be replaced.
        self.meets_nobody = False
        self.owes_beat = False  # a beat sent now would be the one that the peer needs to meet me
        self._start_ns = now_ns
        self._greeted_ns = 0
        self._seq = 0
        self._met_at_seq = 0  # my newest beat when I met the present life: a later life knows a newer one
        self._newest_ns = now_ns  # when ``peer`` was received
        self._paths = [_Path() for _ in range(paths)]
        self._unproven: dict[int, tuple[int, int]] = {}  # life -> (newest seq, when heard), the longest silent first
        self._retired: dict[int, None] = {}  # the longest retired first
        self._sent_ns: dict[int, int] = {}  # seq -> when
        self._last_sent_ns = self._awake_ns = now_ns
        self._lease_from_ns: dict[str, int] = {}  # group -> when I sent the newest beat acknowledged with a promise
        self._promised_ns: dict[str, int] = {}  # group -> when I received the newest beat acknowledged so

    # --- Sending ------------------------------------------------------------------------------

    @property
    def next_seq(self) -> int:
        """What the next beat will have."""
        return self._seq + 1

    def compose(
        self,
        now_ns: int,
        groups: Iterable[GroupBeat] = (),
        *,
        drained: bool = False,
        stopping: bool = False,
        version: str = "",
    ) -> Heartbeat:
        """The next beat, to be sent on every path right after: its send time counts from now.

        What it promises binds this node from now on, whether the beat arrives or not.
        """
        groups = tuple(groups)
        self._note_sending(now_ns)
        self._note_promises(groups)
        self.owes_beat = False
        return Heartbeat(
            cluster=self.cluster,
            node=self.me,
            incarnation=self.incarnation,
            seq=self._seq,
            echo_incarnation=self.peer_incarnation,
            echo_seq=self.peer.seq if self.peer else 0,
            greets=self._greets(now_ns),
            drained=drained,
            stopping=stopping,
            version=version,
            groups=groups,
            sections=self.sections,
        )

    def _note_sending(self, now_ns: int) -> None:
        if self._slept(now_ns):
            self._awake_ns = now_ns
        self._seq += 1
        self._last_sent_ns = self._sent_ns[self._seq] = now_ns
        while (
            len(self._sent_ns) > HEARTBEAT_SENT
            or now_ns - self._sent_ns[next(iter(self._sent_ns))] > self.timing.lease_ns
        ):
            del self._sent_ns[next(iter(self._sent_ns))]  # forgotten early: a lease counts less, never more

    def _note_promises(self, groups: tuple[GroupBeat, ...]) -> None:
        if self.peer_incarnation:  # else no beat is acknowledged
            self._promised_ns.update((group.name, self._newest_ns) for group in groups if group.promise)

    def _greets(self, now_ns: int) -> tuple[tuple[int, int], ...]:
        if self.meets_nobody:
            return ()
        recent_ns = now_ns - self.timing.suspect_after_ns
        return tuple((life, seq) for life, (seq, heard_ns) in self._unproven.items() if heard_ns >= recent_ns)

    # --- Receiving ----------------------------------------------------------------------------

    def heard(self, beat: Heartbeat, path: int, now_ns: int) -> bool:
        """Take in an authentic beat that came on ``path``; whether it was news: ``peer`` is a newer one now."""
        of = self._paths[path]
        if not self._is_for_me(beat):
            of.counters.strange += 1
            return False
        proof = self._proof(beat)
        if beat.incarnation != self.peer_incarnation and not self._meets(beat, proof, of.counters, now_ns):
            return False
        if beat.seq <= of.newest_seq:
            of.counters.old += 1
            return False
        of.newest_seq = beat.seq
        of.counters.received += 1
        if self._is_recent(proof, now_ns):
            of.heard_ns = now_ns
        else:
            of.counters.late += 1
        return self._is_news(beat, proof, now_ns)

    def _is_for_me(self, beat: Heartbeat) -> bool:
        ours = {self.me, self.peer_name}
        return (
            beat.cluster == self.cluster
            and beat.node == self.peer_name
            and all(ours.issuperset(group.record.in_sync) for group in beat.groups)
        )

    def _proof(self, beat: Heartbeat) -> int:
        """The newest of my beats that the sender has certainly seen; 0: none of this life."""
        seen = [(beat.echo_incarnation, beat.echo_seq), *beat.greets]
        return max((seq for life, seq in seen if life == self.incarnation and seq <= self._seq), default=0)

    def _meets(self, beat: Heartbeat, proof: int, counters: PathCounters, now_ns: int) -> bool:
        """Whether a beat of a life other than the one that is met proves that it is the present one; else greet it."""
        if beat.incarnation in self._retired:
            counters.old += 1
            return False
        if self.meets_nobody:
            counters.unproven += 1
            return False
        if proof <= self._met_at_seq:
            counters.unproven += 1
            self._note_unproven(beat, now_ns)
            return False
        if self.peer_incarnation:
            _remember(self._retired, self.peer_incarnation, None, HEARTBEAT_RETIRED)
        self.peer_incarnation = beat.incarnation
        self._met_at_seq = self._seq
        self._unproven.pop(beat.incarnation, None)
        for path in self._paths:
            path.newest_seq = 0
        self.owes_beat = True
        return True

    def _note_unproven(self, beat: Heartbeat, now_ns: int) -> None:
        self._greeted_ns = now_ns
        known_seq, _ = self._unproven.pop(beat.incarnation, (0, 0))
        _remember(self._unproven, beat.incarnation, (max(known_seq, beat.seq), now_ns), HEARTBEAT_GREETS)
        self.owes_beat |= not known_seq

    def _is_recent(self, proof: int, now_ns: int) -> bool:
        sent_ns = self._sent_ns.get(proof)
        return sent_ns is not None and now_ns - sent_ns <= self.timing.suspect_after_ns

    def _is_news(self, beat: Heartbeat, proof: int, now_ns: int) -> bool:
        if self.peer is not None and self.peer.incarnation == beat.incarnation and beat.seq <= self.peer.seq:
            return False
        self.peer, self._newest_ns, self.peer_saw_seq = beat, now_ns, proof
        self._note_lease(beat, now_ns)
        return True

    def _note_lease(self, beat: Heartbeat, now_ns: int) -> None:
        """Only the echo counts: a sender that merely greets me has not noted a promise to me."""
        held = {name: ns for name, ns in self._lease_from_ns.items() if lease_until_ns(ns, self.timing) > now_ns}
        sent_ns = self._sent_ns.get(beat.echo_seq) if beat.echo_incarnation == self.incarnation else None
        if sent_ns is not None:
            promised = (group.name for group in beat.groups if group.promise)
            held.update((name, max(sent_ns, held.get(name, sent_ns))) for name in promised)
        self._lease_from_ns = held

    # --- What is known ------------------------------------------------------------------------

    @property
    def last_heard_ns(self) -> int:
        """When the last sign of life came on any path; if none did, when this node started."""
        return max(path.heard_ns if path.heard_ns is not None else self._start_ns for path in self._paths)

    @property
    def last_noticed_ns(self) -> int:
        """When the peer was heard last, or a life of it that may have got to know this node since; 0: never."""
        return max(self._greeted_ns, self.last_heard_ns if self.peer else 0)

    @property
    def other_sections(self) -> tuple[str, ...]:
        """The parts of the cluster file that are not the same at the peer, as it said last."""
        if self.peer is None:
            return ()
        theirs = dict(self.peer.sections)
        return tuple(name for name, digest in self.sections if name != LEFT and theirs.get(name) != digest)

    def alive(self, now_ns: int) -> bool:
        """Whether a sign of life came within ``suspect_after``. Not alive is not yet suspected."""
        heard = [path.heard_ns for path in self._paths if path.heard_ns is not None]
        return bool(heard) and now_ns - max(heard) < self.timing.suspect_after_ns

    def suspected(self, now_ns: int) -> bool:
        """Whether the peer has been silent for ``suspect_after`` while this node was awake to hear it."""
        return self.silence_ns(now_ns) >= self.timing.suspect_after_ns

    def silence_ns(self, now_ns: int) -> int:
        """For how long nothing was heard on any path although this node was awake: since it started, or woke up.

        A node that was stopped for a while has not heard its peer, either; that says nothing of the peer.
        """
        if self._slept(now_ns):
            return 0
        return now_ns - max(self.last_heard_ns, self._awake_ns)

    def _slept(self, now_ns: int) -> bool:
        """Whether this node itself has sent nothing for so long that it may have missed as much."""
        return now_ns - self._last_sent_ns > self.timing.suspect_after_ns // 2

    def silent_ns(self, path: int, now_ns: int) -> int:
        """Since the last sign of life on this path, or since the start; for people."""
        heard_ns = self._paths[path].heard_ns
        return now_ns - (self._start_ns if heard_ns is None else heard_ns)

    def lease_until_ns(self, group: str) -> int:
        """Until when this node, as the owner of the group, may answer (rule 5); 0: it has no lease."""
        sent_ns = self._lease_from_ns.get(group)
        return 0 if sent_ns is None else lease_until_ns(sent_ns, self.timing)

    def last_promise_heard_ns(self, group: str) -> int:
        """When the newest beat was received that this node acknowledged with a promise; a former life of this node may
        have done so until it ended, so if there is none: when this life started. For ``lease.may_serve_from_ns``."""
        return self._promised_ns.get(group, self._start_ns)

    def current(self, message: Ask | Answer) -> bool:
        """Whether a message is of the peer's present life and meant for mine; else it is a replay, or a mistake."""
        return (
            message.cluster == self.cluster
            and message.node == self.peer_name
            and message.incarnation == self.peer_incarnation
            and message.echo_incarnation == self.incarnation
        )

    def counters(self, path: int) -> PathCounters:
        """A copy of what has been counted on this path."""
        return replace(self._paths[path].counters)


def _remember(table: dict[int, Any], key: int, value: Any, count_max: int) -> None:
    """As the newest entry; the oldest one goes when there are too many."""
    table[key] = value
    if len(table) > count_max:
        del table[next(iter(table))]
