"""The data process of a group while this node is its secondary: listens for the owner and applies its stream.

Order that matters: what a session needs is durable before OPENED is sent (``replication.opening``), so before anything
of it is applied. One session at a time: a new one ends the old one first, so nothing of two can mix.
Now and then it looks whether clients could connect if it owned, so that nothing is handed over to where they cannot;
not where the owner is on the same machine, as it has the address then.
Rule 4: after ``stop`` nothing more is applied or acknowledged, by whatever connection. What was applied stays: if this
node takes over, what the owner never had answered may be there, as a client that got no answer must expect.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from stortrends_ha.config import Address, on_one_machine
from stortrends_ha.errors import OrderError, ProtocolError, SessionRefusedError, StartError, StorageError
from stortrends_ha.limits import COMPARE_GRAIN_BYTES
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Endpoint, Kind, Verdict
from stortrends_ha.record import Record
from stortrends_ha.replication import opening
from stortrends_ha.replication.secondary import Secondary
from stortrends_ha.replication.session import Hello, Plan, diverged

from .commands import EndVerify, Verify
from .comparison import Comparison
from .exhibit import Exhibit
from .link_socket import LinkSocket, carry_out
from .replica import Replica
from .report import Status, base, link_status
from .sockets import set_up, tcp_listener, tcp_obstacle
from .verifying import Asking
from .watch import end_with

log = logging.getLogger(__name__)

_BAD_INPUT_REPORT_S = 10.0
_OPENING_AT_MOST = 8  # connections that have not opened a session yet
_LISTEN_AGAIN_S = 0.05
_LOOK_S = 1.0


class Follower:
    """The secondary's side of one group, by one record after the other. Implements ``replication.opening.Joiner``."""

    def __init__(self, replica: Replica, record: Record, changed: Callable[[], None]) -> None:
        self._replica = replica
        self.record = record
        self._changed = changed
        self._limits = replica.cluster.limits
        self._loop = asyncio.get_running_loop()
        replica.on_failure = self._failed
        self._link: LinkSocket | None = None
        self._opened: opening.Joined | None = None
        self._why = ""
        self._refused = False
        self._next_report_s = 0.0
        self._opening: set[asyncio.Task[None]] = set()
        node = replica.cluster.nodes[replica.node]
        self._address = Address(node.address, replica.group.link_ports[replica.node])
        self._listener: socket.socket | None = None
        self._listen_again: asyncio.TimerHandle | None = None
        self._cannot_listen = ""
        self._look_again: asyncio.TimerHandle | None = None
        self._asking = Asking(replica, changed)
        self._no_clients = ""  # why none could connect if this node owned
        self._ending = False  # this node ends the session on purpose
        self._blank = False  # it was when the session began
        self._owner: Hello | None = None  # as it was met last, by this record
        self._comparison: Comparison | None = None
        self._exhibit: Exhibit | None = None
        self._comparing: asyncio.Task[None] | None = None  # a connection on which it goes on

    # --- Commands -----------------------------------------------------------------------------

    def start(self) -> None:
        """Listen for the owner: now, or as soon as that is possible."""
        self._listen()
        if not on_one_machine(self._replica.cluster):
            self._look_for_clients()

    def _listen(self) -> None:
        self._listen_again = None
        try:
            self._listener = tcp_listener(self._address.host, self._address.port, "the link")
        except StartError as e:
            if not self._cannot_listen:
                log.warning("group %s: %s; trying again", self._replica.group.name, e)
            self._cannot_listen = str(e)
            self._listen_again = self._loop.call_later(_LISTEN_AGAIN_S, self._listen)
        else:
            self._cannot_listen = ""
            self._loop.add_reader(self._listener.fileno(), self._accept)
        self._changed()

    def _look_for_clients(self) -> None:
        group, before = self._replica.group, self._no_clients
        self._no_clients = tcp_obstacle(group.nbd.host, group.nbd.port, "NBD")
        self._look_again = self._loop.call_later(_LOOK_S, self._look_for_clients)
        if self._no_clients != before:
            if self._no_clients:
                log.warning("group %s: this node could not serve clients: %s", group.name, self._no_clients)
            self._changed()

    def follow(self, record: Record) -> None:
        """Rule 6: from now on sessions are for exactly this record."""
        if record != self.record:
            self._end_compare(f"the record has changed: {record}")
            self._end_sessions(f"the record has changed: {record}")
            self.record, self._why, self._refused, self._owner = record, "", False, None

    def give_up(self) -> None:
        """The operator does not need what is here: let the owner overwrite it. Raises OrderError, StorageError."""
        mine, owner = self.hello(), self._met(complete=True)
        if diverged(mine, owner):
            raise OrderError(f"{owner.node} and {mine.node} have no common history")
        self._replica.give_up(owner.lineage)
        log.warning("group %s: its operator gives up what is here for the data of %s", mine.group, owner.node)
        self._end_sessions("its copy was given up")

    def compare(self, keep: bool) -> None:
        """Begin to find out where this replica and the owner's differ, which have no common history; ``keep``: and to
        keep that in a file, and give this one up. Raises OrderError."""
        mine, owner = self.hello(), self._met(complete=keep)
        if not diverged(mine, owner):
            raise OrderError(f"{owner.node} and {mine.node} have a common history")
        if self._comparison is not None and self._comparison.running:
            raise OrderError("a comparison is under way already")
        self._comparison = Comparison(self._replica, keep)

    def show(self, address: Address) -> None:
        """Serve the volumes read-only at this address, or go on with that. Raises OrderError."""
        if self._link is not None:
            raise OrderError(f"{self._replica.node} mirrors {self.record.owner} now, which serves the same data")
        if self._exhibit is not None and self._exhibit.address == address and self._exhibit.shown:
            self._exhibit.renew()
            return
        self._end_exhibit()
        self._exhibit = Exhibit(self._replica, self.record.epoch, address)

    def _end_exhibit(self) -> None:
        if self._exhibit is not None:
            self._exhibit.end()
            self._exhibit = None

    def end_inspection(self, why: str) -> None:
        """End what the operator looks at: comparison and exhibit. Nothing of this replica has been changed by them."""
        self._end_exhibit()
        self._end_compare(why)

    def _end_compare(self, why: str) -> None:
        if self._comparing is not None:
            self._comparing.cancel()
        if self._comparison is not None:
            self._comparison.fail(why)

    def _met(self, *, complete: bool) -> Hello:
        """The owner, as it was met last; ``complete``: it has to be that, as the last good copy may be here (rule 10).
        Raises OrderError."""
        if reason := self.obstacle():
            raise OrderError(reason)
        if self._owner is None or not self._owner.lineage:
            raise OrderError(f"{self.record.owner} has not connected to {self._replica.node} yet")
        if complete and (self._owner.needs_sync or self._owner.lost_cache):
            raise OrderError(f"the copy of {self._owner.node} is not complete itself")
        return self._owner

    def verify(self, command: Verify | EndVerify, answer: Callable[[str], None]) -> None:
        """See ``Roles``."""
        self._asking.ask(command, self._link, self.record.epoch, answer)

    def stop(self) -> None:
        """Rule 4: stop listening, end the session; nothing more is applied or acknowledged."""
        if self._listen_again is not None:
            self._listen_again.cancel()
        if self._look_again is not None:
            self._look_again.cancel()
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        self.end_inspection("this node follows no more")
        self._end_sessions("this node follows no more")

    def _end_sessions(self, why: str) -> None:
        for task in list(self._opening):
            task.cancel()
        if self._link is not None:
            self._ending = True
            self._link.close(why)
            self._ending = False

    # --- Opening ------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as e:
            log.warning("cannot accept a connection of the link: %s", e.strerror)
            return
        if len(self._opening) >= _OPENING_AT_MOST:
            self._replica.link_counters.refusals += 1
            sock.close()
            return
        set_up(sock)
        task = end_with(asyncio.create_task(self._open(sock)))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, sock: socket.socket) -> None:
        """Compare notes with whoever connected, and open the session that it asks for."""
        try:
            async with asyncio.timeout(self._limits.link_timeout_s):
                agreed = await carry_out(sock, opening.as_secondary(self))
            if isinstance(agreed, opening.Joined):
                self._open_session(sock, agreed)
            else:
                await self._inspect(sock, agreed)
            return
        except SessionRefusedError as e:
            self._refused_because(str(e), e.passing)
        except ProtocolError as e:
            self._replica.link_counters.bad_input += 1
            self._report_bad_input(sock, e)
        except (OSError, TimeoutError):
            pass
        except StorageError as e:
            self._replica.fail(e)
        except asyncio.CancelledError:
            sock.close()
            raise
        sock.close()

    def hello(self) -> Hello:
        """See ``Joiner``."""
        inspects = self._comparison is not None and self._comparison.wanted
        return self._replica.hello(self.record, inspects=inspects)

    def obstacle(self) -> str:
        """See ``Joiner``."""
        return self._replica.failure or self._replica.looking

    def met(self, owner: Hello) -> None:
        """See ``Joiner``."""
        if self._link is None:  # else it is known, and this may be anybody
            self._owner = owner

    def begin(self, lineage: str, plan: Plan, fill: str) -> None:
        """See ``Joiner``."""
        if self._link is not None:
            self._link.close("the owner has connected anew")
        self._end_exhibit()  # what it shows would change
        self._blank = self.hello().blank
        self._replica.begin_to_follow(lineage, plan, fill)

    def _open_session(self, sock: socket.socket, joined: opening.Joined) -> None:
        """In the same turn as ``begin``."""
        link = LinkSocket(sock, lambda: None, self._lost, self._limits.link_timeout_s)
        epoch = self.record.epoch
        session = Secondary(
            self._replica.stores,
            epoch,
            link,
            joined.first,
            self._synced,
            self._clients,
            self._compared,
            self._asking.hear,
        )
        self._link, self._opened, self._owner = link, joined, joined.theirs
        self._replica.link_counters.sessions += 1
        self._why, self._refused = "", False
        link.run(lambda view, end: self._receive(session, view, end), lambda: session.behind)
        link.send([joined.opened], len(joined.opened))
        if joined.plan is not Plan.RESUME:
            self._send_regions(link)
        group, why = self._replica.group.name, "" if joined.plan is Plan.RESUME else f", to {joined.plan.value}"
        log.info("group %s: session with the owner %s at epoch %d%s", group, joined.theirs.node, epoch, why)
        self._changed()

    async def _inspect(self, sock: socket.socket, agreed: opening.Inspected) -> None:
        """There can be no session, but the owner lets this node compare."""
        comparison = self._comparison
        if comparison is None or not comparison.wanted:  # it has ended meanwhile
            sock.close()
            return
        self._comparing = asyncio.current_task()
        try:
            await comparison.run(sock, self.record.epoch, agreed)
        finally:
            self._comparing = None
            self._changed()

    def _send_regions(self, link: LinkSocket) -> None:
        """Rule 9: what this node knows that may differ."""
        epoch = self.record.epoch
        for volume, differences in enumerate(self._replica.differences):
            for message in wire.encode_regions(epoch, volume, differences.ranges()):
                link.send([message], len(message))
        message = wire.end_of_regions(epoch, self._blank)
        link.send([message], len(message))

    def _report_bad_input(self, sock: socket.socket, error: ProtocolError) -> None:
        """Log it, but not each connection of somebody who makes many."""
        if self._loop.time() < self._next_report_s:
            return
        self._next_report_s = self._loop.time() + _BAD_INPUT_REPORT_S
        group, count = self._replica.group.name, self._replica.link_counters.bad_input
        with contextlib.suppress(OSError):
            host = sock.getpeername()[0]
            log.warning(
                "group %s: a link connection from %s was closed (bad input, %d so far): %s", group, host, count, error
            )

    def _refused_because(self, reason: str, passing: bool) -> None:
        """A session was refused, by this node or by the owner."""
        if passing:
            return
        if reason != self._why:
            log.warning("group %s: a session was refused: %s", self._replica.group.name, reason)
        if self._link is None:
            self._why, self._refused = reason, True
            self._changed()

    # --- The session --------------------------------------------------------------------------

    def _receive(self, session: Secondary, view: memoryview, end: int) -> int:
        if self._replica.failure:
            return end
        try:
            return session.receive(view, end)
        except StorageError as e:
            self._replica.server_counters.disk_errors += 1
            self._replica.fail(e)
            return end

    def _synced(self) -> None:
        self._replica.synced()
        log.info("group %s: this replica has everything that the owner has", self._replica.group.name)
        self._changed()

    def _clients(self, endpoints: list[Endpoint]) -> None:
        self._replica.endpoints = endpoints[: self._limits.connections]
        self._changed()  # told before the session ends: these may be its last words

    def _compared(self, volume: int, offset: int, length: int, verdict: Verdict) -> None:
        """By a verify. What cannot be read is not told before it is known where."""
        self._replica.compared(volume, offset, length, verdict)
        if verdict is Verdict.UNREADABLE and length <= COMPARE_GRAIN_BYTES:
            self._replica.server_counters.disk_errors += 1
            store = self._replica.stores[volume]
            log.error("volume %s: cannot read %d bytes at %d of %s", store.volume, length, offset, store.path)

    def _lost(self, why: str) -> None:
        if self._link is not None:
            self._replica.link_counters.bad_input += self._link.bad_input
        self._link = None
        self._asking.lost()
        self._why = why
        level = logging.INFO if self._ending else logging.WARNING
        log.log(level, "group %s: the session with the owner has ended: %s", self._replica.group.name, why)
        self._changed()

    def _failed(self) -> None:
        """Tell the owner why, then end the session: nothing more is applied or acknowledged."""
        link = self._link
        if link is not None:
            message = wire.encode_object(Kind.FAILED, self.record.epoch, {"reason": self._replica.failure})
            link.send([message], len(message))
            link.close("this node's disk failed")
        self._changed()

    # --- Status -------------------------------------------------------------------------------

    def status(self) -> Status:
        """The status message, without its type."""
        state, why = self._state()
        connected = self._link is not None
        words = "connected" if connected else "refused" if self._refused else "listening"
        link = link_status(self._replica, words, str(self._address), self._why)
        if self._opened is not None:
            link["protocol"], link["peer_version"] = self._opened.protocol, self._opened.theirs.software
        return {
            **base(self._replica, self.record),
            "role": "secondary",
            "session": connected,
            "cannot_listen": self._no_clients,
            "owner_lineage": self._owner.lineage if self._owner else "",
            "comparison": self._comparison.status() if self._comparison else None,
            "state": state,
            "why": why,
            "link": link,
            "verify": self._asking.status(),
        }

    def _state(self) -> tuple[str, str]:
        owner = self.record.owner
        if self._replica.failure:
            mend = "mend the disk, it is tried again now and then; after a replacement: stortrends-ha volume replace"
            return "failed", f"{self._replica.failure}; {mend}"
        if self._cannot_listen:
            return "held", self._cannot_listen
        if self._refused:
            return "held", f"a session was refused: {self._why}"
        if self._link is None:
            return "connecting", f"waiting for the owner {owner} to connect" + (f" ({self._why})" if self._why else "")
        if self._replica.state_file.state.needs_sync:
            return "syncing", f"what differs is being copied from {owner}"
        if self._replica.node not in self.record.in_sync:
            return "syncing", f"it has everything that {owner} has and is about to be added"
        if self._no_clients:
            return "in-sync", f"it could not serve clients if it owned: {self._no_clients}"
        return "in-sync", ""
