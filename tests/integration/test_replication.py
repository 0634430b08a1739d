"""Two nodes while processes are killed, stopped and started: no client error, and in the end identical replicas."""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clients import load, qemu_io, run, start
from files import MIB, allocated_bytes
from harness import OWNER, PATIENCE_S, SECONDARY, Cluster, wait_for

WRITE_AND_PRINT = """
import sys
h.connect_uri(uri[0])
number = 0
while True:
    number += 1
    block = number % 4096
    h.pwrite(number.to_bytes(4) * 1024, block * 4096, nbd.CMD_FLAG_FUA if number % 16 == 0 else 0)
    print(number, flush=True)
"""


def written(cluster: Cluster) -> int:
    count: int = cluster.owner.group()["volumes"]["vm-a"]["counters"]["writes"]
    return count


def wait_for_writes(cluster: Cluster, more: int = 1000) -> None:
    before = written(cluster)
    wait_for("clients go on writing", lambda: written(cluster) > before + more)


def assert_settled_and_identical(cluster: Cluster) -> None:
    cluster.wait_in_sync().settle()
    cluster.assert_identical()


class TestTrimsAndZeroes:
    def test_are_mirrored_as_such(self, cluster: Cluster) -> None:
        qemu_io(cluster.uri(), "write -P 1 0 16M", "flush")
        assert all(allocated_bytes(path) >= 16 * MIB for path in cluster.backings())
        qemu_io(cluster.uri(), "discard 0 8M", "write -z -u 8M 4M", "flush")
        assert all(allocated_bytes(path) <= 5 * MIB for path in cluster.backings())
        cluster.assert_identical()

    def test_zeroes_that_must_stay_provisioned_are_so_on_both_nodes(self, cluster: Cluster) -> None:
        qemu_io(cluster.uri(), "write -z 0 8M", "flush")
        assert all(allocated_bytes(path) >= 8 * MIB for path in cluster.backings())
        cluster.assert_identical()


class TestClients:
    @pytest.mark.parametrize("turn", range(3))
    def test_one_that_is_killed_in_the_middle_of_large_writes_leaves_identical_replicas(
        self, cluster: Cluster, turn: int
    ) -> None:
        script = """
import os
h.connect_uri(uri[0])
data = [nbd.Buffer.from_bytearray(bytearray(os.urandom(9 << 20))) for _ in range(4)]
number = 0
while True:
    while h.aio_in_flight() < 4:
        number += 1
        h.aio_pwrite(data[number % 4], (number % 3) * 123457, completion=lambda error: 1)
    h.poll(-1)
"""
        process = start("nbdsh", "-c", f"uri = {[cluster.uri()]!r}", "-c", script)
        try:
            wait_for_writes(cluster, 20 + 30 * turn)
        finally:
            process.kill()
            process.communicate()
        cluster.settle()
        cluster.assert_identical()

    def test_a_write_that_is_cut_off_is_applied_on_both_nodes_or_on_none(self, cluster: Cluster) -> None:
        """A short one not at all; of a long one, whole pieces may have been written before the end."""
        for length, sent in ((8192, 5000), (4 * MIB, 3 * MIB + 17)):
            qemu_io(cluster.uri(), "write -P 0x33 0 8M")
            with socket.create_connection(("127.0.0.1", cluster.nbd_port)) as connection:
                connection.sendall(
                    bytes.fromhex("00000003") + b"IHAVEOPT" + bytes.fromhex("00000001 00000004") + b"vm-a"
                )
                request = bytes.fromhex("25609513 0000 0001") + bytes(8) + bytes(8) + length.to_bytes(4)
                connection.sendall(request + b"\x44" * sent)
            cluster.settle()
            cluster.assert_identical()
            with cluster.backing(OWNER).open("rb") as file:
                found = file.read(8 * MIB).rstrip(b"\x33")
            assert found == b"\x44" * len(found)
            assert len(found) <= sent
            assert length > 256 * 1024 or not found


