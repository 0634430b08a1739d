"""`verify`: have the owners of groups compare both replicas, follow how it goes, tell what differs.

The groups are verified one after the other. Ctrl-C (130) ends the watching only, like that of a move: `verify --stop`
ends what has begun. Exit codes: 0, both replicas are the same now; 1, a verify was refused or ended early; 2, something
differs. One that ended early (the link broke, the group moved) has told nothing wrong, but not everything.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stortrends_ha.cli.asking import Nodes, View, answering, cluster_of, newest_of, request, views_of
from stortrends_ha.cli.report import duration, size
from stortrends_ha.cli.status import ask
from stortrends_ha.config import Cluster
from stortrends_ha.errors import ConfigError, StorTrendsError

LOOK_AGAIN_S = 0.2
# A data process that died is started again sooner.
PATIENCE_S = 15.0
SAME, ENDED_EARLY, DIFFERS = 0, 1, 2

Outcome = dict[str, Any]


def verify(config: Path, names: Iterable[str], *, repair: bool, source: str, as_json: bool) -> int:
    """Verify these groups and volumes, all groups that nodes here own without any; returns the exit code."""
    cluster = cluster_of(config, nodes=[source] if source else [])
    outcomes: dict[str, Outcome] = {}
    for group, volumes in _wanted(cluster, config, names).items():
        command = {"command": "verify", "group": group, "volumes": volumes, "repair": repair, "from": source}
        try:
            outcomes[group] = _verify(cluster, config, group, command, quiet=as_json)
        except StorTrendsError as error:
            outcomes[group] = {"error": str(error)}
        if not as_json:
            _tell(cluster, group, outcomes[group])
    if as_json:
        print(json.dumps({"groups": outcomes}))
    return max((_code(outcome) for outcome in outcomes.values()), key=(SAME, DIFFERS, ENDED_EARLY).index, default=SAME)


def stop(config: Path, names: Iterable[str]) -> int:
    """End the verifies of these groups that are under way; returns the exit code."""
    cluster, code = cluster_of(config), 0
    for group in _wanted(cluster, config, names):
        _, asked = _whom(answering(cluster, config), group)
        try:
            request(cluster, asked, {"command": "end_verify", "group": group})
            print(f"The verify of group {group} is ended.")
        except StorTrendsError as error:
            print(f"stortrends-ha: {error}", file=sys.stderr)
            code = 1
    return code


def _wanted(cluster: Cluster, config: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """Of each group, which volumes. Raises ConfigError."""
    wanted: dict[str, dict[str, None]] = {}
    if not (names := list(names)):
        nodes = answering(cluster, config)
        names = [group for group in cluster.groups if _whom(nodes, group)[0] in nodes]
    for name in names:
        group, volumes = _find(cluster, config, name)
        wanted.setdefault(group, {}).update(dict.fromkeys(volumes))
    return {group: list(volumes) for group, volumes in wanted.items()}


def _find(cluster: Cluster, config: Path, name: str) -> tuple[str, list[str]]:
    if name in cluster.groups:
        return name, [volume.name for volume in cluster.groups[name].volumes]
    for group in cluster.groups.values():
        if any(volume.name == name for volume in group.volumes):
            return group.name, [name]
    raise ConfigError([f"{config} has no group and no volume {name!r}; its groups are: {', '.join(cluster.groups)}."])


def _whom(nodes: Nodes, group: str) -> tuple[str, str]:
    """(the owner of a group, the node to ask): the secondary passes it on if the owner does not answer here."""
    views = views_of(nodes, group)
    if not views:
        raise StorTrendsError(f"{' and '.join(nodes)} do not know group {group}: started with another cluster file?")
    owner = newest_of(views)["owner"]
    return owner, owner if owner in nodes else next(iter(views))


# --- Following it ---------------------------------------------------------------------------------


def _verify(cluster: Cluster, config: Path, group: str, command: Mapping[str, Any], *, quiet: bool) -> Outcome:
    """What came of it. Raises StorTrendsError, also with the node's refusal."""
    owner, asked = _whom(answering(cluster, config), group)
    run = request(cluster, asked, command)["run"]
    if not quiet:
        print(f"Group {group}: {owner} compares {', '.join(command['volumes'])} with its peer's copy.", flush=True)
    try:
        return _follow(cluster, group, run, _Line() if not quiet and sys.stdout.isatty() else None)
    except KeyboardInterrupt:
        stop = f"stortrends-ha verify {group} --stop"
        print(f"\nNot watched any longer. The verify goes on: `stortrends-ha status` shows it, `{stop}` ends it.",
              file=sys.stderr)  # fmt: skip
        raise


