"""A node that cannot start says why in a sentence that names the thing, and ends with exit code 1."""

import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clients import run
from files import MIB
from harness import GROUP, OWNER, PROGRAM, SECONDARY, Cluster, program_environment

Change = Callable[[dict[str, Any]], None]


def fails(cluster: Cluster, *words: str, node: str = OWNER, change: Change = lambda _: None) -> None:
    """The node ends with code 1; the last thing it says is one sentence with these words."""
    config = cluster.directory / "wrong.yaml"
    config.write_text(json.dumps(cluster.changed_spec(change)))
    fails_with(config, node, *words)


def fails_with(config: Path, node: str, *words: str) -> None:
    done = subprocess.run(
        [*PROGRAM, "node", "--config", str(config), "--name", node],
        env=program_environment(), capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("stortrends-ha: ")]
    assert len(said) == 1, done.stderr
    for word in words:
        assert word in done.stderr[done.stderr.index("stortrends-ha: ") :], done.stderr


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    """Not started."""
    return make_cluster()


@pytest.mark.parametrize("node", [OWNER, SECONDARY])
class TestBacking:
    def test_missing(self, cluster: Cluster, node: str) -> None:
        cluster.backing(node).unlink()
        fails(cluster, "vm-a", str(cluster.backing(node)), "does not exist", node=node)

    def test_too_small(self, cluster: Cluster, node: str) -> None:
        os.truncate(cluster.backing(node), 63 * MIB)
        fails(cluster, "vm-a", str(cluster.backing(node)), f"{63 * MIB}", f"{64 * MIB}", node=node)

    def test_a_directory(self, cluster: Cluster, node: str) -> None:
        cluster.backing(node).unlink()
        cluster.backing(node).mkdir()
        fails(cluster, "vm-a", str(cluster.backing(node)), node=node)

    def test_a_read_only_device(self, cluster: Cluster, node: str) -> None:
        with read_only_device(cluster.backing(node)) as device:
            fails(cluster, "vm-a", device, node=node, change=with_backing(node, device))

    def test_a_file_on_a_read_only_filesystem(self, cluster: Cluster, node: str, tmp_path: Path) -> None:
        with read_only_directory(cluster.backing(node).parent, tmp_path / "ro") as directory:
            path = str(directory / "vm-a.img")
            fails(cluster, "vm-a", path, "Read-only file system", node=node, change=with_backing(node, path))

    def test_in_use_by_another_node(self, cluster: Cluster, make_cluster: Callable[..., Cluster], node: str) -> None:
        cluster.nodes[node].start()
        cluster.nodes[node].wait_ready()
        path = str(cluster.backing(node))
        fails(make_cluster(), "vm-a", path, "another process uses", node=node, change=with_backing(node, path))


def with_backing(node: str, path: str) -> Change:
    def change(spec: dict[str, Any]) -> None:
        spec["groups"][GROUP]["volumes"]["vm-a"]["backing"][node] = path

    return change


@contextlib.contextmanager
def read_only_device(file: Path) -> Iterator[str]:
    assert os.geteuid() == 0, "this test needs root, for a loop device"
    device = run("losetup", "--find", "--show", "--read-only", file).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def read_only_directory(source: Path, target: Path) -> Iterator[Path]:
    assert os.geteuid() == 0, "this test needs root, for a mount"
    target.mkdir()
    run("mount", "--bind", source, target)
    try:
        run("mount", "-o", "remount,bind,ro", target)
        yield target
    finally:
        run("umount", target)


class TestAddressInUse:
    @pytest.mark.parametrize(
        ("node", "port", "word"),
        [(OWNER, 0, "NBD"), (SECONDARY, 2, "link"), (OWNER, 3, "metrics"), (SECONDARY, 4, "metrics")],
    )
    def test_of_a_port(self, cluster: Cluster, node: str, port: int, word: str) -> None:
        with socket.create_server(("127.0.0.1", cluster.ports[port])):
            fails(cluster, f"127.0.0.1:{cluster.ports[port]}", word, "in use", node=node)

    def test_of_a_host_that_is_not_here(self, cluster: Cluster) -> None:
        fails(
            cluster, "192.0.2.1:10809", "NBD",
            change=lambda spec: spec["groups"][GROUP].update(nbd="192.0.2.1:10809"),
        )  # fmt: skip

    def test_a_unix_socket_that_somebody_serves(self, cluster: Cluster, tmp_path: Path) -> None:
        path = str(tmp_path / "s.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            fails(
                cluster,
                path,
                change=lambda spec: spec["groups"][GROUP].update(nbd_unix={OWNER: path, SECONDARY: path + "b"}),
            )

    def test_a_unix_socket_that_nobody_serves_is_replaced(self, cluster: Cluster, tmp_path: Path) -> None:
        path = str(tmp_path / "s.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
        cluster.owner.start(cluster.changed_spec(lambda spec: spec["groups"][GROUP].update(nbd_unix={OWNER: path})))
        cluster.owner.wait_ready()

    def test_a_second_instance_of_the_node(self, cluster: Cluster) -> None:
        cluster.owner.start()
        cluster.owner.wait_ready()
        fails(cluster, f"pid {cluster.owner.pid}", str(cluster.owner.state_dir))


class TestConfiguration:
    def test_every_mistake_is_named(self, cluster: Cluster) -> None:
        def wrong(spec: dict[str, Any]) -> None:
            spec["groups"][GROUP]["volumes"]["vm-a"]["size"] = "lots"
            spec["groups"][GROUP]["prefered_owner"] = "node-a"
            spec["limits"]["connections"] = -1

        fails(
            cluster, "lots", f"groups.{GROUP}.volumes.vm-a.size", "prefered_owner", "limits.connections", change=wrong
        )

    def test_a_file_that_does_not_exist(self, tmp_path: Path) -> None:
        fails_with(tmp_path / "nothing.yaml", OWNER, str(tmp_path / "nothing.yaml"))

    def test_a_file_that_is_not_yaml(self, tmp_path: Path) -> None:
        config = tmp_path / "broken.yaml"
        config.write_text("nodes: [unclosed\n")
        fails_with(config, OWNER, str(config), "line")

    def test_an_unknown_node(self, cluster: Cluster) -> None:
        fails(cluster, "'node-z'", OWNER, SECONDARY, node="node-z")


class TestState:
    def test_a_damaged_state_file(self, cluster: Cluster) -> None:
        path = cluster.state_file(OWNER)
        path.parent.mkdir(parents=True)
        for text in ("", "{", "[]", '{"group": "rg-a"}', '{"group": "other", "record": {}}'):
            path.write_text(text)
            fails(cluster, GROUP, str(path), "damaged")

    def test_a_state_directory_that_is_a_file(self, cluster: Cluster) -> None:
        path = cluster.directory / "file"
        path.touch()
        fails(cluster, str(path), change=lambda spec: spec["nodes"][OWNER].update(state_dir=str(path)))
