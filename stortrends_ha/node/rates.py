"""Reads and writes per second, from the totals in a group's status messages.

Invariant: a rate is measured over at least `SPAN_S`, however often status messages come; memory is bounded
because samples closer than `STEP_S` replace each other.
"""

from collections import deque
from collections.abc import Mapping
from typing import TypedDict

from stortrends_ha.node.messages import Status, VolumeCounters

SPAN_S = 2.0
STEP_S = 0.5
MIB = 1 << 20


class VolumeRates(TypedDict):
    """The throughput of one volume."""

    read_iops: float
    read_mib_s: float
    write_iops: float
    write_mib_s: float


NO_RATES: VolumeRates = {"read_iops": 0.0, "read_mib_s": 0.0, "write_iops": 0.0, "write_mib_s": 0.0}


class Rates:
    """The throughput of a group's volumes over the last seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, dict[str, VolumeCounters]]] = deque()

    def add(self, now_s: float, status: Status) -> None:
        """A status message came."""
        samples = self._samples
        if len(samples) > 1 and samples[-1][0] - samples[-2][0] < STEP_S:
            samples.pop()
        samples.append((now_s, {name: volume["counters"] for name, volume in status["volumes"].items()}))
        while len(samples) > 2 and now_s - samples[1][0] >= SPAN_S:
            samples.popleft()

    def rates(self) -> Mapping[str, VolumeRates]:
        """The rates of each volume that both the first and the last sample know."""
        if len(self._samples) < 2:
            return {}
        (start_s, before), (end_s, after) = self._samples[0], self._samples[-1]
        if end_s - start_s < STEP_S:
            return {}
        return {name: _rates(before[name], after[name], end_s - start_s) for name in after if name in before}


def _rates(before: VolumeCounters, after: VolumeCounters, seconds: float) -> VolumeRates:
    return {
        "read_iops": round((after["reads"] - before["reads"]) / seconds, 1),
        "read_mib_s": round((after["read_bytes"] - before["read_bytes"]) / seconds / MIB, 2),
        "write_iops": round((after["writes"] - before["writes"]) / seconds, 1),
        "write_mib_s": round((after["written_bytes"] - before["written_bytes"]) / seconds / MIB, 2),
    }
