"""The arbiters without a third machine: production code (``arbiter.fencing``, ``node.consent``) on the fake clock.

The fence agent is a model: it may fail, it may fail though the peer is off, and it goes on when its supervisor dies.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from stortrends_ha.arbiter.fence_agent import FenceError
from stortrends_ha.arbiter.fencing import FencingArbiter, ManualArbiter
from stortrends_ha.cluster.answers import Answer as Outcome
from stortrends_ha.cluster.answers import Granted, Refused, Unreachable
from stortrends_ha.config import FenceAgent
from stortrends_ha.node.consent import Consent
from stortrends_ha.node.peer_access import PeerAccess
from stortrends_ha.protocol.heartbeat import Answer, Ask
from stortrends_ha.protocol.witness import Force, Propose, Read, Seed
from stortrends_ha.record import Record

from .arbiter import GROUP
from .clock import MS, S
from .node_loop import NodeLoop

if TYPE_CHECKING:
    from .host import Host
    from .supervisor import Supervisor

_AGENT = FenceAgent("fence_simulated", {})


class _Access(PeerAccess):
    """The production one, with a host of ours under it."""

    def __init__(self, two: "TwoNodes") -> None:
        supervisor = two.supervisor
        self._membership = supervisor.membership
        self._own_record = two._own_record
        self._host = supervisor.host
        self.heartbeats: Any = two  # it asks for the peer's consent

    def note_beat(self) -> None:
        if self._host.peer_seen != self._host.boots:
            self._host.peer_seen = self._host.boots

    def seen(self) -> bool:
        return self._host.peer_seen == self._host.boots

    def alive(self) -> bool:
        return self._membership.alive(self._host.clock.now_ns())

    async def will_ask_to_join(self, _group: str, epoch: int) -> bool:
        self._host.asked_to_join = max(epoch, self._host.asked_to_join)
        return True

    def asked_to_join(self, _group: str) -> int:
        return self._host.asked_to_join


class _Fencing(FencingArbiter):
    """The agent is the world's."""

    host: "Host"
    loop: Any

    async def _fence(self) -> None:
        world, peer = self.host.world, self.host.peer
        outcome = self.loop.create_future()

        def report(said: bool) -> None:
            if not outcome.done():
                outcome.set_result(said and not peer.on)

        def turn_off() -> None:
            world.count["fenced"] += 1
            world.trace.say(peer.name, "is FENCED")
            peer.power_off()
            world.clock.after(world.random.randrange(2 * S, 8 * S), peer.boot)

        how = world.random.choice(("done", "done", "done", "done, and said to have failed", "failed"))
        world.trace.say(self.host.name, "fences its peer:", how)
        delay_ns = world.random.randrange(50 * MS, 2 * S)
        if how != "failed":
            world.clock.after(delay_ns, turn_off)
        later_ns = delay_ns + world.random.randrange(MS, S)
        assert self.host.supervisor is not None
        self.host.supervisor.after(later_ns, report, how == "done")
        if not await outcome:
            raise FenceError("the agent has failed")
        self._off_ns = self._now_ns()


class TwoNodes:
    """The arbiter of one node."""

    def __init__(self, supervisor: "Supervisor", kind: str) -> None:
        self.supervisor = supervisor
        self._loop = NodeLoop(supervisor.host.world.clock, supervisor.host.clock, supervisor)  # type: ignore[abstract]
        self._access = _Access(self)
        self._consent = Consent(supervisor.membership, supervisor.send_message, self._on_ask)
        access, own = self._access, self._own_record
        self._arbiter: FencingArbiter | ManualArbiter
        if kind == "fencing":
            fencing = self._arbiter = _Fencing(
                access, own, self._adopt, _AGENT, 60.0, now_ns=supervisor.host.clock.now_ns
            )
            fencing.host, fencing.loop = supervisor.host, self._loop
        else:
            self._arbiter = ManualArbiter(access, own, self._adopt)
        self._saved: Any = None
        supervisor.host.world.loops.append(self._loop)

    def _own_record(self, _group: str) -> Record:
        return self.supervisor.group.record

    # --- What the shell does with it ------------------------------------------------------------------

    def note_beat(self) -> None:
        """A beat that counts has come."""
        self._access.note_beat()

    @property
    def fencing(self) -> bool:
        """Whether the peer is being turned off, or is off."""
        return isinstance(self._arbiter, FencingArbiter) and self._arbiter.fencing

    def request(self, request: Read | Propose | Seed | Force, answered: Callable[[Outcome], None]) -> None:
        """Ask, as a task."""
        if isinstance(request, Force):
            self.supervisor.host.world.arbiter.forced.add(request.record.epoch)

        async def ask() -> None:
            answered(await self._asked(request))

        self._loop.create_task(ask())

    def _asked(self, request: Read | Propose | Seed | Force) -> Awaitable[Outcome]:
        match request:
            case Read():
                return self._arbiter.read(GROUP)
            case Propose(_, old, new):
                return self._arbiter.propose(GROUP, old, new)
            case Seed(_, record):
                return self._arbiter.seed(GROUP, record)
            case Force(_, record, note):
                return self._arbiter.force(GROUP, record, note)

    def message(self, message: Ask | Answer) -> None:
        """A datagram that is no beat. As in a callback of the loop."""
        self._loop.call_soon(self._consent.received, message)

    def saved(self) -> None:
        """A record has been saved, and told to the machine."""
        waiting, self._saved = self._saved, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    # --- Consent --------------------------------------------------------------------------------------

    async def ask(self, group: str, old: Record, new: Record, timeout_s: float) -> Granted | Refused | Unreachable:
        """As ``Heartbeats.ask``."""
        return await self._consent.ask(group, old, new, timeout_s)

    async def _on_ask(self, group: str, old: Record, new: Record) -> Granted | Refused | Unreachable:
        return await self._arbiter.consider(group, old, new)

    async def _adopt(self, _group: str, record: Record) -> bool:
        """As ``GroupRunner.adopt``."""
        core = self.supervisor.group
        taken, effects = core.offered(record)
        self.supervisor.work(effects)
        while taken and core.record.epoch < record.epoch:
            if self._saved is None:
                self._saved = self._loop.create_future()
            await self._saved
        return core.record == record
