"""Clusters for the tests; however a test ends, everything that it started ends with it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .cluster import NBD_PORT, Cluster


def need_root() -> None:
    """Skip what asks for a cluster without being root."""
    if os.geteuid() != 0:
        pytest.skip("Network namespaces need root.")


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    need_root()
    made = Cluster(tmp_path_factory.mktemp("failures"))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def cluster(_shared: Cluster) -> Cluster:
    """A cluster with a witness, in sync; what tests do to it is put right before the next one, and nothing comes of a
    test's clients after its end, as a write that was never answered might."""
    _shared.client.abort_connections(NBD_PORT)
    return _shared.repair()


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Make clusters for one test; they are not started."""
    need_root()
    made: list[Cluster] = []

    def make(**options: Any) -> Cluster:
        directory = tmp_path / f"c{len(made)}"
        directory.mkdir()
        made.append(Cluster(directory, **options))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()
