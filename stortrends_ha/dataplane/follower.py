"""The data process of a group on the node that does not own it: listens for the owner and applies its stream.

Order that matters: lineage, record, ``open`` and ``needs_sync`` are durable before OPENED is sent, so before
anything of the session is applied; ``needs_sync`` is taken back when the owner says SYNCED, which it does after
this node has flushed. One session at a time: a new one ends the old one first, so nothing of two can mix.
"""

import asyncio
import contextlib
import logging
import socket
from typing import Any

from stortrends_ha.config import Address
from stortrends_ha.errors import ProtocolError, StorageError
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import PREFACE, Kind
from stortrends_ha.replication.secondary import Secondary
from stortrends_ha.replication.session import CHANGES, Hello, common_protocol, incompatible, may_follow, refusal

from .link_socket import LinkSocket, receive_frame, receive_preface
from .replica import Replica
from .sockets import set_up, tcp_listener
from .watch import end_with

log = logging.getLogger(__name__)

_BAD_INPUT_REPORT_S = 10.0
_OPENING_AT_MOST = 8  # connections that have not opened a session yet


class Follower:
    """The secondary's side of one group."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._limits = replica.cluster.limits
        self._loop = asyncio.get_running_loop()
        replica.on_failure = self._failed
        self._link: LinkSocket | None = None
        self._why = ""
        self._refused = False
        self._protocol: int | None = None
        self._peer_version: str | None = None
        self._bad_input = self._sessions = self._disk_errors = self._refusals = 0
        self._next_report_s = 0.0
        self._opening: set[asyncio.Task[None]] = set()
        self._looking: asyncio.Task[None] | None = None
        node = replica.cluster.nodes[replica.node]
        self._address = Address(node.address, replica.group.link_ports[replica.node])
        self._listener: socket.socket | None = None

    async def start(self) -> None:
        """Listen for the owner. Raises StartError."""
        self._looking = end_with(asyncio.create_task(self._look_if_blank()))
        self._listener = tcp_listener(self._address.host, self._address.port, "the link")
        self._loop.add_reader(self._listener.fileno(), self._accept)

    async def _look_if_blank(self) -> None:
        try:
            await self._replica.look_if_blank()
        except StorageError as e:
            self._replica.fail(e)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as e:
            log.warning("cannot accept a connection of the link: %s", e.strerror)
            return
        if len(self._opening) >= _OPENING_AT_MOST:
            self._refusals += 1
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
                await self._negotiate(sock)
        except ProtocolError as e:
            self._bad_input += 1
            self._report_bad_input(sock, e)
            sock.close()
        except (OSError, TimeoutError):
            sock.close()
        except StorageError as e:
            sock.close()
            self._replica.fail(e)
        except asyncio.CancelledError:
            sock.close()
            raise

    def _report_bad_input(self, sock: socket.socket, error: ProtocolError) -> None:
        """Log it, but not each connection of somebody who makes many."""
        if self._loop.time() < self._next_report_s:
            return
        self._next_report_s = self._loop.time() + _BAD_INPUT_REPORT_S
        group, count = self._replica.group.name, self._bad_input
        with contextlib.suppress(OSError):
            host = sock.getpeername()[0]
            log.warning(
                "group %s: a link connection from %s was closed (bad input, %d so far): %s", group, host, count, error
            )

    async def _negotiate(self, sock: socket.socket) -> None:
        await receive_preface(sock)
        frame = await receive_frame(sock)
        if frame.kind != Kind.HELLO:
            raise ProtocolError("it did not begin with HELLO")
        value, mine = wire.decode_object(frame.payload), self._replica.hello()
        if reason := incompatible(mine, value):
            await self._refuse(sock, reason)
            return
        theirs = Hello.decode(value)
        reason = self._replica.failure or refusal(mine, theirs, theirs) or self._replica.looking
        if reason:
            await self._refuse(sock, reason)
            return
        self._protocol, self._peer_version = common_protocol(mine.protocols, theirs.protocols), theirs.software
        epoch = theirs.record.epoch
        await self._loop.sock_sendall(sock, PREFACE + wire.encode_object(Kind.HELLO, epoch, mine.encode()))
        frame = await receive_frame(sock, epoch)
        if frame.kind == Kind.REFUSE:
            self._refused_because(str(wire.decode_object(frame.payload).get("reason")))
            sock.close()
            return
        if frame.kind != Kind.OPEN:
            raise ProtocolError("OPEN did not follow HELLO")
        await self._open_session(sock, theirs, wire.decode_object(frame.payload))

    async def _open_session(self, sock: socket.socket, theirs: Hello, message: dict[str, Any]) -> None:
        first, full, lineage = message.get("first"), message.get("full"), message.get("lineage")
        if type(first) is not int or not 1 <= first < CHANGES or type(full) is not bool or not isinstance(lineage, str):
            raise ProtocolError("an OPEN that does not say what it should")
        # What was true at HELLO may have changed since; from here to the update nothing is awaited.
        mine = self._replica.hello()
        if self._replica.failure or refusal(mine, theirs, theirs):
            raise ProtocolError("an OPEN that has been overtaken by another session, or by a failure of this replica")
        if lineage != theirs.lineage or not may_follow(mine, lineage, full):
            raise ProtocolError("a session of another lineage, or without the sync that this replica needs")
        if self._link is not None:
            self._link.close("the owner has connected anew")
        state_file = self._replica.state_file
        state_file.update(record=theirs.record, lineage=lineage, open=True, needs_sync=full)
        link = LinkSocket(sock, lambda: None, self._lost, self._limits.link_timeout_s)
        session = Secondary(self._replica.stores, theirs.record.epoch, link, first, self._synced)
        self._link = link
        self._sessions += 1
        self._why, self._refused = "", False
        link.run(lambda view, end: self._receive(session, view, end), lambda: session.behind)
        opened = wire.frame(Kind.OPENED, theirs.record.epoch)
        link.send([opened], len(opened))
        group, epoch = self._replica.group.name, theirs.record.epoch
        log.info("group %s: session with the owner %s at epoch %d%s", group, theirs.node, epoch, ", to sync" * full)

    def _receive(self, session: Secondary, view: memoryview, end: int) -> int:
        if self._replica.failure:
            return end
        try:
            return session.receive(view, end)
        except StorageError as e:
            self._disk_errors += 1
            self._replica.fail(e)
            return end

    async def _refuse(self, sock: socket.socket, reason: str) -> None:
        self._refused_because(reason)
        message = wire.encode_object(Kind.REFUSE, self._replica.record.epoch, {"reason": reason})
        await self._loop.sock_sendall(sock, PREFACE + message)
        sock.close()

    def _refused_because(self, reason: str) -> None:
        """A session was refused, by this node or by the owner."""
        if reason != self._why:
            log.warning("group %s: a session was refused: %s", self._replica.group.name, reason)
        if self._link is None:
            self._why, self._refused = reason, True

    def _synced(self) -> None:
        self._replica.state_file.update(needs_sync=False, lost_cache=False)
        log.info("group %s: in sync with the owner", self._replica.group.name)

    def _lost(self, why: str) -> None:
        if self._link is not None:
            self._bad_input += self._link.bad_input
        self._link = None
        self._why = why
        log.warning("group %s: the session with the owner has ended: %s", self._replica.group.name, why)

    def _failed(self) -> None:
        """Tell the owner why, then end the session: nothing more is applied or acknowledged."""
        link = self._link
        if link is not None:
            message = wire.encode_object(Kind.FAILED, self._replica.record.epoch, {"reason": self._replica.failure})
            link.send([message], len(message))
            link.close("this node's disk failed")

    async def stop(self) -> None:
        """Orderly: end the session, flush, mark the replica clean."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
        for task in list(self._opening):
            task.cancel()
        if self._looking is not None:
            self._looking.cancel()
        if self._link is not None:
            self._link.close("this node stops")
        self._replica.close(clean=not self._replica.failure)

    def status(self) -> dict[str, Any]:
        """The status message, without its type."""
        state, why = self._state()
        mine = self._replica.state_file.state
        connected = self._link is not None
        return {
            **self._replica.status(),
            "role": "secondary",
            "in_sync": [self._replica.record.owner]
            + [self._replica.node] * (not mine.needs_sync and not mine.lost_cache),
            "state": state,
            "why": why,
            "link": {
                "state": "connected" if connected else "refused" if self._refused else "listening",
                "peer": self._replica.peer.name,
                "address": str(self._address),
                "why": self._why,
                "round_trip_ms": None,
                "protocol": self._protocol,
                "peer_version": self._peer_version,
            },
            "resync": None,
            "window": {"changes": 0, "bytes": 0, "oldest_ms": 0.0},
            "clients": 0,
            "counters": {
                "connections_accepted": 0,
                "connections_refused": self._refusals,
                "nbd_bad_input": 0,
                "link_bad_input": self._bad_input,
                "link_sessions": self._sessions,
                "disk_errors": self._disk_errors,
            },
            "volumes": {},
        }

    def _state(self) -> tuple[str, str]:
        owner = self._replica.record.owner
        if self._replica.failure:
            return "failed", f"{self._replica.failure}; mend the disk and start the node again"
        if self._refused:
            return "held", f"a session was refused: {self._why}"
        if self._link is None:
            return "connecting", f"waiting for the owner {owner} to connect" + (f" ({self._why})" if self._why else "")
        if self._replica.state_file.state.needs_sync:
            return "syncing", f"what differs is being copied from {owner}"
        return "in-sync", ""
