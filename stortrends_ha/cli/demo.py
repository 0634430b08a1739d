"""`stortrends-ha demo`: a cluster of two nodes on this machine, for trying things out.

Job: make the cluster, start its nodes as the very daemons that a real cluster has, wait until everything is
in sync, say what runs and what to try, stay until told to stop.
Invariants: stdout gets one thing, the announcement (with --json: exactly one line); everything else goes to
stderr. SIGINT, SIGTERM and SIGHUP are blocked and taken at one place, so that no signal can come between a
start and its stop. However the demo ends, its nodes end with it.
Neighbours: `demo_layout` knows paths and ports, `demo_nodes` the processes.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stortrends_ha.cli import demo_nodes
from stortrends_ha.cli.client import NodeStatus
from stortrends_ha.cli.demo_layout import NODES, VOLUME_BYTES, DemoGroup, Layout
from stortrends_ha.cli.demo_nodes import DemoNode, own_command
from stortrends_ha.config import load
from stortrends_ha.errors import ConfigError, StartError, StorageError

# New volumes are in sync at once; old ones, after a crash, are compared at some 100 MiB/s or more.
IN_SYNC_S = 120.0
POLL_S = 0.1
WATCH_S = 1.0

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SIGNALS = (*_STOP_SIGNALS, signal.SIGCHLD)


def demo(directory: Path | None, port_base: int, *, as_json: bool) -> int:
    """Run the demo until it is told to stop; returns the exit code."""
    with _signals_blocked(), _directory(directory) as path:
        layout = Layout(path, port_base)
        layout.check_ports()
        layout.prepare()
        _require_usable(layout)
        nodes = [DemoNode(name, layout) for name in NODES]
        try:
            for node in nodes:
                node.start()
            if _becomes_in_sync(layout, nodes):
                print(json.dumps(_as_json(layout, nodes)) if as_json else _as_text(layout, nodes), flush=True)
                _watch(nodes)
        finally:
            _say("Stopping the nodes ...")
            demo_nodes.stop(nodes)
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


def _becomes_in_sync(layout: Layout, nodes: Sequence[DemoNode]) -> bool:
    """Wait until every group is in sync; False if told to stop before."""
    _say(f"Starting node-a and node-b in {layout.directory} ...")
    deadline_s = time.monotonic() + IN_SYNC_S
    said: dict[str, str] = {}
    while True:
        for node in nodes:
            node.require_running()
        statuses = {node.name: status for node in nodes if (status := node.status())}
        now = {group.name: _state(group, statuses) for group in layout.groups}
        if all(state == "in-sync" for state in now.values()):
            return True
        for name, state in now.items():
            word = state.partition(":")[0]
            if said.get(name) != word:
                _say(f"{name}: {state if word in ('held', 'failed') else word}")
                said[name] = word
        if time.monotonic() > deadline_s:
            raise StartError(_too_slow(now, nodes))
        if _stop_asked(within_s=POLL_S):
            return False


def _state(group: DemoGroup, statuses: Mapping[str, NodeStatus]) -> str:
    """How a group is, as its owner says."""
    if group.owner not in statuses:
        return f"waiting for {group.owner}"
    view = statuses[group.owner]["groups"][group.name]
    why = f": {view['why']}" if view["why"] else ""
    return "in-sync" if view["state"] == "in-sync" else f"{view['state']}{why}"


def _too_slow(states: Mapping[str, str], nodes: Sequence[DemoNode]) -> str:
    waiting = "; ".join(f"{name}: {state}" for name, state in states.items())
    logs = "\n".join(f"{node.name}: {node.last_words()}" for node in nodes)
    return f"The groups are not in sync after {IN_SYNC_S:g} s ({waiting}).\n{logs}"


def _watch(nodes: Sequence[DemoNode]) -> None:
    """Tell of nodes that go and come back, until told to stop."""
    while not _stop_asked(within_s=WATCH_S):
        for node in nodes:
            if news := node.look():
                _say(news)


def _as_json(layout: Layout, nodes: Sequence[DemoNode]) -> dict[str, Any]:
    return {
        "ready": True,
        "dir": str(layout.directory),
        "config": str(layout.config),
        "nodes": {
            node.name: {
                "pid": node.pid,
                "control": str(layout.control(node.name)),
                "metrics": f"http://{layout.metrics(node.name)}/metrics",
                "command": node.command,
                "backing": {group.volume: str(layout.backing(node.name, group.volume)) for group in layout.groups},
            }
            for node in nodes
        },
        "volumes": {
            group.volume: {
                "uri": group.uri,
                "group": group.name,
                "owner": group.owner,
                "size_bytes": VOLUME_BYTES,
            }
            for group in layout.groups
        },
    }


def _as_text(layout: Layout, nodes: Sequence[DemoNode]) -> str:
    first, second = layout.groups
    status = shlex.join([*own_command(), "status", "--config", str(layout.config)])
    return f"""\
Two nodes run on this machine, and every write to a volume is on both before it is answered.

{_runs(layout, nodes)}

Try, in another terminal:
  See how everything is
    {status}
  Ask what a volume is (package libnbd-bin)
    nbdinfo {first.uri}
  Read a volume out and compare it with both replicas
    nbdcopy {first.uri} - | cmp - {_path(layout, "node-a", first)}
    nbdcopy {first.uri} - | cmp - {_path(layout, "node-b", first)}
  Use it as QEMU does (package qemu-utils)
    qemu-img info {second.uri}
    qemu-io -f raw -c 'write -P 0x5a 0 1M' -c 'read -P 0x5a 0 1M' {second.uri}
  Measure it (package fio)
    fio --name=try --ioengine=nbd --uri={first.uri} --rw=randwrite --bs=4k --iodepth=32 --size=256M \\
        --time_based --runtime=10

Take a node away while fio runs: writes are held, not failed, and go on when it is back.
    kill -9 {nodes[1].pid}
    {status}
    {shlex.join(nodes[1].command)}

Ctrl-C stops everything."""


def _runs(layout: Layout, nodes: Sequence[DemoNode]) -> str:
    lines = []
    for node, group in zip(nodes, layout.groups, strict=True):
        lines += [
            f"{node.name} (pid {node.pid}) owns {group.name} with volume {group.volume}, 1 GiB: {group.uri}",
            f"    replicas and log in {layout.state_dir(node.name)}",
            f"    metrics at http://{layout.metrics(node.name)}/metrics",
        ]
    return "\n".join(lines)


def _path(layout: Layout, node: str, group: DemoGroup) -> str:
    return shlex.quote(str(layout.backing(node, group.volume)))
