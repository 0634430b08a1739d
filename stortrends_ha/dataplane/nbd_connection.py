"""One client's connection in the transmission phase.

On the hot path, per batch: one ``recv_into`` a buffer that all connections share, one call to decode, one to
the primary. Shaped so because every call and every object costs a tenth of what a small write costs in all.

Invariants:
- Changes and flushes are answered by ``replication.Primary``; only errors, reads (``nbd_reads``) and what has
  no effect are answered from here.
- Rule 8: changes whose regions are not in the intent log yet wait for that as they came, and are decoded again.
- Rule 5: every reply leaves through the gate (``gated``): while that is closed the client is not read from.
- After DISC nothing more is taken; what is outstanding is finished, then the connection is closed.

Bounds, a connection: unfinished input of INPUT_BUFFER_BYTES; what ``nbd_reads`` and the primary's window allow.
Beyond any of them the client is not read from.
"""

import asyncio
import socket
from collections.abc import Callable

from stortrends_ha.errors import StorageError
from stortrends_ha.limits import INPUT_BUFFER_BYTES
from stortrends_ha.protocol import nbd_transmission as nbd
from stortrends_ha.protocol.nbd_handshake import Negotiated
from stortrends_ha.protocol.nbd_transmission import Batch, Decoder, Other
from stortrends_ha.replication.gate import Gate
from stortrends_ha.replication.primary import Primary

from .export import Export
from .gated import GatedSender
from .nbd_reads import ClientReads

# All connections of a process take turns with it, as everything happens in one thread.
_input = memoryview(bytearray(INPUT_BUFFER_BYTES))