def _follow(cluster: Cluster, group: str, run: str, line: "_Line | None") -> Outcome:
    seen_s = time.monotonic()
    while time.monotonic() < seen_s + PATIENCE_S:
        views = views_of(ask(cluster, cluster.nodes)[0], group)
        for view in views.values():
            running, last = view["verify"]["running"], view["verify"]["last"]
            if last and last["run"] == run:
                if line:
                    line.end()
                return dict(last)
            if running and running["run"] == run:
                seen_s = time.monotonic()
                if line:
                    line.show(running)
        time.sleep(LOOK_AGAIN_S)
    raise StorTrendsError(
        f"The verify of group {group} is lost: its data process, or its node, has ended. `stortrends-ha status` says "
        "how the group is, and what was found until then."
    )


class _Line:
    """A line of a terminal that shows how far it is."""

    def __init__(self) -> None:
        self._width = 0

    def show(self, running: View) -> None:
        """Over what was there before."""
        done, total, rate = running["done_bytes"], running["total_bytes"], running["rate"]
        left = f", {duration((total - done) / rate)} left" if rate >= 1 and total > done else ""
        differs = f", {size(running['found_bytes'])} differ" if running["found_bytes"] else ""
        text = f"  {size(done)} of {size(total)}, {size(int(rate))}/s{left}{differs}"
        print(f"\r{text.ljust(self._width)}", end="", flush=True)
        self._width = len(text)

    def end(self) -> None:
        """Nothing is left of it."""
        print(f"\r{' ' * self._width}\r", end="", flush=True)


# --- Telling --------------------------------------------------------------------------------------


def _code(outcome: Outcome) -> int:
    if "error" in outcome or outcome["why"]:
        return ENDED_EARLY
    return DIFFERS if any(of["left_bytes"] for of in outcome["volumes"].values()) else SAME


def _tell(cluster: Cluster, group: str, outcome: Outcome) -> None:
    if "error" in outcome:
        print(f"stortrends-ha: {outcome['error']}", file=sys.stderr)
        return
    for volume, of in outcome["volumes"].items():
        for line in _lines(cluster, volume, of, outcome):
            print(line)
    if outcome["why"]:
        done, total = size(outcome["done_bytes"]), size(outcome["total_bytes"])
        print(
            f"stortrends-ha: The verify of group {group} ended when {done} of {total} were compared: {outcome['why']}. "
            "Begin again when both nodes are in sync.",
            file=sys.stderr,
        )


def _lines(cluster: Cluster, volume: str, of: Outcome, outcome: Outcome) -> Iterator[str]:
    if of["found_bytes"]:
        yield f"{volume}: {size(of['found_bytes'])} differed, in blocks of 64 KiB:"
        for offset, length in of["found"]:
            yield f"  {size(length)} at byte {offset}"
        if (told := sum(length for _, length in of["found"])) < of["found_bytes"]:
            yield f"  and {size(of['found_bytes'] - told)} more"
    elif not outcome["why"]:
        yield f"{volume}: both replicas are the same."
    if of["repaired_bytes"]:
        yield f"{volume}: {size(of['repaired_bytes'])} were repaired, stable on both nodes, and are the same now."
    if of["left_bytes"]:
        nodes = " or ".join(cluster.nodes)
        yield (
            f"{volume}: {size(of['left_bytes'])} differ, as far as it is known. To repair them, say whose data counts: "
            f"stortrends-ha verify {volume} --repair --from NODE ({nodes})"
        )
