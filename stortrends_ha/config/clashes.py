"""What two things on one machine cannot share: files, sockets, addresses with their ports.

Invariants: works on whatever could be read. The nodes are on one machine when they have the same address or
both a loopback address, and only then can they clash with each other. A group's NBD address can be on
either node, so it is counted on both machines. Paths and addresses are compared as they are written:
nothing is looked up on this machine, because the file speaks of two.
"""

import ipaddress
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from stortrends_ha.config.document import Problems, join, shown
from stortrends_ha.config.model import CONTROL_SOCKET, Address
from stortrends_ha.config.values import is_wildcard
from stortrends_ha.unix_path import PATH_BYTES_MAX

SOME_HOST, EVERY_HOST = "*some*", "*every*"  # who listens on a port at all, and who on its wildcard

Values = Mapping[str, Any]
Clash = tuple[tuple[str, str], str]  # the two keys, and what to say of the first
T = TypeVar("T", Path, Address)


@dataclass(frozen=True, slots=True)
class _Claim(Generic[T]):
    """What a key wants for itself on a machine; `node` is "" for what can be on either node."""

    what: T
    where: str
    node: str


def check_clashes(nodes: Values, groups: Values, problems: Problems) -> None:
    """Note everything that is claimed twice on one machine, and sockets whose path is too long for NBD clients."""
    for claim in _nbd_sockets(nodes, groups):
        _check_socket_length(claim, problems)
    found: dict[tuple[str, str], str] = {}  # two keys are named together once, whatever they share
    for machine in _machines(nodes):
        for pair, message in (*_shared_paths(machine, groups), *_shared_addresses(machine, groups)):
            found.setdefault(pair, message)
    for (where, _), message in found.items():
        problems.add(where, message)


def _check_socket_length(claim: _Claim[Path], problems: Problems) -> None:
    length_bytes = len(os.fsencode(claim.what))
    if length_bytes > PATH_BYTES_MAX:
        limit = f"expected at most {PATH_BYTES_MAX}, Linux's limit for Unix sockets"
        problems.add(claim.where, f"found a socket's path of {length_bytes} bytes ({claim.what}), {limit}")


def _clash(earlier: _Claim[T], claim: _Claim[T]) -> Clash:
    message = f"found {shown(str(claim.what))}, expected one that {earlier.where} does not use"
    if earlier.where == claim.where:
        message = f"found {shown(str(claim.what))} for both nodes, expected one for each"
    if claim.node and earlier.node and claim.node != earlier.node:
        message += f"; {earlier.node} and {claim.node} are on one machine by their addresses"
    return (claim.where, earlier.where), message


def _machines(nodes: Values) -> list[Values]:
    """The nodes, put together by machine. A node whose address could not be read stands alone."""
    machines: dict[str, dict[str, Any]] = {}
    for node, values in nodes.items():
        address = values.get("address")
        machine = _machine(address) if address else f"the machine of {node}"
        machines.setdefault(machine, {})[node] = values
    return list(machines.values())


def _machine(host: str) -> str:
    address = _comparable(host)
    try:
        return "loopback" if ipaddress.ip_address(address).is_loopback else address
    except ValueError:
        return address


def _comparable(host: str) -> str:
    """One spelling for hosts that are written in several ways."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return "127.0.0.1" if host.lower() == "localhost" else host.lower()


def _nbd_sockets(nodes: Values, groups: Values) -> Iterator[_Claim[Path]]:
    for group, members in groups.items():
        for node, path in members.get("nbd_unix", {}).items():
            if node in nodes:
                yield _Claim(path, join("groups", group, "nbd_unix", node), node)


def _paths(nodes: Values, groups: Values) -> Iterator[_Claim[Path]]:
    for node, values in nodes.items():
        if "state_dir" in values:
            yield _Claim(values["state_dir"], join("nodes", node, "state_dir"), node)
            yield _Claim(values["state_dir"] / CONTROL_SOCKET, join("nodes", node, "state_dir"), node)
    yield from _nbd_sockets(nodes, groups)
    for group, members in groups.items():
        for volume, values in members.get("volumes", {}).items():
            where = join("groups", group, "volumes", volume, "backing")
            backing = values.get("backing", {})
            yield from (_Claim(backing[node], where, node) for node in nodes if node in backing)


def _addresses(nodes: Values, groups: Values) -> Iterator[_Claim[Address]]:
    for node, values in nodes.items():
        if "metrics" in values:
            yield _Claim(values["metrics"], join("nodes", node, "metrics"), node)
    for group, members in groups.items():
        if "nbd" in members:
            yield _Claim(members["nbd"], join("groups", group, "nbd"), "")
        ports = members.get("link_ports", {})
        for node, values in nodes.items():
            if node in ports and "address" in values:
                where = join("groups", group, "link_ports", node)
                yield _Claim(Address(values["address"], ports[node]), where, node)


def _shared_paths(nodes: Values, groups: Values) -> Iterator[Clash]:
    first: dict[str, _Claim[Path]] = {}
    for claim in _paths(nodes, groups):
        earlier = first.setdefault(os.path.normpath(claim.what), claim)
        if earlier is not claim:
            yield _clash(earlier, claim)


def _shared_addresses(nodes: Values, groups: Values) -> Iterator[Clash]:
    first: dict[tuple[int, str], _Claim[Address]] = {}
    for claim in _addresses(nodes, groups):
        port, host = claim.what.port, _comparable(claim.what.host)
        is_any = is_wildcard(host)
        earlier = first.get((port, SOME_HOST if is_any else host)) or first.get((port, EVERY_HOST))
        if earlier is not None:
            yield _clash(earlier, claim)
        first.setdefault((port, EVERY_HOST if is_any else host), claim)
        first.setdefault((port, SOME_HOST), claim)
