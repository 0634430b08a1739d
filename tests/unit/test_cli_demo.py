"""The demo's cluster file and ports, and the command line around it."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stortrends_ha import __version__
from stortrends_ha.cli.client import NodeStatus
from stortrends_ha.cli.demo_groups import GroupState, group_state
from stortrends_ha.cli.demo_layout import PORTS, VOLUME_BYTES, Layout
from stortrends_ha.cli.demo_nodes import Demo, DemoWitness, stop
from stortrends_ha.cli.demo_words import in_json, in_words
from stortrends_ha.cli.main import main
from stortrends_ha.config import Failover, Witness, load, read_key
from stortrends_ha.config.values import parse_address
from stortrends_ha.errors import StartError, StorageError


@pytest.mark.parametrize("name", ["plain", "with space", "q'u\"o: te#", "ünïcode"])
def test_the_demos_cluster_file_is_right_in_any_directory(tmp_path: Path, name: str) -> None:
    layout = Layout(tmp_path / name, 20000)
    layout.prepare()
    cluster = load(layout.config)
    for node in cluster.nodes.values():
        assert node.control == layout.control(node.name)
        assert str(node.metrics) == layout.metrics(node.name)
        assert [str(address) for address in node.heartbeat] == [layout.heartbeat(node.name)]
        assert cluster.key_file[node.name] == layout.key
    assert cluster.arbiter == Witness(parse_address(layout.witness))
    assert cluster.failover == Failover()
    for group in layout.groups:
        (volume,) = cluster.groups[group.name].volumes
        assert group.uri == f"nbd://{cluster.groups[group.name].nbd}/{volume.name}"
        assert volume.backing == {node: layout.backing(node, volume.name) for node in cluster.nodes}


def test_every_port_lies_in_the_announced_range_and_is_used_once(tmp_path: Path) -> None:
    layout = Layout(tmp_path, 20000)
    ports = [group.nbd_port for group in layout.groups]
    ports += [port for group in layout.groups for port in group.link_ports.values()]
    addresses = [of(node) for of in (layout.metrics, layout.heartbeat) for node in ("node-a", "node-b")]
    ports += [int(address.rpartition(":")[2]) for address in (*addresses, layout.witness)]
    assert sorted(ports) == list(range(20000, 20000 + PORTS))


def test_missing_backing_files_are_made_sparse_and_existing_ones_are_kept(tmp_path: Path) -> None:
    layout = Layout(tmp_path, 20000)
    layout.prepare()
    kept, made = layout.backing("node-a", "vm-a"), layout.backing("node-b", "vm-b")
    kept.write_bytes(b"data")
    layout.prepare()
    assert kept.read_bytes() == b"data"
    assert made.stat().st_size == VOLUME_BYTES
    assert made.stat().st_blocks == 0


def test_each_directory_has_a_key_of_its_own_which_the_witness_gets_and_which_stays(tmp_path: Path) -> None:
    keys = []
    for name in ("first", "second"):
        layout = Layout(tmp_path / name, 20000)
        layout.prepare()
        keys.append(read_key(layout.key))
        assert layout.witness_key == layout.directory / "witness" / "keys" / "demo.key"
        layout.witness_key.unlink()
        layout.prepare()
        assert read_key(layout.key) == read_key(layout.witness_key) == keys[-1]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_in_use_is_an_error_that_names_it(tmp_path: Path, kind: int) -> None:
    with socket.socket(type=kind) as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        with pytest.raises(StartError, match=rf"on 127\.0\.0\.1, and .*\b{port}\b.* in use.*--port-base"):
            Layout(tmp_path, port - 1).check_ports()


def test_a_directory_that_cannot_be_used_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=rf"{tmp_path}/file.* cannot be used: Not a directory"):
        Layout(tmp_path / "file", 20000).prepare()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "stortrends_ha", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=60)


def test_the_version_is_shown() -> None:
    assert run("--version").stdout == f"stortrends-ha {__version__}\n"


def test_without_a_command_the_usage_is_shown() -> None:
    finished = run()
    assert finished.returncode == 2
    assert finished.stderr.startswith("usage: stortrends-ha")


def test_what_the_operator_can_mend_is_said_without_a_traceback(tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("nonsense: 1\n")
    for command in (["node", "--name", "node-a"], ["status"]):
        finished = run(*command, "--config", str(config))
        assert finished.returncode == 1
        assert finished.stderr.startswith("stortrends-ha: ")
        assert "nonsense" in finished.stderr
        assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("port", ["0", "65530", "many"])
def test_a_port_base_that_leaves_no_room_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--port-base", port])
    assert f"{port!r} is not a port from 1 to 65525" in capsys.readouterr().err


def free_ports() -> int:
    """The first of as many free ports as the demo needs, below those that the kernel hands out."""
    for base in range(20000 + os.getpid() % 900 * 10, 32000, PORTS):
        try:
            Layout(Path("/"), base).check_ports()
        except StartError:
            continue
        return base
    pytest.fail("no free ports")


OWNERS = {"rg-a": "node-b", "rg-b": "node-b"}


def test_the_announcement_has_these_keys_and_the_owners_as_they_are(tmp_path: Path) -> None:
    announced = json.loads(json.dumps(in_json(Demo(Layout(tmp_path, 20000)), OWNERS)))
    assert list(announced) == ["ready", "dir", "config", "nodes", "witness", "volumes"]
    assert list(announced["nodes"]["node-a"]) == ["pid", "control", "metrics", "command", "backing"]
    assert announced["nodes"]["node-b"]["command"][-5:] == [
        "node", "--config", f"{tmp_path}/cluster.yaml", "--name", "node-b",
    ]  # fmt: skip
    assert list(announced["witness"]) == ["pid", "command"]
    assert announced["witness"]["command"][-5:] == [
        "witness", "--listen", "127.0.0.1:20010", "--state", f"{tmp_path}/witness",
    ]  # fmt: skip
    assert announced["volumes"]["vm-a"] == {
        "uri": "nbd://127.0.0.1:20000/vm-a", "group": "rg-a", "owner": "node-b", "size_bytes": 1 << 30,
    }  # fmt: skip


def test_the_words_for_people_name_the_owner_as_it_is(tmp_path: Path) -> None:
    demo = Demo(Layout(tmp_path, 20000))
    for pid, process in enumerate(demo.processes, start=100):
        process.pid = pid
    said = in_words(demo, OWNERS)
    runs, _, to_try = said.partition("Try, in another terminal:")
    assert runs.index("node-b (pid 102)") < runs.index("owns rg-a") < runs.index("owns rg-b")
    words = re.sub(r"\n +", " ", to_try)
    assert re.search(r"Move rg-a to node-a .* group move rg-a --to node-a --config \S+ .* --to node-b", words)
    assert re.search(r"Kill the owner of rg-a: node-a takes over.* kill -9 102 sleep 2; .* --name node-b", words)
    assert re.search(rf"Kill the witness: .* kill -9 100 .* witness --listen \S+ --state {tmp_path}/witness", words)


def view(owner: str, state: str = "in-sync", epoch: int = 1, why: str = "") -> NodeStatus:
    return {"groups": {"rg-a": {"owner": owner, "state": state, "epoch": epoch, "why": why}}}


class TestGroupState:
    """How a group is, from what the nodes say."""

    @pytest.mark.parametrize("owner", ["node-a", "node-b"])
    def test_in_sync_when_both_nodes_say_so_whoever_owns_it(self, owner: str) -> None:
        state = group_state("rg-a", {"node-a": view(owner), "node-b": view(owner)})
        assert state == GroupState(owner, "in-sync")
        assert str(state) == f"{owner} owns it, in-sync"

    @pytest.mark.parametrize(
        ("statuses", "words"),
        [
            ({}, "waiting for node-a and node-b"),
            ({"node-a": view("node-b")}, "waiting for node-b"),
            ({"node-b": view("", "starting")}, "waiting for an owner"),
            ({"node-b": view("node-b")}, "node-b owns it, waiting for node-a"),
            ({"node-b": view("node-b", "alone", why="w")}, "node-b owns it, alone (w)"),
            ({"node-a": view("node-a"), "node-b": view("node-b", "alone", 2)}, "node-b owns it, alone"),
            ({"node-a": view("node-a"), "node-b": view("node-a", epoch=2)}, "node-a owns it, waiting for node-a"),
            ({"node-a": view("node-a", epoch=2), "node-b": view("node-a")}, "node-a owns it, waiting for node-b"),
            (
                {"node-a": view("node-a"), "node-b": view("node-a", "connecting", why="no link")},
                "node-a owns it, waiting for node-b (no link)",
            ),
            ({"node-a": view("node-a", "held", why="h"), "node-b": view("node-a")}, "node-a owns it, held (h)"),
            ({"node-a": view("node-b", "held", why="h")}, "waiting for node-b (h)"),
        ],
    )
    def test_not_in_sync_before_with_what_is_missing(self, statuses: dict[str, NodeStatus], words: str) -> None:
        state = group_state("rg-a", statuses)
        assert not state.in_sync
        assert str(state) == words


@pytest.fixture
def witness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DemoWitness]:
    """Not started."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    layout = Layout(tmp_path, free_ports())
    layout.prepare()
    made = DemoWitness(layout)
    yield made
    stop([made])


