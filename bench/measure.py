"""One measurement: fio against one server for a while, and what the servers' processes used meanwhile."""

import json
import os
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.errors import BenchError
from bench.processes import cpu_seconds, machine_cpu_seconds
from bench.servers import FILL_KIB, MIB, Server
from bench.workloads import Workload

FIO_SPARE_S = 60.0
FILL_S = 600.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one server did in one round of one workload. With fsync the latencies are the flushes'."""

    round: int
    workload: str
    server: str
    iops: float
    mib_s: float
    mean_us: float
    p99_us: float
    cpu_s_per_kop: float | None  # None where the processes are not known
    other_cpus: float | None  # CPUs that neither the server nor fio used


@dataclass(frozen=True, slots=True)
class _Clocks:
    elapsed_s: float
    server_s: float
    fio_s: float
    machine_s: float

    @classmethod
    def read(cls, server: Server) -> "_Clocks":
        # fio's processes have been waited for, the servers' have not: so the children's time is fio's.
        fio = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cls(time.monotonic(), cpu_seconds(server.pids), fio.ru_utime + fio.ru_stime, machine_cpu_seconds())


def fill(server: Server, size_mib: int) -> None:
    """Write every block once, in random order so that no server can merge them."""
    _fio(server, size_mib, ["--rw=randwrite", f"--bs={FILL_KIB}k", "--iodepth=16"], FILL_S)


def measure(server: Server, workload: Workload, round_: int, size_mib: int, seconds: int) -> Measurement:
    """Run the workload on the server for so many seconds."""
    os.sync()  # nobody writes back the dirty pages of another
    before = _Clocks.read(server)
    timing = ["--time_based", f"--runtime={seconds}"]
    job = _fio(server, size_mib, [*workload.fio_options(), *timing], seconds + FIO_SPARE_S)
    after = _Clocks.read(server)

    done = job["mixed"]
    if not done["total_ios"]:
        raise BenchError(f"{server.name} did not complete one operation of {workload.name}")
    latency = (job["sync"] if workload.flush_each else done)["lat_ns"]
    server_s = after.server_s - before.server_s
    others_s = after.machine_s - before.machine_s - server_s - (after.fio_s - before.fio_s)
    return Measurement(
        round=round_,
        workload=workload.name,
        server=server.name,
        iops=done["iops"],
        mib_s=done["bw_bytes"] / MIB,
        mean_us=latency["mean"] / 1000,
        p99_us=latency["percentile"]["99.000000"] / 1000,
        cpu_s_per_kop=server_s / done["total_ios"] * 1000 if server.pids else None,
        other_cpus=max(0.0, others_s) / (after.elapsed_s - before.elapsed_s) if server.pids else None,
    )


def _fio(server: Server, size_mib: int, options: Sequence[str], timeout_s: float) -> dict[str, Any]:
    command = ["fio", "--name=bench", "--thread", "--ioengine=nbd", f"--uri={server.uri}"]
    command += [f"--size={size_mib}m", "--unified_rw_reporting=both", "--output-format=json"]
    command += ["--lat_percentiles=1", "--clat_percentiles=0", *options]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise BenchError(f"fio on {server.name} did not end within {timeout_s:.0f} s") from None
    if ran.returncode:
        said = ran.stderr.strip().splitlines() or [f"status {ran.returncode}"]
        raise BenchError(f"fio on {server.name} failed: {said[-1]}")
    # Notes of fio may precede the JSON.
    job: dict[str, Any] = json.loads(ran.stdout[ran.stdout.index("{") :])["jobs"][0]
    return job
