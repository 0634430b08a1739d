"""Invariants tested: the decoder of NBD requests does the same however its input is cut, does what a plain
model of the document does, and never raises; and what it puts on the link makes the same replica at the
secondary.

Most cases run with small limits (writes are taken in pieces from 65 bytes on), so that byte by byte is
quick; some with the real ones.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from unittest.mock import patch

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
    MemoryLink,
    MemoryStore,
    request,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stortrends_ha.limits import INPUT_BUFFER_BYTES, WRITE_PIECE_BYTES, WRITE_WHOLE_BYTES
from stortrends_ha.protocol import nbd_transmission as nbd
from stortrends_ha.protocol.link import Kind, changes_header
from stortrends_ha.protocol.nbd_transmission import OP_WRITE, Batch, Change, Decoder, Geometry
from stortrends_ha.replication.secondary import Secondary

ABUSIVE = 32 << 20
NOISE = b"".join(struct.pack(">I", n * 2654435761 % 2**32) for n in range(1 << 18))


def small_limits() -> AbstractContextManager[object]:
    return patch.multiple(nbd, WRITE_WHOLE_BYTES=64, WRITE_PIECE_BYTES=16, REQUESTS_PER_BATCH=3)


# --- Requests ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request, and the payload that is really sent with it."""

    kind: int
    flags: int
    cookie: int
    offset: int
    length: int
    noise_at: int = 0
    magic: int = 0x25609513

    @property
    def payload(self) -> bytes:
        return NOISE[self.noise_at : self.noise_at + self.length] if self.kind == WRITE else b""

    @property
    def encoded(self) -> bytes:
        return request(self.kind, self.cookie, self.offset, self.length, self.flags, self.payload, self.magic)


