"""One of the two machines: its power, its clock, what it keeps, and what runs on it."""

from functools import partial
from typing import TYPE_CHECKING

from stortrends_ha.cluster.view import Saved
from stortrends_ha.protocol.heartbeat import Message
from stortrends_ha.storage.state import ReplicaState

from .clock import MS, NodeClock, S
from .data_process import DataProcess
from .disk import Disk
from .history import Violation
from .metadata import Metadata
from .supervisor import Supervisor

if TYPE_CHECKING:
    from .world import World

_ADDRESS_LIFETIME_NS = 2 * S


class Host:
    """``peer`` is set right after both exist."""

    def __init__(self, world: "World", name: str, bit: int) -> None:
        self.world = world
        self.name = name
        self.bit = bit
        self.peer: Host = self
        self.on = False
        self.boots = 0
        self.rate = 1.0 + world.random.choice((-1.0, 1.0, world.random.uniform(-1, 1))) * world.drift
        self.clock = NodeClock(world.clock, self.rate)
        self.remembered: list[int] = []  # by volume: bits of blocks that its data process may know of, beside its files
        self.disks = self._new_disks("first")
        self.metadata = Metadata(world.coverage.changed)
        self.state = ReplicaState()
        self.mounts = 0  # how often the file systems of its volumes were mounted anew
        self.maps_spoiled = False  # one of its map files was
        self.zeroes_by_writing = world.random.random() < 0.1  # they have no holes
        self.saved: Saved | None = None
        self.drained = False
        self.supervisor: Supervisor | None = None
        self.process: DataProcess | None = None
        self.address_until_ns = 0
        self.disk_fails = self.metadata_fails = False
        self.cached_epoch = 0  # the newest at which its data process mirrored, so that something may be cached only
        self.peer_seen = 0  # the boot in which the peer was seen
        self.asked_to_join = 0  # the epoch for which the peer was, on its disk
        self._doom_in = 0
        self._doom = ""
        self._doom_process_in = 0

    @property
    def lost_cache(self) -> bool:
        """Whether its copy may lack what was only cached, as its data process will find, or has found."""
        state = self.state
        mounts = set(state.mounts.values()) - {f"mount {self.mounts}"}
        return state.lost_cache or state.boot_id not in ("", str(self.boots)) or bool(state.boot_id and mounts)

    def _new_disks(self, identity: str) -> list[Disk]:
        world = self.world
        self.remembered = [0 for _ in world.volumes]
        return [Disk(world.blocks, identity, partial(self._written, volume)) for volume in range(len(world.volumes))]

    def _written(self, volume: int, blocks: range) -> None:
        if self.process is not None and self.process.owner is not None:
            self.remembered[volume] |= (1 << blocks.stop) - (1 << blocks.start)
        self.world.coverage.written(volume, blocks)

    def forget(self) -> None:
        """Its data process knows from now on only of what comes, and what is in its files."""
        self.remembered = [0 for _ in self.remembered]

    def values(self) -> list[int]:
        """What the blocks of all volumes hold now."""
        return [value for disk in self.disks for value in disk.values()]

    def only_cached(self, block: int, value: int) -> bool:
        """Whether a loss of power could take this value of a block, counted over all volumes."""
        volume, block = divmod(block, self.world.blocks)
        return self.disks[volume].only_cached(block, value)

    # --- Power and processes --------------------------------------------------------------------------

    def boot(self) -> None:
        """The power is on; the supervisor starts by itself."""
        if not self.on:
            self.on = True
            self.boots += 1
            self.clock = NodeClock(self.world.clock, self.rate)
            self.world.trace.say(self.name, "boots")
            self.start()

    def start(self) -> None:
        """Start the supervisor, if none runs."""
        if self.on and self.supervisor is None:
            self.world.trace.say(self.name, "starts with", self.saved.record if self.saved else "no record")
            self.address_until_ns = 0  # left-over addresses are removed
            self.supervisor = Supervisor(self)

    def kill(self) -> None:
        """SIGKILL for the supervisor: its data process dies with it; addresses stay for a while."""
        if self.supervisor is not None:
            self.world.trace.say(self.name, "KILLED")
            self.supervisor.alive = False
            self.supervisor = None
            self.kill_process()
            self.address_until_ns = min(self.address_until_ns, self.world.clock.now_ns + _ADDRESS_LIFETIME_NS)

    def kill_process(self) -> None:
        """SIGKILL for the data process."""
        process, self.process = self.process, None
        if process is not None:
            self.world.trace.say(self.name, "data process KILLED")
            process.die()

    def make_blank(self) -> None:
        """The operator gives this copy up (rule 10): the next sync fills it."""
        self.world.trace.say(self.name, "its copy is made BLANK by the operator")
        self.kill_process()
        self.disks, self.state = self._new_disks("second"), ReplicaState()

    def power_off(self) -> None:
        """Everything stops at once; what was only cached may be gone."""
        if self.on:
            self.on = False
            self.world.trace.say(self.name, "LOSES POWER")
            self.kill()
            self.kill_process()
            self._lose_cache()
            self.metadata.lose_cache(self.world.random)
            self.address_until_ns = 0

    def remount(self) -> None:
        """The file systems of its volumes were unmounted by force, and mounted anew."""
        self.kill_process()
        self.world.trace.say(self.name, "its volumes are MOUNTED ANEW")
        self._lose_cache()
        self.mounts += 1

    def _lose_cache(self) -> None:
        for disk in self.disks:
            disk.lose_cache(self.world.random)

    def spoil_maps(self) -> None:
        """Something happens to a map file."""
        self.maps_spoiled = True
        self.world.trace.say(self.name, self.metadata.spoil(self.world.random))

    def stopped(self, supervisor: Supervisor) -> None:
        """The supervisor has ended by itself."""
        if supervisor is self.supervisor:
            self.world.trace.say(self.name, "stopped")
            supervisor.alive = False
            self.supervisor = None
            self.kill_process()
            self.unclaim()
            self.world.clock.after(self.world.random.randrange(100 * MS, 4 * S), self.start)

    # --- Dying between two effects --------------------------------------------------------------------

    def doom_in(self, effects: int, how: str, *, calls: int = 0) -> None:
        """At the so many-th effect from now on, or call of its data process to the kernel, it is killed, loses power,
        or is stopped for a while."""
        self._doom_in, self._doom_process_in, self._doom = effects, calls, how

    def doom(self) -> None:
        """An effect."""
        if self._doom_in:
            self._doom_in -= 1
            if not self._doom_in:
                self._meet_doom()

    def doom_process(self) -> None:
        """A call of the data process to the kernel."""
        if self._doom_process_in:
            self._doom_process_in -= 1
            if not self._doom_process_in:
                self._meet_doom()

    def _meet_doom(self) -> None:
        self.world.count[f"between effects: {self._doom}"] += 1
        match self._doom:
            case "kill":
                self.kill()
                self.world.clock.after(self.world.random.randrange(100 * MS, 4 * S), self.start)
            case "power":
                self.power_off()
                self.world.clock.after(self.world.random.randrange(S, 6 * S), self.boot)
            case "power of both":
                for host in (self, self.peer):
                    host.power_off()
                    self.world.clock.after(self.world.random.randrange(S, 6 * S), host.boot)
            case "kill process":
                self.kill_process()
            case "pause":
                self.pause(self.supervisor, self.world.random.randrange(50 * MS, 5 * S))

    def pause(self, actor: Supervisor | DataProcess | None, for_ns: int) -> None:
        """SIGSTOP, and SIGCONT later."""
        if actor is not None:
            what = "supervisor" if isinstance(actor, Supervisor) else "data process"
            self.world.trace.say(self.name, f"{what} STOPPED for {for_ns / 1e9:.3f} s")
            actor.pause()
            self.world.clock.after(for_ns, self._go_on, actor, what)

    def _go_on(self, actor: Supervisor | DataProcess, what: str) -> None:
        if actor.alive:
            self.world.trace.say(self.name, f"{what} goes on")
        actor.go_on()

    # --- The network ----------------------------------------------------------------------------------

    def beat_arrived(self, beat: Message, path: int) -> None:
        """A datagram; nobody may be there."""
        if self.supervisor is not None:
            self.supervisor.datagram(self.supervisor.heard, beat, path)

    # --- Floating addresses (rule 12) -----------------------------------------------------------------

    @property
    def has_address(self) -> bool:
        """Whether the kernel has it now."""
        return self.world.clock.now_ns < self.address_until_ns

    def claim(self) -> None:
        """It is brought up."""
        self.world.trace.say(self.name, "has the address")
        self.refresh_address()

    def refresh_address(self) -> None:
        """It gets a new lifetime, and comes back if the old one was over."""
        self.address_until_ns = self.world.clock.now_ns + _ADDRESS_LIFETIME_NS
        if self.supervisor is not None and self.supervisor.group.record.owner != self.name:
            raise Violation(f"{self.name} claims the address of a group that it does not own (rule 12)")

    def unclaim(self) -> None:
        """It is taken down."""
        if self.has_address:
            self.world.trace.say(self.name, "has the address no more")
        self.address_until_ns = 0
