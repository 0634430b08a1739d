"""One group on this node: carries out what its state machine (``cluster.group``) wants, and tells it what comes of it.

Job: build the machine's view, run its effects, in their order; keep what status and metrics show of ownership.
Invariants: nothing is decided here. Effects that need an answer are tasks, so that no beat ever waits for a disk, the
arbiter or the kernel (rule 14). The machine is stepped at every beat, report and answer, and every STEP_S.
A death between two effects is the machine's business: it is written so that none of them matters.
Bounds: one task for each thing that the machine awaits: a record being saved, a request to the arbiter, a change of
the addresses; and one that keeps the clients.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from stortrends_ha.arbiter.interface import Arbiter
from stortrends_ha.boottime import now_ns
from stortrends_ha.cluster import effects as do
from stortrends_ha.cluster.explain import explain
from stortrends_ha.cluster.group import Group
from stortrends_ha.cluster.lease import Timing as Leases
from stortrends_ha.cluster.lease import may_serve_from_ns
from stortrends_ha.cluster.membership import Membership
from stortrends_ha.cluster.phases import Phase
from stortrends_ha.cluster.view import Peer, Replica, Saved, Timing, View
from stortrends_ha.config import Cluster
from stortrends_ha.errors import OrderError, StorageError
from stortrends_ha.network.network import Network
from stortrends_ha.node.agreement import Agreement
from stortrends_ha.node.children import Child
from stortrends_ha.node.errands import Errands
from stortrends_ha.node.messages import Status
from stortrends_ha.node.records import Records
from stortrends_ha.node.second_chance import SecondChance
from stortrends_ha.protocol.heartbeat import GroupBeat
from stortrends_ha.record import Record

log = logging.getLogger(__name__)

STEP_S = 0.05
# Data processes report once a second. The ticks: a supervisor that was stopped itself first reads what has come.
STUCK_S = 5.0
STUCK_STEPS = 20
SAVE_AGAIN_S = 1.0
# A disk that failed on the secondary is tried again after so many of its time-outs: a minute, by default.
FAILED_TIMEOUTS = 3.0
KEEP_CLIENTS_S = 0.1
# A wish to move a group, or an override, that nothing came of is forgotten after this.
WISH_S = 30.0
_S_NS = 1_000_000_000
_MS_NS = 1_000_000


@dataclass(slots=True)
class Wishes:
    """What is wanted of the node as a whole."""

    draining: bool = False
    stopping: bool = False


@dataclass(frozen=True, slots=True)
class LastMove:
    """The newest change of who serves that this node has seen to its end."""

    kind: str
    duration_ms: float
    ended_ns: int


class GroupRunner:
    """The shell around one ``Group``."""

    def __init__(
        self,
        cluster: Cluster,
        me: str,
        name: str,
        saved: Saved,
        *,
        membership: Membership,
        agreement: Agreement,
        records: Records,
        wishes: Wishes,
        network: Network,
        changed: Callable[[], None],
    ) -> None:
        group = cluster.groups[name]
        peer = cluster.peer_of(me).name
        failback = group.failback == "automatic" and group.preferred_owner == peer
        self.name = name
        self.core = Group(name, me, peer, saved, _timing(cluster), failback=failback)
        self.child: Child | None = None  # set by the supervisor, before anything runs
        self.arbiter: Arbiter | None = None  # likewise
        self.last_move: LastMove | None = None
        self.moves: Counter[str] = Counter()
        self.problem = ""  # what keeps a record from being saved
        self.errands = Errands()
        self._me = me
        self._chance = SecondChance(FAILED_TIMEOUTS * cluster.limits.disk_timeout_s)
        self._membership = membership
        self._agreement = agreement
        self._records = records
        self._wishes = wishes
        self._network = network
        self._changed = changed
        self._peer = peer
        self._status: Status | None = None
        self._told: tuple[Any, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()
        # Whom to tell to reconnect when this node claims the addresses. A host that lost power knows its own, too: they
        # wait for its answers still.
        self._endpoints = records.clients(name)
        self._clients = self._kept_clients = self._endpoints  # the present owner's; as they were kept last
        self._keeping: asyncio.Task[None] | None = None
        self._addresses = asyncio.Lock()  # changes of the addresses are carried out one after the other
        self._stuck = 0  # ticks in a row at which its data process had been silent for too long
        self._saving = asyncio.Lock()  # and so are records saved
        self._saved = asyncio.Event()

    # --- What the machine sees ----------------------------------------------------------------

    def view(self) -> View:
        """The surroundings now."""
        now, member = now_ns(), self._membership
        beat = member.peer
        return View(
            now_ns=now,
            alive=member.alive(now),
            suspected=member.suspected(now),
            silent_ns=member.silence_ns(now),
            peer=_peer(beat.group(self.name) if beat else None),
            lease_until_ns=member.lease_until_ns(self.name),
            may_serve_from_ns=may_serve_from_ns(member.last_promise_heard_ns(self.name), member.timing),
            draining=self._wishes.draining,
            peer_draining=bool(beat and beat.drained),
            stopping=self._wishes.stopping,
            peer_stopping=bool(beat and beat.stopping),
            replica=_replica(self._status),
            differs=self._agreement.differs,
        )

    def beat(self) -> GroupBeat:
        """What this node says of the group."""
        core, status, replica = self.core, self._status, _replica(self._status)
        return GroupBeat(
            name=self.name,
            record=core.record,
            phase=core.phase.value,
            promise=core.promise(self.view()),
            fit=self.unfit,
            lost=replica is not None and replica.lost_cache,
            leading=core.leading,
            serving=status is not None and status["serving"] and status["epoch"] == core.record.epoch,
            want="move" if core.wants else "",
        )

    @property
    def unfit(self) -> str:
        """Why the group should not be given to this node, a clause; empty if it can be. That clients could not connect
        speaks against a handover only: when its owner is lost, the secondary takes over, and listens when it can."""
        replica = _replica(self._status)
        if why := self.core.unfit(replica):
            return why
        follows = self.core.phase is Phase.FOLLOWING
        return f"it {replica.cannot_listen}" if follows and replica is not None and replica.cannot_listen else ""

    def explain(self) -> tuple[str, str]:
        """(state, why): what the decisions add to what the data process says of itself; empty if nothing."""
        if self.problem:
            return "held", f"{self.problem}; trying again"
        return explain(self.core, self._peer, self.view())

    # --- What happens -------------------------------------------------------------------------

    def step(self) -> None:
        """Time has passed, or a beat has come."""
        self._run(self.core.step(self.view()))

    def tick(self) -> None:
        """``STEP_S`` has passed."""
        self._end_stuck()
        self._try_failed_disk()
        self.step()

    def _end_stuck(self) -> None:
        """Row 14: a data process that reports no more serves nobody, but keeps the group. Its peer can have it."""
        if self.child is None or self.child.silent_s < STUCK_S:
            self._stuck = 0
            return
        self._stuck += 1
        if self._stuck == STUCK_STEPS:
            self.child.kill(f"its data process was killed, as it had not reported for {self.child.silent_s:.0f} s")

    def _try_failed_disk(self) -> None:
        """Rule 13: what a failed replica had cached counts as lost; a new data process reckons with that."""
        core, replica = self.core, _replica(self._status)
        out = self._me not in core.record.in_sync and core.phase is Phase.FOLLOWING
        failed = out and replica is not None and bool(replica.failure)
        if self._chance.due(now_ns() / _S_NS, failed=failed, well=not out) and self.child is not None:
            self.child.kill("its disk failed, and is tried again")

    @property
    def status(self) -> Status | None:
        """What the data process said last; None if none runs."""
        return self._status

    def reported(self, status: Status) -> None:
        """The data process has said how it is."""
        self._status = status
        self._note_clients(status)
        self.step()

    def done(self, number: int, error: str) -> None:
        """The data process has carried out a command."""
        if self.errands.done(number, error):
            return
        self._run(self.core.done(number, error, self.view()))

    def ended(self) -> None:
        """The data process has ended."""
        self._status = None
        self.errands.ended()
        self.step()

    def move(self, to: str) -> None:
        """The operator wants the group at ``to``."""
        self._run(self.core.move(self.view(), to))

    def force(self) -> None:
        """Rule 11's override, to this node."""
        self._run(self.core.force(self.view()))

    async def ask(self, kind: str, **request: Any) -> str:
        """What the operator asks of the data process, besides orders: the sentence that refuses it, or nothing."""
        assert self.child is not None
        if self._status is None:
            return f"Group {self.name} has no data process that runs: `stortrends-ha status` says why."
        try:
            await self.errands.run(self.child, kind, **request)
        except OrderError as error:
            return str(error)
        return ""

    async def adopt(self, record: Record) -> bool:
        """The peer proposes a record, where records live on the two nodes: whether it is saved here."""
        taken, effects = self.core.offered(record)
        self._run(effects)
        while taken and self.core.record.epoch < record.epoch:
            self._saved.clear()
            await self._saved.wait()
        return self.core.record == record

    async def stop(self) -> None:
        """End what is under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- Clients ------------------------------------------------------------------------------

    def _note_clients(self, status: Status) -> None:
        if status["role"] == "secondary" and status["session"]:
            self._endpoints = self._clients = status["endpoints"]
        elif status["role"] == "primary" and status["serving"]:
            self._clients = status["endpoints"]
        if self._clients != self._kept_clients and (self._keeping is None or self._keeping.done()):
            self._keeping = self._start(self._keep_clients())

    async def _keep_clients(self) -> None:
        """After a moment, as they come in crowds. If it cannot be done, that is tried again when they have changed."""
        await asyncio.sleep(KEEP_CLIENTS_S)
        self._kept_clients = self._clients
        try:
            await self._records.keep_clients(self.name, self._kept_clients)
        except StorageError as error:
            log.warning("Group %s: %s.", self.name, error)

    # --- Effects ------------------------------------------------------------------------------

    def _run(self, effects: list[do.Effect]) -> None:
        for effect in effects:
            self._carry_out(effect)
        core = self.core
        told = (core.record, core.phase, core.leading, core.wants, self.serving, self.unfit, core.promise(self.view()))
        if told != self._told:
            self._told = told
            self._changed()

    @property
    def serving(self) -> bool:
        """Whether clients of this node are being answered."""
        return self._status is not None and self._status["serving"]

    def _carry_out(self, effect: do.Effect) -> None:
        match effect:
            case do.Decision(text):
                log.info("Group %s: %s.", self.name, text)
            case do.Moved(kind, duration_ns):
                self._note_move(kind, duration_ns)
            case do.Save(saved):
                self._start(self._save(saved))
            case do.Read() | do.Propose() | do.Seed() | do.Force():
                self._start(self._ask(effect))
            case do.Claim():
                self._start(self._claim())
            case do.Unclaim(number):
                self._start(self._unclaim(number))
            case _:
                assert self.child is not None
                self.child.send(_command(effect))

    def _note_move(self, kind: str, duration_ns: int) -> None:
        self.last_move = LastMove(kind, duration_ns / _MS_NS, now_ns())
        self.moves[kind] += 1
        record, held_ms = self.core.record, duration_ns / _MS_NS
        what = f"going on alone on {record.owner}" if kind == "alone" else f"{kind} to {record.owner}"
        level = logging.INFO if kind == "handover" else logging.WARNING
        log.log(level, "Group %s: %s has ended after %.0f ms (epoch %d).", self.name, what, held_ms, record.epoch)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error  # a bug: the event loop's handler ends the node, and the peer takes over

    async def _save(self, saved: Saved) -> None:
        async with self._saving:
            while not await self._could_save(saved):
                await asyncio.sleep(SAVE_AGAIN_S)
        self._run(self.core.saved(saved, self.view()))
        self._saved.set()

    async def _could_save(self, saved: Saved) -> bool:
        try:
            await self._records.save(self.name, saved)
        except StorageError as error:
            if self.problem != str(error):
                log.error("Group %s: %s; trying again.", self.name, error)
            self.problem = str(error)
            return False
        self.problem = ""
        return True

    async def _ask(self, effect: do.Read | do.Propose | do.Seed | do.Force) -> None:
        assert self.arbiter is not None
        match effect:
            case do.Read():
                answer: Any = await self.arbiter.read(self.name)
            case do.Propose(_, old, new):
                answer = await self.arbiter.propose(self.name, old, new)
            case do.Seed(_, record):
                answer = await self.arbiter.seed(self.name, record)
            case do.Force(_, record):
                answer = await self.arbiter.force(self.name, record, "the operator's override")
        self._run(self.core.arbiter_said(effect.number, answer, self.view()))

    async def _claim(self) -> None:
        async with self._addresses:
            await self._network.claim(self.name, self._endpoints)

    async def _unclaim(self, number: int) -> None:
        async with self._addresses:
            await self._network.release(self.name)
        self._run(self.core.done(number, "", self.view()))


def _command(effect: do.Effect) -> dict[str, Any]:
    """The message to the data process."""
    match effect:
        case do.Follow(number, record):
            return {"type": "follow", "id": number, "record": record.encode()}
        case do.Lead(number, record, not_before_ns, forced, clears_loss):
            return {
                "type": "lead",
                "id": number,
                "record": record.encode(),
                "not_before_ns": not_before_ns,
                "forced": forced,
                "clears_loss": clears_loss,
            }
        case do.Idle(number):
            return {"type": "idle", "id": number}
        case do.Release(number):
            return {"type": "release", "id": number}
        case do.Lease(until_ns):
            return {"type": "lease", "until_ns": until_ns}
        case do.Drop():
            return {"type": "drop"}
        case _:
            raise TypeError(effect)


def _peer(beat: GroupBeat | None) -> Peer | None:
    if beat is None:
        return None
    return Peer(
        record=beat.record,
        leading=beat.leading,
        serving=beat.serving,
        promise=beat.promise,
        unfit=beat.fit,
        lost=beat.lost,
        wants=beat.want == "move",
        releasing=beat.phase in (Phase.RELEASING, Phase.HANDING),
    )


def _replica(status: Status | None) -> Replica | None:
    if status is None:
        return None
    fit = status["fit"]
    return Replica(
        epoch=status["epoch"],
        leading=status["role"] == "primary",
        session=status["session"],
        serving=status["serving"],
        joinable=status["joinable"],
        peer_unfit=status["peer_unfit"],
        failure=fit["failure"],
        lost_cache=fit["lost_cache"],
        needs_sync=fit["needs_sync"],
        settled_epoch=fit["settled_epoch"],
        has_data=bool(fit["lineage"]),
        cannot_listen=status["cannot_listen"],
    )


def leases(cluster: Cluster) -> Leases:
    """The timing of heartbeats and leases, as configured."""
    of = cluster.failover
    return Leases(of.heartbeat_interval_s, of.suspect_after_s, of.lease_s)


def _timing(cluster: Cluster) -> Timing:
    of = cluster.failover
    return Timing(
        suspect_after_ns=round(of.suspect_after_s * _S_NS),
        takeover_delay_ns=round(2 * of.heartbeat_interval_s * _S_NS),
        retry_ns=_S_NS // 4,
        check_ns=5 * _S_NS,
        hold_down_ns=round(of.hold_down_s * _S_NS),
        move_timeout_ns=round(WISH_S * _S_NS),
    )
