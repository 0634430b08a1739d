"""The demo's cluster file and ports, and the command line around it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stortrends_ha import __version__
from stortrends_ha.cli.demo_layout import PORTS, VOLUME_BYTES, Layout
from stortrends_ha.cli.main import main
from stortrends_ha.config import load
from stortrends_ha.errors import StartError, StorageError


@pytest.mark.parametrize("name", ["plain", "with space", "q'u\"o: te#", "ünïcode"])
def test_the_demos_cluster_file_is_right_in_any_directory(tmp_path: Path, name: str) -> None:
    layout = Layout(tmp_path / name, 20000)
    layout.prepare()
    cluster = load(layout.config)
    for node in cluster.nodes.values():
        assert node.control == layout.control(node.name)
        assert str(node.metrics) == layout.metrics(node.name)
    for group in layout.groups:
        (volume,) = cluster.groups[group.name].volumes
        assert group.uri == f"nbd://{cluster.groups[group.name].nbd}/{volume.name}"
        assert volume.backing == {node: layout.backing(node, volume.name) for node in cluster.nodes}


def test_every_port_lies_in_the_announced_range_and_is_used_once(tmp_path: Path) -> None:
    layout = Layout(tmp_path, 20000)
    ports = [group.nbd_port for group in layout.groups]
    ports += [port for group in layout.groups for port in group.link_ports.values()]
    ports += [int(layout.metrics(node).rpartition(":")[2]) for node in ("node-a", "node-b")]
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


def test_a_port_in_use_is_an_error_that_names_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
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
    assert f"{port!r} is not a port from 1 to 65528" in capsys.readouterr().err


def free_ports() -> int:
    """The first of as many free ports as the demo needs, below those that the kernel hands out."""
    for base in range(20000 + os.getpid() % 900 * 10, 32000, PORTS):
        try:
            Layout(Path("/"), base).check_ports()
        except StartError:
            continue
        return base
    pytest.fail("no free ports")


def test_the_announcement_is_one_json_line_with_these_keys(tmp_path: Path) -> None:
    from stortrends_ha.cli.demo import _as_json
    from stortrends_ha.cli.demo_nodes import DemoNode

    layout = Layout(tmp_path, 20000)
    announced = json.loads(json.dumps(_as_json(layout, [DemoNode(name, layout) for name in ("node-a", "node-b")])))
    assert list(announced) == ["ready", "dir", "config", "nodes", "volumes"]
    assert list(announced["nodes"]["node-a"]) == ["pid", "control", "metrics", "command", "backing"]
    assert announced["nodes"]["node-b"]["command"][-5:] == [
        "node", "--config", f"{tmp_path}/cluster.yaml", "--name", "node-b",
    ]  # fmt: skip
    assert announced["volumes"]["vm-b"] == {
        "uri": "nbd://127.0.0.1:20001/vm-b", "group": "rg-b", "owner": "node-b", "size_bytes": 1 << 30,
    }  # fmt: skip
