"""Nodes that do not fit: refused with a message that says what differs, on both nodes, and nothing is overwritten."""

import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from clients import nbdsh, qemu_io
from files import MIB
from harness import GROUP, OWNER, SECONDARY, Cluster, Node, make_key, wait_for
from link_peer import FIRST, as_owner, as_secondary, hello, opening, receive, record_of

from stortrends_ha.protocol.link import Kind

MakeCluster = Callable[..., Cluster]


def start_differing(cluster: Cluster, change: Callable[[dict[str, Any]], None]) -> None:
    """Start both nodes, node-b with another cluster file."""
    cluster.owner.start()
    cluster.secondary.start(cluster.changed_spec(change))


def _refuses(state: str, group: dict[str, Any]) -> bool:
    return bool(group["link"]["state"] == "refused" and group["state"] == state)


def assert_both_refuse(cluster: Cluster, *words: str) -> None:
    """Both nodes say that they do not fit, and why, in the same words; the owner serves alone."""
    for node, state in ((cluster.owner, "alone"), (cluster.secondary, "held")):
        found = node.wait("refuses", partial(_refuses, state))
        for word in words:
            assert word in found["why"], (node.name, found["why"])
            assert word in found["link"]["why"], (node.name, found["link"]["why"])


def smaller(spec: dict[str, Any]) -> None:
    spec["groups"][GROUP]["volumes"]["vm-a"]["size"] = 32 * MIB


class TestNodesThatNeverMeet:
    """Their heartbeats do not count, so a new group is not begun: both would be right, each for itself."""

    def assert_held(self, cluster: Cluster, *words: str) -> None:
        for node in cluster.nodes.values():
            group = node.wait_state("held")
            path = wait_for("it hears something", partial(self.refused_path, node))
            assert path["dropped"] > 0
            assert path["received"] == 0
            for word in words:
                assert word in path["why"], path
            assert group["role"] != "primary"
        why = cluster.owner.group()["why"]
        assert "its first record is made when both nodes see each other" in why
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", cluster.nbd_port)):
            pass

    @staticmethod
    def refused_path(node: Node) -> dict[str, Any] | None:
        [path] = node.status()["heartbeats"]
        return path if path["why"] else None

    def test_another_cluster(self, make_cluster: MakeCluster) -> None:
        cluster = make_cluster()
        start_differing(cluster, lambda spec: spec.update(cluster="other"))
        self.assert_held(cluster, "heartbeats of node-", "of cluster other", "of cluster test", "is expected")

    def test_another_key_until_it_is_mended(self, make_cluster: MakeCluster, tmp_path: Path) -> None:
        cluster = make_cluster()
        other_key = str(make_key(tmp_path / "other.key"))
        start_differing(cluster, lambda spec: spec.update(key_file=other_key))
        self.assert_held(cluster, "not signed with this cluster's key")
        cluster.secondary.stop()
        cluster.start()


class TestPeersThatDoNotFit:
    def test_another_volume_size_until_it_is_mended(self, make_cluster: MakeCluster) -> None:
        cluster = make_cluster()
        start_differing(cluster, smaller)
        assert_both_refuse(cluster, "volume vm-a", f"{64 * MIB}", f"{32 * MIB}", "node-a", "node-b")
        cluster.secondary.stop()
        cluster.secondary.start()
        cluster.wait_in_sync()
        nbdsh("h.connect_uri(uri[0]); h.pwrite(b'x' * 4096, 0); h.flush()", cluster.uri())
        cluster.assert_holds(0, b"x" * 4096)
        cluster.assert_identical()

    def test_a_secondary_with_data_of_unknown_origin_is_not_overwritten(self, make_cluster: MakeCluster) -> None:
        cluster = make_cluster()
        with cluster.backing(SECONDARY).open("r+b") as file:
            os.pwrite(file.fileno(), b"somebody needs this", 3 * MIB)
        for node in cluster.nodes.values():
            node.start()
        assert_both_refuse(cluster, "node-b has data of unknown origin")
        with cluster.backing(SECONDARY).open("rb") as file:
            assert os.pread(file.fileno(), 19, 3 * MIB) == b"somebody needs this"

    def test_a_secondary_of_another_lineage_is_not_overwritten_and_owns_nothing(
        self, make_cluster: MakeCluster
    ) -> None:
        """The disk of another cluster's secondary, put into this one."""
        cluster, other = make_cluster().start(), make_cluster().start()
        qemu_io(other.uri(), "write -P 0x55 0 1M", "flush")
        for node in (*other.nodes.values(), cluster.secondary):
            node.stop()
        other.state_file(SECONDARY).rename(cluster.state_file(SECONDARY))
        other.backing(SECONDARY).rename(cluster.backing(SECONDARY))
        cluster.secondary.start()
        assert_both_refuse(cluster, "no common history")
        assert cluster.secondary.wait("says it", lambda group: group["in_sync"] == [OWNER])["role"] == "secondary"
        with cluster.backing(SECONDARY).open("rb") as file:
            assert file.read(MIB) == b"\x55" * MIB


