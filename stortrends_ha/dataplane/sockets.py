"""Sockets of a data process: how they are made, for NBD and for the link."""

import os
import socket
from pathlib import Path

from stortrends_ha.config import Address
from stortrends_ha.errors import StartError
from stortrends_ha.protocol.link import Endpoint

# linux/in.h, linux/in6.h: IP_FREEBIND, IPV6_FREEBIND, which the ``socket`` module lacks.
_FREEBIND = {socket.AF_INET: (socket.IPPROTO_IP, 15), socket.AF_INET6: (socket.IPPROTO_IPV6, 78)}
_WAITING_CONNECTIONS = 128  # that the kernel keeps until they are accepted


def set_up(sock: socket.socket) -> None:
    """Non-blocking; on TCP, without Nagle's delay, and noticing hosts that vanished."""
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)


def endpoint_of(sock: socket.socket) -> Endpoint | None:
    """Its TCP connection; None if it is none any more, or a Unix socket."""
    try:
        client, server = sock.getpeername(), sock.getsockname()
    except OSError:
        return None
    if sock.family == socket.AF_UNIX:
        return None
    return client[0], client[1], server[0], server[1]


def tcp_listener(host: str, port: int, purpose: str, absent: bool = False) -> socket.socket:
    """A non-blocking listening socket; ``absent``: its address may come to this node later. Raises StartError."""
    try:
        listener = _bound(host, port, absent)
        try:
            listener.listen(_WAITING_CONNECTIONS)
        except OSError:
            listener.close()
            raise
    except OSError as e:
        raise StartError(_cannot_listen(host, port, purpose, e)) from None
    listener.setblocking(False)
    return listener


def tcp_obstacle(host: str, port: int, purpose: str) -> str:
    """Why ``tcp_listener`` with ``absent`` would fail now, in its words; empty if it would not, and for a host name, as
    looking it up may take long. Nobody can connect meanwhile: it is never listened on."""
    try:
        _bound(host, port, absent=True, flags=socket.AI_NUMERICHOST).close()
    except socket.gaierror:
        return ""
    except OSError as e:
        return _cannot_listen(host, port, purpose, e)
    return ""


def _bound(host: str, port: int, absent: bool, flags: int = 0) -> socket.socket:
    """A socket that has the address. Raises OSError."""
    flags |= socket.AI_PASSIVE
    family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)[0]
    sock = socket.socket(family, kind)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if absent:
            level, option = _FREEBIND[family]
            sock.setsockopt(level, option, 1)
        sock.bind(where)
    except OSError:
        sock.close()
        raise
    return sock


def _cannot_listen(host: str, port: int, purpose: str, error: OSError) -> str:
    what_to_do = "stop what uses it, or change it in the configuration"
    return f"cannot listen on {Address(host, port)} for {purpose}: {error.strerror}; {what_to_do}"


def unix_listener(path: Path) -> socket.socket:
    """A non-blocking listening socket; one that nobody serves any more is replaced. Raises StartError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and not _answers(path):
            path.unlink()  # left over by a process that was killed
        path.parent.mkdir(parents=True, exist_ok=True)
        before = os.umask(0o117)  # for the daemon's user and the directory's group, if the directory hands it down
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(_WAITING_CONNECTIONS)
    except OSError as e:
        listener.close()
        raise StartError(f"cannot listen on the Unix socket {path} for NBD: {e.strerror or e}") from None
    listener.setblocking(False)
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0
