"""The link between two data processes: a TCP connection. In order, until it breaks; a cut network only delays.

An end notices that the other is gone when it reads the end of the stream (the process ended, its host lives), or after
a time of silence: then each end breaks off on its own, at a time of its own.
"""

from collections import deque
from random import Random
from typing import Any, Protocol

from .actor import Actor
from .clock import MS, Clock, S
from .network import Network

_LOOK_NS = 200 * MS


class End(Protocol):
    """A data process, as far as its links go."""

    name: str

    def link_message(self, connection: "Connection", message: Any) -> None:
        """The next message."""

    def link_ended(self, connection: "Connection") -> None:
        """The other end is gone, as far as anybody can tell."""


class _Way:
    """One direction."""

    def __init__(self) -> None:
        self.messages: deque[tuple[int, Any]] = deque()
        self.last_ns = 0
        self.pumping = False
        self.heard_ns = 0


class Connection:
    """Between two ends, each an ``Actor`` and an ``End``."""

    def __init__(self, clock: Clock, random: Random, network: Network, ends: tuple[Any, Any]) -> None:
        self._clock = clock
        self._random = random
        self._network = network
        self.ends: tuple[Any, Any] = ends
        self._open = [True, True]
        self._ways = (_Way(), _Way())  # to the end with that number
        self._patience_ns = [random.randrange(S, 2 * S) for _ in ends]
        for number in (0, 1):
            self._ways[number].heard_ns = clock.now_ns
            clock.after(random.randrange(_LOOK_NS), self._look, number)

    def send(self, sender: Any, message: Any) -> None:
        """The other end gets it, if the connection holds so long."""
        number = 0 if self.ends[1] is sender else 1
        if not self._open[1 - number]:
            return
        way = self._ways[number]
        way.last_ns = max(way.last_ns, self._clock.now_ns + self._network.delay_ns())
        way.messages.append((way.last_ns, message))
        if not way.pumping:
            way.pumping = True
            self._clock.at(way.last_ns, self._pump, number)

    def close(self, closer: Any, *, silently: bool = False) -> None:
        """This end is gone. ``silently``: its host has no power."""
        number = 0 if self.ends[0] is closer else 1
        if self._open[number]:
            if not silently:
                self.send(closer, None)
            self._open[number] = False

    def _pump(self, number: int) -> None:
        way, end = self._ways[number], self.ends[number]
        if not self._open[number]:
            way.messages.clear()
            way.pumping = False
            return
        if self._network.passes(self.ends[1 - number].name, end.name, "link"):
            while way.messages and way.messages[0][0] <= self._clock.now_ns:
                end.event(self._arrived, number, way.messages.popleft()[1])
        else:
            self._clock.after(50 * MS, self._pump, number)
            return
        way.pumping = bool(way.messages)
        if way.messages:
            self._clock.at(way.messages[0][0], self._pump, number)

    def _arrived(self, number: int, message: Any) -> None:
        if not self._open[number]:
            return
        end = self.ends[number]
        if message is None:
            self._open[number] = False
            end.link_ended(self)
        else:
            end.link_message(self, message)

    def _look(self, number: int) -> None:
        """What keep-alives would show; they are not sent one by one."""
        if not self._open[number]:
            return
        me: Actor = self.ends[number]
        other = self.ends[1 - number]
        if not me.alive:
            return
        if (
            other.awake
            and self._open[1 - number]
            and self._network.passes(other.name, self.ends[number].name, "link")
            and self._network.passes(self.ends[number].name, other.name, "link")
        ):
            self._ways[number].heard_ns = self._clock.now_ns
        if self._clock.now_ns - self._ways[number].heard_ns >= self._patience_ns[number]:
            me.event(self._arrived, number, None)
        self._clock.after(_LOOK_NS, self._look, number)
