"""Clients, and the server's side of their connections.

``User`` makes requests, as a virtual machine would, and checks each reply. ``ServerConnection`` does what
``dataplane.nbd_connection.Connection`` and ``nbd_reads`` do, without a socket: same order, same names. Left out:
structured replies, replies in pieces, the backlog of replies, block status.
"""

from collections import deque
from typing import TYPE_CHECKING

from stortrends_ha.protocol import nbd_transmission as nbd
from stortrends_ha.protocol.nbd_transmission import REQUEST, Decoder, Geometry, Other, Read

from .checks import Request, Violation

if TYPE_CHECKING:
    from .owner import Owner
    from .world import World

DISK_READS = 3


class ServerConnection:
    """The owner's side of one client's connection. Implements ``replication.interfaces.Client``."""

    def __init__(self, owner: "Owner", user: "User") -> None:
        world = owner.world
        self._owner = owner
        self._world = world
        self._primary = owner.primary
        self._user = user
        self._volume = user.volume
        self._store = owner.stores[user.volume]
        self._decoder = Decoder(Geometry(world.volume_bytes, minimum_block_bytes=world.block_bytes))
        self._rest = b""
        self._more = False
        self._todo: deque[Read] = deque()
        self.disk_reads: list[tuple[Read, bytes | None]] = []
        self._paused = False
        self.reading = False
        self.closed = False

    def start(self) -> None:
        """Mirrors ``Connection.start``."""
        self._primary.attach(self)
        self._advance()

    # --- Input: mirrors _on_readable, _process, _change, _other --------------------------------------

    @property
    def room_bytes(self) -> int:
        """How much one read of the socket takes."""
        return self._world.limits["INPUT_BUFFER_BYTES"] - len(self._rest)

    def receive(self, data: bytes) -> None:
        """Some input has come."""
        have = len(self._rest)
        buffer = self._owner.input
        buffer[:have] = self._rest
        buffer[have : have + len(data)] = data
        self._process(have + len(data))

    def _process(self, end: int) -> None:
        buffer = self._owner.input
        batch = self._decoder.decode(buffer, end)
        self._rest = bytes(buffer[batch.consumed : end]) if batch.consumed != end else b""
        self._more = batch.more
        if batch.changes:
            self._primary.submit(self, self._volume, batch, buffer)
        if batch.reads:
            self._todo.extend(batch.reads)
            self._read()
        if batch.answers or batch.broken:
            raise Violation(f"a valid request was refused: {batch.broken or batch.answers}")
        if batch.others:
            self._other(batch.others)
        buffer[:] = b"\xee" * len(buffer)  # the buffer is another client's from now on
        if self._more or not self.reading or self._todo:
            self._advance()

    def _other(self, others: list[Other]) -> None:
        flushes = [nbd.ok_reply(other.cookie) for other in others if other.kind == nbd.CMD_FLUSH]
        self._primary.flush(self, self._volume, flushes)

    # --- Reads: mirrors nbd_reads.ClientReads -------------------------------

    def _read(self) -> None:
        while self._todo and len(self.disk_reads) < DISK_READS:
            _, offset, length = read = self._todo.popleft()
            if self._world.random.random() < 0.2:  # not in the page cache: the thread reads somewhen until the event
                early = self._world.random.random() < 0.5
                self.disk_reads.append((read, self._store.content(offset, length) if early else None))
            else:
                self._when_answered(read, self._store.content(offset, length))

    def _when_answered(self, read: Read, content: bytes) -> None:
        """What was read leaves when the changes that it may show have been answered."""
        _, offset, length = read
        if not self._primary.in_flight(self._volume, offset, length):
            self._reply(read, content)
            return

        def answered() -> None:
            if not self.closed:
                self._reply(read, content)
                self._advance()

        self._primary.when_settled(answered)

    def end_disk_read(self) -> None:
        """A thread has read what it was asked for."""
        read, content = self.disk_reads.pop(self._world.random.randrange(len(self.disk_reads)))
        _, offset, length = read
        self._when_answered(read, self._store.content(offset, length) if content is None else content)
        self._advance()

    def _reply(self, read: Read, content: bytes) -> None:
        self._user.receive(nbd.ok_reply(read[0]) + content)

    # --- Output and flow: mirrors answer, pause, resume, _advance, _process_rest ----------------------

    def answer(self, replies: bytes) -> None:
        """Replies of the primary."""
        if not self.closed:
            self._user.receive(replies)

    def pause(self) -> None:
        """Take no more requests."""
        self._paused = True
        self.reading = False
        self._world.count["clients paused"] += 1

    def resume(self) -> None:
        """Take requests again."""
        self._paused = False
        self._advance()

    def _advance(self) -> None:
        if self.closed:
            return
        if self._todo and not self._paused:
            self._read()
        ready = not (self._paused or self._todo)
        if ready and self._more:
            self.reading = False
            self._world.soon(self._owner, self._process_rest)
        else:
            self.reading = ready

    def _process_rest(self) -> None:
        if self._more and not (self.closed or self._paused or self._todo):
            self._owner.input[: len(self._rest)] = self._rest
            self._process(len(self._rest))

    def close(self) -> None:
        """Mirrors ``Connection.close``: changes that were taken go on; nobody hears of it."""
        if self.closed:
            return
        self.closed, self.reading = True, False
        self._primary.detach(self)
        self._todo.clear()
        self.disk_reads.clear()
        self._owner.connections.discard(self)
        self._user.disconnected()


