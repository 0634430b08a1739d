"""The NBD transmission phase, request by request. Layouts are written out here, independently of the code.

First the decoder alone; then a connection with a real file, a real socket and a primary with a secondary.
"""

import asyncio
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest
from fakes import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    MemoryMap,
    MemoryStore,
    load_differences,
    request,
    simple_replies,
)

from stortrends_ha.dataplane.export import Export, ServerCounters
from stortrends_ha.dataplane.nbd_connection import Connection
from stortrends_ha.errors import StorageError
from stortrends_ha.limits import (
    CLIENT_BACKLOG_BYTES,
    OUTPUT_BUFFER_BYTES,
    REQUESTS_PER_BATCH,
    WRITE_PIECE_BYTES,
    WRITE_WHOLE_BYTES,
    ZERO_PIECE_BYTES,
)
from stortrends_ha.protocol import nbd_transmission as nbd
from stortrends_ha.protocol.nbd_handshake import Export as HandshakeExport
from stortrends_ha.protocol.nbd_handshake import Negotiated
from stortrends_ha.protocol.nbd_transmission import (
    OP_PUNCH,
    OP_WRITE,
    OP_ZERO,
    Batch,
    Decoder,
    Geometry,
    Other,
)
from stortrends_ha.replication.gate import FOREVER_NS, Gate
from stortrends_ha.replication.interfaces import Buffer
from stortrends_ha.replication.primary import Primary
from stortrends_ha.replication.secondary import Secondary
from stortrends_ha.replication.session import Plan
from stortrends_ha.storage.backing import Backing

EPERM, EIO, EINVAL, ENOSPC, ENOTSUP = 1, 5, 22, 28, 95
MIB = 1 << 20
SIZE = 64 * MIB
PLAIN = Geometry(SIZE, can_trim=True)
STRUCTURED = Geometry(SIZE, structured_replies=True, block_status=True)
READ_ONLY = Geometry(SIZE, read_only=True)
COOKIE = 0xFFEEDDCCBBAA9988


def decode(stream: bytes, geometry: Geometry = PLAIN) -> Batch:
    return Decoder(geometry).decode(memoryview(stream), len(stream))


def chunk(stream: bytes) -> tuple[int, int, int, bytes]:
    """(flags, type, cookie, payload) of the one structured reply chunk there is."""
    magic, flags, kind, cookie, length = struct.unpack_from(">IHHQI", stream)
    assert magic == 0x668E33EF
    assert len(stream) == 20 + length
    return flags, kind, cookie, stream[20:]


def refused(stream: bytes, geometry: Geometry = PLAIN) -> int:
    """The error of the one request in the stream, of which nothing else comes; all of it is consumed."""
    batch = decode(stream, geometry)
    assert (batch.changes, batch.reads, batch.others, batch.frames) == ([], [], [], [])
    assert (batch.broken, batch.disconnect, batch.consumed) == ("", False, len(stream))
    [answer] = batch.answers
    if answer.startswith(b"\x67"):
        [reply] = simple_replies(answer)
        assert reply.cookie == COOKIE
        return reply.error
    flags, kind, cookie, payload = chunk(answer)
    assert (flags, kind, cookie) == (1, 32769, COOKIE)
    error, message = struct.unpack(">IH", payload)
    assert message == 0
    return int(error)


def one(kind: int, offset: int = 0, length: int = 512, flags: int = 0) -> bytes:
    payload = bytes(length) if kind == WRITE else b""
    return request(kind, COOKIE, offset, length, flags, payload)


# --- What is asked for ------------------------------------------------------------------------


def test_write_becomes_a_change_whose_payload_stays_where_it_is() -> None:
    stream = request(WRITE, COOKIE, 4096, payload=b"data")
    batch = decode(stream)
    [(op, offset, length, at)] = batch.changes
    assert (op, offset, length, stream[at : at + length]) == (OP_WRITE, 4096, 4, b"data")
    assert simple_replies(b"".join(batch.replies)) == [(0, COOKIE)]
    assert b"".join(batch.frames) == stream


def test_cookie_is_opaque() -> None:
    for cookie in (0, 2**64 - 1, 0x2560951325609513):
        batch = decode(request(WRITE, cookie, payload=b"x") + request(WRITE, cookie, 0, 9, 1 << 9, b"y"))
        assert simple_replies(batch.replies[0] + batch.answers[0]) == [(0, cookie), (EINVAL, cookie)]
        assert decode(request(READ, cookie, 0, 1)).reads == [(cookie.to_bytes(8), 0, 1)]


