"""Every NBD client that must work, against two nodes; after each test both replicas are byte-identical."""

import contextlib
import hashlib
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import fio, qemu_io, require, run, start
from files import MIB, allocated_bytes
from harness import Cluster, wait_for

VOLUME_BYTES = 64 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """As large as a volume: data, zeroes and holes."""
    path = tmp_path / "image.raw"
    rng = random.Random(1)
    with path.open("wb") as file:
        for at in range(0, VOLUME_BYTES - 8 * MIB, 8 * MIB):
            file.seek(at)
            file.write(rng.randbytes(3 * MIB + 512) + bytes(1 * MIB))
        file.truncate(VOLUME_BYTES)
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TestNbdinfo:
    def test_says_what_the_export_can_do(self, volumes: Cluster) -> None:
        plain = run("nbdinfo", volumes.uri())
        assert "protocol: newstyle-fixed without TLS, using structured packets" in plain
        [export] = json.loads(run("nbdinfo", "--json", volumes.uri()))["exports"]
        assert export["export-size"] == VOLUME_BYTES
        assert export["contexts"] == ["base:allocation"]
        assert tuple(export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")) == (
            1,
            4096,
            32 * MIB,
        )
        can = {key for key, value in export.items() if key.startswith(("can_", "is_")) and value}
        assert can == {
            "can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"
        }  # fmt: skip

    def test_lists_all_exports(self, volumes: Cluster) -> None:
        exports = json.loads(run("nbdinfo", "--list", "--json", f"nbd://127.0.0.1:{volumes.nbd_port}"))["exports"]
        assert {export["export-name"]: export["is_read_only"] for export in exports} == {
            "vm-a": False, "vm-4k": False, "vm-ro": True
        }  # fmt: skip

    def test_maps_extents(self, volumes: Cluster) -> None:
        qemu_io(volumes.uri(), "write -P 1 1M 1M")
        extents = json.loads(run("nbdinfo", "--map", "--json", volumes.uri()))
        assert [(e["offset"], e["length"], e["type"]) for e in extents] == [
            (0, MIB, 3), (MIB, MIB, 0), (2 * MIB, VOLUME_BYTES - 2 * MIB, 3)
        ]  # fmt: skip

    def test_an_unknown_export_is_refused(self, volumes: Cluster) -> None:
        run("nbdinfo", volumes.uri("nonsense"), expect=1)


def test_nbdcopy_both_ways(volumes: Cluster, image: Path, tmp_path: Path) -> None:
    run("nbdcopy", "--connections=4", image, volumes.uri())
    assert {sha256(path) for path in volumes.backings()} == {sha256(image)}
    copy = tmp_path / "copy.raw"
    run("nbdcopy", "--connections=4", volumes.uri(), copy)
    assert sha256(copy) == sha256(image)
    assert allocated_bytes(copy) < VOLUME_BYTES  # holes are holes again


def test_nbdcopy_over_the_unix_socket(volumes: Cluster, image: Path) -> None:
    run("nbdcopy", "--flush", image, volumes.unix_uri())
    assert {sha256(path) for path in volumes.backings()} == {sha256(image)}


class TestQemu:
    def test_img_converts_compares_and_maps(self, volumes: Cluster, image: Path, tmp_path: Path) -> None:
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, volumes.uri())
        assert {sha256(path) for path in volumes.backings()} == {sha256(image)}
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, volumes.uri())
        back = tmp_path / "back.qcow2"
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", volumes.uri(), back)
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", back, volumes.uri())
        extents = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", volumes.uri()))
        assert sum(extent["length"] for extent in extents) == VOLUME_BYTES
        assert {extent["data"] for extent in extents} == {True, False}

    def test_img_info(self, volumes: Cluster) -> None:
        found = json.loads(run("qemu-img", "info", "-f", "raw", "--output=json", volumes.uri()))
        assert found["virtual-size"] == VOLUME_BYTES

    def test_io_patterns(self, volumes: Cluster) -> None:
        qemu_io(
            volumes.uri(),
            "write -P 0x5a 0 4M", "write -f -P 0xa5 1M 64k", "aio_write -P 0x11 6M 512k", "aio_flush", "flush",
            "write -z 2M 64k", "write -z -u 2176k 64k", "write -z -u -f 2304k 64k", "discard 3M 1M",
            "read -P 0x5a 0 1M", "read -P 0xa5 1M 64k", "read -P 0x11 6M 512k", "read -P 0 2M 64k",
            "read -P 0x5a 2112k 64k", "read -P 0 2176k 64k", "read -P 0 2304k 64k", "read -P 0 3M 1M",
        )  # fmt: skip
        volumes.assert_holds(0, b"\x5a" * MIB + b"\xa5" * 65536)
        volumes.assert_holds(3 * MIB, bytes(MIB))

    def test_io_unaligned_and_with_a_minimum_block_size(self, volumes: Cluster) -> None:
        """QEMU makes aligned requests of unaligned ones, because it is told the minimum."""
        qemu_io(
            volumes.uri("vm-4k"),
            "write -P 0x77 0 64k",
            "write -P 0x88 1000 3000",
            "read -P 0x88 1000 3000",
            "read -P 0x77 0 1000",
        )
        qemu_io(volumes.uri(), "write -P 0x66 1 511", "read -P 0x66 1 511")