class User:
    """A virtual machine on one volume: requests at hot places, several at a time."""

    def __init__(self, world: "World", volume: int, depth: int) -> None:
        self._world = world
        self.volume = volume
        self._depth = depth
        self.connection: ServerConnection | None = None
        self.requests: dict[bytes, Request] = {}
        self.outbound = bytearray()
        self._cookie = 0

    def disconnected(self) -> None:
        """The connection is gone: what was not answered has an unknown outcome."""
        self.connection = None
        self.requests.clear()
        self.outbound.clear()

    # --- Requests -------------------------------------------------------------------------------

    @property
    def wants_more(self) -> bool:
        """Whether it may send another request now."""
        return len(self.requests) < self._depth

    def request(self) -> None:
        """Make one request."""
        world = self._world
        kind = world.random.choices(*world.mix)[0]
        durable = kind in ("write", "trim", "zero", "allocate") and world.random.random() < world.fua_share
        self._cookie += 1
        offset, length = world.pick_range() if kind != "flush" else (0, 0)
        request = Request(kind, self.volume, offset, length, self._cookie.to_bytes(8), durable, world.history.newest)
        self.requests[request.cookie] = request
        payload = b""
        if kind == "write":
            request.value = world.new_value()
            payload = request.value * (length // 8)
        elif kind == "read":
            world.history.begin_read(request)
        elif kind == "flush":
            world.history.begin_flush(request)
        self.outbound += REQUEST.pack(_head(kind, durable), request.cookie, offset, length) + payload
        world.count[kind + (" FUA" if durable else "")] += 1
        world.note("user %d: %s%s", world.users.index(self), request, " FUA" if durable else "")

    # --- Replies --------------------------------------------------------------------------------

    def receive(self, replies: bytes) -> None:
        """Check replies."""
        at = 0
        while at < len(replies):
            magic, error, cookie = nbd.SIMPLE_REPLY.unpack_from(replies, at)
            at += nbd.SIMPLE_REPLY.size
            request = self.requests.pop(cookie, None)
            if magic != nbd.SIMPLE_REPLY_MAGIC or request is None:
                raise Violation(f"a reply to nothing, or a second one: cookie {cookie.hex()}")
            if error:
                raise Violation(f"{request} was answered with error {error}")
            length = request.length if request.kind == "read" else 0
            self._check(request, replies[at : at + length])
            at += length

    def _check(self, request: Request, data: bytes) -> None:
        self._world.note("answered: %s", request)
        self._world.answered += 1
        if request.kind == "read":
            self._world.history.was_read(request, data)
        elif request.kind == "flush":
            self._world.history.flushed(request)
        else:
            self._world.history.changed(request)


_COMMANDS = {
    "read": (nbd.CMD_READ, 0),
    "write": (nbd.CMD_WRITE, 0),
    "flush": (nbd.CMD_FLUSH, 0),
    "trim": (nbd.CMD_TRIM, 0),
    "zero": (nbd.CMD_WRITE_ZEROES, 0),
    "allocate": (nbd.CMD_WRITE_ZEROES, nbd.FLAG_NO_HOLE),
}


def _head(kind: str, durable: bool) -> int:
    command, flags = _COMMANDS[kind]
    return nbd.request_head(command, flags | (nbd.FLAG_FUA if durable else 0))
