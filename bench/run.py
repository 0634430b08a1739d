"""Measure stortrends-ha beside other NBD servers on this machine, and write a table and a plot.

Job: the command line; start the servers, measure all in turn, report. Every round measures each workload on
every server before the next round begins, and each round begins with another server, so that the drift of
a shared machine hits all alike. While one server is measured, the others are idle.
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench import plot, table
from bench.errors import BenchError
from bench.measure import Measurement, fill, measure
from bench.processes import Processes, memory_available_mib, require
from bench.servers import OURS, RIVALS, Server, check_space, start_demo, start_rivals
from bench.summary import Row, summarize
from bench.workloads import DEFAULT_NAMES, Workload, parse_list
from stortrends_ha.errors import StorTrendsError

RESULTS = Path(__file__).resolve().parent / "results"
DEMO_SIZE_MIB = 1024
SPARE_MEMORY_MIB = 1024


def main() -> int:
    """Run the benchmark; returns the exit code."""
    options = _options()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as work,
        tempfile.TemporaryDirectory(prefix="bench-", dir=options.dir) as images,
    ):
        processes = Processes(Path(work))
        try:
            _run(options, processes, Path(images).resolve())
        except (StorTrendsError, OSError) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # nothing keeps us from stopping what we started
            processes.stop()
    return 0


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=_positive, default=3, help="how often all is measured (%(default)s)")
    parser.add_argument("--seconds", type=_positive, default=4, help="of each measurement (%(default)s)")
    parser.add_argument("--size-mib", type=_size_mib, default=DEMO_SIZE_MIB, help="used of images (%(default)s)")
    parser.add_argument(
        "--workloads", type=_workloads, default=",".join(DEFAULT_NAMES), metavar="LIST",
        help="fsync, or PATTERN-BLOCKSIZE-qdDEPTH (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--dir", type=_directory, help="where all images go (the folder for temporary files)")
    parser.add_argument("--uri", help="measure this volume and not a demo: IT WILL BE OVERWRITTEN")
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least 1")
    return int(text)


def _size_mib(text: str) -> int:
    if (size_mib := _positive(text)) > DEMO_SIZE_MIB:
        raise argparse.ArgumentTypeError(f"the demo's volumes have {DEMO_SIZE_MIB} MiB, fewer than {size_mib}")
    return size_mib


def _workloads(text: str) -> list[Workload]:
    try:
        return parse_list(text)
    except BenchError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _directory(text: str) -> Path:
    if not (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory '{text}'")
    return path


def _run(options: argparse.Namespace, processes: Processes, images: Path) -> None:
    require("fio")
    check_space(images, options.size_mib)
    _warn_of_little_memory(options.size_mib)
    left_out: list[str] = []
    _say("Starting the servers and filling their images ...")
    ours = Server(OURS, options.uri, ()) if options.uri else start_demo(processes, images / "demo")
    servers = [ours, *start_rivals(processes, images, options.size_mib, left_out)]
    for reason in left_out:
        _say(f"Left out: {reason}")
    fill(ours, options.size_mib)
    _say(f"Measuring: about {_minutes(options, len(servers)):.0f} min.")
    measurements, failures = _measure_all(servers, options)
    notes = [f"Left out: {reason}." for reason in left_out] + [f"Failed: {failure}." for failure in failures]
    _report(measurements, notes, options)


def _warn_of_little_memory(size_mib: int) -> None:
    available_mib = memory_available_mib()
    if available_mib < 4 * size_mib + SPARE_MEMORY_MIB:
        _say(
            f"Warning: {available_mib} MiB of memory cannot cache four images of {size_mib} MiB, and whoever is"
            " evicted looks slow: use fewer with --size-mib."
        )


def _minutes(options: argparse.Namespace, servers: int) -> float:
    return float(options.rounds * len(options.workloads) * servers * (options.seconds + 1)) / 60


def _measure_all(servers: Sequence[Server], options: argparse.Namespace) -> tuple[list[Measurement], list[BenchError]]:
    """What was measured and what failed: one failure does not cost the other results."""
    measurements: list[Measurement] = []
    failures: list[BenchError] = []
    for round_ in range(1, options.rounds + 1):
        first = (round_ - 1) % len(servers)
        for workload in options.workloads:
            for server in [*servers[first:], *servers[:first]]:
                try:
                    m = measure(server, workload, round_, options.size_mib, options.seconds)
                except BenchError as error:
                    failures.append(error)
                    _say(f"Failed: {error}")
                    continue
                measurements.append(m)
                _say(f"round {round_}  {workload.name:18} {server.name:22} {m.iops:9.0f} IOPS")
    return measurements, failures


def _report(measurements: Sequence[Measurement], more_notes: Sequence[str], options: argparse.Namespace) -> None:
    rows = summarize(measurements, OURS)
    how = f"rounds: {options.rounds}, {options.seconds} s each, {options.size_mib} MiB, {os.cpu_count()} CPUs"
    now = f"{time.strftime('%Y-%m-%d %H:%M')}, Linux {os.uname().release}, {how}."
    notes = [now, *_notes(measurements), *more_notes]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bench.md").write_text(_document(rows, notes))
    (RESULTS / "bench.svg").write_text(plot.svg(rows, how))
    print("\n".join(["", table.terminal(rows), "", *notes]))
    _say(f"Written: {RESULTS / 'bench.md'} and {RESULTS / 'bench.svg'}")


def _notes(measurements: Sequence[Measurement]) -> list[str]:
    """What a reader must know to judge the numbers."""
    notes = [
        "Medians of the rounds. Latencies are whole operations', in fsync the flushes' alone.",
        "CPU time is that of all processes of a server, without fio.",
        "The ratio is taken within a round: median (least-most). Above 1, stortrends-ha is faster.",
    ]
    if others := [m.other_cpus for m in measurements if m.other_cpus is not None]:
        notes.append(f"Meanwhile the rest of the machine used {statistics.median(others):.2f} CPUs (median).")
    measured = {m.server for m in measurements}
    return notes + [f"{rival.name}: {rival.what}." for rival in RIVALS if rival.name in measured]


def _document(rows: Sequence[Row], notes: Sequence[str]) -> str:
    listed = "\n".join(f"- {note}" for note in notes)
    return f"# Benchmark\n\n![IOPS by workload](bench.svg)\n\n{table.markdown(rows)}\n\n{listed}\n"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
