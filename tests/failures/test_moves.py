"""Groups move because somebody wants it: rows 17 and 18."""

from collections.abc import Callable

from .clients import under_load
from .cluster import Cluster
from .network import FLOATING


def test_several_planned_moves_in_a_row(cluster: Cluster) -> None:
    """Row 17."""
    with under_load(cluster) as clients:
        for _ in range(4):
            owner, secondary = cluster.pair()
            with clients.wait_known().event():
                cluster.move(to=secondary)
            assert cluster.owner() is secondary
            assert cluster.client.neighbour(FLOATING) == secondary.machine.mac
            assert not owner.machine.has_address(FLOATING)
            with clients.event():
                cluster.wait_in_sync()


def test_drain_and_undrain(cluster: Cluster) -> None:
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.wait_known().event():
            cluster.command("drain", owner.name)
        assert cluster.owner() is secondary
        with clients.event():
            cluster.command("undrain", owner.name)
            cluster.wait_in_sync()
            clients.wait_known()
            cluster.move(to=owner)
        assert cluster.owner() is owner


def test_the_owner_is_stopped_in_order(cluster: Cluster) -> None:
    """As by an upgrade: it hands over, and nothing has to be compared when it is back."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.wait_known().event():
            owner.terminate()
        assert cluster.owner() is secondary
        with clients.event():
            owner.start()
            cluster.wait_in_sync()


def test_the_secondary_is_stopped_in_order(cluster: Cluster) -> None:
    """Its owner goes on alone before it is gone: clients do not wait until it is missed."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event():
            secondary.terminate()
        assert cluster.owner() is owner
        assert f"{secondary.name} is being stopped" in owner.log
        with clients.event():
            secondary.start()
            cluster.wait_in_sync()


def test_failback(make_cluster: Callable[..., Cluster]) -> None:
    """`failback: automatic`: the group goes home when all has been well for a while."""
    cluster = make_cluster(failback="automatic", hold_down_s=1).start()
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event():
            owner.kill()
        assert cluster.owner() is secondary
        with clients.event():
            owner.start()
            owner.wait_serving()
