"""All of it over IPv6: heartbeats, link, witness, clients, and the floating address, which neighbours follow."""

from collections.abc import Callable

from .clients import under_load
from .cluster import Cluster
from .network import IPV6


def test_a_group_moves_and_its_owner_and_its_secondary_fail(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(addressing=IPV6).start()
    owner, secondary = cluster.pair()
    address = IPV6.floating()
    with under_load(cluster) as clients:
        with clients.event():
            cluster.move(to=secondary)
        assert cluster.client.neighbour(address) == secondary.machine.mac
        assert not owner.machine.has_address(address)
        with clients.event():
            cluster.wait_in_sync()
        with clients.wait_known().event():
            secondary.power_off()
        assert cluster.owner() is owner
        assert cluster.client.neighbour(address) == owner.machine.mac
        with clients.event():
            secondary.power_on()
            cluster.wait_in_sync()
        with clients.event():
            cluster.cut(owner, secondary)
        owner, secondary = cluster.pair()  # the one that the witness has heard first
        with clients.event():
            cluster.network.heal()
            cluster.wait_in_sync()
        with clients.wait_known().event():
            owner.kill()
        assert cluster.client.neighbour(address) == secondary.machine.mac
        with clients.event():
            owner.start()
            cluster.wait_in_sync()
