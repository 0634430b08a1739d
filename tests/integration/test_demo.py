"""`stortrends-ha demo`: its line of JSON and its words mean what they say, and it leaves nothing behind."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clients import load, nbdsh, qemu_io, run
from files import differences
from harness import PATIENCE_S, PROGRAM, ask, free_ports, is_running, program_environment, wait_for

from stortrends_ha.cli.demo_layout import PORTS

GIB = 1 << 30
# A fresh demo on a busy machine with two cores: most of it is Python starting seven times.
READY_S = 20.0


class Demo:
    """A running demo."""

    def __init__(self, *options: str, temporary: Path | None = None) -> None:
        self.ports = free_ports(PORTS)
        command = [*PROGRAM, "demo", "--port-base", str(self.ports[0]), *options]
        environment = program_environment() | ({"TMPDIR": str(temporary)} if temporary else {})
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: dict[str, Any] = {}
        self.pids: list[int] = []
        self.by_hand: list[subprocess.Popen[bytes]] = []

    def ready(self) -> "Demo":
        """Wait for its line of JSON."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate())
        self.said = json.loads(line)
        for node in self.nodes.values():
            groups = ask(Path(node["control"]))["groups"]
            self.pids += [node["pid"], *(group["pid"] for group in groups.values())]
        self.pids.append(self.said["witness"]["pid"])
        return self

    def hears(self, words: str) -> str:
        """The next line on its stderr with these words."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if words in line:
                return line
        raise AssertionError(f"it ended and did not say {words!r}")

    @property
    def nodes(self) -> dict[str, Any]:
        nodes: dict[str, Any] = self.said["nodes"]
        return nodes

    def uri(self, volume: str) -> str:
        uri: str = self.said["volumes"][volume]["uri"]
        return uri

    def groups(self, node: str) -> dict[str, Any]:
        groups: dict[str, Any] = ask(Path(self.nodes[node]["control"]))["groups"]
        return groups

    def start_again(self, part: dict[str, Any]) -> int:
        """Run the `command` of a node or the witness that is gone, as a person would; returns its pid."""
        process = subprocess.Popen(
            part["command"], env=program_environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.by_hand.append(process)
        self.pids.append(process.pid)
        return process.pid

    def owner(self, group: str) -> str:
        """Who serves a group now; empty while nobody does."""
        for node in self.nodes:
            with contextlib.suppress(OSError):
                if (view := self.groups(node)[group])["owner"] == node and view["role"] == "primary":
                    return node
        return ""

    def move(self, group: str, to: str) -> None:
        """As a person would, if it is not there already."""
        command = [*PROGRAM, "group", "move", group, "--to", to, "--config", self.said["config"]]
        done = subprocess.run(command, env=program_environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        wait_for(f"{to} owns {group}", lambda: self.owner(group) == to)

    def wait_in_sync(self) -> None:
        def in_sync() -> bool:
            try:
                groups = [group for node in self.nodes for group in self.groups(node).values()]
            except OSError:
                return False
            return all(group["state"] == "in-sync" for group in groups)

        wait_for("every group is in sync", in_sync)

    def end(self, number: signal.Signals) -> tuple[str, str]:
        """Send a signal; what it said until it ended cleanly, on stdout and stderr."""
        self.process.send_signal(number)
        said = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, said
        assert "Traceback" not in said[1]
        return said

    def assert_nothing_left(self) -> None:
        assert not [pid for pid in self.pids if is_running(pid)]
        for port in self.ports:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)), f"port {port} is still served"

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.communicate(timeout=PATIENCE_S)
            finally:
                self.process.kill()
        self.process.communicate()
        for node in self.by_hand:
            node.terminate()
            node.wait(PATIENCE_S)


StartDemo = Callable[..., Demo]


@pytest.fixture
def start() -> Iterator[StartDemo]:
    """Start demos that end with the test."""
    started: list[Demo] = []

    def make(*options: str, temporary: Path | None = None) -> Demo:
        started.append(Demo(*options, temporary=temporary))
        return started[-1]

    yield make
    for demo in started:
        demo.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    found = Demo("--json", "--dir", str(tmp_path_factory.mktemp("demo")))
    try:
        yield found.ready()
    finally:
        found.close()


class TestJson:
    def test_has_the_keys_and_values_of_the_contract(self, demo: Demo) -> None:
        directory, first = demo.said["dir"], demo.ports[0]
        assert set(demo.said) == {"ready", "dir", "config", "nodes", "witness", "volumes"}
        assert demo.said["ready"] is True
        assert demo.said["config"] == f"{directory}/cluster.yaml"
        assert list(demo.nodes) == ["node-a", "node-b"]
        metrics = set()
        for name, node in demo.nodes.items():
            assert set(node) == {"pid", "control", "metrics", "command", "backing"}
            assert node["control"] == f"{directory}/{name}/control.sock"
            assert node["command"][-5:] == ["node", "--config", demo.said["config"], "--name", name]
            assert set(node["backing"]) == {"vm-a", "vm-b"}
            metrics.add(node["metrics"])
        assert metrics <= {f"http://127.0.0.1:{port}/metrics" for port in demo.ports}
        assert len(metrics) == 2
        assert set(demo.said["witness"]) == {"pid", "command"}
        listen, state = f"127.0.0.1:{demo.ports[-1]}", f"{directory}/witness"
        assert demo.said["witness"]["command"][-5:] == ["witness", "--listen", listen, "--state", state]
        assert demo.said["volumes"] == {
            volume: {"uri": f"nbd://127.0.0.1:{port}/{volume}", "group": group, "owner": owner, "size_bytes": GIB}
            for volume, port, group, owner in (
                ("vm-a", first, "rg-a", "node-a"),
                ("vm-b", first + 1, "rg-b", "node-b"),
            )
        }

    def test_was_printed_when_every_group_was_in_sync(self, demo: Demo) -> None:
        for name in demo.nodes:
            groups = demo.groups(name)
            assert {group["state"] for group in groups.values()} == {"in-sync"}
            assert {group["owner"] for group in groups.values()} == {"node-a", "node-b"}

    def test_two_nodes_with_a_data_process_for_each_group_and_a_witness(self, demo: Demo) -> None:
        assert len(set(demo.pids)) == 7
        assert b"witness" in Path(f"/proc/{demo.said['witness']['pid']}/cmdline").read_bytes().split(b"\0")
        for name, node in demo.nodes.items():
            assert ask(Path(node["control"]))["pid"] == node["pid"]
            for group, found in demo.groups(name).items():
                arguments = Path(f"/proc/{found['pid']}/cmdline").read_bytes().split(b"\0")
                assert {group.encode(), name.encode()} <= set(arguments)
                parent = Path(f"/proc/{found['pid']}/stat").read_text().rpartition(")")[2].split()[1]
                assert int(parent) == node["pid"]

    def test_volumes_are_sparse_and_what_is_written_is_in_both_backing_files(self, demo: Demo) -> None:
        for volume in demo.said["volumes"]:
            qemu_io(demo.uri(volume), "write -P 0x5a 512M 1M", "flush")
            paths = [Path(node["backing"][volume]) for node in demo.nodes.values()]
            for path in paths:
                assert path.stat().st_size == GIB
                assert path.stat().st_blocks * 512 < 16 << 20
                with path.open("rb") as file:
                    file.seek(512 << 20)
                    assert file.read(1 << 20) == b"\x5a" * (1 << 20)
            assert not differences(*paths)
            assert json.loads(run("nbdinfo", "--json", demo.uri(volume)))["exports"][0]["export-size"] == GIB

    def test_metrics_are_served(self, demo: Demo) -> None:
        for node in demo.nodes.values():
            with urllib.request.urlopen(node["metrics"], timeout=10) as answer:
                assert b"stortrends_ha_" in answer.read()

    def test_the_config_is_right_and_status_finds_the_nodes(self, demo: Demo) -> None:
        for arguments in (["check"], ["status"], ["status", "--json"]):
            done = subprocess.run(
                [*PROGRAM, *arguments, "--config", demo.said["config"]],
                env=program_environment(), capture_output=True, text=True, timeout=30,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert "node-a" in done.stdout
            assert "node-b" in done.stdout


def test_without_the_witness_nothing_happens_and_its_command_starts_it_again(demo: Demo) -> None:
    before = {group: demo.owner(group) for group in ("rg-a", "rg-b")}
    with load(demo.uri("vm-a")) as running:
        os.kill(demo.said["witness"]["pid"], signal.SIGKILL)
        demo.hears("The witness was killed by SIGKILL. The demo goes on; to start it again:")
        demo.wait_in_sync()
        assert {group: demo.owner(group) for group in before} == before
        pid = demo.start_again(demo.said["witness"])
        demo.hears(f"The witness runs again (pid {pid}).")
        running.finish()


@pytest.mark.parametrize("name", ["node-a", "node-b"])
def test_a_killed_owner_is_replaced_at_the_same_uri_and_its_command_starts_it_again(demo: Demo, name: str) -> None:
    other = next(node for node in demo.nodes if node != name)
    demo.move("rg-a", name)
    demo.move("rg-b", other)
    nbdsh("h.connect_uri(uri[0]); h.pwrite(b'acknowledged' * 1000, 4096)", demo.uri("vm-a"))
    pids = [group["pid"] for group in demo.groups(name).values()]
    with load(demo.uri("vm-b")) as running:
        os.kill(ask(Path(demo.nodes[name]["control"]))["pid"], signal.SIGKILL)
        wait_for("its data processes are gone", lambda: not any(is_running(each) for each in pids), 10)
        demo.hears(f"{name} was killed by SIGKILL. The demo goes on; to start it again:")
        wait_for(f"{other} takes over", lambda: demo.owner("rg-a") == other)
        demo.hears(f"rg-a: {other} owns it, ")
        nbdsh("h.connect_uri(uri[0]); assert h.pread(12000, 4096) == b'acknowledged' * 1000", demo.uri("vm-a"))
        nbdsh("h.connect_uri(uri[0]); h.pwrite(b'alone' * 1000, 65536); h.flush()", demo.uri("vm-a"))
        pid = demo.start_again(demo.nodes[name])
        demo.hears(f"{name} runs again (pid {pid}).")
        demo.wait_in_sync()
        running.finish()
    assert demo.owner("rg-a") == other
    for volume in ("vm-a", "vm-b"):
        assert not differences(*(Path(each["backing"][volume]) for each in demo.nodes.values()))


def test_ctrl_c_ends_it_with_what_was_started_by_hand(demo: Demo) -> None:
    """The last test with the module's demo."""
    assert len(demo.by_hand) == 3
    out, _ = demo.end(signal.SIGINT)
    assert out == "", "more than one line on stdout"
    assert [process.wait(PATIENCE_S) for process in demo.by_hand] == [0, 0, 0]
    demo.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_its_temporary_directory_goes_with_it(start: StartDemo, tmp_path: Path, number: signal.Signals) -> None:
    demo = start("--json", temporary=tmp_path).ready()
    assert Path(demo.said["dir"]).parent == tmp_path
    demo.end(number)
    demo.assert_nothing_left()
    assert not list(tmp_path.iterdir())


