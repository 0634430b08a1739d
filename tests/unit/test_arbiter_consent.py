"""Two nodes without a third machine: each proposal is granted by the peer, and never two of one epoch.

The path between them is a fake that a test can cut; the two arbiters are real.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from stortrends_ha.arbiter.fencing import ManualArbiter
from stortrends_ha.arbiter.interface import Granted, Known, Refused, Unreachable
from stortrends_ha.record import Record

BOTH = Record(5, "node-a", ("node-a", "node-b"))
TO_B = BOTH.handed_to("node-b")
A_ALONE = BOTH.owned_alone("node-a")
B_ALONE = BOTH.owned_alone("node-b")
GONE = Unreachable("node-x is gone", asked=False)
LOST = Unreachable("node-x did not answer")


async def delivered() -> None:
    """As long as a message takes: other things happen meanwhile."""
    await asyncio.sleep(random.choice([0, 0, 0.001]))


@dataclass
class Node:
    """A node with one record, and its path to the other one."""

    name: str
    record: Record = BOTH
    willing: bool = True
    other: "Node | None" = None
    reaches: bool = True  # requests arrive
    hears: bool = True  # answers come back
    arbiter: ManualArbiter = field(init=False)
    slow: asyncio.Event | None = None  # adopts only when it is set
    asked_to_join: int = 0
    can_write: bool = True

    def __post_init__(self) -> None:
        self.arbiter = ManualArbiter(Path(self), lambda _: self.record, self.adopt)

    async def adopt(self, _: str, record: Record) -> bool:
        if self.slow:
            await self.slow.wait()
        await delivered()
        if self.willing:
            self.record = record
        return self.willing

    async def learn(self) -> None:
        """What the other one has, as a beat tells it."""
        assert self.other
        await delivered()
        if self.reaches and self.hears and self.other.record.epoch > self.record.epoch:
            self.record = self.other.record

    async def propose(self, new: Record) -> Granted | Refused | Unreachable:
        """As a node does: what is granted is its own record, and so is a newer one."""
        answer = await self.arbiter.propose("g", self.record, new)
        if isinstance(answer, Granted):
            self.record = answer.instead or new
        if isinstance(answer, Refused) and answer.current and answer.current.epoch > self.record.epoch:
            self.record = answer.current
        return answer


class Path:
    """Requests and answers in order, one at a time."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._order = asyncio.Lock()

    @property
    def _peer(self) -> Node:
        assert self._node.other
        return self._node.other

    @property
    def name(self) -> str:
        return self._peer.name

    @contextlib.asynccontextmanager
    async def _path(self) -> AsyncIterator[None]:
        async with self._order:
            await delivered()
            yield
            await delivered()

    async def consent(self, group: str, old: Record, new: Record) -> Granted | Refused | Unreachable:
        async with self._path():
            if not self._node.reaches:
                return GONE
            considering = asyncio.create_task(self._peer.arbiter.consider(group, old, new))
            answer = await asyncio.shield(considering)  # giving up here stops nothing there
            return answer if self._node.hears else LOST

    async def ask(self, group: str) -> Known | Unreachable:
        async with self._path():
            if not (self._node.reaches and self._node.hears):
                return GONE
            try:
                return await asyncio.wait_for(self._peer.arbiter.tell(group), 0.05)
            except TimeoutError:
                return LOST

    def seen(self) -> bool:
        return True

    def alive(self) -> bool:
        return self._node.reaches

    async def will_ask_to_join(self, _: str, epoch: int) -> bool:
        self._node.asked_to_join = max(epoch, self._node.asked_to_join)
        return self._node.can_write

    def asked_to_join(self, _: str) -> int:
        return self._node.asked_to_join

    def has_same_arbiter(self) -> bool:
        return True

    def heard_ns(self) -> int:
        return 0


@pytest.fixture
def nodes() -> tuple[Node, Node]:
    a, b = Node("node-a"), Node("node-b")
    a.other, b.other = b, a
    return a, b


Nodes = tuple[Node, Node]


async def test_a_handover_is_granted_by_the_peer(nodes: Nodes) -> None:
    a, b = nodes
    assert await a.propose(TO_B) == Granted()
    assert a.record == b.record == TO_B


