"""Which arbiter is asked after the cluster file has changed: none, until both nodes have left the old one for good."""

from pathlib import Path

import pytest

from stortrends_ha.boottime import now_ns
from stortrends_ha.cluster.answers import Granted, Known, Refused, Unreachable
from stortrends_ha.cluster.lease import Timing
from stortrends_ha.cluster.membership import Membership
from stortrends_ha.errors import StartError
from stortrends_ha.node.agreement import AgreedArbiter, Agreement
from stortrends_ha.record import Record

OLD, NEW = (("arbiter", "1"), ("limits", "0")), (("arbiter", "2"), ("limits", "0"))
RECORD = Record(5, "a", ("a", "b"))


class Always:
    """An arbiter that grants everything."""

    async def read(self, _: str) -> Known | Unreachable:
        return Known(RECORD)

    async def propose(self, *_: object) -> Granted | Refused | Unreachable:
        return Granted()

    async def seed(self, *_: object) -> Granted | Refused | Unreachable:
        return Granted()

    async def force(self, *_: object) -> Granted | Refused | Unreachable:
        return Granted()

    async def close(self) -> None:
        """It has nothing."""


class Node:
    """One of two; each start is a new life."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / name / "arbiter"
        self.path.parent.mkdir()
        self.name = name
        self._lives = 0

    async def start(self, sections: tuple[tuple[str, str], ...]) -> "Node":
        self._lives += 1
        life = 1000 * self._lives + ord(self.name)
        self.membership = Membership("lab", self.name, "b" if self.name == "a" else "a", life, Timing(), now_ns())
        self.agreement = Agreement(self.path, self.membership, sections)
        self.arbiter = AgreedArbiter(Always(), self.agreement)
        await self.agreement.begin()
        return self

    async def hears(self, other: "Node") -> None:
        """All that there is to hear; and what it then does is done."""
        for _ in range(3):
            self.membership.heard(other.membership.compose(now_ns()), 0, now_ns())
            other.membership.heard(self.membership.compose(now_ns()), 0, now_ns())
        self.agreement.note_beat()
        await self.agreement.close()

    async def asks(self) -> bool:
        return await self.arbiter.propose("g", RECORD, RECORD.owned_alone("a")) == Granted()


@pytest.fixture
def nodes(tmp_path: Path) -> tuple[Node, Node]:
    return Node(tmp_path, "a"), Node(tmp_path, "b")


async def test_new_nodes_ask_what_their_file_says_and_so_do_those_that_are_restarted(nodes: tuple[Node, Node]) -> None:
    for node in nodes:
        for _ in range(2):
            await node.start(OLD)
            assert await node.asks()


async def test_a_new_arbiter_is_asked_when_both_nodes_have_left_the_old_one(nodes: tuple[Node, Node]) -> None:
    a, b = nodes
    await a.start(OLD)
    await b.start(OLD)
    await b.start(NEW)
    assert not await b.asks()
    await b.hears(a)
    assert not await b.asks()  # a has the old one
    assert await a.asks()
    await a.start(NEW)
    assert not await a.asks()
    await a.hears(b)  # now a has left the old one
    assert not await a.asks()  # b may not have
    await b.hears(a)
    assert not await b.asks()
    await b.hears(a)
    assert await b.asks()
    assert not await a.asks()
    await a.hears(b)
    assert await a.asks()
    assert await (await a.start(NEW)).asks()
    assert not await (await b.start(OLD)).asks()


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("files", [(OLD, OLD), (OLD, NEW), (NEW, OLD), (NEW, NEW)])
async def test_nodes_that_die_at_any_step_and_do_not_meet_never_ask_two_arbiters(
    nodes: tuple[Node, Node], steps: int, files: tuple[tuple[tuple[str, str], ...], ...]
) -> None:
    a, b = nodes
    for node in nodes:
        await node.start(OLD)
        await node.start(NEW)
    for step in range(steps):
        await (a, b)[step % 2].hears((b, a)[step % 2])
    asked = {file for node, file in zip(nodes, files, strict=True) if await (await node.start(file)).asks()}
    assert len(asked) <= 1


async def test_the_operator_may_override_all_the_same(nodes: tuple[Node, Node]) -> None:
    a, _ = nodes
    await a.start(OLD)
    await a.start(NEW)
    for answer in (await a.arbiter.read("g"), await a.arbiter.seed("g", RECORD)):
        assert isinstance(answer, Unreachable)
        assert not answer.asked
        assert "is new here: it counts when b runs with the same" in answer.why
    assert await a.arbiter.force("g", RECORD, "") == Granted()


async def test_a_file_that_is_damaged_is_said(nodes: tuple[Node, Node]) -> None:
    a, _ = nodes
    await a.start(OLD)
    a.path.write_text("")
    with pytest.raises(StartError, match="damaged"):
        await a.start(OLD)


async def test_what_cannot_be_written_does_not_count_and_is_tried_again(nodes: tuple[Node, Node]) -> None:
    a, b = nodes
    for node in nodes:
        await node.start(OLD)
        await node.start(NEW)
    in_the_way = a.path.with_name("arbiter.new")
    in_the_way.mkdir()
    await a.hears(b)
    assert dict(a.membership.sections)["left"] == "1"
    in_the_way.rmdir()
    await a.hears(b)
    assert dict(a.membership.sections)["left"] == "2"
