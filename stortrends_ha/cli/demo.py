"""`stortrends-ha demo`: a cluster of two nodes and a witness on this machine, for trying things out.

Job: make the cluster, start its processes as the very daemons that a real cluster has, wait until everything is
in sync, say what runs and what to try, tell what happens to it, stay until told to stop.
Invariants: stdout gets one thing, the announcement (with --json: exactly one line); everything else goes to
stderr. SIGINT, SIGTERM and SIGHUP are blocked and taken at one place, so that no signal can come between a
start and its stop. However the demo ends, its processes end with it; what ends before is told, and the demo goes on.
Neighbours: `demo_layout` knows paths and ports, `demo_nodes` the processes, `demo_groups` how the groups are,
`demo_words` what is announced.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from stortrends_ha.cli import demo_nodes
from stortrends_ha.cli.demo_groups import GroupState, group_state
from stortrends_ha.cli.demo_layout import Layout
from stortrends_ha.cli.demo_nodes import Demo
from stortrends_ha.cli.demo_words import in_json, in_words
from stortrends_ha.config import load
from stortrends_ha.errors import ConfigError, StartError, StorageError

# New volumes are in sync at once; old ones, after a crash, are compared at some 100 MiB/s or more.
IN_SYNC_S = 120.0
# A start usually takes two or three seconds; what happens in them is of no interest.
SAY_AFTER_S = 5.0
POLL_S = 0.1
WATCH_S = 0.2

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SIGNALS = (*_STOP_SIGNALS, signal.SIGCHLD)


def run(directory: Path | None, port_base: int, *, as_json: bool) -> int:
    """Run the demo until it is told to stop; returns the exit code."""
    with _signals_blocked(), _directory(directory) as path:
        layout = Layout(path, port_base)
        layout.check_ports()
        layout.prepare()
        _require_usable(layout)
        demo = Demo(layout)
        try:
            for process in demo.processes:
                process.start()
            if states := _become_in_sync(demo):
                owners = {name: state.owner for name, state in states.items()}
                print(json.dumps(in_json(demo, owners)) if as_json else in_words(demo, owners), flush=True)
                _watch(demo, states)
        finally:
            _say("Stopping the nodes and the witness ...")
            demo_nodes.stop([demo.witness])  # first: a node whose peer has stopped earlier can then not take over
            demo_nodes.stop(demo.nodes)
            _say(f"Stopped. The data stays in {path}." if directory else "Stopped.")
    return 0


def _require_usable(layout: Layout) -> None:
    """What is wrong with the cluster file now can only come from the directory's name."""
    try:
        load(layout.config)
    except ConfigError as error:
        raise StartError(f"The demo cannot run in {layout.directory}; choose another with --dir.\n{error}") from error


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop_asked(within_s: float) -> bool:
    """Wait for a signal; whether it is one to stop for."""
    received = signal.sigtimedwait(_SIGNALS, within_s)
    return received is not None and received.si_signo in _STOP_SIGNALS


@contextlib.contextmanager
def _directory(chosen: Path | None) -> Iterator[Path]:
    """The directory for everything; a temporary one is removed at the end."""
    if chosen:
        yield Path(os.path.abspath(chosen))
        return
    try:
        made = Path(tempfile.mkdtemp(prefix="stortrends-ha-demo-"))
    except OSError as error:
        raise StorageError(f"No temporary directory can be made: {error.strerror}; choose one with --dir.") from error
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _become_in_sync(demo: Demo) -> dict[str, GroupState] | None:
    """Wait until every group is in sync, and say how they are then; None if told to stop before."""
    _say(f"Starting node-a and node-b, and a witness, in {demo.layout.directory} ...")
    began_s = time.monotonic()
    said: dict[str, str] = {}
    while True:
        for process in demo.processes:
            process.require_running()
        now = _states(demo)
        if all(state.in_sync for state in now.values()):
            return now
        waited_s = time.monotonic() - began_s
        for name, state in now.items():
            if waited_s > SAY_AFTER_S and said.get(name) != state.state:
                _say(f"{name}: {state}")
                said[name] = state.state
        if waited_s > IN_SYNC_S:
            raise StartError(_too_slow(demo, now))
        if _stop_asked(within_s=POLL_S):
            return None


def _states(demo: Demo) -> dict[str, GroupState]:
    statuses = {node.name: status for node in demo.nodes if (status := node.status())}
    return {group.name: group_state(group.name, statuses) for group in demo.layout.groups}


def _too_slow(demo: Demo, states: Mapping[str, GroupState]) -> str:
    waiting = "; ".join(f"{name}: {state}" for name, state in states.items())
    logs = "\n".join(f"{process.name}: {process.last_words()}" for process in demo.processes)
    return f"The groups are not in sync after {IN_SYNC_S:g} s ({waiting}).\n{logs}"


def _watch(demo: Demo, before: Mapping[str, GroupState]) -> None:
    """Tell of processes that go and come back, and of what becomes of the groups, until told to stop."""
    while not _stop_asked(within_s=WATCH_S):
        for process in demo.processes:
            if news := process.look():
                _say(news)
        now = _states(demo)
        for name, state in now.items():
            if (state.owner, state.state) != (before[name].owner, before[name].state):
                _say(f"{name}: {state}")
        before = now