def geometries(size: int) -> st.SearchStrategy[Geometry]:
    return st.builds(
        lambda structured, block_status, **fields: Geometry(
            size, structured_replies=structured, block_status=structured and block_status, **fields
        ),
        st.booleans(),
        st.booleans(),
        read_only=st.sampled_from([False, False, False, True]),
        minimum_block_bytes=st.sampled_from([1, 1, 4, 16]),
        maximum_payload_bytes=st.sampled_from([ABUSIVE, size // 2]),
        can_trim=st.booleans(),
        can_fast_zero=st.booleans(),
        can_fast_zero_allocated=st.booleans(),
    )


def requests(size: int) -> st.SearchStrategy[Request]:
    """Mostly valid ones of a volume of ``size``."""
    near = st.integers(0, size // 16).map(lambda n: n * 16)
    offsets = st.one_of(near, near, st.integers(0, size + 40), st.sampled_from([2**64 - 1, 2**64 - 16, 2**63]))
    lengths = st.one_of(near, st.integers(0, 40), st.integers(0, size + 40))
    kinds_sent = st.sampled_from(
        [READ, WRITE, WRITE, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, 8, 77, 65535]
    )
    flags = st.one_of(
        st.just(0),
        st.just(0),
        st.sampled_from([FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO]),
        st.integers(0, 31),
        st.integers(0, 65535),
    )
    return st.builds(Request, kinds_sent, flags, st.integers(0, 2**64 - 1), offsets, lengths, st.integers(0, 999))


plain_writes = st.builds(
    lambda n, length, noise_at: Request(WRITE, 0, n, n * 16, length, noise_at),
    st.integers(0, 60),
    st.sampled_from([1, 16, 32, 64, 65, 80, 200]),
    st.integers(0, 999),
)
endings = st.sampled_from(
    [
        [],
        [],
        [Request(DISC, 0, 9, 0, 0), Request(WRITE, 0, 9, 0, 16)],
        [Request(READ, 0, 9, 0, 16, magic=0x25609512), Request(WRITE, 0, 9, 0, 16)],
    ]
)
SMALL = 1024


def conversations(size: int) -> st.SearchStrategy[list[Request]]:
    return st.builds(lambda some, end: some + end, st.lists(requests(size) | plain_writes, max_size=8), endings)


# --- What the decoder makes of them -----------------------------------------------------------


@dataclass
class Outcome:
    """All that can be seen of a decoder, but for how it is divided into batches."""

    disk: bytearray
    replies: list[bytes] = field(default_factory=list)
    durable: list[bytes] = field(default_factory=list)
    reads: list[tuple[bytes, int, int]] = field(default_factory=list)
    others: list[tuple[int, int, bytes, int, int]] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)
    trims: int = 0
    zeroes: int = 0
    disconnect: bool = False
    broken: str = ""


class Feeder:
    """Uses a decoder as a connection does, and a real secondary as the link does."""

    def __init__(self, geometry: Geometry, takes_back: Sequence[int] = ()) -> None:
        """``takes_back``: how often each batch is taken back, before it is carried out."""
        self.takes_back = iter(takes_back)
        self.decoder = Decoder(geometry)
        self.geometry = geometry
        self.seen = Outcome(bytearray(geometry.size_bytes))
        self.rest = b""
        self.mirror = MemoryStore(geometry.size_bytes)
        self.link = MemoryLink()
        self.secondary = Secondary([self.mirror], 5, self.link, 1, lambda: None)
        self.issued = 0
        self.log: list[tuple[int, int, int]] = []

    def feed(self, piece: bytes) -> None:
        """What comes at once, in parts that the input buffer takes."""
        while piece:
            room = INPUT_BUFFER_BYTES - len(self.rest)
            assert room > 0
            self._feed(piece[:room])
            piece = piece[room:]

    def _feed(self, piece: bytes) -> None:
        data, more = self.rest + piece, True
        while more and not self.over:
            more, consumed = self._decode(data)
            data = data[consumed:]
        self.rest = data

    @property
    def over(self) -> bool:
        return self.seen.disconnect or bool(self.seen.broken)

    def _decode(self, data: bytes) -> tuple[bool, int]:
        buffer = bytearray(data + b"\xaa" * 50)  # what follows in the buffer must not matter
        batch = self.decoder.decode(memoryview(buffer), len(data))
        for _ in range(next(self.takes_back, 0)):
            seen_first = contents(batch)
            self.decoder.take_back()
            batch = self.decoder.decode(memoryview(buffer), len(data))
            assert contents(batch) == seen_first
        assert 0 <= batch.consumed <= len(data)
        assert not batch.more or batch.consumed
        assert len(batch.replies) == len(batch.changes)
        self._apply(batch.changes, buffer)
        self._mirror(batch.changes, [bytes(piece) for piece in batch.frames])
        seen = self.seen
        seen.replies += [reply for reply in batch.replies if reply]
        seen.durable += batch.durable
        seen.reads += batch.reads
        seen.others += batch.others
        seen.answers += batch.answers
        seen.trims += batch.trims
        seen.zeroes += batch.zeroes
        seen.disconnect, seen.broken = batch.disconnect, batch.broken
        return batch.more, batch.consumed

    def _apply(self, changes: list[Change], buffer: bytearray) -> None:
        for op, offset, length, at in changes:
            assert length > 0
            assert offset + length <= self.geometry.size_bytes
            assert not self.geometry.read_only
            payload = buffer[at : at + length] if op == OP_WRITE else bytes(length)
            assert len(payload) == length
            self.seen.disk[offset : offset + length] = payload
            self.log.append((op, offset, length))

    def _mirror(self, changes: list[Change], frames: list[bytes]) -> None:
        """The round trip: what goes to the link does the same at the secondary, change by change."""
        stream = b"".join(frames)
        assert bool(stream) == bool(changes)
        if not stream:
            return
        message = changes_header(5, self.issued + 1, 0, len(stream)) + stream
        assert self.secondary.receive(memoryview(message), len(message)) == len(message)
        self.issued += len(changes)
        [ack] = self.link.frames()
        assert (ack.kind, ack.seq) == (Kind.ACK, self.issued)
        assert self.mirror.data == self.seen.disk
        assert self.mirror.applied == self.log


def contents(batch: Batch) -> dict[str, object]:
    return {name: getattr(batch, name) for name in Batch.__slots__ if name != "frames"} | {
        "frames": [bytes(frame) for frame in batch.frames]
    }


def outcome(geometry: Geometry, pieces: Iterator[bytes], takes_back: Sequence[int] = ()) -> Outcome:
    feeder = Feeder(geometry, takes_back)
    for piece in pieces:
        if feeder.over:
            break
        feeder.feed(piece)
    return feeder.seen


def cut(stream: bytes, cuts: list[int]) -> Iterator[bytes]:
    at = 0
    for end in [*sorted(min(end, len(stream)) for end in cuts), len(stream)]:
        yield stream[at:end]
        at = end


def byte_by_byte(stream: bytes) -> Iterator[bytes]:
    return (stream[at : at + 1] for at in range(len(stream)))


# --- However the input is cut -----------------------------------------------------------------


@settings(deadline=None, max_examples=120)
@given(geometries(SMALL), conversations(SMALL))
@example(
    Geometry(SMALL),
    [Request(WRITE, FUA, 1, 0, 500), Request(WRITE, 0, 2, 16, 500, 7), Request(FLUSH, 0, 3, 0, 0)],
)
@example(
    Geometry(SMALL),
    [Request(WRITE, 0, 1, 1000, 500), Request(WRITE, 0, 2, 16, 81, 7), Request(DISC, 0, 3, 0, 0)],
)
@example(Geometry(SMALL, read_only=True), [Request(WRITE, 0, 1, 0, 500), Request(READ, 0, 2, 16, 81)])
def test_byte_by_byte_is_the_same_as_at_once(geometry: Geometry, sent: list[Request]) -> None:
    stream = b"".join(one.encoded for one in sent)
    with small_limits():
        assert outcome(geometry, byte_by_byte(stream)) == outcome(geometry, iter([stream]))


@settings(deadline=None, max_examples=200)
@given(geometries(SMALL), conversations(SMALL), st.lists(st.integers(0, 4000), max_size=12))
def test_any_pieces_are_the_same_as_at_once(geometry: Geometry, sent: list[Request], cuts: list[int]) -> None:
    stream = b"".join(one.encoded for one in sent)
    with small_limits():
        assert outcome(geometry, cut(stream, cuts)) == outcome(geometry, iter([stream]))


@settings(deadline=None, max_examples=200)
@given(
    geometries(SMALL),
    conversations(SMALL),
    st.lists(st.integers(0, 4000), max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
)
@example(Geometry(SMALL), [Request(WRITE, FUA, 1, 0, 500), Request(WRITE, 0, 2, 16, 500, 7)], [100, 300], [2] * 40)
def test_what_waits_for_the_log_is_decoded_again_as_it_was(
    geometry: Geometry, sent: list[Request], cuts: list[int], takes_back: list[int]
) -> None:
    stream = b"".join(one.encoded for one in sent)
    with small_limits():
        assert outcome(geometry, cut(stream, cuts), takes_back) == outcome(geometry, cut(stream, cuts))


@pytest.mark.parametrize("flags", [0, FUA, NO_HOLE])
def test_piece_of_a_long_zeroing_is_decoded_again_as_it_was(flags: int) -> None:
    stream = memoryview(Request(WRITE_ZEROES, flags, 7, 5, 1000).encoded)
    with patch.object(nbd, "ZERO_PIECE_BYTES", 300):
        decoder, found, batch = Decoder(Geometry(SMALL)), list[tuple[int, int]](), Batch()
        for turn in range(4):
            batch = decoder.decode(stream, 0 if turn else len(stream))
            decoder.take_back()
            again = decoder.decode(stream, 0 if turn else len(stream))
            assert contents(again) == contents(batch)
            found += [(offset, length) for _, offset, length, _ in again.changes]
    assert found == [(5, 300), (305, 300), (605, 300), (905, 100)]
    assert [*batch.durable, *filter(None, batch.replies)] == [nbd.ok_reply((7).to_bytes(8))]


LARGE = 2 << 20
large_lengths = st.one_of(
    st.integers(1, 5000),
    st.sampled_from([WRITE_PIECE_BYTES, WRITE_WHOLE_BYTES, WRITE_WHOLE_BYTES + 1, 3 * WRITE_PIECE_BYTES]),
    st.integers(WRITE_WHOLE_BYTES, 600_000),
)
large_writes = st.builds(
    Request, st.just(WRITE), st.sampled_from([0, 0, FUA, 1 << 9]), st.integers(0, 2**64 - 1),
    st.sampled_from([0, 4096, LARGE - WRITE_WHOLE_BYTES]), large_lengths, st.integers(0, 9999),
)  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.one_of(large_writes, large_writes, requests(LARGE).filter(lambda one: one.length < 5000)),
        max_size=4,
    ),
    st.lists(st.integers(0, 100), max_size=8),
)
@example([Request(WRITE, 0, 1, 0, WRITE_WHOLE_BYTES + 1)], [50])
@example([Request(WRITE, FUA, 1, 0, WRITE_WHOLE_BYTES), Request(WRITE, 0, 2, 9, 600_000)], list(range(0, 100, 3)))
def test_long_writes_in_any_pieces_are_the_same_as_in_large_ones(sent: list[Request], percent: list[int]) -> None:
    stream = b"".join(one.encoded for one in sent)
    geometry = Geometry(LARGE)
    cuts = [len(stream) * part // 100 for part in percent]
    whole = cut(stream, list(range(0, len(stream), INPUT_BUFFER_BYTES // 2)))
    assert outcome(geometry, cut(stream, cuts)) == outcome(geometry, whole)


# --- The model --------------------------------------------------------------------------------


def expected_error(one: Request, geometry: Geometry) -> int:
    """What the document and the checklist say of a request that is not DISC."""
    allowed = {
        READ: FUA | (DF if geometry.structured_replies else 0),
        WRITE: FUA,
        FLUSH: FUA,
        TRIM: FUA,
        CACHE: FUA,
        WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
        BLOCK_STATUS: FUA | REQ_ONE,
    }
    modifies = one.kind in (WRITE, TRIM, WRITE_ZEROES)
    past_the_end = one.offset + one.length > geometry.size_bytes
    misaligned = one.offset % geometry.minimum_block_bytes or one.length % geometry.minimum_block_bytes
    too_long = one.kind in (READ, WRITE) and one.length > geometry.maximum_payload_bytes
    fast = geometry.can_fast_zero_allocated if one.flags & NO_HOLE else geometry.can_fast_zero
    if one.kind not in allowed or any(one.flags >> bit & 1 and not allowed[one.kind] >> bit & 1 for bit in range(16)):
        return 22
    if one.kind == FLUSH:
        return 0
    if modifies and geometry.read_only:
        return 1
    if past_the_end:
        return 28 if one.kind in (WRITE, WRITE_ZEROES) else 22
    if misaligned or too_long:
        return 22
    if one.kind == BLOCK_STATUS and not (geometry.block_status and one.length):
        return 22
    return 95 if one.flags & FAST_ZERO and not fast else 0


def simple(one: Request, error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, one.cookie)


def error_answer(one: Request, error: int, geometry: Geometry) -> bytes:
    if one.kind in (READ, BLOCK_STATUS) and geometry.structured_replies:
        return struct.pack(">IHHQIIH", 0x668E33EF, 1, 32769, one.cookie, 6, error, 0)
    return simple(one, error)


def expected(geometry: Geometry, sent: list[Request]) -> Outcome:
    seen = Outcome(bytearray(geometry.size_bytes))
    for one in sent:
        if one.magic != 0x25609513:
            seen.broken = f"a request began with {one.magic:#010x} instead of the magic number"
        elif one.kind == DISC:
            seen.disconnect = True
        elif error := expected_error(one, geometry):
            seen.answers.append(error_answer(one, error, geometry))
        else:
            carry_out(seen, geometry, one)
        if seen.broken or seen.disconnect:
            break
    return seen


def carry_out(seen: Outcome, geometry: Geometry, one: Request) -> None:
    cookie = one.cookie.to_bytes(8)
    if one.kind == READ and one.length:
        seen.reads.append((cookie, one.offset, one.length))
    elif one.kind == FLUSH or (one.kind in (CACHE, BLOCK_STATUS) and one.length):
        seen.others.append((one.kind, one.flags, cookie, one.offset, one.length))
    elif one.kind == READ and geometry.structured_replies:
        seen.answers.append(struct.pack(">IHHQI", 0x668E33EF, 1, 0, one.cookie, 0))
    elif not one.length or (one.kind == TRIM and not geometry.can_trim):
        seen.answers.append(simple(one))
    else:
        seen.disk[one.offset : one.offset + one.length] = one.payload or bytes(one.length)
        seen.trims += one.kind == TRIM
        seen.zeroes += one.kind == WRITE_ZEROES
        (seen.durable if one.flags & FUA else seen.replies).append(simple(one))


@settings(deadline=None, max_examples=400)
@given(geometries(SMALL), conversations(SMALL))
@example(Geometry(SMALL), [Request(WRITE_ZEROES, 0, 1, 2**64 - 1, 2**32 - 1)])
def test_it_does_what_the_document_says(geometry: Geometry, sent: list[Request]) -> None:
    stream = b"".join(one.encoded for one in sent)
    with small_limits():
        assert outcome(geometry, iter([stream])) == expected(geometry, sent)


# --- Whatever the input is --------------------------------------------------------------------

noise_or_requests = st.lists(
    st.one_of(
        requests(SMALL).map(lambda one: one.encoded),
        st.binary(max_size=60),
        st.builds(
            lambda kind, flags, offset, length: request(kind, 1, offset, length, flags),
            st.integers(0, 9), st.integers(0, 31), st.integers(0, 2 * SMALL), st.integers(0, 2**32 - 1),
        ),
    ),
    max_size=8,
).map(b"".join)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(geometries(SMALL), noise_or_requests, st.lists(st.integers(0, 3000), max_size=6))
def test_anything_is_survived_and_only_magic_or_abuse_ends_it(
    geometry: Geometry, stream: bytes, cuts: list[int]
) -> None:
    with small_limits():
        seen = outcome(geometry, cut(stream, cuts))
    assert (
        seen.broken == ""
        or "instead of the magic number" in seen.broken
        or "longer than any server must take" in seen.broken
    )


@settings(deadline=None, max_examples=200)
@given(geometries(SMALL), noise_or_requests, noise_or_requests)
def test_an_unfinished_request_is_never_large(geometry: Geometry, stream: bytes, more: bytes) -> None:
    feeder = Feeder(geometry)
    with small_limits():
        for piece in (stream, more):
            feeder.feed(piece)
            if feeder.over:
                break
            assert len(feeder.rest) <= 28 + 64


@settings(deadline=None, max_examples=100)
@given(conversations(SMALL), st.integers(0, 3000), st.integers(0, 255))
def test_damage_changes_nothing_before_it(sent: list[Request], at: int, value: int) -> None:
    stream = bytearray(b"".join(one.encoded for one in sent) + bytes(28))
    at %= len(stream)
    before, damaged = Feeder(Geometry(SMALL)), Feeder(Geometry(SMALL))
    before.feed(bytes(stream[:at]))
    stream[at] = value
    damaged.feed(bytes(stream))
    assert damaged.log[: len(before.log)] == before.log
    assert damaged.seen.reads[: len(before.seen.reads)] == before.seen.reads


@pytest.mark.parametrize("magic", range(0x25609513 - 3, 0x25609513 + 4))
def test_no_other_magic_is_taken(magic: int) -> None:
    feeder = Feeder(Geometry(SMALL))
    feeder.feed(request(WRITE, payload=b"x", magic=magic))
    assert bool(feeder.seen.broken) == (magic != 0x25609513)