class TestDisksThatWereReplaced:
    """Another file than the one that had the data, though the node's state says that it has it (rules 3 and 10)."""

    @pytest.mark.parametrize("name", [OWNER, SECONDARY])
    def test_an_empty_one_is_filled_by_the_other_node_and_never_copied(
        self, make_cluster: MakeCluster, name: str
    ) -> None:
        cluster = make_cluster().start()
        qemu_io(cluster.uri(), "write -P 0x5b 0 1M", "flush")
        for node in cluster.nodes.values():
            node.kill()
        cluster.backing(name).unlink()
        with cluster.backing(name).open("wb") as file:
            file.truncate(cluster.size_bytes())
        cluster.nodes[name].start()
        cluster.nodes[name].wait_ready()
        for node in cluster.nodes.values():
            if not node.running:
                node.start()
        cluster.wait_in_sync()
        qemu_io(cluster.uri(), "read -P 0x5b 0 1M")
        cluster.settle()
        cluster.assert_identical()

    def test_a_foreign_one_is_neither_served_nor_overwritten(self, make_cluster: MakeCluster) -> None:
        cluster = make_cluster().start()
        qemu_io(cluster.uri(), "write -P 0x5b 0 1M", "flush")
        cluster.secondary.kill()
        cluster.backing(SECONDARY).unlink()
        with cluster.backing(SECONDARY).open("wb") as file:
            file.write(b"somebody needs this".ljust(cluster.size_bytes(), b"\1"))
        cluster.secondary.start()
        # First it has to look whether there is anything on it, and refuses as long as that takes.
        cluster.secondary.wait("refuses", lambda group: "node-b has data of unknown origin" in group["why"])
        assert "not the files that had its data" in cluster.secondary.log
        with cluster.backing(SECONDARY).open("rb") as file:
            assert file.read(19) == b"somebody needs this"

    def test_a_missing_one_is_to_be_mounted_before_it_is_made_anew(self, make_cluster: MakeCluster) -> None:
        cluster = make_cluster().start()
        cluster.secondary.stop()
        cluster.backing(SECONDARY).unlink()
        cluster.secondary.start()
        assert cluster.secondary.ended() == 1
        assert "mount its disk, or correct its path. If it is lost, make an empty one" in cluster.secondary.log


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Only the secondary runs: it listens to whoever says that he is the owner."""
    cluster = Cluster(tmp_path_factory.mktemp("lonely"))
    try:
        cluster.secondary.start()
        cluster.secondary.wait("listens", lambda group: group["link"]["state"] == "listening")
        yield cluster
    finally:
        cluster.close()


class TestOwnerThatDoesNotFit:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"cluster": "other"}, ["the cluster is 'other' on node-a and 'test' on node-b"]),
            ({"group": "rg-z"}, ["the group is 'rg-z' on node-a and 'rg-a' on node-b"]),
            ({"peer": "node-z"}, ["node-b is not node-z, the peer of node-a"]),
            ({"node": "node-z"}, ["node-z is not node-a, the peer of node-b"]),
            ({"volumes": [["vm-z", 1]]}, ["volume vm-a is missing on node-a", "volume vm-z is missing on node-b"]),
            ({"volumes": [["vm-a", 5]]}, [f"volume vm-a has 5 bytes on node-a and {64 * MIB} on node-b"]),
            ({"record": {**FIRST, "in_sync": [OWNER, SECONDARY]}}, ["at epoch 1 in sync are node-a, node-b on node-a"]),
            ({"record": {**FIRST, "owner": SECONDARY, "in_sync": [SECONDARY]}}, ["node-a is not the owner, node-b is"]),
            (
                {"protocols": [2, 3]},
                ["node-a (version 9.9.9) speaks link protocols 2 to 3 and node-b (version 0.1.0) speaks 1 to 1"],
            ),
        ],
    )
    def test_is_told_what_differs(self, lonely: Cluster, changes: dict[str, Any], words: list[str]) -> None:
        kind, said = as_owner(lonely, hello(lonely, OWNER, **changes))
        assert kind == Kind.REFUSE
        assert not said["passing"]
        for each in words:
            assert each in said["reason"]
        seen = lonely.secondary.wait("shows it", lambda group: group["why"].endswith(said["reason"]))
        assert seen["state"] == "held"
        assert seen["link"]["state"] == "refused"

    def test_may_try_again_when_the_record_has_not_arrived_yet(self, lonely: Cluster) -> None:
        kind, said = as_owner(lonely, hello(lonely, OWNER, record={**FIRST, "epoch": 2}))
        assert (kind, said["passing"]) == (Kind.REFUSE, True)
        assert "epoch 2 is not known on node-b yet" in said["reason"]

    def test_of_a_later_version_whose_protocols_overlap_is_accepted(self, lonely: Cluster) -> None:
        kind, said = as_owner(lonely, hello(lonely, OWNER, protocols=[1, 7], something_new=True))
        assert kind == Kind.HELLO
        assert said["node"] == SECONDARY
        assert said["record"] == FIRST

    def test_of_an_older_epoch_is_refused(self, make_cluster: MakeCluster) -> None:
        """Rule 6: an owner that has missed its replacement."""
        cluster = make_cluster().start()
        record = record_of(cluster.secondary)
        kind, said = as_owner(cluster, hello(cluster, OWNER))
        assert kind == Kind.REFUSE
        assert f"epoch 1, which is older than epoch {record['epoch']} on node-b" in said["reason"]
        assert cluster.secondary.group()["session"]


class TestSecondaryThatDoesNotFit:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (
                {"protocols": [2, 3]},
                ["node-b (version 9.9.9) speaks link protocols 2 to 3 and node-a (version 0.1.0) speaks 1 to 1"],
            ),
            (
                {"node": "node-z", "volumes": [["vm-z", 1]]},
                ["node-z is not node-b", "volume vm-a is missing on node-z", "volume vm-z is missing on node-a"],
            ),
            ({"lineage": "1" * 32, "blank": False}, ["no common history"]),
            ({"blank": False}, ["data of unknown origin"]),
        ],
    )
    def test_is_refused_by_the_owner_which_serves_alone(
        self, make_cluster: MakeCluster, changes: dict[str, Any], words: list[str]
    ) -> None:
        """The real node-b cannot listen, and somebody else answers in its stead."""
        cluster = make_cluster()

        def serve(connection: socket.socket) -> None:
            assert receive(connection).kind == Kind.HELLO
            connection.sendall(opening(hello(cluster, SECONDARY, **changes)))
            connection.recv(65536)

        with as_secondary(cluster, serve):
            for node in cluster.nodes.values():
                node.start()
            found = cluster.owner.wait("refuses", lambda group: group["link"]["state"] == "refused")
            for each in words:
                assert each in found["why"]
            assert found["state"] == "alone"
            assert found["in_sync"] == [OWNER]
            nbdsh("h.connect_uri(uri[0]); h.pwrite(b'x' * 4096, 0)", cluster.uri())
        cluster.wait_in_sync()  # with the real one
        cluster.assert_holds(0, b"x" * 4096)
