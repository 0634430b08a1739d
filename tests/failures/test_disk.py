"""A disk fails, by being full, by errors, or by not answering any more: rows 12, 13 and 14."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from faulty_disk import HANG, FaultyDisk
from files import MIB
from harness import is_running, wait_for

from .clients import under_load
from .cluster import GROUP, LINK_PORT, VOLUME, VOLUME_BYTES, Cluster, Node
from .network import NODES

MakeCluster = Callable[..., Cluster]


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system that can be filled; it is gone afterwards."""
    directory.mkdir()
    size = VOLUME_BYTES  # most of which stays empty
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(disk: Path) -> None:
    """Nothing more can be written to places that have no data yet."""
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(MIB))


@pytest.mark.parametrize("whose", ["owner", "secondary"])
def test_it_is_full(make_cluster: MakeCluster, tmp_path: Path, whose: str) -> None:
    """The owner's: the group moves. The secondary's: it leaves `in_sync`. Clients see no error."""
    with small_disk(tmp_path / "disk") as disk:
        failing, good = NODES if whose == "owner" else reversed(NODES)
        cluster = make_cluster(backing={failing: disk}).start()
        with under_load(cluster, compare=False) as clients:
            with clients.event():
                fill(disk)
                cluster.nodes[failing].wait("has failed", lambda of: of["fit"]["failure"])
            assert cluster.owner() is cluster.nodes[good]
            assert cluster.nodes[good].group()["in_sync"] == [good]
            assert "ENOSPC" in (failure := cluster.nodes[failing].group()["fit"]["failure"]) or "space" in failure
            with clients.event():  # mended, it comes back
                (disk / "ballast").unlink()
                cluster.nodes[failing].kill()
                cluster.start()
        assert cluster.owner(GROUP) is cluster.nodes[good]
        cluster.assert_identical()
        cluster.close()


# --- Errors and hangs ------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    disk = FaultyDisk(tmp_path / "disk", f"{VOLUME}.img", VOLUME_BYTES)
    yield disk
    disk.close()


@pytest.fixture
def make_faulty(make_cluster: MakeCluster, disk: FaultyDisk) -> Iterator[MakeCluster]:
    """Make a cluster with a node that has this disk, and start it."""

    def make(whose: str) -> Cluster:
        return make_cluster(backing={whose: disk.path.parent}).start()

    yield make
    disk.mend()  # nobody who waits for it can be killed


def assert_moved(cluster: Cluster, to: Node) -> None:
    assert cluster.owner() is to
    assert to.group()["in_sync"] == [to.name]


@pytest.mark.parametrize("kind", ["read", "flush"])
def test_the_owners_fails(make_faulty: MakeCluster, disk: FaultyDisk, kind: str) -> None:
    """The group moves; clients see no error. When it is mended and the node is started again, it is synced."""
    cluster = make_faulty(NODES[0])
    failing, good = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event():
            disk.fail(kind)
            disk.forget_cache()
            failing.wait("has failed", lambda of: of["fit"]["failure"])
        assert_moved(cluster, good)
        disk.mend()
        failing.kill()
        cluster.start()


@pytest.mark.parametrize("whose", NODES)
def test_a_write_hangs_so_that_its_data_process_cannot_be_killed(
    make_faulty: MakeCluster, disk: FaultyDisk, whose: str
) -> None:
    """It is taken for ended, and is started again by itself when the disk answers and it has really ended."""
    cluster = make_faulty(whose)
    failing = cluster.nodes[whose]
    good = cluster.peer_of(failing)
    with under_load(cluster) as clients:
        with clients.event():
            pid = failing.data_pid()
            disk.fail("write", how=HANG)
            failing.wait("has lost its data process", lambda of: "does not end" in of["why"])
        assert_moved(cluster, good)
        assert is_running(pid)
        disk.mend()
        cluster.wait_in_sync()
        assert failing.data_pid() != pid


# --- The disk of a node's state --------------------------------------------------------------------

# More of them than anybody would be missed for.
MANY_BEATS = 40


@contextmanager
def file_system(directory: Path, where: Path) -> Iterator[FaultyDisk]:
    """At `where`, on a disk that can hang; it is gone afterwards."""
    disk = FaultyDisk(directory / "state-disk", "state.img", 16 * MIB)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", disk.path], check=True)
        where.mkdir()
        subprocess.run(["mount", "-o", "loop", disk.path, where], check=True)
        try:
            yield disk
        finally:
            disk.mend()
            subprocess.run(["umount", "--lazy", where], check=True)
    finally:
        disk.close()


def test_a_record_cannot_be_saved_as_the_disk_hangs(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """Rule 14: the heartbeat goes on, and the secondary answers who asks for its status."""
    cluster = make_cluster()
    secondary = cluster.nodes[NODES[1]]
    with file_system(tmp_path, secondary.state_dir / "records") as disk:
        cluster.start()
        owner = cluster.owner()
        with under_load(cluster) as clients:
            with clients.event():
                disk.fail("write", "flush", how=HANG)
                owner.machine.drop(tcp_ports=[LINK_PORT])  # so that there is a new record
                alone = owner.wait("has gone on alone", lambda of: of["in_sync"] == [owner.name] and of["serving"])
                before = beats_heard(owner)
                wait_for("many beats are heard", lambda: beats_heard(owner) >= before + MANY_BEATS)
                assert owner.status()["nodes"][secondary.name]["state"] == "up"
                assert secondary.group()["epoch"] < alone["epoch"]
            with clients.event():
                disk.mend()
                cluster.network.heal()
                cluster.wait_in_sync()
        cluster.close()


def beats_heard(node: Node) -> int:
    """Of its peer, on all paths."""
    return sum(path["received"] for path in node.status()["heartbeats"])
