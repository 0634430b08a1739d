"""What two things on one machine cannot share: files, sockets, addresses with their ports.

Invariants: works on whatever could be read. Only nodes on one machine (see `addresses`) can clash with each other. A
group's NBD address can be on either node, so it is counted on both machines. A port is counted once, whether TCP or
UDP, so that a port's number says what it is for. Paths are compared as they are written: nothing is looked up on this
machine, because the file speaks of two.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from stortrends_ha.config.addresses import by_machine, comparable, machine_of
from stortrends_ha.config.document import Problems, join, shown
from stortrends_ha.config.model import CONTROL_SOCKET, Address, is_wildcard
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


def check_clashes(file: Values, problems: Problems) -> None:
    """Note everything that is claimed twice on one machine, and sockets whose path is too long for NBD clients."""
    nodes, groups = file.get("nodes", {}), file.get("groups", {})
    for claim in _nbd_sockets(nodes, groups):
        _check_socket_length(claim, problems)
    found: dict[tuple[str, str], str] = {}  # two keys are named together once, whatever they share
    for machine, here in by_machine(nodes).items():
        claims = (*_paths(here, groups), *_keys(here, file.get("key_file", {})))
        addresses = (*_addresses(here, groups), *_witness(machine, file.get("arbiter", {})))
        for pair, message in (*_shared_paths(claims), *_shared_addresses(addresses)):
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


def _keys(nodes: Values, key_file: Values) -> Iterator[_Claim[Path]]:
    """Nodes on one machine may read the same one."""
    paths = dict.fromkeys(key_file[node] for node in nodes if node in key_file)
    yield from (_Claim(path, "key_file", "") for path in paths)


def _addresses(nodes: Values, groups: Values) -> Iterator[_Claim[Address]]:
    for node, values in nodes.items():
        if "metrics" in values:
            yield _Claim(values["metrics"], join("nodes", node, "metrics"), node)
        for place, address in enumerate(values.get("heartbeat", ())):
            yield _Claim(address, f"{join('nodes', node, 'heartbeat')}[{place}]", node)
    for group, members in groups.items():
        if "nbd" in members:
            yield _Claim(members["nbd"], join("groups", group, "nbd"), "")
        ports = members.get("link_ports", {})
        for node, values in nodes.items():
            if node in ports and "address" in values:
                where = join("groups", group, "link_ports", node)
                yield _Claim(Address(values["address"], ports[node]), where, node)


def _witness(machine: str, arbiter: Values) -> Iterator[_Claim[Address]]:
    """On the machine of a node only when everything is tried out on one."""
    if "address" in arbiter and machine_of(arbiter["address"].host) == machine:
        yield _Claim(arbiter["address"], "arbiter.address", "")


def _shared_paths(claims: Iterable[_Claim[Path]]) -> Iterator[Clash]:
    first: dict[str, _Claim[Path]] = {}
    for claim in claims:
        earlier = first.setdefault(os.path.normpath(claim.what), claim)
        if earlier is not claim:
            yield _clash(earlier, claim)


def _shared_addresses(claims: Iterable[_Claim[Address]]) -> Iterator[Clash]:
    first: dict[tuple[int, str], _Claim[Address]] = {}
    for claim in claims:
        port, host = claim.what.port, comparable(claim.what.host)
        is_any = is_wildcard(host)
        earlier = first.get((port, SOME_HOST if is_any else host)) or first.get((port, EVERY_HOST))
        if earlier is not None:
            yield _clash(earlier, claim)
        first.setdefault((port, EVERY_HOST if is_any else host), claim)
        first.setdefault((port, SOME_HOST), claim)
