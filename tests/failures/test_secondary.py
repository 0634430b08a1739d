"""The secondary of a group fails: its owner goes on alone, after a short pause, and gets it back in sync."""

import re
import signal
from collections.abc import Callable

from files import MIB
from harness import wait_for

from .clients import PLANNED_S, under_load
from .cluster import LINK_PORT, VOLUME_BYTES, Cluster, Node
from .network import LAN, LINK

# Of each client, so that most of the volume stays the same.
FEW_BLOCKS = 64


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


def test_its_lan_interface_is_down(cluster: Cluster) -> None:
    """It reaches neither witness nor clients, which is nothing to them as long as its owner lives."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        epoch = owner.group()["epoch"]
        with clients.event(stall_s=PLANNED_S):
            secondary.machine.interfaces_down([LAN])
            owner.wait_path_silent(secondary.machine.lan_ip)
            secondary.wait_path_silent(owner.machine.lan_ip)
        with clients.event(stall_s=PLANNED_S):
            cluster.network.heal()
        assert owner.group()["epoch"] == epoch
        assert owner.group()["state"] == "in-sync"


def test_the_link_itself_flaps(cluster: Cluster) -> None:
    """Row 19: shorter than anybody's patience nothing happens but a pause; longer, there is one sync each time, of what
    was written meanwhile. The interface of either node may be the reason: the nodes hear each other on the LAN."""
    owner, secondary = cluster.pair()
    down: list[Callable[[], None]] = [
        lambda: owner.machine.interfaces_down([LINK]),
        lambda: secondary.machine.interfaces_down([LINK]),
    ]
    short = [lambda: secondary.machine.drop(tcp_ports=[LINK_PORT]), *down]
    with under_load(cluster, blocks=FEW_BLOCKS) as clients:
        before, said = owner.group()["counters"]["link_sessions"], owner.log_since()
        for cut in short:
            with clients.event():
                cut()
                clients.wait_held()
                cluster.network.heal()
        for cut in down:
            with clients.event():
                cut()
                owner.wait("has gone on alone", lambda of: of["in_sync"] == [owner.name] and of["serving"])
                assert owner.status()["nodes"][secondary.name]["state"] == "up"
            with clients.event():
                cluster.network.heal()
                assert_back(cluster, owner)
        # A sync has a session of its own; the record that ends it, another one.
        assert owner.group()["counters"]["link_sessions"] - before <= 2 * len(short + down)
        copied_mib = [float(mib) for mib in re.findall(r"that may have differed (\S+) MiB were copied", said())]
        assert len(down) <= len(copied_mib) <= len(short + down)
        assert max(copied_mib) < VOLUME_BYTES / MIB / 4


def test_the_data_process_behind_the_link_dies_again_and_again(cluster: Cluster) -> None:
    """Row 19: each time the link is back a session is opened; at last all is well."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        for _ in range(2):
            before = owner.group()["counters"]["link_sessions"]
            with clients.event():
                secondary.kill_data_process()
                wait_for("the link is back", lambda before=before: owner.group()["counters"]["link_sessions"] > before)  # type: ignore[misc]
        with clients.event():
            assert_back(cluster, owner)
