"""Garbage, oversized, truncated and byte-by-byte input on the NBD and link ports disturbs nobody else."""

import contextlib
import json
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd_raw as nbd
import pytest
from clients import Load, load
from files import MIB
from harness import OWNER, SECONDARY, Cluster, memory_mib, wait_for
from link_peer import as_owner, hello, opening, receive, record_of

from stortrends_ha.protocol.link import HEADER, PREFACE, Kind, changes_header, encode_object, frame

# The load of this module verifies its first 16 MiB; what bad clients write goes behind that.
FREE = 32 * MIB
LOAD_CLIENTS = 2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    limits = {"handshake_timeout_s": 2, "link_timeout_s": 1}
    found = Cluster(tmp_path_factory.mktemp("bad"), limits=limits)
    try:
        yield found.start()
    finally:
        found.close()


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Load]:
    """Writes and verifies during the whole module; in the end it has seen no error, and the replicas are identical."""
    with load(cluster.uri(), jobs=LOAD_CLIENTS) as running:
        cluster.owner.wait("serves the load", lambda group: group["clients"] == LOAD_CLIENTS)
        yield running
        running.finish()
    cluster.settle()
    cluster.assert_identical()


@pytest.fixture(autouse=True)
def undisturbed(cluster: Cluster, client: Load) -> Iterator[None]:
    """Whatever a test sends: the client goes on, the link stays up, no process ends."""
    before = {name: node.group() for name, node in cluster.nodes.items()}
    yield
    assert client.running
    for name, node in cluster.nodes.items():
        now = node.group()
        assert now["state"] == "in-sync"
        assert now["pid"] == before[name]["pid"], "the data process was started again"
        assert now["counters"]["link_sessions"] == before[name]["counters"]["link_sessions"]
        assert now["epoch"] == before[name]["epoch"], "the record has changed"


@contextlib.contextmanager
def counted(cluster: Cluster, counter: str, node: str = OWNER, by: int = 1) -> Iterator[None]:
    """The counter goes up, by so much."""
    before = cluster.counter(counter, node)
    yield
    wait_for(f"{counter} is {before} + {by}", lambda: cluster.counter(counter, node) >= before + by)
    assert cluster.counter(counter, node) == before + by


NBD_HANDSHAKES_THAT_ARE_CLOSED = {
    "garbage": b"GET / HTTP/1.1\r\nHost: example\r\n\r\n" + bytes(range(256)),
    "unknown client flags": struct.pack(">I", 0x80000003),
    "garbage after the flags": nbd.FLAGS + bytes(range(64)),
    "garbage after an option": nbd.FLAGS + nbd.option(nbd.LIST) + b"x" * 64,
    "an option of 4 GiB": nbd.FLAGS + nbd.option(nbd.GO, b"", length=0xFFFFFFFF),
    "an unknown export by EXPORT_NAME": nbd.FLAGS + nbd.option(nbd.EXPORT_NAME, b"nonsense"),
}
TRANSMISSIONS_THAT_ARE_CLOSED = {
    "garbage": bytes(range(28)),
    "a wrong magic number": nbd.request(nbd.READ, 0, 512, magic=0x25609514),
    "garbage behind a request": nbd.request(nbd.READ, 0, 512) + b"\xff" * 28,
    "a write of 4 GiB": nbd.request(nbd.WRITE, FREE, 0xFFFFFFFF) + bytes(1000),
    "a write of a byte more than 32 MiB": nbd.request(nbd.WRITE, 0, 32 * MIB + 1),
}
REQUESTS_THAT_ARE_ANSWERED = {
    "an unknown command": (nbd.request(77, 0, 512), nbd.EINVAL),
    "an unknown flag": (nbd.request(nbd.READ, 0, 512, flags=1 << 12), nbd.EINVAL),
    "a write beyond the end": (nbd.request(nbd.WRITE, 64 * MIB - 1, 512) + bytes(512), nbd.ENOSPC),
    "a write around 2^64": (nbd.request(nbd.WRITE, 2**64 - 1, 512) + bytes(512), nbd.ENOSPC),
    "a read around 2^64": (nbd.request(nbd.READ, 2**64 - 1, 512), nbd.EINVAL),
    "a trim beyond the end": (nbd.request(nbd.TRIM, 64 * MIB, 0xFFFFFFFF), nbd.EINVAL),
    "zeroes beyond the end": (nbd.request(nbd.ZEROES, 64 * MIB - 1, 0xFFFFFFFF), nbd.ENOSPC),
    "DF without structured replies": (nbd.request(nbd.READ, 0, 512, flags=1 << 2), nbd.EINVAL),
    "block status without a context": (nbd.request(nbd.BLOCK_STATUS, 0, 512), nbd.EINVAL),
    "a refused write of 32 MiB": (nbd.request(nbd.WRITE, 60 * MIB, 32 * MIB) + bytes(32 * MIB), nbd.ENOSPC),
}


