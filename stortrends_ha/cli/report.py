"""The status of the nodes as a page for people.

Job: tables of nodes, groups, volumes, resyncs and verifies that fit into 80 columns, and below them, in words, what is
not well, and the newest change of owner of each group.
Invariants: each node is shown as it sees itself, nothing is guessed; colours are only for terminals, and nothing is
said by colour alone; when all is well, the tables are followed by nothing but moves of the last day.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from stortrends_ha.cli.client import NodeStatus
from stortrends_ha.cli.words import sentence
from stortrends_ha.limits import INTENT_REGION_BYTES

GroupStatus = dict[str, Any]

_STYLES = {
    "up": "green",
    "in-sync": "green",
    "connected": "green",
    "alone": "yellow",
    "idle": "yellow",
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
_BAR = 20
# A heartbeat path is silent when nothing came on it for the time of so many beats, and for so long.
_SILENT_BEATS = 5
_SILENT_S = 3.0
# A move that is longer ago is of no interest, unless somebody asks.
_RECENT_S = 86400.0
# Of what differs, so many places are shown; `--json` has more.
_PLACES = 3


def show(nodes: Mapping[str, NodeStatus], *, verbose: bool = False) -> None:
    """Print the page to stdout. ``verbose``: heartbeat paths that are well, and old moves, too."""
    console = Console(highlight=False)
    tables = [_nodes(nodes), _groups(nodes), _volumes(nodes)]
    bars = "#." if console.options.ascii_only else "█░"
    resyncs = [(name, view, view["resync"]) for name, views in _views(nodes) for view in views.values()]
    verifies = [(name, view, view["verify"]["running"]) for name, view, _ in resyncs]
    for title, jobs in (("Resyncs", resyncs), ("Verifies", verifies)):
        if any(job for _, _, job in jobs):
            tables.append(_jobs(title, jobs, *bars))
    if not console.is_terminal:  # whatever reads a pipe is not helped by folded names
        console.width = max(console.width, *(_width(console, table) for table in tables))
    for table in tables:
        console.print(table)
        console.print()
    for line in _lines(nodes, verbose):
        console.print(line)


def _lines(nodes: Mapping[str, NodeStatus], verbose: bool) -> Iterator[Text]:
    """What is said below the tables."""
    yield from _operator(nodes)
    yield from _files(nodes)
    yield from _paths(nodes, verbose)
    yield from _arbiter(nodes)
    yield from _troubles(nodes)
    yield from _differing(nodes)
    yield from _moves(nodes, verbose)
    if verbose:
        yield from _intents(nodes)
        yield from _verified(nodes)


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
            state = _node_state(own["nodes"][name])
            table.add_row(name, state, own["version"], duration(own["uptime_s"]), f"pid {own['pid']}")
        else:
            table.add_row(name, _node_state(seen), _peer_version(nodes) or _NONE, _NONE, _NONE)
    return table


def _node_state(seen: dict[str, Any]) -> Text:
    """The state, with what the operator wants of the node."""
    wishes = [word for word in ("drained", "stopping") if seen[word]]
    return Text(", ").join([_state(seen["state"]), *(Text(word, style="yellow") for word in wishes)])


def _peer_version(nodes: Mapping[str, NodeStatus]) -> str | None:
    links = (group["link"] for node in nodes.values() for group in node["groups"].values())
    return next((link["peer_version"] for link in links if link["peer_version"]), None)


def _views(nodes: Mapping[str, NodeStatus]) -> Iterator[tuple[str, dict[str, GroupStatus]]]:
    """Each group, with what each of the nodes says of it."""
    names = dict.fromkeys(name for node in nodes.values() for name in node["groups"])
    for name in names:
        yield name, {node: of["groups"][name] for node, of in nodes.items() if name in of["groups"]}


def _groups(nodes: Mapping[str, NodeStatus]) -> Table:
    columns = ("Group", "Owner", "In sync", "Epoch", "Node", "State", "Link", "Round\ntrip", "Resync")
    table = _table("Groups", *columns, numbers=("Epoch", "Round\ntrip", "Resync"))
    for name, views in _views(nodes):
        above: list[str | Text] = []
        for node, view in views.items():
            link, trip_ms = view["link"], view["link"]["round_trip_ms"]
            record = [name, view["owner"], _in_sync(nodes[node], view), str(view["epoch"])]
            table.add_row(
                *(cells := record if record != above else [""] * len(record)),
                node, _state(view["state"]), _state(link["state"]),
                _NONE if trip_ms is None else f"{trip_ms:.2f} ms", _progress(view["resync"]),
            )  # fmt: skip
            above = record if cells is record else above
    return table


def _in_sync(node: NodeStatus, view: GroupStatus) -> str | Text:
    """The nodes that have every acknowledged write, by the record."""
    if len(view["in_sync"]) == len(node["nodes"]):
        return Text("both", style="green")
    return Text(" ".join(view["in_sync"]) or _NONE, style="yellow")


def _progress(resync: dict[str, Any] | None) -> str:
    return f"{100 * _done(resync):.0f}%" if resync else _NONE


def _done(resync: dict[str, Any]) -> float:
    """How much of it, from 0 to 1; not 1 before the end."""
    done, total = resync["done_bytes"], resync["total_bytes"]
    return min(done / total, 0.99) if total > done else 1.0


def _jobs(title: str, jobs: list[tuple[str, GroupStatus, dict[str, Any] | None]], full: str, empty: str) -> Table:
    """How far resyncs or verifies are. ``full`` and ``empty``: what the bars are made of."""
    with_whom = "To" if title == "Resyncs" else "With"
    table = _table(title, "Group", with_whom, "Progress", "Done", "Rate", "Left", numbers=("Rate", "Left"))
    for name, view, job in jobs:
        if job:
            bars, percent = int(_BAR * _done(job)), f" {_progress(job):>4}"
            bar = Text.assemble((full * bars, "green"), (empty * (_BAR - bars), "dim"), percent)
            done = f"{size(job['done_bytes'])} of {size(job['total_bytes'])}"
            table.add_row(name, view["link"]["peer"], bar, done, f"{size(int(job['rate']))}/s", _left(job))
    return table


def _left(resync: dict[str, Any]) -> str:
    left, rate = resync["total_bytes"] - resync["done_bytes"], resync["rate"]
    return duration(left / rate) if rate >= 1 and left else _NONE


def _volumes(nodes: Mapping[str, NodeStatus]) -> Table:
    numbers = ("Size", "In\nflight", "Read\nIOPS", "Read\nMiB/s", "Write\nIOPS", "Write\nMiB/s")
    table = _table("Volumes", "Volume", *numbers, numbers=numbers)
    for _, views in _views(nodes):
        # The primary serves the clients; only if it was not asked, the secondary's word must do.
        view = next((view for view in views.values() if view["role"] == "primary"), next(iter(views.values())))
        for volume in view["volumes"].values():
            rates = volume["rates"]
            table.add_row(
                volume["uri"], size(volume["size_bytes"]), str(volume["in_flight"]),
                f"{rates['read_iops']:,.0f}", f"{rates['read_mib_s']:,.1f}",
                f"{rates['write_iops']:,.0f}", f"{rates['write_mib_s']:,.1f}",
            )  # fmt: skip
    return table


def _operator(nodes: Mapping[str, NodeStatus]) -> Iterator[Text]:
    """What the operator has begun and may have forgotten."""
    first = next(iter(nodes.values()))
    for name, seen in first["nodes"].items():
        state = nodes[name]["nodes"][name] if name in nodes else seen
        if state["drained"]:
            yield Text(f"{name} is drained: no group moves to it until: stortrends-ha undrain {name}", overflow="fold")
        if state["stopping"] and state["state"] == "up":
            yield Text(f"{name} is being stopped: its groups are handed over first.")


def _files(nodes: Mapping[str, NodeStatus]) -> Iterator[Text]:
    """That the two cluster files are not the same."""
    first = next(iter(nodes.values()))
    for name, seen in first["nodes"].items():
        if other := ", ".join(seen["other_sections"]):
            what = f"{first['node']} and {name} run with cluster files that are not the same: see their {other}."
            todo = "Put one file on both, then restart the node that has another one; if both have, first the one that"
            todo = f"{todo} serves nothing."
            yield Text(f"{what} {todo}", overflow="fold")


def _paths(nodes: Mapping[str, NodeStatus], verbose: bool) -> Iterator[Text]:
    """The heartbeat paths on which nothing is heard."""
    for name, node in nodes.items():
        for path in node["heartbeats"]:
            silent = _is_silent(path, node["uptime_s"])
            if not (silent or verbose):
                continue
            way = f"{name} hears no heartbeat" if silent else f"{name} hears heartbeats"
            since = f" for {duration(path['silent_s'])}" if silent else ""
            counts = (
                f" ({path['received']} received, {path['dropped']} dropped, {path['sent']} sent)" if verbose else ""
            )
            why = f": {path['why']}" if silent and path["why"] else ""
            yield Text(sentence(f"{way} from {path['peer']} on {path['own']}{since}{counts}{why}"))


def _is_silent(path: dict[str, Any], uptime_s: float) -> bool:
    """How often the peer beats is known from how often this node does: the configuration is the same."""
    interval_s = uptime_s / path["sent"] if path["sent"] else 0.0
    return bool(path["silent_s"] > max(_SILENT_S, _SILENT_BEATS * interval_s))


def _arbiter(nodes: Mapping[str, NodeStatus]) -> Iterator[Text]:
    """What the arbiter does not grant or answer: a line for each reason, however many groups wait for it."""
    waiting: dict[str, dict[str, None]] = {}
    for name, views in _views(nodes):
        for view in views.values():
            # A secondary that is well asks nothing, so what it heard last may be long over.
            if view["arbiter"] and (view["phase"] != "following" or view["state"] == "held"):
                waiting.setdefault(view["arbiter"], {})[name] = None
    both = all(state["state"] == "up" for node in nodes.values() for state in node["nodes"].values())
    held = any(view["state"] == "held" for _, views in _views(nodes) for view in views.values())
    for why, groups in waiting.items():
        meanwhile = (
            "Nothing changes while both nodes see each other; if a node fails now, the other one holds."
            if both and not held
            else "Until that is over, no group can get another owner or another node in sync."
        )
        of = f" ({', '.join(groups)})" if len(groups) < len(_all_groups(nodes)) else ""
        yield Text.assemble(("Warning: ", "bold yellow"), f"{sentence(why.rstrip('.') + of)} {meanwhile}")


def _all_groups(nodes: Mapping[str, NodeStatus]) -> dict[str, None]:
    return dict.fromkeys(name for name, _ in _views(nodes))


def _troubles(nodes: Mapping[str, NodeStatus]) -> Iterator[Text]:
    """One line for everything about a group that is not as it should be."""
    for name, views in _views(nodes):
        for node, view in views.items():
            link, resync = view["link"], view["resync"]
            if view["why"] or view["state"] != "in-sync":
                yield _trouble(f"{name} on {node} is ", view["state"], view["why"])
            if resync and resync["why"]:
                yield Text(f"The resync of {name}: {resync['why']}.")
            if (verify := view["verify"]["running"]) and verify["why"]:
                yield Text(f"The verify of {name}: {verify['why']}.")
            lacks = sum(volume["dirty_bytes"] for volume in view["volumes"].values())
            if lacks and not resync:
                yield Text(f"{link['peer']} lacks {size(lacks)} of {name}, which is copied when it is back.")
            gone = nodes[node]["nodes"].get(link["peer"], {}).get("state") == "not answering"
            if link["why"] and link["why"] not in view["why"] and not gone:
                yield _trouble(f"The link of {name} from {node} to {link['peer']} is ", link["state"], link["why"])
            if view["addresses"]:
                yield Text.assemble((f"Addresses of {name} on {node}: ", "yellow"), view["addresses"])


def _moves(nodes: Mapping[str, NodeStatus], verbose: bool) -> Iterator[Text]:
    """The newest change of who serves each group, from the node that measured it."""
    for name, views in _views(nodes):
        newest = min(_last_moves(views), key=lambda found: found[1]["ago_s"], default=None)
        if newest is None:
            continue
        to, last = newest
        if last["ago_s"] < _RECENT_S or verbose:
            yield Text(f"{name} {_move(last['kind'], to, last['duration_ms'], duration(last['ago_s']))}")


def _move(kind: str, to: str, duration_ms: float, ago: str) -> str:
    if kind == "override":
        return f"was given to {to} by the operator's override {ago} ago."
    if kind == "alone":
        return f"went on alone on {to} {ago} ago; clients were held for {_milliseconds(duration_ms)}."
    how = "was taken over by" if kind == "takeover" else "moved to"
    return f"{how} {to} {ago} ago; clients were held for {_milliseconds(duration_ms)}."


def _last_moves(views: Mapping[str, GroupStatus]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The last moves, with whom they made the owner. Both nodes see a handover, only the new owner anything else; what
    a node saw may be undone since."""
    for node, view in views.items():
        if (last := view["last_move"]) and (last["kind"] == "handover" or node == view["owner"]):
            yield view["owner"], last


