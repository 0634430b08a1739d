"""The NBD server of one group: listens, negotiates, and hands clients over to ``nbd_connection``.

Invariants: at most ``limits.connections`` clients; one that has not finished its handshake within
``handshake_timeout_s`` is dropped; bad input closes that connection, is counted, and disturbs nobody else.
While the primary takes no requests, or the gate is closed, clients can connect and negotiate, and their requests wait.
An address that is not on this node yet can be listened on (it comes later); one that cannot be is tried again every
LISTEN_AGAIN_S, and ``why`` tells: the former owner may be about to let it go.
"""

import asyncio
import logging
import select
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from stortrends_ha.config import Address, Limits
from stortrends_ha.errors import StartError
from stortrends_ha.protocol.link import Endpoint
from stortrends_ha.protocol.nbd_handshake import Handshake
from stortrends_ha.replication.gate import Gate
from stortrends_ha.replication.primary import Primary

from .export import Export, ServerCounters
from .nbd_connection import Connection
from .sender import Sender
from .sockets import endpoint_of, set_up, tcp_listener, unix_listener

log = logging.getLogger(__name__)

_HANDSHAKE_READ_BYTES = 65536
_SWEEP_S = 1.0
_ACCEPT_AGAIN_S = 0.2
LISTEN_AGAIN_S = 0.05


