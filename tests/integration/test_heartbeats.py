"""Two nodes' heartbeats over real sockets: meeting, signs of life, leases, consent; garbage, replays, broken paths.

Time passes as the nodes' own beats tell: a test looks again whenever one of its nodes is about to send.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import pytest
import uvloop

from stortrends_ha.boottime import now_ns
from stortrends_ha.cluster.answers import Granted, Refused, Unreachable
from stortrends_ha.cluster.membership import Membership, Timing
from stortrends_ha.config.model import Address
from stortrends_ha.limits import HEARTBEAT_DATAGRAM_BYTES, HEARTBEAT_GAP_S
from stortrends_ha.node.consent import Outcome
from stortrends_ha.node.heartbeats import Heartbeats, News, new_incarnation, next_due_s
from stortrends_ha.protocol.heartbeat import Ask, GroupBeat, Heartbeat, decode, encode
from stortrends_ha.record import Record

KEY = os.urandom(32)
RECORD = Record(3, "a", ("a", "b"))
NEXT = RECORD.owned_alone("b")
GROUP = GroupBeat("g", RECORD, "following", True, "", False, False, False, "")
# Fast enough for tests, and slow enough for a busy machine.
QUICK = Timing(heartbeat_interval_s=0.02, suspect_after_s=0.5, lease_s=1.0)
# So slow that what arrives did not wait for the schedule.
SLOW = Timing(heartbeat_interval_s=30, suspect_after_s=100, lease_s=200)
PATIENCE_S = 20.0


def in_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test as a node runs."""

    @wraps(test)
    def run(*args: Any, **options: Any) -> None:
        uvloop.run(test(*args, **options))

    return run


def free_address(host: str = "127.0.0.1") -> Address:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as found:
        found.bind((host, 0))
        return Address(host, found.getsockname()[1])


@dataclass
class Node:
    """One end, and what a test wants to know of it."""

    me: str
    paths: list[tuple[Address, Address]]
    timing: Timing = QUICK
    news: News = field(default_factory=lambda: News([GROUP]))
    heard: list[int] = field(default_factory=list)
    asks: list[tuple[str, Record, Record]] = field(default_factory=list)
    answer: Outcome = field(default_factory=Granted)
    before_answer: asyncio.Event | None = None
    happened: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        peer = "b" if self.me == "a" else "a"
        self.life = Membership("lab", self.me, peer, new_incarnation(), self.timing, now_ns(), len(self.paths))
        self.beats = Heartbeats(self.life, KEY, self.paths, self._news, self._on_beat, self._on_ask)

    def _news(self) -> News:
        self.happened.set()
        return self.news

    def _on_beat(self, path: int) -> None:
        self.heard.append(path)
        self.happened.set()

    async def _on_ask(self, group: str, old: Record, new: Record) -> Outcome:
        self.asks.append((group, old, new))
        self.happened.set()
        if self.before_answer is not None:
            await self.before_answer.wait()
        return self.answer

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.happened.clear()
                await self.happened.wait()

    async def until_alive(self) -> None:
        await self.until(lambda: self.life.alive(now_ns()))


@contextlib.asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        for node in nodes:
            await stack.enter_async_context(node.beats)
        yield


def pair(timing: Timing = QUICK, paths: int = 1, host: str = "127.0.0.1") -> tuple[Node, Node]:
    links = [(free_address(host), free_address(host)) for _ in range(paths)]
    return Node("a", links, timing), Node("b", [(b, a) for a, b in links], timing)


class Relay(asyncio.DatagramProtocol):
    """Stands in the way to ``target`` and keeps all that comes by; what ``drops`` says does not go on."""

    def __init__(self, target: Address) -> None:
        self.target = target
        self.kept: list[bytes] = []
        self.drops: Callable[[bytes], bool] = lambda _: False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:  # noqa: ARG002
        self.kept.append(data)
        if not self.drops(data):
            self.send(data)

    def send(self, data: bytes) -> None:
        self.transport.sendto(data, (self.target.host, self.target.port))


@contextlib.asynccontextmanager
async def relay(target: Address) -> AsyncIterator[tuple[Address, Relay]]:
    address = free_address()
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Relay(target), (address.host, address.port)
    )
    try:
        yield address, protocol
    finally:
        transport.close()


@contextlib.asynccontextmanager
async def relayed(timing: Timing = QUICK) -> AsyncIterator[tuple[Node, Node, Relay, Relay]]:
    """Two nodes, not started, with a relay in each direction: towards a, towards b."""
    a, b = free_address(), free_address()
    async with relay(a) as (to_a, towards_a), relay(b) as (to_b, towards_b):
        yield Node("a", [(a, to_b)], timing), Node("b", [(b, to_a)], timing), towards_a, towards_b