def _intents(nodes: Mapping[str, NodeStatus]) -> Iterator[Text]:
    """What would be compared if the owner crashed now."""
    for name, views in _views(nodes):
        for view in views.values():
            if regions := sum(volume["intent_regions"] for volume in view["volumes"].values()):
                log = size(regions * INTENT_REGION_BYTES)
                yield Text(f"{name} has {regions} regions ({log}) in its intent log, to be compared after a crash.")


def _differing(nodes: Mapping[str, NodeStatus]) -> Iterator[Text]:
    """What verifies have found; both nodes know it."""
    for _, views in _views(nodes):
        known = [(volume, of) for view in views.values() for volume, of in view["verify"]["volumes"].items()]
        for volume in dict.fromkeys(volume for volume, of in known if of["differing_bytes"]):
            most = max((of for each, of in known if each == volume), key=lambda of: of["differing_bytes"])
            places = ", ".join(f"{size(length)} at byte {offset}" for offset, length in most["ranges"][:_PLACES])
            more = ", and more" if len(most["ranges"]) > _PLACES else ""
            yield Text.assemble(
                ("Warning: ", "bold yellow"),
                f"{size(most['differing_bytes'])} of {volume} differ between the nodes ({places}{more}). To "
                f"repair that, say whose data counts: stortrends-ha verify {volume} --repair --from NODE",
            )


def _verified(nodes: Mapping[str, NodeStatus]) -> Iterator[Text]:
    """When each volume was verified last, by the node that did it."""
    for _, views in _views(nodes):
        for volume in dict.fromkeys(volume for view in views.values() for volume in view["verify"]["volumes"]):
            of = [view["verify"]["volumes"].get(volume) for view in views.values()]
            ended_s = max((each["verified_s"] or 0.0 for each in of if each), default=0.0)
            when = (
                f"was verified {duration(max(0.0, time.time() - ended_s))} ago" if ended_s else "was not verified yet"
            )
            yield Text(f"{volume} {when}.")


def _trouble(before: str, state: str, why: str) -> Text:
    return Text.assemble(before, _state(state), sentence(f": {why}" if why else ""))


def duration(seconds: float) -> str:
    """For people."""
    for unit_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def _milliseconds(duration_ms: float) -> str:
    return f"{duration_ms:.0f} ms" if duration_ms < 10_000 else duration(duration_ms / 1000)


def size(size_bytes: int) -> str:
    """For people."""
    for unit_bytes, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.4g} {unit}"
    return f"{size_bytes} B"
