"""What the operator can have done to the copy of a node that does not own: volume replace, group diff, group resolve.

Rule 10: the last good copy is never given up. So each command is refused unless the other node serves the group at this
moment, by the very record that is known here; the data process looks again, at what the owner said of its copy.
Nothing is done without ``confirmed``: then the answer says what would be.

The answers, by name of the command (`cli.repair` reads them):
    replace     {"says": [sentence, ...]}: what would be done, or has begun
    resolve     likewise; how it goes on is the answer to ``comparison``
    diff        {"says": []}: it has begun, likewise
    comparison  {"comparison": ...}: as `node.messages.Comparison`; None if there is none, or no data process to say it
    show        {"says": []}: the volumes can be read at that address, for ten seconds more
    end_diff    {"says": []}: none of it goes on; what was not overwritten will not be
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from stortrends_ha.cluster.explain import silence
from stortrends_ha.cluster.phases import Phase
from stortrends_ha.config import Cluster, Group, Volume
from stortrends_ha.errors import OrderError, StorTrendsError
from stortrends_ha.node.groups import STEP_S, GroupRunner
from stortrends_ha.node.messages import Status
from stortrends_ha.node.operator import Command

# A data process starts, opens its files, hears of the record, and the owner connects.
STARTED_AGAIN_S = 20.0


class Repair:
    """The commands of one node."""

    def __init__(self, me: str, cluster: Cluster, runners: Mapping[str, GroupRunner]) -> None:
        self._me = me
        self._peer = cluster.peer_of(me).name
        self._cluster = cluster
        self._runners = runners

    def commands(self) -> dict[str, Command]:
        """By name."""
        return {
            "replace": self.replace,
            "diff": self.diff,
            "resolve": self.resolve,
            "comparison": self.comparison,
            "show": self.show,
            "end_diff": self.end_diff,
        }

    # --- volume replace -------------------------------------------------------------------------

    async def replace(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make the copy of a volume's group anew from the other node. Raises StorTrendsError."""
        group, volume = self._volume(request)
        if request.get("node") != self._me:
            raise StorTrendsError(
                f"This is node {self._me}: `volume replace` is given on the machine of the node itself."
            )
        runner = self._runners[group.name]
        self._refuse_good_copy(runner, f"the disk of volume {volume.name} on {self._me}")
        self._refuse_diverged(runner)
        if request.get("confirmed") is not True:
            return {"says": self._plan(runner, group, volume)}
        if runner.status is None or runner.status["fit"]["failure"]:
            await self._start_again(runner)
        assert runner.child is not None
        try:
            await runner.errands.run(runner.child, "give-up")
        except OrderError as e:
            raise StorTrendsError(f"Volume {volume.name} was not replaced on {self._me}: {e}.") from None
        return {"says": [f"{self._peer} copies group {group.name} to {self._me}: `stortrends-ha status` says how far."]}

    def _volume(self, request: dict[str, Any]) -> tuple[Group, Volume]:
        name, known = request.get("volume"), []
        for group in self._cluster.groups.values():
            for volume in group.volumes:
                if volume.name == name:
                    return group, volume
                known.append(volume.name)
        raise StorTrendsError(f"There is no volume {str(name)[:70]!r}; the volumes are: {', '.join(known)}.")

    def _plan(self, runner: GroupRunner, group: Group, volume: Volume) -> list[str]:
        names = [each.name for each in group.volumes]
        gib = sum(each.size_bytes for each in group.volumes) / (1 << 30)
        others = (
            f"Group {group.name} has {len(names)} volumes, {' and '.join(names)}: all of them" if names[1:] else "It"
        )
        now = " It is in sync at this moment." if self._me in runner.core.record.in_sync else ""
        failure = runner.status["fit"]["failure"] if runner.status else ""
        return [
            f"What is on {volume.backing[self._me]} is given up: the copy of volume {volume.name} on {self._me}."
            f"{now}{failure and f' It has failed: {failure}.'}",
            f"{others} will be compared with {self._peer}, {gib:.2f} GiB, and overwritten where they differ. Clients "
            f"are served by {self._peer} meanwhile, which alone has everything until that is done.",
            "A disk at another path needs the new path in the cluster file of both nodes, and both started again.",
        ]

    async def _start_again(self, runner: GroupRunner) -> None:
        """A replica that has failed, or could not be opened, is opened anew. Raises StorTrendsError."""
        assert runner.child is not None
        view, before = runner.child.view, runner.child.view().restarts
        runner.child.kill("its disk is replaced")

        def is_met() -> bool:
            return runner.status is not None and bool(runner.status["owner_lineage"])

        try:
            async with asyncio.timeout(STARTED_AGAIN_S):
                await _until(lambda: runner.status is None)
                await _until(lambda: is_met() or view().restarts > before + 1)
        except TimeoutError:
            pass
        if not is_met():
            raise StorTrendsError(
                f"Nothing was given up: the data process of group {runner.name} was started again on {self._me}, "
                f"and is not ready: {view().why}."
            )
        self._refuse_diverged(runner)

    # --- Copies without a common history ----------------------------------------------------------

    async def diff(self, request: dict[str, Any]) -> dict[str, Any]:
        """Begin to compare the copy of a group here with the owner's. Raises StorTrendsError."""
        runner = self._runner(request)
        self._need_diverged(runner)
        await self._run(runner, "compare", keep=False)
        return {"says": []}

    async def resolve(self, request: dict[str, Any]) -> dict[str, Any]:
        """Keep what differs here in a file, and give the copy here up for the other node's. Raises StorTrendsError."""
        runner, keep = self._runner(request), request.get("keep")
        name, me, peer = runner.name, self._me, self._peer
        if keep not in (me, peer):
            raise StorTrendsError(f"There is no node {str(keep)[:70]!r}; the nodes are {me} and {peer}.")
        if keep == me and runner.core.record.owner != me:
            raise StorTrendsError(
                f"No: {peer} owns group {name}, and its clients have written to its copy. To keep the copy of {me} "
                f"all the same: stop {peer}, make {me} the owner (stortrends-ha group force-own {name} "
                f"--accept-data-loss), start {peer}, and give there: stortrends-ha group resolve {name} --keep {me}"
            )
        if runner.core.record.owner == me and keep == me:
            raise StorTrendsError(f"It is given on the machine of {peer}, whose copy would be overwritten.")
        self._refuse_good_copy(runner, f"the copy of group {name} on {me}")
        self._need_diverged(runner)
        if request.get("confirmed") is not True:
            return {"says": self._resolve_plan(name)}
        await self._run(runner, "compare", keep=True)
        return {"says": []}

    def _resolve_plan(self, name: str) -> list[str]:
        directory = self._cluster.nodes[self._me].state_dir / "kept"
        return [
            f"Kept as it is: the copy of group {name} on {self._peer}, which serves its clients, and goes on doing so.",
            f"Overwritten: the copy on {self._me}, wherever it differs. What is different there is first written to a "
            f"file in {directory}, which stays until it is dropped; if that cannot be done, nothing is overwritten.",
            f"`stortrends-ha group diff {name}` shows where they differ.",
        ]

    def comparison(self, request: dict[str, Any]) -> dict[str, Any]:
        """How far the comparison is that was begun last. Raises StorTrendsError."""
        status = self._runner(request).status
        return {"comparison": status["comparison"] if status else None}

    async def show(self, request: dict[str, Any]) -> dict[str, Any]:
        """Let somebody look into the copy of a group here. Raises StorTrendsError."""
        runner, host, port = self._runner(request), request.get("host"), request.get("port")
        if runner.core.record.owner == self._me:
            uris = " and ".join(f"nbd://{group.nbd}/{volume.name}" for group, volume in self._volumes_of(runner.name))
            raise StorTrendsError(f"{self._me} owns group {runner.name}, which is served already: {uris}")
        if not isinstance(host, str) or type(port) is not int or not 0 < port < 1 << 16:
            raise StorTrendsError("An address to listen on has a host and a port.")
        await self._run(runner, "show", host=host, port=port)
        return {"says": []}

    def _volumes_of(self, name: str) -> list[tuple[Group, Volume]]:
        group = self._cluster.groups[name]
        return [(group, volume) for volume in group.volumes]

    async def end_diff(self, request: dict[str, Any]) -> dict[str, Any]:
        """Go no further. Raises StorTrendsError."""
        await self._run(self._runner(request), "end-compare")
        return {"says": []}

    async def _run(self, runner: GroupRunner, kind: str, **message: Any) -> None:
        assert runner.child is not None
        try:
            await runner.errands.run(runner.child, kind, **message)
        except OrderError as e:
            raise StorTrendsError(f"Group {runner.name}: this was not done on {self._me}: {e}.") from None

    def _need_diverged(self, runner: GroupRunner) -> None:
        name, status, me, peer = runner.name, runner.status, self._me, self._peer
        if runner.core.record.owner == me:
            raise StorTrendsError(f"{me} owns group {name}: this is given on the machine of {peer}.")
        if status is None or status["role"] != "secondary" or not status["owner_lineage"]:
            raise StorTrendsError(
                f"The copies of group {name} cannot be compared now, as {peer} has not connected to {me}: "
                "`stortrends-ha status` says what both wait for."
            )
        if not diverged(status):
            raise StorTrendsError(
                f"The copies of group {name} on {peer} and {me} have a common history, so there is nothing to resolve: "
                "what one of them lacks is copied by itself."
            )

    def _runner(self, request: dict[str, Any]) -> GroupRunner:
        group = request.get("group")
        if not isinstance(group, str) or group not in self._runners:
            raise StorTrendsError(f"There is no group {str(group)[:70]!r}; the groups are: {', '.join(self._runners)}.")
        return self._runners[group]

    # --- Rule 10 --------------------------------------------------------------------------------

    def _refuse_good_copy(self, runner: GroupRunner, what: str) -> None:
        """Only what another node has, by the record and by what that node does now, may be overwritten."""
        core, view, name = runner.core, runner.view(), runner.name
        record, peer = core.record, view.peer
        if record.owner == self._me and record.alone:
            raise StorTrendsError(
                f"No: {self._me} alone has everything that clients of group {name} were told is written, so {what} "
                f"has the last good copy. Bring {self._peer} in sync first: `stortrends-ha status` says how."
            )
        if record.owner == self._me:
            raise StorTrendsError(
                f"No: {self._me} owns group {name}. Move it first: stortrends-ha group move {name} --to {self._peer}"
            )
        if not view.alive or peer is None:
            raise StorTrendsError(
                f"No: {silence(self._peer, view)}, so {what} may have the last good copy. Bring {self._peer} back "
                "first."
            )
        if peer.record != record or not peer.leading or core.phase is not Phase.FOLLOWING:
            why = f", as {peer.unfit}" if peer.unfit else ""
            raise StorTrendsError(
                f"No: {self._peer} does not serve group {name} now{why}, so {what} may have the last good copy: "
                "`stortrends-ha status` says what ends that."
            )

    def _refuse_diverged(self, runner: GroupRunner) -> None:
        status = runner.status
        if status is not None and diverged(status):
            raise StorTrendsError(
                f"No: the copies of group {runner.name} on {self._peer} and {self._me} have no common history, so what "
                f"is here may be nowhere else. `stortrends-ha group diff {runner.name}` shows where they differ, and "
                f"`stortrends-ha group resolve {runner.name} --keep {self._peer}` keeps what is overwritten here."
            )


def diverged(status: Status) -> bool:
    """Whether a secondary and its owner have data without a common history."""
    own, owners = status["fit"]["lineage"], status["owner_lineage"]
    return bool(own and owners) and own != owners


async def _until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(STEP_S)
