"""What a floating address is to the modules of this folder, and how their errors are called."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from stortrends_ha.config.model import Cluster
from stortrends_ha.errors import StorTrendsError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Placed = Mapping[str, tuple["FloatingAddress", ...]]


class NetworkError(StorTrendsError):
    """An address could not be added, removed, announced or spoken for; the text names it and the reason."""


@dataclass(frozen=True, slots=True)
class FloatingAddress:
    """An address with its prefix, and the network interface of this node that it belongs on."""

    address: ipaddress.IPv4Interface | ipaddress.IPv6Interface
    interface: str

    @property
    def ip(self) -> IPAddress:
        """Without its prefix."""
        return self.address.ip

    def __str__(self) -> str:
        return str(self.address)


def floating_addresses(cluster: Cluster, node: str) -> Placed:
    """The floating addresses of each group that has any, as they are to be on `node`."""
    return {
        name: tuple(
            FloatingAddress(ipaddress.ip_interface(floating.address), floating.interface[node])
            for floating in group.floating
        )
        for name, group in cluster.groups.items()
        if group.floating
    }
