"""Clients: each has one request under way, on an NBD connection to one of the nodes; it gives up after a while.

A reply is checked when it leaves the server: what the network does with it afterwards makes nothing worse.
"""

from typing import TYPE_CHECKING

from stortrends_ha.protocol import nbd_transmission as nbd
from stortrends_ha.protocol.nbd_options import OPTION_HEADER, OPTION_MAGIC, Option

from .clock import MS, S
from .disk import BLOCK_BYTES
from .history import Operation, Violation
from .sockets import ClientSocket

if TYPE_CHECKING:
    from .data_process import DataProcess
    from .world import World

_CHOOSE = (3).to_bytes(4) + OPTION_HEADER.pack(OPTION_MAGIC, Option.EXPORT_NAME, 1) + b"v"
_GREETING_BYTES = 18 + 10  # the server's, and its answer to EXPORT_NAME
_MOST_BLOCKS = 3


class ClientConnection:
    """To a data process."""

    def __init__(self, client: "Client", process: "DataProcess") -> None:
        self.client = client
        self.process = process
        self._world = client.world
        self._replies = b""
        self._greeting_bytes = _GREETING_BYTES
        self._operation: Operation | None = None
        self._last_ns = 0
        self.socket = ClientSocket(process, self._replied, self._lost)
        self._send(_CHOOSE)

    def ask(self, operation: Operation) -> None:
        """A request is on its way."""
        self._operation = operation
        value = operation.value.to_bytes(8)
        head, payload = {
            "read": (nbd.PLAIN_READ, b""),
            "write": (nbd.PLAIN_WRITE, value),
            "fua": (nbd.request_head(nbd.CMD_WRITE, nbd.FLAG_FUA), value),
            "flush": (nbd.request_head(nbd.CMD_FLUSH), b""),
        }[operation.kind]
        length = operation.length * BLOCK_BYTES
        where = (0, 0) if operation.kind == "flush" else (operation.block * BLOCK_BYTES, length)
        self._send(nbd.REQUEST.pack(head, operation.began.to_bytes(8), *where) + payload * (length // 8))

    def _send(self, data: bytes) -> None:
        clock = self._world.clock
        self._last_ns = max(self._last_ns, clock.now_ns + self._world.network.delay_ns())
        clock.at(self._last_ns, self.socket.arrived, data)

    def leave(self) -> None:
        """The client gives it up."""
        self._operation = None
        self._world.clock.after(self._world.network.delay_ns(), self.socket.leave)

    def _lost(self, silently: bool) -> None:
        delay_ns = 2 * S if silently else self._world.network.delay_ns()
        self._world.clock.after(delay_ns, self.client.lost, self)

    def _replied(self, data: bytes) -> None:
        """The server has sent this."""
        skipped = min(len(data), self._greeting_bytes)
        self._greeting_bytes -= skipped
        self._replies += data[skipped:]
        operation = self._operation
        header = nbd.SIMPLE_REPLY.size
        if operation is None or len(self._replies) < header:
            return
        magic, error, cookie = nbd.SIMPLE_REPLY.unpack_from(self._replies)
        if (magic, error, cookie) != (nbd.SIMPLE_REPLY_MAGIC, 0, operation.began.to_bytes(8)):
            raise Violation(f"{operation} got a wrong answer: {self._replies[:header].hex()}")
        end = header + (operation.length * BLOCK_BYTES if operation.kind == "read" else 0)
        if len(self._replies) < end:
            return
        content, self._replies = self._replies[header:end], self._replies[end:]
        self._operation = None
        self._answered(operation, _values(operation, content))

    def _answered(self, operation: Operation, values: list[int]) -> None:
        world, process = self._world, self.process
        world.trace.client(f"{process.name} data", f"answers {values or ''}:", operation)
        world.checks.answers(process.host, operation, values)
        stable_on = process.host.bit if world.checks.settled(process.host) else 0
        world.history.end(operation, values, stable_on)
        world.clock.after(world.network.delay_ns(), self.client.answered, self, operation)


def _values(operation: Operation, content: bytes) -> list[int]:
    values = []
    for at in range(0, len(content), BLOCK_BYTES):
        value = content[at : at + 8]
        if content[at : at + BLOCK_BYTES] != value * (BLOCK_BYTES // 8):
            raise Violation(f"{operation} was answered with a torn block")
        values.append(int.from_bytes(value))
    return values


class Client:
    """Asks again and again."""

    def __init__(self, world: "World", number: int) -> None:
        self.world = world
        self.name = f"client {number}"
        self._random = world.random
        self._connection: ClientConnection | None = None
        self._operation: Operation | None = None
        self._number = 0
        world.clock.after(self._random.randrange(S), self._go_on, 0)

    def _go_on(self, number: int) -> None:
        if number != self._number or self.world.quiet:
            return
        self._number += 1
        self._operation = None
        if self._connection is None:
            self._connect()
        connection = self._connection
        if connection is None:
            self.world.clock.after(self._random.randrange(20 * MS, 300 * MS), self._go_on, self._number)
            return
        operation = self._operation = self._next()
        self.world.trace.client(self.name, f"asks {connection.process.name} to ", operation)
        connection.ask(operation)
        self.world.clock.after(self._random.randrange(S, 5 * S), self._give_up, self._number)

    def _connect(self) -> None:
        process = self._random.choice(self.world.hosts).process
        listener = process.listener(self.world.nbd_port) if process is not None else None
        if process is not None and listener is not None:
            self._connection = ClientConnection(self, process)
            listener.offer(self._connection.socket)

    def _next(self) -> Operation:
        kind = self._random.choice(("write", "write", "write", "read", "read", "read", "fua", "flush"))
        block = self._random.randrange(self.world.blocks)
        most = min(_MOST_BLOCKS, self.world.blocks - block)
        length = self._random.choice((1, 1, self._random.randint(1, most)))
        return self.world.history.begin(kind, block, length)

    def answered(self, connection: ClientConnection, operation: Operation) -> None:
        """A reply has come."""
        if connection is self._connection and operation is self._operation:
            self._number += 1
            self.world.clock.after(self._random.randrange(self.world.think_ns), self._go_on, self._number)

    def lost(self, connection: ClientConnection) -> None:
        """The connection has ended."""
        if connection is self._connection:
            self._connection = None
            self._number += 1
            self.world.clock.after(self._random.randrange(20 * MS, 200 * MS), self._go_on, self._number)

    def _give_up(self, number: int) -> None:
        if number == self._number and self._connection is not None:
            self._connection.leave()
            self._connection = None
            self._go_on(number)
