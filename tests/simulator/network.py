"""The networks: which way is cut now, and how long a message takes."""

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

from .clock import MS, Clock, S

CHANNELS = ("beat0", "beat1", "link", "arbiter")


class Network:
    """Each direction of each channel can be cut, several times over; ``loss`` etc. hold for datagrams everywhere."""

    def __init__(self, clock: Clock, random: Random) -> None:
        self._clock = clock
        self._random = random
        self._cuts: Counter[tuple[str, str, str]] = Counter()
        self.loss = 0.0
        self.twice = 0.0
        self.late = 0.0  # the share of datagrams that take up to ``late_ns``
        self.late_ns = 2 * S
        self.held: list[Callable[[], None]] = []  # replays: datagrams kept by somebody

    def cut(self, source: str, target: str, channel: str) -> None:
        """Nothing gets through this way."""
        self._cuts[source, target, channel] += 1

    def heal(self, source: str, target: str, channel: str) -> None:
        """Undo one ``cut``."""
        self._cuts[source, target, channel] -= 1

    def passes(self, source: str, target: str, channel: str) -> bool:
        """Whether something gets through this way."""
        return self._cuts[source, target, channel] <= 0

    def joins(self, one: str, other: str, channel: str) -> bool:
        """Whether both ways are open."""
        return self.passes(one, other, channel) and self.passes(other, one, channel)

    def delay_ns(self) -> int:
        """Of a message that is neither lost nor late."""
        return self._random.randrange(MS // 10, 2 * MS)

    def datagram(self, source: str, target: str, channel: str, deliver: Callable[..., None], *arguments: Any) -> None:
        """It may be lost, late, overtaken, and come twice."""
        if not self.passes(source, target, channel) or (self.loss and self._random.random() < self.loss):
            return
        if self.twice and self._random.random() < self.twice:
            self._clock.after(self.datagram_delay_ns(), self._arrive, source, target, channel, deliver, arguments)
        self._clock.after(self.datagram_delay_ns(), self._arrive, source, target, channel, deliver, arguments)

    def datagram_delay_ns(self) -> int:
        """Of one datagram."""
        if self.late and self._random.random() < self.late:
            return self._random.randrange(self.late_ns)
        return self.delay_ns()

    def _arrive(
        self, source: str, target: str, channel: str, deliver: Callable[..., None], arguments: tuple[Any, ...]
    ) -> None:
        if self.passes(source, target, channel):
            deliver(*arguments)
