"""NBD spoken by hand, byte by byte if need be: what no decent client would send. Independent of our own codec."""

import socket
import struct

from harness import Cluster

TIMEOUT_S = 20.0
OPTION_MAGIC = b"IHAVEOPT"
EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED = 1, 2, 3, 6, 7, 8
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, BLOCK_STATUS = range(8)
EINVAL, ENOSPC = 22, 28
FLAGS = (3).to_bytes(4)


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    """An option, perhaps with a length that is not true."""
    return OPTION_MAGIC + struct.pack(">II", number, len(data) if length is None else length) + data


def go(export: bytes = b"vm-a") -> bytes:
    """The option that begins transmission."""
    return option(GO, struct.pack(">I", len(export)) + export + b"\0\0")


def request(kind: int, offset: int, length: int, cookie: int = 1, flags: int = 0, magic: int = 0x25609513) -> bytes:
    """The header of a request."""
    return struct.pack(">IHHQQI", magic, flags, kind, cookie, offset, length)


def connect(cluster: Cluster) -> socket.socket:
    """A connection that has said nothing yet."""
    return socket.create_connection(("127.0.0.1", cluster.nbd_port), TIMEOUT_S)


def exactly(connection: socket.socket, length: int) -> bytes:
    """So many bytes; fewer only at the end of the connection."""
    data = b""
    while len(data) < length and (piece := connection.recv(length - len(data))):
        data += piece
    return data


def negotiated(cluster: Cluster, export: bytes = b"vm-a") -> socket.socket:
    """A connection in transmission, with simple replies."""
    connection = connect(cluster)
    connection.sendall(FLAGS + option(EXPORT_NAME, export))
    assert len(exactly(connection, 18 + 10)) == 28
    return connection


def simple_reply(connection: socket.socket) -> tuple[int, int]:
    """(error, cookie) of the next reply."""
    magic, error, cookie = struct.unpack(">IIQ", exactly(connection, 16))
    assert magic == 0x67446698
    return error, cookie


def is_closed(connection: socket.socket) -> bool:
    """Read whatever comes until the server closes; False if it does not within the timeout."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True