@pytest.mark.parametrize(
    ("kind", "flags", "op"),
    [
        (TRIM, 0, OP_PUNCH),
        (TRIM, FUA, OP_PUNCH),
        (WRITE_ZEROES, 0, OP_PUNCH),
        (WRITE_ZEROES, NO_HOLE, OP_ZERO),
        (WRITE_ZEROES, NO_HOLE | FUA | FAST_ZERO, OP_ZERO),
        (WRITE_ZEROES, FAST_ZERO, OP_PUNCH),
    ],
)
def test_trims_and_zeroes_become_changes(kind: int, flags: int, op: int) -> None:
    stream = one(kind, 512, 1024, flags)
    batch = decode(stream)
    assert [change[:3] for change in batch.changes] == [(op, 512, 1024)]
    assert b"".join(batch.frames) == stream
    assert (batch.trims, batch.zeroes) == (int(kind == TRIM), int(kind == WRITE_ZEROES))
    assert (b"".join(batch.replies) == b"") == bool(flags & FUA)


@pytest.mark.parametrize("kind", [TRIM, WRITE_ZEROES])
def test_trims_and_zeroes_may_be_longer_than_the_longest_payload(kind: int) -> None:
    decoder = Decoder(Geometry(1 << 40, maximum_payload_bytes=4096))
    stream = one(kind, 1 << 39, 2**32 - 1, FUA) + one(READ, 0, 512)
    batches = [decoder.decode(memoryview(stream), len(stream))]
    while batches[-1].more:  # one piece a call, so that nobody waits long
        rest = stream[batches[0].consumed :]
        batches.append(decoder.decode(memoryview(rest), len(rest)))
    changes = [change for batch in batches for change in batch.changes]
    assert [len(batch.changes) for batch in batches] == [1] * len(changes)
    assert max(length for _, _, length, _ in changes) == ZERO_PIECE_BYTES
    at = 1 << 39
    for _, offset, length, _ in changes:
        assert offset == at
        at += length
    assert at == (1 << 39) + 2**32 - 1
    assert [bool(batch.durable) for batch in batches] == [False] * (len(batches) - 1) + [True]
    assert len(batches[-1].reads) == 1


def test_reply_to_a_change_with_fua_waits_for_a_flush() -> None:
    batch = decode(request(WRITE, COOKIE, payload=b"x", flags=FUA) + one(TRIM, flags=FUA))
    assert batch.replies == [b"", b""]
    assert simple_replies(b"".join(batch.durable)) == [(0, COOKIE), (0, COOKIE)]


@pytest.mark.parametrize("kind", [READ, FLUSH, CACHE, BLOCK_STATUS])
def test_fua_is_accepted_on_every_command(kind: int) -> None:
    batch = decode(one(kind, flags=FUA), STRUCTURED)
    assert len(batch.reads) + len(batch.others) == 1
    assert batch.answers == []


def test_flush_cache_and_block_status_are_handed_on() -> None:
    for kind, flags in ((FLUSH, 0), (CACHE, 0), (BLOCK_STATUS, 0), (BLOCK_STATUS, REQ_ONE)):
        expected = Other(kind, flags, COOKIE.to_bytes(8), 512, 1024)
        assert decode(one(kind, 512, 1024, flags), STRUCTURED).others == [expected]


def test_flush_does_not_look_at_its_offset_and_length() -> None:
    assert len(decode(one(FLUSH, 2**64 - 1, 2**32 - 1)).others) == 1


def test_changes_side_by_side_go_to_the_link_as_one_slice() -> None:
    write = request(WRITE, payload=b"x" * 512)
    batch = decode(write * 3 + one(READ) + write + one(FLUSH) + write * 2)
    assert [len(piece) for piece in batch.frames] == [len(write) * 3, len(write), len(write) * 2]


def test_trim_that_cannot_be_done_is_a_success_that_changes_nothing_anywhere() -> None:
    batch = decode(one(TRIM), PLAIN._replace(can_trim=False))
    assert (batch.changes, batch.frames) == ([], [])
    assert simple_replies(b"".join(batch.answers)) == [(0, COOKIE)]


def test_requests_of_a_batch_are_bounded_and_none_is_lost() -> None:
    count = REQUESTS_PER_BATCH * 2 + 7
    stream = memoryview(b"".join(request(READ, cookie, 0, 1) for cookie in range(count)))
    decoder, cookies, at, more = Decoder(PLAIN), list[int](), 0, True
    while more:
        batch = decoder.decode(stream[at:], len(stream) - at)
        assert len(batch.reads) <= REQUESTS_PER_BATCH
        cookies += [int.from_bytes(cookie) for cookie, _, _ in batch.reads]
        at, more = at + batch.consumed, batch.more
    assert cookies == list(range(count))


def test_end_of_the_input_is_given_and_not_that_of_the_buffer() -> None:
    stream = one(READ) + one(READ)
    batch = Decoder(PLAIN).decode(memoryview(stream), 50)
    assert (len(batch.reads), batch.consumed) == (1, 28)


