"""One group's replica on this node: its volumes and its durable state, open whatever the role is.

A replica that has failed stays failed until the process is started again: a failed fsync cannot be trusted
later (rule 13), and an operator has looked at the disk by then.

What a death leaves (``storage.state``), by step:
- ``open`` is durable before an owner can apply a change, and taken back after a release or an orderly stop, when both
  replicas have the same: who finds it at a start was killed while it owned, and is ``unclean``.
- ``unclean`` ends when the record has this node alone (a full sync follows), or when it has been synced itself.
- ``needs_sync`` is durable before a full sync overwrites anything, and is taken back, together with ``lost_cache`` and
  ``open``, when the owner says that all is copied and flushed here: before that is answered.
- ``backings`` is durable with the lineage: a state that is found beside other files than those (a disk that was not
  mounted, or was replaced) says nothing of them (rules 3 and 10). It stays as it is until they are led or filled.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stortrends_ha import __version__
from stortrends_ha.config import Cluster, Group
from stortrends_ha.errors import StorageError, SyncFailedError
from stortrends_ha.limits import DISK_THREADS
from stortrends_ha.protocol.link import PROTOCOL_VERSIONS, Endpoint
from stortrends_ha.record import Record
from stortrends_ha.replication.session import Hello
from stortrends_ha.storage.backing import Backing
from stortrends_ha.storage.state import StateFile

from .export import LinkCounters, ServerCounters, VolumeCounters

log = logging.getLogger(__name__)


class Replica:
    """One group's volumes and state on this node, and what is counted of it over all roles."""

    def __init__(self, cluster: Cluster, group: Group, node: str) -> None:
        self.cluster = cluster
        self.group = group
        self.node = node
        self.peer = cluster.peer_of(node)
        self.executor = ThreadPoolExecutor(DISK_THREADS, thread_name_prefix="disk")
        path = cluster.nodes[node].state_dir / "groups" / f"{group.name}.json"
        self.state_file = StateFile(path, group.name)
        known = bool(self.state_file.state.lineage)
        self.stores = [
            Backing(v.name, v.backing[node], v.size_bytes, self.executor, self.fail, had_data=known)
            for v in group.volumes
        ]
        self._backings = {store.volume: store.identity for store in self.stores}
        if replaced := ", ".join(str(store.path) for store in self.stores if self._is_replaced(store)):
            log.error("group %s: %s: not the files that had its data; see `stortrends-ha status`", group.name, replaced)
        self.unclean = self.state_file.state.open
        self.blank = False
        self.looking = ""  # why it is not known yet whether the replica is blank
        self.failure = ""
        self.on_failure: Callable[[], None] = lambda: None
        self.server_counters = ServerCounters()
        self.link_counters = LinkCounters()
        self.volume_counters = [VolumeCounters() for _ in group.volumes]
        self.endpoints: list[Endpoint] = []  # of the owner's clients, as the owner told last

    def _is_replaced(self, store: Backing) -> bool:
        before = self.state_file.state.backings.get(store.volume)
        return bool(before and store.identity) and before != store.identity

    @property
    def lineage(self) -> str:
        """The identity of the data; empty if these volumes have none that is known."""
        return "" if any(map(self._is_replaced, self.stores)) else self.state_file.state.lineage

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

    def begin_to_lead(self, record: Record, forced: bool, clears_loss: bool) -> None:
        """Durable before any change: that this node owns, and the data's identity. Raises StorageError."""
        changes: dict[str, Any] = {"open": True, "backings": self._backings}
        if forced or not self.lineage:
            changes["lineage"] = uuid.uuid4().hex
        if forced or clears_loss:
            changes["lost_cache"] = False
        if forced:
            changes["needs_sync"] = False
        if self.unclean:  # what was never answered may rest in the cache, and be read, before it is flushed again
            changes["settled_epoch"] = 0
        self.state_file.begin(**changes)
        if record.alone:
            self.unclean = False

    def end_to_lead(self) -> None:
        """Both replicas have the same, stable, and nothing is under way. Raises StorageError."""
        self.state_file.update(open=False)

    def settled(self, epoch: int) -> None:
        """Rule 1: everything that was cached before this node went alone is stable."""
        try:
            self.state_file.update(settled_epoch=epoch)
        except StorageError as e:
            self.fail(e)

    def begin_to_follow(self, lineage: str, full: bool) -> None:
        """Durable before anything of a session is applied. Raises StorageError."""
        self.state_file.begin(lineage=lineage, needs_sync=full, backings=self._backings)

    def synced(self) -> None:
        """Rule 9: all is copied and flushed here; durable when this returns. Raises StorageError."""
        self.state_file.update(needs_sync=False, lost_cache=False, open=False)
        self.unclean = False

    async def look_if_blank(self) -> None:
        """A secondary without lineage may be filled only if there is nothing on it."""
        if self.lineage:
            return
        loop = asyncio.get_running_loop()
        found = []
        for store in self.stores:
            self.looking = f"{self.node} is still reading {store.path} to see whether there is nothing on it"
            found.append(await loop.run_in_executor(self.executor, store.is_blank))
        self.blank, self.looking = all(found), ""

    def hello(self, record: Record, unclean: bool = False) -> Hello:
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
            unclean=self.unclean or unclean,
        )

    # --- The end ------------------------------------------------------------------------------

    def fail(self, error: StorageError) -> None:
        """The disk failed: this replica is out until the process is started again."""
        log.error("group %s: this node's replica has failed: %s", self.group.name, error)
        if isinstance(error, SyncFailedError):  # the kernel may have dropped what was acknowledged: as after a reboot
            with contextlib.suppress(StorageError):
                self.state_file.update(lost_cache=True)
        if not self.failure:
            self.failure = str(error)
            self.on_failure()

    def close(self, clean: bool) -> None:
        """Flush and close; ``clean``: there are no changes that only this node has. Raises StorageError."""
        self.executor.shutdown()
        try:
            for store in self.stores:
                store.flush_now()
        except SyncFailedError as e:
            self.fail(e)
            raise
        flushed = {} if self.failure else {"boot_id": ""}  # nothing is only cached any more
        self.state_file.update(**flushed, **({"open": False} if clean else {}))
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
            "unclean": self.unclean,
            "failure": self.failure,
        }
