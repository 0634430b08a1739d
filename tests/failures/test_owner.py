"""The owner of a group fails in one way or another: its clients wait for a moment, and see no error."""

import fcntl
import select
import signal
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from files import MIB
from harness import wait_for

from .blocks import BLOCK_BYTES
from .clients import PART_BLOCKS, Load, raw_client, under_load
from .cluster import GROUP, OTHER_GROUP, Cluster, Node
from .network import FLOATING, LAN, LINK

# Longer than lease, link time-out and the lifetime of an address: nothing of the old owner is left but itself.
LONG_STOP_S = 5.0
LONGEST_STOP_S = 10.0


def assert_is_at(cluster: Cluster, node: Node) -> None:
    """The group is served there, and the client's machine knows: without waiting for anything to expire."""
    assert cluster.client.neighbour(FLOATING) == node.machine.mac
    node.wait_serving()


@contextmanager
def other_client(cluster: Cluster) -> Iterator[Load]:
    """A client of the other group."""
    load = raw_client(cluster, group=OTHER_GROUP, name="other")
    try:
        load.wait_answers()
        yield load
    finally:
        load.close()


def come_back(cluster: Cluster, node: Node) -> None:
    """It is started again, becomes the secondary and is in sync, though clients do not stop."""
    node.power_on()
    cluster.wait_in_sync()
    assert cluster.owner() is not node


def test_its_daemon_is_killed(cluster: Cluster) -> None:
    """Row 1."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.event():
            owner.kill()
        assert_is_at(cluster, secondary)
        with clients.event():
            come_back(cluster, owner)


def test_its_host_loses_power(cluster: Cluster) -> None:
    """Row 2: not even the end of a connection is heard of it, and clients that wait for an answer send nothing."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.wait_known().event():
            owner.signal(signal.SIGSTOP)  # it has received, and does not answer
            clients.wait_held()
            owner.power_off()
        assert_is_at(cluster, secondary)
        with clients.event():
            come_back(cluster, owner)


def test_its_data_process_is_killed(make_cluster: Callable[..., Cluster]) -> None:
    """Row 3."""
    cluster = make_cluster(two_groups=True).start()
    owner = cluster.owner(GROUP)
    assert cluster.owner(OTHER_GROUP) is not owner
    other_pids = [node.data_pid(OTHER_GROUP) for node in cluster.nodes.values()]
    with other_client(cluster) as other, under_load(cluster) as clients:
        with clients.event():
            owner.kill_data_process(GROUP)
        cluster.wait_in_sync()
        report = other.finish()
        assert not report.errors
        assert report.connects == 1
    assert [node.data_pid(OTHER_GROUP) for node in cluster.nodes.values()] == other_pids


def test_its_data_process_hangs(cluster: Cluster) -> None:
    """Row 14: its supervisor ends it, as it reports no more, and the peer takes over."""
    owner, secondary = cluster.pair()
    pid = owner.data_pid()
    with under_load(cluster) as clients:
        with clients.wait_known().event():
            owner.signal(signal.SIGSTOP, [pid])
        assert_is_at(cluster, secondary)
        assert "it had not reported for" in owner.log
        with clients.event():
            cluster.wait_in_sync()


@pytest.mark.parametrize("way", ["packets are dropped", "its interfaces are down"])
def test_it_is_cut_from_everything(cluster: Cluster, way: str) -> None:
    """Row 7: it lives, but it neither answers, not even who reaches it still, nor keeps the address."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients, old_client(cluster, owner) as old:
        old.write(1)
        with clients.wait_known().event():
            if way == "packets are dropped":
                owner.machine.isolate()
            else:
                owner.machine.interfaces_down([LAN, LINK])
        assert_is_at(cluster, secondary)
        old.ask_both(2, beside=MIB)
        wait_for("it has let go of the address", lambda: not owner.machine.has_address(FLOATING))
        owner.wait_held(f"{secondary.name} has not been heard")
        assert not old.has_answer()
        with clients.event():
            cluster.network.heal()
            assert old.answers_until_closed() == b""
            cluster.wait_in_sync()
        assert cluster.owner() is secondary


def test_its_lan_interface_is_down(cluster: Cluster) -> None:
    """It reaches neither clients nor witness, but its peer: nothing moves, and it goes on when the LAN is back."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        epoch = owner.group()["epoch"]
        with clients.event():
            owner.machine.interfaces_down([LAN])
            secondary.wait_path_silent(owner.machine.lan_ip)
            owner.wait("says that the arbiter does not answer", lambda of: of["arbiter"])
            clients.wait_held()
            cluster.network.heal()
        assert cluster.owner() is owner
        assert owner.group()["epoch"] == epoch


