"""What both roles of a data process share: the replica on this node, and what it says of itself.

A replica that has failed stays failed until the process is started again: a failed fsync cannot be trusted
later (rule 13), and an operator has looked at the disk by then.
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
from stortrends_ha.protocol.link import PROTOCOL_VERSIONS
from stortrends_ha.replication.session import Hello, Record
from stortrends_ha.storage.backing import Backing
from stortrends_ha.storage.state import StateFile

log = logging.getLogger(__name__)


class Replica:
    """One group's volumes and state on this node."""

    def __init__(self, cluster: Cluster, group: Group, node: str) -> None:
        self.cluster = cluster
        self.group = group
        self.node = node
        self.peer = cluster.peer_of(node)
        self.executor = ThreadPoolExecutor(DISK_THREADS, thread_name_prefix="disk")
        path = cluster.nodes[node].state_dir / "groups" / f"{group.name}.json"
        initial = Record(1, group.preferred_owner, tuple(cluster.nodes))
        self.state_file = StateFile(path, group.name, initial)
        self.stores = [Backing(v.name, v.backing[node], v.size_bytes, self.executor, self.fail) for v in group.volumes]
        self.blank = False
        self.looking = ""  # why it is not known yet whether the replica is blank
        self.failure = ""
        self.on_failure: Callable[[], None] = lambda: None

    @property
    def record(self) -> Record:
        """The newest record that this node has seen."""
        return self.state_file.state.record

    @property
    def is_owner(self) -> bool:
        """Whether this node owns the group."""
        return self.record.owner == self.node

    def begin_lineage(self) -> None:
        """The owner's data gets an identity before any peer can learn of it."""
        if not self.state_file.state.lineage:
            self.state_file.update(lineage=uuid.uuid4().hex)

    async def look_if_blank(self) -> None:
        """A secondary without lineage may be filled only if there is nothing on it."""
        if self.state_file.state.lineage:
            return
        loop = asyncio.get_running_loop()
        found = []
        for store in self.stores:
            self.looking = f"{self.node} is still reading {store.path} to see whether there is nothing on it"
            found.append(await loop.run_in_executor(self.executor, store.is_blank))
        self.blank, self.looking = all(found), ""

    def hello(self, unclean: bool = False) -> Hello:
        """What this node says of itself now."""
        state = self.state_file.state
        return Hello(
            cluster=self.cluster.name,
            group=self.group.name,
            node=self.node,
            peer=self.peer.name,
            protocols=PROTOCOL_VERSIONS,
            software=__version__,
            record=state.record,
            volumes=tuple((volume.name, volume.size_bytes) for volume in self.group.volumes),
            lineage=state.lineage,
            blank=self.blank and not state.lineage,
            lost_cache=state.lost_cache,
            needs_sync=state.needs_sync,
            unclean=unclean,
        )

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
        """Flush and close; ``clean``: there are no changes that were not answered. Raises StorageError."""
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

    def status(self) -> dict[str, Any]:
        """The part of the status message that both roles share."""
        record = self.record
        return {
            "group": self.group.name,
            "epoch": record.epoch,
            "owner": record.owner,
        }
