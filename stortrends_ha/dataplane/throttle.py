"""The pace of a group's jobs, resync and verify: what clients feel goes in, what may be read comes out.

While a job runs, each TICK_S: the bytes of the next tick are allowed, and the stream is pumped. Without one there is no
timer and no probe. A change is timed by ``Probe`` in the primary, a read from the disk in ``nbd_reads``. A read of
the page cache waits for nothing but its turn in the event loop, so that is timed, once a tick, if there are such.

Bounds: one timer; one turn of the loop timed at a time.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from stortrends_ha.config import Limits
from stortrends_ha.replication.pace import Pace, Probe, RecentRate
from stortrends_ha.replication.primary import Primary

# At most so many bytes are read in one go as are allowed for this time: clients wait that long, so it is short.
TICK_S = 0.01


class Job(Protocol):
    """What is paced."""

    budget_bytes: int  # that may be read before more is allowed
    done_bytes: int
    total_bytes: int
    copied_bytes: int


class Throttle:
    """Of an owner's jobs, one after the other. Give ``probe`` to the primary, then ``attach`` it."""

    def __init__(self, limits: Limits) -> None:
        self._loop = asyncio.get_running_loop()
        self._pace = Pace(limits.resync_latency_factor, limits.resync_min_rate)
        self.probe = Probe(time.monotonic, self._pace.sample)
        self._primary: Primary
        self._requests: Callable[[], tuple[int, int]]
        self._job: Job | None = None  # the one that is being paced
        self._allowed_bytes = 0
        self._requests_before = 0
        self._recent = RecentRate()
        self._timer: asyncio.TimerHandle | None = None

    def attach(self, primary: Primary, requests: Callable[[], tuple[int, int]]) -> None:
        """``requests``: how many of clients have been taken so far, and how many are under way."""
        self._primary, self._requests = primary, requests
        primary.job_begun = self._begun

    def _begun(self) -> None:
        self.stop()
        assert self._primary.job is not None
        self._job, self._recent = self._primary.job, RecentRate()
        self.probe.on = True
        self._allowed_bytes = self._job.budget_bytes = 0
        self._requests_before, _ = self._requests()
        self._allow()
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def stop(self) -> None:
        """Nothing is read any more."""
        self.probe.on, self._job = False, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        if self._job is None or self._primary.job is not self._job:
            self.stop()
            return
        self._timer = self._loop.call_later(TICK_S, self._tick)
        self._allow()
        self._primary.pump()

    def _allow(self) -> None:
        job = self._job
        assert job is not None
        taken, under_way = self._requests()
        active = under_way > 0 or taken != self._requests_before
        if taken != self._requests_before and not self.probe.waiting_s:
            self._loop.call_soon(self.probe.timed(_nothing))
        self._requests_before = taken
        now_s, used_bytes = time.monotonic(), self._allowed_bytes - job.budget_bytes
        allowed = self._pace.allow(now_s, used_bytes, active=active, waiting_s=self.probe.waiting_s)
        job.budget_bytes = self._allowed_bytes = min(job.budget_bytes, 0) + allowed
        self._recent.add(now_s, job.done_bytes)

    # --- Status -------------------------------------------------------------------------------

    def status(self, job: Job | None) -> dict[str, Any] | None:
        """How far a job is; None without one."""
        if job is None:
            return None
        return {
            "done_bytes": job.done_bytes,
            "total_bytes": job.total_bytes,
            "copied_bytes": job.copied_bytes,
            "rate": self._recent.bytes_s,
            "why": self._why(job),
        }

    def _why(self, job: Job) -> str:
        """What keeps it from going faster at this moment."""
        resync = self._primary.resync
        paced = job.budget_bytes <= 0 and (resync is None or resync.ending is None)
        return (self._pace.why if paced else "") or self._primary.job_waits or self._pace.why


def _nothing() -> None:
    """Only how long it takes to get here counts."""
