"""A node: what of it survives a process and what a power loss, and what owner and follower processes share.

``Process`` mirrors ``dataplane.replica.Replica`` and ``storage.state.StateFile``; it acts for the record it is told.
A process is killed by raising ``Killed`` out of any call that the code under test makes to the world: ``point`` is in
all of them.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stortrends_ha.errors import SessionRefusedError, StorageError, SyncFailedError
from stortrends_ha.record import Record
from stortrends_ha.replication.session import Hello
from stortrends_ha.storage.state import ReplicaState

from .disk import Disk, Store
from .link import End

if TYPE_CHECKING:
    from .world import World


class Killed(BaseException):
    """The process that is running is killed here."""


class Node:
    """One of the two machines."""

    def __init__(self, world: "World", name: str, disks: list[Disk]) -> None:
        self.world = world
        self.name = name
        self.disks = disks
        self.boot = 1
        self.state = ReplicaState()  # durable
        self.process: Process | None = None
        self.faults: dict[str, int] = {}  # kind of store error -> how many more calls go well
        self.kill_in: int | None = None  # how many more calls the process makes before it is killed

    def fault_is_due(self, kind: str) -> bool:
        """Whether this call of the store fails."""
        if kind not in self.faults:
            return False
        self.faults[kind] -= 1
        if self.faults[kind] >= 0:
            return False
        del self.faults[kind]
        self.world.happened(f"{self.name}: {kind} error")
        return True

    @property
    def lost_cache(self) -> bool:
        """Whether its replica may lack acknowledged writes, as the next start will find or has found."""
        return self.state.lost_cache or self.state.boot_id not in ("", str(self.boot))

    @property
    def in_sync(self) -> bool:
        """Whether the secondary could take over."""
        by_record = self.name in self.world.record.in_sync
        return by_record and bool(self.state.lineage) and not (self.state.needs_sync or self.lost_cache)


class Process:
    """A data process."""

    input = memoryview(b"")

    def __init__(self, world: "World", node: Node, record: Record) -> None:
        self.world = world
        self.node = node
        self.record = record
        self.alive = True
        self.failure = ""
        self.blank = False
        # StateFile.__init__
        self.unclean = node.state.open
        if node.state.boot_id not in ("", str(node.boot)):
            self.update(lost_cache=True, boot_id=str(node.boot))
        self.stores = [Store(self, volume) for volume in range(len(node.disks))]

    def point(self) -> None:
        """The process may be killed here."""
        node = self.node
        if node.kill_in is not None:
            node.kill_in -= 1
            if node.kill_in < 0:
                node.kill_in = None
                raise Killed

    def applied(self, volume: int, offset: int, data: bytes) -> None:
        """A store has applied a change."""
        raise NotImplementedError

    def update(self, **changes: Any) -> None:
        """Mirrors ``StateFile.update``."""
        self.point()
        self.node.state = replace(self.node.state, **changes)
        self.point()

    def begin_state(self, **changes: Any) -> None:
        """Mirrors ``StateFile.begin``."""
        self.update(boot_id=str(self.node.boot), **changes)

    def hello(self) -> Hello:
        """Mirrors ``Replica.hello``."""
        state = self.node.state
        return Hello(
            cluster="c", group="g", node=self.node.name, peer=self.world.peer_of(self.node).name,
            protocols=(1, 1), software="0", record=self.record,
            volumes=tuple((f"v{number}", disk.size_bytes) for number, disk in enumerate(self.node.disks)),
            lineage=state.lineage, blank=self.blank and not state.lineage,
            lost_cache=state.lost_cache, needs_sync=state.needs_sync, unclean=self.unclean,
        )  # fmt: skip

    def fail(self, error: StorageError) -> None:
        """Mirrors ``Replica.fail``."""
        self.world.note("%s: failed: %s", self.node.name, error)
        if isinstance(error, SyncFailedError):
            self.node.kill_in = None  # a kill before this is durable cannot be told from a success of the sync
            self.update(lost_cache=True)
        if not self.failure:
            self.failure = str(error)
            self.on_failure()

    def on_failure(self) -> None:
        """The role's part of ``fail``."""
        raise NotImplementedError

    def refused(self, error: SessionRefusedError) -> None:
        """A session was refused, by this node or its peer."""
        self.world.note("%s: session refused: %s", self.node.name, error)
        self.world.count["sessions refused" + ", for the moment" * error.passing] += 1

    def close(self, clean: bool) -> None:
        """Mirrors ``Replica.close``, and the end of the process: an error ends it, too."""
        try:
            for store in self.stores:
                store.flush_now()
            boot_id = self.node.state.boot_id if self.failure else ""
            self.update(**({"open": False} if clean else {}), boot_id=boot_id)
        except SyncFailedError as e:
            self.fail(e)
        self.world.ended(self)

    def ends(self) -> list[End]:
        """Its ends of all connections that are not over."""
        return [end for connection in self.world.connections for end in connection.ends if end.process is self]
