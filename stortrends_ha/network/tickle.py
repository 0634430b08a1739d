"""Ends the connections that clients had with the old owner, so that they reconnect at once ("tickle ACKs", as in CTDB).

A client that waits for an answer from a machine that has vanished sends nothing and so never learns. It gets an ACK
that seems to come from its server: from the floating address, which is here by now. The sequence number is wrong, so
the client's kernel answers with the right one (RFC 9293, section 3.10.7.4); our kernel knows no such connection and
resets it.

Invariants: only connections to addresses that are here are spoken for, and only with clients on other machines.
Bounds: ENDPOINTS_MAX a group, BATCH packets at a time, with a pause between. Nothing is received, nothing blocks.
"""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stortrends_ha.network.floating import IPAddress, NetworkError
from stortrends_ha.network.packets import tcp_ack

ENDPOINTS_MAX = 4096
BATCH = 64
PAUSE_S = 0.005
# One in ten thousand times a sequence number lies in the client's window: the next attempt then has another one.
SEQUENCES = (0, 1 << 31)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One connection of a client."""

    client: IPAddress
    client_port: int
    server: IPAddress
    server_port: int


def endpoints_of(given: Iterable[Sequence[Any]]) -> tuple[Endpoint, ...]:
    """From (client_host, client_port, server_host, server_port); what cannot be spoken for is left out."""
    found: dict[Endpoint, None] = {}
    for values in given:
        endpoint = _endpoint(values)
        if endpoint is not None:
            found[endpoint] = None
        if len(found) == ENDPOINTS_MAX:
            break
    return tuple(found)


def _endpoint(values: Sequence[Any]) -> Endpoint | None:
    try:
        client, client_port, server, server_port = values
        endpoint = Endpoint(_address(client), int(client_port), _address(server), int(server_port))
    except (TypeError, ValueError):  # a Unix socket, or something odd that the peer has told
        return None
    ports_fit = all(0 < port < 1 << 16 for port in (endpoint.client_port, endpoint.server_port))
    same_family = endpoint.client.version == endpoint.server.version
    return endpoint if ports_fit and same_family and _is_elsewhere(endpoint.client) else None


def _address(text: str) -> IPAddress:
    """As a socket tells it: an IPv4 client of a socket for both families looks like ::ffff:192.0.2.1."""
    address = ipaddress.ip_address(str(text))
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _is_elsewhere(client: IPAddress) -> bool:
    """Not on the old owner itself, and not an address that needs the old owner's interface to have a meaning."""
    local = client.version == 6 and client.is_link_local
    return not (client.is_loopback or client.is_unspecified or client.is_multicast or local)


async def tickle(endpoints: Iterable[Endpoint], here: Collection[IPAddress], attempt: int) -> int:
    """Send one packet for each connection to an address that is `here`; how many were sent. Raises `NetworkError`.

    `attempt` counts from 0 and chooses the sequence number.
    """
    chosen = [endpoint for endpoint in endpoints if endpoint.server in here]
    sent = 0
    for start in range(0, len(chosen), BATCH):
        if start:
            await asyncio.sleep(PAUSE_S)
        sent += _send(chosen[start : start + BATCH], SEQUENCES[attempt % len(SEQUENCES)])
    return sent


def _send(endpoints: Sequence[Endpoint], sequence: int) -> int:
    sent = 0
    for family, version in ((socket.AF_INET, 4), (socket.AF_INET6, 6)):
        batch = [endpoint for endpoint in endpoints if endpoint.client.version == version]
        if batch:
            with _open(family) as sender:
                sent += sum(_send_one(sender, endpoint, sequence) for endpoint in batch)
    return sent


def _open(family: socket.AddressFamily) -> socket.socket:
    try:
        # IPPROTO_RAW: packets with their IP header, and nothing is received (raw(7)).
        return socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW)
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.EPERM:
            reason = "this process may not send raw packets (it needs CAP_NET_RAW)"
        raise NetworkError(f"Clients could not be told to reconnect: {reason}.") from error


def _send_one(sender: socket.socket, endpoint: Endpoint, sequence: int) -> bool:
    packet = tcp_ack(endpoint.server, endpoint.server_port, endpoint.client, endpoint.client_port, sequence)
    try:
        sender.sendto(packet, (str(endpoint.client), 0))
    except OSError:  # no way to this client now, or a full queue: there is another attempt, and others to tell
        return False
    return True
