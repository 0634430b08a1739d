"""Time: one queue of events. Events at the same time happen in the order in which they were asked for."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

_AT_ONCE = 100_000
US = 1_000
MS = 1_000_000
S = 1_000 * MS


class Clock:
    """``now_ns``: the true time, which nobody in the cluster knows."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._queue: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def after(self, delay_ns: int, do: Callable[..., None], *arguments: Any) -> None:
        """Do it then."""
        self.at(self.now_ns + delay_ns, do, *arguments)

    def at(self, when_ns: int, do: Callable[..., None], *arguments: Any) -> None:
        """Do it then, or now if that is over."""
        self._number += 1
        heappush(self._queue, (max(when_ns, self.now_ns), self._number, do, arguments))

    def run_until(self, end: Callable[[], bool], until_ns: int) -> bool:
        """Let time pass until ``end()`` or the moment; whether it was ``end()``."""
        queue, at_once = self._queue, 0
        while queue and queue[0][0] <= until_ns:
            now_ns, _, do, arguments = heappop(queue)
            at_once = at_once + 1 if now_ns == self.now_ns else 0
            assert at_once < _AT_ONCE, "endless events at one moment"
            self.now_ns = now_ns
            do(*arguments)
            if end():
                return True
        self.now_ns = until_ns
        return False


class NodeClock:
    """CLOCK_BOOTTIME of a host: counts from its boot, a little too fast or too slow."""

    def __init__(self, clock: Clock, rate: float) -> None:
        self._clock = clock
        self._rate = rate
        self._boot_ns = clock.now_ns

    def now_ns(self) -> int:
        """What the host reads."""
        return int((self._clock.now_ns - self._boot_ns) * self._rate)

    def true_ns(self, own_ns: int) -> int:
        """The true time at which the host will read this, or a little later."""
        return self._boot_ns + int(own_ns / self._rate) + 2
