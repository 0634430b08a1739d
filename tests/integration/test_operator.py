"""The operator's commands against a real cluster: moves from either node, refusals, drain, the override.

The nodes of a demo run on one machine; a cluster file in which the other node's control socket is missing makes the
command line see what it sees on two.
"""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from clients import nbdsh
from harness import GROUP, OWNER, PATIENCE_S, PROGRAM, Cluster, ask, is_running, program_environment, wait_for
from test_demo import Demo

from stortrends_ha.node.status import GroupView, HeartbeatPath, LastMove, NodeState, NodeStatus, VolumeView

A, B = "node-a", "node-b"
GROUPS = ("rg-a", "rg-b")


@dataclass(frozen=True)
class Said:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


def _is_gone(pid: int) -> bool:
    return not is_running(pid)


class Terminal:
    """Somebody types commands, on the machine of a node or (with none) of both."""

    def __init__(self, demo: Demo, directory: Path) -> None:
        self.demo = demo
        text = Path(demo.said["config"]).read_text()
        self.configs = {"": Path(demo.said["config"])}
        for here, there in ((A, B), (B, A)):
            self.configs[here] = directory / f"at-{here}.yaml"
            state_dir = json.dumps(str(Path(demo.nodes[there]["control"]).parent))
            assert state_dir in text
            away = json.dumps(str(directory / "elsewhere"))
            self.configs[here].write_text(text.replace(f"state_dir: {state_dir}", f"state_dir: {away}"))

    def start(self, *command: str, at: str = "") -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*PROGRAM, *command, "--config", str(self.configs[at])], env=program_environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def type(self, *command: str, at: str = "") -> Said:
        process = self.start(*command, at=at)
        out, err = process.communicate(timeout=90)
        assert "Traceback" not in err, err
        return Said(process.returncode, out, err)

    def page(self, *options: str, at: str = "") -> str:
        """The status, in one line."""
        said = self.type("status", *options, at=at)
        assert said.code == 0, said
        return " ".join(said.out.split())

    def status(self, node: str) -> dict[str, Any]:
        return ask(Path(self.demo.nodes[node]["control"]))

    def settle(self, owners: dict[str, str]) -> None:
        """As it is at the beginning of a test."""
        self.demo.wait_in_sync()
        for group, owner in owners.items():
            assert self.type("group", "move", group, "--to", owner).code == 0
        self.demo.wait_in_sync()

    def wait_owned(self, group: str, by: str) -> None:
        wait_for(f"{by} owns {group}", lambda: self.demo.owner(group) == by)

    def kill(self, node: str) -> None:
        pid, data = self.status(node)["pid"], [group["pid"] for group in self.demo.groups(node).values()]
        os.kill(pid, signal.SIGKILL)
        wait_for("its data processes are gone", lambda: not any(is_running(each) for each in data), 10)

    def kill_witness(self) -> None:
        pids = [self.demo.said["witness"]["pid"], *(process.pid for process in self.demo.by_hand)]
        for pid in filter(is_running, pids):
            if b"witness" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
                wait_for("the witness is gone", partial(_is_gone, pid))

    def wait_said(self, what: str, words: str, *options: str, at: str = "") -> str:
        def probe() -> str | None:
            page = " ".join(self.type("status", *options, at=at).out.split())
            return page if words in page else None

        return wait_for(what, probe)


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    directory = tmp_path_factory.mktemp("operator")
    demo = Demo("--json", "--dir", str(directory / "demo"))
    try:
        demo.ready()
        # What it tells of killed processes must not fill its pipe.
        threading.Thread(target=demo.process.stderr.read if demo.process.stderr else print, daemon=True).start()
        yield Terminal(demo, directory)
    finally:
        demo.process.send_signal(signal.SIGTERM)
        demo.process.wait(PATIENCE_S)
        for node in demo.by_hand:
            node.kill()
            node.wait()
        for pipe in (demo.process.stdout, demo.process.stderr):
            assert pipe is not None
            pipe.close()


# --- Moves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["", A, B])
def test_a_group_is_moved_from_either_node_and_the_pause_is_said(terminal: Terminal, at: str) -> None:
    terminal.settle({"rg-a": A})
    for to, old in ((B, A), (A, B)):
        began_s = time.monotonic()
        said = terminal.type("group", "move", "rg-a", "--to", to, at=at)
        took_ms = (time.monotonic() - began_s) * 1000
        assert (said.code, said.err) == (0, "")
        last = said.out.splitlines()[-1]
        found = re.fullmatch(rf"Group rg-a is on {to} now. Clients were held for (?:less than )?(\d+) ms.", last)
        assert found, said.out
        assert 0 < int(found[1]) < took_ms
        moved = f"rg-a moved to {to} "
        assert moved in terminal.page(at=old), "the old owner has measured it"
        assert moved in terminal.page()


