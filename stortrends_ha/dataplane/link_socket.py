"""The link's connection between two data processes: opening talk, then the stream.

Opening is rare and plain asyncio. The stream is on the hot path: one ``recv_into`` a large buffer, one call of
the receiver, what it did not use stays where it is.

Bounds: input LINK_BUFFER_BYTES; output LINK_BACKLOG_BYTES and one batch, held by the primary (a secondary's
answers are bounded by what the owner has under way). Silence for ``timeout_s`` ends the connection.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import TypeVar

from stortrends_ha.errors import PeerFailedError, ProtocolError, StorageError
from stortrends_ha.limits import LINK_BUFFER_BYTES
from stortrends_ha.replication.opening import Talk

from .sender import Sender

# Move the unfinished rest to the front when less than this is free behind it.
_ROOM_BYTES = LINK_BUFFER_BYTES // 2


T = TypeVar("T")


async def carry_out(sock: socket.socket, talk: Talk[T]) -> T:
    """Hold the opening talk of a session (``replication.opening``). Raises what it raises, and OSError."""
    loop = asyncio.get_running_loop()
    received = b""
    try:
        step = next(talk)
        while True:
            if isinstance(step, int):
                received = await _receive_exactly(sock, step)
            else:
                await loop.sock_sendall(sock, step)
            step = talk.send(received)
    except StopIteration as end:
        result: T = end.value
        return result


async def _receive_exactly(sock: socket.socket, length: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < length:
        piece = await loop.sock_recv(sock, length - len(data))
        if not piece:
            raise ConnectionResetError("the peer closed the connection")
        data += piece
    return bytes(data)


class LinkSocket:
    """A connection whose stream runs. ``receiver(view, end)`` returns how much it used."""

    def __init__(
        self,
        sock: socket.socket,
        drained: Callable[[], None],
        lost: Callable[[str], None],
        timeout_s: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._lost = lost
        self._timeout_s = timeout_s
        self._sender = Sender(self._loop, sock, drained, self.close)
        self.send = self._sender.send
        self._buffer = memoryview(bytearray(LINK_BUFFER_BYTES))
        self._start = self._end = 0
        self._receiver: Callable[[memoryview, int], int] = lambda _view, _end: 0
        self._behind: Callable[[], bool] = lambda: False
        self._heard_s = self._loop.time()
        self._watch = self._loop.call_later(timeout_s, self._check_silence)
        self.closed = False
        self.bad_input = False

    @property
    def backlog_bytes(self) -> int:
        """What the network has not yet taken."""
        return self._sender.backlog_bytes

    def run(self, receiver: Callable[[memoryview, int], int], behind: Callable[[], bool] = lambda: False) -> None:
        """Start the stream. ``behind`` tells, after the receiver, whether it wants another turn before more input."""
        self._receiver, self._behind = receiver, behind
        self._loop.add_reader(self._sock.fileno(), self._on_readable)

    def _on_readable(self) -> None:
        start, end, buffer = self._start, self._end, self._buffer
        if start == end:
            start = end = 0
        elif LINK_BUFFER_BYTES - end < _ROOM_BYTES:
            buffer[: end - start] = buffer[start:end]
            start, end = 0, end - start
        try:
            count = self._sock.recv_into(buffer[end:])
        except (BlockingIOError, InterruptedError):
            return
        except OSError as e:
            self.close(e.strerror or str(e))
            return
        if not count:
            self.close("the peer closed the connection")
            return
        self._start, self._end = start, end + count
        self._use_input()
        if self._start != self._end and self._behind() and not self.closed:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Another turn for a receiver that is behind; then input again."""
        if self.closed:
            return
        self._use_input()
        if self.closed:
            return
        if self._start != self._end and self._behind():
            self._loop.call_soon(self._go_on)
        else:
            self._loop.add_reader(self._sock.fileno(), self._on_readable)

    def _use_input(self) -> None:
        self._heard_s = self._loop.time()
        start = self._start
        try:
            self._start += self._receiver(self._buffer[start:] if start else self._buffer, self._end - start)
        except ProtocolError as e:
            self.bad_input = True
            self.close(f"bad input: {e}")
        except (PeerFailedError, StorageError) as e:
            self.close(str(e))

    def _check_silence(self) -> None:
        silent_s = self._loop.time() - self._heard_s
        if silent_s >= self._timeout_s:
            self.close(f"the peer was silent for {silent_s:.1f} s")
        elif not self.closed:
            self._watch = self._loop.call_later(self._timeout_s - silent_s, self._check_silence)

    def close(self, why: str) -> None:
        """End it at once; nothing more is received."""
        if self.closed:
            return
        self.closed = True
        self._watch.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sender.close()
        self._sock.close()
        self._lost(why)
