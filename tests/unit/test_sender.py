"""The sending side of a socket, over real socket pairs with tiny buffers: all of it arrives, in order, once."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from stortrends_ha.dataplane.sender import Sender
from stortrends_ha.replication.interfaces import Buffer

NOISE = bytes(n * n % 251 for n in range(1 << 16)) * 8


class Talk:
    """A sender, the other end of its socket, and what it told its owner."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.sock, self.peer = socket.socketpair()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's minimum
        for end in (self.sock, self.peer):
            end.setblocking(False)
        self.drained = 0
        self.lost: asyncio.Future[str] = self.loop.create_future()
        self.sender = Sender(self.loop, self.sock, self._drained, self.lost.set_result)

    def _drained(self) -> None:
        assert self.sender.backlog_bytes == 0
        self.drained += 1

    async def receive(self, length: int, step: int = 1 << 20) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = await self.loop.sock_recv(self.peer, min(step, length - len(data)))
            assert piece
            data += piece
        return bytes(data)

    def fill(self) -> int:
        """Send until there is a backlog; return how much was sent in all."""
        sent = 0
        while not self.sender.backlog_bytes:
            self.sender.send([NOISE[:10_000]], 10_000)
            sent += 10_000
        return sent

    def close(self) -> None:
        self.sender.close()
        self.sock.close()
        self.peer.close()


def run(test: Callable[[Talk], Awaitable[None]], loop: str = "asyncio") -> None:
    async def whole() -> None:
        talk = Talk()
        try:
            async with asyncio.timeout(30):
                await test(talk)
        finally:
            talk.close()

    factory = uvloop.new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(whole())


both_loops = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


def cut(total: bytes, sizes: list[int]) -> Iterator[list[bytes]]:
    """The bytes in messages of a few buffers each; some of them are empty."""
    at = 0
    for number, size in enumerate(sizes):
        data = total[at : at + size]
        at += size
        count = number % 4 + 1
        yield [data[n * size // count : (n + 1) * size // count] for n in range(count)]


sizes_sent = st.lists(st.one_of(st.integers(1, 200), st.integers(1, 20_000), st.just(60_000)), max_size=20)


@settings(deadline=None, max_examples=60)
@given(sizes_sent, st.lists(st.integers(0, 30_000), max_size=20), st.sampled_from([100, 5000, 1 << 20]))
def test_random_sizes_arrive_in_order(sizes: list[int], reads: list[int], step: int) -> None:
    total = NOISE[: sum(sizes)]

    async def test(talk: Talk) -> None:
        received, sent = b"", 0
        for number, buffers in enumerate(cut(total, sizes)):
            length = sum(map(len, buffers))
            talk.sender.send([*buffers], length)
            sent += length
            if number < len(reads):
                received += await talk.receive(min(reads[number], sent - len(received)), step)
        received += await talk.receive(len(total) - len(received), step)
        assert received == total
        assert talk.sender.backlog_bytes == 0

    run(test)


@both_loops
def test_more_than_the_network_takes_is_kept_and_counted_and_leaves_later(loop: str) -> None:
    async def test(talk: Talk) -> None:
        sent = talk.fill()
        talk.sender.send([b"more", b"", b"and more"], 12)
        taken = sent + 12 - talk.sender.backlog_bytes
        assert 0 < taken < sent
        assert talk.drained == 0
        expected = NOISE[:10_000] * (sent // 10_000) + b"moreand more"
        assert await talk.receive(sent + 12) == expected
        assert (talk.drained, talk.sender.backlog_bytes) == (1, 0)
        talk.sender.send([b"again"], 5)
        assert await talk.receive(5) == b"again"

    run(test, loop)


def test_nothing_is_kept_or_told_if_the_network_takes_it_at_once() -> None:
    async def test(talk: Talk) -> None:
        talk.sender.send([b"ab", b"c"], 3)
        assert talk.sender.backlog_bytes == 0
        assert await talk.receive(3) == b"abc"
        assert talk.drained == 0

    run(test)


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_buffers_may_be_reused_at_once(kind: type) -> None:
    async def test(talk: Talk) -> None:
        own = bytearray(NOISE[:200_000])
        buffer: Buffer = own if kind is bytearray else memoryview(own)
        talk.sender.send([buffer[:1000], buffer[1000:]], len(own))
        assert talk.sender.backlog_bytes
        own[:] = bytes(len(own))
        assert await talk.receive(len(own)) == NOISE[:200_000]

    run(test)


@pytest.mark.parametrize("count", [999, 1000, 1001, 1024, 1025, 5000])
@pytest.mark.parametrize("behind", [False, True])
def test_more_buffers_than_one_system_call_takes(count: int, behind: bool) -> None:
    async def test(talk: Talk) -> None:
        first = talk.fill() if behind else 0
        talk.sender.send([NOISE[n : n + 7] for n in range(count)], 7 * count)
        await talk.receive(first)
        assert await talk.receive(7 * count) == b"".join(NOISE[n : n + 7] for n in range(count))
        assert talk.sender.backlog_bytes == 0

    run(test)


def test_drained_may_send_more() -> None:
    async def test(talk: Talk) -> None:
        def more() -> None:
            if talk.drained < 3:
                talk.drained += 1
                talk.sender.send([NOISE[:100_000]], 100_000)

        talk.sender = Sender(talk.loop, talk.sock, more, talk.lost.set_result)
        sent = talk.fill()
        received = await talk.receive(sent + 300_000)
        assert received == NOISE[:10_000] * (sent // 10_000) + NOISE[:100_000] * 3

    run(test)


# --- The end ----------------------------------------------------------------------------------


@both_loops
def test_peer_that_has_gone_is_told_later_and_once(loop: str) -> None:
    async def test(talk: Talk) -> None:
        talk.peer.close()
        talk.sender.send([b"x"], 1)
        assert not talk.lost.done()  # who sends is in the middle of something
        talk.sender.send([b"y"], 1)
        assert await talk.lost in ("Broken pipe", "Connection reset by peer")
        assert (talk.sender.closed, talk.sender.backlog_bytes) == (True, 0)

    run(test, loop)


@both_loops
def test_peer_that_goes_while_there_is_a_backlog_is_told(loop: str) -> None:
    async def test(talk: Talk) -> None:
        talk.fill()
        talk.peer.close()
        assert await talk.lost in ("Broken pipe", "Connection reset by peer")
        assert talk.sender.backlog_bytes == 0
        assert talk.drained == 0

    run(test, loop)


@both_loops
def test_after_close_nothing_is_sent_or_told(loop: str) -> None:
    async def test(talk: Talk) -> None:
        sent = talk.fill()
        left = talk.sender.backlog_bytes
        talk.sender.close()
        talk.sender.close()
        talk.sender.send([b"x"], 1)
        talk.sock.close()
        received = await talk.receive(sent - left)
        assert await talk.loop.sock_recv(talk.peer, 1) == b""
        assert received == (NOISE[:10_000] * (sent // 10_000))[: sent - left]
        assert (talk.drained, talk.lost.done(), talk.sender.backlog_bytes) == (0, False, 0)

    run(test, loop)
