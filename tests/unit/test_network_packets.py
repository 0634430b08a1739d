"""The packets that make a move of an address known, byte for byte."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stortrends_ha.network.packets import announcements, gratuitous_arp, neighbour_advertisement, tcp_ack

MAC = bytes.fromhex("020000000001")
IPV4 = ipaddress.IPv4Address("192.0.2.21")
IPV6 = ipaddress.IPv6Address("2001:db8::21")


def internet_checksum(data: bytes) -> int:
    """RFC 1071, written another way than in the code: over intact data, checksum included, it is 0."""
    data += bytes(len(data) % 2)
    return -sum(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2)) % 0xFFFF


def test_gratuitous_arp_is_a_request_and_a_reply() -> None:
    header = "ffffffffffff 020000000001 0806 0001 0800 06 04"
    request = f"{header} 0001 020000000001 c0000215 000000000000 c0000215"
    reply = f"{header} 0002 020000000001 c0000215 020000000001 c0000215"
    assert gratuitous_arp(MAC, IPV4) == (bytes.fromhex(request), bytes.fromhex(reply))


def test_a_neighbour_advertisement_is_unsolicited_and_overrides() -> None:
    ethernet = "333300000001 020000000001 86dd"
    # Payload 32, ICMPv6, 255 hops; from the address itself to all nodes.
    ipv6 = "60000000 0020 3a ff 20010db8000000000000000000000021 ff020000000000000000000000000001"
    # Type 136, code 0; override; the target; its MAC address.
    icmpv6 = "88 00 f8ea 20000000 20010db8000000000000000000000021 02 01 020000000001"
    frame = neighbour_advertisement(MAC, IPV6)
    assert frame.hex() == bytes.fromhex(f"{ethernet} {ipv6} {icmpv6}").hex()


def test_each_family_is_announced_in_its_way() -> None:
    assert announcements(MAC, IPV4) == gratuitous_arp(MAC, IPV4)
    assert announcements(MAC, IPV6) == (neighbour_advertisement(MAC, IPV6),)


def test_a_tickle_ack_in_ipv4() -> None:
    client = ipaddress.IPv4Address("192.0.2.1")
    ip = "45 00 0028 0000 0000 40 06 f6b9 c0000215 c0000201"
    tcp = "2a39 c350 00000000 00000000 5010 0000 3e34 0000"
    assert tcp_ack(IPV4, 10809, client, 50000, 0).hex() == bytes.fromhex(f"{ip} {tcp}").hex()


def test_a_tickle_ack_in_ipv6() -> None:
    client = ipaddress.IPv6Address("2001:db8::1")
    ip = "60000000 0014 06 40 20010db8000000000000000000000021 20010db8000000000000000000000001"
    tcp = "2a39 c350 80000000 00000000 5010 0000"
    packet = tcp_ack(IPV6, 10809, client, 50000, 1 << 31)
    assert packet[:-4].hex() == bytes.fromhex(f"{ip} {tcp}").hex()


ports = st.integers(1, 65535)
sequences = st.integers(0, 2**32 - 1)


@given(st.ip_addresses(v=4), ports, st.ip_addresses(v=4), ports, sequences)
def test_checksums_of_ipv4_are_right(
    source: ipaddress.IPv4Address, source_port: int, target: ipaddress.IPv4Address, target_port: int, sequence: int
) -> None:
    packet = tcp_ack(source, source_port, target, target_port, sequence)
    header, segment = packet[:20], packet[20:]
    assert internet_checksum(header) == 0
    assert internet_checksum(source.packed + target.packed + bytes([0, 6, 0, len(segment)]) + segment) == 0


@given(st.ip_addresses(v=6), ports, st.ip_addresses(v=6), ports, sequences)
def test_checksums_of_ipv6_are_right(
    source: ipaddress.IPv6Address, source_port: int, target: ipaddress.IPv6Address, target_port: int, sequence: int
) -> None:
    segment = tcp_ack(source, source_port, target, target_port, sequence)[40:]
    pseudo = source.packed + target.packed + bytes([0, 0, 0, len(segment), 0, 0, 0, 6])
    assert internet_checksum(pseudo + segment) == 0


@pytest.mark.parametrize("address", ["2001:db8::ffff", "fd00::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe"])
def test_checksums_of_advertisements_are_right(address: str) -> None:
    packet = neighbour_advertisement(MAC, ipaddress.IPv6Address(address))[14:]
    pseudo = packet[8:40] + bytes([0, 0, 0, 32, 0, 0, 0, 58])
    assert internet_checksum(pseudo + packet[40:]) == 0
