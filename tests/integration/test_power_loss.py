"""A host loses power: its file system is cut off with `FS_IOC_SHUTDOWN`, so its page cache is lost, and mounted anew.

Volume, intent log, dirty map and state of a node are all on it.
"""

import fcntl
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_process import DataProcess, Pair
from files import MIB, make_sparse
from harness import OWNER as A
from harness import SECONDARY as B
from harness import wait_for
from test_data_process import BLOCK, Client

from stortrends_ha.record import Record

FS_IOC_SHUTDOWN, WITHOUT_LOG = 0x8004587D, 2  # linux/fs.h: not even the journal is written
SYNCED = re.compile(r"has everything: of ([\d.]+) MiB that may have differed ([\d.]+) MiB were copied")


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Disk:
    """A file system of a node's own, on a loop device.

    What it is mounted on shares its mounts: whoever has copied them, with a network namespace of another test, loses it
    when it is unmounted here.
    """

    def __init__(self, directory: Path, where: Path) -> None:
        self._where = where
        self._image = directory / f"{where.name}.disk"
        make_sparse(self._image, 64 * MIB)
        run("mkfs.ext4", "-q", "-F", self._image)
        self._device = run("losetup", "--find", "--show", self._image)
        where.mkdir(exist_ok=True)
        run("mount", "--bind", where, where)
        run("mount", "--make-shared", where)
        run("mount", self._device, where)

    def lose_power(self) -> None:
        """After the processes of the node have been killed."""
        self.shut_down()
        self.mount_again()

    def shut_down(self) -> None:
        """Nothing can be read or written any more."""
        directory = os.open(self._where, os.O_RDONLY)
        try:
            fcntl.ioctl(directory, FS_IOC_SHUTDOWN, WITHOUT_LOG.to_bytes(4, "little"))
        finally:
            os.close(directory)

    def mount_again(self) -> None:
        run("umount", self._where)
        there = Path("/sys/fs/ext4") / Path(self._device).name
        wait_for("the file system is gone", lambda: not there.exists())
        run("mount", self._device, self._where)

    def close(self) -> None:
        run("umount", self._where)
        run("umount", self._where)
        run("losetup", "--detach", self._device)


class PowerPair(Pair):
    """A pair of which each node has a disk that can be cut."""

    def __init__(self, directory: Path) -> None:
        self.disks = {node: Disk(directory, directory / node) for node in (A, B)}
        super().__init__(directory)

    def lose_power(self, process: DataProcess) -> None:
        process.kill()
        self.disks[process.name].lose_power()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[PowerPair]:
    pair = PowerPair(tmp_path)
    try:
        with pair:
            yield pair
    finally:
        for disk in pair.disks.values():
            disk.close()


def go_alone_and_add(owner: DataProcess, secondary: DataProcess, record: Record, **how: bool) -> Record:
    """What supervisors do when the secondary has to be synced."""
    alone = record.owned_alone(owner.name)
    owner.lead(alone, **how)
    secondary.follow(alone)
    return Pair.join(owner, secondary, alone)


def copied_mib(owner: DataProcess) -> tuple[float, float]:
    """(what may have differed, what was copied) in the newest sync."""
    compared, copied = SYNCED.findall(owner.log)[-1]
    return float(compared), float(copied)


def written(pair: Pair, node: str, at: int) -> bytes:
    with pair.backing(node).open("rb") as file:
        return os.pread(file.fileno(), BLOCK, at)


def test_secondary_gets_what_it_lost_and_no_more(pair: PowerPair) -> None:
    owner, secondary, record = pair.in_sync()
    client = Client(pair)
    client.write(0, b"a")
    client.flush()
    client.write(9 * MIB, b"b")  # rests in two page caches
    pair.lose_power(secondary)
    assert written(pair, B, 9 * MIB) == bytes(BLOCK)
    secondary = pair.start(B)
    secondary.follow(record)
    assert secondary.wait("has a status", lambda status: status["epoch"])["fit"]["lost_cache"]
    assert "may lack writes" in owner.wait("misses it", lambda status: status["peer_unfit"])["peer_unfit"]
    go_alone_and_add(owner, secondary, record)
    pair.assert_identical()
    assert written(pair, B, 9 * MIB) == b"b" * BLOCK
    compared, copied = copied_mib(owner)
    assert (compared, copied) <= (8.0, 0.2)  # of two regions of 4 MiB


