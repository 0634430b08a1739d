"""The secondary of a group fails: its owner goes on alone, after a short pause, and gets it back in sync."""

import signal

from harness import wait_for

from .clients import under_load
from .cluster import LINK_PORT, Cluster, Node


def assert_back(cluster: Cluster, owner: Node) -> None:
    cluster.wait_in_sync()
    assert cluster.owner() is owner


def test_its_daemon_is_killed(cluster: Cluster) -> None:
    """Row 4."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event():
            secondary.kill()
        assert owner.group()["in_sync"] == [owner.name]
        with clients.event():
            secondary.start()
            assert_back(cluster, owner)


def test_its_host_loses_power(cluster: Cluster) -> None:
    """Row 4."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event():
            secondary.power_off()
        assert owner.group()["in_sync"] == [owner.name]
        with clients.event():
            secondary.power_on()
            assert_back(cluster, owner)


def test_its_data_process_is_killed(cluster: Cluster) -> None:
    """Row 4."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event():
            secondary.kill_data_process()
        assert_back(cluster, owner)


def test_its_data_process_hangs(cluster: Cluster) -> None:
    """Row 14, on the secondary: the link falls silent, though the heartbeat goes on."""
    owner, secondary = cluster.pair()
    pid = secondary.data_pid()
    with under_load(cluster) as clients:
        with clients.event():
            secondary.signal(signal.SIGSTOP, [pid])
        assert owner.group()["in_sync"] == [owner.name]
        with clients.event():
            secondary.signal(signal.SIGCONT, [pid])
            assert_back(cluster, owner)


def test_it_is_stopped_and_continues(cluster: Cluster) -> None:
    """All of it."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event():
            secondary.signal(signal.SIGSTOP)
        assert owner.group()["in_sync"] == [owner.name]
        with clients.event():
            secondary.signal(signal.SIGCONT)
            assert_back(cluster, owner)


def test_the_link_is_cut_and_the_heartbeat_is_not(cluster: Cluster) -> None:
    """Row 5."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event():
            secondary.machine.drop(tcp_ports=[LINK_PORT])
        owner.wait("has gone on alone", lambda of: of["in_sync"] == [owner.name] and of["serving"])
        assert owner.status()["nodes"][secondary.name]["state"] == "up"
        with clients.event():
            cluster.network.heal()
            assert_back(cluster, owner)


def test_the_link_flaps(cluster: Cluster) -> None:
    """Row 19: each time the link is back a session is opened; at last all is well."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        for _ in range(3):
            before = owner.group()["counters"]["link_sessions"]
            with clients.event():
                secondary.kill_data_process()
                wait_for("the link is back", lambda before=before: owner.group()["counters"]["link_sessions"] > before)  # type: ignore[misc]
        with clients.event():
            assert_back(cluster, owner)
