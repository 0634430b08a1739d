"""Who serves a group: the state machine of one group on one node. Pure: it looks at a ``View`` and wants ``effects``.

Invariants, by rule:
- 2: an owner that misses its peer goes on alone only with a granted record; until then its data process holds.
- 3: a takeover is proposed only by a node that the record has in sync and that has lost nothing (``_obstacle``).
- 4: STANDING is entered when the data process has said that it stopped; only there a takeover is proposed.
- 5: ``promise`` is false from STOPPING on, and while leading; a new owner answers from ``_serve_from_ns`` on.
- 11: no answer of the arbiter, or an unknown one, changes nothing (``register``).
- 12: addresses are claimed when the data process listens, and are gone before a handover is proposed.
- A record is saved before anything is done because of it; ``self.record`` is always a saved one.

A node may die between any two effects, with a proposal open. It starts again in LEARNING with its saved record. If that
says that it is in sync with its peer, it leads with the lease that the peer gives anew, and nothing that was open
can harm. If it is alone, an open proposal may add the peer at any moment: so it first proposes itself anew, and
leads when that is granted.

Neighbours: ``register`` talks to the arbiter, ``orders`` to the data process, ``judgement`` answers the questions.
Bounds: one request to the arbiter, one record being saved, and one order at a time (a newer one replaces it).
"""

from collections.abc import Callable
from typing import ClassVar

from stortrends_ha.cluster import effects as do
from stortrends_ha.cluster import judgement as judge
from stortrends_ha.cluster.answers import Answer
from stortrends_ha.cluster.orders import Order, Orders
from stortrends_ha.cluster.outbox import Outbox
from stortrends_ha.cluster.phases import PROMISING, Phase, moved
from stortrends_ha.cluster.register import Agreed, Empty, Newer, NotGranted, Register
from stortrends_ha.cluster.view import Replica, Saved, Timing, View
from stortrends_ha.cluster.wishes import Wishes
from stortrends_ha.record import Record

_ALONE = "alone"  # of changes: the owner goes on without its secondary