def test_a_group_that_is_there_already_is_a_success(terminal: Terminal) -> None:
    terminal.settle({"rg-a": A})
    assert terminal.type("group", "move", "rg-a", "--to", A, at=B) == Said(0, "Group rg-a is on node-a already.\n", "")


def test_the_json_of_the_status_has_the_keys_of_the_typed_dicts_and_no_others(terminal: Terminal) -> None:
    terminal.settle({"rg-a": B})
    terminal.settle({"rg-a": A})
    status = json.loads(terminal.type("status", "--json").out)["nodes"][B]
    assert set(status) == set(get_type_hints(NodeStatus))
    assert all(set(node) == set(get_type_hints(NodeState)) for node in status["nodes"].values())
    assert all(set(path) == set(get_type_hints(HeartbeatPath)) for path in status["heartbeats"])
    group = status["groups"]["rg-a"]
    assert set(group) == set(get_type_hints(GroupView))
    assert set(group["volumes"]["vm-a"]) == set(get_type_hints(VolumeView))
    assert set(group["last_move"]) == set(get_type_hints(LastMove))


# --- Drain --------------------------------------------------------------------------------------


def test_a_drained_node_gives_its_groups_away_and_gets_none(terminal: Terminal) -> None:
    terminal.settle({"rg-a": A, "rg-b": A})
    said = terminal.type("drain", A, at=A)
    assert said.code == 0, said
    assert said.out.startswith("Node node-a is drained: nothing moves to it until: stortrends-ha undrain node-a\n")
    for group in GROUPS:
        assert re.search(rf"^Group {group} is on node-b now. Clients were held for \d+ ms.$", said.out, re.M)
    assert said.out.endswith("node-a owns nothing now: it can be stopped without a pause for any client.\n")
    terminal.wait_said("the peer knows it", "node-a is drained: no group moves to it until", at=B)
    for at in (A, B):
        refused = terminal.type("group", "move", "rg-a", "--to", A, at=at)
        assert refused.code == 1
        assert "cannot move to node-a now: node-a is drained. Ask again when node-a may own groups" in refused.err
    both = terminal.type("drain", B)
    assert both.code == 1
    assert "Group rg-a stays on node-b, which goes on serving it: node-a is drained.\n" in both.err
    for node in (B, A):
        undrained = terminal.type("undrain", node)
        assert undrained.code == 0
        assert undrained.out.startswith(f"Node {node} may own groups again")
    assert "drained" not in terminal.wait_said("both are up", "node-a up 0.1.0")
    assert terminal.type("group", "move", "rg-a", "--to", A).code == 0


@pytest.mark.parametrize("command", [["drain", B], ["undrain", B], ["group", "force-own", "rg-a", "--name", B]])
def test_what_is_for_one_node_is_given_on_its_own_machine(terminal: Terminal, command: list[str]) -> None:
    said = terminal.type(*command, at=A)
    assert (said.code, said.out) == (1, "")
    assert "Node node-b does not answer on this machine, only node-a does." in said.err


# --- The arbiter is away ------------------------------------------------------------------------


def test_without_the_arbiter_nothing_moves_and_it_is_said(terminal: Terminal) -> None:
    terminal.settle({"rg-a": A, "rg-b": B})
    terminal.kill_witness()
    page = terminal.wait_said("it is noticed", "Warning: the witness at 127.0.0.1:", at=A)
    assert "Nothing changes while both nodes see each other; if a node fails now, the other one holds." in page
    said = terminal.type("group", "move", "rg-a", "--to", B, at=A)
    assert said.code == 1
    assert "Group rg-a cannot move to node-b now: its record cannot be changed (the witness at " in said.err
    terminal.demo.start_again(terminal.demo.said["witness"])
    wait_for("it is back", lambda: "Warning" not in terminal.page())
    assert terminal.type("group", "move", "rg-a", "--to", B, at=A).code == 0


# --- A node is away -----------------------------------------------------------------------------


def test_a_drain_with_a_dead_peer_says_what_stays_and_it_moves_when_the_peer_is_back(terminal: Terminal) -> None:
    terminal.settle({"rg-a": A, "rg-b": A})
    terminal.kill(B)
    page = terminal.wait_said("it goes on alone", "rg-a on node-a is alone: node-b has not been heard for ")
    assert "; it is synced when it is back." in page
    assert "node-a hears no heartbeat from " in terminal.wait_said("the path is silent", "hears no heartbeat")
    refused = terminal.type("group", "move", "rg-a", "--to", B)
    assert refused.code == 1
    assert re.search(r"cannot move to node-b now: node-b has not been heard for [\d.]+ s. Ask again when", refused.err)
    needless = terminal.type("group", "force-own", "rg-a")
    assert (needless.code, needless.err) == (1, "stortrends-ha: Node node-a owns group rg-a already.\n")
    said = terminal.type("drain", A)
    assert said.code == 1
    for group in GROUPS:
        assert f"Group {group} stays on node-a, which goes on serving it: node-b has not been heard for" in said.err
    assert "  It moves by itself when node-b is back and in sync.\n" in said.err
    terminal.demo.start_again(terminal.demo.nodes[B])
    for group in GROUPS:
        terminal.wait_owned(group, by=B)
    assert terminal.type("undrain", A).code == 0


