"""The status of the nodes as a page for people.

Job: tables of nodes, groups and volumes that fit into 80 columns, and below them, in words, what is not well.
Invariants: each node is shown as it sees itself, nothing is guessed; colours are only for terminals, and
nothing is said by colour alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from stortrends_ha.cli.client import NodeStatus

GroupStatus = dict[str, Any]

_STYLES = {
    "up": "green",
    "in-sync": "green",
    "connected": "green",
    "syncing": "yellow",
    "starting": "yellow",
    "connecting": "yellow",
    "listening": "yellow",
    "unknown": "yellow",
    "held": "bold red",
    "failed": "bold red",
    "refused": "bold red",
    "not answering": "bold red",
}
_NONE = "-"


def show(nodes: Mapping[str, NodeStatus]) -> None:
    """Print the page to stdout."""
    console = Console(highlight=False)
    tables = [_nodes(nodes), _groups(nodes), _volumes(nodes)]
    if not console.is_terminal:  # whatever reads a pipe is not helped by folded names
        console.width = max(console.width, *(_width(console, table) for table in tables))
    for table in tables:
        console.print(table)
        console.print()
    for line in _troubles(nodes):
        console.print(line)


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _table(title: str, *columns: str, numbers: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                  show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))  # fmt: skip
    for column in columns:
        right = column in numbers
        table.add_column(column, justify="right" if right else "left", overflow="fold", vertical="bottom")
    return table


def _state(word: str) -> Text:
    return Text(word, style=_STYLES.get(word, ""))


def _nodes(nodes: Mapping[str, NodeStatus]) -> Table:
    first = next(iter(nodes.values()))
    table = _table(f"Nodes of cluster {first['cluster']}", "Node", "State", "Version", "Up for", "Process")
    for name, seen in first["nodes"].items():
        if name in nodes:
            own = nodes[name]
            table.add_row(name, _state("up"), own["version"], _duration(own["uptime_s"]), f"pid {own['pid']}")
        else:
            table.add_row(name, _state(seen["state"]), _peer_version(nodes) or _NONE, _NONE, _NONE)
    return table


def _peer_version(nodes: Mapping[str, NodeStatus]) -> str | None:
    links = (group["link"] for node in nodes.values() for group in node["groups"].values())
    return next((link["peer_version"] for link in links if link["peer_version"]), None)


def _views(nodes: Mapping[str, NodeStatus]) -> Iterator[tuple[str, dict[str, GroupStatus]]]:
    """Each group, with what each of the nodes says of it."""
    names = dict.fromkeys(name for node in nodes.values() for name in node["groups"])
    for name in names:
        yield name, {node: of["groups"][name] for node, of in nodes.items() if name in of["groups"]}


def _groups(nodes: Mapping[str, NodeStatus]) -> Table:
    numbers = ("Epoch", "Round\ntrip", "Resync")
    columns = ("Group", "Node", "Role", "State", "Owner", "Epoch", "Link", "Round\ntrip", "Resync")
    table = _table("Groups", *columns, numbers=numbers)
    for name, views in _views(nodes):
        for node, view in views.items():
            link, trip_ms = view["link"], view["link"]["round_trip_ms"]
            table.add_row(
                name if node == next(iter(views)) else "", node, view["role"], _state(view["state"]),
                view["owner"], str(view["epoch"]), _state(link["state"]),
                _NONE if trip_ms is None else f"{trip_ms:.2f} ms", _progress(view["resync"]),
            )  # fmt: skip
    return table


def _progress(resync: dict[str, int] | None) -> str:
    if not resync:
        return _NONE
    done, total = resync["done_bytes"], resync["total_bytes"]
    return f"{100 * done // total if total else 100}%"


def _volumes(nodes: Mapping[str, NodeStatus]) -> Table:
    numbers = ("Size", "In\nflight", "Read\nIOPS", "Read\nMiB/s", "Write\nIOPS", "Write\nMiB/s")
    table = _table("Volumes", "Volume", *numbers, numbers=numbers)
    for _, views in _views(nodes):
        # The primary serves the clients; only if it was not asked, the secondary's word must do.
        view = next((view for view in views.values() if view["role"] == "primary"), next(iter(views.values())))
        for volume in view["volumes"].values():
            rates = volume["rates"]
            table.add_row(
                volume["uri"], _size(volume["size_bytes"]), str(volume["in_flight"]),
                f"{rates['read_iops']:,.0f}", f"{rates['read_mib_s']:,.1f}",
                f"{rates['write_iops']:,.0f}", f"{rates['write_mib_s']:,.1f}",
            )  # fmt: skip
    return table


def _troubles(nodes: Mapping[str, NodeStatus]) -> Iterator[Text]:
    """One line for everything that is not as it should be."""
    for name, views in _views(nodes):
        for node, view in views.items():
            link, resync = view["link"], view["resync"]
            if view["why"] or view["state"] != "in-sync":
                yield _trouble(f"{name} on {node} is ", view["state"], view["why"])
            if resync:
                done, total = _size(resync["done_bytes"]), _size(resync["total_bytes"])
                yield Text(f"The resync of {name} has done {done} of {total}.")
            if link["why"] and link["why"] not in view["why"]:
                yield _trouble(f"The link of {name} from {node} to {link['peer']} is ", link["state"], link["why"])


def _trouble(before: str, state: str, why: str) -> Text:
    return Text.assemble(before, _state(state), f": {why.rstrip('.')}." if why else ".")


def _duration(seconds: float) -> str:
    for unit_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def _size(size_bytes: int) -> str:
    for unit_bytes, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.4g} {unit}"
    return f"{size_bytes} B"
