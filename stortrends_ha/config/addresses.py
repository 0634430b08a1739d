"""Which machine an address belongs to, and the rules on what has to be on one machine, on both or on neither.

Invariants: works on whatever could be read. Addresses are compared as they are written: nothing is looked up, because
the file speaks of several machines. The nodes are on one machine when they have the same address or both a loopback
address, as when everything is tried out on one; what only makes sense with two machines is then not demanded.
"""

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any

from stortrends_ha.config.document import Problems, join, shown
from stortrends_ha.config.model import Address, Cluster, is_wildcard

LOOPBACK = "loopback"  # every loopback address means the same machine

Values = Mapping[str, Any]


def check_addresses(nodes: Values, groups: Values, arbiter: Values, problems: Problems) -> None:
    """Note every address that is not where it has to be."""
    _check_paths(nodes, problems)
    own = {host: node for node, values in nodes.items() for _, host in _own_hosts(node, values)}
    floating = _check_floating(own, groups, problems)
    apart = len(by_machine(nodes)) > 1 and all("address" in values for values in nodes.values())
    if apart:
        _check_reachable(nodes, problems)
    for name, group in groups.items():
        if "nbd" in group:
            _check_nbd(group, join("groups", name), own if apart else {}, problems)
    if "address" in arbiter and apart:
        _check_witness(arbiter["address"], own, floating, problems)


def comparable(host: str) -> str:
    """One spelling for hosts that are written in several ways."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return "127.0.0.1" if host.lower() == "localhost" else host.lower()


def machine_of(host: str) -> str:
    """The machine that has this address."""
    address = comparable(host)
    try:
        return LOOPBACK if ipaddress.ip_address(address).is_loopback else address
    except ValueError:
        return address


def on_one_machine(cluster: Cluster) -> bool:
    """Whether both nodes are on the same machine, as when everything is tried out on one."""
    return len({machine_of(node.address) for node in cluster.nodes.values()}) == 1


def by_machine(nodes: Values) -> dict[str, dict[str, Any]]:
    """The nodes, put together by machine. A node whose address could not be read stands alone."""
    machines: dict[str, dict[str, Any]] = {}
    for node, values in nodes.items():
        machine = machine_of(values["address"]) if "address" in values else f"the machine of {node}"
        machines.setdefault(machine, {})[node] = values
    return machines


def _own_hosts(name: str, node: Values) -> Iterator[tuple[str, str]]:
    """Path and host of every address that a node always has."""
    if "address" in node:
        yield join("nodes", name, "address"), comparable(node["address"])
    for place, address in enumerate(node.get("heartbeat", ())):
        yield f"{join('nodes', name, 'heartbeat')}[{place}]", comparable(address.host)


def _check_reachable(nodes: Values, problems: Problems) -> None:
    for node, values in nodes.items():
        for path, host in _own_hosts(node, values):
            if machine_of(host) == LOOPBACK:
                problems.add(path, f"found {host}, expected an address that the other node can reach")


def _check_paths(nodes: Values, problems: Problems) -> None:
    """Path i of one node talks to path i of the other."""
    known = [(join("nodes", node, "heartbeat"), of["heartbeat"]) for node, of in nodes.items() if "heartbeat" in of]
    if len(known) != 2:
        return
    (first_path, first), (path, second) = known
    if len(first) != len(second):
        problems.add(path, f"found {len(second)}, expected {len(first)} as in {first_path}: one for each path")
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if {_version(one.host), _version(other.host)} == {4, 6}:
            expected = f"an IPv{_version(one.host)} address like {first_path}[{place}], which it talks to"
            problems.add(f"{path}[{place}]", f"found {shown(str(other))}, expected {expected}")


def _version(host: str) -> int | None:
    """4 or 6; None for a name."""
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return None


def _check_floating(own: Mapping[str, str], groups: Values, problems: Problems) -> dict[str, str]:
    """A floating address belongs to one group and to no machine; returns each with its path."""
    first: dict[str, str] = {}
    for name, group in groups.items():
        for place, floating in enumerate(group.get("floating", ())):
            path = f"{join('groups', name, 'floating')}[{place}].address"
            if "address" not in floating:
                continue
            host = _host(floating)
            if host in own:
                problems.add(path, f"found {host}, expected an address that no node has: it is {own[host]}'s")
            elif host in first:
                problems.add(path, f"found {host}, expected one that {first[host]} does not have")
            first.setdefault(host, path)
    return first


def _host(floating: Values) -> str:
    return comparable(floating["address"].partition("/")[0])


def _check_nbd(group: Values, path: str, own: Mapping[str, str], problems: Problems) -> None:
    """Clients must find the group on whichever node owns it."""
    nbd: Address = group["nbd"]
    hosts = [_host(floating) for floating in group.get("floating", ()) if "address" in floating]
    host = comparable(nbd.host)
    why = "so that clients find the group on either node"
    if not hosts and host in own and machine_of(host) != LOOPBACK:
        expected = f"one that floating has or that both nodes have, {why}: {nbd.host} is {own[host]}'s alone"
    elif hosts and is_wildcard(host) and _version(host) not in map(_version, hosts):
        expected = f"floating to have an IPv{_version(host)} address, {why}"
    elif hosts and not is_wildcard(host) and host not in hosts:
        expected = f"an address that floating has ({', '.join(hosts)}), or 0.0.0.0 or [::] for every one, {why}"
    else:
        return
    problems.add(f"{path}.nbd", f"found {shown(str(nbd))}, expected {expected}")


def _check_witness(witness: Address, own: Mapping[str, str], floating: Mapping[str, str], problems: Problems) -> None:
    """What dies with a node, or moves, cannot say which of the nodes goes on."""
    host = comparable(witness.host)
    if host in own:
        whose = f"{own[host]}'s"
    elif machine_of(host) == LOOPBACK:
        whose = "each node's own"
    elif host in floating:
        whose = f"that of {floating[host]}"
    else:
        return
    why = "because the witness has to outlive either node"
    expected = f"an address of a third machine, {why}: {witness.host} is {whose}"
    problems.add("arbiter.address", f"found {shown(str(witness))}, expected {expected}")
