"""The secondary's process: mirrors ``dataplane.follower.Follower``; what it agrees to is ``replication.opening``."""

from typing import TYPE_CHECKING

from stortrends_ha.errors import StorageError
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Kind
from stortrends_ha.record import Record
from stortrends_ha.replication import opening
from stortrends_ha.replication.opening import Joined
from stortrends_ha.replication.secondary import Secondary

from .checks import Violation
from .link import Connection, End
from .node import Node, Process

if TYPE_CHECKING:
    from .world import World


class Follower(Process):
    """See the module. Implements ``opening.Joiner``."""

    def __init__(self, world: "World", node: Node, record: Record) -> None:
        super().__init__(world, node, record)
        self.link: End | None = None
        self._receiving: End | None = None
        # Replica.look_if_blank
        if not node.state.lineage:
            self.blank = not any(any(disk.data) for disk in node.disks)

    def applied(self, volume: int, offset: int, data: bytes) -> None:
        """For the checks: nothing but the current session may change the replica (rule 6)."""
        if self._receiving is not self.link or self.link is None:
            raise Violation("the secondary applies a change of a session that has ended (rule 6)")
        self.world.history.secondary_applied(volume, offset, data)

    def follow(self, record: Record) -> None:
        """Mirrors ``follow``."""
        if record != self.record:
            for end in self.ends():
                end.close(f"the record has changed: {record}")
            self.record = record

    # --- Opening ------------------------------------------------------------------------------------

    def accept(self, connection: Connection) -> None:
        """Mirrors ``_accept`` and ``_open``."""
        end = connection.ends[1]
        end.talk(opening.as_secondary(self), lambda joined: self._open_session(end, joined))

    def obstacle(self) -> str:
        """See ``Joiner``."""
        return self.failure

    def begin(self, lineage: str, full: bool) -> None:
        """See ``Joiner``."""
        if self.link is not None:
            self.link.close("the owner has connected anew")
        self.begin_state(lineage=lineage, needs_sync=full)

    def _open_session(self, end: End, joined: Joined) -> None:
        secondary = Secondary(self.stores, self.record.epoch, end, joined.first, self._synced)
        self.link = end
        end.run(
            lambda view, length: self._receive(end, secondary, view, length),
            lambda: None,
            self._lost,
            lambda: secondary.behind,
        )
        end.send([joined.opened], len(joined.opened))

    # --- The session --------------------------------------------------------------------------------

    def _receive(self, end: End, secondary: Secondary, view: memoryview, length: int) -> int:
        if self.failure:
            return length
        self._receiving = end
        try:
            return secondary.receive(view, length)
        except StorageError as e:
            self.fail(e)
            return length
        finally:
            self._receiving = None

    def _synced(self) -> None:
        self.update(needs_sync=False, lost_cache=False, open=False)
        self.unclean = False
        self.world.count["syncs ended"] += 1

    def _lost(self, _: str) -> None:
        self.link = None

    def on_failure(self) -> None:
        """Mirrors ``Follower._failed``."""
        end = self.link
        if end is not None:
            message = wire.encode_object(Kind.FAILED, self.record.epoch, {"reason": self.failure})
            end.send([message], len(message))
            end.close("this node's disk failed")

    def stop(self) -> None:
        """Mirrors ``Follower.stop``."""
        for end in self.ends():
            end.close("this node stops")
        self.close(clean=not (self.failure or self.unclean))
