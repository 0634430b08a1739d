"""Invariants tested: the secondary does the same however the stream is cut; whatever the stream is, nothing
but ProtocolError comes out, nothing outside a volume is touched, and no input waits for what cannot come.
The owner's end, too, answers any bytes with nothing but ProtocolError.

Limits are small here, so that they are reached.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from unittest.mock import patch

import pytest
from fakes import TRIM, WRITE, WRITE_ZEROES, MemoryClient, MemoryLink, MemoryStore, no_differences, request
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stortrends_ha.errors import PeerFailedError, ProtocolError, StorageError
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Kind
from stortrends_ha.protocol.nbd_transmission import Decoder, Geometry
from stortrends_ha.replication import secondary as secondary_module
from stortrends_ha.replication.primary import Primary
from stortrends_ha.replication.secondary import Secondary
from stortrends_ha.replication.session import Plan

EPOCH = 3
SIZES = (4096, 1000)
CHANGES_BYTES, FRAME_BYTES = 2048, 256


@pytest.fixture(scope="module", autouse=True)
def small_limits() -> Iterator[None]:
    with (
        patch.object(secondary_module, "CHANGES_FRAME_BYTES", CHANGES_BYTES),
        patch.object(wire, "LINK_FRAME_BYTES", FRAME_BYTES),
    ):
        yield


# --- Streams ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Frames that fit anywhere in a stream: ``count`` is how many changes they carry."""

    kind: Kind
    volume: int
    body: bytes = b""
    count: int = 0
    seq: int = 0

    def encoded(self, first: int) -> bytes:
        if self.kind == Kind.CHANGES:
            return wire.changes_header(EPOCH, first, self.volume, len(self.body)) + self.body
        return wire.frame(self.kind, EPOCH, self.seq, self.volume, self.body)


def valid_changes(volume: int) -> st.SearchStrategy[Step]:
    size = SIZES[volume]
    places = st.integers(0, size - 1).flatmap(lambda at: st.tuples(st.just(at), st.integers(1, min(size - at, 300))))
    one = st.one_of(
        st.builds(
            lambda place, b: request(WRITE, 1, place[0], payload=bytes([b]) * place[1]),
            places, st.integers(0, 255),
        ),
        st.builds(
            lambda kind, place, flags: request(kind, 1, place[0], place[1], flags),
            st.sampled_from([TRIM, WRITE_ZEROES]), places, st.sampled_from([0, 1, 2]),
        ),
    )  # fmt: skip
    return st.lists(one, min_size=1, max_size=5).map(lambda some: Step(Kind.CHANGES, volume, b"".join(some), len(some)))


def valid_steps(volume: int) -> st.SearchStrategy[Step]:
    digest = hashlib.sha256(bytes(64)).digest()
    compare = wire.encode_compare(EPOCH, 0, 0, 64, digest)[wire.HEADER.size :]
    hole = wire.encode_compare(EPOCH, 0, 0, 64, wire.HOLE)[wire.HEADER.size :]
    return st.one_of(
        valid_changes(volume),
        valid_changes(volume),
        st.builds(lambda seq: Step(Kind.FLUSH, volume, seq=seq), st.integers(0, 99)),
        st.builds(lambda seq: Step(Kind.PING, 0, seq=seq), st.integers(0, 2**64 - 1)),
        st.builds(
            lambda content, purpose: Step(Kind.COMPARE, volume, content, seq=purpose),
            st.sampled_from([compare, hole]),
            st.integers(0, 3),
        ),
        st.just(Step(Kind.SYNCED, 0)),
    )


streams_of_steps = st.lists(valid_steps(0) | valid_steps(1), max_size=8)


def encode(steps: list[Step]) -> list[bytes]:
    frames, first = [], 1
    for step in steps:
        frames.append(step.encoded(first))
        first += step.count
    return frames


class Session:
    """A secondary that is fed as ``LinkSocket`` feeds it."""

    def __init__(self) -> None:
        self.stores = [MemoryStore(size) for size in SIZES]
        for store in self.stores:
            store.flush_at_once = True
        self.link = MemoryLink()
        self.synced = 0
        self.secondary = Secondary(self.stores, EPOCH, self.link, 1, self._synced)
        self.rest = b""

    def _synced(self) -> None:
        self.synced += 1

    def feed(self, piece: bytes) -> None:
        data = self.rest + piece
        used = self.secondary.receive(memoryview(data + b"\x25\x60\x95\x13" * 9), len(data))
        assert 0 <= used <= len(data)
        self.rest = data[used:]

    def feed_all(self, stream: bytes, cuts: list[int]) -> None:
        at = 0
        for end in [*sorted(min(end, len(stream)) for end in cuts), len(stream)]:
            self.feed(stream[at:end])
            at = end

    @property
    def applied(self) -> list[list[tuple[int, int, int]]]:
        return [store.applied for store in self.stores]


# --- However the stream is cut ----------------------------------------------------------------


