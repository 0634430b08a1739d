"""The bounds of a data process: connections, memory, what is under way."""

import contextlib
import os
from collections.abc import Iterator

import nbd_raw as nbd
import pytest
from clients import fio, nbdsh
from files import MIB
from harness import Cluster, memory_mib, wait_for

MEMORY_MIB = 150


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with narrow limits."""
    limits = {"connections": 4, "window_bytes": "32MiB", "window_changes": 100, "link_timeout_s": 1}
    cluster = Cluster(tmp_path_factory.mktemp("limits"), limits=limits)
    try:
        yield cluster.start()
    finally:
        cluster.close()


def test_more_connections_than_the_limit_are_refused_and_counted(small: Cluster) -> None:
    refused = small.counter("connections_refused")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(nbd.negotiated(small)) for _ in range(4)]
        with nbd.connect(small) as one_more:
            assert nbd.exactly(one_more, 18) == b""
        for client in clients:
            client.sendall(nbd.request(nbd.READ, 0, 512))
            assert nbd.simple_reply(client) == (0, 1)
            assert nbd.exactly(client, 512) == bytes(512)
        small.owner.wait("counts the refusal", lambda group: group["counters"]["connections_refused"] == refused + 1)
    small.owner.wait("misses the clients", lambda group: group["clients"] == 0)
    nbdsh("h.connect_uri(uri[0]); h.pread(512, 0)", small.uri())


@pytest.mark.parametrize("length", [1, 64 * 1024])
def test_the_window_bounds_what_is_held(small: Cluster, length: int) -> None:
    """While the peer is away, clients that write more than the window takes are not read from."""
    with nbd.negotiated(small) as client:
        client.settimeout(1)
        sent = 0
        with small.secondary.paused():
            with contextlib.suppress(TimeoutError):
                for number in range(3000):
                    client.sendall(nbd.request(nbd.WRITE, number * length % (32 * MIB), length, number) + bytes(length))
                    sent += 1
            report = small.owner.wait(
                "holds them", lambda group: group["state"] == "held" and group["window"]["changes"]
            )
            held = report["window"]
            most_at_once = MIB // (28 + length) + 1  # one buffer of input is taken as a whole
            assert held["changes"] < 100 + most_at_once
            assert held["bytes"] <= 33 * MIB
        client.settimeout(nbd.TIMEOUT_S)
        assert [nbd.simple_reply(client) for _ in range(sent)] == [(0, number) for number in range(sent)]
    small.wait_in_sync().settle()
    small.assert_identical()


def test_clients_that_read_while_nothing_may_be_answered_hold_little(small: Cluster) -> None:
    """Without its lease an owner answers no read, so it does not take more of them than it can keep."""
    with contextlib.ExitStack() as stack:
        with small.secondary.paused():
            small.owner.wait("has no lease", lambda group: not group["serving"])
            before = memory_mib(small.owner.data_pid, "VmRSS")
            clients = [stack.enter_context(nbd.negotiated(small)) for _ in range(4)]
            for client in clients:
                client.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    for number in range(64):
                        client.sendall(nbd.request(nbd.READ, 0, 4 * MIB, number))
            small.owner.wait("has them", lambda group: group["clients"] == 4)
            assert memory_mib(small.owner.data_pid, "VmRSS") - before < 4 * 8
        for client in clients:
            client.settimeout(nbd.TIMEOUT_S)
            for number in range(64):
                assert nbd.simple_reply(client) == (0, number)
                assert len(nbd.exactly(client, 4 * MIB)) == 4 * MIB
    small.wait_in_sync()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("memory"), size_bytes=256 * MIB)
    try:
        yield cluster.start()
    finally:
        cluster.close()


@pytest.fixture
def large(running: Cluster) -> Iterator[Cluster]:
    """After each test no data process has ever been larger than it may be."""
    yield running
    for node in running.nodes.values():
        for what in ("VmHWM", "VmRSS"):
            assert memory_mib(node.data_pid, what) < MEMORY_MIB, (node.name, what)
    running.settle()
    running.assert_identical()


class TestMemory:
    @pytest.mark.parametrize("block", ["4k", "128k"])
    @pytest.mark.parametrize("rw", ["randwrite", "randread", "randrw"])
    def test_of_64_clients_at_queue_depth_32(self, large: Cluster, block: str, rw: str) -> None:
        jobs = fio(
            large.uri(),
            rw=rw,
            bs=block,
            iodepth=32,
            numjobs=64,
            size="4M",
            offset_increment="4M",
            time_based=1,
            runtime=2,
        )
        assert len(jobs) == 64
        assert all(job["read"]["total_ios"] + job["write"]["total_ios"] for job in jobs)

    def test_of_64_clients_while_their_writes_are_held(self, large: Cluster) -> None:
        with large.secondary.paused(), contextlib.ExitStack() as stack:
            for number in range(64):
                client = stack.enter_context(nbd.negotiated(large))
                client.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    for block in range(32):
                        offset = (number * 32 + block) * 128 * 1024
                        client.sendall(nbd.request(nbd.WRITE, offset, 128 * 1024, block) + b"h" * 128 * 1024)
            large.owner.wait_state("held")
        large.wait_in_sync()

    def test_of_clients_with_requests_of_32_mib(self, large: Cluster) -> None:
        """Half of them write, half of them read."""
        script = f"""
import threading
def use(number):
    h = nbd.NBD()
    h.connect_uri(uri[0])
    data = nbd.Buffer.from_bytearray(bytearray({32 * MIB}))
    cookies = (h.aio_pwrite if number % 2 else h.aio_pread)(data, number * {3 * MIB})
    while h.aio_in_flight():
        h.poll(-1)
    assert h.aio_command_completed(cookies)
threads = [threading.Thread(target=use, args=[number]) for number in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
        nbdsh(script, large.uri())


def test_a_client_reconnecting_all_the_time_leaves_nothing_behind(small: Cluster) -> None:
    pid = small.owner.data_pid
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    nbdsh(
        """
for number in range(300):
    h = nbd.NBD()
    h.connect_uri(uri[0])
    h.pwrite(b"x" * 4096, number * 4096)
    if number % 2:
        h.shutdown()
    del h
""",
        small.uri(),
    )
    small.settle()
    wait_for("the descriptors are closed", lambda: len(os.listdir(f"/proc/{pid}/fd")) <= descriptors)
