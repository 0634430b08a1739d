"""Clients: each has one request under way, on a connection to one of the nodes; it gives up after a while."""

from typing import TYPE_CHECKING

from .clock import MS, S
from .history import Operation

if TYPE_CHECKING:
    from .model_process import ModelProcess
    from .world import World


class ClientConnection:
    """To a data process."""

    def __init__(self, client: "Client", process: "ModelProcess") -> None:
        self.client = client
        self.process = process

    def answer(self, operation: Operation) -> None:
        """The reply is on its way."""
        world = self.client.world
        world.clock.after(world.network.delay_ns(), self.client.answered, self, operation)

    def lost(self, *, silently: bool) -> None:
        """The process is gone, or wants no clients."""
        world = self.client.world
        world.clock.after(2 * S if silently else world.network.delay_ns(), self.client.lost, self)


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
        process = connection.process
        self.world.clock.after(self.world.network.delay_ns(), process.event, process.request, connection, operation)
        self.world.clock.after(self._random.randrange(S, 5 * S), self._give_up, self._number)

    def _connect(self) -> None:
        process = self._random.choice(self.world.hosts).process
        if process is not None and process.accepts:
            self._connection = ClientConnection(self, process)
            process.connect(self._connection)

    def _next(self) -> Operation:
        kind = self._random.choice(("write", "write", "write", "read", "read", "read", "fua", "flush"))
        return self.world.history.begin(kind, self._random.randrange(self.world.blocks))

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
        if number == self._number:
            self._connection = None
            self._go_on(number)
