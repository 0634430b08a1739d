"""Tells the neighbours on an Ethernet segment that an address is here now (see `packets` for what is said).

Invariants: a raw socket that only sends, opened and closed for each announcement, never blocking. An interface without
Ethernet (loopback, a tunnel) has no neighbours that could be told: nothing is sent.
"""

import errno
import socket

from stortrends_ha.network.floating import FloatingAddress, NetworkError
from stortrends_ha.network.packets import announcements

_ETHERNET = 1  # linux/if_arp.h, ARPHRD_ETHER


def announce(floating: FloatingAddress) -> None:
    """Send it once. Raises `NetworkError`."""
    try:
        # Protocol 0: it receives nothing.
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as sender:
            sender.bind((floating.interface, 0))
            _, _, _, kind, mac = sender.getsockname()
            if kind == _ETHERNET:
                for frame in announcements(mac, floating.ip):
                    sender.send(frame)
    except BlockingIOError:
        return  # the interface's queue is full; it is announced again in a moment
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.EPERM:
            reason = "this process may not send raw packets (it needs CAP_NET_RAW)"
        raise NetworkError(f"{floating} could not be announced on {floating.interface}: {reason}.") from error
