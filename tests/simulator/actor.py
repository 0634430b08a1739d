"""Something that runs on a host: it gets its events one by one, can be stopped (SIGSTOP), and dies."""

from collections import deque
from collections.abc import Callable
from typing import Any

from .clock import Clock

_SOCKET_BUFFER = 400  # what waits for a process that is stopped; datagrams that do not fit are lost


class Actor:
    """A process, seen from outside."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.alive = True
        self._pauses = 0
        self._waiting: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()

    @property
    def paused(self) -> bool:
        """Whether it is stopped."""
        return self._pauses > 0

    @property
    def awake(self) -> bool:
        """Whether it can do anything now."""
        return self.alive and not self._pauses

    def pause(self) -> None:
        """SIGSTOP."""
        self._pauses += 1

    def go_on(self) -> None:
        """SIGCONT: everything that has come meanwhile is there at once."""
        self._pauses -= 1
        while self._waiting and self.awake:
            do, arguments = self._waiting.popleft()
            do(*arguments)

    def event(self, do: Callable[..., None], *arguments: Any) -> None:
        """Something happens to this process."""
        if not self.alive:
            return
        if self._pauses or self._waiting:
            self._waiting.append((do, arguments))
            return
        do(*arguments)

    def datagram(self, do: Callable[..., None], *arguments: Any) -> None:
        """As an event, but not kept in any number while it is stopped."""
        if len(self._waiting) < _SOCKET_BUFFER:
            self.event(do, *arguments)

    def first(self, do: Callable[..., None], *arguments: Any) -> None:
        """It was stopped in the middle of something: the rest comes before all that waits."""
        self._waiting.appendleft((do, arguments))

    def after(self, delay_ns: int, do: Callable[..., None], *arguments: Any) -> None:
        """It does this in a while, if it still lives."""
        self._clock.after(delay_ns, self.event, do, *arguments)


class Pipe:
    """In order, each with a delay of its own: what one process says to another on the same host."""

    def __init__(self, clock: Clock, to: Actor) -> None:
        self._clock = clock
        self._to = to
        self._last_ns = 0

    def send(self, delay_ns: int, do: Callable[..., None], *arguments: Any) -> None:
        """It arrives then, but not before what was sent earlier."""
        self._last_ns = max(self._last_ns, self._clock.now_ns + delay_ns)
        self._clock.at(self._last_ns, self._to.event, do, *arguments)
