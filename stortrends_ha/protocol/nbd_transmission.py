"""The NBD transmission phase, pure: a batch of requests in, what to do with each of them out.

This is on the hot path: one call decodes every whole request that a socket brought, with one precompiled
``struct`` a request and no object but a tuple. Plain reads and writes are told by comparing the first
eight bytes (magic, flags, type) with a constant; whatever is unusual takes ``_unusual``.

Invariants:
- What comes out as a change or a read is valid: within the export, permitted, aligned. Everything else
  has become an error reply here, and the payload of a refused write is skipped.
- Changes leave as they came (``frames`` are slices of the input), ready to be put on the link.
- A write longer than ``WRITE_WHOLE_BYTES`` whose data is still arriving is taken in pieces: each is a
  change of its own, and only the last one carries the reply. So an unfinished request is never large.
- A trim or zeroing longer than ``ZERO_PIECE_BYTES`` is taken in pieces, too, one a call; and a request that may
  take milliseconds (CACHE, BLOCK_STATUS) ends its batch. ``more`` then asks for another call.
- Only a wrong magic or an abusive length ends the connection (point 61 of the checklist).

Neighbours: ``dataplane.nbd_connection`` feeds it; ``replication.Primary`` takes the batch; the link carries
changes in this very format (``protocol.link``). Source: doc/proto.md of the NBD project.
"""

from collections.abc import Iterable
from struct import Struct
from typing import NamedTuple

from stortrends_ha.limits import (
    ABUSIVE_PAYLOAD_BYTES,
    REQUEST_HEADER_BYTES,
    REQUESTS_PER_BATCH,
    WRITE_PIECE_BYTES,
    WRITE_WHOLE_BYTES,
    ZERO_PIECE_BYTES,
)

REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS = range(8)

FLAG_FUA, FLAG_NO_HOLE, FLAG_DF, FLAG_REQ_ONE, FLAG_FAST_ZERO = 1, 2, 4, 8, 16

EPERM, EIO, EINVAL, ENOSPC, ENOTSUP, ESHUTDOWN = 1, 5, 22, 28, 95, 108

STATE_HOLE, STATE_ZERO = 1, 2  # of base:allocation

REPLY_FLAG_DONE = 1
CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_BLOCK_STATUS, CHUNK_ERROR = 0, 1, 5, 32769

# Magic, flags and type as one number; then the cookie, which is only echoed, offset and length.
REQUEST = Struct(">Q8sQI")
SIMPLE_REPLY = Struct(">II8s")
CHUNK = Struct(">IHH8sI")
# As the first eight bytes are always the same: a successful simple reply; a chunk's header and the offset of its data.
SIMPLE_OK = Struct(">Q8s")
SIMPLE_OK_HEAD = SIMPLE_REPLY_MAGIC << 32
READ_CHUNK = Struct(">Q8sIQ")
READ_CHUNK_HEAD = STRUCTURED_REPLY_MAGIC << 32 | REPLY_FLAG_DONE << 16 | CHUNK_OFFSET_DATA

# What a change does to a replica. PUNCH deallocates, ZERO keeps the range allocated; both read as zeroes.
OP_WRITE, OP_PUNCH, OP_ZERO = range(3)

Change = tuple[int, int, int, int]  # (op, offset, length, where its payload begins in the input)
Read = tuple[bytes, int, int]  # (cookie, offset, length)


def request_head(kind: int, flags: int = 0) -> int:
    """The first eight bytes of a request, as a number."""
    return REQUEST_MAGIC << 32 | flags << 16 | kind


PLAIN_READ = request_head(CMD_READ)
PLAIN_WRITE = request_head(CMD_WRITE)
OK_PREFIX = SIMPLE_OK_HEAD.to_bytes(8)

# The flags each command may carry. FUA is accepted on all (point 51).
_FLAGS = {
    CMD_READ: FLAG_FUA | FLAG_DF,
    CMD_WRITE: FLAG_FUA,
    CMD_FLUSH: FLAG_FUA,
    CMD_TRIM: FLAG_FUA,
    CMD_CACHE: FLAG_FUA,
    CMD_WRITE_ZEROES: FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO,
    CMD_BLOCK_STATUS: FLAG_FUA | FLAG_REQ_ONE,
}
_MODIFYING = frozenset((CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES))
_PAST_THE_END = {CMD_WRITE: ENOSPC, CMD_WRITE_ZEROES: ENOSPC}


