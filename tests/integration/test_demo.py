"""`stortrends-ha demo`: its line of JSON means what it says, and it leaves nothing behind."""

import json
import os
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

PORTS = 8
GIB = 1 << 30


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
        return self

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

    def start_again(self, name: str) -> None:
        """Run the `command` of a node that is gone, as a person would."""
        node = subprocess.Popen(
            self.nodes[name]["command"], env=program_environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.by_hand.append(node)
        self.pids.append(node.pid)

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
        assert set(demo.said) == {"ready", "dir", "config", "nodes", "volumes"}
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

    def test_two_nodes_with_a_data_process_for_each_group(self, demo: Demo) -> None:
        assert len(set(demo.pids)) == 6
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


@pytest.mark.parametrize("name", ["node-a", "node-b"])
def test_a_killed_node_takes_its_data_processes_with_it_and_its_command_starts_it_again(demo: Demo, name: str) -> None:
    node = demo.nodes[name]
    mine, other = ("vm-a", "vm-b") if name == "node-a" else ("vm-b", "vm-a")
    nbdsh("h.connect_uri(uri[0]); h.pwrite(b'acknowledged' * 1000, 4096)", demo.uri(mine))
    pids = [group["pid"] for group in demo.groups(name).values()]
    pid = ask(Path(node["control"]))["pid"]
    with load(demo.uri(other)) as running:
        wait_for(
            "it writes", lambda: any(group["clients"] for node in demo.nodes for group in demo.groups(node).values())
        )
        os.kill(pid, signal.SIGKILL)
        wait_for("its data processes are gone", lambda: not any(is_running(each) for each in pids), 10)
        assert demo.process.poll() is None
        demo.start_again(name)
        demo.wait_in_sync()
        running.finish()
    nbdsh("h.connect_uri(uri[0]); assert h.pread(12000, 4096) == b'acknowledged' * 1000", demo.uri(mine))
    for volume in (mine, other):
        assert not differences(*(Path(each["backing"][volume]) for each in demo.nodes.values()))


def test_ctrl_c_ends_it_with_the_nodes_that_were_started_by_hand(demo: Demo) -> None:
    """The last test with the module's demo."""
    assert len(demo.by_hand) == 2
    out, _ = demo.end(signal.SIGINT)
    assert out == "", "more than one line on stdout"
    assert [node.wait(PATIENCE_S) for node in demo.by_hand] == [0, 0]
    demo.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_its_temporary_directory_goes_with_it(start: StartDemo, tmp_path: Path, number: signal.Signals) -> None:
    demo = start("--json", temporary=tmp_path).ready()
    assert Path(demo.said["dir"]).parent == tmp_path
    demo.end(number)
    demo.assert_nothing_left()
    assert not list(tmp_path.iterdir())


def test_a_directory_is_used_again_with_its_data(start: StartDemo, tmp_path: Path) -> None:
    directory = tmp_path / "state"
    demo = start("--json", "--dir", str(directory)).ready()
    qemu_io(demo.uri("vm-a"), "write -P 0x42 1M 1M", "flush")
    demo.end(signal.SIGTERM)
    demo.assert_nothing_left()
    demo = start("--json", "--dir", str(directory)).ready()
    assert demo.said["dir"] == str(directory)
    qemu_io(demo.uri("vm-a"), "read -P 0x42 1M 1M")
    assert "nothing was lost" in (directory / "node-a" / "node.log").read_text()
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
        "rg-a",
        "rg-b",
        *(f"nbd://127.0.0.1:{demo.ports[n]}/vm-{v}" for n, v in ((0, "a"), (1, "b"))),
    ):
        assert word in said
    demo.end(signal.SIGINT)
    demo.assert_nothing_left()
