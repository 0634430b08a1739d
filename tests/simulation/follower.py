"""The secondary's process: mirrors ``dataplane.follower.Follower``, method by method."""

from typing import TYPE_CHECKING, Any

from stortrends_ha.errors import ProtocolError, StorageError
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import PREFACE, Kind
from stortrends_ha.replication import session
from stortrends_ha.replication.secondary import Secondary
from stortrends_ha.replication.session import Hello

from .checks import Violation
from .link import Connection, End, Talk, receive_frame, receive_preface
from .node import Node, Process

if TYPE_CHECKING:
    from .world import World


class Follower(Process):
    """See the module."""

    def __init__(self, world: "World", node: Node) -> None:
        super().__init__(world, node)
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

    def accept(self, connection: Connection) -> None:
        """Mirrors ``_accept`` and ``_open``."""
        end = connection.ends[1]
        end.talk(self._negotiate(end))

    def _negotiate(self, end: End) -> Talk:
        yield from receive_preface()
        frame = yield from receive_frame()
        if frame.kind != Kind.HELLO:
            raise ProtocolError("it did not begin with HELLO")
        theirs = Hello.decode(wire.decode_object(frame.payload))
        mine = self.hello()
        reason = self.failure or session.refusal(mine, theirs, theirs)
        if reason:
            data = PREFACE + wire.encode_object(Kind.REFUSE, self.node.state.record.epoch, {"reason": reason})
            end.send([data], len(data))
            self.world.count["sessions refused"] += 1
            end.close(f"refused: {reason}")
            return
        epoch = theirs.record.epoch
        data = PREFACE + wire.encode_object(Kind.HELLO, epoch, mine.encode())
        end.send([data], len(data))
        frame = yield from receive_frame(epoch)
        if frame.kind == Kind.REFUSE:
            end.close("refused by the owner")
            return
        if frame.kind != Kind.OPEN:
            raise ProtocolError("OPEN did not follow HELLO")
        self._open_session(end, theirs, wire.decode_object(frame.payload))

    def _open_session(self, end: End, theirs: Hello, message: dict[str, Any]) -> None:
        first, full, lineage = message["first"], message["full"], message["lineage"]
        mine = self.hello()
        if self.failure or session.refusal(mine, theirs, theirs):
            raise ProtocolError("an OPEN that has been overtaken by another session, or by a failure of this replica")
        if lineage != theirs.lineage or not session.may_follow(mine, lineage, full):
            raise ProtocolError("a session that this replica must not have")
        if self.link is not None:
            self.link.close("the owner has connected anew")
        self.update(record=theirs.record, lineage=lineage, open=True, needs_sync=full)
        secondary = Secondary(self.stores, theirs.record.epoch, end, first, self._synced)
        self.link = end
        end.run(
            lambda view, length: self._receive(end, secondary, view, length),
            lambda: None,
            self._lost,
            lambda: secondary.behind,
        )
        opened = wire.frame(Kind.OPENED, theirs.record.epoch)
        end.send([opened], len(opened))

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
        self.update(needs_sync=False, lost_cache=False)
        self.world.history.synced()

    def _lost(self, _: str) -> None:
        self.link = None

    def on_failure(self) -> None:
        """Mirrors ``Follower._failed``."""
        end = self.link
        if end is not None:
            message = wire.encode_object(Kind.FAILED, self.node.state.record.epoch, {"reason": self.failure})
            end.send([message], len(message))
            end.close("this node's disk failed")

    def stop(self) -> None:
        """Mirrors ``Follower.stop``."""
        for end in self.ends():
            end.close("this node stops")
        self.close(clean=not self.failure)