def test_the_override_says_what_may_be_lost_first_and_does_it_when_told_to(terminal: Terminal) -> None:
    """The last test with this cluster: it ends with two lineages."""
    terminal.settle({"rg-a": B, "rg-b": B})
    served = terminal.type("group", "force-own", "rg-a", "--name", A)
    assert served.code == 1
    assert "Node node-b serves group rg-a, so nothing has to be lost: stortrends-ha group move rg-a" in served.err
    unnamed = terminal.type("group", "force-own", "rg-a")
    assert "Both node-a and node-b run on this machine: say which one with --name." in unnamed.err

    nbdsh("h.connect_uri(uri[0]); h.pwrite(b'both' * 128, 0); h.flush()", terminal.demo.uri("vm-a"))
    terminal.kill(A)
    terminal.wait_said("node-b goes on alone", "rg-a on node-b is alone")
    nbdsh("h.connect_uri(uri[0]); h.pwrite(b'lost' * 128, 0); h.flush()", terminal.demo.uri("vm-a"))
    terminal.kill(B)
    terminal.demo.start_again(terminal.demo.nodes[A])
    why = "this node must not take over, as node-b alone has every acknowledged write; it goes on when node-b is back"
    remedy = ", or by the operator, losing what only node-b has: stortrends-ha group force-own"
    for group in GROUPS:
        terminal.wait_said("node-a holds", f"{why}{remedy} {group}.")

    refused = terminal.type("group", "force-own", "rg-a", at=A)
    assert (refused.code, refused.out) == (1, "")
    assert "Nothing was done. What it would mean to own group rg-a on node-a:\nnode-a is out of sync" in refused.err
    year = time.strftime("%Y")
    learnt = rf"out of sync \(it learnt of it at {year}-\S+ \S+\): what node-b has acknowledged since the two were"
    assert re.search(learnt, refused.err)
    assert "node-b alone has everything." in refused.err
    assert "add --accept-data-loss." in refused.err
    assert terminal.status(A)["groups"]["rg-a"]["owner"] == B

    terminal.kill_witness()
    waiting = terminal.start("group", "force-own", "rg-a", "--accept-data-loss", at=A)
    assert waiting.stdout is not None
    wait_for("it waits", lambda: "asks for the record" in (waiting.stdout.readline() if waiting.stdout else ""))
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=PATIENCE_S)
    assert waiting.returncode == 130
    assert err.strip() == ("Not watched any longer. node-a goes on with it; `stortrends-ha status` shows how it ends.")
    assert "the operator overrides who owns it" in terminal.page() or "which is not granted yet" in terminal.page()

    terminal.demo.start_again(terminal.demo.said["witness"])
    terminal.wait_owned("rg-a", by=A)
    terminal.wait_said("it is said", "rg-a was given to node-a by the operator's override")
    nbdsh("h.connect_uri(uri[0]); assert h.pread(512, 0) == b'both' * 128", terminal.demo.uri("vm-a"))

    forced = terminal.type("group", "force-own", "rg-b", "--accept-data-loss", at=A)
    assert forced.code == 0, forced
    assert "node-b alone has everything.\n" in forced.out
    assert re.search(r"Group rg-b is served by node-a now\. Clients were held until \d+ ms after it was", forced.out)
    assert (
        "The data has a new lineage. When node-b is back, on node-b: stortrends-ha group diff rg-b, and" in forced.out
    )
    assert forced.out.splitlines()[-1].startswith("stortrends-ha group resolve rg-b --keep node-a: what differs there")


def test_where_the_operator_is_the_arbiter_an_owner_that_lost_its_peer_goes_on_by_the_override(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster(limits={"link_timeout_s": 1}).start()
    cluster.secondary.kill()
    held = cluster.owner.wait("holds", lambda group: "going on alone is not granted" in group["why"])
    assert held["state"] == "held"
    command = [*PROGRAM, "group", "force-own", GROUP, "--config", str(cluster.owner.config)]
    asked = subprocess.run(command, env=program_environment(), capture_output=True, text=True, timeout=60)
    assert asked.returncode == 1
    assert "By the newest record that is known here node-a has everything." in asked.stderr
    assert "lineage" not in asked.stderr
    command.append("--accept-data-loss")
    done = subprocess.run(command, env=program_environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(rf"Group {GROUP} is served by {OWNER} now\. Clients were held for \d+ ms\.\n$", done.stdout)
    cluster.owner.wait_state("alone")
    cluster.secondary.start()
    cluster.owner.wait_state("in-sync")