class TestSecondary:
    def test_killed_under_load_and_started_again(self, cluster: Cluster) -> None:
        """Writes are held, and `status` says so; they go on, nothing is copied, and no client sees an error."""
        with load(cluster.uri()) as running:
            wait_for_writes(cluster)
            cluster.secondary.kill()
            held = cluster.owner.wait_state("held")
            assert re.search(r"\d+ requests of clients are held", held["why"]), held["why"]
            assert "node-b" in held["why"]
            assert held["window"]["changes"] > 0
            stuck = written(cluster)
            assert cluster.owner.status()["nodes"][SECONDARY]["state"] == "not answering"
            said = cluster.owner.log_since()
            cluster.secondary.start()
            cluster.wait_in_sync()
            assert "resume, because nothing was lost" in said()
            wait_for_writes(cluster)
            assert written(cluster) > stuck
            running.finish()
        assert_settled_and_identical(cluster)
        assert cluster.owner.group()["why"] == ""

    def test_reads_are_served_while_it_is_away_and_a_write_waits(self, cluster: Cluster) -> None:
        qemu_io(cluster.uri(), "write -P 7 0 64k")
        cluster.secondary.kill()
        cluster.owner.wait("misses the peer", lambda group: group["link"]["state"] != "connected")
        # Read-only, because QEMU flushes when it closes a volume that it may have written to.
        run("qemu-io", "-r", "-f", "raw", "-c", "read -P 7 0 64k", cluster.uri())
        process = start("qemu-io", "-f", "raw", "-c", "write -P 8 1M 64k", "-c", "flush", cluster.uri())
        try:
            cluster.owner.wait("holds the write", lambda group: group["state"] == "held" and group["window"]["changes"])
            assert process.poll() is None
            cluster.secondary.start()
            said, _ = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
            process.communicate()
        assert "wrote 65536/65536" in said
        cluster.assert_holds(MIB, b"\x08" * 65536)
        cluster.assert_identical()

    def test_stopped_for_longer_than_the_link_timeout_and_continued(self, cluster: Cluster) -> None:
        with load(cluster.uri()) as running:
            wait_for_writes(cluster)
            pid = cluster.secondary.data_pid
            os.kill(pid, signal.SIGSTOP)
            try:
                held = cluster.owner.wait_state("held")
                assert "node-b" in held["why"]
            finally:
                os.kill(pid, signal.SIGCONT)
            cluster.wait_in_sync()
            wait_for_writes(cluster)
            running.finish()
        assert_settled_and_identical(cluster)

    def test_stopped_before_it_took_all_that_the_network_had(self, cluster: Cluster) -> None:
        """What the old connection still holds is not applied in the new session."""
        process = start(
            "nbdsh", "-c", f"uri = {[cluster.uri()]!r}", "-c", WRITE_AND_PRINT, stdout=subprocess.DEVNULL
        )
        try:
            wait_for_writes(cluster)
            pid = cluster.secondary.data_pid
            os.kill(pid, signal.SIGSTOP)
            try:
                cluster.owner.wait_state("held")
            finally:
                os.kill(pid, signal.SIGCONT)
            wait_for_writes(cluster)
        finally:
            process.kill()
            process.communicate()
        assert_settled_and_identical(cluster)

    def test_its_data_process_is_started_again(self, cluster: Cluster) -> None:
        with load(cluster.uri()) as running:
            wait_for_writes(cluster)
            pid = cluster.secondary.data_pid
            os.kill(pid, signal.SIGKILL)
            cluster.secondary.wait("restarts its data process", lambda group: group["pid"] not in (None, pid))
            cluster.wait_in_sync()
            assert cluster.secondary.group()["restarts"] == 1
            wait_for_writes(cluster)
            running.finish()
        assert_settled_and_identical(cluster)


@pytest.fixture
def writer(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[[], int]]:
    """A client that writes numbered blocks. Called, it waits for its end: the last number that was acknowledged."""
    said = tmp_path / "numbers"
    with said.open("w") as stdout:
        process = start("nbdsh", "-c", f"uri = {[cluster.uri()]!r}", "-c", WRITE_AND_PRINT, stdout=stdout)

    def ended() -> int:
        _, error = process.communicate(timeout=PATIENCE_S)
        assert "nbd" in error  # the connection was lost, and it does not reconnect
        return int(said.read_text().split()[-1])

    yield ended
    process.kill()
    process.communicate()


def assert_holds_numbers_up_to(cluster: Cluster, last: int) -> None:
    """Every block that WRITE_AND_PRINT was answered for holds its number; the one after the last may."""
    for path in cluster.backings():
        data = path.read_bytes()
        for number in range(max(1, last - 4000), last + 1):
            at = number % 4096 * 4096
            assert data[at : at + 4096] == number.to_bytes(4) * 1024, f"write {number} of {last} is missing in {path}"


