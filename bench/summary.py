"""From measurements to the rows of the table and the plot. Pure.

Invariant: a ratio is taken within a round, where all servers were measured in turn, so that the drift of a
shared machine does not enter it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from bench.measure import Measurement


@dataclass(frozen=True, slots=True)
class Ratio:
    """Our IOPS over a rival's: the median of the rounds, and their range."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of all rounds of one workload on one server."""

    workload: str
    server: str
    iops: float
    mib_s: float
    mean_us: float
    p99_us: float
    cpu_s_per_kop: float | None
    ratio: Ratio | None  # None for our own row, and where no round has both


def summarize(measurements: Sequence[Measurement], ours: str) -> list[Row]:
    """One row for each workload and server, in the order in which they were first measured."""
    workloads = dict.fromkeys(m.workload for m in measurements)
    servers = sorted(dict.fromkeys(m.server for m in measurements), key=lambda name: name != ours)
    rows = []
    for workload in workloads:
        of_ours = [m for m in measurements if (m.workload, m.server) == (workload, ours)]
        for server in servers:
            of_server = [m for m in measurements if (m.workload, m.server) == (workload, server)]
            if of_server:
                ratio = None if server == ours else _ratio(of_ours, of_server)
                rows.append(_row(of_server, ratio))
    return rows


def _row(measurements: Sequence[Measurement], ratio: Ratio | None) -> Row:
    cpu = [m.cpu_s_per_kop for m in measurements if m.cpu_s_per_kop is not None]
    return Row(
        workload=measurements[0].workload,
        server=measurements[0].server,
        iops=median(m.iops for m in measurements),
        mib_s=median(m.mib_s for m in measurements),
        mean_us=median(m.mean_us for m in measurements),
        p99_us=median(m.p99_us for m in measurements),
        cpu_s_per_kop=median(cpu) if cpu else None,
        ratio=ratio,
    )


def _ratio(ours: Iterable[Measurement], rival: Iterable[Measurement]) -> Ratio | None:
    rival_iops = {m.round: m.iops for m in rival}
    ratios = [m.iops / rival_iops[m.round] for m in ours if m.round in rival_iops]
    return Ratio(median(ratios), min(ratios), max(ratios)) if ratios else None
