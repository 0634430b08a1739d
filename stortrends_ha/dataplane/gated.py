"""Rule 5: a client's replies leave through a gate, each checked right before it is sent.

On the hot path: one clock call and two comparisons per send. While the gate is closed replies are kept in their order
and the client is not read from (``has_room``), so what is kept is bounded by what was under way. What has passed and
waits for a slow client needs no second look: it was true when it passed, and the client had asked before.
"""

import asyncio
import socket
import time
from collections.abc import Callable

from stortrends_ha.limits import CLIENT_BACKLOG_BYTES
from stortrends_ha.replication.gate import Gate
from stortrends_ha.replication.interfaces import Buffer

from .sender import Sender

_BOOTTIME = time.CLOCK_BOOTTIME


class GatedSender(Sender):
    """A ``Sender`` behind a gate."""

    __slots__ = ("_clock", "_gate", "_held")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        drained: Callable[[], None],
        lost: Callable[[str], None],
        gate: Gate,
    ) -> None:
        super().__init__(loop, sock, drained, lost)
        self._gate = gate
        self._held: list[bytes] = []
        self._clock = time.clock_gettime_ns

    @property
    def has_room(self) -> bool:
        """Whether more may be made for this client."""
        return self.backlog_bytes <= CLIENT_BACKLOG_BYTES and not self._held

    @property
    def is_empty(self) -> bool:
        """Whether everything has left."""
        return not self.backlog_bytes and not self._held

    def send(self, buffers: list[Buffer], length: int) -> None:
        """Send buffers of together ``length`` bytes, now or when the gate opens."""
        if not self._held and self._gate.open_at(self._clock(_BOOTTIME)):
            Sender.send(self, buffers, length)
        elif not self.closed:
            self._held.append(b"".join(buffers))

    def let_go(self) -> None:
        """Send what was held, if the gate is open."""
        if self._held and self._gate.open_at(self._clock(_BOOTTIME)):
            held, self._held = b"".join(self._held), []
            Sender.send(self, [held], len(held))

    def close(self) -> None:
        """As ``Sender``; what is held is forgotten."""
        self._held.clear()
        super().close()