class TestOwner:
    def test_killed_data_process_is_started_again_and_compares(
        self, cluster: Cluster, writer: Callable[[], int]
    ) -> None:
        wait_for_writes(cluster)
        said = cluster.owner.log_since()
        pid = cluster.owner.data_pid
        os.kill(pid, signal.SIGKILL)
        last = writer()
        cluster.owner.wait("restarts its data process", lambda group: group["pid"] not in (None, pid))
        cluster.wait_in_sync()
        assert "full, because node-a was killed" in said()
        assert_settled_and_identical(cluster)
        assert_holds_numbers_up_to(cluster, last)

    def test_killed_node_under_load_takes_its_data_processes_along_and_is_started_again(
        self, cluster: Cluster, writer: Callable[[], int]
    ) -> None:
        wait_for_writes(cluster)
        cluster.owner.kill()
        last = writer()
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", cluster.nbd_port)):
            pass
        seen = cluster.secondary.wait("misses the owner", lambda group: group["link"]["state"] != "connected")
        assert "node-a" in seen["why"]
        cluster.owner.start()
        assert_settled_and_identical(cluster)
        assert_holds_numbers_up_to(cluster, last)

    def test_a_client_that_reconnects_sees_no_error(self, cluster: Cluster) -> None:
        target = f"driver=raw,file.driver=nbd,file.host=127.0.0.1,file.port={cluster.nbd_port},file.export=vm-a"
        commands = [f"write -P {number} {number * 64}k 64k" for number in range(1, 61)]
        options = [part for command in commands for part in ("-c", command, "-c", "sleep 50")]
        process = start("qemu-io", "--image-opts", *options, "-c", "flush", f"{target},file.reconnect-delay=60")
        try:
            wait_for("the first writes", lambda: written(cluster) >= 5)
            cluster.owner.kill()
            cluster.owner.start()
            said, error = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
            process.communicate()
        assert said.count("wrote 65536/65536") == 60, said + error
        assert "failed" not in said + error
        assert_settled_and_identical(cluster)
        for number in range(1, 61):
            cluster.assert_holds(number * 65536, bytes([number]) * 65536)

    def test_killed_again_during_the_comparison(self, cluster: Cluster, writer: Callable[[], int]) -> None:
        qemu_io(cluster.uri(), "write -P 9 20M 40M")
        wait_for_writes(cluster)
        cluster.owner.kill()
        last = writer()
        for _ in range(2):
            cluster.owner.start()
            cluster.owner.wait("begins to compare", lambda group: group["state"] in ("syncing", "in-sync"))
            cluster.owner.kill()
        cluster.owner.start()
        assert_settled_and_identical(cluster)
        assert_holds_numbers_up_to(cluster, last)

    def test_both_killed_under_load(self, cluster: Cluster, writer: Callable[[], int]) -> None:
        wait_for_writes(cluster)
        cluster.secondary.kill()
        cluster.owner.wait_state("held")
        cluster.owner.kill()
        last = writer()
        cluster.start()
        assert_settled_and_identical(cluster)
        assert_holds_numbers_up_to(cluster, last)


class TestOrderlyRestart:
    @pytest.mark.parametrize("name", [OWNER, SECONDARY])
    def test_needs_no_comparison(self, cluster: Cluster, name: str) -> None:
        qemu_io(cluster.uri(), "write -P 3 0 8M", "flush")
        node = cluster.nodes[name]
        said = cluster.owner.log_since()
        node.stop()
        node.start()
        cluster.wait_in_sync()
        assert "resume, because nothing was lost" in said()
        assert "full" not in said()
        qemu_io(cluster.uri(), "read -P 3 0 8M", "write -P 4 1M 1M")
        cluster.assert_identical()

    def test_of_both_needs_no_comparison(self, cluster: Cluster) -> None:
        qemu_io(cluster.uri(), "write -P 3 0 8M")
        said = cluster.owner.log_since()
        for node in cluster.nodes.values():
            node.stop()
        cluster.start()
        assert "resume, because nothing was lost" in said()
        qemu_io(cluster.uri(), "read -P 3 0 8M")
        cluster.assert_identical()

    def test_of_the_secondary_under_load(self, cluster: Cluster) -> None:
        said = cluster.owner.log_since()
        with load(cluster.uri()) as running:
            wait_for_writes(cluster)
            cluster.secondary.stop()
            cluster.secondary.start()
            cluster.wait_in_sync()
            wait_for_writes(cluster)
            running.finish()
        assert "full" not in said()
        assert_settled_and_identical(cluster)