# --- Meeting and news -------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
@in_uvloop
async def test_two_nodes_meet_and_give_each_other_leases(host: str) -> None:
    a, b = pair(host=host)
    async with running(a, b):
        await a.until(lambda: a.life.lease_until_ns("g") > now_ns())
        await b.until(lambda: b.life.lease_until_ns("g") > now_ns())
    assert a.life.peer is not None
    assert a.life.peer.groups == (GROUP,)
    assert set(a.heard) == {0}


@in_uvloop
async def test_two_nodes_meet_without_waiting_for_the_schedule() -> None:
    a, b = pair(SLOW)
    async with running(a), running(b):
        await a.until_alive()
        await b.until_alive()


@in_uvloop
async def test_news_is_told_at_once_when_kicked() -> None:
    a, b = pair(SLOW)
    async with running(a, b):
        await a.until_alive()
        await b.until_alive()
        a.news = News([GROUP], drained=True)
        a.beats.kick()
        await b.until(lambda: b.life.peer is not None and b.life.peer.drained)


@in_uvloop
async def test_a_node_that_ends_says_its_last_news() -> None:
    a, b = pair(SLOW)
    async with running(b):
        async with running(a):
            await a.until_alive()
            await b.until_alive()
            a.news = News(stopping=True)
            a.beats.kick()
        await b.until(lambda: b.life.peer is not None and b.life.peer.stopping)
        a.beats.kick()  # of no effect any more


@in_uvloop
async def test_however_often_it_is_kicked_beats_keep_their_distance() -> None:
    a, b = pair(SLOW)
    async with running(a, b):
        await a.until_alive()
        began_s, before = asyncio.get_running_loop().time(), a.beats.paths()[0].sent
        while asyncio.get_running_loop().time() < began_s + 20 * HEARTBEAT_GAP_S:
            a.beats.kick()
            await asyncio.sleep(0)
        elapsed_s = asyncio.get_running_loop().time() - began_s
        assert 2 <= a.beats.paths()[0].sent - before <= elapsed_s / HEARTBEAT_GAP_S + 2


@in_uvloop
async def test_a_peer_that_ends_is_suspected_and_met_again_in_its_next_life() -> None:
    a, b = pair()
    async with running(a):
        async with running(b):
            await a.until_alive()
        await a.until(lambda: a.life.suspected(now_ns()))
        assert not a.life.alive(now_ns())
        again = Node("b", b.paths)
        async with running(again):
            await a.until_alive()
            await again.until_alive()
        assert a.life.peer_incarnation == again.life.incarnation


@pytest.mark.parametrize(
    ("due_s", "now_s", "next_s"), [(10, 10, 11), (10, 10.9, 11), (10, 11, 12), (10, 15.5, 16), (10, 9.9, 11)]
)
def test_the_schedule_does_not_drift_and_skips_what_was_missed(due_s: float, now_s: float, next_s: float) -> None:
    assert next_due_s(due_s, now_s, 1.0) == next_s


# --- Broken paths -----------------------------------------------------------------------------


@in_uvloop
async def test_a_path_whose_own_address_is_missing_does_not_hinder_the_other() -> None:
    a, b = pair(paths=2)
    a.paths[0] = (Address("192.0.2.1", 7800), a.paths[0][1])
    a = Node("a", a.paths)
    async with running(a, b):
        await a.until_alive()
        await b.until_alive()
        dead, good = a.beats.paths()
        assert "192.0.2.1:7800" in dead.problem
        assert (dead.sent, good.problem) == (0, "")
        assert set(a.heard) == {1}


@in_uvloop
async def test_a_path_on_which_sending_fails_does_not_hinder_the_other() -> None:
    a, b = pair(paths=2)
    a.paths[0] = (a.paths[0][0], Address("255.255.255.255", 7800))  # forbidden without SO_BROADCAST
    a = Node("a", a.paths)
    async with running(a, b):
        await a.until_alive()
        await b.until_alive()
        failing, good = a.beats.paths()
        assert failing.send_errors > 0
        assert "255.255.255.255:7800" in failing.problem
        assert good.send_errors == 0
        assert b.life.alive(now_ns())