def test_a_directory_is_used_again_with_its_data_and_its_owners(start: StartDemo, tmp_path: Path) -> None:
    directory = tmp_path / "state"
    began_s = time.monotonic()
    demo = start("--json", "--dir", str(directory)).ready()
    assert time.monotonic() - began_s < READY_S
    qemu_io(demo.uri("vm-a"), "write -P 0x42 1M 1M", "flush")
    demo.move("rg-a", "node-b")
    demo.wait_in_sync()
    demo.end(signal.SIGTERM)
    demo.assert_nothing_left()
    began_s = time.monotonic()
    demo = start("--json", "--dir", str(directory)).ready()
    assert time.monotonic() - began_s < READY_S
    assert demo.said["dir"] == str(directory)
    assert [volume["owner"] for volume in demo.said["volumes"].values()] == ["node-b", "node-b"]
    qemu_io(demo.uri("vm-a"), "read -P 0x42 1M 1M")
    demo.end(signal.SIGINT)
    demo.assert_nothing_left()


def test_told_to_stop_before_it_is_ready_it_stops(start: StartDemo, tmp_path: Path) -> None:
    demo = start("--json", temporary=tmp_path)
    wait_for("it has begun", lambda: list(tmp_path.iterdir()))
    out, _ = demo.end(signal.SIGTERM)
    assert out == ""
    demo.assert_nothing_left()
    assert not list(tmp_path.iterdir())


