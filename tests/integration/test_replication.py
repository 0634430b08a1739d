"""Two nodes while processes are killed, stopped and started: no client error, and in the end identical replicas.

What ends with another owner is in ``tests/failures``, where nodes have addresses, networks and disks of their own.
"""

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clients import load, qemu_io, start
from files import MIB, allocated_bytes
from harness import OWNER, PATIENCE_S, PATIENT, SECONDARY, Cluster, wait_for

IN_FLIGHT = 2 * 8  # of `load`
RESUMED = "what is in flight, because nothing was lost"
SYNC = "sync of what it may lack, because "
RECONCILE = "what may differ is made equal, because "

WRITE_AND_PRINT = """
import time
h.connect_uri(uri[0])
number = longest_s = 0
while True:
    number += 1
    block, began_s = number % 4096, time.monotonic()
    h.pwrite(number.to_bytes(4) * 1024, block * 4096, nbd.CMD_FLAG_FUA if number % 16 == 0 else 0)
    longest_s = max(longest_s, time.monotonic() - began_s)
    print(longest_s, number, flush=True)
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With a witness, and the usual failover."""
    made = Cluster(tmp_path_factory.mktemp("usual"), limits={"link_timeout_s": 1}, witness=True)
    yield made
    made.close()


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """In sync, and owned by node-a, whatever the test before has left."""
    running.start().move(OWNER)
    return running