async def test_a_peer_that_is_not_willing(nodes: Nodes) -> None:
    a, b = nodes
    b.willing = False
    assert await a.propose(TO_B) == Refused(BOTH)
    b.willing = True
    assert await a.propose(TO_B) == Granted()


async def test_a_peer_that_knows_better(nodes: Nodes) -> None:
    a, b = nodes
    b.record = B_ALONE
    assert await a.propose(TO_B) == Refused(B_ALONE)
    assert a.record == B_ALONE


async def test_a_peer_that_is_behind_cannot_grant(nodes: Nodes) -> None:
    a, b = nodes
    a.record = A_ALONE
    answer = await a.propose(A_ALONE.joined_by("node-b"))
    assert isinstance(answer, Unreachable)
    assert "has not learnt of epoch 6" in answer.why
    assert b.record == BOTH


async def test_an_old_record_is_refused_at_home(nodes: Nodes) -> None:
    a, _ = nodes
    a.record = A_ALONE
    assert await a.arbiter.propose("g", BOTH, TO_B) == Refused(A_ALONE)
    assert await a.arbiter.propose("g", BOTH, A_ALONE) == Granted()


async def test_asked_again_after_the_answer_was_lost(nodes: Nodes) -> None:
    a, b = nodes
    a.hears = False
    assert isinstance(await a.propose(TO_B), Unreachable)
    assert (a.record, b.record) == (BOTH, TO_B)
    a.hears = True
    assert await a.propose(TO_B) == Granted()


async def test_without_the_peer_nothing_is_granted(nodes: Nodes) -> None:
    a, _ = nodes
    a.reaches = False
    for new in (A_ALONE, TO_B):
        answer = await a.propose(new)
        assert isinstance(answer, Unreachable)
        assert not answer.asked
    assert isinstance(alone := await a.propose(A_ALONE), Unreachable)
    assert alone.why == "manual: node-x is gone; only the operator can decide for group g"


async def test_a_proposal_that_never_left_blocks_nothing(nodes: Nodes) -> None:
    a, b = nodes
    a.reaches = False
    await a.propose(A_ALONE)
    assert await b.propose(B_ALONE) == Granted()


async def test_while_a_proposal_is_undecided_no_other_is_consented_to(nodes: Nodes) -> None:
    """It was granted, but its answer was lost: consent to another one would make two records of one epoch."""
    a, b = nodes
    a.hears = False
    await a.propose(A_ALONE)
    assert b.record == A_ALONE
    assert await a.arbiter.consider("g", BOTH, B_ALONE) == Refused(BOTH)


async def test_a_lost_proposal_is_settled_by_asking_the_peer(nodes: Nodes) -> None:
    a, b = nodes
    a.hears, b.willing = False, False
    assert isinstance(await a.propose(A_ALONE), Unreachable)
    a.hears = b.willing = True
    assert await b.propose(B_ALONE) == Granted()
    assert a.record == b.record == B_ALONE


async def test_proposals_that_meet(nodes: Nodes) -> None:
    a, b = nodes
    a.slow = b.slow = asyncio.Event()
    first = asyncio.create_task(a.propose(A_ALONE))
    while "g" not in b.arbiter._adopting:
        await asyncio.sleep(0)
    assert await b.propose(B_ALONE) == Refused(BOTH)
    b.slow.set()
    assert await first == Granted()
    assert a.record == b.record == A_ALONE


async def test_read(nodes: Nodes) -> None:
    a, b = nodes
    assert await a.arbiter.read("g") == Known(BOTH)
    b.record = TO_B
    assert await a.arbiter.read("g") == Known(TO_B)
    assert await b.arbiter.read("g") == Known(TO_B)
    a.record = A_ALONE
    assert isinstance(await a.arbiter.read("g"), Unreachable)  # the same epoch twice


async def test_read_without_the_peer(nodes: Nodes) -> None:
    a, b = nodes
    a.reaches = b.reaches = False
    assert await a.arbiter.read("g") == GONE
    a.record = b.record = A_ALONE
    assert await a.arbiter.read("g") == Known(A_ALONE)
    assert await b.arbiter.read("g") == GONE


