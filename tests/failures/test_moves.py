"""Groups move because somebody wants it: rows 17 and 18."""

import time
from collections.abc import Callable

import pytest
from harness import command

from .clients import PLANNED_S, under_load
from .cluster import GROUP, NBD_PORT, Cluster
from .network import FLOATING

IN_USE = f"cannot listen on {FLOATING}:{NBD_PORT} for NBD: Address already in use"
# Of an automatic failback; a node that is in sync is killed before this has passed.
HOLD_DOWN_S = 3


def test_several_planned_moves_in_a_row(cluster: Cluster) -> None:
    """Row 17."""
    with under_load(cluster) as clients:
        for _ in range(4):
            owner, secondary = cluster.pair()
            with clients.wait_known().event(stall_s=PLANNED_S):
                cluster.move(to=secondary)
            assert cluster.owner() is secondary
            assert cluster.client.neighbour(FLOATING) == secondary.machine.mac
            assert not owner.machine.has_address(FLOATING)
            with clients.event():
                cluster.wait_in_sync()


def test_drain_and_undrain(cluster: Cluster) -> None:
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.wait_known().event(stall_s=PLANNED_S):
            cluster.command("drain", owner.name)
        assert cluster.owner() is secondary
        with clients.event(stall_s=PLANNED_S):
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
        with clients.wait_known().event(stall_s=PLANNED_S):
            owner.terminate()
        assert cluster.owner() is secondary
        with clients.event():
            owner.start()
            cluster.wait_in_sync()


def test_the_secondary_is_stopped_in_order(cluster: Cluster) -> None:
    """Its owner goes on alone before it is gone: clients do not wait until it is missed."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event(stall_s=PLANNED_S):
            secondary.terminate()
        assert cluster.owner() is owner
        assert f"{secondary.name} is being stopped" in owner.log
        with clients.event():
            secondary.start()
            cluster.wait_in_sync()


def test_failback(make_cluster: Callable[..., Cluster]) -> None:
    """`failback: automatic`: the group goes home when all has been well for a while, and no sooner; and not to a node
    that is drained, which it is after a restart, too."""
    cluster = make_cluster(failback="automatic", hold_down_s=HOLD_DOWN_S).start()
    preferred, other = cluster.pair()
    said = other.log_since()
    with under_load(cluster) as clients:
        for _ in range(2):
            with clients.event():
                preferred.kill()
                killed_s = time.monotonic()
            assert cluster.owner() is other
            with clients.event():
                preferred.start()
                cluster.wait_in_sync()
        with clients.wait_known().event(stall_s=PLANNED_S):
            preferred.wait_serving()
        assert time.monotonic() - killed_s >= HOLD_DOWN_S
        assert said().count("handing over") == 1
        assert other.group()["moves"]["handover"] == 1
        cluster.wait_in_sync()
        with clients.wait_known().event(stall_s=PLANNED_S):
            cluster.command("drain", preferred.name)
        with clients.event():
            preferred.kill()
            preferred.start()
            cluster.wait_in_sync()
        with pytest.raises(AssertionError, match=f"{preferred.name} is drained"):
            cluster.move(to=preferred)
        assert cluster.owner() is other
