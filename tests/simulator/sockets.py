"""Sockets of the fake kernel: streams of bytes, in order, until they break. A cut network only delays.

A socket keeps what has come for its process, as a kernel does, also while that is stopped. What is under way when a
process dies may be cut anywhere. A process whose peer's host has lost power hears nothing; it has to notice by itself.
"""

import errno
import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stortrends_ha.replication.interfaces import Buffer

from .clock import MS

if TYPE_CHECKING:
    from .data_process import DataProcess

_RETRANSMIT_NS = 50 * MS


def _error(number: int) -> OSError:
    return OSError(number, errno.errorcode[number])  # Python makes it BlockingIOError, ConnectionResetError, ...


class Socket:
    """One end of a connection, or a listener; what the production code uses of ``socket.socket``."""

    family = socket.AF_INET

    def __init__(self, process: "DataProcess", port: int = 0) -> None:
        self.process = process
        self._world = process.world
        self._fd = self._world.new_number()
        self.port = port
        self.peer: Socket | None = None
        self.waiting: deque[Socket] = deque()  # a listener's: not accepted yet
        self._input = bytearray()
        self._segments: deque[tuple[int, bytes]] = deque()  # under way to the peer; b"": the end
        self._arriving = False
        self._last_ns = 0
        self._under_way = 0
        self._ended = False
        self._reset = False
        self.closed = False
        process.loop.sockets[self._fd] = self

    # --- What the process uses --------------------------------------------------------------------------

    def fileno(self) -> int:
        """Its number."""
        return self._fd

    def setblocking(self, _: bool) -> None:
        """It never blocks."""

    def setsockopt(self, *_: Any) -> None:
        """Nothing of that matters here."""

    def getsockname(self) -> tuple[str, int]:
        """The address of this end."""
        return "192.0.2.1", self.port or 1

    def getpeername(self) -> tuple[str, int]:
        """The address of the other end."""
        return "192.0.2.2", 1024 + self._fd % 60000

    def connect(self, listener: "Socket") -> None:
        """To a process that listens."""
        accepted = Socket(listener.process)
        self.peer, accepted.peer = accepted, self
        listener.offer(accepted)

    def offer(self, accepted: "Socket") -> None:
        """A listener's: somebody has connected."""
        self.waiting.append(accepted)
        self.process.loop.wake(self)

    def accept(self) -> "tuple[Socket, Any]":
        """The next connection."""
        if not self.waiting:
            raise _error(errno.EAGAIN)
        accepted = self.waiting.popleft()
        return accepted, accepted.getpeername()

    def send(self, data: Buffer) -> int:
        """As much as there is room for."""
        self.process.point()
        if self._reset or self.closed or self.peer is None:
            raise _error(errno.ECONNRESET)
        room = self._world.socket_bytes - self._under_way
        if room <= 0:
            raise _error(errno.EAGAIN)
        taken = bytes(data[:room])
        self._transmit(taken)
        self.process.point()
        return len(taken)

    def sendmsg(self, buffers: list[Buffer]) -> int:
        """The same, from several buffers."""
        return self.send(b"".join(buffers))

    def recv(self, length: int) -> bytes:
        """What has come, or a part of it."""
        self.process.point()
        if self._reset:
            raise _error(errno.ECONNRESET)
        if not self._input:
            if self._ended:
                return b""
            raise _error(errno.EAGAIN)
        length = min(length, len(self._input))
        if length > 1 and self._world.random.random() < self._world.cut_share:
            length = self._world.random.randrange(1, length)
        data = bytes(self._input[:length])
        del self._input[:length]
        if self.peer is not None:
            self.peer.taken(length)
        return data

    def recv_into(self, view: memoryview) -> int:
        """The same."""
        data = self.recv(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """What was sent still arrives, then the end."""
        if not self.closed:
            self.closed = True
            self.process.loop.forget(self)
            for accepted in self.waiting:
                accepted.close()
            self._end()

    # --- What the kernel does -------------------------------------------------------------------------

    @property
    def readable(self) -> bool:
        """Whether a read, or an accept, would find something."""
        return bool(self._input or self.waiting or self._ended or self._reset)

    @property
    def writable(self) -> bool:
        """Whether a send would be taken."""
        return self._reset or self._under_way < self._world.socket_bytes

    @property
    def hung_up(self) -> bool:
        """Whether the other end has gone."""
        return self._ended or self._reset

    def taken(self, length: int) -> None:
        """The peer has read so much."""
        self._under_way -= length
        self.process.loop.wake(self)

    def die(self, *, silently: bool) -> None:
        """Its process is gone. ``silently``: with its host."""
        if self.closed:
            return
        self.closed = True
        keep = self._world.random.randint(0, len(self._segments))
        while len(self._segments) > keep:
            self._segments.pop()
        if not silently:
            self._end()

    def _end(self) -> None:
        if self.peer is not None and not self.peer.closed:
            self._transmit(b"")

    def _transmit(self, data: bytes) -> None:
        clock = self._world.clock
        self._under_way += len(data)
        self._last_ns = max(self._last_ns, clock.now_ns + self._delay_ns())
        self._segments.append((self._last_ns, data))
        if not self._arriving:
            self._arriving = True
            clock.at(self._last_ns, self._arrive)

    def _delay_ns(self) -> int:
        return self._world.random.randrange(MS // 10, self._world.link_delay_ns)

    def _passes(self) -> bool:
        assert self.peer is not None
        return self._world.network.passes(self.process.name, self.peer.process.name, "link")

    def _arrive(self) -> None:
        clock, peer = self._world.clock, self.peer
        assert peer is not None
        if self._segments and not self._passes():
            clock.after(_RETRANSMIT_NS, self._arrive)
            return
        while self._segments and self._segments[0][0] <= clock.now_ns:
            data = self._segments.popleft()[1]
            if peer.closed:
                self._under_way = 0
                if peer.process.host.on and data:
                    self._refused()
            else:
                peer.arrived(data)
        self._arriving = bool(self._segments)
        if self._segments:
            clock.at(self._segments[0][0], self._arrive)

    def _refused(self) -> None:
        """The other end is no more, and its kernel says so."""
        assert self.peer is not None
        if not self.closed and self._world.network.passes(self.peer.process.name, self.process.name, "link"):
            self._reset = True
            self.process.loop.wake(self)

    def arrived(self, data: bytes) -> None:
        """Something has come."""
        if data:
            self._input += data
        else:
            self._ended = True
        self.process.loop.arrived(self)


class ClientSocket(Socket):
    """The server's end of a client's connection. ``replied`` gets all that is sent, ``lost`` is called at the end."""

    def __init__(self, process: "DataProcess", replied: Callable[[bytes], None], lost: Callable[[bool], None]) -> None:
        super().__init__(process)
        self._replied = replied
        self._lost = lost

    def send(self, data: Buffer) -> int:
        """The client gets it soon."""
        self.process.point()
        if self._reset or self.closed:
            raise _error(errno.ECONNRESET)
        self._replied(bytes(data))
        return len(data)

    def leave(self) -> None:
        """The client has gone."""
        self.arrived(b"")

    def _end(self) -> None:
        self._lost(False)

    def die(self, *, silently: bool) -> None:
        """Its process is gone."""
        if not self.closed:
            self.closed = True
            self._lost(silently)
