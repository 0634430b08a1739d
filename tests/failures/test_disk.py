"""A disk fails, by being full: rows 12 and 13."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from files import MIB

from .clients import under_load
from .cluster import GROUP, VOLUME_BYTES, Cluster
from .network import NODES


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
def test_it_is_full(make_cluster: Callable[..., Cluster], tmp_path: Path, whose: str) -> None:
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
