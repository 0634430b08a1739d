"""Row 22: the cluster files of the nodes differ. Nothing is granted by an arbiter that the other does not know."""

from collections.abc import Callable, Iterator

import pytest
from harness import wait_for

from .clients import under_load
from .cluster import WITNESS_PORT, Cluster, Node, Witness

ANOTHER = "has another arbiter"


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    return make_cluster().start()


@pytest.fixture
def other_witness(cluster: Cluster) -> Iterator[Witness]:
    """A second one, which knows of nothing; it runs."""
    witness = Witness(cluster.network.witness, cluster.directory, cluster.key, "other", WITNESS_PORT + 1)
    witness.start()
    yield witness
    witness.kill()
    assert "Traceback" not in witness.log


def assert_apart(cluster: Cluster, owner: Node, other: Node) -> None:
    """The owner goes on without the other node, and both say why."""
    owner.wait("is alone", lambda of: of["serving"] and of["in_sync"] == [owner.name] and ANOTHER in of["why"])
    other.wait("knows", lambda of: of["in_sync"] == [owner.name] and ANOTHER in of["why"])
    for node, peer in ((owner, other), (other, owner)):
        assert node.status()["nodes"][peer.name]["other_sections"] == ["arbiter"]
        line = f"The cluster file on {peer.name} is not the same as here: see its arbiter."
        wait_for("it is in the log", lambda line=line, node=node: line in node.log)  # type: ignore[misc]
    assert "cluster files that are not the same: see their arbiter" in " ".join(cluster.command("status").split())


def test_the_arbiter_is_changed_on_one_node_after_the_other(cluster: Cluster, other_witness: Witness) -> None:
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        cluster.change_file(arbiter={"kind": "witness", "address": other_witness.address})
        with clients.event():
            secondary.terminate()
            secondary.start()
            assert_apart(cluster, owner, secondary)
        with clients.event():  # though they see each other no more, too
            cluster.cut(owner, secondary)
        secondary.wait_held(f"{owner.name} alone has every acknowledged write")
        cluster.network.heal()
        with clients.wait_known().event():
            owner.terminate()
            owner.start()
            cluster.wait_in_sync()
        assert cluster.owner() is owner
        assert "giving the arbiter, which has none, the record on which both agree" in owner.log


def test_the_owner_is_restarted_with_another_arbiter(cluster: Cluster, other_witness: Witness) -> None:
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        cluster.change_file(arbiter={"kind": "witness", "address": other_witness.address})
        with clients.wait_known().event():
            owner.kill()
            owner.start()
        assert_apart(cluster, secondary, owner)
        assert cluster.witness
        cluster.change_file(arbiter={"kind": "witness", "address": cluster.witness.address})
        with clients.event():
            owner.terminate()
            owner.start()
            cluster.wait_in_sync()


def test_a_node_that_is_started_with_another_arbiter_and_hears_nobody_asks_it_nothing(
    cluster: Cluster, other_witness: Witness
) -> None:
    """Nor does it when the former one is given back to it."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event():
            secondary.kill()
            cluster.cut(owner, secondary)
            assert cluster.witness
            cluster.change_file(arbiter={"kind": "witness", "address": other_witness.address})
            secondary.start()
        secondary.wait_held("is new here: it counts when")
        assert cluster.owner() is owner
        cluster.change_file(arbiter={"kind": "witness", "address": cluster.witness.address})
        with clients.event():
            secondary.terminate()
            secondary.start()
            cluster.network.heal()
            cluster.wait_in_sync()