def seen(steps: list[Step], cuts: list[int]) -> tuple[object, ...]:
    """All that can be seen of a session; of acknowledgements, that they grow up to the last change."""
    session = Session()
    session.feed_all(b"".join(encode(steps)), cuts)
    assert session.rest == b""
    frames = session.link.frames()
    acks = [frame.seq for frame in frames if frame.kind == Kind.ACK]
    assert acks == sorted(set(acks))
    assert (acks or [0])[-1] == sum(step.count for step in steps)
    others = [frame for frame in frames if frame.kind != Kind.ACK]
    return [store.data for store in session.stores], session.applied, others, session.synced


@settings(deadline=None, max_examples=100)
@given(streams_of_steps)
def test_byte_by_byte_is_the_same_as_at_once(steps: list[Step]) -> None:
    assert seen(steps, list(range(20_000))) == seen(steps, [])


@settings(deadline=None, max_examples=150)
@given(streams_of_steps, st.lists(st.integers(0, 6000), max_size=12))
def test_any_pieces_are_the_same_as_at_once(steps: list[Step], cuts: list[int]) -> None:
    assert seen(steps, cuts) == seen(steps, [])


@settings(deadline=None, max_examples=100)
@given(streams_of_steps, st.integers(0, 6000))
def test_what_a_lost_connection_cut_off_was_not_applied_and_what_was_applied_is_acknowledged(
    steps: list[Step], end: int
) -> None:
    session = Session()
    session.feed(b"".join(encode(steps))[:end])
    acks = [frame.seq for frame in session.link.frames() if frame.kind == Kind.ACK]
    assert sum(map(len, session.applied)) == (acks[-1] if acks else 0)


# --- Whatever the stream is -------------------------------------------------------------------


def assert_refused_or_survived(stream: bytes, cuts: list[int]) -> Session:
    """Stores check that they are used within their size; anything but ProtocolError escapes."""
    session = Session()
    with suppress(ProtocolError):
        session.feed_all(stream, cuts)
        assert_not_stuck(session)
    return session


def assert_not_stuck(session: Session) -> None:
    """What is waiting has room for what is to come; with enough more of anything it goes on or is refused."""
    waiting = len(session.rest)
    assert waiting < max(CHANGES_BYTES, FRAME_BYTES + wire.HEADER.size)
    with suppress(ProtocolError):
        session.feed(bytes(2 * CHANGES_BYTES))
        assert len(session.rest) < waiting + 2 * CHANGES_BYTES


headers = st.builds(
    lambda kind, zero, volume, length, epoch, seq: wire.HEADER.pack(kind, zero, volume, length, epoch, seq),
    st.sampled_from([*Kind, 0, 15, 255]),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from([0, 0, 1, 2, 65535]),
    st.one_of(st.integers(0, 100), st.integers(0, 3000), st.integers(0, 2**32 - 1)),
    st.sampled_from([EPOCH, EPOCH, EPOCH, EPOCH, 2, 4, 0]),
    st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)),
)
wild_requests = st.builds(
    lambda kind, flags, offset, length, magic: request(kind, 1, offset, length, flags, magic=magic),
    st.one_of(st.sampled_from([WRITE, TRIM, WRITE_ZEROES]), st.integers(0, 65535)),
    st.one_of(st.just(0), st.integers(0, 65535)),
    st.one_of(st.integers(0, 5000), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 200), st.integers(0, 2**32 - 1)),
    st.sampled_from([0x25609513, 0x25609513, 0x25609513, 0]),
)
noise = st.lists(st.one_of(headers, wild_requests, st.binary(max_size=80)), max_size=12).map(b"".join)
numbers = st.lists(st.integers(0, 6000), max_size=6)


@settings(deadline=None, max_examples=400)
@given(noise, numbers)
@example(wire.changes_header(EPOCH, 1, 0, 30) + request(WRITE, 1, 0, payload=b"xy"), [])
@example(wire.changes_header(EPOCH, 1, 0, 29) + request(WRITE, 1, 0, 1), [])
@example(wire.changes_header(EPOCH, 1, 0, 27), [])
def test_noise_is_refused_or_survived(stream: bytes, cuts: list[int]) -> None:
    assert_refused_or_survived(stream, cuts)


@settings(deadline=None, max_examples=300)
@given(
    streams_of_steps,
    st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=4),
    numbers,
)
def test_damaged_streams_are_refused_or_survived(
    steps: list[Step], damage: list[tuple[int, int]], cuts: list[int]
) -> None:
    stream = bytearray(b"".join(encode(steps)) or b"\0")
    for at, value in damage:
        stream[at % len(stream)] = value
    assert_refused_or_survived(bytes(stream), cuts)