async def test_seed_and_override(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    a, _ = nodes
    a.reaches = False
    assert await a.arbiter.seed("g", BOTH) == Granted()
    assert await a.arbiter.seed("g", TO_B) == Refused(BOTH)
    assert await a.arbiter.force("g", A_ALONE, "node-b burnt down") == Granted()
    assert "node-b burnt down" in caplog.text
    assert await a.arbiter.force("g", BOTH.owned_alone("node-a"), "") == Granted()
    assert await a.arbiter.force("g", Record(5, "node-b", ("node-b",)), "") == Refused(BOTH)


async def test_nothing_is_proposed_while_a_proposal_of_the_peer_is_adopted(nodes: Nodes) -> None:
    a, b = nodes
    a.slow = asyncio.Event()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(b.propose(B_ALONE), 0.01)  # b has given up, a has not
    assert await a.propose(A_ALONE) == Refused(BOTH)
    a.slow.set()
    while a.record != B_ALONE:
        await asyncio.sleep(0)
    assert b.record == BOTH


async def test_the_peer_is_told_the_record_only_when_it_is_decided(nodes: Nodes) -> None:
    a, b = nodes
    a.slow = asyncio.Event()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(b.propose(B_ALONE), 0.01)
    told = asyncio.create_task(a.arbiter.tell("g"))
    await asyncio.sleep(0)
    assert not told.done()
    a.slow.set()
    assert await told == Known(B_ALONE)


async def storm(node: Node, granted: dict[int, Record], rounds: int, flaky: Callable[[], bool]) -> None:
    for _ in range(rounds):
        node.reaches, node.hears = flaky(), flaky()
        old = node.record
        if old.alone:
            new = random.choice([old.owned_alone(node.name), old.joined_by("node-a"), old.joined_by("node-b")])
        else:
            new = random.choice([old.handed_to("node-a"), old.handed_to("node-b"), old.owned_alone(node.name)])
        if old.alone and old.owner != node.name:
            await node.learn()  # who is not in sync proposes nothing
            continue
        try:
            answer = await asyncio.wait_for(node.propose(new), random.choice([None, 0.0005, 0.002]))
        except TimeoutError:
            continue
        if isinstance(answer, Granted):
            record = answer.instead or new
            assert granted.setdefault(record.epoch, record) == record
        await node.learn()


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_is_lost_an_epoch_has_one_record(nodes: Nodes, seed: int) -> None:
    random.seed(seed)
    a, b = nodes
    granted: dict[int, Record] = {}
    await asyncio.gather(*(storm(node, granted, 100, lambda: random.random() < 0.8) for node in nodes))
    for node in nodes:
        node.reaches = node.hears = True
        assert granted.get(node.record.epoch, node.record) == node.record
    newest = max(a.record, b.record, key=lambda record: record.epoch)
    assert a.record == b.record or a.record.epoch != b.record.epoch
    assert await a.arbiter.read("g") == await b.arbiter.read("g") == Known(newest)
    assert max(granted) > BOTH.epoch + 10


async def test_a_node_that_is_alone_stays_alone_without_its_peer(nodes: Nodes) -> None:
    a, _ = nodes
    a.record, a.reaches = A_ALONE, False
    assert isinstance(await a.propose(A_ALONE.owned_alone("node-a")), Granted)
    assert isinstance(await a.propose(A_ALONE.joined_by("node-b")), Unreachable)


async def test_a_node_that_is_alone_but_may_have_been_joined_waits_for_its_peer_also_after_a_restart(
    nodes: Nodes,
) -> None:
    a, b = nodes
    a.record = b.record = A_ALONE
    a.hears = False
    joined = A_ALONE.joined_by("node-b")
    assert isinstance(await a.propose(joined), Unreachable)
    assert (a.record, b.record) == (A_ALONE, joined)  # which may own now
    a.__post_init__()
    a.reaches = False
    assert isinstance(await a.propose(A_ALONE.owned_alone("node-a")), Unreachable)
    a.reaches = a.hears = True
    assert await a.propose(A_ALONE.owned_alone("node-a")) == Refused(joined)


async def test_a_peer_is_not_asked_to_join_while_that_cannot_be_remembered(nodes: Nodes) -> None:
    a, b = nodes
    a.record = b.record = A_ALONE
    a.can_write = False
    assert await a.propose(A_ALONE.joined_by("node-b")) == Unreachable(
        "what is about to be asked cannot be written down", asked=False
    )
    assert b.record == A_ALONE