class Connection:
    """A client in transmission. Implements ``replication.interfaces.Client``."""

    __slots__ = (
        "_context_id",
        "_decoder",
        "_ending",
        "_gone",
        "_logging",
        "_loop",
        "_more",
        "_owed",
        "_paused",
        "_primary",
        "_reading",
        "_reads",
        "_rest",
        "_sender",
        "closed",
        "export",
        "sock",
    )

    def __init__(
        self,
        sock: socket.socket,
        export: Export,
        primary: Primary,
        agreed: Negotiated,
        gate: Gate,
        gone: "Callable[[Connection, str], None]",
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.sock = sock
        self._primary = primary
        self._gone = gone
        self._context_id = next(iter(agreed.contexts), 0)  # there is one context, base:allocation
        structured = agreed.structured_replies
        self._decoder = Decoder(
            export.geometry._replace(structured_replies=structured, block_status=bool(agreed.contexts))
        )
        self._sender = GatedSender(self._loop, sock, self._advance, self.close, gate)
        self._reads = ClientReads(export, primary, self._sender, structured, self._advance, self.close)
        self._rest = agreed.leftover  # an unfinished request, or requests beyond the bound of a batch
        self._more = bool(agreed.leftover)  # _rest may have whole requests
        self._logging = False  # changes in _rest wait for the intent log
        self._owed = 0  # changes and flushes that the primary has not answered
        self._paused = False
        self._reading = False
        self._ending = False  # the client has sent DISC
        self.closed = False
        self.export = export

    def start(self) -> None:
        """Begin, with what came behind the handshake."""
        if not self.export.geometry.failed:  # else nothing will be submitted
            self._primary.attach(self)
        self._advance()

    # --- Input --------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The socket's file descriptor."""
        return self.sock.fileno()

    def hung_up(self) -> None:
        """The client has gone; what it sent before is still taken if it can be taken now."""
        if self._reading:
            self._on_readable()
        else:
            self.close("the client has gone")

    def _on_readable(self) -> None:
        have = len(self._rest)
        if have:
            _input[:have] = self._rest
        try:
            count = self.sock.recv_into(_input[have:] if have else _input)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as e:
            self.close(e.strerror or str(e))
            return
        if not count:
            self.close("the client closed the connection")
        elif not self._ending:
            self._process(have + count)

    def _process(self, end: int) -> None:
        """Carry out the requests in the first ``end`` bytes of the input."""
        batch = self._decoder.decode(_input, end)
        if batch.changes and not self._primary.logged(self.export.index, batch.changes, self._logged):
            self._decoder.take_back()
            self._rest, self._more, self._logging = bytes(_input[:end]), True, True
            self._set_reading(False)
            return
        self._rest = bytes(_input[batch.consumed : end]) if batch.consumed != end else b""
        self._more = batch.more
        if batch.changes:
            self._change(batch)
        if batch.reads:
            self._reads.waiting.extend(batch.reads)
            self._reads.run()
        if batch.answers or batch.others or batch.broken or batch.disconnect:
            self._unusual(batch)
        if self._more or self._ending or not self._reading or self._reads.blocked:
            self._advance()

    def _logged(self) -> None:
        """It is worth trying again: at once, as the client has waited long enough."""
        self._logging = False
        self._process_rest()

    def _change(self, batch: Batch) -> None:
        counters = self.export.counters
        counters.writes += len(batch.changes) - batch.trims - batch.zeroes
        counters.trims += batch.trims
        counters.zeroes += batch.zeroes
        self._owed += len(batch.replies) - batch.replies.count(b"") + len(batch.durable)
        counters.written_bytes += self._primary.submit(self, self.export.index, batch, _input)

    def _unusual(self, batch: Batch) -> None:
        self.export.counters.errors += batch.errors
        self._reads.send(b"".join(batch.answers))
        flushes = [nbd.ok_reply(other.cookie) for other in batch.others if other.kind == nbd.CMD_FLUSH]
        if flushes:
            self.export.counters.flushes += len(flushes)
            self._owed += len(flushes)
            self._primary.flush(self, self.export.index, flushes)
        for other in batch.others:
            if other.kind == nbd.CMD_CACHE:
                self.export.store.prefetch(other.offset, other.length)
                self._reads.send(nbd.ok_reply(other.cookie))
            elif other.kind == nbd.CMD_BLOCK_STATUS:
                self._reads.send(self._block_status(other))
        self._ending = self._ending or batch.disconnect
        if batch.broken:
            self.export.bad_input()
            self.close(batch.broken)

    def _block_status(self, other: Other) -> bytes:
        try:
            extents = self.export.store.extents(other.offset, other.length)
        except StorageError as e:
            self.export.disk_error(e)
            return nbd.error_chunk(other.cookie, nbd.EIO) if self._primary.cannot_read(e) else b""
        if other.flags & nbd.FLAG_REQ_ONE:
            del extents[1:]
        hole = nbd.STATE_HOLE | nbd.STATE_ZERO
        described = [(length, 0 if is_data else hole) for is_data, length in extents]
        return nbd.block_status_chunk(other.cookie, self._context_id, described)

    # --- Flow ---------------------------------------------------------------------------------

    def answer(self, replies: bytes) -> None:
        """Replies of the primary: to changes and flushes."""
        self._owed -= len(replies) // nbd.SIMPLE_REPLY.size
        self._reads.send(replies)
        if self._ending:
            self._advance()

    def gate_opened(self) -> None:
        """Rule 5: replies may leave again."""
        self._sender.let_go()
        self._advance()

    def pause(self) -> None:
        """Take no more requests."""
        self._paused = True
        self._set_reading(False)

    def resume(self) -> None:
        """Take requests again."""
        self._paused = False
        self._advance()

    def _advance(self) -> None:
        """Something that was waited for has happened: go on as far as the bounds allow."""
        if self.closed:
            return
        if not self._paused:
            self._reads.go_on()
        if self._ending and not self.in_flight and self._sender.is_empty:
            self.close("the client disconnected")
            return
        ready = not (self._paused or self._reads.blocked or self._logging)
        if ready and self._more and not self._ending:
            self._set_reading(False)
            self._loop.call_soon(self._process_rest)
        else:
            self._set_reading(ready or self._ending)

    def _process_rest(self) -> None:
        if self._more and not (self.closed or self._paused or self._reads.blocked or self._logging):
            end = len(self._rest)
            _input[:end] = self._rest
            self._process(end)

    def _set_reading(self, reading: bool) -> None:
        if reading != self._reading and not self.closed:
            self._reading = reading
            if reading:
                self._loop.add_reader(self.sock.fileno(), self._on_readable)
            else:
                self._loop.remove_reader(self.sock.fileno())

    @property
    def in_flight(self) -> int:
        """Requests that have come and have not been answered."""
        return self._owed + self._reads.in_flight

    def close(self, why: str) -> None:
        """Close at once. Changes that were taken go on; nobody hears of it."""
        if self.closed:
            return
        self._set_reading(False)
        self.closed = True
        self._primary.detach(self)
        self._sender.close()
        self.sock.close()
        self._gone(self, why)