class Negotiation:
    """A connection in its handshake."""

    def __init__(self, server: "NbdServer", sock: socket.socket) -> None:
        self.sock = sock
        self._server = server
        self._loop = server.loop
        self._handshake = Handshake(server.offers)
        self._sender = Sender(server.loop, sock, self._drained, self.close)
        self._timeout = server.loop.call_later(
            server.limits.handshake_timeout_s, self.close, "its handshake took too long"
        )
        self._loop.add_reader(sock.fileno(), self._on_readable)
        self._send(self._handshake.greeting)

    def _send(self, data: bytes) -> None:
        if data:
            self._sender.send([data], len(data))

    def _on_readable(self) -> None:
        try:
            data = self.sock.recv(_HANDSHAKE_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as e:
            self.close(e.strerror or str(e))
            return
        if not data:
            self.close("the client closed the connection")
            return
        self._send(self._handshake.receive(data))
        if self._handshake.closed is not None:
            self.close(self._handshake.closed)
        elif self._handshake.result is not None or self._sender.backlog_bytes:
            self._loop.remove_reader(self.sock.fileno())
            self._drained()

    def _drained(self) -> None:
        """Go on when the client has taken our answers: nobody makes us store many."""
        if self._sender.backlog_bytes or self._sender.closed:
            return
        if self._handshake.result is None:
            self._loop.add_reader(self.sock.fileno(), self._on_readable)
            return
        self._leave()
        self._server.negotiated(self.sock, self._handshake)

    def _leave(self) -> None:
        self._timeout.cancel()
        self._server.counters.nbd_bad_input += self._handshake.violations
        self._sender.close()
        self._server.negotiations.discard(self)

    def close(self, why: str) -> None:
        """End it without a client."""
        if self not in self._server.negotiations:
            return
        log.info("a client has left during its handshake: %s", why)
        self._loop.remove_reader(self.sock.fileno())
        self._leave()
        self.sock.close()
        self._server.changed()


class NbdServer:
    """All listening sockets and clients of one group."""

    def __init__(
        self,
        exports: Mapping[str, Export],
        primary: Primary,
        gate: Gate,
        limits: Limits,
        counters: ServerCounters,
        changed: Callable[[], None],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.exports = exports
        self.offers = {name: export.offer for name, export in exports.items()}
        self.limits = limits
        self.counters = counters
        self.negotiations: set[Negotiation] = set()
        self.connections: set[Connection] = set()
        self.why = ""  # it does not listen yet
        self._primary = primary
        self._gate = gate
        self.changed = changed  # clients have come or gone, or ``why`` has changed
        self._listeners: list[socket.socket] = []
        self._again: asyncio.TimerHandle | None = None
        self._next_sweep = self.loop.call_later(_SWEEP_S, self._sweep)

    def listen(self, address: Address, unix: Path | None) -> None:
        """Listen on TCP, and on a Unix socket if there is a path: now, or as soon as that is possible."""
        self._again, before = None, self.why
        try:
            self._add_listener(tcp_listener(address.host, address.port, "NBD", absent=True))
            if unix is not None:
                self._add_listener(unix_listener(unix))
            self.why = ""
        except StartError as e:
            self._close_listeners()
            self.why = str(e)
            self._again = self.loop.call_later(LISTEN_AGAIN_S, self.listen, address, unix)
        if self.why != before:
            if self.why:
                log.warning("%s; trying again", self.why)
            self.changed()

    def _add_listener(self, listener: socket.socket) -> None:
        self._listeners.append(listener)
        self.loop.add_reader(listener.fileno(), self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as e:  # gone already, or no file descriptors left: the others go on
            log.warning("cannot accept a client: %s", e.strerror)
            self.loop.remove_reader(listener.fileno())
            self.loop.call_later(_ACCEPT_AGAIN_S, self._accept_again, listener)
            return
        if len(self.connections) + len(self.negotiations) >= self.limits.connections:
            self.counters.connections_refused += 1
            log.warning("a client was refused: all %d connections are in use", self.limits.connections)
            sock.close()
            return
        self.counters.connections_accepted += 1
        set_up(sock)
        self.negotiations.add(Negotiation(self, sock))
        self.changed()

    def _accept_again(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self.loop.add_reader(listener.fileno(), self._accept, listener)

    def negotiated(self, sock: socket.socket, handshake: Handshake) -> None:
        """A client has chosen its volume."""
        result = handshake.result
        assert result is not None
        export = self.exports[result.export.name]
        connection = Connection(sock, export, self._primary, result, self._gate, self._gone)
        self.connections.add(connection)
        self.changed()
        log.info("volume %s: a client has come", export.offer.name)
        connection.start()

    def _gone(self, connection: Connection, why: str) -> None:
        self.connections.discard(connection)
        self.changed()
        log.info("volume %s: a client has left: %s", connection.export.offer.name, why)

    def _sweep(self) -> None:
        """Notice clients that have gone: the loop tells of an error only once, and of nothing while one is paused."""
        by_fd = {connection.fileno(): connection for connection in self.connections}
        poll = select.poll()
        for fd in by_fd:
            poll.register(fd, select.POLLRDHUP)
        for fd, _ in poll.poll(0):
            by_fd[fd].hung_up()
        self._next_sweep = self.loop.call_later(_SWEEP_S, self._sweep)

    def endpoints(self) -> list[Endpoint]:
        """The TCP connections of all clients, from their first moment."""
        sockets = [client.sock for client in self.connections] + [client.sock for client in self.negotiations]
        return sorted(endpoint for endpoint in map(endpoint_of, sockets) if endpoint is not None)

    def gate_opened(self) -> None:
        """Rule 5: what was held may leave."""
        for connection in list(self.connections):
            connection.gate_opened()

    def in_flight(self, export: Export) -> int:
        """How many requests to a volume have come and have not been answered."""
        return sum(connection.in_flight for connection in self.connections if connection.export is export)

    def stop_listening(self) -> None:
        """Take no new clients."""
        if self._again is not None:
            self._again.cancel()
        self._close_listeners()
        for negotiation in list(self.negotiations):
            negotiation.close("the server stops")

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            self.loop.remove_reader(listener.fileno())
            path = listener.getsockname() if listener.family == socket.AF_UNIX else None
            listener.close()
            if path:
                Path(path).unlink(missing_ok=True)
        self._listeners.clear()

    def refuse(self) -> None:
        """Rule 13: no good copy is left: from now on every request is answered with an error. What is under way loses
        its connection, once whoever found the error has returned."""
        for export in self.exports.values():
            export.geometry = export.geometry.refusing()
        for connection in list(self.connections):
            self.loop.call_soon(connection.close, "the disk failed")

    def drop_clients(self) -> None:
        """Close all connections: clients reconnect after that, and would give up on an error."""
        self._next_sweep.cancel()
        for connection in list(self.connections):
            connection.close("the server stops")
