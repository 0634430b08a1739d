"""Which connections are spoken for."""

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stortrends_ha.network.tickle import ENDPOINTS_MAX, Endpoint, endpoints_of, tickle

SERVER = ("192.0.2.21", 10809)


def test_a_connection_is_as_it_was_told() -> None:
    client, server = ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("192.0.2.21")
    assert endpoints_of([["192.0.2.1", 50000, *SERVER]]) == (Endpoint(client, 50000, server, 10809),)


def test_an_ipv4_client_of_a_socket_for_both_families_is_an_ipv4_client() -> None:
    mapped = ["::ffff:192.0.2.1", 50000, "::ffff:192.0.2.21", 10809]
    assert endpoints_of([mapped]) == endpoints_of([["192.0.2.1", 50000, *SERVER]])


@pytest.mark.parametrize(
    "endpoint",
    [
        ["127.0.0.1", 50000, *SERVER],
        ["::1", 50000, "::1", 10809],
        ["fe80::1%eth0", 50000, "fe80::2%eth0", 10809],
        ["0.0.0.0", 50000, *SERVER],
        ["224.0.0.1", 50000, *SERVER],
        ["2001:db8::1", 50000, *SERVER],
        ["192.0.2.1", 0, *SERVER],
        ["192.0.2.1", 65536, *SERVER],
        ["a-name", 50000, *SERVER],
        ["", "", "", ""],
        ["192.0.2.1", 50000],
        [],
        None,
        7,
    ],
)
def test_what_cannot_be_spoken_for_is_left_out(endpoint: Any) -> None:
    assert endpoints_of([endpoint]) == ()


@given(st.lists(st.lists(st.one_of(st.text(), st.integers(), st.none(), st.ip_addresses().map(str)), max_size=5)))
def test_nothing_that_a_peer_tells_is_an_error(endpoints: list[list[Any]]) -> None:
    assert len(endpoints_of(endpoints)) <= len(endpoints)


def test_each_connection_counts_once_and_there_is_a_bound() -> None:
    twice = [["192.0.2.1", 50000, *SERVER]] * 2
    assert len(endpoints_of(twice)) == 1
    many = [["192.0.2.1", port, *SERVER] for port in range(1, ENDPOINTS_MAX + 100)]
    assert len(endpoints_of(many)) == ENDPOINTS_MAX


async def test_a_connection_to_an_address_that_is_not_here_is_left_alone() -> None:
    endpoints = endpoints_of([["192.0.2.1", 50000, *SERVER]])
    assert await tickle(endpoints, {ipaddress.ip_address("192.0.2.22")}, 0) == 0
