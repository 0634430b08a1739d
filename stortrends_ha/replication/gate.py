"""Rule 5: when an owner may answer its clients. Pure.

Every reply in the transmission phase passes the gate after the I/O, right before it is sent: so what a read found was
still true at a moment at which nobody else could own the group. All times are CLOCK_BOOTTIME in nanoseconds, which goes
on while a host sleeps: a process that was stopped, or a host that was suspended, finds the gate closed.
"""

FOREVER_NS = 1 << 63


class Gate:
    """Open from ``not_before_ns`` on, until ``until_ns``; closed at first."""

    __slots__ = ("not_before_ns", "until_ns")

    def __init__(self, not_before_ns: int = 0, until_ns: int = 0) -> None:
        self.not_before_ns = not_before_ns  # when nobody else can answer any more (a takeover waits for the old lease)
        self.until_ns = until_ns  # the end of the lease; FOREVER_NS while the record has the owner alone

    def open_at(self, now_ns: int) -> bool:
        """Whether a reply may be sent."""
        return self.not_before_ns <= now_ns < self.until_ns
