"""The owner's process: mirrors ``dataplane.owner.Owner``, method by method, and what of ``NbdServer`` matters."""

from typing import TYPE_CHECKING

from stortrends_ha.errors import ProtocolError
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import PREFACE, Kind
from stortrends_ha.replication import session
from stortrends_ha.replication.primary import Primary
from stortrends_ha.replication.session import Hello, Plan

from .clients import ServerConnection, User
from .link import Connection, End, Talk, receive_frame, receive_preface
from .node import Node, Process

if TYPE_CHECKING:
    from .world import World


class Owner(Process):
    """See the module."""

    def __init__(self, world: "World", node: Node) -> None:
        super().__init__(world, node)
        self.input = memoryview(bytearray(world.limits["INPUT_BUFFER_BYTES"] + 8192))
        self.unclean = self.was_open
        self.primary = Primary(
            self.stores,
            node.state.record.epoch,
            window_changes=world.window_changes,
            window_bytes=world.window_bytes,
            failed=self.fail,
            synced=self._synced,
        )
        self.connections: set[ServerConnection] = set()
        self.link: End | None = None
        self.opening: End | None = None
        self.stopping = False
        self._ping = 0
        # Replica.begin_lineage
        if not node.state.lineage:
            self.update(lineage=f"lineage-{world.random.getrandbits(32)}")
        # Owner.start
        self.update(open=True)

    def applied(self, volume: int, offset: int, data: bytes) -> None:
        """For the checks."""
        self.world.history.owner_applied(volume, offset, data)

    # --- NbdServer --------------------------------------------------------------------------------

    def accept(self, user: User) -> None:
        """Mirrors ``NbdServer.negotiated``."""
        connection = ServerConnection(self, user)
        self.connections.add(connection)
        user.connection = connection
        connection.start()

    # --- The link: _keep_connected, _connect, _exchange_hello, _decide, _open --------------------------

    @property
    def wants_link(self) -> bool:
        """Whether ``_keep_connected`` would connect now."""
        return self.link is None and not self.failure and (self.opening is None or self.opening.closed)

    def connect(self, connection: Connection) -> None:
        """One turn of ``_keep_connected``; a time-out of it is a close of ``opening``."""
        self.opening = connection.ends[0]
        self.opening.talk(self._connect(self.opening))

    def _connect(self, end: End) -> Talk:
        mine = self.hello(self.unclean)
        hello = PREFACE + wire.encode_object(Kind.HELLO, mine.record.epoch, mine.encode())
        end.send([hello], len(hello))
        yield from receive_preface()
        answer = yield from receive_frame()
        if answer.kind == Kind.REFUSE:
            end.close(f"refused: {wire.decode_object(answer.payload)['reason']}")
            return
        if answer.kind != Kind.HELLO:
            raise ProtocolError("the peer did not begin with HELLO")
        theirs = Hello.decode(wire.decode_object(answer.payload))
        # _decide
        mine = self.hello(self.unclean)
        decision, why = session.plan(mine, theirs)
        self.world.note("session with %s: %s, because %s", theirs.node, decision.value, why)
        reason = session.refusal(mine, theirs, mine) or (why if decision is Plan.HOLD else "")
        if reason:
            data = wire.encode_object(Kind.REFUSE, mine.record.epoch, {"reason": reason})
            end.send([data], len(data))
            end.close(f"refused: {reason}")
            if decision is Plan.HOLD:
                self.world.count["sessions held"] += 1
                self.world.soon(self, self.world.held)
            return
        yield from self._open(end, decision is Plan.FULL)

    def _open(self, end: End, full: bool) -> Talk:
        epoch = self.node.state.record.epoch
        message = {"full": full, "first": self.primary.acked + 1, "lineage": self.node.state.lineage}
        data = wire.encode_object(Kind.OPEN, epoch, message)
        end.send([data], len(data))
        answer = yield from receive_frame(epoch)
        if answer.kind != Kind.OPENED:
            raise ProtocolError("the peer did not answer OPEN")
        if self.failure:  # meanwhile
            end.close(self.failure)
            return
        self.link, self.opening = end, None
        self.world.count["sessions, full" if full else "sessions, resumed"] += 1
        end.run(self.primary.receive, self.primary.pump, self._lost)
        if self.node.state.lost_cache:  # both lost their caches, and this copy wins
            self.world.history.go_back(self.node.disks)
        self.primary.open_session(end, full)
        self.send_ping()

    def send_ping(self) -> None:
        """Mirrors ``Owner._send_ping``."""
        if self.link is not None and not self.link.closed:
            self._ping += 1
            ping = wire.frame(Kind.PING, self.node.state.record.epoch, self._ping)
            self.link.send([ping], len(ping))

    def _lost(self, _: str) -> None:
        self.link = None
        self.primary.close_session()

    def _synced(self) -> None:
        self.unclean = False
        self.update(lost_cache=False)
        self.world.note("in sync")
        self.world.count["syncs ended"] += 1

    def on_failure(self) -> None:
        """Mirrors ``Owner._failed``."""
        self.primary.halt()
        if self.link is not None:
            end = self.link
            self.world.soon(self, lambda: end.close("this node's disk failed"))

    # --- The end: Owner.stop ------------------------------------------------------------------------

    def begin_stop(self) -> None:
        """Listen no more, take no more; then requests under way are finished."""
        self.stopping = True
        self.primary.stop_taking()

    def end_stop(self, in_time: bool) -> None:
        """The rest of ``Owner.stop``, once all is answered or the time is up."""
        if in_time and self.primary.connected and not self.primary.idle:
            return
        for connection in list(self.connections):
            connection.close()
        if self.opening is not None:
            self.opening.close("this node stops")
        clean = self.primary.idle and self.primary.resync is None and not self.unclean and not self.failure
        if self.link is not None:
            self.link.close("this node stops")
        self.close(clean)