@pytest.fixture(scope="module")
def unhurried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Without a witness, and who is killed and started at once is not missed."""
    made = Cluster(tmp_path_factory.mktemp("unhurried"), limits={"link_timeout_s": 1}, failover=PATIENT)
    yield made
    made.close()


@pytest.fixture
def patient(unhurried: Cluster) -> Cluster:
    """As `cluster`."""
    unhurried.start().move(OWNER)
    return unhurried


def wait_for_writes(cluster: Cluster, more: int = 1000) -> None:
    before = cluster.written()
    wait_for("clients go on writing", lambda: cluster.written() > before + more)


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
        """Writes wait until going on alone is granted; what they changed is copied when the peer is back."""
        with load(cluster.uri()) as running:
            wait_for_writes(cluster)
            said = cluster.owner.log_since()
            cluster.secondary.kill()
            alone = cluster.owner.wait_state("alone")
            assert alone["in_sync"] == [OWNER]
            assert SECONDARY in alone["why"]
            assert cluster.owner.status()["nodes"][SECONDARY]["state"] == "not answering"
            wait_for_writes(cluster)
            cluster.secondary.start()
            cluster.wait_in_sync()
            assert SYNC in said()
            wait_for_writes(cluster)
            running.finish()
        assert_settled_and_identical(cluster)
        assert cluster.owner.group()["why"] == ""

    def test_killed_while_there_is_no_witness(self, cluster: Cluster) -> None:
        """Writes are held for as long as neither is back, and status says so."""
        assert cluster.witness
        with load(cluster.uri()) as running:
            wait_for_writes(cluster)
            cluster.witness.end()
            said = cluster.owner.log_since()
            self.kill_and_hold(cluster)
            cluster.secondary.start()
            cluster.wait_in_sync()
            assert RESUMED in said()
            assert SYNC not in said()
            wait_for_writes(cluster)
            self.kill_and_hold(cluster)
            cluster.witness.launch()
            cluster.owner.wait_state("alone")
            wait_for_writes(cluster)
            cluster.secondary.start()
            cluster.wait_in_sync()
            running.finish()
        assert_settled_and_identical(cluster)

    @staticmethod
    def kill_and_hold(cluster: Cluster) -> None:
        """Kill the secondary; the owner asks to go on alone, in vain, and answers nothing."""
        cluster.secondary.kill()
        asked = cluster.owner.wait(
            "says what it waits for",
            lambda group: "alone is not granted" in group["why"] and group["window"]["changes"],
        )
        assert asked["state"] == "held"
        assert SECONDARY in asked["why"]
        assert asked["arbiter"]
        assert not asked["serving"]
        held = asked["volumes"]["vm-a"]["counters"]["writes"]
        later = cluster.owner.wait("goes on waiting", lambda group: "not been heard for 2" in group["why"])
        assert later["volumes"]["vm-a"]["counters"]["writes"] <= held + IN_FLIGHT  # taken, and not answered
        assert later["in_sync"] == [OWNER, SECONDARY]

    def test_stopped_before_it_took_all_that_the_network_had(self, cluster: Cluster) -> None:
        """The owner goes on alone; what the old connection still holds is not applied in the new session."""
        process = start("nbdsh", "-c", f"uri = {[cluster.uri()]!r}", "-c", WRITE_AND_PRINT, stdout=subprocess.DEVNULL)
        try:
            wait_for_writes(cluster)
            pid = cluster.secondary.data_pid
            os.kill(pid, signal.SIGSTOP)
            try:
                cluster.owner.wait_state("alone")
                wait_for_writes(cluster, 100)  # before it is killed, as it does not report
            finally:
                os.kill(pid, signal.SIGCONT)
            cluster.wait_in_sync()
            wait_for_writes(cluster)
        finally:
            process.kill()
            process.communicate()
        assert_settled_and_identical(cluster)

    def test_its_data_process_is_started_again(self, cluster: Cluster) -> None:
        with load(cluster.uri()) as running:
            wait_for_writes(cluster)
            before = cluster.secondary.group()
            os.kill(before["pid"], signal.SIGKILL)
            cluster.secondary.wait("restarts its data process", lambda group: group["pid"] not in (None, before["pid"]))
            cluster.wait_in_sync()
            assert cluster.secondary.group()["restarts"] == before["restarts"] + 1
            wait_for_writes(cluster)
            running.finish()
        assert_settled_and_identical(cluster)

    def test_missed_for_a_moment_only(self, patient: Cluster) -> None:
        """Killed and started again before going on alone is considered: writes are held so long; nothing is copied."""
        with load(patient.uri()) as running:
            wait_for_writes(patient)
            patient.secondary.kill()
            held = patient.owner.wait_state("held")
            assert held["why"].startswith("no link to node-b")
            assert held["window"]["changes"] > 0
            said = patient.owner.log_since()
            patient.secondary.start()
            patient.wait_in_sync()
            assert RESUMED in said()
            wait_for_writes(patient)
            running.finish()
        assert_settled_and_identical(patient)


class Writer:
    """A client that writes numbered blocks until its connection is lost."""

    def __init__(self, uri: str, said: Path) -> None:
        self._said = said
        with said.open("w") as stdout:
            self._process = start("nbdsh", "-c", f"uri = {[uri]!r}", "-c", WRITE_AND_PRINT, stdout=stdout)

    def last(self) -> int:
        """Wait for its end: the last number that was acknowledged."""
        _, error = self._process.communicate(timeout=PATIENCE_S)
        assert "nbd" in error  # the connection was lost, and it does not reconnect
        return int(self._said.read_text().split()[-1])

    def longest_wait_s(self) -> float:
        """For an answer, so far."""
        return float(self._said.read_text().splitlines()[-2].split()[0])  # the last line may not be complete

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Callable[[Cluster], Writer]]:
    """Start a writer and wait until it writes."""
    writers: list[Writer] = []

    def begin(cluster: Cluster) -> Writer:
        writers.append(Writer(cluster.uri(), tmp_path / f"numbers{len(writers)}"))
        wait_for_writes(cluster)
        return writers[-1]

    yield begin
    for writer in writers:
        writer.end()


def assert_holds_numbers_up_to(cluster: Cluster, last: int) -> None:
    """Every block that WRITE_AND_PRINT was answered for holds its number; the one after the last may."""
    for path in cluster.backings():
        data = path.read_bytes()
        for number in range(max(1, last - 4000), last + 1):
            at = number % 4096 * 4096
            assert data[at : at + 4096] == number.to_bytes(4) * 1024, f"write {number} of {last} is missing in {path}"


Write = Callable[[Cluster], Writer]


class TestOwner:
    def test_when_its_data_process_is_killed_the_peer_takes_over_at_once(self, patient: Cluster, write: Write) -> None:
        """However patient the nodes are: the owner says itself that it does not serve."""
        writer = write(patient)
        pid = patient.owner.data_pid
        os.kill(pid, signal.SIGKILL)
        last = writer.last()
        patient.wait_served_by(SECONDARY)
        qemu_io(patient.uri(), "read 0 64k")
        patient.owner.wait("restarts its data process", lambda group: group["pid"] not in (None, pid))
        assert_settled_and_identical(patient)
        assert_holds_numbers_up_to(patient, last)
        assert patient.secondary.group()["moves"]["takeover"]

    def test_killed_and_started_before_it_is_missed_it_makes_its_peer_equal_and_goes_on(
        self, patient: Cluster, write: Write
    ) -> None:
        """Neither the arbiter nor a sync of everything is needed: both have all that was answered."""
        writer = write(patient)
        said = patient.owner.log_since()
        patient.owner.kill()
        last = writer.last()
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", patient.nbd_port)):
            pass
        seen = patient.secondary.wait("misses the owner", lambda group: not group["session"])
        assert OWNER in seen["why"]
        patient.owner.start()
        assert_settled_and_identical(patient)
        assert RECONCILE in said()
        assert "proposing" not in said()
        assert patient.serving is patient.owner
        assert_holds_numbers_up_to(patient, last)

    def test_killed_again_during_the_comparison(self, patient: Cluster, write: Write) -> None:
        qemu_io(patient.uri(), "write -P 9 20M 40M")
        writer = write(patient)
        patient.owner.kill()
        last = writer.last()
        for _ in range(2):
            patient.owner.start()
            patient.owner.wait("begins to compare", lambda group: group["state"] in ("syncing", "in-sync"))
            patient.owner.kill()
        patient.owner.start()
        assert_settled_and_identical(patient)
        assert_holds_numbers_up_to(patient, last)

    def test_both_killed_under_load(self, patient: Cluster, write: Write) -> None:
        writer = write(patient)
        patient.secondary.kill()
        patient.owner.wait_state("held")
        patient.owner.kill()
        last = writer.last()
        patient.start()
        assert_settled_and_identical(patient)
        assert_holds_numbers_up_to(patient, last)

    def test_a_client_that_reconnects_sees_no_error(self, cluster: Cluster) -> None:
        """While its owner is killed, the peer takes over, and the old owner comes back and is given the group again."""
        target = f"driver=raw,file.driver=nbd,file.host=127.0.0.1,file.port={cluster.nbd_port},file.export=vm-a"
        commands = [f"write -P {number} {number * 64}k 64k" for number in range(1, 61)]
        options = [part for command in commands for part in ("-c", command, "-c", "sleep 50")]
        before = cluster.written()
        process = start("qemu-io", "--image-opts", *options, "-c", "flush", f"{target},file.reconnect-delay=60")
        try:
            wait_for("the first writes", lambda: cluster.written() >= before + 5)
            cluster.owner.kill()
            cluster.wait_served_by(SECONDARY)
            cluster.owner.start()
            cluster.wait_in_sync()
            cluster.move(OWNER)
            said, error = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
            process.communicate()
        assert said.count("wrote 65536/65536") == 60, said + error
        assert "failed" not in said + error
        assert_settled_and_identical(cluster)
        for number in range(1, 61):
            cluster.assert_holds(number * 65536, bytes([number]) * 65536)


class TestOrderlyRestart:
    """Who is to stop says so before it is gone. It gets what was written meanwhile when it is back."""

    def test_of_the_secondary_holds_no_client(self, patient: Cluster, write: Write) -> None:
        """Its owner goes on alone first, instead of missing it for ``suspect_after_s``."""
        said = patient.owner.log_since()
        writer = write(patient)
        patient.secondary.stop()
        assert patient.owner.wait_state("alone")["in_sync"] == [OWNER]
        assert "because node-b is being stopped" in said()
        wait_for_writes(patient)
        patient.secondary.start()
        patient.wait_in_sync()
        assert SYNC in said()
        wait_for_writes(patient)
        assert writer.longest_wait_s() < PATIENT["suspect_after_s"]
        writer.end()
        assert_settled_and_identical(patient)

    def test_of_the_owner_hands_over_and_closes_connections(self, patient: Cluster, write: Write) -> None:
        """It does not get the group back by itself."""
        said = patient.secondary.log_since()
        writer = write(patient)
        patient.owner.stop()
        last = writer.last()
        assert patient.serving is patient.secondary
        assert "because node-a is being stopped" in said()
        patient.owner.start()
        patient.wait_in_sync()
        assert patient.serving is patient.secondary
        assert SYNC in said()
        assert_settled_and_identical(patient)
        assert_holds_numbers_up_to(patient, last)

    @pytest.mark.parametrize("name", [OWNER, SECONDARY])
    def test_keeps_what_was_written_before_and_meanwhile(self, patient: Cluster, name: str) -> None:
        qemu_io(patient.uri(), "write -P 3 0 8M", "flush")
        patient.nodes[name].stop()
        qemu_io(patient.uri(), "read -P 3 0 8M", "write -P 4 1M 1M")
        patient.nodes[name].start()
        patient.wait_in_sync()
        qemu_io(patient.uri(), "read -P 3 0 1M", "read -P 4 1M 1M", "read -P 3 2M 6M", "write -P 5 2M 1M")
        assert_settled_and_identical(patient)

    def test_of_both_keeps_everything(self, patient: Cluster) -> None:
        """Who stops last owns, alone; it serves by itself when it is back."""
        qemu_io(patient.uri(), "write -P 3 0 8M")
        for node in patient.nodes.values():
            node.stop()
        patient.start()
        assert patient.serving is patient.secondary
        qemu_io(patient.uri(), "read -P 3 0 8M")
        assert_settled_and_identical(patient)