HEAD_OF_OP = (PLAIN_WRITE, request_head(CMD_TRIM), request_head(CMD_WRITE_ZEROES, FLAG_NO_HOLE))


def change_op(head: int) -> int | None:
    """What a change's first eight bytes ask a replica to do; None if they are not those of a change."""
    kind = head & 0xFFFF
    return _op(kind, head >> 16 & 0xFFFF) if head >> 32 == REQUEST_MAGIC and kind in _MODIFYING else None


def _op(kind: int, flags: int) -> int:
    if kind == CMD_WRITE:
        return OP_WRITE
    return OP_ZERO if kind == CMD_WRITE_ZEROES and flags & FLAG_NO_HOLE else OP_PUNCH


class Geometry(NamedTuple):
    """What decoding needs to know of an export."""

    size_bytes: int
    read_only: bool = False
    minimum_block_bytes: int = 1
    maximum_payload_bytes: int = ABUSIVE_PAYLOAD_BYTES
    structured_replies: bool = False
    block_status: bool = False  # the client selected base:allocation
    can_trim: bool = True  # else a trim changes nothing, on either replica
    can_fast_zero: bool = True
    can_fast_zero_allocated: bool = True
    failed: bool = False  # every request is answered with EIO

    def refusing(self) -> "Geometry":
        """Of the same export, after its disk has failed."""
        return self._replace(failed=True, maximum_payload_bytes=0)  # so that no request is a usual one


class Other(NamedTuple):
    """A request that is neither a read nor a change: flush, cache, block status."""

    kind: int
    flags: int
    cookie: bytes
    offset: int
    length: int


class Batch:
    """What the requests of one piece of input ask for. Requests of a batch are not ordered among themselves."""

    __slots__ = (
        "answers",
        "broken",
        "changes",
        "consumed",
        "disconnect",
        "durable",
        "errors",
        "frames",
        "more",
        "others",
        "reads",
        "replies",
        "trims",
        "zeroes",
    )

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.replies: list[bytes] = []  # one a change; empty for one that is answered otherwise
        self.frames: list[bytes | memoryview] = []  # the changes as they came, for the link
        self.durable: list[bytes] = []  # replies of FUA changes: they wait for a flush
        self.reads: list[Read] = []
        self.others: list[Other] = []
        self.answers: list[bytes] = []  # errors, and successes with nothing to do
        self.errors = 0  # how many of the answers are errors
        self.consumed = 0  # up to where the input was used
        self.more = False  # the bound of a batch was reached: there may be more whole requests
        self.trims = self.zeroes = 0  # how many of the changes are
        self.disconnect = False
        self.broken = ""  # why the connection cannot go on


def ok_reply(cookie: bytes) -> bytes:
    """A simple reply: success without payload. Allowed for all but READ, whatever was negotiated."""
    return OK_PREFIX + cookie