# --- Long writes ------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, FUA])
def test_long_write_is_taken_in_pieces_and_answered_once_at_its_end(flags: int) -> None:
    payload = bytes(range(256)) * (WRITE_WHOLE_BYTES // 256 * 3) + b"odd"
    stream = request(WRITE, COOKIE, 8192, flags=flags, payload=payload) + one(READ)
    decoder, rest, replies = Decoder(PLAIN), b"", list[bytes]()
    disk, changes = bytearray(8192 + len(payload)), 0
    for start in range(0, len(stream), 100_000):
        data = rest + stream[start : start + 100_000]
        batch = decoder.decode(memoryview(data), len(data))
        rest = data[batch.consumed :]
        assert len(rest) < WRITE_PIECE_BYTES + 28 + 100_000
        for op, offset, length, at in batch.changes:
            assert op == OP_WRITE
            assert length % WRITE_PIECE_BYTES == 0 or offset + length == 8192 + len(payload)
            disk[offset : offset + length] = data[at : at + length]
        changes += len(batch.changes)
        replies += batch.durable if flags else [reply for reply in batch.replies if reply]
        assert len(batch.replies) == len(batch.changes)
    assert disk[8192:] == payload
    assert changes > 3
    assert simple_replies(b"".join(replies)) == [(0, COOKIE)]


@pytest.mark.parametrize("flags", [0, FUA])
def test_never_much_of_an_unfinished_write_has_to_be_kept(flags: int) -> None:
    for length in (WRITE_WHOLE_BYTES + 1, 32 * MIB):
        stream = request(WRITE, COOKIE, 0, length, flags) + bytes(WRITE_WHOLE_BYTES)
        assert len(stream) - decode(stream).consumed < WRITE_PIECE_BYTES


def test_write_of_32_mib_is_no_abuse() -> None:
    stream = request(WRITE, COOKIE, 0, 32 * MIB) + bytes(MIB)
    batch = decode(stream)
    assert batch.broken == ""
    assert sum(change[2] for change in batch.changes) == MIB


# --- What is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [WRITE, TRIM, WRITE_ZEROES])
@pytest.mark.parametrize("length", [0, 512])
def test_read_only_volume_refuses_changes(kind: int, length: int) -> None:
    assert refused(one(kind, 0, length), READ_ONLY) == EPERM
    assert refused(one(kind, SIZE, length), READ_ONLY) == EPERM


@pytest.mark.parametrize("kind", [READ, CACHE, FLUSH])
def test_read_only_volume_allows_the_rest(kind: int) -> None:
    assert decode(one(kind), READ_ONLY).answers == []


PAST_THE_END = [(SIZE, 512), (SIZE - 512, 1024), (SIZE + 512, 512), (2**64 - 512, 512), (2**64 - 512, 1024)]


@pytest.mark.parametrize(("offset", "length"), PAST_THE_END)
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (READ, EINVAL),
        (WRITE, ENOSPC),
        (TRIM, EINVAL),
        (WRITE_ZEROES, ENOSPC),
        (CACHE, EINVAL),
        (BLOCK_STATUS, EINVAL),
    ],
)
def test_past_the_end_is_refused(kind: int, error: int, offset: int, length: int) -> None:
    assert refused(one(kind, offset, length), PLAIN) == error
    assert refused(one(kind, offset, length), STRUCTURED) == error


@pytest.mark.parametrize("kind", [TRIM, WRITE_ZEROES])
def test_the_longest_length_from_the_last_offset_is_past_the_end(kind: int) -> None:
    assert refused(one(kind, 2**64 - 1, 2**32 - 1)) == (ENOSPC if kind == WRITE_ZEROES else EINVAL)


@pytest.mark.parametrize("kind", [READ, WRITE, TRIM, WRITE_ZEROES, CACHE])
def test_up_to_the_very_end_is_allowed(kind: int) -> None:
    assert decode(one(kind, SIZE - 512)).answers == []


@pytest.mark.parametrize("kind", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS])
@pytest.mark.parametrize(("offset", "length"), [(1, 512), (512, 511), (256, 256), (512, 1)])
def test_misaligned_request_is_invalid(kind: int, offset: int, length: int) -> None:
    assert refused(one(kind, offset, length), STRUCTURED._replace(minimum_block_bytes=512)) == EINVAL


@pytest.mark.parametrize("kind", [READ, WRITE])
def test_payload_longer_than_agreed_is_invalid(kind: int) -> None:
    strict = PLAIN._replace(maximum_payload_bytes=4096)
    assert refused(one(kind, 0, 4097), strict) == EINVAL
    assert decode(one(kind, 0, 4096), strict).answers == []


def test_read_longer_than_the_default_is_invalid() -> None:
    assert refused(one(READ, 0, 32 * MIB + 1)) == EINVAL
    assert len(decode(one(READ, 0, 32 * MIB)).reads) == 1


@pytest.mark.parametrize("kind", [8, 9, 255, 65535])
def test_unknown_command_is_invalid(kind: int) -> None:
    assert refused(one(kind)) == EINVAL
    assert refused(one(kind), STRUCTURED) == EINVAL


