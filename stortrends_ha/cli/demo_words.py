"""What the demo says when everything is in sync: a line of JSON for programs, or what to try for people.

Invariant: commands are printed as they can be typed in any directory, and name the processes and owners as they are.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from stortrends_ha.cli.demo_layout import VOLUME_BYTES, DemoGroup, Layout
from stortrends_ha.cli.demo_nodes import Demo, own_command


def in_json(demo: Demo, owners: Mapping[str, str]) -> dict[str, Any]:
    """Everything a program needs to find; `owners` has the owner of each group as it is now."""
    layout = demo.layout
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
            for node in demo.nodes
        },
        "witness": {"pid": demo.witness.pid, "command": demo.witness.command},
        "volumes": {
            group.volume: {
                "uri": group.uri,
                "group": group.name,
                "owner": owners[group.name],
                "size_bytes": VOLUME_BYTES,
            }
            for group in layout.groups
        },
    }


def in_words(demo: Demo, owners: Mapping[str, str]) -> str:
    """What runs, and what to try; `owners` has the owner of each group as it is now."""
    layout, witness = demo.layout, demo.witness
    first, second = layout.groups
    owner, other = sorted(demo.nodes, key=lambda node: node.name != owners[first.name])
    return f"""\
Two nodes run on this machine, and every write to a volume is on both before it is answered.

{_runs(demo, owners)}

Try, in another terminal:
  See how everything is
    {_command(layout, "status")}
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

Move things and take them away, and look at the status in between. A client that connects again by itself, as QEMU
does with reconnect-delay, sees pauses and no errors:
  Move {first.name} to {other.name} while it is in use, and back
    {_command(layout, "group", "move", first.name, "--to", other.name)}
    {_command(layout, "group", "move", first.name, "--to", owner.name)}
  Kill the owner of {first.name}: {other.name} takes over, and after about two seconds the same URI is served
    kill -9 {owner.pid}
    sleep 2; qemu-img info {first.uri}
  Start it again: what differs is copied, and {first.name} is in sync again, now owned by {other.name}
    {shlex.join(owner.command)}
  Kill the witness: nothing happens, as it is only asked when something has to change. Start it again:
    kill -9 {witness.pid}
    {shlex.join(witness.command)}

Ctrl-C stops everything."""


def _runs(demo: Demo, owners: Mapping[str, str]) -> str:
    layout = demo.layout
    lines = []
    for node in demo.nodes:
        lines.append(f"{node.name} (pid {node.pid}), metrics at http://{layout.metrics(node.name)}/metrics")
        lines.append(f"    replicas and log in {layout.state_dir(node.name)}")
        for group in layout.groups:
            if owners[group.name] == node.name:
                lines.append(f"    owns {group.name} with volume {group.volume}, 1 GiB: {group.uri}")
    lines.append(f"The witness (pid {demo.witness.pid}) says which node goes on when they lose each other")
    lines.append(f"    log in {layout.witness_dir}")
    return "\n".join(lines)


def _command(layout: Layout, *words: str) -> str:
    return shlex.join([*own_command(), *words, "--config", str(layout.config)])


def _path(layout: Layout, node: str, group: DemoGroup) -> str:
    return shlex.quote(str(layout.backing(node, group.volume)))
