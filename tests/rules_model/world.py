"""The state of the model: two nodes, what is between them, and one block of data whose versions a client writes.

Time is abstract. The only thing that it decides is whether a promise not to take over still holds: ``Node.lease``.
"""

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, NamedTuple

from . import rules


class Arbiter(Enum):
    """What keeps the record."""

    REGISTER = "register"
    FENCING = "fencing"


@dataclass(frozen=True)
class Bounds:
    """How far the search goes: numbers of writes, of faults (kill, power loss, broken link) and the highest epoch."""

    writes: int
    faults: int
    epochs: int


@dataclass(frozen=True)
class Setting:
    """What is searched."""

    arbiter: Arbiter
    bounds: Bounds
    rules: frozenset[str] = rules.ALL

    def has(self, rule: str) -> bool:
        """Whether the rule is kept."""
        return rule in self.rules


class Role(IntEnum):
    """What a node does. A FOLLOWER that has proposed is *standing*, an OWNER that is alone and has is *sealed*."""

    OFF = 0
    FOLLOWER = 1
    OWNER = 2
    DRAINED = 3  # was owner, has stopped for a handover, and has proposed it


class Record(NamedTuple):
    """``in_sync`` is the owner if ``alone``, or else both."""

    epoch: int
    owner: int
    alone: bool

    def has_in_sync(self, node: int) -> bool:
        return self.owner == node or not self.alone


class Proposal(NamedTuple):
    """On its way to the arbiter, which may receive it late, twice or never. Granted in place of one of ``old``."""

    by: int
    record: Record
    old: tuple[Record, ...]


class Busy(IntEnum):
    """Where the owner's write is that has not been answered."""

    NO = 0
    HERE = 1
    ON_BOTH = 2


class Lease(IntEnum):
    """A promise not to take over that has not run out. The worst case is that its owner has heard it."""

    NONE = 0
    PROMISED = 1
    UNCOUNTED = 2  # given after its giver proposed to take over: its wait does not count from it


class Node(NamedTuple):
    """``mem`` is the version that a read returns, ``disk`` what is left of it after a power loss."""

    role: Role
    rec: Record  # durable: the newest that it knows
    ask: Proposal | None = None  # durable: its proposal of which it does not know whether it was or will be granted
    mem: int = 0
    disk: int = 0
    busy: Busy = Busy.NO
    lost: bool = False  # durable: its cache was lost since it was last in sync
    settled: bool = False  # durable: it is alone, and all that was cached before is flushed
    unclean: bool = False  # durable: was killed as a mirrored owner: its replica may differ
    wait: bool = False  # it is owner but has to wait for the end of the old owner's lease
    lease: Lease = Lease.NONE  # its peer's promise to it
    excused: bool = False  # need not wait (only while a rule is removed)
    seen: bool = True  # has seen its peer since it was booted (fencing)
    fencing: bool = False  # its fence agent has powered the peer off, and has not said so yet (fencing)

    @property
    def standing(self) -> bool:
        """Whether it has stopped listening to the owner, and proposed itself."""
        return self.role == Role.FOLLOWER and self.ask is not None


class World(NamedTuple):
    """``session``: the owner of the open link session, or None. ``acked`` and ``flushed``: what the client was told."""

    register: Record | None  # None: there is none (fencing), or it was lost
    nodes: tuple[Node, Node]
    wire: frozenset[Proposal] = frozenset()
    session: int | None = None
    acked: int = 0
    flushed: int = 0
    writes: int = 0
    faults: int = 0

    def put(self, n: int, node: Node, **fields: Any) -> "World":
        """With another node ``n``."""
        return self._replace(nodes=(node, self.nodes[1]) if n == 0 else (self.nodes[0], node), **fields)

    def newest(self) -> Record:
        """The newest record that is in force."""
        if self.register is not None:
            return self.register
        first, second = self.nodes
        return first.rec if first.rec.epoch >= second.rec.epoch else second.rec


class Step(NamedTuple):
    """An action of ``node``; in ``text`` {0} is the node and {1} its peer."""

    text: str
    node: int
    world: World


def start(setting: Setting) -> World:
    """Node 0 owns, both are in sync and in session."""
    record = Record(1, owner=0, alone=False)
    nodes = (Node(Role.OWNER, record), Node(Role.FOLLOWER, record))
    return World(record if setting.arbiter is Arbiter.REGISTER else None, nodes, session=0)


def acts_alone(node: Node, setting: Setting) -> bool:
    """Whether an owner answers without its peer: nobody else may take over, now or by a proposal under way."""
    return node.rec.alone and (node.ask is None or not setting.has(rules.SEAL_JOIN))


def must_reconcile(node: Node, setting: Setting) -> bool:
    """Whether an owner was killed while it was mirrored, and has not yet made its peer equal."""
    return node.unclean and not node.rec.alone and setting.has(rules.RECONCILE)


def can_answer(node: Node, setting: Setting) -> bool:
    """Rule 5: checked right before each reply."""
    if node.role != Role.OWNER or node.wait or must_reconcile(node, setting):
        return False
    return node.lease != Lease.NONE or acts_alone(node, setting) or not setting.has(rules.LEASE_CHECK)


def learn(world: World, n: int, record: Record, setting: Setting) -> World:
    """``n`` stores a newer record, and then acts on it. A session is for one record, so it ends."""
    node = world.nodes[n]
    leads = node.role in (Role.OWNER, Role.DRAINED) and record.owner == n
    ask = node.ask if node.ask is not None and record in node.ask.old else None
    still_alone = record.alone and record.owner == n and node.rec.alone and node.rec.owner == n
    changed = node._replace(
        rec=record,
        ask=ask,
        settled=node.settled and still_alone,
        role=Role.OWNER if leads else Role.FOLLOWER,
        busy=node.busy if leads else Busy.NO,
        wait=node.wait and leads,
        lease=node.lease if leads else Lease.NONE,
        unclean=node.unclean and (record.owner == n or not record.alone),
        fencing=False,
    )
    goes_on_listening = node.standing and record.owner == n and not setting.has(rules.STOP_FIRST)
    return world.put(n, changed, session=world.session if goes_on_listening else None)
