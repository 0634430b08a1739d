"""Clients: each has some requests under way, on an NBD connection for one volume to one of the nodes; when one of them
is not answered for a while, the client connects anew. Many requests are about the same few blocks.

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

_GREETING_BYTES = 18 + 10  # the server's, and its answer to EXPORT_NAME
_MOST_BLOCKS = 3
_KINDS = ("write",) * 5 + ("read",) * 5 + ("trim", "zero", "flush", "flush")
_COMMANDS = {
    "read": nbd.CMD_READ,
    "write": nbd.CMD_WRITE,
    "trim": nbd.CMD_TRIM,
    "zero": nbd.CMD_WRITE_ZEROES,
    "flush": nbd.CMD_FLUSH,
}


class ClientConnection:
    """To a data process."""

    def __init__(self, client: "Client", process: "DataProcess") -> None:
        self.client = client
        self.process = process
        self._world = client.world
        self._replies = b""
        self._greeting_bytes = _GREETING_BYTES
        self._under_way: dict[int, Operation] = {}
        self._last_ns = 0
        self.socket = ClientSocket(process, self._replied, self._lost)
        volume = self._world.volumes[client.volume].encode()
        self._send((3).to_bytes(4) + OPTION_HEADER.pack(OPTION_MAGIC, Option.EXPORT_NAME, len(volume)) + volume)

    def ask(self, operations: list[tuple[Operation, int]]) -> None:
        """Requests are on their way, each with its flags."""
        self._under_way.update({operation.began: operation for operation, _ in operations})
        self._send(b"".join(self._request(*one) for one in operations))

    def _request(self, operation: Operation, flags: int) -> bytes:
        head = nbd.request_head(_COMMANDS[operation.kind], flags)
        where = (operation.block - self.client.first) * BLOCK_BYTES, operation.length * BLOCK_BYTES
        if operation.kind == "flush":
            where = 0, 0
        payload = operation.value.to_bytes(8) * (where[1] // 8) if operation.kind == "write" else b""
        return nbd.REQUEST.pack(head, operation.began.to_bytes(8), *where) + payload

    def _send(self, data: bytes) -> None:
        clock = self._world.clock
        self._last_ns = max(self._last_ns, clock.now_ns + self._world.network.delay_ns())
        clock.at(self._last_ns, self.socket.arrived, data)

    def leave(self) -> None:
        """The client gives it up."""
        self._under_way.clear()
        self._world.clock.after(self._world.network.delay_ns(), self.socket.leave)

    def _lost(self, silently: bool) -> None:
        delay_ns = 2 * S if silently else self._world.network.delay_ns()
        self._world.clock.after(delay_ns, self.client.lost, self)

    def _replied(self, data: bytes) -> None:
        """The server has sent this."""
        skipped = min(len(data), self._greeting_bytes)
        self._greeting_bytes -= skipped
        self._replies += data[skipped:]
        while self._under_way and self._take_reply():
            pass

    def _take_reply(self) -> bool:
        """Whether there was a whole one."""
        header = nbd.SIMPLE_REPLY.size
        if len(self._replies) < header:
            return False
        magic, error, cookie = nbd.SIMPLE_REPLY.unpack_from(self._replies)
        operation = self._under_way.get(int.from_bytes(cookie))
        if operation is None or magic != nbd.SIMPLE_REPLY_MAGIC:
            raise Violation(f"{operation} got a wrong answer: {self._replies[:header].hex()}")
        if error:
            self._world.checks.refuses(self.process.host, operation)
            self._replies = self._replies[header:]
            del self._under_way[operation.began]
            self._world.clock.after(self._world.network.delay_ns(), self.client.answered, self, operation)
            return True
        end = header + (operation.length * BLOCK_BYTES if operation.kind == "read" else 0)
        if len(self._replies) < end:
            return False
        content, self._replies = self._replies[header:end], self._replies[end:]
        del self._under_way[operation.began]
        self._answered(operation, _values(operation, content))
        return True

    def _answered(self, operation: Operation, values: list[int]) -> None:
        world, process = self._world, self.process
        world.trace.client(f"{process.name} data", f"answers {values or ''}:", operation)
        world.checks.answers(process.host, operation, values)
        written_through = world.checks.settled(process.host) and world.caches[self.client.volume] != "always"
        stable_on = process.host.bit if written_through else 0
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
        self.volume = number % len(world.volumes)
        self.first = self.volume * world.blocks
        self._random = world.random
        self._depth = self._random.choice((1, 1, 2, 4))
        self._hot = self._random.randrange(world.blocks)
        self._connection: ClientConnection | None = None
        self._under_way: set[int] = set()
        self._life = 0
        world.clock.after(self._random.randrange(S), self._go_on, 0)

    def _go_on(self, life: int) -> None:
        free = self._depth - len(self._under_way)
        if life != self._life or not free or self.world.quiet:
            return
        if self._connection is None:
            self._connect()
        connection = self._connection
        if connection is None:
            self.world.clock.after(self._random.randrange(20 * MS, 300 * MS), self._go_on, life)
            return
        operations = [self._next() for _ in range(self._random.randint(1, free))]
        for operation, _ in operations:
            self._under_way.add(operation.began)
            self.world.trace.client(self.name, f"asks {connection.process.name} to ", operation)
            self.world.clock.after(self._random.randrange(S, 5 * S), self._give_up, life, operation)
        connection.ask(operations)

    def _connect(self) -> None:
        process = self._random.choice(self.world.hosts).process
        listener = process.listener(self.world.nbd_port) if process is not None else None
        if process is not None and listener is not None:
            self._connection = ClientConnection(self, process)
            listener.offer(self._connection.socket)

    def _next(self) -> tuple[Operation, int]:
        random, world = self._random, self.world
        kind = random.choice(_KINDS)
        if kind == "trim" and any(host.zeroes_by_writing for host in world.hosts):  # there a trim may do nothing
            kind = "zero"
        if kind == "flush":
            return world.history.begin(kind, self.first, world.blocks), 0
        block = self._hot if random.random() < 0.3 else random.randrange(world.blocks)
        length = random.choice((1, 1, random.randint(1, min(_MOST_BLOCKS, world.blocks - block))))
        flags = nbd.FLAG_FUA if kind != "read" and random.random() < 0.15 else 0
        durable = kind != "read" and (bool(flags) or world.caches[self.volume] == "never")
        if kind == "zero" and random.random() < 0.5:
            flags |= nbd.FLAG_NO_HOLE
        return world.history.begin(kind, self.first + block, length, durable=durable), flags

    def answered(self, connection: ClientConnection, operation: Operation) -> None:
        """A reply has come."""
        if connection is self._connection:
            self._under_way.discard(operation.began)
            self.world.clock.after(self._random.randrange(self.world.think_ns), self._go_on, self._life)

    def lost(self, connection: ClientConnection) -> None:
        """The connection has ended."""
        if connection is self._connection:
            self._forget()
            self.world.clock.after(self._random.randrange(20 * MS, 200 * MS), self._go_on, self._life)

    def _give_up(self, life: int, operation: Operation) -> None:
        if life == self._life and operation.began in self._under_way:
            assert self._connection is not None
            self._connection.leave()
            self._forget()
            self._go_on(self._life)

    def _forget(self) -> None:
        self._connection = None
        self._under_way.clear()
        self._life += 1
