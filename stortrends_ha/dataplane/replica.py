"""One group's replica on this node: its volumes and its durable state, open whatever the role is.

A replica that has failed stays failed until the process is started again, by hand or (a secondary's) now and then: a
failed fsync cannot be trusted later (rule 13), so all that was cached counts as lost then, and is read from the disk.

What a death leaves (``storage.state``), by step:
- Where the replicas may differ by then is in the intent logs and dirty maps (``replication.differences``).
- ``needs_sync`` is durable before a sync overwrites anything, and is taken back, together with ``lost_cache``, when the
  owner says that all is copied and flushed here: before that is answered.
- ``filling`` is durable before everything is copied to this node, ``fills`` on the other one as soon as its dirty map
  has everything: so one that is interrupted goes on if both have the same, and begins anew if not.
- ``given_up_for`` is durable before what the operator has given up may be overwritten; with ``filling`` it is over.
- ``backings`` is durable with the lineage: a state that is found beside other files than those (a disk that was not
  mounted, or was replaced) says nothing of them (rules 3 and 10). It stays as it is until they are led or filled.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stortrends_ha import __version__
from stortrends_ha.config import Cluster, Group
from stortrends_ha.errors import StorageError, SyncFailedError
from stortrends_ha.limits import COMPARE_GRAIN_BYTES, DISK_THREADS, INTENT_REGION_BYTES
from stortrends_ha.protocol.link import PROTOCOL_VERSIONS, Endpoint, Verdict
from stortrends_ha.record import Record
from stortrends_ha.replication.block_map import BlockMap
from stortrends_ha.replication.differences import Differences, blocks_of
from stortrends_ha.replication.session import Hello, Plan
from stortrends_ha.replication.verify import Findings
from stortrends_ha.storage.backing import Backing
from stortrends_ha.storage.disk_threads import DiskThreads
from stortrends_ha.storage.map_file import MapFile, QueuedMapFile
from stortrends_ha.storage.state import StateFile

from .export import LinkCounters, ServerCounters, VolumeCounters

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_LINEAGES = 20  # that are remembered
_RECORDS = 20  # that are told of
_SILENT = "the disk has not answered"


class Replica:
    """One group's volumes and state on this node, and what is counted of it over all roles."""

    def __init__(self, cluster: Cluster, group: Group, node: str) -> None:
        self.cluster = cluster
        self.group = group
        self.node = node
        self.peer = cluster.peer_of(node)
        self._disks: list[DiskThreads] = []
        self._threads = ThreadPoolExecutor(DISK_THREADS, thread_name_prefix="disk")
        state_dir = cluster.nodes[node].state_dir
        self.state_file = StateFile(state_dir / "groups" / f"{group.name}.json", group.name)
        known = bool(self.state_file.state.lineage)
        self.stores = [
            Backing(v.name, v.backing[node], v.size_bytes, self._disk(v.backing[node]), self.fail, had_data=known)
            for v in group.volumes
        ]
        self._state_threads = self._disk(state_dir)
        self._backings = {store.volume: store.identity for store in self.stores}
        self._mounts = {store.volume: store.mount for store in self.stores}
        self._look_for_remounts()
        if self.state_file.state.lost_cache:
            for store in self.stores:
                store.forget_cache()
        if replaced := ", ".join(str(store.path) for store in self.stores if self._is_replaced(store)):
            log.error("group %s: %s: not the files that had its data; see `stortrends-ha status`", group.name, replaced)
        self._map_files: list[QueuedMapFile] = []
        self.differences = [self._open_maps(store) for store in self.stores]
        self.findings = [self._open_findings(store) for store in self.stores]
        self._was_killed = any(of.any for of in self.differences)
        self.blank = False
        self.looking = ""  # why it is not known yet whether the replica is blank
        self.failure = ""
        self.trouble = ""  # with what is no failure as long as no other node has a good copy
        self.on_failure: Callable[[], None] = lambda: None
        self.is_last_copy: Callable[[], bool] = lambda: False  # rule 13: no other node has a good one
        self.server_counters = ServerCounters()
        self.link_counters = LinkCounters()
        self.volume_counters = [VolumeCounters() for _ in group.volumes]
        self.last_verify: dict[str, Any] | None = None  # that has ended since the process started
        self.endpoints: list[Endpoint] = []  # of the owner's clients, as the owner told last

    def _disk(self, path: Path) -> DiskThreads:
        self._disks.append(DiskThreads(self._threads, path))
        return self._disks[-1]

    def _look_for_remounts(self) -> None:
        """Rule 3: what was cached when a file system was mounted anew, or a device plugged in anew, may be lost."""
        state = self.state_file.state
        for store in self.stores:
            before = state.mounts.get(store.volume)
            if state.boot_id and before and store.mount and before != store.mount and not state.lost_cache:
                log.warning("group %s: %s is not mounted as it was: its cache is lost", self.group.name, store.path)
                self.state_file.update(lost_cache=True, mounts=self._mounts)

    def _is_replaced(self, store: Backing) -> bool:
        before = self.state_file.state.backings.get(store.volume)
        return bool(before and store.identity) and before != store.identity

    @property
    def lineage(self) -> str:
        """The identity of the data; empty if these volumes have none that is known."""
        return "" if any(map(self._is_replaced, self.stores)) else self.state_file.state.lineage

    def _open_maps(self, store: Backing) -> Differences:
        """Raises StorageError."""
        known = bool(self.state_file.state.lineage)
        intents, intent_file = self._open_map(store, "intents", INTENT_REGION_BYTES, expected=known)
        block_bytes = self.cluster.limits.dirty_block
        dirty, dirty_file = self._open_map(store, "dirty", block_bytes, expected=known)
        return Differences(store.size_bytes, block_bytes, intents, dirty, intent_file, dirty_file)

    def _open_map(
        self, store: Backing, kind: str, block_bytes: int, *, expected: bool
    ) -> tuple[BlockMap | None, QueuedMapFile]:
        path = self.state_file.path.with_suffix(f".{store.volume}.{kind}")
        what = f"group {self.group.name}, volume {store.volume}"
        file = MapFile(path, what, blocks_of(store.size_bytes, block_bytes), block_bytes)
        found = file.open(expected=expected)
        if found is None:
            log.error("%s: %s is lost: all of the volume has to be compared", what, path)
        # Without a dirty map regions do not leave the intent log any more: nothing is lost.
        failed = self.fail if kind == "intents" else self.fail_unless_last
        self._map_files.append(QueuedMapFile(file, self._state_threads, failed))
        return found, self._map_files[-1]

    def _open_findings(self, store: Backing) -> Findings:
        """If the file is missing, no verify has found anything. Raises StorageError."""
        found, file = self._open_map(store, "findings", COMPARE_GRAIN_BYTES, expected=False)
        assert found is not None
        return Findings(found, file)

    # --- Becoming owner or secondary ------------------------------------------------------------

    def why_not_lead(self, record: Record, forced: bool, clears_loss: bool) -> str:
        """Why this replica must not be served by this record; empty if it may. Rules 3, 9 and 11."""
        state = self.state_file.state
        if self.failure:
            return f"its replica has failed: {self.failure}"
        if forced:
            return ""
        if state.needs_sync:
            return "a sync of this replica did not end, so its copy is not complete"
        if state.lost_cache and not clears_loss:
            return "its host restarted or its disk failed, so its copy may lack acknowledged writes"
        if not self.lineage and (record.epoch > 1 or state.lineage):
            return f"this replica has no data of the group, which is at epoch {record.epoch} already"
        return ""

    def begin_to_lead(self, forced: bool, clears_loss: bool) -> None:
        """Durable before any change: that this node owns, and the data's identity. Raises StorageError."""
        changes: dict[str, Any] = {"backings": self._backings, "mounts": self._mounts}
        if forced or not self.lineage:
            mixed = ", though a sync of it had not ended" if self.state_file.state.needs_sync else ""
            how = f"forced here by the operator{mixed}" if forced else "made here, when this node owned first"
            changes |= self._new_lineage(uuid.uuid4().hex, how)
        if forced or clears_loss:
            changes["lost_cache"] = False
        if forced:
            changes |= {"needs_sync": False, "given_up_for": ""}
        if self._was_killed:  # what was never answered may rest in the cache, and be read, before it is flushed again
            changes["settled_epoch"] = 0
        self._was_killed = False
        self.state_file.begin(**changes)

    def _new_lineage(self, lineage: str, how: str) -> dict[str, Any]:
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} lineage {lineage[:8]} {how}"
        return {"lineage": lineage, "lineages": (*self.state_file.state.lineages, line)[-_LINEAGES:]}

    def past(self) -> dict[str, list[str]]:
        """What people are told of the history of this replica, the newest last. Waits for the disk."""
        path = self.state_file.path.parent.parent / "records" / f"{self.group.name}.history"
        try:
            records = path.read_text(errors="replace").splitlines()[-_RECORDS:]
        except OSError:
            records = []
        return {"lineages": list(self.state_file.state.lineages), "records": [line[:200] for line in records]}

    def filled(self, name: str) -> None:
        """The dirty map durably has everything, as nothing is at the peer. Raises StorageError."""
        self.state_file.update(fills=name)

    def settled(self, epoch: int) -> None:
        """Rule 1: everything that was cached before this node went alone is stable."""
        try:
            self.state_file.update(settled_epoch=epoch)
        except StorageError as e:
            self.fail_unless_last(e)

    def begin_to_follow(self, lineage: str, plan: Plan, fill: str) -> None:
        """Durable before anything of a session is applied. Raises StorageError."""
        changes: dict[str, Any] = {"filling": fill} if fill else {}
        changes |= {"backings": self._backings, "mounts": self._mounts, "given_up_for": ""}
        if lineage != self.state_file.state.lineage:
            changes |= self._new_lineage(lineage, f"taken from {self.peer.name}, which copied everything")
        self.state_file.begin(needs_sync=plan is Plan.SYNC, **changes)
        if fill:
            self.forget_differences()

    def give_up(self, lineage: str) -> None:
        """The operator does not need what is on this replica: the owner's data, of this lineage, may overwrite it. From
        then on it owns nothing (rule 9). Durable when this returns. Raises StorageError."""
        self.state_file.update(given_up_for=lineage, needs_sync=True)

    def synced(self) -> None:
        """Rule 9: all is copied and flushed here; durable when this returns. Raises StorageError."""
        self.state_file.update(needs_sync=False, lost_cache=False, filling="")
        self.forget_differences()

    def forget_differences(self) -> None:
        """What this node knew of them is over: both replicas have the same, stable, or this one is filled anew."""
        for differences in self.differences:
            differences.forget()

    def compared(self, volume: int, offset: int, length: int, verdict: Verdict) -> None:
        """A verify has compared this."""
        self.findings[volume].note(offset, length, verdict)

    def verified(self, volumes: Iterable[str], ended_s: float) -> None:
        """A verify has come to the end of these volumes."""
        verified = {**self.state_file.state.verified, **dict.fromkeys(volumes, ended_s)}
        try:
            self.state_file.update(verified=verified)
        except StorageError as e:
            self.fail_unless_last(e)

    def verify_status(self) -> dict[str, Any]:
        """What is known from verifies, on either node; without the one that is under way."""
        verified = self.state_file.state.verified
        return {
            "running": None,
            "last": self.last_verify,
            "volumes": {
                store.volume: {
                    "verified_s": verified.get(store.volume),
                    "differing_bytes": findings.nbytes,
                    "ranges": findings.ranges(),
                }
                for store, findings in zip(self.stores, self.findings, strict=True)
            },
        }

    async def look_if_blank(self) -> None:
        """A secondary without lineage may be filled only if there is nothing on it."""
        if self.lineage:
            return
        loop = asyncio.get_running_loop()
        found = []
        for store in self.stores:
            self.looking = f"{self.node} is still reading {store.path} to see whether there is nothing on it"
            found.append(await loop.run_in_executor(self._threads, store.is_blank))
        self.blank, self.looking = all(found), ""

    def hello(self, record: Record, behind: bool = False, inspects: bool = False) -> Hello:
        """What this node says of itself now, acting for this record."""
        state = self.state_file.state
        return Hello(
            cluster=self.cluster.name,
            group=self.group.name,
            node=self.node,
            peer=self.peer.name,
            protocols=PROTOCOL_VERSIONS,
            software=__version__,
            record=record,
            volumes=tuple((volume.name, volume.size_bytes) for volume in self.group.volumes),
            lineage=self.lineage,
            blank=self.blank and not self.lineage,
            lost_cache=state.lost_cache,
            needs_sync=state.needs_sync,
            differs=any(of.any for of in self.differences),
            unknown=any(of.unknown for of in self.differences),
            filling=state.fills if record.owner == self.node else state.filling,
            gives_up=state.given_up_for,
            behind=behind,
            inspects=inspects,
        )

    # --- When a disk fails ----------------------------------------------------------------------

    def fail(self, error: StorageError) -> None:
        """The disk failed: this replica is out until the process is started again."""
        log.error("group %s: this node's replica has failed: %s", self.group.name, error)
        if isinstance(error, SyncFailedError):  # the kernel may have dropped what was acknowledged: as after a reboot
            with contextlib.suppress(StorageError):
                self.state_file.update(lost_cache=True)
        if not self.failure:
            self.failure = str(error)
            self.on_failure()

    def fail_unless_last(self, error: StorageError) -> None:
        """Something has happened to a disk that costs no data: better to do without the other node's good copy only if
        there is none."""
        if not self.is_last_copy():
            self.fail(error)
        elif self.trouble != str(error):
            self.trouble = str(error)
            log.error("group %s: %s; this node goes on, as it has the only good copy", self.group.name, error)

    async def watch_disks(self) -> None:
        """Row 14: a disk that does not answer has failed. The last good copy is waited for."""
        limit_s = self.cluster.limits.disk_timeout_s
        while not self.failure:
            await asyncio.sleep(min(limit_s / 4, _LOOK_S))
            silent = [str(disk.path) for disk in self._disks if disk.silent_s() >= limit_s]
            if silent:
                self.fail_unless_last(StorageError(f"{', '.join(silent)}: {_SILENT} for {limit_s:g} s"))
            elif _SILENT in self.trouble:
                log.warning("group %s: the disk answers again", self.group.name)
                self.trouble = ""

    # --- The end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Flush and close. Raises StorageError."""
        if self.failure:  # nothing counts that is not stable by now, and a disk that hangs is not waited for
            self._threads.shutdown(wait=False, cancel_futures=True)
            return
        self._threads.shutdown()
        try:
            for store in self.stores:
                store.flush_now()
        except SyncFailedError as e:
            self.fail(e)
            raise
        self.state_file.update(boot_id="")  # nothing is only cached any more
        for file in self._map_files:
            file.close()
        for store in self.stores:
            store.close()

    def fit(self) -> dict[str, Any]:
        """What the supervisor judges by whether this node could own."""
        state = self.state_file.state
        return {
            "lineage": self.lineage,
            "blank": self.blank and not self.lineage,
            "lost_cache": state.lost_cache,
            "needs_sync": state.needs_sync,
            "settled_epoch": state.settled_epoch,
            "differs": any(of.any for of in self.differences),
            "failure": self.failure,
        }
