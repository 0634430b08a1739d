"""A demo and a guest on its volume; however the test ends, they end with it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .demo_cluster import DemoCluster
from .machine import Guest


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[DemoCluster]:
    """A demo whose groups are in sync."""
    found = DemoCluster(tmp_path / "demo")
    try:
        yield found.wait_ready()
    finally:
        found.close()


@pytest.fixture
def boot(tmp_path: Path, cluster: DemoCluster) -> Iterator[Callable[..., Guest]]:
    """Boot a guest on the demo's volume; returns when it writes."""
    booted: list[Guest] = []

    def make(*, reconnect_delay_s: int) -> Guest:
        booted.append(Guest(tmp_path, cluster.endpoint(), reconnect_delay_s))
        return booted[-1].wait_ready()

    yield make
    for guest in booted:
        guest.close()
