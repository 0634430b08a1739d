"""Measure how long clients wait when the owner of a group changes or its mirror breaks: `make failover-bench`.

Job: a cluster with default timings on machines of its own (network namespaces, so it needs root), a client that reads
and writes 4 KiB at queue depth 8 without a pause and checks what it reads, and each event many times, in turn, so that
the drift of a shared machine hits all alike. The stall of an event is the longest time that the client, which waits for
its answers as long as the connection lives, had none.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from bench.errors import BenchError
from bench.processes import require
from bench.stalls import Stalls, table
from stortrends_ha.cli import client
from stortrends_ha.errors import StorTrendsError
from tests.failures.clients import Clients, Load, raw_client
from tests.failures.cluster import GROUP, Cluster, Node

PROGRAMS = ("ip", "nft")


@dataclass(frozen=True, slots=True)
class Event:
    """What happens to the owner and the secondary, and how long clients may wait for it."""

    name: str
    do: Callable[[Cluster, Node, Node], None]
    moves: bool  # whether the group is on the other node afterwards
    median_s: float
    most_s: float


def _move(_cluster: Cluster, owner: Node, secondary: Node) -> None:
    """Not by a command, which would take a core for half a second while it starts."""
    client.request(owner.state_dir / "control.sock", {"command": "move", "group": GROUP, "to": secondary.name})


def _power_off_secondary(_cluster: Cluster, _owner: Node, secondary: Node) -> None:
    secondary.power_off()


EVENTS = (
    Event("planned move", _move, True, 0.150, 0.500),
    Event("SIGKILL of the owner", lambda _cluster, owner, _: owner.kill(), True, 2.5, 4.0),
    Event("power-off of the owner", lambda _cluster, owner, _: owner.power_off(), True, 2.5, 4.0),
    Event("power-off of the secondary", _power_off_secondary, False, 2.5, 4.0),
)


def main() -> int:
    """Run it; returns the exit code: 2 if a target is missed."""
    options = _options()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.dir) as directory:
        try:
            return _run(options, Path(directory))
        except (StorTrendsError, OSError) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 128 + signal.SIGINT


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.failover", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--events", type=_positive, default=20, help="how often each happens (%(default)s)")
    parser.add_argument("--dir", type=Path, help="where the images go (the folder for temporary files)")
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least 1")
    return int(text)


def _run(options: argparse.Namespace, directory: Path) -> int:
    if os.geteuid() != 0:
        raise BenchError("Machines of its own (network namespaces) need root")
    for program in PROGRAMS:
        require(program)
    cluster = Cluster(directory)
    try:
        cluster.start()
        found = _measure(cluster, options.events)
    finally:
        cluster.close()
    print(table(found), end="")
    return 2 if any(stalls.missed for stalls in found) else 0


def _measure(cluster: Cluster, events: int) -> list[Stalls]:
    found = {event: Stalls(event.name, event.median_s, event.most_s) for event in EVENTS}
    load = raw_client(cluster, part=0, rate=0, flush_every=0)
    try:
        for number in range(1, events + 1):
            for event in EVENTS:
                _settle(cluster, load)
                stall_s = _happens(cluster, load, event)
                found[event].add(stall_s)
                _say(f"{number:3} of {events}  {event.name:28} {stall_s * 1000:7.0f} ms")
        report = load.finish()
    finally:
        load.close()
    if report.errors:
        raise BenchError(f"the client saw errors: {'; '.join(report.errors)}")
    cluster.assert_identical()
    return list(found.values())


def _settle(cluster: Cluster, load: Load) -> None:
    """Everything runs and is in sync, the client works, and both nodes have heard of it."""
    cluster.repair()
    load.wait_answers(1000)
    Clients(cluster, [load]).wait_known()


def _happens(cluster: Cluster, load: Load, event: Event) -> float:
    owner, secondary = cluster.pair()
    began_s = time.monotonic()
    event.do(cluster, owner, secondary)
    if event.moves:
        secondary.wait_serving()
    else:
        owner.wait("goes on alone", lambda of: of["in_sync"] == [owner.name] and of["serving"])
    return load.wait_answers(1000).stall_since(began_s)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
