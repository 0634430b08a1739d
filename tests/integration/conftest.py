"""Clusters for the integration tests; however a test ends, its nodes end with it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clients import nbdsh
from files import MIB
from harness import Cluster


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Make clusters that are not started; they end with the test."""
    made: list[Cluster] = []

    def make(**options: Any) -> Cluster:
        directory = tmp_path / f"c{len(made)}"
        directory.mkdir()
        made.append(Cluster(directory, **options))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    volumes: dict[str, dict[str, Any]] = {
        "vm-a": {"description": "the first volume"},
        "vm-4k": {"block": {"minimum": 4096, "maximum": "1MiB"}},
        "vm-ro": {"read_only": True},
    }
    found = Cluster(tmp_path_factory.mktemp("clients"), volumes, size_bytes=64 * MIB, unix_socket=True)
    try:
        yield found.start()
    finally:
        found.close()


@pytest.fixture
def volumes(shared_cluster: Cluster) -> Iterator[Cluster]:
    """A running cluster with an empty vm-a; what a test leaves there is on both nodes, at once."""
    nbdsh("h.connect_uri(uri[0]); h.trim(h.get_size(), 0)", shared_cluster.uri())
    yield shared_cluster
    shared_cluster.assert_identical()
