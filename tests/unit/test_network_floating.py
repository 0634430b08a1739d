"""Floating addresses as they are configured, and clusters that have none."""

import subprocess
import sys
from pathlib import Path

from stortrends_ha.config.model import Address, Cluster, Floating, Group, Node
from stortrends_ha.network.floating import floating_addresses
from stortrends_ha.network.network import Network


def group(name: str, *floating: Floating) -> Group:
    return Group(name, "node-a", Address("0.0.0.0", 10809), {}, {"node-a": 1, "node-b": 2}, (), floating)


def cluster(*groups: Group) -> Cluster:
    nodes = {name: Node(name, "192.0.2.1", Path("/s"), Address("127.0.0.1", 1)) for name in ("node-a", "node-b")}
    return Cluster("test", nodes, {one.name: one for one in groups})


def test_each_node_has_its_own_interface() -> None:
    floating = Floating("192.0.2.21/24", {"node-a": "eth1", "node-b": "ens3"})
    found = floating_addresses(cluster(group("rg-a", floating), group("rg-b")), "node-b")
    assert list(found) == ["rg-a"]
    assert [(str(one), str(one.ip), one.interface) for one in found["rg-a"]] == [
        ("192.0.2.21/24", "192.0.2.21", "ens3")
    ]


async def test_without_floating_addresses_nothing_happens() -> None:
    network = Network(floating_addresses(cluster(group("rg-a")), "node-a"))
    await network.start()
    await network.claim("rg-a", [["192.0.2.1", 50000, "192.0.2.21", 10809]])
    network.announce("rg-a")
    assert network.problem("rg-a") == ""
    await network.release("rg-a")
    await network.stop()


def test_a_node_without_floating_addresses_does_not_load_netlink() -> None:
    program = "import sys; import stortrends_ha.network.network; sys.exit('pyroute2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
