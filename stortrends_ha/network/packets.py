"""The packets that make a move of an address known. Pure: addresses in, bytes out.

Frames are whole Ethernet frames without check sequence; the network card pads short ones. Packets begin at the IP
header. What a packet must hold is cited where it is built.
"""

import ipaddress
import struct

from stortrends_ha.network.floating import IPAddress

BROADCAST_MAC = b"\xff" * 6
# RFC 2464, section 7: a multicast group's MAC address is 33:33 and the last four bytes of its IPv6 address.
ALL_NODES_MAC = bytes.fromhex("333300000001")
ALL_NODES = ipaddress.IPv6Address("ff02::1")
MAC_BYTES = 6

_ETHERTYPE_IPV4, _ETHERTYPE_ARP, _ETHERTYPE_IPV6 = 0x0800, 0x0806, 0x86DD
_PROTOCOL_TCP, _PROTOCOL_ICMPV6 = 6, 58

_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ARP_HARDWARE_ETHERNET, _ARP_REQUEST, _ARP_REPLY = 1, 1, 2

_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")

# Type, code, checksum, flags, target; then the option "target link-layer address": type, length in eights, MAC.
_NEIGHBOUR_ADVERTISEMENT = struct.Struct("!BBHI16sBB6s")
_NEIGHBOUR_ADVERTISEMENT_TYPE, _OVERRIDE_FLAG, _TARGET_MAC_OPTION = 136, 1 << 29, 2
_NEIGHBOUR_HOPS = 255  # RFC 4861, section 7.1.2: anything less has passed a router, and is ignored

# Ports, sequence, acknowledgement, header length and flags, window, checksum, urgent.
_TCP = struct.Struct("!HHIIHHHH")
_TCP_WORDS, _ACK_FLAG = 5, 0x10
_TCP_HOPS = 64


def announcements(mac: bytes, ip: IPAddress) -> tuple[bytes, ...]:
    """The frames that tell every neighbour that `ip` is now at `mac`."""
    if isinstance(ip, ipaddress.IPv4Address):
        return gratuitous_arp(mac, ip)
    return (neighbour_advertisement(mac, ip),)


def gratuitous_arp(mac: bytes, ip: ipaddress.IPv4Address) -> tuple[bytes, bytes]:
    """As a request and as a reply (RFC 5944, section 4.6): some systems only heed the one, some only the other.

    In the request the target's MAC is unknown, so zero (RFC 5227, section 3); in the reply it is our own.
    """
    request = _arp(_ARP_REQUEST, mac, ip, bytes(MAC_BYTES))
    reply = _arp(_ARP_REPLY, mac, ip, mac)
    return _frame(BROADCAST_MAC, mac, _ETHERTYPE_ARP, request), _frame(BROADCAST_MAC, mac, _ETHERTYPE_ARP, reply)


def _arp(operation: int, mac: bytes, ip: ipaddress.IPv4Address, target_mac: bytes) -> bytes:
    kind = (_ARP_HARDWARE_ETHERNET, _ETHERTYPE_IPV4, MAC_BYTES, 4)
    return _ARP.pack(*kind, operation, mac, ip.packed, target_mac, ip.packed)


def neighbour_advertisement(mac: bytes, ip: ipaddress.IPv6Address) -> bytes:
    """Unsolicited, to all nodes, overriding what they know (RFC 4861, section 7.2.6)."""

    def message(checksum: int) -> bytes:
        fields = (_NEIGHBOUR_ADVERTISEMENT_TYPE, 0, checksum, _OVERRIDE_FLAG, ip.packed, _TARGET_MAC_OPTION, 1, mac)
        return _NEIGHBOUR_ADVERTISEMENT.pack(*fields)

    checksum = _checksum(_pseudo_header(ip, ALL_NODES, _PROTOCOL_ICMPV6, _NEIGHBOUR_ADVERTISEMENT.size) + message(0))
    packet = _ipv6(ip, ALL_NODES, _PROTOCOL_ICMPV6, _NEIGHBOUR_HOPS, message(checksum))
    return _frame(ALL_NODES_MAC, mac, _ETHERTYPE_IPV6, packet)


def tcp_ack(source: IPAddress, source_port: int, target: IPAddress, target_port: int, sequence: int) -> bytes:
    """A bare ACK with a sequence number that is (almost) surely wrong, as an IP packet."""

    def segment(checksum: int) -> bytes:
        return _TCP.pack(source_port, target_port, sequence, 0, _TCP_WORDS << 12 | _ACK_FLAG, 0, checksum, 0)

    segment_bytes = segment(_checksum(_pseudo_header(source, target, _PROTOCOL_TCP, _TCP.size) + segment(0)))
    if isinstance(source, ipaddress.IPv4Address):
        return _ipv4(source, target, _PROTOCOL_TCP, _TCP_HOPS, segment_bytes)
    return _ipv6(source, target, _PROTOCOL_TCP, _TCP_HOPS, segment_bytes)


def _frame(target: bytes, source: bytes, ethertype: int, payload: bytes) -> bytes:
    return target + source + struct.pack("!H", ethertype) + payload


def _ipv4(source: IPAddress, target: IPAddress, protocol: int, hops: int, payload: bytes) -> bytes:
    def header(checksum: int) -> bytes:
        length_bytes = _IPV4.size + len(payload)
        return _IPV4.pack(0x45, 0, length_bytes, 0, 0, hops, protocol, checksum, source.packed, target.packed)

    return header(_checksum(header(0))) + payload


def _ipv6(source: IPAddress, target: IPAddress, protocol: int, hops: int, payload: bytes) -> bytes:
    return _IPV6.pack(6 << 28, len(payload), protocol, hops, source.packed, target.packed) + payload


def _pseudo_header(source: IPAddress, target: IPAddress, protocol: int, length_bytes: int) -> bytes:
    """What a checksum covers besides the message (RFC 9293, section 3.1; RFC 8200, section 8.1)."""
    layout = "!xBH" if source.version == 4 else "!I3xB"
    tail = (protocol, length_bytes) if source.version == 4 else (length_bytes, protocol)
    return source.packed + target.packed + struct.pack(layout, *tail)


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