KNOWN_FLAGS = {
    READ: FUA | DF,
    WRITE: FUA,
    FLUSH: FUA,
    TRIM: FUA,
    CACHE: FUA,
    WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
    BLOCK_STATUS: FUA | REQ_ONE,
}


@pytest.mark.parametrize("kind", KNOWN_FLAGS)
def test_unknown_flag_is_invalid_whatever_else_is_set(kind: int) -> None:
    for bit in range(16):
        if not KNOWN_FLAGS[kind] >> bit & 1:
            assert refused(one(kind, flags=1 << bit), STRUCTURED) == EINVAL
            assert refused(one(kind, flags=1 << bit | FUA), STRUCTURED) == EINVAL


def test_df_needs_structured_replies() -> None:
    assert refused(one(READ, flags=DF)) == EINVAL
    assert len(decode(one(READ, flags=DF), STRUCTURED).reads) == 1


def test_zeroing_that_is_not_fast_is_refused_to_who_wants_it_fast() -> None:
    never = PLAIN._replace(can_fast_zero=False, can_fast_zero_allocated=False)
    only_holes = PLAIN._replace(can_fast_zero_allocated=False)
    assert refused(one(WRITE_ZEROES, flags=FAST_ZERO), never) == ENOTSUP
    assert refused(one(WRITE_ZEROES, flags=FAST_ZERO | NO_HOLE), only_holes) == ENOTSUP
    assert len(decode(one(WRITE_ZEROES, flags=FAST_ZERO), only_holes).changes) == 1
    assert len(decode(one(WRITE_ZEROES, flags=NO_HOLE), never).changes) == 1


def test_block_status_without_a_context_or_of_nothing_is_invalid() -> None:
    assert refused(one(BLOCK_STATUS)) == EINVAL
    assert refused(one(BLOCK_STATUS), STRUCTURED._replace(block_status=False)) == EINVAL
    assert refused(one(BLOCK_STATUS, length=0), STRUCTURED) == EINVAL


def test_with_structured_replies_a_refused_read_gets_a_chunk() -> None:
    [answer] = decode(one(READ, SIZE), STRUCTURED).answers
    assert chunk(answer) == (1, 32769, COOKIE, struct.pack(">IH", EINVAL, 0))
    [answer] = decode(one(READ, SIZE), PLAIN).answers
    assert simple_replies(answer) == [(EINVAL, COOKIE)]


def test_payload_of_a_refused_write_is_skipped_and_the_connection_lives() -> None:
    payload = request(READ, 666, 0, 512) * 4  # looks like requests, and is none
    after = request(READ, 7, 0, 512)
    for bad in (
        request(WRITE, COOKIE, SIZE, payload=payload),
        request(WRITE, COOKIE, 0, flags=1 << 5, payload=payload),
    ):
        for cut in (0, 10, 28, 29, 60, len(bad), len(bad) + 3):
            decoder, stream = Decoder(PLAIN), bad + after
            first = decoder.decode(memoryview(stream[:cut]), cut)
            rest = stream[first.consumed :]
            second = decoder.decode(memoryview(rest), len(rest))
            assert len(first.answers + second.answers) == 1
            assert first.reads + second.reads == [((7).to_bytes(8), 0, 512)]
            assert not second.broken


# --- Length 0 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES])
@pytest.mark.parametrize("flags", [0, FUA])
def test_length_0_succeeds_and_the_connection_lives(kind: int, flags: int) -> None:
    batch = decode(one(kind, 512, 0, flags) + one(READ), PLAIN)
    assert (batch.changes, batch.frames, batch.others) == ([], [], [])
    assert simple_replies(b"".join(batch.answers)) == [(0, COOKIE)]
    assert len(batch.reads) == 1


def test_read_of_length_0_with_structured_replies_is_a_chunk_without_content() -> None:
    [answer] = decode(one(READ, 512, 0), STRUCTURED).answers
    assert chunk(answer) == (1, 0, COOKIE, b"")


# --- The end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("magic", [0, 0x25609514, 0x67446698, 0x21E41C71])
def test_wrong_magic_ends_the_connection_after_what_came_before(magic: int) -> None:
    batch = decode(request(WRITE, payload=b"x") + request(READ, 0, 0, 1, magic=magic) + one(READ))
    assert f"{magic:#010x}" in batch.broken
    assert (len(batch.changes), batch.reads, batch.answers) == (1, [], [])


@pytest.mark.parametrize("flags", [0, FUA, 1 << 9])
@pytest.mark.parametrize("geometry", [PLAIN, READ_ONLY, Geometry(1 << 40)])
def test_write_of_abusive_length_ends_the_connection(geometry: Geometry, flags: int) -> None:
    batch = decode(request(WRITE, COOKIE, 0, 32 * MIB + 1, flags) + bytes(100_000), geometry)
    assert str(32 * MIB + 1) in batch.broken
    assert (batch.changes, batch.answers) == ([], [])