class Group:
    """One group on the node ``me``."""

    def __init__(self, name: str, me: str, peer: str, saved: Saved, timing: Timing, *, failback: bool) -> None:
        """``failback``: whether the group goes to ``peer`` by itself when all is well."""
        self.name = name
        self.record = saved.record
        self.phase = Phase.LEARNING
        self._me = me
        self._peer = peer
        self._timing = timing
        self._failback = failback
        self._out = Outbox()
        self._register = Register(self._out, timing)
        self._orders = Orders(self._out, timing)
        self._wishes = Wishes(self._out, timing)
        self._saving: Saved | None = None
        self._alone_since = saved.alone_since
        self._old_record = True  # it is from an earlier life, which may have left a proposal open
        self._stand_again_ns = 0  # with an arbiter that does not answer
        self._serve_from_ns: int | None = None
        self._session_ns = 0  # when there was a session last
        self._well_ns = 0  # since when all has been well
        self._level_ns = 0  # when the owner that is followed was not behind last
        self._locked = False  # the data process has said joinable: it must be told what came of it
        self._granted_in_spite = False  # of a lost cache: the record says that this copy counts
        self._forcing: Record | None = None  # asked for by the operator, whatever may be lost (rule 11)
        self._release_again_ns = 0  # after a release that failed
        self._kept_clients = False  # over a handover, until the peer serves

    # --- What others see ----------------------------------------------------------------------

    def promise(self, view: View) -> bool:
        """Rule 5: whether a beat sent now may extend the peer's lease: only for the very record by which it owns."""
        if self.phase not in PROMISING or self.record.owner != self._peer or self._saving is not None:
            return False
        if view.differs:
            return False
        return view.peer is not None and view.peer.record == self.record

    @property
    def leading(self) -> bool:
        """Whether clients may be getting answers from this node."""
        return self._orders.exposed

    @property
    def waits_for(self) -> str:
        """Why the arbiter's last answer was none, a clause; empty if it was one."""
        return self._register.waits_for

    @property
    def proposing(self) -> bool:
        """Whether a change of the record is under way here: asked for, perhaps granted, or being saved."""
        return self._register.proposing or self._saving is not None

    @property
    def wants(self) -> bool:
        """Whether the peer is asked to hand the group over."""
        return self._wishes.move and self.record.owner != self._me

    def unfit(self, replica: Replica | None) -> str:
        """Why this node could not own the group now; empty if it could."""
        if replica is None:
            return "" if self.phase is Phase.LEARNING else "its data process does not run"
        return self._obstacle(replica)

    def _obstacle(self, replica: Replica) -> str:
        return judge.obstacle(self.record, self._alone_since, self._me, replica, in_spite=self._granted_in_spite)

    @property
    def _forced(self) -> bool:
        """Whether this very record is what the operator asked for: never one granted later, for another reason."""
        return self.record == self._forcing

    def may_hold_addresses(self, view: View) -> bool:
        """Rule 12; an owner without a lease may be cut off, and somebody else may own (row 7)."""
        owns = self.phase in (Phase.LEADING, Phase.RELEASING) and self._saving is None
        return owns and (self.record.alone or view.now_ns < view.lease_until_ns)

    def leaving(self, view: View) -> bool:
        """Whether an orderly stop should wait: the group is on its way to the peer, or can go there; or its owner has
        not yet gone on without this node, and would have to hold its clients."""
        if self.phase in (Phase.RELEASING, Phase.HANDING) or self._kept_clients:
            return view.alive
        if self.phase is Phase.FOLLOWING:
            mirrors = view.peer is not None and view.peer.serving and self._me in self.record.in_sync
            return view.alive and mirrors and not view.peer_stopping
        can = judge.peer_can_own(self.record, self._peer, view) and not self.waits_for
        return self.phase is Phase.LEADING and can

    # --- Wishes of the operator ---------------------------------------------------------------

    def move(self, view: View, to: str) -> list[do.Effect]:
        """The operator wants the group at node ``to``: once, within ``move_timeout_ns``."""
        if to != self.record.owner:
            self._wishes.want_move(view.now_ns)
        return self.step(view)

    def force(self, view: View) -> list[do.Effect]:
        """Rule 11's override: own the group here, whatever may be lost."""
        self._wishes.want_force(view.now_ns)
        return self.step(view)

    def offered(self, record: Record) -> tuple[bool, list[do.Effect]]:
        """The peer proposes a record (where records live on the two nodes): whether it is taken; then it is being
        saved. Not by a node that may be serving by the old one, or that reaches for ownership itself."""
        serves = self._orders.exposed and record.owner != self._me
        taken = not serves and self.phase not in (Phase.STOPPING, Phase.STANDING) and record.epoch > self.record.epoch
        if self._saving is not None:
            taken = taken and self._saving.record == record  # else it would be waited for in vain
        elif taken:
            self._adopt(record, f"{self._peer} proposes it")
        return taken, self._out.take()

    # --- Events -------------------------------------------------------------------------------

    def step(self, view: View) -> list[do.Effect]:
        """Time has passed, a beat has come, or the data process has said something."""
        self._step(view)
        return self._out.take()

    def saved(self, saved: Saved, view: View) -> list[do.Effect]:
        """A record is durable on this node."""
        if saved == self._saving:
            self._saving = None
            before, self.record, self._alone_since = self.record, saved.record, saved.alone_since
            self._old_record = False
            self._enter(before, view)
        return self.step(view)

    def done(self, number: int, error: str, view: View) -> list[do.Effect]:
        """The data process has carried out an order, or could not; or the addresses are down."""
        order = self._orders.done(number, error, view.now_ns)
        if order is not None and error:
            self._order_failed(order, error, view)
        elif order is not None:
            self._order_done(order, view)
        return self.step(view)

    def arbiter_said(self, number: int, answer: Answer, view: View) -> list[do.Effect]:
        """The arbiter has answered, or has not."""
        match self._register.take(number, answer, self.record, view.now_ns):
            case Newer(record, why):
                self._adopt(record, why)
            case NotGranted(why):
                self._not_granted(why, view)
            case Empty(proposed):
                if proposed:
                    self._not_granted(self._register.waits_for, view)
                agreed = view.alive and view.peer and view.peer.promise and not view.differs
                if self.record.owner == self._me and agreed:
                    self._register.seed(self.record)  # a peer that promises has the same record
            case Agreed():
                together = view.alive and view.peer and view.peer.record == self.record and not view.differs
                if not self._alone_since and together:
                    self._begin()
        return self.step(view)

    # --- The record ---------------------------------------------------------------------------

    def _adopt(self, record: Record, why: str) -> None:
        """A newer record is known, which settles whatever was proposed before: save it first."""
        goes_on = record.alone and self.record.alone and record.owner == self.record.owner == self._me
        if record == self._forcing:
            why = "the operator overrides, and accepts that acknowledged writes may be lost"
        self._saving = Saved(record, self._alone_since if goes_on else record.epoch, why)
        self._register.settle()
        self._say(f"the record is now {record}, because {why}")
        self._out.put(do.Save(self._saving))

    def _enter(self, before: Record, view: View) -> None:
        """The saved record is a new one: take the role that it gives."""
        self._session_ns = self._well_ns = view.now_ns
        self._locked = False
        self._wishes.drop_force()  # granted, or of a record that is no more: the operator has to look again
        if self.record.owner != self._me:
            self._granted_in_spite = False
            self._serve_from_ns = None
            self._follow(view)
            return
        if before.owner != self._me:
            self._serve_from_ns = None
            self._wishes.drop_move()
        self._lead(view)

    def _after_old_lease(self, view: View) -> int:
        """Rule 5: from when on a new owner may answer; 0 is at once."""
        return 0 if judge.nobody_else_answers(self.record, view) else view.may_serve_from_ns

    def _begin(self) -> None:
        """A new group: both nodes and the arbiter agree on its first record."""
        self._saving = Saved(self.record, self.record.epoch, "the group is new")
        self._out.put(do.Save(self._saving))

    def _not_granted(self, why: str, view: View) -> None:
        """A proposal was certainly not granted: go back to what was before it."""
        if self.phase is Phase.STANDING and not self._wishes.force:
            self._say(f"following again, as the takeover was not granted: {why}")
            self._follow(view)
        elif self.phase is Phase.HANDING:
            self._say(f"serving again, as the handover was not granted: {why}")
            self._lead(view)

    def _propose(self, new: Record, why: str, view: View) -> None:
        self._register.propose(self.record, new, why, view.now_ns)

    # --- The data process ---------------------------------------------------------------------

    def _order_done(self, order: Order, view: View) -> None:
        if isinstance(order, do.Lead):
            self._granted_in_spite, self._forcing = False, None  # what the copy loses from here on is lost anew
        elif isinstance(order, do.Idle) and self.phase is Phase.STOPPING:
            self._to(Phase.STANDING)
        elif isinstance(order, do.Release) and self.phase is Phase.RELEASING:
            self._kept_clients = True
            self._wishes.begin_once("handover", view.now_ns)
            self._orders.unclaim()
            self._to(Phase.HANDING)

    def _order_failed(self, order: Order, error: str, view: View) -> None:
        self._say(f"its data process could not {type(order).__name__.lower()}: {error}")
        if isinstance(order, do.Release):
            self._release_again_ns = view.now_ns + self._timing.check_ns  # clients are served in between
            self._well_ns = view.now_ns
            self._wishes.drop_move()
            self._lead(view)
        elif isinstance(order, do.Lead):
            self._rest(error)

    def _notice_replica(self, view: View) -> None:
        """The data process has ended: what it was told is gone with it, and it answers nobody."""
        if view.replica is not None:
            return
        self._orders.gone()
        self._kept_clients = self._locked = False
        if self.phase in (Phase.LEADING, Phase.RELEASING):
            self._rest("its data process has ended")
        elif self.phase is Phase.STOPPING:
            self._to(Phase.STANDING)

    # --- Phases -------------------------------------------------------------------------------

    def _to(self, phase: Phase) -> None:
        self.phase = moved(self.name, self.phase, phase)

    def _step(self, view: View) -> None:
        self._notice_replica(view)
        newest = self._saving.record if self._saving else self.record
        if view.peer is not None and view.peer.record.epoch > newest.epoch:
            self._adopt(view.peer.record, f"{self._peer} has it")
        self._wishes.forget(view.now_ns)
        if self._saving is None:
            self._STEPS[self.phase](self, view)
        if self.phase in (Phase.LEADING, Phase.RELEASING):
            self._orders.lease(view.lease_until_ns)
        self._tell_moved(view)

    def _follow(self, view: View) -> None:
        """Be the secondary; of whoever owns."""
        self._to(Phase.FOLLOWING)
        self._level_ns = view.now_ns
        self._orders.unclaim()
        if view.replica is not None:
            self._orders.follow(self.record)

    def _lead(self, view: View) -> None:
        """Be the owner, if the copy is good for it."""
        if view.replica is None or (self._obstacle(view.replica) and not self._forced):
            self._rest("it cannot serve yet")
            return
        if self._serve_from_ns is None:
            self._serve_from_ns = self._after_old_lease(view)
        self._to(Phase.LEADING)
        self._session_ns = self._well_ns = view.now_ns
        self._register.put_off_check(view.now_ns)
        clears_loss = view.replica.lost_cache
        self._orders.lead(self.record, self._serve_from_ns, forced=self._forced, clears_loss=clears_loss)

    def _rest(self, why: str) -> None:
        if self.phase is not Phase.RESTING:
            self._say(f"not serving: {why}")
        self._to(Phase.RESTING)
        self._orders.stop_exposed()
        self._orders.unclaim()

    def _step_unowned(self, view: View) -> None:
        """LEARNING and RESTING: find the role."""
        if self._wishes.force and judge.may_override(view):
            self._stop_listening(view, "the operator overrides")
        elif self.record.owner != self._me:
            self._follow(view)
        elif view.replica is not None and self._orders.may_order(view.now_ns):
            self._orders.stop_exposed()
            self._consider_leading(view, view.replica)

    def _consider_leading(self, view: View, replica: Replica) -> None:
        anew = self.record.owned_alone(self._me)
        if judge.both_lost(self.record, self._me, view):
            self._granted_in_spite = True
        obstacle = self._obstacle(replica)
        if obstacle:
            self._rest(obstacle)
            self._register.check(view.now_ns)
        elif replica.lost_cache and not self.record.alone:
            self._propose(anew, "both caches are lost: the last owner's copy wins", view)
        elif not self._alone_since:
            self._register.read(view.now_ns)
        elif self._may_be_open(replica):
            self._propose(anew, "what this node proposed before may not be settled", view)
        elif self.record.alone:
            self._lead(view)
        elif view.suspected:
            self._propose(anew, judge.silence(self._peer, view), view)
        elif other := judge.difference(self._peer, view):
            self._propose(anew, other, view)
        elif view.alive and view.peer and view.peer.promise:
            self._lead(view)

    def _may_be_open(self, replica: Replica) -> bool:
        """Whether a proposal of this life, or of the one before, may be granted yet. A copy without data was never
        served, so no former life of its node has proposed anything."""
        if self._register.open is not None:
            return True
        return self.record.alone and (self._register.proposing or (self._old_record and replica.has_data))

    # --- The secondary ------------------------------------------------------------------------

    def _step_following(self, view: View) -> None:
        self._drop_clients(view)
        if view.replica is not None and self._orders.may_order(view.now_ns):
            self._follow_or_not(view)
        if self._wishes.force:
            if judge.may_override(view):
                self._stop_listening(view, "the operator overrides")
            return
        if not judge.is_behind(self.record, view):
            self._level_ns = view.now_ns
        behind_ns = view.now_ns - self._level_ns
        why = judge.reason_to_take_over(self.record, self._peer, view, self._timing, behind_ns)
        if not why:
            self._register.waits_for = ""
        self._watch_handover(view)
        if not why or view.replica is None:
            return
        if self._obstacle(view.replica):
            self._register.check(view.now_ns)  # to say who has the data
            return
        if self.waits_for and view.now_ns < self._stand_again_ns:  # do not stop listening for nothing
            self._register.read(view.now_ns)
            return
        self._stand_again_ns = view.now_ns + self._timing.check_ns
        self._wishes.begin("takeover", judge.heard_ns(view))
        self._stop_listening(view, why)

    def _follow_or_not(self, view: View) -> None:
        """Not a peer with another arbiter: it may not add this node, and its clients would wait for both in vain."""
        if judge.difference(self._peer, view):
            if not self._orders.idling:
                self._orders.idle()
        elif self._orders.missing or self._orders.idling:
            self._orders.follow(self.record)

    def _stop_listening(self, view: View, why: str) -> None:
        """Rule 4: first stop the old owner's stream, for good at this epoch."""
        self._say(f"stopping to listen to {self._peer}, to take over: {why}")
        self._to(Phase.STOPPING)
        if view.replica is not None:
            self._orders.idle()

    def _step_stopping(self, view: View) -> None:
        if self._orders.missing and view.replica is not None and self._orders.may_order(view.now_ns):
            self._orders.idle()

    def _step_standing(self, view: View) -> None:
        if self._wishes.force and judge.may_override(view):
            self._force(view)
        elif self.record.owner == self._me:  # an override that nobody answered
            self._forcing = None  # the same record may yet be granted for an ordinary reason: with all the data
            self._wishes.begun_no_more()
            self._rest("the override was not granted")
        elif judge.owner_is_back(self.record, view) and not self._register.asking:
            self._say(f"following again, as {self._peer} is back")
            self._follow(view)  # if the takeover was granted after all, the owner learns it, stops and says so
        elif not self._is_fit(view):
            self._stand_unfit(view)
        else:
            self._propose(self.record.owned_alone(self._me), "it has stopped listening to the old owner", view)

    def _is_fit(self, view: View) -> bool:
        return view.replica is not None and not self._obstacle(view.replica)

    def _stand_unfit(self, view: View) -> None:
        """The copy has failed, or its data process has ended, since it stopped listening: propose it no more."""
        if view.replica is not None and not self._register.asking:
            self._follow(view)

    def _force(self, view: View) -> None:
        new = self.record.owned_alone(self._me)
        if self._register.force(new, view.now_ns):
            self._say(f"overriding by the operator's will: {new}; acknowledged writes may be lost")
            self._forcing = new
            self._wishes.begin("override", view.now_ns)

    # --- The owner ----------------------------------------------------------------------------

    def _step_leading(self, view: View) -> None:
        replica = view.replica
        assert replica is not None  # _notice_replica
        if replica.failure and not self.record.alone:  # the peer takes over, now or when it is back
            self._rest(f"its disk failed: {replica.failure}")
            return
        if self._orders.missing and self._orders.may_order(view.now_ns):
            self._lead(view)
        if replica.session:
            self._session_ns = view.now_ns
        self._keep_addresses(view)
        if not self._orders.carried_out:
            return
        if self._serve_from_ns and self._after_old_lease(view) == 0:
            self._serve_from_ns = 0
            if view.now_ns < view.may_serve_from_ns:
                self._lead(view)
                return
        if self.record.alone:
            self._step_alone(view, replica)
        else:
            self._step_mirrored(view, replica)
        if self.phase is Phase.LEADING:
            self._register.check(view.now_ns)

    def _keep_addresses(self, view: View) -> None:
        """Rule 12."""
        entitled = self.may_hold_addresses(view)
        if entitled and self._orders.carried_out:
            self._orders.claim()
        elif not entitled and self._orders.claimed:
            self._say("giving its addresses up, as it has no lease")
            self._orders.unclaim()

    def _step_mirrored(self, view: View, replica: Replica) -> None:
        absent_ns = view.now_ns - self._session_ns
        trouble = judge.reason_to_go_alone(self.record, self._peer, view, self._timing, absent_ns)
        if trouble or self._register.open is not None:
            self._well_ns = view.now_ns
            self._wishes.begin_once(_ALONE, min(self._session_ns, judge.heard_ns(view)))
            if self._wishes.force and view.suspected:  # nothing is lost by it: this node has every acknowledged write
                self._register.force(self.record.owned_alone(self._me), view.now_ns)
            self._propose(self.record.owned_alone(self._me), trouble or "an earlier proposal was not answered", view)
            return
        if self._wishes.begun == _ALONE:
            self._wishes.begun_no_more()
        why = self._reason_to_move(view, replica)
        if why and self._register.answers(view.now_ns):  # else clients would be held for nothing
            self._say(f"handing over to {self._peer}: {why}")
            self._to(Phase.RELEASING)
            self._wishes.drop_move()
            self._wishes.begun_no_more()
            self._orders.release()

    def _step_alone(self, view: View, replica: Replica) -> None:
        """Rule 9: add the peer when it has everything; only while its promise holds (rule 5)."""
        joinable = replica.joinable and replica.epoch == self.record.epoch
        self._locked = self._locked or joinable
        if judge.may_join(self.record, view):
            self._propose(self.record.joined_by(self._peer), f"{self._peer} has everything", view)
        elif self._register.open is not None:  # it may be granted: only another record at that epoch settles it
            self._propose(self.record.owned_alone(self._me), f"{self._peer} was lost while it was being added", view)
        elif self._locked and not joinable and not self._register.asking:
            self._locked = False
            self._lead(view)

    def _reason_to_move(self, view: View, replica: Replica) -> str:
        serves = replica.serving or bool(replica.cannot_listen)
        can = judge.peer_can_own(self.record, self._peer, view) and replica.session and serves
        if not can or view.peer is None:
            self._well_ns = view.now_ns
            return ""
        if view.now_ns < self._release_again_ns:
            return ""
        if view.stopping:
            return f"{self._me} is being stopped"
        if view.draining and not view.peer_draining:
            return f"{self._me} is drained"
        if self._wishes.move or view.peer.wants:
            return "the operator asks for it"
        well_ns = view.now_ns - self._well_ns
        if self._failback and not view.peer_draining and well_ns >= self._timing.hold_down_ns:
            return f"{self._peer} is preferred, and all has been well for {well_ns / 1e9:.0f} s"
        return ""

    def _step_releasing(self, view: View) -> None:
        """Waits for ``done``. Clients are served while most is being flushed, then they are held."""
        if view.replica is not None and not view.replica.serving:
            self._wishes.begin_once("handover", view.now_ns)

    def _step_handing(self, view: View) -> None:
        if self._orders.unclaiming:
            return
        if judge.peer_can_own(self.record, self._peer, view):
            self._propose(self.record.handed_to(self._peer), f"{self._me} has stopped", view)
        elif not self._is_fit(view):
            self._register.read(view.now_ns)  # the last good copy may be the peer's
        else:
            self._propose(self.record.owned_alone(self._me), f"{self._peer} cannot own it any more", view)

    _STEPS: ClassVar[dict[Phase, Callable[["Group", View], None]]] = {
        Phase.LEARNING: _step_unowned,
        Phase.RESTING: _step_unowned,
        Phase.FOLLOWING: _step_following,
        Phase.STOPPING: _step_stopping,
        Phase.STANDING: _step_standing,
        Phase.LEADING: _step_leading,
        Phase.RELEASING: _step_releasing,
        Phase.HANDING: _step_handing,
    }

    # --- The end of a move --------------------------------------------------------------------

    def _watch_handover(self, view: View) -> None:
        """The peer may be handing over to this node: clients are held since it began."""
        if view.peer and view.peer.releasing and not view.peer.serving:
            self._wishes.begin_once("handover", view.now_ns)
        elif view.peer and view.peer.leading and not self._kept_clients:
            self._wishes.begun_no_more()

    def _drop_clients(self, view: View) -> None:
        """After a handover: clients are kept until the new owner serves, so that they connect to it at once."""
        peer = view.peer
        if self._kept_clients and peer and peer.serving and peer.record == self.record:
            self._kept_clients = False
            self._out.put(do.Drop())
            self._wishes.end(view.now_ns)

    def _tell_moved(self, view: View) -> None:
        replica = view.replica
        if self._wishes.begun == _ALONE and not self.record.alone:
            return  # reads are answered while the lease lasts
        if self.phase is Phase.LEADING and replica and replica.serving and replica.epoch == self.record.epoch:
            self._wishes.end(view.now_ns)

    def _say(self, text: str) -> None:
        self._out.say(text, self.record.epoch)
