"""A node of the link spoken by hand, for what a real one never says.

`hello` describes a node of the cluster as it would be; `as_owner` and `as_secondary` exchange it.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from harness import GROUP, OWNER, SECONDARY, Cluster, Node

from stortrends_ha.protocol.link import HEADER, PREFACE, Frame, Kind, encode_object, next_frame
from stortrends_ha.protocol.link import decode_object as decode

TIMEOUT_S = 10.0


# The first record of a new group.
FIRST = {"epoch": 1, "owner": OWNER, "in_sync": [OWNER]}


def record_of(node: Node) -> dict[str, Any]:
    """The record by which a node acts."""
    group = node.group()
    return {key: group[key] for key in ("epoch", "owner", "in_sync")}


def hello(cluster: Cluster, node: str, /, **changes: Any) -> dict[str, Any]:
    """What `node` would say of a new group, but for the changes."""
    return {
        "cluster": "test",
        "group": GROUP,
        "node": node,
        "peer": SECONDARY if node == OWNER else OWNER,
        "protocols": [1, 1],
        "software": "9.9.9",
        "record": FIRST,
        "volumes": [[name, cluster.size_bytes(name)] for name in cluster.volumes],
        "lineage": "",
        "blank": True,
        "lost_cache": False,
        "needs_sync": False,
        "differs": False,
        "unknown": False,
        "filling": "",
        "gives_up": "",
        "behind": False,
        "inspects": False,
        **changes,
    }


def opening(said: Mapping[str, Any]) -> bytes:
    """The first bytes of a connection."""
    return PREFACE + encode_object(Kind.HELLO, said["record"]["epoch"], dict(said))


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise ConnectionResetError(f"the connection was closed after {data!r}")
        data += piece
    return data


def receive(connection: socket.socket, preface: bool = True) -> Frame:
    """The next frame."""
    if preface:
        assert _exactly(connection, len(PREFACE)) == PREFACE
    header = _exactly(connection, HEADER.size)
    data = memoryview(header + _exactly(connection, HEADER.unpack(header)[3]))
    frame = next_frame(data, 0, len(data), None)
    assert frame is not None
    return frame


def as_owner(cluster: Cluster, said: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Say this to the secondary: the kind of its answer, and what it says."""
    with socket.create_connection(("127.0.0.1", cluster.link_port), TIMEOUT_S) as connection:
        connection.sendall(opening(said))
        answer = receive(connection)
    return answer.kind, decode(answer.payload)


@contextlib.contextmanager
def as_secondary(cluster: Cluster, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """Be the secondary: serve the owner's connections, one after the other."""
    with socket.create_server(("127.0.0.1", cluster.link_port)) as listener:
        ended = threading.Event()

        def accept() -> None:
            while not ended.is_set():
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(TIMEOUT_S)
                    serve(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", cluster.link_port)):
                pass
            thread.join(TIMEOUT_S)
        assert not thread.is_alive()
