"""How fast a resync or a verify may go while clients are served: as fast as they do not feel it much. Pure: times are
given. Here both are called a resync.

The target: the p99 of the latency that clients have is at most ``latency_factor`` times what it is without the resync.
- *Idle* clients feel nothing: no limit.
- *Learning*: for LEARN_S nothing is copied, and the p99 of that time is what clients have without it. So again after
  each RELEARN_S with clients, as what they do may have changed. The median of the last three counts, as a p99 of so
  short a time varies; if the newest is quite another, clients do something else, and it alone counts.
- *Paced*: each PERIOD_S, or later if there are few samples, the rate is multiplied by the square root of what the
  latency is allowed to be over what it was, within bounds. Not AIMD: a rate may be anything from a disk's to that of
  memory, so no step added is right for all; and there is nobody to share with fairly, which is what AIMD is for. The
  root damps it: latency rises ever more steeply with load, and an answer in full proportion would swing.
The rate is never below the minimum: not in any period that clients are paced in, and what the pauses for learning cost
is in it. It grows to at most twice what was used, so that it means something when another bound (link, peer) was met.

If the owner dies, all this is forgotten, and learnt again. Bounds: SAMPLES of one period.
"""

from collections import deque
from collections.abc import Callable
from math import inf, sqrt
from statistics import median

UNLIMITED = 1 << 62
"""Bytes that are no limit."""

IDLE_S = 1.0  # without a request under way: whoever asks a few times a second is not idle
LEARN_S = 0.5  # long enough for some hundred answers of a client that waits for each on a disk
SETTLE_S = 0.05  # at its beginning, which do not count: what was copied before is still under way
RELEARN_S = 10.0
PERIOD_S = 0.25
PERIOD_S_MAX = 1.0
SAMPLES_MIN = 20  # for a change of the rate
SAMPLES = 1024
_LATENCY_S_MAX = 3600.0
_ANOTHER = 3.0  # times
_SHRINK, _GROW, _GROW_OVER_USED = 0.5, 1.5, 2.0
# What is aimed at, of what the target allows more than without the resync: latency goes up and down around that.
_AIM = 0.8
# Less is not told apart: the network and the client itself add as much to what is measured here.
_GRAIN_S = 0.0002


class Pace:
    """Of one group, over all its resyncs. ``min_rate``: bytes a second."""

    def __init__(self, latency_factor: float, min_rate: int) -> None:
        self._aim = 1 + (latency_factor - 1) * _AIM
        self._floor = min_rate * (1 + 1.1 * LEARN_S / RELEARN_S)  # more than that, as calls come late
        self._rate: float = self._floor
        self._bases_s: deque[float] = deque(maxlen=3)
        self._samples_s: deque[float] = deque(maxlen=SAMPLES)
        self._active_s = self._learnt_s = -inf  # when clients were active; when learning ended, last
        self._learns_from_s: float | None = None
        self._period_s = -inf  # when it began
        self._used_bytes = 0  # in it
        self._rest = 0.0  # of a byte
        self._now_s = -inf
        self.idle = True
        self.p99_s = 0.0  # of the newest period

    @property
    def why(self) -> str:
        """Why it does not go faster, a clause; empty without a limit."""
        if self.idle:
            return ""
        if self._learns_from_s is not None:
            return "clients are served first: how fast that is without it is being measured"
        latency = f"p99 {_milliseconds(self.p99_s)}, {_milliseconds(self.base_s)} without it" if self._bases_s else ""
        how = "at the minimum rate" if self._rate <= self._floor else "its rate follows their latency"
        return f"clients are served first{latency and f' ({latency})'}: {how}"

    @property
    def base_s(self) -> float:
        """The p99 that clients have without a resync; 0 if it is not known."""
        return median(self._bases_s) if self._bases_s else 0.0

    def sample(self, latency_s: float) -> None:
        """A client has waited so long for an answer."""
        if latency_s >= 0:
            self._samples_s.append(min(latency_s, _LATENCY_S_MAX))

    def allow(self, now_s: float, used_bytes: int, *, active: bool, waiting_s: float = 0.0) -> int:
        """How many bytes may be copied from now to the next call; ``used_bytes``: how many were since the last one.

        ``active``: a client has, or since then had, a request under way; ``waiting_s``: the oldest that is known to
        wait does so for so long.
        """
        elapsed_s, self._now_s = min(max(0.0, now_s - self._now_s), PERIOD_S), now_s
        self._used_bytes += used_bytes
        if active:
            self._active_s = now_s
        if not active and now_s - self._active_s >= IDLE_S:
            self.idle, self._learns_from_s = True, None
            return UNLIMITED
        if self.idle or (self._learns_from_s is None and now_s - self._learnt_s >= RELEARN_S):
            self._begin(now_s)
        if self._learns_from_s is not None and not self._learnt(now_s, self._learns_from_s):
            return 0
        self._adjust(now_s, waiting_s)
        self._rest += self._rate * elapsed_s
        allowed = int(self._rest)
        self._rest -= allowed
        return allowed

    def _begin(self, now_s: float) -> None:
        """Clients have come, or it is time to learn again what they have without the resync."""
        self.idle = False
        self._learns_from_s = now_s if now_s - self._learnt_s >= RELEARN_S else None
        self._begin_period(now_s)

    def _begin_period(self, now_s: float) -> None:
        self._samples_s.clear()
        self._period_s, self._used_bytes = now_s, 0

    def _learnt(self, now_s: float, from_s: float) -> bool:
        """Whether learning is over."""
        if 0 <= now_s - from_s < SETTLE_S:
            self._samples_s.clear()
        if 0 <= now_s - from_s < LEARN_S:
            return False
        if self._samples_s:
            base_s = max(_p99(self._samples_s), _GRAIN_S)
            if not self.base_s / _ANOTHER <= base_s <= self.base_s * _ANOTHER:
                self._bases_s.clear()
            self._bases_s.append(base_s)
        self._learnt_s, self._learns_from_s = now_s, None
        self._begin_period(now_s)
        return True

    def _adjust(self, now_s: float, waiting_s: float) -> None:
        """At the end of a period: the rate of the next."""
        period_s, samples = now_s - self._period_s, self._samples_s
        if not (period_s >= PERIOD_S and (len(samples) >= SAMPLES_MIN or period_s >= PERIOD_S_MAX)):
            return
        self.p99_s = max(_p99(samples), waiting_s if waiting_s <= _LATENCY_S_MAX else 0.0)
        rate = self._rate
        if self._bases_s and self.p99_s:
            rate *= min(max(sqrt(self._aim * self.base_s / self.p99_s), _SHRINK), _GROW)
        if rate > self._rate:
            rate = max(self._rate, min(rate, _GROW_OVER_USED * self._used_bytes / period_s))
        self._rate = max(rate, self._floor)
        self._begin_period(now_s)