class TestFio:
    def test_verified_random_reads_and_writes_of_several_jobs(self, volumes: Cluster) -> None:
        jobs = fio(
            volumes.uri(),
            rw="randrw", bsrange="512-64k", iodepth=16, numjobs=4, size="8M", offset_increment="8M",
            verify="crc32c", verify_fatal=1, loops=2,
        )  # fmt: skip
        assert all(job["write"]["total_ios"] and job["read"]["total_ios"] for job in jobs)

    def test_verified_writes_with_fsync_and_trims(self, volumes: Cluster) -> None:
        fio(volumes.uri(), rw="randwrite", bs="4k", iodepth=16, size="8M", verify="sha256", verify_fatal=1, fsync=64)
        jobs = fio(volumes.uri(), rw="randtrim", bs="64k", iodepth=8, size="8M")
        assert jobs[0]["trim"]["total_ios"]

    def test_writes_of_connections_that_overlap(self, volumes: Cluster) -> None:
        """Who wins is open; that both nodes have the same winner is not."""
        fio(
            volumes.uri(),
            rw="randwrite",
            bs="4k",
            iodepth=32,
            numjobs=4,
            size="128k",
            io_size="8M",
            norandommap=1,
            refill_buffers=1,
        )


def test_nbd_client_lists_exports(volumes: Cluster) -> None:
    said = run("nbd-client", "-l", "127.0.0.1", "-p", str(volumes.nbd_port))
    names = [line.split(":")[0] for line in said.splitlines()]
    assert {"vm-a", "vm-4k", "vm-ro"} <= set(names), said


@contextlib.contextmanager
def fuse_file(uri: str, directory: Path) -> Iterator[Path]:
    """The volume as a file, by nbdfuse."""
    directory.mkdir()
    file = directory / "disk"
    process = start("nbdfuse", file, uri)
    try:
        wait_for("nbdfuse shows the volume", lambda: process.poll() is not None or file.exists())
        assert process.poll() is None, process.communicate()
        yield file
    finally:
        if process.poll() is None:
            run("fusermount3", "-u", directory)
        process.communicate(timeout=30)


@contextlib.contextmanager
def loop_device(file: Path) -> Iterator[str]:
    device = run("losetup", "--find", "--show", file).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def mounted(device: str, directory: Path) -> Iterator[Path]:
    directory.mkdir(exist_ok=True)
    run("mount", "-t", "ext4", device, directory)
    try:
        yield directory
    finally:
        run("umount", directory)


def hashes(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): sha256(path) for path in directory.rglob("*") if path.is_file()}


def fill(directory: Path) -> None:
    rng = random.Random(2)
    for number in range(60):
        path = directory / f"d{number % 7}" / f"file-{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.randbytes(rng.randrange(1, 600_000)))
    for number in range(0, 60, 3):
        (directory / f"d{number % 7}" / f"file-{number}").unlink()


def test_a_filesystem_is_made_filled_checked_and_reread(volumes: Cluster, tmp_path: Path) -> None:
    assert os.geteuid() == 0, "this test needs root, for a loop device and a mount"
    for tool in ("nbdfuse", "fusermount3", "losetup", "mkfs.ext4", "e2fsck"):
        require(tool)
    with fuse_file(volumes.uri(), tmp_path / "fuse") as file, loop_device(file) as device:
        run("mkfs.ext4", "-q", "-E", "discard", device)
        with mounted(device, tmp_path / "mnt") as root:
            fill(root)
            before = hashes(root)
        run("e2fsck", "-f", "-n", device)
    with fuse_file(volumes.uri(), tmp_path / "fuse2") as file, loop_device(file) as device:
        run("e2fsck", "-f", "-n", device)
        with mounted(device, tmp_path / "mnt") as root:
            assert hashes(root) == before
    subprocess.run(["sync"], check=True, timeout=60)
    for path in volumes.backings():
        run("e2fsck", "-f", "-n", path)


def test_counters_of_status_follow_what_clients_do(volumes: Cluster) -> None:
    def after_discard(before: dict[str, int], *commands: str) -> dict[str, int]:
        """The counters of the first report that has a discard, the last of these commands."""
        qemu_io(volumes.uri(), *commands, "discard 0 64k")
        report = volumes.owner.wait(
            "counts the discard", lambda g: g["volumes"]["vm-a"]["counters"]["trims"] > before["trims"]
        )
        counters: dict[str, int] = report["volumes"]["vm-a"]["counters"]
        return counters

    before = after_discard(volumes.owner.group()["volumes"]["vm-a"]["counters"])
    after = after_discard(before, "write -P 1 0 64k", "read -P 1 0 64k", "flush")
    assert after["written_bytes"] - before["written_bytes"] == 65536
    assert after["read_bytes"] - before["read_bytes"] >= 65536
    assert after["flushes"] > before["flushes"]
    assert volumes.owner.group()["volumes"]["vm-a"]["in_flight"] == 0
