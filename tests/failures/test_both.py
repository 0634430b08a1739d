"""Both nodes fail."""

import signal
from collections.abc import Callable

from .clients import under_load
from .cluster import Cluster


def test_both_daemons_are_killed_and_started_again(cluster: Cluster) -> None:
    with under_load(cluster) as clients, clients.event():
        for node in cluster.pair():
            node.kill()
        cluster.start()


def test_both_lose_power_and_return(cluster: Cluster) -> None:
    """Row 10: the last owner's copy wins."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.wait_known().event():
            secondary.power_off()
            owner.power_off()
            owner.power_on()
            secondary.power_on()
            cluster.wait_in_sync()
        assert cluster.owner() is owner


def test_both_lose_power_and_the_last_owner_which_was_alone_returns(cluster: Cluster) -> None:
    """Row 11: it had gone alone, and all that it has answered since was stable."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event():
            secondary.power_off()
        owner.wait("had time to flush", lambda of: of["fit"]["settled_epoch"] == of["epoch"])
        with clients.wait_known().event():
            owner.power_off()
            owner.power_on()
        assert cluster.owner() is owner
        with clients.event():
            secondary.power_on()
            cluster.wait_in_sync()


def test_both_lose_power_and_the_one_that_was_left_behind_returns(cluster: Cluster) -> None:
    """Row 11: it holds, and says who has the data; it goes on when that one is back."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event():
            secondary.power_off()
        with clients.event():
            owner.power_off()
            secondary.power_on()
            secondary.wait_held(f"it goes on when {owner.name} is back")
            clients.wait_held()
            owner.power_on()
        assert cluster.owner() is owner
        with clients.event():
            cluster.wait_in_sync()


def test_the_secondary_loses_its_cache_and_then_the_owner_dies(cluster: Cluster) -> None:
    """Row 23: it is back before anybody has missed it, but it knows; all go on when the owner is back."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event():
            secondary.power_off()
            owner.kill()
            secondary.power_on()
            secondary.wait_held("its host restarted")
            clients.wait_held()
            owner.start()
        assert cluster.owner() is owner
        with clients.event():
            cluster.wait_in_sync()


def test_the_operator_overrides(make_cluster: Callable[..., Cluster]) -> None:
    """Row 11: both lose power, only one returns, which may lack something; the other one's copy is never synced onto
    by itself afterwards (rule 10). The secondary knows, over its restart, which clients to wake up."""
    cluster = make_cluster().start()
    owner, secondary = cluster.pair()
    with under_load(cluster, compare=False) as clients:
        with clients.wait_known().event():
            # So that nobody has anything to send again, and all wait for answers; nobody is missed by that.
            owner.signal(signal.SIGSTOP, [owner.data_pid()])
            clients.wait_held()
            secondary.power_off()
            owner.power_off()
            secondary.power_on()
            secondary.wait_held("force-own")
            clients.wait_held()
            cluster.command("group", "force-own", "rg-a", "--accept-data-loss", "--name", secondary.name)
        assert cluster.owner() is secondary
        with clients.event():
            owner.power_on()
            owner.wait_held("lineage")
    assert cluster.owner() is secondary
