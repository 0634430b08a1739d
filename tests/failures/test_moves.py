"""Groups move because somebody wants it: rows 17 and 18."""

from collections.abc import Callable

import pytest
from harness import command

from .clients import under_load
from .cluster import GROUP, NBD_PORT, Cluster
from .network import FLOATING

IN_USE = f"cannot listen on {FLOATING}:{NBD_PORT} for NBD: Address already in use"


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


def test_nothing_is_moved_to_where_something_else_has_the_port(cluster: Cluster) -> None:
    """The move is refused with the reason, whichever node is asked, and nobody is held; then it works."""
    owner, secondary = cluster.pair()
    epoch, said = owner.group()["epoch"], owner.log_since()
    with under_load(cluster) as clients:
        with secondary.machine.port_taken(NBD_PORT):
            seen = secondary.wait("says that clients could not connect", lambda of: of["cannot_listen"])
            assert seen["state"] == "in-sync"
            assert IN_USE in seen["why"]
            for node in (secondary, owner):
                with pytest.raises(AssertionError, match=IN_USE):
                    command(node.state_dir / "control.sock", command="move", group=GROUP, to=secondary.name)
            with clients.event(), pytest.raises(AssertionError, match=IN_USE):
                cluster.command("drain", owner.name)
            assert owner.group()["epoch"] == epoch
            assert "handing over" not in said()
        with clients.wait_known().event():
            secondary.wait_serving()  # the owner is drained still
        cluster.command("undrain", owner.name)
        cluster.wait_in_sync()


def test_a_takeover_is_done_though_something_else_has_the_port(cluster: Cluster) -> None:
    """It says why it does not serve, and serves when it can."""
    owner, secondary = cluster.pair()
    moves = secondary.group()["moves"]
    with under_load(cluster) as clients:
        clients.wait_known()
        with secondary.machine.port_taken(NBD_PORT):
            secondary.wait("says that clients could not connect", lambda of: of["cannot_listen"])
            owner.kill()
            held = secondary.wait_held(IN_USE)
            assert held["owner"] == secondary.name
            assert not held["serving"]
            assert held["moves"] == moves  # it has not come to its end
        with clients.event():
            secondary.wait_serving()
        owner.start()
        cluster.wait_in_sync()


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