class TestNbd:
    @pytest.mark.parametrize("what", NBD_HANDSHAKES_THAT_ARE_CLOSED)
    def test_a_broken_handshake_is_closed_and_counted(self, cluster: Cluster, what: str) -> None:
        with counted(cluster, "nbd_bad_input", by=0 if "unknown export" in what else 1), nbd.connect(cluster) as client:
            client.sendall(NBD_HANDSHAKES_THAT_ARE_CLOSED[what])
            assert nbd.is_closed(client)

    @pytest.mark.parametrize("what", TRANSMISSIONS_THAT_ARE_CLOSED)
    def test_a_broken_request_closes_its_connection_and_is_counted(self, cluster: Cluster, what: str) -> None:
        with counted(cluster, "nbd_bad_input"), nbd.negotiated(cluster) as client:
            client.sendall(TRANSMISSIONS_THAT_ARE_CLOSED[what])
            assert nbd.is_closed(client)

    def test_a_request_that_cannot_be_carried_out_is_answered_and_the_connection_lives(self, cluster: Cluster) -> None:
        with nbd.negotiated(cluster) as client:
            for what, (sent, error) in REQUESTS_THAT_ARE_ANSWERED.items():
                client.sendall(sent)
                assert nbd.simple_reply(client) == (error, 1), what
            client.sendall(nbd.request(nbd.WRITE, FREE, 5, cookie=9) + b"alive")
            assert nbd.simple_reply(client) == (0, 9)
        cluster.assert_holds(FREE, b"alive")

    def test_options_that_are_too_long_are_skipped_and_refused(self, cluster: Cluster) -> None:
        with nbd.connect(cluster) as client:
            client.sendall(nbd.FLAGS)
            assert len(nbd.exactly(client, 18)) == 18
            for number, size in ((nbd.GO, 20 * MIB), (99, MIB), (nbd.LIST, 4)):
                client.sendall(nbd.option(number, bytes(size)))
                magic, of, kind, length = struct.unpack(">QIII", nbd.exactly(client, 20))
                assert (magic, of) == (0x3E889045565A9, number)
                assert kind >> 31, f"option {number} was not refused"
                nbd.exactly(client, length)
            client.sendall(nbd.go())
            assert struct.unpack(">QIII", nbd.exactly(client, 20))[1:3] == (nbd.GO, 3)

    def test_input_byte_by_byte_does_what_it_says(self, cluster: Cluster) -> None:
        sent = b"".join(
            (
                nbd.FLAGS,
                nbd.option(nbd.EXPORT_NAME, b"vm-a"),
                nbd.request(nbd.WRITE, FREE + 100, 11, cookie=1) + b"byte by byte"[:11],
                nbd.request(nbd.READ, FREE + 100, 11, cookie=2),
                nbd.request(nbd.FLUSH, 0, 0, cookie=3),
                nbd.request(nbd.DISC, 0, 0, cookie=4),
            )
        )
        with nbd.connect(cluster) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in sent:
                client.sendall(bytes((byte,)))
            answer = nbd.exactly(client, 18 + 10 + 16 + 16 + 11 + 16)
            assert b"byte by byte"[:11] in answer
            assert nbd.is_closed(client)
        cluster.assert_holds(FREE + 100, b"byte by byte"[:11])

    def test_all_at_once_does_what_it_says(self, cluster: Cluster) -> None:
        """Everything up to DISC in one piece, before the server has said a word."""
        with nbd.connect(cluster) as client:
            write = nbd.request(nbd.WRITE, FREE + 200, 4) + b"once"
            end = nbd.request(nbd.FLUSH, 0, 0) + nbd.request(nbd.DISC, 0, 0)
            client.sendall(nbd.FLAGS + nbd.option(nbd.EXPORT_NAME, b"vm-a") + write + end)
            assert len(nbd.exactly(client, 28 + 32)) == 60
            assert nbd.is_closed(client)
        cluster.assert_holds(FREE + 200, b"once")

    def test_a_connection_that_ends_at_any_point_leaves_nothing(self, cluster: Cluster) -> None:
        whole = (
            nbd.FLAGS + nbd.option(nbd.LIST) + nbd.option(nbd.STRUCTURED) + nbd.go()
            + nbd.request(nbd.READ, 0, 4096) + nbd.request(nbd.WRITE, FREE + 8192, 100) + b"n" * 99
        )  # fmt: skip
        for end in range(len(whole)):
            with nbd.connect(cluster) as client:
                client.sendall(whole[:end])
        wait_for("they are all gone", lambda: cluster.owner.group()["clients"] == LOAD_CLIENTS)
        cluster.assert_holds(FREE + 8192, bytes(100))

    def test_random_changes_of_a_valid_session(self, cluster: Cluster) -> None:
        rng = random.Random(3)
        for _ in range(150):
            sent = bytearray(
                nbd.FLAGS + nbd.option(nbd.LIST) + nbd.go()
                + b"".join(nbd.request(rng.randrange(9), FREE, rng.randrange(5000)) for _ in range(4))
            )  # fmt: skip
            for _ in range(rng.randrange(1, 6)):
                # Where and how much is left alone: the load's own blocks are not to be hit.
                sent[rng.randrange(0, 60)] = rng.randrange(256)
            with nbd.connect(cluster) as client, contextlib.suppress(ConnectionError):
                client.sendall(sent)

    def test_a_handshake_that_does_not_go_on_is_closed_in_time(self, cluster: Cluster) -> None:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(nbd.connect(cluster)) for _ in range(3)]
            for client, sent in zip(clients, (b"", nbd.FLAGS, nbd.FLAGS + nbd.go()[:-1]), strict=True):
                client.sendall(sent)
            assert all(nbd.is_closed(client) for client in clients)

    def test_a_client_that_goes_on_slowly_is_closed_in_time_all_the_same(self, cluster: Cluster) -> None:
        with nbd.connect(cluster) as client:
            client.settimeout(0.05)
            client.sendall(nbd.FLAGS)
            with contextlib.suppress(ConnectionError):
                for _ in range(400):
                    client.sendall(nbd.option(99))
                    with contextlib.suppress(TimeoutError):
                        while client.recv(65536):
                            pass
                        break
                else:
                    pytest.fail("it was not closed")


