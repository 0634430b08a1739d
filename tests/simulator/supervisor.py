"""The supervisor of one node: the production ``Membership`` and ``Group``, in a shell that does what ``node`` does.

Effects are carried out in their order. What is awaited takes a while and is answered; the node may die, or be stopped,
before any effect, between the durable write of a record and its answer, and anywhere else.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stortrends_ha.cluster import effects as do
from stortrends_ha.cluster.answers import Answer
from stortrends_ha.cluster.group import Group
from stortrends_ha.cluster.lease import may_serve_from_ns
from stortrends_ha.cluster.membership import Membership
from stortrends_ha.cluster.view import Peer, Replica, Saved, View
from stortrends_ha.protocol import heartbeat
from stortrends_ha.protocol.heartbeat import Answer as Consented
from stortrends_ha.protocol.heartbeat import Ask, GroupBeat, Heartbeat, Message
from stortrends_ha.protocol.witness import Force, Propose, Read, Seed

from .actor import Actor, Pipe
from .arbiter import GROUP
from .clock import MS, S
from .data_process import DataProcess
from .two_nodes import TwoNodes

if TYPE_CHECKING:
    from .host import Host

KEY = bytes(range(32))
_CODED = 50  # every so many beats one really passes through bytes
_STOP_PATIENCE_NS = 10 * S


@dataclass(slots=True)
class _Saving:
    """Records are written one after the other."""

    free_ns: int = 0


class Supervisor(Actor):
    """One life of it."""

    def __init__(self, host: "Host") -> None:
        super().__init__(host.world.clock)
        world = self._world = host.world
        self.host = host
        self.name = host.name
        self._random = world.random
        self._draining = host.drained
        self.stopping = False
        self._stop_by_ns = 0
        incarnation = self._random.randrange(1, 1 << 64)
        self.membership: Membership = Membership(
            "c", host.name, host.peer.name, incarnation, world.lease_timing, self._now_ns(), world.paths
        )
        saved = host.saved or Saved(world.first_record, 0)
        failback = world.failback and host.name != world.first_record.owner
        self.group: Group = Group(GROUP, host.name, host.peer.name, saved, world.timing, failback=failback)
        self.replica: Replica | None = None
        self.process: DataProcess | None = None
        self._pipe: Pipe | None = None
        self._saves = _Saving()
        self._addresses_free_ns = 0
        self._claimed = False
        self._said: tuple[object, ...] = ()
        self._kicked = False
        self._beats = 0
        self._ticks = 0
        self.two_nodes = None if world.kind == "witness" else TwoNodes(self, world.kind)
        self._start_process()
        self.after(self._random.randrange(world.tick_ns), self._tick)

    def _now_ns(self) -> int:
        return self.host.clock.now_ns()

    # --- Time and beats -------------------------------------------------------------------------------

    def _tick(self) -> None:
        if not self.alive:
            return
        self._ticks += 1
        view = self.view()
        if self._ticks % self._world.ticks_per_beat == 0:
            self._send_beat(view)
        if self.stopping:
            self._consider_end()
        self.work(self.group.step(view))
        if self._claimed and self.group.may_hold_addresses(view):
            self.host.refresh_address()
        self.after(self._world.tick_ns, self._tick)

    def view(self) -> View:
        """What its state machine looks at."""
        of, now_ns = self.membership, self._now_ns()
        beat = of.peer
        said = beat.group(GROUP) if beat else None
        return View(
            now_ns=now_ns,
            alive=of.alive(now_ns),
            suspected=of.suspected(now_ns),
            silent_ns=of.silence_ns(now_ns),
            peer=_peer(said),
            lease_until_ns=of.lease_until_ns(GROUP),
            may_serve_from_ns=may_serve_from_ns(of.last_promise_heard_ns(GROUP), self._world.lease_timing),
            draining=self._draining,
            peer_draining=beat is not None and beat.drained,
            stopping=self.stopping,
            peer_stopping=beat is not None and beat.stopping,
            replica=self.replica,
        )

    def _beat(self) -> None:
        if self.alive:
            self._send_beat(self.view())

    def _send_beat(self, view: View) -> None:
        self._kicked = False
        group, replica = self.group, self.replica
        self.membership.meets_nobody = self.two_nodes is not None and self.two_nodes.fencing
        said = GroupBeat(
            GROUP,
            group.record,
            str(group.phase),
            group.promise(view),
            group.unfit(replica),
            replica is not None and replica.lost_cache,
            group.leading,
            replica is not None and replica.serving and replica.epoch == group.record.epoch,
            "move" if group.wants else "",
        )
        if said.promise:
            self._world.checks.promises(self.host, group)
        beat = self.membership.compose(self._now_ns(), [said], drained=self._draining, stopping=self.stopping)
        self._beats += 1
        if self._beats % _CODED == 0:
            assert heartbeat.decode(KEY, heartbeat.encode(KEY, beat)) == beat
        other = self.host.peer
        for path in range(self._world.paths):
            self._world.network.datagram(self.name, other.name, f"beat{path}", other.beat_arrived, beat, path)

    def send_message(self, message: Ask | Consented) -> None:
        """Another datagram than a beat."""
        other = self.host.peer
        for path in range(self._world.paths):
            self._world.network.datagram(self.name, other.name, f"beat{path}", other.beat_arrived, message, path)

    def heard(self, beat: Message, path: int) -> None:
        """A datagram from the peer."""
        if not self.alive:
            return
        if not isinstance(beat, Heartbeat):
            if self.two_nodes is not None:
                self.two_nodes.message(beat)
            return
        if self.membership.heard(beat, path, self._now_ns()):
            if self.two_nodes is not None:
                self.two_nodes.note_beat()
            self.work(self.group.step(self.view()))
        if self.membership.owes_beat:
            self._kick()

    def _kick(self) -> None:
        if self.alive and not self._kicked:
            self._kicked = True
            self.after(self._random.randrange(5 * MS), self._beat)

    # --- Effects --------------------------------------------------------------------------------------

    def work(self, effects: list[do.Effect]) -> None:
        for at, effect in enumerate(effects):
            self.host.doom()
            if not self.alive:
                return
            if self.paused:  # stopped between two effects: the rest is done first when it goes on
                self.first(self.work, effects[at:])
                return
            self._do(effect)
        group, replica = self.group, self.replica
        said = (group.record, group.phase, group.leading, replica is not None and replica.serving)
        if said != self._said:
            if said[:2] != self._said[:2]:
                self._world.chaos.provoked(self.host)
            self._said = said
            self._kick()

    def _do(self, effect: do.Effect) -> None:
        world = self._world
        match effect:
            case do.Decision(text):
                world.trace.say(self.name, f"[{self.group.phase}] {text}")
            case do.Moved():
                world.trace.say(self.name, "", effect)
                world.count[f"moved: {effect.kind}"] += 1
            case do.Save(saved):
                self._save(saved)
            case do.Read(number):
                self._ask(number, Read(GROUP))
            case do.Propose(number, old, new):
                self._ask(number, Propose(GROUP, old, new))
            case do.Seed(number, record):
                self._ask(number, Seed(GROUP, record))
            case do.Force(number, record):
                self._ask(number, Force(GROUP, record, "the simulator"))
            case do.Claim() | do.Unclaim():
                self._move_addresses(effect)
            case _:
                self._command(effect)

    def _save(self, saved: Saved) -> None:
        world, saves = self._world, self._saves
        durable_ns = max(saves.free_ns, world.clock.now_ns) + self._random.randrange(MS // 10, world.save_ns)
        saves.free_ns = durable_ns + self._random.randrange(MS)
        world.clock.at(durable_ns, self.event, self._durable, saved)
        world.clock.at(saves.free_ns, self.event, self._saved, saved)

    def _durable(self, saved: Saved) -> None:
        self.host.doom()
        if not self.alive:
            return
        self.host.saved = saved
        self._world.trace.say(self.name, "durable:", saved.record)
        self._world.checks.record(saved.record)
        self._world.chaos.provoked(self.host)
        self.host.doom()

    def _saved(self, saved: Saved) -> None:
        if self.alive:
            self.work(self.group.saved(saved, self.view()))
            if self.two_nodes is not None:
                self.two_nodes.saved()

    def _ask(self, number: int, request: Read | Propose | Seed | Force) -> None:
        def answered(answer: Answer) -> None:
            self.event(self._answered, number, answer)

        if self.two_nodes is not None:
            self.two_nodes.request(request, answered)
        else:
            self._world.arbiter.ask(self.name, request, answered)
        self.host.doom()

    def _answered(self, number: int, answer: Answer) -> None:
        if self.alive:
            self._world.trace.say(self.name, "arbiter:", answer)
            self.work(self.group.arbiter_said(number, answer, self.view()))

    def _move_addresses(self, effect: do.Claim | do.Unclaim) -> None:
        clock = self._world.clock
        self._addresses_free_ns = max(self._addresses_free_ns, clock.now_ns) + self._random.randrange(3 * MS)
        clock.at(self._addresses_free_ns, self.event, self._addresses_moved, effect)

    def _addresses_moved(self, effect: do.Claim | do.Unclaim) -> None:
        self._claimed = isinstance(effect, do.Claim)
        if isinstance(effect, do.Claim):
            self.host.claim()
            return
        self.host.unclaim()
        self.work(self.group.done(effect.number, "", self.view()))

    # --- The data process -----------------------------------------------------------------------------

    def _start_process(self) -> None:
        if not self.alive:
            return
        pipe = Pipe(self._clock, self)
        process = DataProcess(self.host, pipe, self)
        self.process = self.host.process = process
        self._pipe = Pipe(self._clock, process)

    def _command(self, command: do.Effect) -> None:
        if not isinstance(command, do.Lease):
            self._world.trace.say(self.name, "->", command)
        if isinstance(command, do.Lead | do.Follow):
            self._world.checks.acts(self.host, command.record)
        if self.process is not None and self._pipe is not None:
            self._pipe.send(self._random.randrange(MS), self.process.command, command)

    def process_status(self, process: DataProcess, status: Replica) -> None:
        """The data process has said how it is."""
        if self.alive and process is self.process:
            self.replica = status
            self.work(self.group.step(self.view()))

    def process_done(self, process: DataProcess, number: int, error: str) -> None:
        """The data process has carried out a command."""
        if self.alive and process is self.process:
            self.work(self.group.done(number, error, self.view()))

    def process_ended(self, process: DataProcess) -> None:
        """The data process is no more; it is started again."""
        if not self.alive or process is not self.process:
            return
        self._world.trace.say(self.name, "its data process has ended")
        self.process = self._pipe = self.replica = None
        if self.stopping and not self._stop_by_ns:  # it has been told to stop; it may have been killed before it did
            self._end()
            return
        self.after(self._random.randrange(20 * MS, 700 * MS), self._start_process)
        self.work(self.group.step(self.view()))

    # --- The operator ---------------------------------------------------------------------------------

    def move(self, to: str) -> None:
        """`stortrends-ha move`."""
        if self.alive:
            self.work(self.group.move(self.view(), to))

    def drain(self, on: bool) -> None:
        """`stortrends-ha drain`, `undrain`."""
        if self.alive:
            self._draining = self.host.drained = on
            self.work(self.group.step(self.view()))

    def force(self) -> None:
        """`stortrends-ha force`."""
        if self.alive:
            self.work(self.group.force(self.view()))

    def stop(self) -> None:
        """SIGTERM: hand over what is owned, if the peer can take it; then end."""
        if self.alive and not self.stopping:
            self.stopping = True
            self._stop_by_ns = self._clock.now_ns + _STOP_PATIENCE_NS
            self.work(self.group.step(self.view()))

    def _consider_end(self) -> None:
        leaving = self.group.leaving(self.view())
        if self._stop_by_ns and (not leaving or self._clock.now_ns >= self._stop_by_ns):
            self._stop_by_ns = 0
            if self.process is None:
                self._end()
            else:
                self.process.event(self.process.stop, self._end)

    def _end(self) -> None:
        self.event(self.host.stopped, self)


def _peer(said: GroupBeat | None) -> Peer | None:
    if said is None:
        return None
    return Peer(said.record, said.leading, said.serving, said.promise, said.fit, said.lost, said.want == "move")
