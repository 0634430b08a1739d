"""What the kernel is asked for floating addresses: put one on an interface for a while, take it off, look where it is.

Invariants: every address gets a lifetime, so nothing that is put here stays by itself (rule 12). Every call is a
netlink socket of its own, opened and closed. Calls block: a request waits in the kernel while another process holds
the lock of its network configuration, so they belong in a worker thread and never on the event loop (rule 14).
Errors are `NetworkError`, a sentence each.
Neighbours: `addresses` calls this, and so does the command that cleans up after a node.
Chosen, with reasons: *deprecated* (preferred lifetime 0), so that no connection of this machine's own begins at an
address that may be gone in a moment; for IPv6, no duplicate address detection (a second without the address, and the
old owner may be hanging with it), and no route to its network if the machine has an address of its own there: the
route would otherwise get the lifetime of the floating address, and be gone with it.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from ipaddress import IPv6Interface, IPv6Network, ip_address
from pathlib import Path

from pyroute2 import IPRoute  # type: ignore[import-untyped]
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError  # type: ignore[import-untyped]

from stortrends_ha.network.floating import FloatingAddress, IPAddress, NetworkError

log = logging.getLogger(__name__)

# linux/if_addr.h
_NO_DUPLICATE_DETECTION, _PERMANENT, _NO_PREFIX_ROUTE = 0x02, 0x80, 0x200
# linux/sockios.h and linux/if.h
_GET_INTERFACE_FLAGS, _INTERFACE_UP, _INTERFACE_RUNNING = 0x8913, 0x01, 0x40
_INTERFACE_REQUEST = struct.Struct("16sH22x")

# A listing that changed while it was read is read again.
LISTINGS_MAX = 5


@dataclass(frozen=True, slots=True)
class Found:
    """An address that is on some interface of this machine."""

    ip: IPAddress
    prefix_bits: int
    index: int
    permanent: bool

    @property
    def interface(self) -> str:
        """The interface's name, or its number if it is just going away."""
        try:
            return socket.if_indextoname(self.index)
        except OSError:
            return f"interface {self.index}"


def put(floating: FloatingAddress, lifetime_s: int, own: Collection[IPAddress]) -> None:
    """Have the address on its interface, from now on for `lifetime_s`; also if it was there.

    `own` are all floating addresses of this node, which do not count as addresses of the machine itself.
    """
    index = _index(floating)
    flags = 0
    if isinstance(floating.address, IPv6Interface):
        flags = _NO_DUPLICATE_DETECTION
        if _has_other_in(floating.address.network, floating.interface, own):
            flags |= _NO_PREFIX_ROUTE
    elif floating.address.network.num_addresses > 1:
        _keep_secondaries(floating.interface)
    with _netlink(floating, f"be added to {floating.interface}") as netlink:
        netlink.addr(
            "replace",
            index=index,
            family=_family(floating.ip),
            address=str(floating.ip),
            prefixlen=floating.address.network.prefixlen,
            flags=flags,
            preferred=0,
            valid=lifetime_s,
        )


def find(ips: Collection[IPAddress]) -> list[Found]:
    """Where these addresses are now, on whatever interface and with whatever prefix."""
    for _ in range(LISTINGS_MAX):
        try:
            with IPRoute() as netlink:
                return [found for found in map(_found, netlink.get_addr()) if found and found.ip in ips]
        except NetlinkDumpInterrupted:
            continue
        except (NetlinkError, OSError) as error:
            raise NetworkError(f"The addresses of this machine could not be read: {error}.") from error
    raise NetworkError("The addresses of this machine change too fast to be read.")


def remove(found: Found) -> None:
    """Take an address off; it is gone when this returns, and may have been gone before."""
    with (
        contextlib.suppress(_GoneError),
        _netlink(found.ip, f"be removed from {found.interface}") as netlink,
    ):
        netlink.addr(
            "delete",
            index=found.index,
            family=_family(found.ip),
            address=str(found.ip),
            prefixlen=found.prefix_bits,
        )