class Probe:
    """Times what clients wait for, one change at a time, while ``on``: from when it was applied to its answer."""

    def __init__(self, clock: Callable[[], float], sample: Callable[[float], None]) -> None:
        """``clock`` gives seconds."""
        self._clock = clock
        self._sample = sample
        self.on = False
        self._began_s: float | None = None
        self._volume = self._number = 0  # of the change that is being timed

    def begin(self, volume: int, number: int) -> None:
        """A change was applied: time it, unless another is being timed."""
        if self.on and self._began_s is None:
            self._volume, self._number, self._began_s = volume, number, self._clock()

    def answered(self, volume: int, number: int) -> None:
        """All changes to a volume up to this one are being answered."""
        if self._began_s is not None and volume == self._volume and number >= self._number:
            began_s, self._began_s = self._began_s, None
            self._sample(self._clock() - began_s)

    @property
    def waiting_s(self) -> float:
        """For how long the change that is being timed has been waiting; 0 without one."""
        return 0.0 if self._began_s is None else self._clock() - self._began_s

    def timed(self, done: Callable[[], None]) -> Callable[[], None]:
        """What to call when something else is done that a client waits for: it calls ``done``."""
        if not self.on:
            return done
        began_s = self._clock()

        def ended() -> None:
            self._sample(self._clock() - began_s)
            done()

        return ended


class RecentRate:
    """Bytes a second over the last SPAN_S, from totals."""

    SPAN_S = 3.0
    _STEP_S = 0.25

    def __init__(self) -> None:
        self._totals: deque[tuple[float, int]] = deque()  # (s, bytes), SPAN_S / _STEP_S of them and two

    def add(self, now_s: float, total_bytes: int) -> None:
        """So many bytes have been done by now."""
        totals = self._totals
        if len(totals) > 1 and now_s - totals[-2][0] < self._STEP_S:
            totals.pop()
        totals.append((now_s, total_bytes))
        while len(totals) > 2 and now_s - totals[1][0] >= self.SPAN_S:
            totals.popleft()

    @property
    def bytes_s(self) -> float:
        """The rate; 0 as long as there is none."""
        if len(self._totals) < 2:
            return 0.0
        (start_s, before), (end_s, after) = self._totals[0], self._totals[-1]
        return (after - before) / (end_s - start_s) if end_s > start_s else 0.0


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.{1 if seconds < 0.01 else 0}f} ms"


def _p99(samples_s: deque[float]) -> float:
    """0 of none."""
    return sorted(samples_s)[(99 * len(samples_s) - 1) // 100] if samples_s else 0.0
