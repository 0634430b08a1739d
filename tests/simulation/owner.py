"""The owner's process: mirrors ``dataplane.owner.Owner`` and ``owner_link``, and what of ``NbdServer`` matters.

The decisions of opening a session and of what is answered when are production code; here is only the shell.
"""

from typing import TYPE_CHECKING

from stortrends_ha.errors import PeerUnfitError, SessionRefusedError
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Kind
from stortrends_ha.record import Record
from stortrends_ha.replication import opening
from stortrends_ha.replication.opening import Opened
from stortrends_ha.replication.primary import Primary
from stortrends_ha.replication.session import Hello

from .clients import ServerConnection, User
from .link import Connection, End
from .node import Node, Process

if TYPE_CHECKING:
    from .world import World


class Owner(Process):
    """See the module. Implements ``opening.Opener``."""

    def __init__(self, world: "World", node: Node, record: Record) -> None:
        super().__init__(world, node, record)
        self.input = memoryview(bytearray(world.limits["INPUT_BUFFER_BYTES"] + 8192))
        self.connections: set[ServerConnection] = set()
        self.link: End | None = None
        self.opening: End | None = None
        self.stopping = False
        self.unfit = ""
        self._ping = 0
        # Replica.begin_to_lead
        lineage = node.state.lineage or f"lineage-{world.random.getrandbits(32)}"
        settled_epoch = 0 if self.unclean else node.state.settled_epoch
        self.begin_state(open=True, lineage=lineage, lost_cache=False, settled_epoch=settled_epoch)
        self.unclean = self.unclean and not record.alone
        self.primary = Primary(
            self.stores,
            record.epoch,
            alone=record.alone,
            window_changes=world.window_changes,
            window_bytes=world.window_bytes,
            failed=self.fail,
            settled=self._settled,
        )

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

    # --- Commands -----------------------------------------------------------------------------------

    def lead(self, record: Record) -> None:
        """Mirrors ``Roles._lead`` and ``Owner.lead``."""
        self.unclean = self.unclean and not record.alone
        if record != self.record or self.primary.held:
            self._disconnect(f"the record has changed: {record}")
            self.record = record
            self.primary.change_record(record.epoch, record.alone)
        elif not self.primary.joinable:
            self.primary.unlock()

    def _disconnect(self, why: str) -> None:
        self.unfit = ""
        if self.opening is not None:
            self.opening.close(why)
        if self.link is not None:
            self.link.close(why)

    def _settled(self, epoch: int) -> None:
        self.update(settled_epoch=epoch)
        self.world.count["settled"] += 1

    @property
    def peer_unfit(self) -> bool:
        """Mirrors ``_peer_unfit``."""
        return not self.record.alone and bool(self.unclean or self.primary.ahead or self.unfit)

    # --- The link: OwnerLink ------------------------------------------------------------------------

    @property
    def wants_link(self) -> bool:
        """Whether ``_keep_connected`` would connect now."""
        idle = self.link is None and (self.opening is None or self.opening.closed)
        return idle and not (self.failure or self.primary.held)

    def connect(self, connection: Connection) -> None:
        """One turn of ``_keep_connected``; a time-out of it is a close of ``opening``."""
        end = self.opening = connection.ends[0]
        end.talk(opening.as_owner(self), lambda opened: self._open(end, opened))

    def hello(self) -> Hello:
        """Mirrors ``OwnerLink.hello``."""
        unclean, self.unclean = self.unclean, self.unclean or self.primary.ahead
        try:
            return super().hello()
        finally:
            self.unclean = unclean

    def first(self) -> int:
        """See ``Opener``."""
        return self.primary.acked + 1

    def refused(self, error: SessionRefusedError) -> None:
        """Mirrors ``_keep_connected``."""
        self.unfit = str(error) if isinstance(error, PeerUnfitError) else ""
        super().refused(error)

    def _open(self, end: End, opened: Opened) -> None:
        if self.failure:  # meanwhile
            end.close(self.failure)
            return
        self.link, self.opening, self.unfit = end, None, ""
        self.world.count["sessions, full" if opened.full else "sessions, resumed"] += 1
        self.world.note("session at epoch %d: %s, because %s", self.record.epoch, opened.full, opened.why)
        end.run(self.primary.receive, self.primary.pump, self._lost)
        self.primary.open_session(end, opened.full)
        self.send_ping()

    def send_ping(self) -> None:
        """Mirrors ``OwnerLink._send_ping``."""
        if self.link is not None and not self.link.closed:
            self._ping += 1
            ping = wire.frame(Kind.PING, self.record.epoch, self._ping)
            self.link.send([ping], len(ping))

    def _lost(self, _: str) -> None:
        self.link = None
        self.primary.close_session()

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
        if in_time and (self.record.alone or self.primary.connected) and not self.primary.idle:
            return
        for connection in list(self.connections):
            connection.close()
        clean = self.primary.idle and not (self.unclean or self.primary.ahead or self.failure)
        self._disconnect("this node stops")
        self.close(clean)