@in_uvloop
async def test_either_of_two_paths_keeps_the_peer_alive() -> None:
    first, second = (free_address(), free_address()), (free_address(), free_address())
    async with relay(first[0]) as (to_a, towards_a), relay(first[1]) as (to_b, towards_b):
        a = Node("a", [(first[0], to_b), (second[0], second[1])])
        b = Node("b", [(first[1], to_a), (second[1], second[0])])
        async with running(a, b):
            await a.until(lambda: all(path.received for path in a.beats.paths()))
            towards_a.drops = towards_b.drops = lambda _: True
            await a.until(lambda: a.life.silent_ns(0, now_ns()) > 2 * a.timing.suspect_after_ns)
            assert a.life.alive(now_ns())
            assert a.life.lease_until_ns("g") > now_ns()
            assert a.beats.paths()[0].silent_s > 2 * a.timing.suspect_after_s


@in_uvloop
async def test_a_path_comes_up_when_its_address_becomes_free() -> None:
    a, b = pair()
    own = a.paths[0][0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as rival:
        rival.bind((own.host, own.port))
        async with running(a, b):
            await a.until(lambda: "in use" in a.beats.paths()[0].problem)
            rival.close()
            await a.until_alive()
            assert a.beats.paths()[0].problem == ""


@in_uvloop
async def test_a_name_that_nobody_knows_is_said() -> None:
    a = Node("a", [(free_address(), Address("nowhere.invalid", 7800))])
    async with running(a):
        await a.until(lambda: "nowhere.invalid" in a.beats.paths()[0].problem and a.beats.paths()[0].sent == 0)


# --- Garbage and replays ----------------------------------------------------------------------


@in_uvloop
async def test_a_flood_of_garbage_is_counted_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    a, b = pair()
    real = encode(KEY, Membership("lab", "b", "a", 7, QUICK, 0).compose(0))
    garbage = [b"", b"x", os.urandom(1400), real[:-1], real[:38] + os.urandom(len(real) - 38), real + b"x",
               bytes(HEARTBEAT_DATAGRAM_BYTES + 1000), encode(os.urandom(32), decode(KEY, real))]  # fmt: skip
    own = a.paths[0][0]
    async with running(a, b):
        await a.until_alive()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.setblocking(False)
            wanted_s = asyncio.get_running_loop().time() + 2 * QUICK.suspect_after_s
            while asyncio.get_running_loop().time() < wanted_s:
                for data in garbage * 3:
                    with contextlib.suppress(BlockingIOError):
                        stranger.sendto(data, (own.host, own.port))
                await asyncio.sleep(0)
                assert not a.life.suspected(now_ns())
        assert a.life.alive(now_ns())
        assert b.life.alive(now_ns())
        assert a.life.lease_until_ns("g") > now_ns()
        view = a.beats.paths()[0]
    assert view.forged > 100
    assert view.refused
    assert view.unproven <= 2
    assert sum("are dropped" in line.message for line in caplog.records) == 1


@in_uvloop
async def test_replays_keep_no_dead_peer_alive_and_its_next_life_is_met_all_the_same() -> None:
    async with relayed() as (a, b, towards_a, _), running(a):
        async with running(b):
            await a.until(lambda: a.life.peer_saw_seq > 5)
        newest = a.life.peer
        heard_ns = a.life.last_heard_ns

        def replay() -> bool:
            for data in towards_a.kept:
                towards_a.send(data)
            return a.life.suspected(now_ns())

        await a.until(replay)
        assert (a.life.peer, a.life.last_heard_ns) == (newest, heard_ns)
        assert a.beats.paths()[0].old > 100
        again = Node("b", b.paths)
        async with running(again):
            await a.until(lambda: not replay() and a.life.peer_incarnation == again.life.incarnation)
            await again.until_alive()


@in_uvloop
async def test_replays_of_former_lives_of_both_do_not_disturb_two_nodes_that_have_met() -> None:
    async with relayed() as (a, b, towards_a, towards_b):
        async with running(a, b):
            await a.until(lambda: a.life.peer_saw_seq > 5)
        a, b = Node("a", a.paths), Node("b", b.paths)
        former_a, former_b = list(towards_b.kept), list(towards_a.kept)
        async with running(a, b):
            await a.until_alive()
            await b.until_alive()
            sent_before = a.life.next_seq

            def replay() -> None:
                for data in former_b:
                    towards_a.send(data)
                for data in former_a:
                    towards_b.send(data)

            def after_a_while() -> bool:
                replay()
                assert a.life.alive(now_ns())
                return a.life.next_seq > sent_before + 50

            await a.until(after_a_while)
            assert a.life.peer_incarnation == b.life.incarnation
            assert b.life.peer_incarnation == a.life.incarnation
            assert a.beats.paths()[0].unproven > 100


# --- Consent ----------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [Granted(), Refused(RECORD), Refused(None)])
@in_uvloop
async def test_a_question_is_answered(answer: Outcome) -> None:
    a, b = pair()
    a.answer = answer
    async with running(a, b):
        await b.until_alive()
        assert await b.beats.ask("g", RECORD, NEXT, PATIENCE_S) == answer
    assert set(a.asks) == {("g", RECORD, NEXT)}


@in_uvloop
async def test_a_question_is_put_again_until_its_answer_arrives() -> None:
    async with relayed() as (a, b, _, towards_b), running(a, b):
        await b.until_alive()
        lost: list[bytes] = []

        def lose_two_answers(data: bytes) -> bool:
            loses = not isinstance(decode(KEY, data), Heartbeat) and len(lost) < 2
            lost.extend([data] * loses)
            return loses

        towards_b.drops = lose_two_answers
        assert await b.beats.ask("g", RECORD, NEXT, PATIENCE_S) == Granted()
        assert len(lost) == 2


@in_uvloop
async def test_a_question_may_be_put_before_the_nodes_have_met() -> None:
    a, b = pair()
    async with running(b):
        question = asyncio.create_task(b.beats.ask("g", RECORD, NEXT, PATIENCE_S))
        async with running(a):
            assert await question == Granted()


@in_uvloop
async def test_without_an_answer_the_outcome_is_unknown() -> None:
    a, b = pair()
    a.before_answer = asyncio.Event()
    async with running(a, b):
        await b.until_alive()
        assert await b.beats.ask("g", RECORD, NEXT, 0.3) == Unreachable("a does not answer", asked=True)
        assert len(a.asks) == 1, "the question came again while it was being answered"
        a.answer = Unreachable("its disk does not answer")
        a.before_answer.set()
        assert await b.beats.ask("g", RECORD, NEXT, 0.3) == Unreachable("a does not answer", asked=True)


@in_uvloop
async def test_a_peer_that_was_never_met_was_not_asked() -> None:
    _, b = pair()
    async with running(b):
        assert await b.beats.ask("g", RECORD, NEXT, 0.1) == Unreachable("a does not answer", asked=False)


@in_uvloop
async def test_an_answer_under_way_holds_up_no_beat_and_no_other_group() -> None:
    a, b = pair()
    a.before_answer = asyncio.Event()
    async with running(a, b):
        await b.until_alive()
        questions = [asyncio.create_task(b.beats.ask(group, RECORD, NEXT, PATIENCE_S)) for group in ("g", "h")]
        await a.until(lambda: len(a.asks) == 2)
        sent = a.beats.paths()[0].sent
        await b.until(lambda: a.beats.paths()[0].sent > sent + 2 * QUICK.suspect_after_s / QUICK.heartbeat_interval_s)
        assert b.life.alive(now_ns())
        a.before_answer.set()
        assert await asyncio.gather(*questions) == [Granted(), Granted()]


@in_uvloop
async def test_a_replayed_question_is_not_put_again_after_a_newer_one_or_to_another_life() -> None:
    async with relayed() as (a, b, towards_a, _):
        async with running(a, b):
            await b.until_alive()
            await b.beats.ask("g", RECORD, NEXT, PATIENCE_S)
            old = [data for data in towards_a.kept if isinstance(decode(KEY, data), Ask)]
            await b.beats.ask("g", NEXT, NEXT.joined_by("a"), PATIENCE_S)
            asked, dropped = list(a.asks), a.beats.paths()[0].old
            for data in old:
                towards_a.send(data)
            await a.until(lambda: a.beats.paths()[0].old >= dropped + len(old))
            assert a.asks == asked
        a = Node("a", a.paths)
        b = Node("b", b.paths)
        async with running(a, b):
            await a.until_alive()
            for data in old:
                towards_a.send(data)
            await a.until(lambda: a.beats.paths()[0].old >= len(old))
            assert a.asks == []


@in_uvloop
async def test_what_fails_in_answering_is_told_to_the_event_loop() -> None:
    a, b = pair()
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))

    async def fail(*_: object) -> Outcome:
        raise RuntimeError("a bug")

    a.beats = Heartbeats(a.life, KEY, a.paths, a._news, a._on_beat, fail)
    async with running(a, b):
        await b.until_alive()
        assert isinstance(await b.beats.ask("g", RECORD, NEXT, 0.2), Unreachable)
    assert told
    assert str(told[0]["exception"]) == "a bug"