def test_abusive_length_of_an_unknown_command_does_not_end_the_connection() -> None:
    assert decode(request(99, COOKIE, 0, 2**32 - 1) + one(READ)).broken == ""


def test_disconnect_is_seen_after_what_came_before_and_nothing_after_it_is() -> None:
    batch = decode(request(WRITE, payload=b"x") + one(DISC, 5, 5, 0xFFFF) + request(WRITE, payload=b"y"))
    assert batch.disconnect
    assert (len(batch.changes), len(b"".join(batch.frames)), batch.answers) == (1, 29, [])


def test_only_errors_of_the_document_are_used() -> None:
    assert {EPERM, EIO, EINVAL, ENOSPC, ENOTSUP, 108} == {
        nbd.EPERM, nbd.EIO, nbd.EINVAL, nbd.ENOSPC, nbd.ENOTSUP, nbd.ESHUTDOWN,
    }  # fmt: skip


# --- Replies as they are encoded --------------------------------------------------------------


def test_chunks_are_as_the_document_says() -> None:
    cookie = COOKIE.to_bytes(8)
    assert chunk(nbd.done_chunk(cookie)) == (1, 0, COOKIE, b"")
    assert chunk(nbd.error_chunk(cookie, EIO)) == (1, 32769, COOKIE, struct.pack(">IH", EIO, 0))
    status = nbd.block_status_chunk(cookie, 7, [(4096, 0), (8192, 3)])
    assert chunk(status) == (1, 5, COOKIE, struct.pack(">IIIII", 7, 4096, 0, 8192, 3))
    assert simple_replies(nbd.error_reply(cookie, EIO) + nbd.ok_reply(cookie)) == [(EIO, COOKIE), (0, COOKIE)]


# --- A connection -----------------------------------------------------------------------------


SERVED = 6 * MIB


class Loopback:
    """One way of a link inside this process, as a network would be: later. Implements ``Link``."""

    backlog_bytes = 0

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._kept: list[bytes] = []
        self.receive: Callable[[memoryview, int], int] = lambda _view, end: end
        self.cut = False

    def send(self, buffers: list[Buffer], length: int) -> None:
        data = b"".join(map(bytes, buffers))
        assert len(data) == length
        self._kept.append(data)
        self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        if not self.cut:
            data, self._kept = b"".join(self._kept), []
            assert self.receive(memoryview(data), len(data)) == len(data)

    def mend(self) -> None:
        self.cut = False
        self._deliver()


class SoonMap(MemoryMap):
    """Its writes end in a later turn of the event loop, as those of a thread, unless ``held``."""

    def __init__(self) -> None:
        super().__init__(at_once=False)
        self.held = False

    def start_write(self, pages: Mapping[int, bytes], *, durable: bool, done: Callable[[], None]) -> None:
        super().start_write(pages, durable=durable, done=done)
        if not self.held:
            asyncio.get_running_loop().call_soon(self.end_writes)


class Server:
    """An owner with a real file, in session with a secondary in memory."""

    def __init__(self, path: Path, executor: Executor, size: int = SERVED) -> None:
        self.path = path
        with path.open("wb") as file:
            file.truncate(size)
        self.totals = ServerCounters()
        self.failures: list[StorageError] = []
        self.backing = Backing("vm-a", path, size, executor, self.failures.append)
        self.mirror = MemoryStore(size)
        self.mirror.flush_at_once = True
        self.intents = SoonMap()
        self.differences = load_differences(size, self.intents, MemoryMap())
        self.primary = Primary(
            [self.backing],
            [self.differences],
            1,
            alone=False,
            window_changes=10_000,
            window_bytes=64 << 20,
            failed=self.failures.append,
        )
        self.link, self.answers = Loopback(), Loopback()
        secondary = Secondary([self.mirror], 1, self.answers, 1, lambda: None)
        self.link.receive, self.answers.receive = secondary.receive, self.primary.receive
        self.primary.open_session(self.link, Plan.RESUME)
        self.gate = Gate(until_ns=FOREVER_NS)
        self.offer = HandshakeExport("vm-a", size, 1)
        self.export = Export(0, self.offer, Geometry(size), self.backing, executor, self.totals)
        self.gone: list[str] = []

    async def connect(self, structured: bool = False) -> "Client":
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        contexts = {1: "base:allocation"} if structured else {}
        agreed = Negotiated(self.offer, structured, contexts)
        connection = Connection(
            ours, self.export, self.primary, agreed, self.gate, lambda _, why: self.gone.append(why)
        )
        loop.call_soon(connection.start)
        return Client(connection, *await asyncio.open_connection(sock=theirs))


