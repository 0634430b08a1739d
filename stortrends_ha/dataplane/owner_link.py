"""The owner's connection to the secondary at one epoch: connects, opens sessions, keeps them alive, connects again.

Rule 6: it is made for one record and ended with it. It is silent while the primary is ``held``: a session that compares
everything would spoil a secondary which the record may have in sync by now.
It connects at once, then after 5 ms, doubling up to ``limits.link_retry_s``: a handover must not wait for it, a peer
that is away must not be flooded. A session that ends sooner than that does not start the pauses anew: no loop.

If this process dies in the opening talk, see ``replication.opening``. Bounds: one connection at a time; CLIENTS frames
at most every CLIENTS_S.
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable
from functools import partial

from stortrends_ha.config import Address
from stortrends_ha.errors import PeerUnfitError, ProtocolError, SessionRefusedError, StorageError
from stortrends_ha.limits import MIB
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Endpoint, Kind
from stortrends_ha.record import Record
from stortrends_ha.replication import opening
from stortrends_ha.replication.primary import Primary
from stortrends_ha.replication.resync import Resync
from stortrends_ha.replication.session import Hello, Plan

from . import inspection
from .link_socket import LinkSocket, carry_out
from .replica import Replica
from .report import Status, link_status
from .sockets import set_up
from .watch import end_with

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.005
_PUT_OFF_S = 30.0
_WHAT = {
    Plan.RESUME: "what is in flight",
    Plan.RECONCILE: "what may differ is made equal",
    Plan.SYNC: "sync of what it may lack",
}
CLIENTS_S = 0.01


class OwnerLink:
    """See the module. Implements ``replication.opening.Opener``."""

    def __init__(
        self,
        replica: Replica,
        primary: Primary,
        record: Record,
        endpoints: Callable[[], list[Endpoint]],
        changed: Callable[[], None],
    ) -> None:
        self._replica = replica
        self._primary = primary
        self._record = record
        self._endpoints = endpoints
        self._changed = changed
        self._limits = replica.cluster.limits
        self._loop = asyncio.get_running_loop()
        peer = replica.peer
        self._address = Address(peer.address, replica.group.link_ports[peer.name])
        self._link: LinkSocket | None = None
        self._ended = asyncio.Event()
        self.state, self.why = "connecting", ""
        self.unfit = ""  # why the secondary needs a full sync, though the record has it in sync
        self._opened: opening.Opened | None = None
        self._put_off = False
        self._ping = 0
        self._next_ping: asyncio.TimerHandle | None = None
        self._ping_sent_s: float | None = None
        self._round_trip_ms: float | None = None
        self._clients_told: list[Endpoint] = []
        self._next_clients: asyncio.TimerHandle | None = None
        self._connector = end_with(asyncio.create_task(self._keep_connected()))

    def stop(self, why: str) -> None:
        """End it for good."""
        self._connector.cancel()
        if self._link is not None:
            self._link.close(why)

    # --- Connecting ---------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not (self._replica.failure or self._primary.held):
            try:
                async with asyncio.timeout(self._limits.link_timeout_s):
                    inspector = await self._connect()
            except SessionRefusedError as e:
                self.unfit = str(e) if isinstance(e, PeerUnfitError) else ""
                self._down("connecting" if e.passing else "refused", str(e))
            except (OSError, ProtocolError, TimeoutError) as e:
                self._down("connecting", _words(e, self._replica.peer.name, self._address))
            except StorageError as e:
                self._replica.fail(e)
                return
            else:
                began_s = self._loop.time()
                await (self._ended.wait() if inspector is None else self._let_inspect(inspector))
                if self._loop.time() - began_s > self._limits.link_retry_s:
                    pause_s = _FIRST_PAUSE_S
            await asyncio.sleep(_PUT_OFF_S if self._put_off else pause_s)
            pause_s, self._put_off = min(2 * pause_s, self._limits.link_retry_s), False

    async def _connect(self) -> socket.socket | None:
        """Connect, compare notes, open the session; or, where there can be none, the connection on which the secondary
        wants to inspect."""
        host, port = self._address.host, self._address.port
        family, _, _, _, where = (await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            set_up(sock)
            await self._loop.sock_connect(sock, where)
            opened = await carry_out(sock, opening.as_owner(self))
            if self._replica.failure:  # meanwhile
                raise StorageError(self._replica.failure)
        except BaseException:
            sock.close()
            raise
        if isinstance(opened, opening.Inspected):
            return sock
        self._open(sock, opened)
        return None

    async def _let_inspect(self, sock: socket.socket) -> None:
        """Rule 10: the operator wants to see what differs, and nothing is changed by that."""
        group, peer, epoch = self._replica.group.name, self._replica.peer.name, self._record.epoch
        log.info("group %s: %s compares its copy with this one, as they have no common history", group, peer)
        try:
            await inspection.answer(sock, self._replica, epoch, lambda: bool(self._endpoints()))
        except StorageError as e:
            with contextlib.suppress(OSError):
                await self._loop.sock_sendall(sock, opening.refuse(epoch, f"{self._replica.node} cannot: {e}"))
        except (OSError, ProtocolError, TimeoutError) as e:
            log.info("group %s: %s compares no more: %s", group, peer, e or "it is silent")
        finally:
            sock.close()

    def hello(self) -> Hello:
        """See ``Opener``."""
        return self._replica.hello(self._record, behind=self._primary.ahead)

    def first(self) -> int:
        """See ``Opener``."""
        return self._primary.acked + 1

    def new_filling(self) -> str:
        """See ``Opener``."""
        return uuid.uuid4().hex

    # --- The session --------------------------------------------------------------------------

    def _open(self, sock: socket.socket, opened: opening.Opened) -> None:
        group, peer, epoch = self._replica.group.name, opened.theirs.node, self._record.epoch
        what = _WHAT[opened.plan] if not opened.fill else "full sync"
        log.info("group %s: session with %s at epoch %d: %s, because %s", group, peer, epoch, what, opened.why)
        self._ended.clear()
        self._opened = opened
        self._link = LinkSocket(sock, self._primary.pump, self._lost, self._limits.link_timeout_s)
        self._replica.link_counters.sessions += 1
        self.state, self.why, self.unfit = "connected", "", ""
        self._ping_sent_s = None
        self._link.run(self._receive)
        fill = partial(self._filled, opened.fill) if opened.fill else None
        lost = any(of.unknown for of in self._replica.differences)
        has_some = bool(opened.theirs.lineage or opened.theirs.gives_up)
        compare = has_some and bool(lost or opened.fill or opened.theirs.filling)
        self._primary.open_session(self._link, opened.plan, compare=compare, fill=fill)
        self._send_ping()
        self._clients_told = []
        self.clients_changed()
        self._changed()

    def _filled(self, name: str) -> None:
        try:
            self._replica.filled(name)
        except StorageError as e:  # if this filling is interrupted, it begins anew
            self._replica.fail_unless_last(e)

    def _receive(self, view: memoryview, end: int) -> int:
        resync = self._primary.resync
        used = self._primary.receive(view, end)
        if resync is not None and resync.ended and self._primary.resync is None:
            self._log_synced(resync)
        if self._ping_sent_s is not None and self._primary.pong == self._ping:
            self._round_trip_ms = (time.monotonic() - self._ping_sent_s) * 1000
            self._ping_sent_s = None
        return used

    def _log_synced(self, resync: Resync) -> None:
        log.info(
            "group %s: %s has everything: of %.1f MiB that may have differed %.1f MiB were copied",
            self._replica.group.name, self._replica.peer.name, resync.total_bytes / MIB, resync.copied_bytes / MIB,
        )  # fmt: skip

    def _send_ping(self) -> None:
        link = self._link
        if link is None or link.closed:
            return
        if self._ping_sent_s is None:
            self._ping += 1
            self._ping_sent_s = time.monotonic()
        ping = wire.frame(Kind.PING, self._record.epoch, self._ping)
        link.send([ping], len(ping))
        self._next_ping = self._loop.call_later(self._limits.link_timeout_s / 4, self._send_ping)

    def clients_changed(self) -> None:
        """Tell the secondary which clients there are, now or in a moment."""
        if self._next_clients is None and self._link is not None:
            self._send_clients()
            self._next_clients = self._loop.call_later(CLIENTS_S, self._clients_again)

    def tell_clients(self) -> None:
        """Tell it now: the session is about to end, and the secondary to serve them."""
        if self._link is not None:
            self._send_clients()

    def _clients_again(self) -> None:
        self._next_clients = None
        if self._link is not None and self._endpoints() != self._clients_told:
            self.clients_changed()

    def _send_clients(self) -> None:
        assert self._link is not None
        endpoints = self._endpoints()
        if endpoints != self._clients_told:
            message = wire.encode_clients(self._record.epoch, endpoints)
            self._link.send([message], len(message))
            self._clients_told = endpoints

    def _lost(self, why: str) -> None:
        if self._link is not None:
            self._replica.link_counters.bad_input += self._link.bad_input
        self._link = None
        for timer in (self._next_ping, self._next_clients):
            if timer is not None:
                timer.cancel()
        self._next_ping = self._next_clients = None
        self._primary.close_session()
        self._down("connecting", why)
        self._ended.set()
        self._changed()

    def _down(self, state: str, why: str) -> None:
        if (state, why) != (self.state, self.why):
            log.log(
                logging.INFO if self._connector.cancelling() else logging.WARNING,
                "group %s: no link to %s: %s", self._replica.group.name, self._replica.peer.name, why,
            )  # fmt: skip
            self.state, self.why = state, why
            self._changed()
        self._round_trip_ms = None

    def fail(self) -> None:
        """This node's disk failed: end the session, once whoever found that has returned."""
        if self._link is not None:
            self._loop.call_soon(self._link.close, "this node's disk failed")

    def put_off(self, why: str) -> None:
        """End the session, once whoever found this has returned, and begin the next one much later."""
        if self._link is not None:
            self._put_off = True
            self._loop.call_soon(self._link.close, why)

    def status(self) -> Status:
        """The link's part of the status."""
        status = link_status(self._replica, self.state, str(self._address), self.why)
        if self._opened is not None:
            status["round_trip_ms"] = self._round_trip_ms
            status["protocol"] = self._opened.protocol
            status["peer_version"] = self._opened.theirs.software
        return status


def _words(error: Exception, peer: str, address: Address) -> str:
    if isinstance(error, TimeoutError):
        return f"{peer} at {address} does not answer"
    if isinstance(error, ProtocolError):
        return f"what answers at {address} is not {peer}: {error}"
    number = getattr(error, "errno", None) or 0  # that of a name that does not resolve is negative
    return f"{peer} at {address}: {os.strerror(number) if number > 0 else error}"
