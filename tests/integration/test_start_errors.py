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
from clients import nbdsh, run
from files import MIB
from harness import GROUP, OWNER, PROGRAM, SECONDARY, Cluster, Node, program_environment

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


class TestBacking:
    """Volumes are opened before it is known who owns them: both nodes say the same."""

    def test_missing(self, cluster: Cluster) -> None:
        cluster.backing(OWNER).unlink()
        fails(cluster, "vm-a", str(cluster.backing(OWNER)), "does not exist")

    def test_too_small(self, cluster: Cluster) -> None:
        os.truncate(cluster.backing(OWNER), 63 * MIB)
        fails(cluster, "vm-a", str(cluster.backing(OWNER)), f"{63 * MIB}", f"{64 * MIB}")

    def test_a_directory(self, cluster: Cluster) -> None:
        cluster.backing(OWNER).unlink()
        cluster.backing(OWNER).mkdir()
        fails(cluster, "vm-a", str(cluster.backing(OWNER)))

    def test_a_read_only_device(self, cluster: Cluster) -> None:
        with read_only_device(cluster.backing(OWNER)) as device:
            fails(cluster, "vm-a", device, change=with_backing(device))

    def test_a_file_on_a_read_only_filesystem(self, cluster: Cluster, tmp_path: Path) -> None:
        with read_only_directory(cluster.backing(OWNER).parent, tmp_path / "ro") as directory:
            path = str(directory / "vm-a.img")
            fails(cluster, "vm-a", path, "Read-only file system", change=with_backing(path))

    def test_in_use_by_another_node(self, cluster: Cluster, make_cluster: Callable[..., Cluster]) -> None:
        cluster.owner.start()
        cluster.owner.wait_ready()
        path = str(cluster.backing(OWNER))
        fails(make_cluster(), "vm-a", path, "another process uses", change=with_backing(path))


def with_backing(path: str) -> Change:
    def change(spec: dict[str, Any]) -> None:
        spec["groups"][GROUP]["volumes"]["vm-a"]["backing"][OWNER] = path

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
    @pytest.mark.parametrize(("node", "port"), [(OWNER, 3), (SECONDARY, 4)])
    def test_of_the_metrics(self, cluster: Cluster, node: str, port: int) -> None:
        with socket.create_server(("127.0.0.1", cluster.ports[port])):
            fails(cluster, f"127.0.0.1:{cluster.ports[port]}", "metrics", "in use", node=node)

    def test_of_the_volumes_is_said_and_is_waited_for(self, make_cluster: Callable[..., Cluster]) -> None:
        """A floating address moves, so who holds a port now may let go of it at any moment."""
        cluster = make_cluster(unix_socket=True)
        nbd, link = (("127.0.0.1", port) for port in (cluster.nbd_port, cluster.link_port))
        path = cluster.unix_path
        with contextlib.ExitStack() as stack:
            in_the_way = [
                stack.enter_context(socket.create_server(nbd)),
                stack.enter_context(socket.create_server(path, family=socket.AF_UNIX)),
            ]
            with socket.create_server(link):
                for node in cluster.nodes.values():
                    node.start()
                self.assert_says(cluster.secondary, f"127.0.0.1:{cluster.link_port}", "link", "in use")
                self.assert_says(cluster.owner, f"127.0.0.1:{cluster.nbd_port}", "NBD", "in use")
            cluster.secondary.wait("listens for the owner", lambda group: group["state"] != "held")
            in_the_way.pop(0).close()
            self.assert_says(cluster.owner, path)
        cluster.wait_in_sync()
        for uri in (cluster.uri(), cluster.unix_uri()):
            nbdsh("h.connect_uri(uri[0]); h.pwrite(b'x', 0)", uri)

    @staticmethod
    def assert_says(node: Node, *words: str) -> None:
        found = node.wait("says it", lambda group: group["state"] == "held" and words[0] in group["why"])
        for word in words:
            assert word in found["why"]

    def test_a_unix_socket_that_nobody_serves_is_replaced(self, make_cluster: Callable[..., Cluster]) -> None:
        cluster = make_cluster(unix_socket=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(cluster.unix_path)
        cluster.start()
        nbdsh("h.connect_uri(uri[0]); h.pread(1, 0)", cluster.unix_uri())

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


class TestKey:
    def test_missing(self, cluster: Cluster) -> None:
        cluster.key_file.unlink()
        fails(cluster, str(cluster.key_file))

    def test_that_others_can_read(self, cluster: Cluster) -> None:
        cluster.key_file.chmod(0o644)
        fails(cluster, str(cluster.key_file), "chmod 600")

    def test_too_short(self, cluster: Cluster) -> None:
        cluster.key_file.write_text("secret")
        fails(cluster, str(cluster.key_file), "32")


class TestState:
    def test_a_damaged_state_file(self, cluster: Cluster) -> None:
        path = cluster.state_file(OWNER)
        path.parent.mkdir(parents=True)
        for text in ("", "[]", '{"group": "other", "lineage": ""}'):
            path.write_text(text)
            fails(cluster, GROUP, str(path), "damaged")

    def test_a_state_file_of_a_version_before_the_record_moved(self, cluster: Cluster) -> None:
        path = cluster.state_file(OWNER)
        path.parent.mkdir(parents=True)
        path.write_text('{"group": "rg-a", "record": {}}')
        fails(cluster, GROUP, str(path), "version")

    def test_a_damaged_record(self, cluster: Cluster) -> None:
        """To guess would be to forget who owns."""
        path = cluster.owner.state_dir / "records" / f"{GROUP}.json"
        path.parent.mkdir(parents=True)
        for text in ("{", '{"record": {"epoch": 3, "owner": "node-a", "in_sync": []}, "alone_since": 0}'):
            path.write_text(text)
            fails(cluster, GROUP, str(path), "damaged")
        path.write_text('{"record": {"epoch": 3, "owner": "node-x", "in_sync": ["node-x"]}, "alone_since": 3}')
        fails(cluster, GROUP, str(path), "damaged", "no node node-x")

    def test_a_state_directory_that_is_a_file(self, cluster: Cluster) -> None:
        path = cluster.directory / "file"
        path.touch()
        fails(cluster, str(path), change=lambda spec: spec["nodes"][OWNER].update(state_dir=str(path)))
