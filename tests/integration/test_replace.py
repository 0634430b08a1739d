"""`stortrends-ha volume replace`, and disks that work again: with real nodes, commands and failing disks."""

import os
import pty
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clients import qemu_io
from faulty_disk import FaultyDisk
from files import MIB, allocated_bytes
from harness import OWNER, PROGRAM, SECONDARY, Cluster, program_environment

FAST = {"suspect_after_s": 0.7, "lease_s": 1.2}
FULL_OF_SOMETHING = b"somebody needs this " * 4096


def typed(cluster: Cluster, node: str, *command: str, answer: str | None = None) -> tuple[int, str, str]:
    """What somebody types at a node's machine: exit code, output, errors."""
    done = subprocess.run(
        [*PROGRAM, *command, "--config", str(cluster.nodes[node].config)],
        env=program_environment(), input=answer, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def replace(cluster: Cluster, *options: str, node: str = SECONDARY, volume: str = "vm-a") -> tuple[int, str]:
    """The exit code, and all that was said."""
    code, out, errors = typed(cluster, node, "volume", "replace", volume, "--node", node, *options)
    return code, out + errors


def answered(cluster: Cluster, answer: str) -> tuple[int, str]:
    """As ``replace``, at a terminal."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        done = subprocess.run(
            [*PROGRAM, "volume", "replace", "vm-a", "--node", SECONDARY, "--config", str(cluster.secondary.config)],
            env=program_environment(), stdin=theirs, capture_output=True, text=True, timeout=90,
        )  # fmt: skip
    finally:
        os.close(ours)
        os.close(theirs)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(**options: object) -> Cluster:
        made.append(Cluster(tmp_path, witness=True, failover=FAST, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


MakeCluster = Callable[..., Cluster]


def put_in_another_disk(cluster: Cluster) -> None:
    """Another file at the same path, with something on it, while the secondary is stopped."""
    cluster.secondary.stop()
    cluster.owner.wait_state("alone")
    path = cluster.backing(SECONDARY)
    path.rename(path.with_suffix(".old"))
    with path.open("wb") as file:
        file.truncate(cluster.size_bytes())
        os.pwrite(file.fileno(), FULL_OF_SOMETHING, 30 * MIB)
    cluster.secondary.start()


def test_disk_with_something_on_it_is_overwritten_only_when_the_operator_says_so(make_cluster: MakeCluster) -> None:
    cluster = make_cluster().start()
    qemu_io(cluster.uri(), "write -P 0x5b 0 4M", "write -P 0x5c 40M 64k", "flush")
    put_in_another_disk(cluster)
    cluster.secondary.wait("says why", lambda group: "volume replace vm-a --node node-b" in group["why"])

    code, said = replace(cluster)
    assert code == 1
    assert f"What is on {cluster.backing(SECONDARY)} is given up: the copy of volume vm-a on node-b." in said
    assert "compared with node-a, 0.06 GiB, and overwritten where they differ" in said
    assert "nobody can be asked here" in said
    code, said = answered(cluster, "no")
    assert (code, said.endswith("Go on? Type yes: stortrends-ha: Nothing was done.\n")) == (1, True)
    with cluster.backing(SECONDARY).open("rb") as file:
        assert os.pread(file.fileno(), len(FULL_OF_SOMETHING), 30 * MIB) == FULL_OF_SOMETHING

    code, said = answered(cluster, "yes")
    assert (code, "node-a copies group rg-a to node-b: `stortrends-ha status` says how far" in said) == (0, True)
    cluster.wait_in_sync()
    cluster.settle()
    cluster.assert_identical()
    assert allocated_bytes(cluster.backing(SECONDARY)) < 6 * MIB  # holes are holes
    assert cluster.secondary.group()["fit"]["lineage"] == cluster.owner.group()["fit"]["lineage"]


def test_copy_that_is_given_up_owns_nothing_and_the_copying_goes_on_after_every_death(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(limits={"resync_min_rate": "1MiB", "link_timeout_s": 2}).start()
    qemu_io(cluster.uri(), "write -P 0x5b 0 48M", "flush")
    put_in_another_disk(cluster)
    cluster.secondary.wait("has met the owner", lambda group: group["owner_lineage"])
    assert replace(cluster, "--yes")[0] == 0
    for node in (cluster.secondary, cluster.secondary, cluster.owner):
        node.kill()
        node.start()
        node.wait_ready()
        cluster.owner.wait("leads", lambda group: group["role"] == "primary")
    cluster.wait_in_sync()
    cluster.settle()
    cluster.assert_identical()


def test_copy_that_is_given_up_before_the_owner_dies_waits_for_it(make_cluster: MakeCluster) -> None:
    """Nobody else has everything: it must not own, though the record may have it in sync still."""
    cluster = make_cluster().start()
    qemu_io(cluster.uri(), "write -P 0x5b 0 4M", "flush")
    os.kill(cluster.owner.data_pid, signal.SIGSTOP)  # it copies nothing; the supervisor says that all is well
    code, said = replace(cluster, "--yes")
    assert (code, "It is in sync at this moment." in said) == (0, True)
    cluster.owner.kill()
    cluster.secondary.wait("holds", lambda group: "a sync of its copy did not end" in group["why"])
    assert not cluster.secondary.group()["serving"]
    cluster.owner.start()
    cluster.wait_in_sync()
    cluster.assert_identical()


# --- What is refused: rule 10 ----------------------------------------------------------------------


def test_what_may_be_the_last_good_copy_is_not_given_up(make_cluster: MakeCluster) -> None:
    cluster = make_cluster().start()
    qemu_io(cluster.uri(), "write -P 0x5b 0 1M", "flush")
    lineages = [node.group()["fit"]["lineage"] for node in cluster.nodes.values()]

    code, said = replace(cluster, "--yes", volume="vm-x")
    assert (code, said) == (1, "stortrends-ha: There is no volume 'vm-x'; the volumes are: vm-a.\n")

    code, said = replace(cluster, "--yes", node=OWNER)
    assert code == 1
    assert "No: node-a owns group rg-a. Move it first: stortrends-ha group move rg-a --to node-b" in said

    code, _, said = typed(cluster, OWNER, "volume", "replace", "vm-a", "--node", "node-c")
    assert (code, "has no node 'node-c'" in said) == (1, True)

    cluster.secondary.stop()
    cluster.owner.wait_state("alone")
    code, said = replace(cluster, "--yes", node=OWNER)
    assert code == 1
    assert "No: node-a alone has everything that clients of group rg-a were told is written" in said

    code, said = replace(cluster, "--yes")
    assert (code, "Node node-b does not answer on this machine" in said) == (1, True)

    cluster.secondary.start()
    cluster.wait_in_sync()
    assert cluster.witness is not None
    cluster.witness.end()  # so that node-b cannot take over
    cluster.owner.kill()
    cluster.secondary.wait_state("held")
    code, said = replace(cluster, "--yes")
    assert code == 1
    assert "No: node-a has not been heard for" in said
    assert "may have the last good copy. Bring node-a back first." in said

    cluster.witness.launch()
    cluster.owner.start()
    cluster.wait_served_by(SECONDARY)
    cluster.wait_in_sync()
    assert [node.group()["fit"]["lineage"] for node in cluster.nodes.values()] == lineages
    cluster.assert_identical()


# --- A disk that failed ----------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    disk = FaultyDisk(tmp_path / "disk", "vm-a.img", 64 * MIB)
    yield disk
    disk.close()


def fail_on_secondary(make_cluster: MakeCluster, disk: FaultyDisk, **limits: object) -> Cluster:
    cluster = make_cluster(limits=limits)
    cluster.backing(SECONDARY).unlink()
    cluster.backing(SECONDARY).symlink_to(disk.path)
    cluster.start()
    disk.fail("flush", "write")
    qemu_io(cluster.uri(), "write -P 0x5b 0 1M", "flush")
    cluster.secondary.wait("has failed", lambda group: group["fit"]["failure"])
    cluster.owner.wait_state("alone")
    qemu_io(cluster.uri(), "write -P 0x5c 20M 1M", "flush")
    return cluster


def test_failed_copy_is_replaced_without_a_restart_of_the_node(make_cluster: MakeCluster, disk: FaultyDisk) -> None:
    cluster = fail_on_secondary(make_cluster, disk)
    pid = cluster.secondary.pid
    code, said = replace(cluster)
    assert (code, "It has failed: volume vm-a: cannot" in said) == (1, True)
    disk.mend()
    code, said = replace(cluster, "--yes")
    assert code == 0, said
    cluster.wait_in_sync()
    cluster.settle()
    cluster.assert_identical()
    assert cluster.secondary.status()["pid"] == pid


def test_copy_whose_new_disk_is_missing_is_not_given_up_and_the_command_says_why(
    make_cluster: MakeCluster, disk: FaultyDisk
) -> None:
    cluster = fail_on_secondary(make_cluster, disk)
    cluster.backing(SECONDARY).unlink()
    code, said = replace(cluster, "--yes")
    assert code == 1
    assert "Nothing was given up: the data process of group rg-a was started again on node-b" in said
    assert f"its backing file {cluster.backing(SECONDARY)} does not exist" in said
    with cluster.backing(SECONDARY).open("wb") as file:
        file.truncate(cluster.size_bytes())
    cluster.wait_in_sync()
    cluster.assert_identical()


def test_disk_that_works_again_comes_back_by_itself(make_cluster: MakeCluster, disk: FaultyDisk) -> None:
    cluster = fail_on_secondary(make_cluster, disk, disk_timeout_s=1)
    restarts = cluster.secondary.group()["restarts"]
    disk.mend()
    cluster.secondary.wait("was tried again", lambda group: group["restarts"] > restarts)
    cluster.wait_in_sync()
    cluster.settle()
    disk.forget_cache()
    cluster.assert_identical()
