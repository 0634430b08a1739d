"""Rule 5: when replies may leave; and that those which may not are kept, in their order."""

import asyncio
import socket

import pytest

from stortrends_ha.boottime import now_ns
from stortrends_ha.dataplane.gated import GatedSender
from stortrends_ha.replication.gate import FOREVER_NS, Gate


@pytest.mark.parametrize(
    ("now_ns", "is_open"), [(0, False), (99, False), (100, True), (199, True), (200, False), (FOREVER_NS, False)]
)
def test_gate_is_open_from_its_first_moment_until_its_last(now_ns: int, is_open: bool) -> None:
    assert Gate(100, 200).open_at(now_ns) == is_open


def test_gate_is_closed_at_first_and_can_be_open_for_ever() -> None:
    assert not Gate().open_at(1)
    assert Gate(0, FOREVER_NS).open_at(1 << 62)


class Talk:
    """A gated sender and the other end of its socket."""

    def __init__(self) -> None:
        self.gate = Gate(0, FOREVER_NS)
        self.sock, self.peer = socket.socketpair()
        for end in (self.sock, self.peer):
            end.setblocking(False)
        loop = asyncio.get_running_loop()
        self.sender = GatedSender(loop, self.sock, lambda: None, lambda _why: None, self.gate)

    def received(self) -> bytes:
        try:
            return self.peer.recv(1 << 16)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.sender.close()
        self.sock.close()
        self.peer.close()


async def test_what_is_sent_while_the_gate_is_closed_leaves_in_order_when_it_opens() -> None:
    talk = Talk()
    talk.sender.send([b"a"], 1)
    assert talk.received() == b"a"
    talk.gate.until_ns = now_ns()
    talk.sender.send([b"b", b"c"], 2)
    assert (talk.received(), talk.sender.has_room, talk.sender.is_empty) == (b"", False, False)
    talk.gate.until_ns = FOREVER_NS
    talk.sender.send([b"d"], 1)  # it may not overtake what is held
    assert talk.received() == b""
    talk.sender.let_go()
    assert (talk.received(), talk.sender.has_room, talk.sender.is_empty) == (b"bcd", True, True)
    talk.close()


async def test_gate_that_is_still_closed_lets_nothing_go() -> None:
    talk = Talk()
    talk.gate.not_before_ns = now_ns() + 3600 * 10**9
    talk.sender.send([b"a"], 1)
    talk.sender.let_go()
    assert talk.received() == b""
    talk.close()


async def test_what_is_held_when_the_connection_is_closed_is_forgotten() -> None:
    talk = Talk()
    talk.gate.until_ns = 0
    talk.sender.send([b"a"], 1)
    talk.sender.close()
    talk.gate.until_ns = FOREVER_NS
    talk.sender.let_go()
    talk.sender.send([b"b"], 1)
    assert talk.received() == b""
    talk.close()


async def test_buffers_of_held_replies_may_be_reused() -> None:
    talk = Talk()
    talk.gate.until_ns = 0
    buffer = bytearray(b"abc")
    talk.sender.send([memoryview(buffer)], 3)
    buffer[:] = b"xyz"
    talk.gate.until_ns = FOREVER_NS
    talk.sender.let_go()
    assert talk.received() == b"abc"
    talk.close()
