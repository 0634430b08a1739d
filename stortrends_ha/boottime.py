"""The clock of leases: it goes on while the machine sleeps, and nobody can set it (rule 5)."""

import time


def now_ns() -> int:
    """CLOCK_BOOTTIME, in nanoseconds."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
