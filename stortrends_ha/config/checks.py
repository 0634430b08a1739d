"""Rules between keys: what must fit together.

Invariant: works on whatever could be read; a missing value has been noted already and is passed over.
What two things cannot share is judged by `clashes`, and what has to be on which machine by `addresses`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from stortrends_ha.config.addresses import check_addresses
from stortrends_ha.config.clashes import check_clashes
from stortrends_ha.config.document import Problems, join
from stortrends_ha.config.keys import NODES_CHECKED_MAX

AGENT_OPTIONS_OF_OURS = {"action", "option"}  # the Fence Agent API: what to do, and its older name
FAILOVER_RELATED = ("heartbeat_interval_s", "suspect_after_s", "lease_s")

Values = Mapping[str, Any]


def check_relations(values: Values, problems: Problems) -> None:
    """Note every rule between keys that the values break."""
    nodes: Values = values.get("nodes", {})
    groups: Values = values.get("groups", {})
    _check_volume_names(groups, problems)
    for path, _, volume in _volumes(groups):
        _check_blocks(volume, path, problems)
    _check_window(values.get("limits", {}), groups, problems)
    _check_failover(values.get("failover", {}), problems)
    arbiter: Values = values.get("arbiter", {})
    for node, agent in arbiter.get("agents", {}).items():
        _check_options(agent.get("options", {}), join("arbiter.agents", node, "options"), problems)
    if len(nodes) <= NODES_CHECKED_MAX:
        check_addresses(nodes, groups, arbiter, problems)
        check_clashes(values, problems)


def _volumes(groups: Values) -> Iterator[tuple[str, str, Values]]:
    """Path, name and values of each."""
    for group, members in groups.items():
        for name, volume in members.get("volumes", {}).items():
            yield join("groups", group, "volumes", name), name, volume


def _check_volume_names(groups: Values, problems: Problems) -> None:
    first: dict[str, str] = {}
    for path, name, _ in _volumes(groups):
        if name in first:
            problems.add(path, f"found a name that {first[name]} has, expected one unique in the cluster")
        first.setdefault(name, path)


def _check_blocks(volume: Values, path: str, problems: Problems) -> None:
    block = volume.get("block", {})
    minimum, preferred, maximum = (block.get(key) for key in ("minimum", "preferred", "maximum"))
    _check_at_least(preferred, f"{path}.block.preferred", minimum, "block.minimum", problems)
    _check_at_least(maximum, f"{path}.block.maximum", preferred, "block.preferred", problems)
    for key, value in (("block.maximum", maximum), ("size", volume.get("size"))):
        if minimum and value and value % minimum:
            problems.add(f"{path}.{key}", f"found {value}, expected a multiple of block.minimum ({minimum})")


def _check_window(limits: Values, groups: Values, problems: Problems) -> None:
    """A write that can never fit into the window would wait for ever."""
    largest = ((volume.get("block", {}).get("maximum", 0), path) for path, _, volume in _volumes(groups))
    maximum, path = max(largest, default=(0, ""), key=lambda entry: entry[0])
    window = limits.get("window_bytes")
    _check_at_least(window, "limits.window_bytes", maximum, f"{path}.block.maximum", problems)


def _check_failover(failover: Values, problems: Problems) -> None:
    interval_ns, suspect_ns, lease_ns = (_ns(failover.get(key)) for key in FAILOVER_RELATED)
    if interval_ns and suspect_ns and suspect_ns < 3 * interval_ns:
        found = f"found {suspect_ns / 1e9:g}, expected at least {3 * interval_ns / 1e9:g}"
        why = "three heartbeat intervals, because one or two lost datagrams must not make a node seem gone"
        problems.add("failover.suspect_after_s", f"{found}, {why}")
    if interval_ns and suspect_ns and lease_ns and lease_ns <= suspect_ns + 2 * interval_ns:
        found = f"found {lease_ns / 1e9:g}, expected more than {(suspect_ns + 2 * interval_ns) / 1e9:g}"
        why = (
            "failover.suspect_after_s and two heartbeat intervals, because an owner has to notice that the other node"
            " is silent, and ask to go on alone, while its lease lasts"
        )
        problems.add("failover.lease_s", f"{found}, {why}")


def _ns(duration_s: float | None) -> int:
    """In whole nanoseconds, so that three times 0.1 is 0.3; 0 if it could not be read."""
    return round((duration_s or 0) * 1e9)


def _check_options(options: Values, path: str, problems: Problems) -> None:
    for name in options.keys() & AGENT_OPTIONS_OF_OURS:
        problems.add(join(path, name), "found an option that the node gives itself, expected it to be left out")


def _check_at_least(value: int | None, path: str, least: int | None, other: str, problems: Problems) -> None:
    if value and least and value < least:
        problems.add(path, f"found {value}, expected at least {other} ({least})")