def remove_all(ips: Collection[IPAddress]) -> list[Found]:
    """Take these addresses off every interface; tells where they were."""
    everywhere = find(ips)
    for found in everywhere:
        remove(found)
    return everywhere


def remove_strays(floating: FloatingAddress) -> list[Found]:
    """Take the address off every place but its own; tells where it was, its own place included if it was permanent."""
    index = _index(floating)
    place = (index, floating.address.network.prefixlen)
    found = find({floating.ip})
    strays = [one for one in found if (one.index, one.prefix_bits) != place]
    for stray in strays:
        remove(stray)
    return [one for one in found if one in strays or one.permanent]


def link_problem(interface: str) -> str:
    """Why nothing can be reached through an interface: it is down, or has no carrier. Does not block."""
    request = _INTERFACE_REQUEST.pack(interface.encode(), 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            _, flags = _INTERFACE_REQUEST.unpack(fcntl.ioctl(asked, _GET_INTERFACE_FLAGS, request))
        except OSError as error:
            return f"The state of interface {interface} could not be read: {error.strerror}."
    if not flags & _INTERFACE_UP:
        return f"Interface {interface} is down."
    return "" if flags & _INTERFACE_RUNNING else f"Interface {interface} has no carrier."


class _GoneError(NetworkError):
    """The address, or its interface, is not there."""


@contextlib.contextmanager
def _netlink(what: object, wish: str) -> Iterator[IPRoute]:
    try:
        with IPRoute() as netlink:
            yield netlink
    except NetlinkError as error:
        kind = _GoneError if error.code in (errno.EADDRNOTAVAIL, errno.ENODEV) else NetworkError
        raise kind(f"{what} could not {wish}: {_reason(error.code)}.") from error
    except OSError as error:
        raise NetworkError(f"{what} could not {wish}: {error}.") from error


def _reason(code: int) -> str:
    match code:
        case errno.EPERM:
            return "this process may not change addresses (it needs CAP_NET_ADMIN)"
        case errno.EACCES:
            return "the kernel does not allow it there (is IPv6 disabled on that interface?)"
        case errno.ENODEV:
            return "the interface is gone"
        case _:
            return os.strerror(code)


def _index(floating: FloatingAddress) -> int:
    try:
        return socket.if_nametoindex(floating.interface)
    except OSError as error:
        raise NetworkError(f"{floating} belongs on {floating.interface}, but there is no such interface.") from error


def _family(ip: IPAddress) -> int:
    return socket.AF_INET if ip.version == 4 else socket.AF_INET6


def _found(message: object) -> Found | None:
    """One address of a listing; for IPv4, IFA_ADDRESS is the other end of a point-to-point link."""
    get = message.get  # type: ignore[attr-defined]
    address = get("IFA_LOCAL") or get("IFA_ADDRESS")
    if address is None:
        return None
    flags = get("IFA_FLAGS") or get("flags")
    return Found(ip_address(address), get("prefixlen"), get("index"), bool(flags & _PERMANENT))


def _has_other_in(network: IPv6Network, interface: str, own: Collection[IPAddress]) -> bool:
    """Whether the machine has an address of its own in a network, on that interface (proc(5), if_inet6)."""
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except FileNotFoundError:  # a kernel without IPv6: adding the address will say so
        return False
    for line in lines:
        digits, _, prefix_bits, _, _, name = line.split()
        ip = ip_address(bytes.fromhex(digits))
        if name == interface and int(prefix_bits, 16) == network.prefixlen and ip in network and ip not in own:
            return True
    return False


def _keep_secondaries(interface: str) -> None:
    """Removing an IPv4 address must not take others of its subnet along, such as another group's or the machine's own.

    The kernel does that when the first address of a subnet goes, unless promote_secondaries is set (systemd's default).
    """
    settings = [Path(f"/proc/sys/net/ipv4/conf/{name}/promote_secondaries") for name in ("all", interface)]
    try:
        if any(int(setting.read_text()) for setting in settings):
            return
        settings[-1].write_text("1\n")
        log.info("Set %s to 1, so that addresses of one subnet do not vanish together.", settings[-1])
    except OSError as error:
        log.debug("%s could not be set: %s.", settings[-1], error.strerror)