def owner_says(cluster: Cluster, *frames: Callable[[int], bytes]) -> bytes:
    """What would open a session, then frames of its epoch."""
    record = record_of(cluster.secondary)
    said = opening(hello(cluster, OWNER, record=record, lineage="1" * 32))
    return said + b"".join(frame_of(record["epoch"]) for frame_of in frames)


def open_frame(**said: Any) -> Callable[[int], bytes]:
    return lambda epoch: encode_object(Kind.OPEN, epoch, said)


LINK_INPUT_THAT_IS_CLOSED: dict[str, Callable[[Cluster], bytes]] = {
    "garbage": lambda _: b"GET / HTTP/1.1\r\nHost: example\r\n\r\n",
    "a preface and garbage": lambda _: PREFACE + bytes(range(100, 200)),
    "a frame that is too long": lambda _: PREFACE + HEADER.pack(Kind.HELLO, 0, 0, 0xFFFFFFFF, 1, 0),
    "a HELLO that is no JSON": lambda _: PREFACE + frame(Kind.HELLO, 1, payload=b"{" * 1000),
    "a HELLO that is deep": lambda _: PREFACE + frame(Kind.HELLO, 1, payload=b"[" * 60_000),
    "a HELLO that is no object": lambda _: PREFACE + frame(Kind.HELLO, 1, payload=b"[]"),
    "a HELLO that says nothing": lambda _: PREFACE + frame(Kind.HELLO, 1, payload=b"{}"),
    "a HELLO of wrong types": lambda c: opening({**hello(c, OWNER), "volumes": {"vm-a": "large"}}),
    "a HELLO without an epoch": lambda _: PREFACE + encode_object(Kind.HELLO, 1, {"record": {"epoch": "x"}}),
    "a HELLO whose owner is not in sync": lambda c: opening(
        hello(c, OWNER, record={"epoch": 1, "owner": OWNER, "in_sync": [SECONDARY]})
    ),
    "something else than HELLO": lambda _: PREFACE + frame(Kind.PING, 1),
    "changes without a session": lambda _: PREFACE + changes_header(1, 1, 0, 100) + bytes(100),
    "changes after HELLO": lambda c: owner_says(c, lambda epoch: changes_header(epoch, 1, 0, 100) + bytes(100)),
    "OPEN of another epoch": lambda c: owner_says(c, lambda _: encode_object(Kind.OPEN, 77, {"full": True})),
    "OPEN that says nothing": lambda c: owner_says(c, open_frame()),
    "OPEN of another lineage": lambda c: owner_says(c, open_frame(full=False, first=1, lineage="1" * 32)),
    "OPEN of a sync that would overwrite a node in sync": lambda c: owner_says(
        c, open_frame(full=True, first=0, lineage="1" * 32)
    ),
}


