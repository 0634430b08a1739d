"""Nodes that do not fit: refused with a message that says what differs, on both nodes, and nothing is overwritten."""

import json
import socket
from collections.abc import Callable
from typing import Any

from clients import nbdsh, qemu_io
from files import MIB
from harness import GROUP, OWNER, SECONDARY, Cluster, Node
from link_peer import as_owner, as_secondary, hello, opening, receive

from stortrends_ha.protocol.link import Kind


def assert_both_refuse(cluster: Cluster, *words: str) -> None:
    """Both nodes say that they do not fit, and why, in the same words."""
    for node in cluster.nodes.values():
        found = node.wait("refuses", lambda group: group["link"]["state"] == "refused")
        assert found["state"] == "held", found
        for word in words:
            assert word in found["why"], (node.name, found["why"])
            assert word in found["link"]["why"], (node.name, found["link"]["why"])


def start_differing(cluster: Cluster, node: Node, change: Callable[[dict[str, Any]], None]) -> None:
    """Start both nodes, one with another cluster file."""
    for each in cluster.nodes.values():
        each.start(cluster.changed_spec(change) if each is node else None)


MakeCluster = Callable[..., Cluster]


class TestPeersThatDoNotFit:
    def test_another_cluster(self, make_cluster: MakeCluster) -> None:
        cluster = make_cluster()
        start_differing(cluster, cluster.secondary, lambda spec: spec.update(cluster="other"))
        assert_both_refuse(cluster, "the cluster is", "'test' on node-a", "'other' on node-b")

    def test_another_volume_size(self, make_cluster: MakeCluster) -> None:
        cluster = make_cluster()

        def smaller(spec: dict[str, Any]) -> None:
            spec["groups"][GROUP]["volumes"]["vm-a"]["size"] = 32 * MIB

        start_differing(cluster, cluster.secondary, smaller)
        assert_both_refuse(cluster, "volume vm-a", f"{64 * MIB}", f"{32 * MIB}", "node-a", "node-b")

    def test_an_older_epoch(self, cluster: Cluster) -> None:
        qemu_io(cluster.uri(), "write -P 3 0 1M", "flush")
        for node in cluster.nodes.values():
            node.stop()
        path = cluster.state_file(SECONDARY)
        state = json.loads(path.read_text())
        state["record"]["epoch"] = 5
        path.write_text(json.dumps(state))
        for node in cluster.nodes.values():
            node.start()
        assert_both_refuse(cluster, "epoch 1", "older than epoch 5 on node-b")
        cluster.assert_identical()

    def test_a_secondary_with_data_of_unknown_origin_is_not_overwritten(self, make_cluster: MakeCluster) -> None:
        cluster = make_cluster()
        with cluster.backing(SECONDARY).open("r+b") as file:
            file.seek(3 * MIB)
            file.write(b"somebody needs this")
        for node in cluster.nodes.values():
            node.start()
        found = cluster.owner.wait("refuses", lambda group: group["link"]["state"] == "refused")
        assert "node-b has data of unknown origin" in found["why"]
        with cluster.backing(SECONDARY).open("rb") as file:
            file.seek(3 * MIB)
            assert file.read(19) == b"somebody needs this"
        seen = cluster.secondary.wait("says so", lambda group: group["why"])
        assert "unknown origin" in seen["why"]

    def test_a_secondary_of_another_lineage_is_not_overwritten(
        self, cluster: Cluster, make_cluster: MakeCluster
    ) -> None:
        """The disk of another cluster's secondary, put into this one."""
        other = make_cluster().start()
        qemu_io(other.uri(), "write -P 0x55 0 1M", "flush")
        for node in (*other.nodes.values(), cluster.secondary):
            node.stop()
        other.state_file(SECONDARY).rename(cluster.state_file(SECONDARY))
        other.backing(SECONDARY).rename(cluster.backing(SECONDARY))
        cluster.secondary.start()
        found = cluster.owner.wait("refuses", lambda group: group["link"]["state"] == "refused")
        assert "no common history" in found["why"]
        with cluster.backing(SECONDARY).open("rb") as file:
            assert file.read(MIB) == b"\x55" * MIB

    def test_an_owner_of_a_later_protocol(self, make_cluster: MakeCluster) -> None:
        cluster = make_cluster()
        cluster.secondary.start()
        cluster.secondary.wait_ready()
        kind, said = as_owner(cluster, hello(cluster, OWNER, protocols=[2, 3]))
        assert kind == Kind.REFUSE
        assert said["reason"] == (
            "node-a (version 9.9.9) speaks link protocols 2 to 3 and node-b (version 0.1.0) speaks 1 to 1"
        )
        seen = cluster.secondary.wait("shows it", lambda group: group["link"]["state"] == "refused")
        assert "2 to 3" in seen["why"]

    def test_an_owner_of_a_range_that_overlaps_is_accepted(self, make_cluster: MakeCluster) -> None:
        cluster = make_cluster()
        cluster.secondary.start()
        cluster.secondary.wait_ready()
        kind, said = as_owner(cluster, hello(cluster, OWNER, protocols=[1, 7], something_new=True))
        assert kind == Kind.HELLO
        assert said["node"] == SECONDARY

    def test_a_secondary_of_a_later_protocol(self, make_cluster: MakeCluster) -> None:
        cluster = make_cluster()

        def serve(connection: socket.socket) -> None:
            assert receive(connection).kind == Kind.HELLO
            connection.sendall(opening(hello(cluster, SECONDARY, protocols=[2, 3])))
            connection.recv(1)

        with as_secondary(cluster, serve):
            cluster.owner.start()
            found = cluster.owner.wait("refuses", lambda group: group["link"]["state"] == "refused")
        assert "node-b (version 9.9.9) speaks link protocols 2 to 3" in found["why"]
        assert "speaks 1 to 1" in found["why"]

    def test_a_peer_with_other_volumes(self, make_cluster: MakeCluster) -> None:
        cluster = make_cluster()

        def serve(connection: socket.socket) -> None:
            receive(connection)
            connection.sendall(opening(hello(cluster, "node-z", volumes=[["vm-z", 1]])))
            connection.recv(1)

        with as_secondary(cluster, serve):
            cluster.owner.start()
            found = cluster.owner.wait("refuses", lambda group: group["link"]["state"] == "refused")
        assert "volume vm-a is missing on node-z" in found["why"]
        assert "volume vm-z is missing on node-a" in found["why"]


def test_a_held_group_accepts_clients_again_once_the_peer_fits(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    start_differing(cluster, cluster.secondary, lambda spec: spec.update(cluster="other"))
    assert_both_refuse(cluster, "other")
    cluster.secondary.stop()
    cluster.secondary.start()
    cluster.wait_in_sync()
    nbdsh("h.connect_uri(uri[0]); h.pwrite(b'x' * 4096, 0); h.flush()", cluster.uri())
    cluster.assert_holds(0, b"x" * 4096)
    cluster.assert_identical()