def test_clients_do_not_reach_it_and_the_operator_moves_the_group(cluster: Cluster) -> None:
    """By itself nothing moves, as the nodes and the witness see each other."""
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.wait_known().event():
            owner.machine.drop([cluster.client.lan_ip])
            cluster.move(to=secondary)
        assert_is_at(cluster, secondary)
    cluster.network.heal()


class OldClient:
    """A client at the Unix socket of a node, which no address can take away from it."""

    def __init__(self, cluster: Cluster, node: Node) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(cluster.nbd_unix(node)))
        name = cluster.volume().encode()
        self._socket.sendall(b"\0\0\0\3IHAVEOPT" + struct.pack(">II", 1, len(name)) + name)
        self._exactly(18 + 10)
        self._offset = 3 * PART_BLOCKS * BLOCK_BYTES  # in no other client's part

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self._socket.recv(length - len(data))
            assert piece, "the node closed the connection"
            data += piece
        return data

    def _read(self) -> bytes:
        return struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, self._offset, BLOCK_BYTES)

    def _write(self, byte: int, offset: int) -> bytes:
        return struct.pack(">IHHQQI", 0x25609513, 0, 1, 2, offset, BLOCK_BYTES) + bytes([byte]) * BLOCK_BYTES

    def ask_both(self, byte: int, beside: int) -> None:
        """A read, and a write so far away that the read need not wait for it; at once, as a node that holds an answer
        takes nothing more."""
        self._socket.sendall(self._read() + self._write(byte, self._offset + beside))

    def write(self, byte: int) -> None:
        self._socket.sendall(self._write(byte, self._offset))
        assert struct.unpack(">IIQ", self._exactly(16)) == (0x67446698, 0, 2)

    def read(self) -> bytes:
        self._socket.sendall(self._read())
        assert struct.unpack(">IIQ", self._exactly(16)) == (0x67446698, 0, 1)
        return self._exactly(BLOCK_BYTES)

    def all_taken(self) -> bool:
        """Whether the node has received all that was asked."""
        left = fcntl.ioctl(self._socket, termios.TIOCOUTQ, b"\0" * 4)
        return int.from_bytes(left, "little") == 0

    def has_answer(self) -> bool:
        """Whether anything has come, or the connection was closed."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def answers_until_closed(self) -> bytes:
        """What still comes from the node before it closes the connection."""
        data = b""
        with suppress(ConnectionResetError):
            while piece := self._socket.recv(65536):
                data += piece
        return data

    def close(self) -> None:
        self._socket.close()


@contextmanager
def old_client(cluster: Cluster, node: Node) -> Iterator[OldClient]:
    client = OldClient(cluster, node)
    try:
        yield client
    finally:
        client.close()


@pytest.mark.parametrize(("who", "for_s"), [("all", 0.0), ("supervisor", LONG_STOP_S)])
def test_it_is_stopped_and_continues_after_the_takeover(cluster: Cluster, who: str, for_s: float) -> None:
    """Row 15: whoever still asks it gets no answer, least of all an old one."""
    owner, _ = cluster.pair()
    family = owner.family()
    stop_and_continue(cluster, family if who == "all" else family[:1], for_s)


def test_it_is_secondary_too_and_is_stopped_for_long(make_cluster: Callable[..., Cluster]) -> None:
    """Row 15, with a group of each kind: all its data processes are stopped with it."""
    cluster = make_cluster(two_groups=True).start()
    owner, secondary = cluster.pair()
    assert cluster.owner(OTHER_GROUP) is secondary
    with other_client(cluster) as other:
        stop_and_continue(cluster, owner.family(), LONGEST_STOP_S, other)
    assert cluster.owner(OTHER_GROUP) is secondary


def stop_and_continue(cluster: Cluster, pids: list[int], for_s: float, *others: Load) -> None:
    """These processes of the group's owner; `others`: clients of another group, which see no error either."""
    owner, secondary = cluster.pair()
    supervisor, *data_processes = owner.family()
    with under_load(cluster) as clients, old_client(cluster, owner) as old:
        old.write(1)
        with clients.wait_known().event():
            owner.signal(signal.SIGSTOP, pids)
        secondary.wait_serving()
        with old_client(cluster, secondary) as new:
            new.write(2)
            old.ask_both(3, beside=MIB)
            time.sleep(for_s)  # that is what happens, and not to wait for something
            with clients.event():
                owner.signal(signal.SIGCONT, data_processes)  # so they have no word from their supervisor yet
                wait_for("it has taken the requests", old.all_taken)
                owner.signal(signal.SIGCONT, [supervisor])
                assert old.answers_until_closed() == b""
            assert new.read() == bytes([2]) * BLOCK_BYTES
        assert_is_at(cluster, secondary)
        with clients.event():
            cluster.wait_in_sync()
        for other in others:
            assert not other.finish().errors
