"""The nodes do not reach each other, but both reach the arbiter: exactly one goes on. Row 6."""

import pytest

from .clients import under_load
from .cluster import Cluster, Node


def who_goes_on(cluster: Cluster) -> Node:
    """The one node that serves; the other one knows that it does not own the group any more, or holds."""
    winner, loser = cluster.pair()
    assert winner.group()["in_sync"] == [winner.name]
    assert not loser.group()["serving"]
    return winner


def test_both_ways(cluster: Cluster) -> None:
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event():
            cluster.cut(owner, secondary)
        winner = who_goes_on(cluster)
        with clients.event():
            cluster.network.heal()
            cluster.wait_in_sync()
        assert cluster.owner() is winner


@pytest.mark.parametrize("deaf", ["owner", "secondary"])
def test_one_way(cluster: Cluster, deaf: str) -> None:
    """Who hears the other without being heard must not take it for well."""
    owner, secondary = cluster.pair()
    hears, does_not = (secondary, owner) if deaf == "owner" else (owner, secondary)
    with under_load(cluster) as clients:
        with clients.event():
            cluster.cut(hears, does_not, both_ways=False)
        winner = who_goes_on(cluster)
        with clients.event():
            cluster.network.heal()
            cluster.wait_in_sync()
        assert cluster.owner() is winner


def test_one_of_two_heartbeat_paths_is_lost(cluster: Cluster) -> None:
    """The LAN between the nodes: nothing happens, and the status shows it."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        epoch = owner.group()["epoch"]
        with clients.event():
            secondary.machine.drop([owner.machine.lan_ip])
            owner.machine.drop([secondary.machine.lan_ip])
            owner.wait_path_silent(secondary.machine.lan_ip)
        assert owner.group()["epoch"] == epoch
        assert owner.group()["state"] == "in-sync"
    cluster.network.heal()