def eventually(what: Callable[[], str | None]) -> str:
    deadline_s = time.monotonic() + 30
    while not (found := what()):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return found


def address_of(witness: DemoWitness) -> tuple[str, int]:
    host, _, port = witness.command[-3].rpartition(":")
    return host, int(port)


def serves(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


class TestWitness:
    def test_its_end_is_told_with_how_to_start_it_again_and_who_does_so_is_found(self, witness: DemoWitness) -> None:
        witness.start()
        assert witness.pid is not None
        assert witness.look() is None
        os.kill(witness.pid, signal.SIGKILL)
        told = eventually(witness.look)
        assert told.startswith("The witness was killed by SIGKILL. The demo goes on; to start it again:\n  ")
        again = subprocess.Popen(shlex.split(told.splitlines()[1]), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert eventually(witness.look) == f"The witness runs again (pid {again.pid})."
        eventually(lambda: "yes" if serves(address_of(witness)) else None)
        stop([witness])
        assert again.wait(30) == 0

    def test_one_that_cannot_start_is_an_error_with_its_log(self, witness: DemoWitness) -> None:
        with socket.create_server(address_of(witness)):
            witness.start()
            eventually(lambda: witness.last_words() if "cannot listen" in witness.last_words() else None)
            with pytest.raises(StartError, match=r"The witness ended with code 1\. Its log .* ends with:\n.* listen"):
                eventually(witness.require_running)