def test_owner_that_lost_its_cache_does_not_lead_and_is_synced_by_the_peer(pair: PowerPair) -> None:
    owner, secondary, record = pair.in_sync()
    client = Client(pair)
    client.write(MIB, b"a")
    pair.lose_power(owner)
    secondary.order("idle")
    taken = record.owned_alone(B)
    secondary.lead(taken)
    secondary.wait("serves", lambda status: status["serving"])
    client = Client(pair)
    assert client.read(MIB) == b"a" * BLOCK
    client.write(2 * MIB, b"c")
    owner = pair.start(A)
    owner.follow(taken)
    pair.join(secondary, owner, taken)
    pair.assert_identical()
    compared, _ = copied_mib(secondary)
    assert compared <= 8.0


def test_both_what_was_flushed_is_there_and_only_what_was_not_is_compared(pair: PowerPair) -> None:
    owner, secondary, record = pair.in_sync()
    client = Client(pair)
    client.write(0, b"a")
    client.flush()
    for at in range(5, 8):
        client.ask_write(at * MIB, b"b")
    pair.lose_power(owner)
    pair.lose_power(secondary)
    owner, secondary = pair.start(A), pair.start(B)
    for process in (owner, secondary):
        assert process.wait("has a status", lambda _: True)["fit"]["lost_cache"]
    go_alone_and_add(owner, secondary, record, clears_loss=True)
    assert Client(pair).read(0) == b"a" * BLOCK
    pair.assert_identical()
    compared, _ = copied_mib(owner)
    assert compared <= 8.0


def test_owner_that_is_alone_knows_what_its_peer_lacks(pair: PowerPair) -> None:
    owner, secondary, record = pair.in_sync()
    secondary.kill()
    alone = record.owned_alone(A)
    owner.lead(alone)
    client = Client(pair)
    client.write(3 * MIB, b"a")
    client.write(12 * MIB, b"b")
    owner.wait("has settled", lambda status: status["fit"]["settled_epoch"] == alone.epoch)
    pair.lose_power(owner)
    owner = pair.start(A)
    assert owner.wait("has a status", lambda _: True)["fit"]["settled_epoch"] == alone.epoch
    owner.lead(alone, clears_loss=True)  # as everything had settled
    secondary = pair.start(B)
    secondary.follow(alone)
    pair.join(owner, secondary, alone)
    assert written(pair, B, 3 * MIB) == b"a" * BLOCK
    assert written(pair, B, 12 * MIB) == b"b" * BLOCK
    pair.assert_identical()
    compared, copied = copied_mib(owner)
    assert (compared, copied) <= (8.0, 0.2)


def test_process_that_is_killed_has_lost_nothing(pair: PowerPair) -> None:
    owner, secondary, record = pair.in_sync()
    Client(pair).write(0, b"a")
    secondary.kill()
    secondary = pair.start(B)
    secondary.follow(record)
    owner.wait("is in sync", lambda status: status["state"] == "in-sync")
    assert not secondary.status["fit"]["lost_cache"]


def test_file_system_that_was_unmounted_in_order_has_lost_nothing(pair: PowerPair) -> None:
    owner, secondary, record = pair.in_sync()
    Client(pair).write(0, b"a")
    secondary.stop()
    pair.disks[B].mount_again()
    secondary = pair.start(B)
    secondary.follow(record)
    owner.wait("is in sync", lambda status: status["state"] == "in-sync")
    assert not secondary.status["fit"]["lost_cache"]