@settings(deadline=None, max_examples=200)
@given(
    streams_of_steps,
    st.integers(0, 7),
    st.integers(0, 7),
    st.sampled_from(["swap", "drop", "repeat"]),
    numbers,
)
def test_changes_out_of_order_are_never_applied(steps: list[Step], a: int, b: int, how: str, cuts: list[int]) -> None:
    steps = [step for step in steps if step.kind == Kind.CHANGES]
    frames = encode(steps)
    if len(frames) < 2:
        return
    a, b = a % len(frames), b % len(frames)
    wrong = list(frames)
    if how == "swap":
        wrong[a], wrong[b] = wrong[b], wrong[a]
    elif how == "drop":
        del wrong[a]
    else:
        wrong.insert(a, wrong[a])
    right = 0
    while right < len(wrong) and right < len(frames) and wrong[right] == frames[right]:
        right += 1
    session = assert_refused_or_survived(b"".join(wrong), cuts)
    good = Session()
    good.feed(b"".join(frames[:right]))
    assert session.applied == good.applied or how == "repeat"
    assert [store.data for store in session.stores] == [store.data for store in good.stores] or how == "repeat"


@settings(deadline=None, max_examples=100)
@given(streams_of_steps, st.integers(0, 7), st.sampled_from([0, EPOCH - 1, EPOCH + 1, 2**64 - 1]), numbers)
def test_from_a_frame_of_another_epoch_on_nothing_is_applied(
    steps: list[Step], at: int, epoch: int, cuts: list[int]
) -> None:
    frames = encode(steps)
    at %= len(frames) + 1
    wrong = b"".join(frames[at:] or [wire.frame(Kind.PING, EPOCH)])
    wrong = wrong[:8] + epoch.to_bytes(8) + wrong[16:]
    session, good = assert_refused_or_survived(b"".join(frames[:at]) + wrong, cuts), Session()
    good.feed(b"".join(frames[:at]))
    assert session.applied == good.applied


# --- The owner's end --------------------------------------------------------------------------


def owner() -> tuple[Primary, MemoryLink, list[StorageError]]:
    """An owner in session, with changes, a flush and a resync under way."""
    failures = list[StorageError]()
    stores = [MemoryStore(size) for size in SIZES]
    for store in stores:
        store.data[:] = b"x" * len(store.data)
    differences = [no_differences(size) for size in SIZES]
    primary = Primary(
        stores, differences, EPOCH, alone=True, window_changes=1000, window_bytes=1 << 20, failed=failures.append
    )
    link = MemoryLink()
    primary.open_session(link, Plan.SYNC, compare=True, fill=lambda: None)
    end = wire.end_of_regions(EPOCH, blank=False)
    primary.receive(memoryview(end), len(end))
    stream = b"".join(request(WRITE, n, n, payload=b"abc") for n in range(5))
    client = MemoryClient()
    primary.submit(client, 0, Decoder(Geometry(SIZES[0])).decode(memoryview(stream), len(stream)), memoryview(stream))
    primary.flush(client, 0, [])
    link.take()
    return primary, link, failures


results = st.builds(
    lambda volume, offset, length, verdict: wire.encode_result(EPOCH, volume, offset, length, verdict),
    st.sampled_from([0, 1, 2, 65535]),
    st.one_of(st.just(0), st.integers(0, 5000), st.integers(0, 2**64 - 1)),
    st.one_of(st.sampled_from(SIZES), st.integers(0, 5000)),
    st.integers(0, 3),
)
regions = st.builds(
    lambda volume, seq, ranges: wire.frame(
        Kind.REGIONS, EPOCH, seq, volume, b"".join(n.to_bytes(8) for each in ranges for n in each)
    ),
    st.sampled_from([0, 1, 2, 65535]),
    st.integers(0, 2),
    st.lists(st.tuples(*[st.one_of(st.integers(0, 5000), st.integers(0, 2**64 - 1))] * 2), max_size=3),
)
owner_noise = st.lists(
    st.one_of(
        st.builds(lambda seq: wire.frame(Kind.ACK, EPOCH, seq), st.integers(0, 7)),
        st.builds(
            lambda seq, volume: wire.frame(Kind.FLUSHED, EPOCH, seq, volume),
            st.integers(0, 4),
            st.integers(0, 2),
        ),
        results,
        regions,
        headers,
        st.binary(max_size=40),
    ),
    max_size=8,
).map(b"".join)


@settings(deadline=None, max_examples=300)
@given(owner_noise, st.lists(st.integers(0, 400), max_size=4))
@example(wire.encode_result(EPOCH, 9, 0, 1000, False), [])
@example(wire.encode_result(EPOCH, 0, 1 << 40, 1000, False), [])
def test_owner_refuses_or_survives_anything_and_keeps_its_replica(stream: bytes, cuts: list[int]) -> None:
    primary, _, failures = owner()
    rest, at = b"", 0
    with suppress(ProtocolError, PeerFailedError):
        for end in [*sorted(min(end, len(stream)) for end in cuts), len(stream)]:
            data = rest + stream[at:end]
            used = primary.receive(memoryview(data), len(data))
            assert 0 <= used <= len(data)
            rest, at = data[used:], end
    assert failures == []
    assert 0 <= primary.acked <= primary.issued
