"""The world of one seed: everything that there is, and the end of the run."""

from collections import Counter
from random import Random

from stortrends_ha.cluster.lease import Timing as LeaseTiming
from stortrends_ha.cluster.view import Timing
from stortrends_ha.config.model import Address, Cluster, Group, Limits, Node, Volume
from stortrends_ha.record import Record

from .arbiter import GROUP, Arbiter
from .chaos import Chaos
from .checks import Checks
from .clients import Client
from .clock import MS, Clock, S
from .coverage import Coverage
from .disk import BLOCK_BYTES
from .history import History, Violation
from .host import Host
from .network import Network
from .node_loop import NodeLoop
from .production import STATE_DIR
from .trace import EVENTS, Trace

NAMES = ("node-a", "node-b")
_LINK_PORT, _METRICS_PORT = 7789, 9754
_WELL_WITHIN_NS = 40 * S
_QUIET_NS = 8 * S
_POWER_SHARE = 0.2  # of runs at whose end both lose power


class World:
    """Two hosts, an arbiter, clients."""

    nbd_port = 10809

    def __init__(self, seed: int, steps: int, *, keep: int = EVENTS) -> None:
        random = self.random = Random(seed)
        self.seed = seed
        self._numbers = 2
        self.clock = Clock()
        self.trace = Trace(self.clock, keep=keep)
        self.count: Counter[str] = Counter()
        self.kind = random.choice(("witness", "witness", "witness", "fencing", "manual"))
        self._choose_sizes()
        self.coverage = Coverage(self)
        self.cluster = self._cluster()
        self.network = Network(self.clock, random)
        self.arbiter = Arbiter(self.clock, random, self.network, self.trace)
        self.history = History(self.blocks * len(self.volumes))
        self.checks = Checks(self)
        self.arbiter.granted = self._granted
        self.first_record = Record(1, random.choice(NAMES), ())
        self.first_record = Record(1, self.first_record.owner, (self.first_record.owner,))
        self.hosts = [Host(self, name, 1 << number) for number, name in enumerate(NAMES)]
        self.hosts[0].peer, self.hosts[1].peer = self.hosts[1], self.hosts[0]
        self.loops: list[NodeLoop] = []
        self.split_by_force = False
        self.quiet = False
        clients = max(len(self.volumes), random.choice((1, 2, 3)))
        self.clients = [Client(self, number) for number in range(clients)]
        self.chaos = Chaos(self, steps)

    def _choose_sizes(self) -> None:
        random = self.random
        self.blocks = random.choice((3, 6, 8, 11))  # of each volume
        self.volumes = random.choice((("v",), ("v",), ("v", "w")))
        self.caches = [random.choice(("mirrored", "mirrored", "mirrored", "never", "always")) for _ in self.volumes]
        self.paths = random.choice((1, 2, 2))
        self.drift = random.choice((0.0, 0.001, 0.045, 0.045))
        interval_s = random.choice((0.1, 0.2))
        self.tick_ns = random.choice((50 * MS, 100 * MS))
        self.ticks_per_beat = max(1, round(interval_s * S) // self.tick_ns)
        suspect_after_s, lease_s = random.choice(((1.0, 1.5), (0.7, 1.2), (1.0, 3.0)))
        self.lease_timing = LeaseTiming(interval_s, suspect_after_s, lease_s, 0.1)
        self.failback = random.random() < 0.3
        self.timing = Timing(
            suspect_after_ns=self.lease_timing.suspect_after_ns,
            takeover_delay_ns=random.choice((0, 300 * MS, S)),
            retry_ns=random.choice((200 * MS, 500 * MS)),
            check_ns=random.choice((3 * S, 10 * S)),
            hold_down_ns=random.choice((2 * S, 8 * S)),
            move_timeout_ns=10 * S,
        )
        self.save_ns = random.choice((5 * MS, 5 * MS, 300 * MS))
        self.flush_ns = random.choice((4 * MS, 10 * MS, 200 * MS))
        self.link_delay_ns = random.choice((2 * MS, 2 * MS, 20 * MS, 100 * MS))
        self.socket_bytes = random.choice((700, 8 * BLOCK_BYTES, 1 << 20))  # that a socket takes before it is read
        self.cut_share = random.choice((0.0, 0.1, 0.5))  # of what is read from a socket in pieces
        self.think_ns = random.choice((200 * MS, 500 * MS, 1200 * MS))

    def _cluster(self) -> Cluster:
        random = self.random
        nodes = {name: Node(name, name, STATE_DIR, Address(name, _METRICS_PORT)) for name in NAMES}
        volumes = tuple(
            Volume(name, dict.fromkeys(NAMES, STATE_DIR / name), self.blocks * BLOCK_BYTES, cache=cache)
            for name, cache in zip(self.volumes, self.caches, strict=True)
        )
        group = Group(GROUP, NAMES[0], Address("", self.nbd_port), {}, dict.fromkeys(NAMES, _LINK_PORT), volumes)
        limits = Limits(
            window_changes=random.choice((3, 1000)),
            window_bytes=random.choice((4 * BLOCK_BYTES, 1 << 20)),
            link_timeout_s=random.choice((0.8, 1.5, 3.0)),
            resync_min_rate=random.choice((16 * BLOCK_BYTES, 1 << 24)),
            dirty_block=BLOCK_BYTES,
        )
        return Cluster("c", nodes, {GROUP: group}, limits)

    def cache_of(self, block: int) -> str:
        """How the volume of a block is cached."""
        return self.caches[block // self.blocks]

    def new_number(self) -> int:
        """Of a socket or a task: also their hash, so that sets of them are in the same order in each run."""
        self._numbers += 1
        return self._numbers

    def end(self) -> None:
        """Whatever came of the run."""
        for loop in self.loops:
            loop.end()

    # --- The run --------------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises Violation, or whatever the code under test raises."""
        for host in self.hosts:
            self.clock.after(self.random.randrange(S), host.boot)
        self.chaos.begin()
        self.clock.run_until(lambda: self.chaos.over, 1 << 62)
        self.trace.say("world", "all faults have ended")
        self._look_after()
        if not self.clock.run_until(self.is_well, self.clock.now_ns + _WELL_WITHIN_NS):
            self._override()
        self.quiet = True
        self._come_to_rest()
        if self.random.random() < _POWER_SHARE:
            self.count["power of both at the end"] += 1
            for host in self.hosts:
                host.power_off()
                self.clock.after(self.random.randrange(2 * S), host.boot)
            if not self.clock.run_until(self.is_well, self.clock.now_ns + _WELL_WITHIN_NS):
                raise Violation(f"both lost power when all was well, and not all is well again: {self.state()}")
            self._come_to_rest()

    def _come_to_rest(self) -> None:
        self.clock.run_until(lambda: False, self.clock.now_ns + _QUIET_NS)
        for _ in range(2):  # there may be a failback
            self.clock.run_until(self.is_well, self.clock.now_ns + _QUIET_NS)
            self.clock.run_until(lambda: False, self.clock.now_ns + S)
            if self.is_well():
                break
        self._check_end()

    def is_well(self) -> bool:
        """Whether both nodes are in sync, and the owner serves."""
        record = self.record()
        if record is None or len(record.in_sync) != 2:
            return False
        for host in self.hosts:
            of = host.supervisor
            if of is None or of.group.record != record or host.process is None:
                return False
        owner = self.owner()
        of = owner.supervisor
        return owner.has_address and of is not None and of.replica is not None and of.replica.serving

    def record(self) -> Record | None:
        """The one that counts: the arbiter's, or the newest of the two nodes'."""
        if self.kind == "witness":
            return self.arbiter.current
        saved = [host.saved.record for host in self.hosts if host.saved is not None]
        return max(saved, key=lambda record: record.epoch, default=None)

    def _granted(self, record: Record, node: str) -> None:
        self.checks.record(record)
        self.chaos.provoked(self.hosts[NAMES.index(node)])

    def owner(self) -> Host:
        """By the arbiter's record."""
        record = self.record() or self.first_record
        return next(host for host in self.hosts if host.name == record.owner)

    def _override(self) -> None:
        """It is not well: right only if the one copy that counts has lost its cache, or if the operator had chosen
        one that is half of a sync, or of a new group, and has not seen it through: the override is not carried out by
        a later life of a node."""
        record = self.record()
        owner = self.owner()
        overridden = record is not None and record.epoch in self.arbiter.forced
        overridden = overridden and (owner.state.needs_sync or not owner.state.lineage)
        held = record is not None and record.alone and (owner.lost_cache or overridden)
        if not held:
            raise Violation(f"all faults have ended {_WELL_WITHIN_NS // S} s ago, and not all is well: {self.state()}")
        self.count["held for the operator"] += 1
        self.trace.say("world", f"the operator overrides on {owner.name}")
        if owner.supervisor is not None:
            owner.supervisor.force()
        if not self.clock.run_until(self.is_well, self.clock.now_ns + _WELL_WITHIN_NS):
            raise Violation(f"the operator's override has not helped: {self.state()}")

    def _look_after(self) -> None:
        """What an operator does after an override: the copy that was not chosen never syncs by itself (rule 10)."""
        owner = self.owner()
        other, record = owner.peer, self.record()
        diverged = other.state.lineage not in ("", owner.state.lineage)
        if diverged and record is not None and record.alone and owner.process is not None and owner.process.owner:
            self.count["copies made blank"] += 1
            other.make_blank()
        self.clock.after(S, self._look_after)

    def _check_end(self) -> None:
        if not self.is_well():
            raise Violation(f"all was well, and is not any more without any fault: {self.state()}")
        ours, theirs = (host.values() for host in self.hosts)
        if ours != theirs:
            raise Violation(f"the replicas differ: {ours} and {theirs}")
        self.history.end(self.history.begin("read", 0, len(ours)), ours, 0)
        self.checks.knows_of_no_difference()

    def state(self) -> str:
        """Of everything, for people."""
        lines = [f"{self.kind}: the record is {self.record()}"]
        for host in self.hosts:
            of, process = host.supervisor, host.process
            lines.append(f"  {host.name}: {host.state}")
            lines.append(f"    address: {host.has_address}, saved: {host.saved}")
            if of is not None:
                group = of.group
                lines.append(f"    {group.phase} at {group.record}; waits for: {group.waits_for or 'nothing'}")
                lines.append(f"    open: {group._register.open}, newest order: {group._orders._newest}")
                lines.append(f"    {of.view()}")
            if process is not None:
                lines.append(f"    data process: {process.state()}")
        return "\n".join(lines)