def link(cluster: Cluster) -> socket.socket:
    return socket.create_connection(("127.0.0.1", cluster.link_port), nbd.TIMEOUT_S)


class TestLink:
    @pytest.mark.parametrize("what", LINK_INPUT_THAT_IS_CLOSED)
    def test_broken_input_is_closed_and_counted(self, cluster: Cluster, what: str) -> None:
        with counted(cluster, "link_bad_input", SECONDARY), link(cluster) as peer:
            peer.sendall(LINK_INPUT_THAT_IS_CLOSED[what](cluster))
            assert nbd.is_closed(peer)

    def test_a_stranger_is_refused_with_words_and_the_session_goes_on(self, cluster: Cluster) -> None:
        kind, said = as_owner(cluster, {**hello(cluster, OWNER), "cluster": "other"})
        assert kind == Kind.REFUSE
        assert "the cluster is 'other' on node-a and 'test' on node-b" in said["reason"]

    def test_byte_by_byte_it_is_understood(self, cluster: Cluster) -> None:
        with link(cluster) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in opening({**hello(cluster, OWNER), "cluster": "other"}):
                peer.sendall(bytes((byte,)))
            assert receive(peer).kind == Kind.REFUSE

    def test_a_connection_that_ends_at_any_point_leaves_nothing(self, cluster: Cluster) -> None:
        whole = owner_says(cluster, open_frame(full=False, first=1, lineage="1" * 32))
        for end in range(0, len(whole), 7):
            with link(cluster) as peer:
                peer.sendall(whole[:end])

    def test_a_connection_that_says_nothing_is_closed_in_time(self, cluster: Cluster) -> None:
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(link(cluster)) for _ in range(3)]
            for peer, sent in zip(peers, (b"", PREFACE, opening(hello(cluster, OWNER))), strict=True):
                peer.sendall(sent)
            assert all(nbd.is_closed(peer) for peer in peers)

    def test_many_that_say_nothing_are_refused(self, cluster: Cluster) -> None:
        before = cluster.counter("connections_refused", SECONDARY)
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(link(cluster)) for _ in range(40)]
            assert all(nbd.is_closed(peer) for peer in peers)
        wait_for("the refusals are counted", lambda: cluster.counter("connections_refused", SECONDARY) > before)

    def test_random_changes_of_a_valid_opening(self, cluster: Cluster) -> None:
        rng = random.Random(4)
        for _ in range(150):
            sent = bytearray(opening({**hello(cluster, OWNER), "cluster": "other"}))
            for _ in range(rng.randrange(1, 10)):
                sent[rng.randrange(len(sent))] = rng.randrange(256)
            with link(cluster) as peer, contextlib.suppress(ConnectionError):
                peer.sendall(sent)


def test_the_control_socket_answers_garbage_with_an_error(cluster: Cluster) -> None:
    for sent in (b"garbage\n", b"[" * 60_000 + b"\n", b'{"command": "explode"}\n', b"x" * 100_000 + b"\n", b"{}\n"):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(nbd.TIMEOUT_S)
            client.connect(str(cluster.owner.control))
            with contextlib.suppress(BrokenPipeError):
                client.sendall(sent)
            with client.makefile() as file:
                answer = json.loads(file.readline())
        assert answer["ok"] is False
        assert answer["error"].endswith(".")


class TestBounds:
    def test_clients_that_never_read_replies_hold_little_memory_and_nobody_up(self, cluster: Cluster) -> None:
        pid = cluster.owner.data_pid
        reads = b"".join(nbd.request(nbd.READ, 0, 32 * MIB, cookie) for cookie in range(8))
        writes = b"".join(nbd.request(nbd.WRITE, FREE, 1, cookie) + b"w" for cookie in range(40_000))
        before = cluster.written()
        with contextlib.ExitStack() as stack:
            for number in range(32):
                client = stack.enter_context(nbd.negotiated(cluster))
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    client.sendall(reads if number % 2 else writes)
            wait_for("the others go on", lambda: cluster.written() > before + 20 * 40_000 // 2)
            assert memory_mib(pid, "VmHWM") < 150


def test_no_log_line_is_written_for_each_bad_byte(cluster: Cluster) -> None:
    """A log that anybody can fill would fill the disk: what came above has left less than a MiB."""
    for path in (cluster.owner.log_path, cluster.secondary.log_path):
        assert Path(path).stat().st_size < MIB
