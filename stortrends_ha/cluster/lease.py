"""Rule 5 in numbers: how long an owner may answer, and how long its successor must wait. Pure.

An owner holds a lease until *send time of its newest beat that the peer acknowledged with a promise* + lease, on its
own clock. The peer, once it no longer promises, waits until *receive time of the newest beat that it acknowledged with
a promise* + lease * (1 + drift), on its own clock. A beat is received after it was sent, so the wait begins no earlier
than the lease, and it ends no earlier as long as neither clock runs faster than the other by more than the drift.

The clock is CLOCK_BOOTTIME: it goes on while a machine is suspended. It does not go on while a hypervisor pauses a
virtual machine: a pause longer than the drift allows breaks the assumption for reads (acknowledged writes stay safe,
rules 1-4 need no clock); who pauses machines fences them first.
"""

from dataclasses import dataclass

_S_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations in seconds; the same on both nodes (the configuration says so)."""

    heartbeat_interval_s: float = 0.1  # shorter: more packets; longer: the two below grow with it
    suspect_after_s: float = 0.7  # silence of the peer; shorter: a few lost packets or a busy host move groups
    lease_s: float = 1.2  # longer: a takeover takes as much longer; shorter: reads pause when beats are late
    clock_drift: float = 0.1  # fraction; real clocks drift by less than 0.001, even when being slewed

    def __post_init__(self) -> None:
        assert self.heartbeat_interval_s > 0, "beats need an interval"
        assert self.suspect_after_s >= 3 * self.heartbeat_interval_s, "two lost beats must not look like a dead peer"
        # So an owner that misses its peer asks the arbiter while it still has its lease.
        assert self.lease_s > self.suspect_after_s + 2 * self.heartbeat_interval_s, "the lease must outlast suspicion"
        assert 0 <= self.clock_drift < 1, "the drift is a fraction"

    @property
    def interval_ns(self) -> int:
        """Between two beats."""
        return round(self.heartbeat_interval_s * _S_NS)

    @property
    def suspect_after_ns(self) -> int:
        """Silence after which a peer is suspected."""
        return round(self.suspect_after_s * _S_NS)

    @property
    def lease_ns(self) -> int:
        """How long an acknowledged beat lets its sender answer."""
        return round(self.lease_s * _S_NS)


def lease_until_ns(sent_ns: int, timing: Timing) -> int:
    """When the lease ends that the acknowledgement of the beat sent then gives, on the owner's clock."""
    return sent_ns + timing.lease_ns


def may_serve_from_ns(last_promise_heard_ns: int, timing: Timing) -> int:
    """When no lease that this node gave can hold any more, on its own clock: from then on it may answer in its stead.

    ``last_promise_heard_ns`` is when it received the newest beat that it acknowledged with a promise
    (``Membership.last_promise_heard_ns``). The owner had sent that beat before; its clock may be slower than ours by
    the drift, so its lease lasts at most lease * (1 + drift) of our time.
    """
    return last_promise_heard_ns + timing.lease_ns + _rounded_up(timing.lease_ns * timing.clock_drift)


def _rounded_up(duration_ns: float) -> int:
    return int(duration_ns) + 1
