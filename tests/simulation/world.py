"""The world of one run: two nodes, a network, clients, and chance, all from one seed.

A run is a list of *events*: a client asks, some bytes arrive, a sync ends, ... and, while it lasts, faults.
Which event comes next is drawn by weights that are themselves drawn for each seed, so that some runs have slow
disks, some tiny windows, some no power losses. Nothing depends on time, hashing or the order of sets.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeVar

from stortrends_ha.record import Record

from .checks import History, Violation
from .clients import DISK_READS, User
from .disk import Disk
from .faults import Faults
from .follower import Follower
from .link import Connection
from .node import Killed, Node, Process
from .owner import Owner
from .scale import Limits
from .supervisor import Supervisor

T = TypeVar("T")
TRACE_EVENTS = 60
_SETTLE_ROUNDS = 3000
_DRAWS = 12
_MIB = 1 << 20


class World:
    """One run."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.limits = Limits(random.choice((64,) * 14 + (16, 1)))
        divisor = self.limits.divisor
        self.block_bytes = random.choice((4096, 8192)) // divisor
        self.volume_bytes = random.choice((1, 1, 2, 4)) * _MIB // divisor
        volumes = random.choice((1, 1, 2))
        self.window_changes = random.choice((4, 16, 64, 1000))
        self.window_bytes = random.choice((1, 4, 1000)) * self.limits["WRITE_WHOLE_BYTES"]
        self.capacity_bytes = int(random.choice((0.02, 0.3, 4)) * self.limits["LINK_BACKLOG_BYTES"])
        self.mix = (
            ("write", "read", "flush", "trim", "zero", "allocate"),
            random.choice(((50, 30, 6, 6, 6, 2), (10, 84, 2, 2, 1, 1), (40, 10, 20, 10, 10, 10))),
        )
        self.fua_share = random.choice((0, 0.1, 0.5))
        self._hot = [self._pick_hot_block() for _ in range(random.choice((1, 2, 5)))]

        self.step_number = 0
        self.count: Counter[str] = Counter()
        self.answered = 0
        self._trace: deque[tuple[int, str, tuple[Any, ...]]] = deque(maxlen=TRACE_EVENTS)
        self._value = 0

        self.record = Record(1, "node-a", ("node-a",))  # in the arbiter
        self.nodes = [Node(self, name, self._disks(volumes)) for name in ("node-a", "node-b")]
        self.owner, self.secondary = self.nodes
        self.history = History(self, self.volume_bytes // self.block_bytes, self.block_bytes, volumes)
        self.connections: list[Connection] = []
        self.users = [User(self, i % volumes, random.choice((1, 4, 12, 40))) for i in range(random.choice((1, 2, 4)))]
        self._soon: deque[tuple[Process, Callable[[], None]]] = deque()
        self.settling = False
        self.held_for_good = False
        self._faults = Faults(self)
        self.supervisor = Supervisor(self)
        self._events = (
            (self._request, 15), (self._feed, 20), (self._network, 40), (self._drain, 10), (self._end_sync, 8),
            (self._end_disk_read, 4), (self._do_soon, 20), (self._connect, 4), (self._ping, 1), (self._start, 4),
            (self._end_stop, 2), (self.supervisor.order, 8), (self.supervisor.decide, 4),
        )  # fmt: skip
        self._weights = [weight * random.choice((0.3, 1, 3)) for _, weight in self._events]

    def _disks(self, volumes: int) -> list[Disk]:
        return [Disk(self.volume_bytes, self.block_bytes) for _ in range(volumes)]

    def peer_of(self, node: Node) -> Node:
        """The other one."""
        return self.nodes[1] if node is self.nodes[0] else self.nodes[0]

    # --- Chance ---------------------------------------------------------------------------------

    def _pick_hot_block(self) -> int:
        """Often next to the border of an order region or a compare block."""
        border = self.random.choice(
            (self.limits["ORDER_REGION_BYTES"], self.limits["COMPARE_BLOCK_BYTES"], self.block_bytes)
        )
        at = self.random.randrange(self.volume_bytes // border) * border // self.block_bytes
        return max(0, at - self.random.choice((0, 1, 2)))

    def pick_range(self) -> tuple[int, int]:
        """Offset and length of a request."""
        random, blocks = self.random, self.volume_bytes // self.block_bytes
        whole = self.limits["WRITE_WHOLE_BYTES"] // self.block_bytes
        length = random.randint(1, random.choice((1, 4, 4, 8, 8, whole, whole * 3)))
        first = random.choice(self._hot) if random.random() < 0.7 else random.randrange(blocks)
        first = max(0, min(first + random.randint(-2, 2), blocks - length))
        length = min(length, blocks - first)
        return first * self.block_bytes, length * self.block_bytes

    def new_value(self) -> bytes:
        """Eight bytes that nobody wrote before."""
        self._value += 1
        return self._value.to_bytes(8)

    def _size(self, most: int) -> int:
        """How many of ``most`` bytes come at once."""
        if self.settling:
            return most
        return min(
            most, self.random.choice((1, self.random.randint(1, most), self.random.randint(1, most), most, most, most))
        )

    # --- The record of what happened ------------------------------------------------------------

    def note(self, text: str, *values: Any) -> None:
        """For the trace of a failing run."""
        self._trace.append((self.step_number, text, tuple(v if isinstance(v, int | str) else str(v) for v in values)))

    def happened(self, fault: str) -> None:
        """A fault has happened."""
        self.count[fault] += 1
        self.note("FAULT %s", fault)

    def trace(self) -> str:
        """The last events."""
        return "\n".join(f"  {step:6} {text % values if values else text}" for step, text, values in self._trace)

    # --- Running processes ----------------------------------------------------------------------

    def run(self, process: Process, do: Callable[..., None], *arguments: Any) -> None:
        """Let a process do something; it may be killed in the middle of it."""
        if process.alive:
            try:
                do(*arguments)
            except Killed:
                self.happened(f"kill in the middle of something: {process.node.name}")
                self.ended(process)
        if isinstance(process, Owner):
            self._check_bounds(process)

    def soon(self, process: Process, do: Callable[[], None]) -> None:
        """As ``loop.call_soon``."""
        self._soon.append((process, do))

    def ended(self, process: Process) -> None:
        """A process has ended, in whatever way."""
        process.alive = False
        process.node.process = None
        process.node.kill_in = None
        self.note("%s: process ended", process.node.name)
        for end in process.ends():
            end.die()
        if isinstance(process, Owner):
            for user in self.users:
                user.disconnected()

    def power_loss(self, node: Node) -> None:
        """A host loses power: what was only cached is gone."""
        if node.process is not None:
            self.ended(node.process)
        node.boot += 1
        lost = sum(disk.lose_cache(self.random) for disk in node.disks)
        self.happened(f"power loss: {node.name}")
        self.count[f"blocks lost from the cache: {node.name}"] += lost

    def held(self) -> None:
        """The owner lost its cache and the secondary did not: nothing is served until it has, too (or owns)."""
        if self.record.alone or not self.secondary.state.boot_id:  # or it was stopped in order: it would lack nothing
            self.held_for_good = True
        elif self.settling or self.random.random() < 0.2:
            self.power_loss(self.secondary)

    def _check_bounds(self, owner: Owner) -> None:
        primary, limits = owner.primary, self.limits
        copied = limits["COMPARE_BLOCKS_IN_FLIGHT"] * limits["COMPARE_BLOCK_BYTES"]
        batch = limits["REQUESTS_PER_BATCH"] + 2 + len(self.users) * DISK_READS
        waiting = primary.unanswered
        if waiting > self.window_changes + batch:
            raise Violation(
                f"{waiting} changes, flushes and reads wait; the bound is {self.window_changes} and a batch (rule 15)"
            )
        if owner.alive and primary.full and not (primary._flow.stopped or primary._unwaited):
            raise Violation("the window is full, and nobody is paused (rule 15)")
        if primary.bytes_in_flight > self.window_bytes + limits["INPUT_BUFFER_BYTES"] + copied:
            raise Violation(
                f"{primary.bytes_in_flight} bytes in flight; the bound is {self.window_bytes} and a batch (rule 15)"
            )
        frames = limits["CHANGES_FRAME_BYTES"] + copied + 32 * (self.window_changes + 100)
        if owner.link is not None and owner.link.backlog_bytes > limits["LINK_BACKLOG_BYTES"] + frames:
            raise Violation(f"{owner.link.backlog_bytes} bytes wait for the link (rule 15)")

    # --- Events: each returns whether it did something ------------------------------------------

    def _pick(self, items: Sequence[T]) -> T | None:
        return self.random.choice(items) if items else None

    def _request(self) -> bool:
        user = self.random.choice(self.users)
        owner = self.owner.process
        if user.connection is None:
            if not isinstance(owner, Owner) or owner.stopping or self.settling:
                return False
            self.run(owner, owner.accept, user)
        elif user.wants_more and not self.settling:
            user.request()
        else:
            return False
        return True

    def _feed(self) -> bool:
        user = self._pick(
            [user for user in self.users if user.outbound and user.connection and user.connection.reading]
        )
        if user is None or user.connection is None or self.owner.process is None:
            return False
        size = self._size(min(user.connection.room_bytes, len(user.outbound)))
        data = bytes(user.outbound[:size])
        del user.outbound[:size]
        self.run(self.owner.process, user.connection.receive, data)
        return True

    def _network(self) -> bool:
        self.connections = [connection for connection in self.connections if not connection.over]
        connection = self._pick(self.connections)
        if connection is None:
            return False
        end = self.random.choice(connection.ends)
        if not end.peer.reading and not end.peer.closed:
            return False
        if end.network:
            size = self._size(len(end.network))
            data = bytes(end.network[:size])
            del end.network[:size]
            if not end.peer.closed:
                self.run(end.peer.process, end.peer.receive, data)
        elif (end.closed or connection.broken) and not end.peer.closed:
            self.run(end.peer.process, end.peer.close, "the peer closed the connection")
        else:
            return False
        return True

    def _drain(self) -> bool:
        ends = [end for c in self.connections for end in c.ends if end.backlog and len(end.network) < c.capacity_bytes]
        end = self._pick(ends)
        if end is not None:
            self.run(end.process, end.drain)
        return end is not None

    def _end_sync(self) -> bool:
        syncing = [
            (node.process, store)
            for node in self.nodes
            if node.process
            for store in node.process.stores
            if store.syncing
        ]
        if not syncing:
            return False
        process, store = self.random.choice(syncing)
        self.run(process, store.end_sync)
        return True

    def _end_disk_read(self) -> bool:
        user = self._pick([user for user in self.users if user.connection and user.connection.disk_reads])
        if user is None or user.connection is None or self.owner.process is None:
            return False
        self.run(self.owner.process, user.connection.end_disk_read)
        return True

    def _do_soon(self) -> bool:
        if not self._soon:
            return False
        self.run(*self._soon.popleft())
        return True

    def _connect(self) -> bool:
        owner, follower = self.owner.process, self.secondary.process
        if not isinstance(owner, Owner) or not isinstance(follower, Follower) or not owner.wants_link or owner.stopping:
            return False
        connection = Connection(owner, follower, self.capacity_bytes)
        self.connections.append(connection)
        self.run(follower, follower.accept, connection)
        self.run(owner, owner.connect, connection)
        return True

    def _ping(self) -> bool:
        owner = self.owner.process
        if not isinstance(owner, Owner) or owner.link is None or owner.link.backlog:
            return False
        self.run(owner, owner.send_ping)
        return True

    def _start(self) -> bool:
        """Start what is not running, and, as an operator would, stop what has failed."""
        node = self.random.choice(self.nodes)
        process = node.process
        if process is not None:
            if process.failure:
                self.happened(f"failed replica started again: {node.name}")
                self.ended(process)
            return bool(process.failure)
        if node is self.owner and not self.supervisor.may_lead():
            return False
        try:
            node.process = (Owner if node is self.owner else Follower)(self, node, self.record)
        except Killed:
            self.happened(f"kill at the start: {node.name}")
            return True
        self.note("%s: process started", node.name)
        return True

    def _end_stop(self) -> bool:
        owner = self.owner.process
        if not isinstance(owner, Owner) or not owner.stopping:
            return False
        self.run(owner, owner.end_stop, self.settling or self.random.random() < 0.9)
        return True

    # --- The run --------------------------------------------------------------------------------

    def play(self, steps: int) -> None:
        """Run so many events, then let all settle, and check. Raises Violation."""
        with self.limits.in_force():
            while self.step_number < steps and not self.held_for_good:
                self.step_number += 1
                self._faults.perhaps()
                # The first of the drawn events that has something to do; with none, time passes.
                any(event() for event, _ in self.random.choices(self._events, self._weights, k=_DRAWS))
            self._settle()
            if self.held_for_good:
                self.count["runs that ended held"] += 1
                self.history.finish_held()
            else:
                self.history.finish()
                self._stop_cleanly()

    def _settle(self) -> None:
        """No more faults and no more requests: everything must be answered and in sync before long."""
        self.settling = True
        for node in self.nodes:
            node.faults.clear()
            node.kill_in = None
        for _ in range(_SETTLE_ROUNDS):
            self.step_number += 1
            for event, _ in self._events:
                event()
            if self.held_for_good or not self._why_not_quiet():
                return
        raise Violation("no progress though there are no faults any more: " + self._why_not_quiet())

    def _why_not_quiet(self) -> str:
        owner, follower = self.owner.process, self.secondary.process
        if not isinstance(owner, Owner) or not isinstance(follower, Follower) or owner.failure or follower.failure:
            return "a process does not run"
        if owner.link is None or follower.link is not owner.link.peer:
            return "no session"
        if not owner.primary.idle or owner.primary.resync is not None or not self.secondary.in_sync:
            return f"issued {owner.primary.issued}, acknowledged {owner.primary.acked}, resync {owner.primary.resync}"
        waiting = [str(request) for user in self.users for request in user.requests.values()]
        return f"unanswered: {waiting}" if waiting or self._soon else ""

    def _stop_cleanly(self) -> None:
        """After an orderly stop of both nodes even a power loss takes nothing."""
        owner, follower = self.owner.process, self.secondary.process
        assert isinstance(owner, Owner)
        assert isinstance(follower, Follower)
        owner.begin_stop()
        owner.end_stop(in_time=True)
        follower.stop()
        for node in self.nodes:
            if node.state.open:
                raise Violation(f"{node.name} was stopped in order and does not say so")
            self.power_loss(node)
        self.history.finish()
