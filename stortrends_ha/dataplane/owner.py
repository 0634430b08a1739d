"""The data process of a group on the node that owns it: NBD server, primary, and the connection to the secondary.

Order that matters (each step can be the last before a crash):
- ``open`` is durable before anyone can connect, so before the first change: a start after a kill finds it and compares.
- ``open`` is taken back only at an orderly stop with an empty window, after both flushes.
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
from typing import Any, NoReturn

from stortrends_ha.config import Address
from stortrends_ha.errors import ProtocolError, StorageError
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import PREFACE, Kind
from stortrends_ha.protocol.nbd_handshake import Export as HandshakeExport
from stortrends_ha.protocol.nbd_options import TransmissionFlag
from stortrends_ha.protocol.nbd_transmission import Geometry
from stortrends_ha.replication.primary import Primary
from stortrends_ha.replication.session import Hello, Plan, common_protocol, incompatible, plan, refusal

from .export import Export, ServerCounters
from .link_socket import LinkSocket, receive_frame, receive_preface
from .nbd_server import NbdServer
from .replica import Replica
from .sockets import set_up
from .watch import end_with

log = logging.getLogger(__name__)

_DRAIN_S = 5.0  # how long an orderly stop waits for unanswered requests


class Refused(Exception):
    """The two nodes do not fit; the text says why."""


class Owner:
    """The owner's side of one group."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._limits = replica.cluster.limits
        self._unclean = replica.state_file.was_open
        self._loop = asyncio.get_running_loop()
        self.counters = ServerCounters()
        self._primary = Primary(
            replica.stores,
            replica.record.epoch,
            window_changes=self._limits.window_changes,
            window_bytes=self._limits.window_bytes,
            failed=replica.fail,
            synced=self._synced,
        )
        replica.on_failure = self._failed
        replica.begin_lineage()
        self._exports = {volume.name: self._export(index) for index, volume in enumerate(replica.group.volumes)}
        self._server = NbdServer(self._exports, self._primary, self._limits, self.counters)
        self._link: LinkSocket | None = None
        self._link_ended = asyncio.Event()
        self._link_state, self._link_why = "connecting", ""
        self._peer_in_sync = False  # as far as this process knows
        self._protocol: int | None = None
        self._peer_version: str | None = None
        self._bad_input = self._sessions = 0
        self._ping = 0
        self._next_ping: asyncio.TimerHandle | None = None
        self._ping_sent_s: float | None = None
        self._round_trip_ms: float | None = None
        self._moved = (0, self._loop.time())  # the newest answered change, and when that was seen first
        self._connector: asyncio.Task[None] | None = None

    def _export(self, index: int) -> Export:
        volume, store = self._replica.group.volumes[index], self._replica.stores[index]
        geometry = Geometry(
            volume.size_bytes,
            volume.read_only,
            volume.minimum_block_bytes,
            volume.maximum_payload_bytes,
            can_trim=store.can_punch,
            can_fast_zero=store.can_zero_fast,
            can_fast_zero_allocated=store.can_zero_allocated_fast,
        )
        offer = HandshakeExport(
            name=volume.name,
            size_bytes=volume.size_bytes,
            flags=export_flags(volume.read_only),
            minimum_block_bytes=volume.minimum_block_bytes,
            preferred_block_bytes=volume.preferred_block_bytes,
            maximum_payload_bytes=volume.maximum_payload_bytes,
            description=volume.description,
        )
        return Export(index, offer, geometry, store, self._replica.executor, self.counters)

    async def start(self) -> None:
        """Listen for clients and begin to look for the secondary. Raises StartError, StorageError."""
        group = self._replica.group
        self._replica.state_file.update(open=True)
        self._server.listen(group.nbd, group.nbd_unix.get(self._replica.node))
        self._connector = end_with(asyncio.create_task(self._keep_connected()))

    # --- The link -----------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        peer = self._replica.peer
        address = Address(peer.address, self._replica.group.link_ports[peer.name])
        while not self._replica.failure:
            try:
                async with asyncio.timeout(self._limits.link_timeout_s):
                    await self._connect(address)
            except Refused as e:
                self._link_down("refused", str(e))
            except (OSError, ProtocolError, TimeoutError) as e:
                self._link_down("connecting", _words(e, peer.name, address))
            except StorageError as e:
                self._replica.fail(e)
                return
            else:
                await self._link_ended.wait()
            await asyncio.sleep(self._limits.link_retry_s)

    async def _connect(self, address: Address) -> None:
        """Connect, compare notes, open the session."""
        family, _, _, _, where = (await self._loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM))[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            set_up(sock)
            await self._loop.sock_connect(sock, where)
            theirs = await self._exchange_hello(sock)
            await self._open(sock, await self._decide(sock, theirs))
        except BaseException:
            sock.close()
            raise

    async def _exchange_hello(self, sock: socket.socket) -> Hello:
        replica = self._replica
        mine = replica.hello(self._unclean)
        hello = wire.encode_object(Kind.HELLO, mine.record.epoch, mine.encode())
        await self._loop.sock_sendall(sock, PREFACE + hello)
        await receive_preface(sock)
        answer = await receive_frame(sock)
        if answer.kind == Kind.REFUSE:
            raise Refused(str(wire.decode_object(answer.payload).get("reason")))
        if answer.kind != Kind.HELLO:
            raise ProtocolError("the peer did not begin with HELLO")
        value = wire.decode_object(answer.payload)
        if reason := incompatible(mine, value):
            await self._refuse(sock, mine, reason)
        theirs = Hello.decode(value)
        self._protocol, self._peer_version = common_protocol(mine.protocols, theirs.protocols), theirs.software
        return theirs

    async def _refuse(self, sock: socket.socket, mine: Hello, reason: str) -> NoReturn:
        """Tell the peer that there will be no session, and why. Raises Refused."""
        await self._loop.sock_sendall(sock, wire.encode_object(Kind.REFUSE, mine.record.epoch, {"reason": reason}))
        raise Refused(reason)

    async def _decide(self, sock: socket.socket, theirs: Hello) -> bool:
        """Whether the session begins with a full comparison. If there must be none: tells the peer, raises Refused."""
        mine = self._replica.hello(self._unclean)
        decision, why = plan(mine, theirs)
        reason = refusal(mine, theirs, mine) or (why if decision is Plan.HOLD else "")
        if reason:
            await self._refuse(sock, mine, reason)
        group, epoch, what = mine.group, mine.record.epoch, decision.value
        log.info("group %s: session with %s at epoch %d: %s, because %s", group, theirs.node, epoch, what, why)
        return decision is Plan.FULL

    async def _open(self, sock: socket.socket, full: bool) -> None:
        epoch = self._replica.record.epoch
        message = {
            "full": full,
            "first": self._primary.acked + 1,
            "lineage": self._replica.state_file.state.lineage,
        }
        await self._loop.sock_sendall(sock, wire.encode_object(Kind.OPEN, epoch, message))
        answer = await receive_frame(sock, epoch)
        if answer.kind == Kind.REFUSE:
            raise Refused(str(wire.decode_object(answer.payload).get("reason")))
        if answer.kind != Kind.OPENED:
            raise ProtocolError("the peer did not answer OPEN")
        if self._replica.failure:  # meanwhile
            raise StorageError(self._replica.failure)
        self._link_ended.clear()
        self._link = LinkSocket(sock, self._primary.pump, self._lost, self._limits.link_timeout_s)
        self._sessions += 1
        self._link_state, self._link_why = "connected", ""
        self._ping_sent_s = None
        self._link.run(self._receive)
        self._peer_in_sync = not full
        self._primary.open_session(self._link, full)
        self._send_ping()

    def _receive(self, view: memoryview, end: int) -> int:
        used = self._primary.receive(view, end)
        if self._ping_sent_s is not None and self._primary.pong == self._ping:
            self._round_trip_ms = (time.monotonic() - self._ping_sent_s) * 1000
            self._ping_sent_s = None
        return used

    def _send_ping(self) -> None:
        link = self._link
        if link is None or link.closed:
            return
        if self._ping_sent_s is None:
            self._ping += 1
            self._ping_sent_s = time.monotonic()
        ping = wire.frame(Kind.PING, self._replica.record.epoch, self._ping)
        link.send([ping], len(ping))
        self._next_ping = self._loop.call_later(self._limits.link_timeout_s / 4, self._send_ping)

    def _lost(self, why: str) -> None:
        if self._link is not None:
            self._bad_input += self._link.bad_input
        self._link = None
        if self._next_ping is not None:
            self._next_ping.cancel()
        self._primary.close_session()
        self._link_down("connecting", why)
        self._link_ended.set()

    def _link_down(self, state: str, why: str) -> None:
        if (state, why) != (self._link_state, self._link_why):
            log.warning("group %s: no link to %s: %s", self._replica.group.name, self._replica.peer.name, why)
        self._link_state, self._link_why = state, why
        self._round_trip_ms = None

    def _synced(self) -> None:
        self._unclean = False
        self._peer_in_sync = True
        try:
            self._replica.state_file.update(lost_cache=False)
        except StorageError as e:
            self._replica.fail(e)
            return
        log.info("group %s: in sync with %s", self._replica.group.name, self._replica.peer.name)

    def _failed(self) -> None:
        self._primary.halt()
        if self._link is not None:
            self._loop.call_soon(self._link.close, "this node's disk failed")

    # --- The end ------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Orderly: finish what is under way, drop the clients, mark the replica clean if it is."""
        self._server.stop_listening()
        self._primary.stop_taking()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while self._primary.connected and not self._primary.idle:
                    await asyncio.sleep(0.01)
        self._server.drop_clients()
        if self._connector is not None:
            self._connector.cancel()
        clean = self._primary.idle and self._primary.resync is None and not self._unclean and not self._replica.failure
        if self._link is not None:
            self._link.close("this node stops")
        self._replica.close(clean)

    # --- Status -------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The status message, without its type."""
        primary, peer = self._primary, self._replica.peer
        state, why = self._state()
        resync = primary.resync if primary.connected else None
        return {
            **self._replica.status(),
            "role": "primary",
            "in_sync": [self._replica.node] + [peer.name] * self._peer_in_sync,
            "state": state,
            "why": why,
            "link": {
                "state": self._link_state,
                "peer": peer.name,
                "address": str(Address(peer.address, self._replica.group.link_ports[peer.name])),
                "why": self._link_why,
                "round_trip_ms": self._round_trip_ms,
                "protocol": self._protocol,
                "peer_version": self._peer_version,
            },
            "resync": resync and {"done_bytes": resync.done_bytes, "total_bytes": resync.total_bytes},
            "window": {
                "changes": primary.issued - primary.acked,
                "bytes": primary.bytes_in_flight,
                "oldest_ms": self._oldest_ms(),
            },
            "clients": len(self._server.connections),
            "counters": {
                "connections_accepted": self.counters.connections_accepted,
                "connections_refused": self.counters.connections_refused,
                "nbd_bad_input": self.counters.nbd_bad_input,
                "link_bad_input": self._bad_input,
                "link_sessions": self._sessions,
                "disk_errors": self.counters.disk_errors,
            },
            "volumes": {name: self._volume_status(export) for name, export in self._exports.items()},
        }

    def _state(self) -> tuple[str, str]:
        peer, unanswered = self._replica.peer.name, self._primary.unanswered
        if self._replica.failure:
            return "failed", f"{self._replica.failure}; clients wait: mend the disk and start the node again"
        if not self._primary.connected:
            state = "held" if unanswered or self._link_state == "refused" else "connecting"
            if not self._primary.opened:
                held = "clients wait until it is there"
            elif unanswered:
                held = f"{unanswered} requests of clients are held until it is back"
            else:
                held = "reads are served, writes will be held until it is back"
            return state, f"no link to {peer} ({self._link_why or 'connecting'}): {held}"
        if self._primary.resync is not None:
            return "syncing", f"what differs on {peer} is being copied to it"
        return "in-sync", ""

    def _oldest_ms(self) -> float:
        """About how long the oldest unanswered change has been waiting: exact to the interval between two calls."""
        acked, since_s = self._moved
        if acked != self._primary.acked or self._primary.idle:
            self._moved = (self._primary.acked, self._loop.time())
            return 0.0
        return (self._loop.time() - since_s) * 1000

    def _volume_status(self, export: Export) -> dict[str, Any]:
        counters = export.counters
        return {
            "size_bytes": export.geometry.size_bytes,
            "read_only": export.geometry.read_only,
            "in_flight": self._server.in_flight(export),
            "counters": {name: getattr(counters, name) for name in counters.__slots__},
        }


def export_flags(read_only: bool) -> TransmissionFlag:
    """The transmission flags of a volume: the same on both nodes and at any time, as clients may not compare them."""
    has = TransmissionFlag
    always = has.HAS_FLAGS | has.SEND_FLUSH | has.SEND_FUA | has.CAN_MULTI_CONN | has.SEND_CACHE
    changes = has.SEND_TRIM | has.SEND_WRITE_ZEROES | has.SEND_FAST_ZERO
    return always | (has.READ_ONLY if read_only else changes)


def _words(error: Exception, peer: str, address: Address) -> str:
    if isinstance(error, TimeoutError):
        return f"{peer} at {address} does not answer"
    if isinstance(error, ProtocolError):
        return f"what answers at {address} is not {peer}: {error}"
    number = getattr(error, "errno", None) or 0  # that of a name that does not resolve is negative
    return f"{peer} at {address}: {os.strerror(number) if number > 0 else error}"