def error_reply(cookie: bytes, error: int) -> bytes:
    """A simple reply with an error: for all but a READ with structured replies."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def error_chunk(cookie: bytes, error: int) -> bytes:
    """A structured reply that is an error, without a message."""
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, CHUNK_ERROR, cookie, 6) + error.to_bytes(4) + b"\0\0"


def done_chunk(cookie: bytes) -> bytes:
    """A structured reply without content: success."""
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, CHUNK_NONE, cookie, 0)


def block_status_chunk(cookie: bytes, context_id: int, extents: Iterable[tuple[int, int]]) -> bytes:
    """A structured reply with (length, flags) of consecutive extents for one meta context."""
    payload = context_id.to_bytes(4) + b"".join(n.to_bytes(4) + flags.to_bytes(4) for n, flags in extents)
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, CHUNK_BLOCK_STATUS, cookie, len(payload)) + payload


class Decoder:
    """Decodes the requests of one connection. Keeps only how much of a long write is still to come."""

    __slots__ = ("_before", "_head", "_offset", "_reply", "_reply_is_durable", "_to_come", "_to_skip", "geometry")

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self._to_skip = 0  # bytes of a refused write's payload
        self._to_come = 0  # bytes of a change that is taken in pieces: which, to where, and its reply at the end
        self._head = PLAIN_WRITE
        self._offset = 0
        self._reply = b""
        self._reply_is_durable = False

    def take_back(self) -> None:
        """The newest batch was not carried out: the same input is decoded again."""
        self._to_skip, self._to_come, self._head, self._offset, self._reply, self._reply_is_durable = self._before

    def decode(self, view: memoryview, end: int) -> Batch:
        """Decode the whole requests in ``view[:end]``; ``consumed`` says where an unfinished one begins."""
        self._before = (
            self._to_skip, self._to_come, self._head, self._offset, self._reply, self._reply_is_durable,
        )  # fmt: skip
        batch = Batch()
        at = 0
        if self._to_come or self._to_skip:
            at = self._skip(end) if self._to_skip else self._next_piece(batch, view, end)
            if self._to_come or self._to_skip:
                batch.consumed = at
                batch.more = self._to_come > 0 and self._head != PLAIN_WRITE
                return batch
        size, read_only, minimum, longest = self.geometry[:4]
        mask = minimum - 1
        unpack, header = REQUEST.unpack_from, REQUEST_HEADER_BYTES
        changes, replies, reads, frames = batch.changes, batch.replies, batch.reads, batch.frames
        run = run_end = at  # changes side by side go to the link as one slice
        for _ in range(REQUESTS_PER_BATCH):
            if end - at < header:
                break
            head, cookie, offset, length = unpack(view, at)
            usual = 0 < length <= longest and offset + length <= size and not (offset | length) & mask
            if head == PLAIN_READ and usual:
                reads.append((cookie, offset, length))
                at += header
            elif head == PLAIN_WRITE and usual and not read_only:
                payload = at + header
                if payload + length > end:
                    break
                changes.append((OP_WRITE, offset, length, payload))
                replies.append(OK_PREFIX + cookie)
                if run_end != at:
                    if run_end > run:
                        frames.append(view[run:run_end])
                    run = at
                at = run_end = payload + length
            else:
                if run_end > run:
                    frames.append(view[run:run_end])
                used = self._unusual(batch, view, at, end)
                at += used
                run = run_end = at
                if not used or batch.disconnect or batch.more:
                    break
        else:
            batch.more = True
        if run_end > run:
            frames.append(view[run:run_end])
        batch.consumed = at
        if end - at > header + WRITE_PIECE_BYTES and not (batch.more or batch.broken or batch.disconnect):
            batch.consumed = self._begin_long_write(batch, view, at, end)
        return batch

    def _unusual(self, batch: Batch, view: memoryview, at: int, end: int) -> int:
        """Handle one request that is not a plain, valid read or write; 0 if it is not all there yet."""
        head, cookie, offset, length = REQUEST.unpack_from(view, at)
        flags, kind = head >> 16 & 0xFFFF, head & 0xFFFF
        if head >> 32 != REQUEST_MAGIC:
            batch.broken = f"a request began with {head >> 32:#010x} instead of the magic number"
            return 0
        if kind == CMD_WRITE and length > ABUSIVE_PAYLOAD_BYTES:
            batch.broken = f"a write of {length} bytes is longer than any server must take"
            return 0
        if kind == CMD_DISC:
            batch.disconnect = True
            return REQUEST_HEADER_BYTES
        if error := self._error(kind, flags, offset, length):
            batch.answers.append(self._refusal(kind, cookie, error))
            batch.errors += 1
            self._to_skip = length if kind == CMD_WRITE else 0
            return REQUEST_HEADER_BYTES + self._skip(end - at - REQUEST_HEADER_BYTES)
        used = REQUEST_HEADER_BYTES + (length if kind == CMD_WRITE else 0)
        if used > end - at:
            return 0
        if kind in _MODIFYING and length:
            self._change(batch, view[at : at + used], (head, cookie, offset, length), at + REQUEST_HEADER_BYTES)
        elif kind == CMD_READ and length:
            batch.reads.append((cookie, offset, length))
        elif kind == CMD_FLUSH or length:
            batch.more = kind != CMD_FLUSH
            batch.others.append(Other(kind, flags, cookie, offset, length))
        else:
            batch.answers.append(self._nothing(kind, cookie))
        return used

    def _change(self, batch: Batch, frame: memoryview, request: tuple[int, bytes, int, int], payload: int) -> None:
        """A change with flags, or a trim or zeroes."""
        head, cookie, offset, length = request
        flags, kind = head >> 16 & 0xFFFF, head & 0xFFFF
        if kind == CMD_TRIM and not self.geometry.can_trim:
            batch.answers.append(ok_reply(cookie))
            return
        batch.trims += kind == CMD_TRIM
        batch.zeroes += kind == CMD_WRITE_ZEROES
        durable = bool(flags & FLAG_FUA)
        if kind != CMD_WRITE and length > ZERO_PIECE_BYTES:
            self._head = head & ~(FLAG_FUA << 16)
            self._begin_pieces(offset, length, ok_reply(cookie), durable)
            self._take_zeroes(batch)
            batch.more = True
            return
        batch.changes.append((_op(kind, flags), offset, length, payload))
        batch.frames.append(frame)
        self._reply_to(batch, ok_reply(cookie), durable)

    @staticmethod
    def _reply_to(batch: Batch, reply: bytes, durable: bool) -> None:
        batch.replies.append(b"" if durable else reply)
        if durable:
            batch.durable.append(reply)

    def _error(self, kind: int, flags: int, offset: int, length: int) -> int:
        """Why a request cannot be carried out, as an NBD error; 0 if it can."""
        geometry = self.geometry
        if geometry.failed:
            return EIO
        if kind not in _FLAGS or flags & ~_FLAGS[kind] or (flags & FLAG_DF and not geometry.structured_replies):
            return EINVAL
        if kind == CMD_FLUSH:
            return 0
        if geometry.read_only and kind in _MODIFYING:
            return EPERM
        if offset + length > geometry.size_bytes:
            return _PAST_THE_END.get(kind, EINVAL)
        if (offset | length) & (geometry.minimum_block_bytes - 1):
            return EINVAL
        if kind in (CMD_READ, CMD_WRITE) and length > geometry.maximum_payload_bytes:
            return EINVAL
        if kind == CMD_BLOCK_STATUS and not (geometry.block_status and length):
            return EINVAL
        if flags & FLAG_FAST_ZERO:
            fast = geometry.can_fast_zero_allocated if flags & FLAG_NO_HOLE else geometry.can_fast_zero
            return 0 if fast else ENOTSUP
        return 0

    def _refusal(self, kind: int, cookie: bytes, error: int) -> bytes:
        if kind in (CMD_READ, CMD_BLOCK_STATUS) and self.geometry.structured_replies:
            return error_chunk(cookie, error)
        return error_reply(cookie, error)

    def _nothing(self, kind: int, cookie: bytes) -> bytes:
        """The success of a request of length 0."""
        structured = kind == CMD_READ and self.geometry.structured_replies
        return done_chunk(cookie) if structured else ok_reply(cookie)

    def _skip(self, available: int) -> int:
        """Skip what is there of a refused write's payload; return how much that was."""
        skipped = min(self._to_skip, available)
        self._to_skip -= skipped
        return skipped

    # --- Changes in pieces ----------------------------------------------------------------------

    def _begin_pieces(self, offset: int, length: int, reply: bytes, durable: bool) -> None:
        self._offset, self._to_come = offset, length
        self._reply, self._reply_is_durable = reply, durable

    def _begin_long_write(self, batch: Batch, view: memoryview, at: int, end: int) -> int:
        """Start to take a long, valid write in pieces; return where what was not used begins."""
        head, cookie, offset, length = REQUEST.unpack_from(view, at)
        if head & 0xFFFF != CMD_WRITE or length <= WRITE_WHOLE_BYTES:
            return at
        self._head = PLAIN_WRITE
        self._begin_pieces(offset, length, ok_reply(cookie), bool(head >> 16 & FLAG_FUA))
        at += REQUEST_HEADER_BYTES
        return at + self._take_data(batch, view, at, end)

    def _next_piece(self, batch: Batch, view: memoryview, end: int) -> int:
        """Go on with a change that is taken in pieces; return how much of the input that took."""
        if self._head == PLAIN_WRITE:
            return self._take_data(batch, view, 0, end)
        self._take_zeroes(batch)
        return 0

    def _take_data(self, batch: Batch, view: memoryview, at: int, end: int) -> int:
        """Turn what is there of a long write into a change; return how many bytes that took."""
        length = min(self._to_come, end - at)
        if length < self._to_come:
            length -= length % WRITE_PIECE_BYTES
        if length:
            self._take(batch, length, at)
            batch.frames.append(view[at : at + length])
        return length

    def _take_zeroes(self, batch: Batch) -> None:
        self._take(batch, min(self._to_come, ZERO_PIECE_BYTES), 0)

    def _take(self, batch: Batch, length: int, payload: int) -> None:
        """The next piece, as a change of its own."""
        batch.changes.append((_op(self._head & 0xFFFF, self._head >> 16 & 0xFFFF), self._offset, length, payload))
        batch.frames.append(REQUEST.pack(self._head, self._reply[8:], self._offset, length))
        self._offset += length
        self._to_come -= length
        if self._to_come:
            batch.replies.append(b"")
        else:
            self._reply_to(batch, self._reply, self._reply_is_durable)