def test_killed_it_leaves_no_process(start: StartDemo, tmp_path: Path) -> None:
    demo = start("--json", "--dir", str(tmp_path / "d")).ready()
    demo.process.kill()
    demo.process.communicate()
    wait_for("its nodes end with it", lambda: not [pid for pid in demo.pids if is_running(pid)])
    demo.assert_nothing_left()


def test_a_directory_may_have_a_path_that_is_too_long_for_unix_sockets(start: StartDemo, tmp_path: Path) -> None:
    demo = start("--json", "--dir", str(tmp_path / ("x" * 120))).ready()
    command = [*PROGRAM, "status", "--json", "--config", demo.said["config"]]
    asked = subprocess.run(command, env=program_environment(), capture_output=True, text=True, check=True)
    assert sorted(json.loads(asked.stdout)["nodes"]) == ["node-a", "node-b"]


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    ports = free_ports(PORTS)
    with socket.create_server(("127.0.0.1", ports[3])):
        done = subprocess.run(
            [*PROGRAM, "demo", "--port-base", str(ports[0]), "--dir", str(tmp_path / "d")],
            env=program_environment(), capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    assert done.returncode == 1
    assert str(ports[3]) in done.stderr
    assert "Traceback" not in done.stderr


def test_without_json_it_says_in_plain_words_what_runs_where_and_what_to_try(start: StartDemo, tmp_path: Path) -> None:
    demo = start("--dir", str(tmp_path / "d"))
    assert demo.process.stdout is not None
    said = ""
    deadline_s = time.monotonic() + PATIENCE_S
    while "Ctrl-C" not in said:
        assert time.monotonic() < deadline_s
        line = demo.process.stdout.readline()
        assert line, demo.process.communicate()
        said += line
    for word in (
        "node-a",
        "node-b",
        "The witness",
        *(f"owns rg-{v} with volume vm-{v}, 1 GiB: nbd://127.0.0.1:{demo.ports[n]}/vm-{v}" for n, v in enumerate("ab")),
    ):
        assert word in said
    for words in (" status --config ", " group move rg-a --to node-b ", " group move rg-a --to node-a "):
        (command,) = (line for line in said.splitlines() if words in line)
        done = subprocess.run(
            shlex.split(command), env=program_environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (command, done.stderr)
    demo.hears("rg-a: node-a owns it, in-sync")
    demo.end(signal.SIGINT)
    demo.assert_nothing_left()
