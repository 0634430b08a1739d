"""The networks: which way is cut now, and how long a message takes."""

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

from .clock import MS, Clock, S

CHANNELS = ("beat0", "beat1", "link", "arbiter")


Way = tuple[str, str, str]
"""Source, target, channel."""


class Quality(NamedTuple):
    """What becomes of the datagrams of one way: shares of them."""

    loss: float = 0.0
    twice: float = 0.0
    late: float = 0.0  # by up to ``_LATE_NS``


_LATE_NS = 2 * S
_GOOD = Quality()


class Network:
    """Each direction of each channel can be cut, several times over, and be bad for datagrams."""

    def __init__(self, clock: Clock, random: Random) -> None:
        self._clock = clock
        self._random = random
        self._cuts: Counter[Way] = Counter()
        self._bad: dict[Way, Quality] = {}

    def cut(self, source: str, target: str, channel: str) -> None:
        """Nothing gets through this way."""
        self._cuts[source, target, channel] += 1

    def heal(self, source: str, target: str, channel: str) -> None:
        """Undo one ``cut``."""
        self._cuts[source, target, channel] -= 1

    def make_bad(self, ways: Sequence[Way], quality: Quality) -> None:
        """For datagrams."""
        self._bad.update(dict.fromkeys(ways, quality))

    def make_good(self) -> None:
        """All ways."""
        self._bad.clear()

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
        quality, random = self._bad.get((source, target, channel), _GOOD), self._random.random
        if not self.passes(source, target, channel) or (quality.loss and random() < quality.loss):
            return
        for _ in range(2 if quality.twice and random() < quality.twice else 1):
            late = quality.late and random() < quality.late
            delay_ns = self._random.randrange(_LATE_NS) if late else self.delay_ns()
            self._clock.after(delay_ns, self._arrive, source, target, channel, deliver, arguments)

    def _arrive(
        self, source: str, target: str, channel: str, deliver: Callable[..., None], arguments: tuple[Any, ...]
    ) -> None:
        if self.passes(source, target, channel):
            deliver(*arguments)
