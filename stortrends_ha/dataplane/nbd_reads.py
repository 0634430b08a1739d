"""The reads of one connection: from the page cache at once, from the disk in threads, long ones in pieces.

On the hot path: ``run`` puts the replies to a batch together in one buffer that all connections share, reading
straight into it, and sends them with one system call.

Invariants:
- What was read leaves only when the changes that it may show have been answered (``replication.ordering``): a read
  that overlaps changes in flight is done, and its reply held until everything in flight by then is answered.
- Whole replies leave in one piece: while a long read is being sent, others wait behind it.
- Rule 5: every reply passes the gate after it was read (``gated``); while it is closed no more is read.
- Once the header of a long reply has left, it cannot turn into an error: the connection is closed (point 50).

Bounds: ``waiting`` is at most one batch; reads from disk DISK_READ_BYTES; a client's backlog
CLIENT_BACKLOG_BYTES and one output buffer.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from stortrends_ha.errors import StorageError
from stortrends_ha.limits import (
    DISK_READ_BYTES,
    OUTPUT_BUFFER_BYTES,
    READ_PIECE_BYTES,
)
from stortrends_ha.protocol import nbd_transmission as nbd
from stortrends_ha.protocol.nbd_transmission import Read
from stortrends_ha.replication.primary import Primary

from .export import Export
from .gated import GatedSender

_output = memoryview(bytearray(OUTPUT_BUFFER_BYTES))


@dataclass(slots=True)
class LongRead:
    """A read that is longer than the output buffer, being sent in pieces."""

    offset: int
    remaining: int


class ClientReads:
    """What one connection reads. ``advance`` is called when something that was waited for has happened."""

    __slots__ = (
        "_advance",
        "_close",
        "_deferred",
        "_disk_bytes",
        "_export",
        "_held",
        "_long",
        "_loop",
        "_primary",
        "_sender",
        "_structured",
        "waiting",
    )

    def __init__(
        self,
        export: Export,
        primary: Primary,
        sender: GatedSender,
        structured: bool,
        advance: Callable[[], None],
        close: Callable[[str], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._export = export
        self._primary = primary
        self._sender = sender
        self._structured = structured
        self._advance = advance
        self._close = close
        self.waiting: deque[Read] = deque()
        self._held = 0  # replies that wait for changes in flight
        self._disk_bytes = 0  # being read, or held, in memory of their own
        self._long: LongRead | None = None
        self._deferred: list[bytes] = []  # replies behind a long read

    @property
    def in_flight(self) -> int:
        """Reads that have not been answered; those that come from the disk count as one."""
        return len(self.waiting) + self._held + (self._long is not None) + bool(self._disk_bytes)

    @property
    def blocked(self) -> bool:
        """Whether no more requests should be taken yet."""
        return bool(self.waiting) or self._long is not None or not self._sender.has_room

    def send(self, replies: bytes) -> None:
        """Send whole replies, of whatever request: behind a long read if there is one."""
        if self._long is not None:
            self._deferred.append(replies)
        elif replies:
            self._sender.send([replies], len(replies))

    def go_on(self) -> None:
        """Do what the bounds allow by now."""
        if self._long is not None and self._sender.has_room:
            self._read_piece()
        if self.waiting and self._long is None:
            self.run()

    def run(self) -> None:
        """Carry out waiting reads, as many as the client takes the replies of.

        The loop is long because a call in it would cost as much as what it does: a read that hits the page cache is
        a slice, a system call and a header. What is unusual goes elsewhere, and asks ``_may_read`` again.
        """
        waiting, output, structured = self.waiting, _output, self._structured
        primary, volume, read_into = self._primary, self._export.index, self._export.store.read_into
        put_chunk, put_simple = nbd.READ_CHUNK.pack_into, nbd.SIMPLE_OK.pack_into
        header = nbd.READ_CHUNK.size if structured else nbd.SIMPLE_OK.size
        changing = primary.changing
        at = count = 0
        may_read = self._may_read
        while waiting and may_read:
            cookie, offset, length = waiting.popleft()
            payload = at + header
            stop = payload + length
            if stop > OUTPUT_BUFFER_BYTES:
                self._flush(at, count, header)
                at = count = 0
                payload, stop = header, header + length
                may_read = self._may_read
                if stop > OUTPUT_BUFFER_BYTES:
                    self._begin_long(cookie, offset, length)
                    break
            if changing and primary.in_flight(volume, offset, length):
                self._read_aside((cookie, offset, length))
                may_read = self._may_read
                continue
            try:
                cached = read_into(output[payload:stop], offset)
            except StorageError as e:
                self._refuse(cookie, e)
                continue
            if not cached:
                self._read_from_disk((cookie, offset, length))
                may_read = self._may_read
                continue
            if structured:
                put_chunk(output, at, nbd.READ_CHUNK_HEAD, cookie, length + 8, offset)
            else:
                put_simple(output, at, nbd.SIMPLE_OK_HEAD, cookie)
            at = stop
            count += 1
        self._flush(at, count, header)

    def _flush(self, at: int, count: int, header: int) -> None:
        """Send the ``count`` replies in the first ``at`` bytes of the output buffer."""
        if count:
            self._count(count, at - count * header)
            self._sender.send([_output[:at]], at)

    @property
    def _may_read(self) -> bool:
        return self._long is None and self._sender.has_room and self._disk_bytes < DISK_READ_BYTES

    def _header(self, cookie: bytes, offset: int, length: int) -> bytes:
        if self._structured:
            return nbd.READ_CHUNK.pack(nbd.READ_CHUNK_HEAD, cookie, length + 8, offset)
        return nbd.ok_reply(cookie)

    def _count(self, reads: int, length: int) -> None:
        self._export.counters.reads += reads
        self._export.counters.read_bytes += length

    def _refuse(self, cookie: bytes, error: StorageError) -> None:
        """Rule 13: unless the other node can answer it."""
        self._export.disk_error(error)
        if self._primary.cannot_read(error):
            self.send((nbd.error_chunk if self._structured else nbd.error_reply)(cookie, nbd.EIO))

    def _read_aside(self, read: Read) -> None:
        """Read into memory of its own, as the reply may have to wait."""
        cookie, offset, length = read
        data = bytearray(length)
        try:
            cached = self._export.store.read_into(memoryview(data), offset)
        except StorageError as e:
            self._refuse(cookie, e)
            return
        if cached:
            self._when_answered(offset, length, lambda: self._answer(read, data))
        else:
            self._read_from_disk(read)

    def _answer(self, read: Read, data: bytearray) -> None:
        self._count(1, len(data))
        self.send(self._header(*read) + data)

    def _when_answered(self, offset: int, length: int, do: Callable[[], None]) -> None:
        """Now, or when what is in flight now has been answered if it overlaps the range that was read."""
        if not self._primary.in_flight(self._export.index, offset, length):
            do()
            return
        self._held += 1
        self._disk_bytes += length

        def answered() -> None:
            self._held -= 1
            self._disk_bytes -= length
            if not self._sender.closed:
                do()
                self._advance()

        self._primary.when_settled(answered)

    # --- From the disk ------------------------------------------------------------------------

    def _start_disk_read(self, offset: int, length: int, ended: Callable[["asyncio.Future[bytearray]"], None]) -> None:
        self._disk_bytes += length
        advance = self._primary.probe.timed(self._advance)

        def back(done: "asyncio.Future[bytearray]") -> None:
            self._disk_bytes -= length
            error = done.exception()
            if error is not None and not isinstance(error, StorageError):
                raise error
            if not self._sender.closed:
                ended(done)
                advance()

        future = self._loop.run_in_executor(self._export.executor, self._export.store.read, offset, length)
        future.add_done_callback(back)

    def _read_from_disk(self, read: Read) -> None:
        """What is not in the page cache is read in a thread, and answered when it comes."""
        cookie, offset, length = read

        def ended(done: "asyncio.Future[bytearray]") -> None:
            error = done.exception()
            if isinstance(error, StorageError):
                self._refuse(cookie, error)
            else:
                self._when_answered(offset, length, lambda: self._answer(read, done.result()))

        self._start_disk_read(offset, length, ended)

    # --- Long reads ---------------------------------------------------------------------------

    def _begin_long(self, cookie: bytes, offset: int, length: int) -> None:
        self._count(1, length)
        self.send(self._header(cookie, offset, length))
        self._long = LongRead(offset, length)
        self._read_piece()

    def _read_piece(self) -> None:
        """Read the next piece of a long read, once other reads, or the piece before, are done."""
        long = self._long
        if long is None or self._sender.closed or self._disk_bytes:
            return
        length = min(long.remaining, READ_PIECE_BYTES)
        self._start_disk_read(long.offset, length, lambda done: self._piece_ended(done, long, length))

    def _piece_ended(self, done: "asyncio.Future[bytearray]", long: LongRead, length: int) -> None:
        error = done.exception()
        if isinstance(error, StorageError):
            self._export.disk_error(error)
            self._primary.cannot_read(error)
            self._close("the disk failed in the middle of a reply")
        else:
            self._when_answered(long.offset, length, lambda: self._send_piece(long, done.result()))

    def _send_piece(self, long: LongRead, data: bytearray) -> None:
        self._sender.send([data], len(data))
        long.offset += len(data)
        long.remaining -= len(data)
        if not long.remaining:
            self._long = None
            deferred, self._deferred = b"".join(self._deferred), []
            self.send(deferred)
