"""The sending side of a non-blocking socket: sends at once, keeps what the network does not take.

On the hot path: one system call per batch, and no copy unless the socket is full. The caller may reuse its
buffers when ``send`` returns: what was not taken has been copied. The caller bounds the backlog by looking
at ``backlog_bytes`` before it makes more.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable

from stortrends_ha.replication.interfaces import Buffer

_BUFFERS_PER_CALL = 1000  # the kernel takes 1024 (UIO_MAXIOV)


class Sender:
    """Sends on ``sock``; calls ``drained`` when a backlog is gone and ``lost`` when the connection is."""

    __slots__ = ("_backlog", "_drained", "_fd", "_loop", "_lost", "_sock", "backlog_bytes", "closed")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        drained: Callable[[], None],
        lost: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._drained = drained
        self._lost = lost
        self._backlog: deque[Buffer] = deque()
        self.backlog_bytes = 0
        self.closed = False

    def send(self, buffers: list[Buffer], length: int) -> None:
        """Send buffers of together ``length`` bytes."""
        if self.closed:
            return
        if len(buffers) > _BUFFERS_PER_CALL:
            buffers = [b"".join(buffers)]
        sent = 0
        if not self.backlog_bytes:
            try:
                sent = self._sock.sendmsg(buffers) if len(buffers) > 1 else self._sock.send(buffers[0])
            except BlockingIOError:
                pass
            except OSError as e:
                self._fail(e)
                return
            if sent == length:
                return
            self._loop.add_writer(self._fd, self._on_writable)
        self._keep(buffers, sent)
        self.backlog_bytes += length - sent

    def _keep(self, buffers: list[Buffer], sent: int) -> None:
        for buffer in buffers:
            if sent < len(buffer):
                self._backlog.append(bytes(buffer[sent:]) if sent or not isinstance(buffer, bytes) else buffer)
            sent = max(0, sent - len(buffer))

    def _on_writable(self) -> None:
        backlog = self._backlog
        try:
            sent = self._sock.sendmsg([backlog[i] for i in range(min(len(backlog), 64))])
        except BlockingIOError:
            return
        except OSError as e:
            self._fail(e)
            return
        self.backlog_bytes -= sent
        while sent:
            first = backlog.popleft()
            if sent < len(first):
                backlog.appendleft(memoryview(first)[sent:])
            sent -= min(sent, len(first))
        if not backlog:
            self._loop.remove_writer(self._fd)
            self._drained()

    def _fail(self, error: OSError) -> None:
        # Told later: whoever is sending is in the middle of something.
        self.close()
        self._loop.call_soon(self._lost, error.strerror or str(error))

    def close(self) -> None:
        """Send no more and forget the backlog. The socket itself belongs to the caller."""
        if not self.closed:
            self.closed = True
            if self.backlog_bytes:
                self._loop.remove_writer(self._fd)
            self._backlog.clear()
            self.backlog_bytes = 0