class Client:
    """The other end of a connection."""

    def __init__(self, connection: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connection = connection
        self.reader = reader
        self.writer = writer

    async def send(self, *requests: bytes) -> None:
        self.writer.write(b"".join(requests))
        await self.writer.drain()

    async def simple(self, cookie: int, length: int = 0) -> bytes:
        """The payload of a successful simple reply."""
        assert struct.unpack(">IIQ", await self.reader.readexactly(16)) == (0x67446698, 0, cookie)
        return await self.reader.readexactly(length)

    async def chunk(self) -> tuple[int, int, int, bytes]:
        header = await self.reader.readexactly(20)
        return chunk(header + await self.reader.readexactly(int.from_bytes(header[16:])))

    async def closed(self) -> bytes:
        """What came before the connection was closed."""
        return await self.reader.read()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    with ThreadPoolExecutor(2) as executor:
        server = Server(tmp_path / "vm-a", executor)
        yield server
        server.backing.close()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    client = await server.connect()
    yield client
    client.connection.close("the test is over")
    client.writer.close()


@pytest.fixture
async def structured(server: Server) -> AsyncIterator[Client]:
    client = await server.connect(structured=True)
    yield client
    client.connection.close("the test is over")
    client.writer.close()


def noise(length: int) -> bytes:
    return random.Random(length).randbytes(length)


async def test_what_was_written_is_read_and_is_on_both_replicas(server: Server, client: Client) -> None:
    await client.send(request(WRITE, 1, 4096, payload=noise(5000)))
    await client.simple(1)
    assert bytes(server.mirror.data[4096:9096]) == noise(5000) == server.path.read_bytes()[4096:9096]
    await client.send(request(READ, COOKIE, 4000, 5200))
    assert await client.simple(COOKIE, 5200) == bytes(96) + noise(5000) + bytes(104)


@pytest.mark.parametrize("length", [1, 4096, 300_000])
async def test_write_reaches_no_replica_before_the_log_has_it(server: Server, client: Client, length: int) -> None:
    server.intents.held = True
    await client.send(request(WRITE, 1, 4096, payload=noise(length)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert server.intents.pending
    assert not any(server.backing.read(4096, length))
    assert not any(server.mirror.data)
    server.intents.held = False
    server.intents.end_writes()
    await client.simple(1)
    assert bytes(server.mirror.data[4096 : 4096 + length]) == noise(length) == server.backing.read(4096, length)


async def test_who_disconnects_while_the_log_is_written_harms_nobody(server: Server) -> None:
    gone, other = await server.connect(), await server.connect()
    server.intents.held = True
    await gone.send(request(WRITE, 1, 0, payload=b"x"))
    for _ in range(20):
        await asyncio.sleep(0)
    gone.connection.close("the client has gone")
    server.intents.held = False
    server.intents.end_writes()
    await other.send(request(WRITE, 2, 1, payload=b"y"))
    await other.simple(2)
    assert server.mirror.data[:2] == b"\0y"
    for one in (gone, other):
        one.writer.close()


@pytest.mark.parametrize("length", [1, 4096, 256 << 10, (512 << 10) - 28, (512 << 10) - 27, 3 * MIB + 1])
@pytest.mark.parametrize("flags", [0, DF])
async def test_structured_read_is_one_chunk_that_covers_all_of_it(
    server: Server, structured: Client, length: int, flags: int
) -> None:
    offset, data = 12345, noise(length)
    with server.path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    await structured.send(request(READ, COOKIE, offset, length, flags))
    done, kind, cookie, payload = await structured.chunk()
    assert (done, kind, cookie, len(payload)) == (1, 1, COOKIE, length + 8)
    assert payload[:8] == offset.to_bytes(8)
    assert payload[8:] == data


async def test_longest_read_is_served(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        server = Server(tmp_path / "vm-a", executor, 33 * MIB)
        client = await server.connect()
        await client.send(request(READ, 1, MIB, 32 * MIB))
        assert not any(await client.simple(1, 32 * MIB))
        client.connection.close("the test is over")
        client.writer.close()
        server.backing.close()


@pytest.mark.parametrize("length", [600_000, 4 * MIB])
async def test_replies_wait_behind_a_long_one(client: Client, length: int) -> None:
    await client.send(
        request(WRITE, 1, payload=b"before"),
        request(READ, 2, 4096, length),
        request(99, 3),
        request(WRITE, 4, payload=b"behind"),
        request(READ, 5, 4096, 10),
    )
    found = dict[int, int]()
    while len(found) < 5:
        magic, error, cookie = struct.unpack(">IIQ", await client.reader.readexactly(16))
        payload = await client.reader.readexactly({2: length, 5: 10}.get(cookie, 0))
        assert magic == 0x67446698
        assert payload == bytes(len(payload))
        found[cookie] = error
    assert found == {1: 0, 2: 0, 3: EINVAL, 4: 0, 5: 0}


async def test_many_requests_of_one_batch_are_all_answered(client: Client) -> None:
    await client.send(*(request(READ, cookie, cookie * 512, 1) for cookie in range(5000)))
    cookies = set()
    for _ in range(5000):
        _, error, cookie = struct.unpack(">IIQ", await client.reader.readexactly(16))
        cookies.add((error, cookie))
        await client.reader.readexactly(1)
    assert cookies == {(0, cookie) for cookie in range(5000)}


async def test_client_that_takes_no_replies_makes_the_server_keep_few(server: Server, client: Client) -> None:
    client.reader._transport.pause_reading()  # type: ignore[attr-defined]
    sending = asyncio.create_task(client.send(*(request(READ, n, 0, 256 << 10) for n in range(60))))
    other = await server.connect()
    for _ in range(20):  # the server works for another client all the while
        await other.send(request(WRITE, 7, payload=b"x"))
        await other.simple(7)
        assert client.connection._sender.backlog_bytes <= CLIENT_BACKLOG_BYTES + OUTPUT_BUFFER_BYTES
    client.reader._transport.resume_reading()  # type: ignore[attr-defined]
    for n in range(60):
        await client.simple(n, 256 << 10)
    await sending
    other.connection.close("the test is over")
    other.writer.close()


async def test_read_error_is_not_told_while_the_other_node_has_the_data(server: Server, client: Client) -> None:
    os.truncate(server.path, 0)
    await client.send(request(READ, 1, 0, 4096))
    async with asyncio.timeout(10):
        while not server.failures:
            await asyncio.sleep(0)
    assert "shorter" in str(server.failures[0])
    client.connection.close("")
    assert await client.reader.read() == b""


async def test_read_error_is_told_without_payload_if_nobody_else_has_the_data(
    server: Server, client: Client, structured: Client
) -> None:
    server.primary.close_session()
    server.primary.change_record(2, alone=True)
    os.truncate(server.path, 0)
    await client.send(request(READ, 1, 0, 4096))
    assert simple_replies(await client.reader.readexactly(16)) == [(EIO, 1)]
    await structured.send(request(READ, 2, 0, 4096))
    assert await structured.chunk() == (1, 32769, 2, struct.pack(">IH", EIO, 0))
    assert server.totals.disk_errors == 2


@pytest.mark.parametrize("agreed", ["simple", "structured"])
async def test_error_in_the_middle_of_a_reply_closes_the_connection(
    server: Server, client: Client, structured: Client, agreed: str
) -> None:
    os.truncate(server.path, 1 * MIB)
    reader = client if agreed == "simple" else structured
    await reader.send(request(READ, 1, 0, 4 * MIB))
    assert len(await reader.closed()) <= 28 + 1 * MIB
    assert server.totals.disk_errors == 1


async def test_read_waits_for_a_write_in_flight_that_it_overlaps(server: Server, client: Client) -> None:
    server.answers.cut = True
    await client.send(request(WRITE, 1, 0, payload=b"new"), request(READ, 2, 1 * MIB, 3))
    assert await client.simple(2, 3) == bytes(3)  # another place: not held
    await client.send(request(READ, 3, 0, 3), request(READ, 4, 1 * MIB, 3))
    assert await client.simple(4, 3) == bytes(3)
    server.answers.mend()
    await client.simple(1)
    assert await client.simple(3, 3) == b"new"


async def test_long_read_waits_for_a_write_that_comes_into_its_way(
    server: Server, client: Client, structured: Client
) -> None:
    end = 5 * MIB
    await client.send(request(READ, 1, 0, end))
    begin = await client.simple(1, 4096)
    server.answers.cut = True
    await structured.send(request(WRITE, 2, end - 3, payload=b"new"), request(READ, 3, end + 65536, 1))
    await structured.chunk()  # so the write has been taken
    most = await client.reader.readexactly(end - 4096 - MIB)
    server.answers.mend()
    last = await client.reader.readexactly(MIB)
    assert begin + most + last == bytes(end - 3) + b"new"
    await structured.simple(2)


@pytest.mark.parametrize("flags", [0, FUA])
async def test_flush_and_fua_end_when_both_replicas_are_stable(server: Server, client: Client, flags: int) -> None:
    server.mirror.flush_at_once = False
    await client.send(request(WRITE, 1, 0, flags=flags, payload=b"data"))
    if not flags:
        await client.simple(1)
        await client.send(request(FLUSH, 1))
    await client.send(request(READ, 9, 1 * MIB, 1))
    await client.simple(9, 1)  # the other has not come
    assert server.mirror.stable[:4] != b"data"
    while not server.mirror.flushes:
        await client.send(request(READ, 9, 1 * MIB, 1))
        await client.simple(9, 1)
    server.mirror.end_flushes()
    await client.simple(1)
    assert server.mirror.stable[:4] == b"data"


async def test_flush_covers_what_was_answered_on_other_connections(
    server: Server, client: Client, structured: Client
) -> None:
    await client.send(request(WRITE, 1, 0, payload=b"data"))
    await client.simple(1)
    await structured.send(request(FLUSH, 2))
    await structured.simple(2)
    assert server.mirror.stable[:4] == b"data"


async def test_write_zeroes_reads_as_zeroes_and_no_hole_keeps_it_allocated(server: Server, structured: Client) -> None:
    await structured.send(request(WRITE, 1, 0, payload=noise(MIB)))
    await structured.simple(1)
    for flags, fewest, most in ((NO_HOLE, MIB, 2 * MIB), (0, 0, 65536)):
        await structured.send(request(WRITE_ZEROES, 2, 0, MIB, flags | FUA))
        await structured.simple(2)
        assert server.path.read_bytes()[:MIB] == bytes(MIB) == server.mirror.data[:MIB]
        assert fewest <= server.path.stat().st_blocks * 512 <= most


async def test_block_status_tells_extents_of_the_one_context(structured: Client) -> None:
    await structured.send(request(WRITE, 1, 65536, payload=noise(65536)))
    await structured.simple(1)
    for flags, expected in (
        (0, [(61440, 3), (65536, 0), (1000, 3)]),
        (REQ_ONE, [(61440, 3)]),
    ):
        await structured.send(request(BLOCK_STATUS, 2, 4096, 61440 + 65536 + 1000, flags))
        done, kind, cookie, payload = await structured.chunk()
        assert (done, kind, cookie, payload[:4]) == (1, 5, 2, (1).to_bytes(4))
        assert list(struct.iter_unpack(">II", payload[4:])) == expected


async def test_cache_and_length_0_are_answered_with_success(server: Server, structured: Client) -> None:
    await structured.send(request(CACHE, 1, 0, 65536), request(WRITE, 2, 0, 0), request(TRIM, 3, 5, 0))
    assert sorted(simple_replies(await structured.reader.readexactly(48))) == [(0, 1), (0, 2), (0, 3)]
    assert server.export.counters.errors == 0


async def test_errors_are_counted(server: Server, client: Client) -> None:
    await client.send(request(99, 1), request(READ, 2, SERVED, 1))
    assert simple_replies(await client.reader.readexactly(32)) == [(EINVAL, 1), (EINVAL, 2)]
    assert server.export.counters.errors == 2


async def test_disconnect_closes_an_idle_connection(server: Server, client: Client) -> None:
    await client.send(request(WRITE, 1, payload=b"x"))
    await client.simple(1)
    await client.send(request(DISC))
    assert await client.closed() == b""
    assert server.gone == ["the client disconnected"]


async def test_disconnect_finishes_what_is_outstanding_and_takes_nothing_more(
    server: Server, client: Client, structured: Client
) -> None:
    server.answers.cut = True
    await client.send(
        request(WRITE, 1, 0, payload=b"x"),
        request(FLUSH, 2),
        request(READ, 3, 0, 1),
        request(DISC),
        request(WRITE, 4, 0, payload=b"y"),
    )
    await structured.send(request(READ, 5, 1 * MIB, 1))
    await structured.chunk()
    assert server.gone == []
    server.answers.mend()
    replies = await client.closed()
    assert len(replies) == 3 * 16 + 1
    assert {replies[at + 15] for at in (0, 16)} <= {1, 2, 3}
    assert server.backing.read(0, 1) == b"x"


async def test_wrong_magic_closes_that_connection_and_no_other(
    server: Server, client: Client, structured: Client
) -> None:
    await client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert await client.closed() == b""
    assert server.totals.nbd_bad_input == 1
    await structured.send(request(READ, 1, 0, 1))
    assert (await structured.chunk())[:2] == (1, 1)


async def test_client_that_vanishes_leaves_its_writes(server: Server, client: Client, structured: Client) -> None:
    server.answers.cut = True
    await client.send(request(WRITE, 1, 0, payload=b"data"))
    client.writer.close()
    await client.writer.wait_closed()
    await structured.send(request(FLUSH, 2))
    server.answers.mend()
    await structured.simple(2)
    assert server.mirror.data[:4] == b"data"
    assert server.primary.idle


async def test_replies_that_the_gate_holds_back_leave_when_it_opens(server: Server, client: Client) -> None:
    server.gate.until_ns = 0
    await client.send(request(WRITE, 1, payload=b"held"), request(99, 2), request(READ, 3, 0, 4))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.reader.read(1), 0.1)
    assert server.mirror.data[:4] == b"held"  # the work is done: only the answer waits
    server.gate.until_ns = FOREVER_NS
    client.connection.gate_opened()
    assert set(simple_replies(await client.reader.readexactly(2 * 16))) == {(0, 1), (EINVAL, 2)}
    assert await client.simple(3, 4) == b"held"


async def test_replies_that_the_gate_holds_back_are_forgotten_with_the_connection(
    server: Server, client: Client
) -> None:
    server.gate.until_ns = 0
    await client.send(request(READ, 1, 0, 4))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.reader.read(1), 0.1)
    client.connection.close("this node does not own the group any more")
    server.gate.until_ns = FOREVER_NS
    assert await client.closed() == b""
