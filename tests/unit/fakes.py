"""What the pure parts ask of the world (``replication.interfaces``), in memory.

And the layouts of NBD requests and replies, written out independently of the code.
"""

import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from stortrends_ha.errors import StorageError
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Frame, Kind
from stortrends_ha.protocol.nbd_transmission import OP_WRITE, Change
from stortrends_ha.replication import differences as differences_module
from stortrends_ha.replication.block_map import BlockMap
from stortrends_ha.replication.differences import Differences, blocks_of
from stortrends_ha.replication.interfaces import Buffer

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
MAGIC = 0x25609513

HOLE_BYTES = 4096  # the grain of a memory store's extents


def request(
    kind: int,
    cookie: int = 1,
    offset: int = 0,
    length: int = 0,
    flags: int = 0,
    payload: bytes = b"",
    magic: int = MAGIC,
) -> bytes:
    """One NBD request; the length of a payload is its length."""
    return struct.pack(">IHHQQI", magic, flags, kind, cookie, offset, len(payload) or length) + payload


class MemoryStore:
    """A replica in memory. Fails on anything outside of it, and on demand."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.data = bytearray(size_bytes)
        self.applied: list[tuple[int, int, int]] = []
        self.stable = bytes(size_bytes)  # what a loss of power would leave
        self.flushes: list[tuple[bytes, Callable[[], None]]] = []
        self.renewed: list[tuple[int, int]] = []
        self.flush_at_once = False
        self.broken = False

    def apply(self, changes: Sequence[Change], view: Buffer) -> None:
        """See ``Store``."""
        self._check()
        for op, offset, length, at in changes:
            assert length > 0
            assert 0 <= offset <= offset + length <= self.size_bytes
            payload = bytes(view[at : at + length]) if op == OP_WRITE else bytes(length)
            assert len(payload) == length
            self.data[offset : offset + length] = payload
            self.applied.append((op, offset, length))

    def read(self, offset: int, length: int) -> Buffer:
        """See ``Store``."""
        self._check()
        assert 0 <= offset <= offset + length <= self.size_bytes
        return self.data[offset : offset + length]

    def renew(self, offset: int, length: int) -> None:
        """See ``Store``."""
        assert 0 <= offset < offset + length <= self.size_bytes
        self.renewed.append((offset, length))

    def extent(self, offset: int) -> tuple[bool, int]:
        """See ``Store``: whole pieces of zeroes are holes."""
        self._check()
        is_data, end = self._holds_data(offset), offset
        while end < self.size_bytes and self._holds_data(end) == is_data:
            end = min(end - end % HOLE_BYTES + HOLE_BYTES, self.size_bytes)
        return is_data, end

    def _holds_data(self, offset: int) -> bool:
        start = offset - offset % HOLE_BYTES
        return any(self.data[start : start + HOLE_BYTES])

    def start_flush(self, done: Callable[[], None]) -> None:
        """See ``Store``: ends at once, or when ``end_flushes`` is called."""
        if self.flush_at_once:
            self.stable = bytes(self.data)
            done()
        else:
            self.flushes.append((bytes(self.data), done))

    def end_flushes(self) -> None:
        """The disk has made everything stable."""
        flushes, self.flushes = self.flushes, []
        for content, done in flushes:
            self.stable = content
            done()

    def _check(self) -> None:
        if self.broken:
            raise StorageError("volume v: the disk is broken")


class MemoryMap:
    """The file of a map, in memory. Its writes end in their order: at once, or when ``end_writes`` is called."""

    def __init__(self, at_once: bool = True) -> None:
        self.at_once = at_once
        self.pages: dict[int, bytes] = {}  # what a death of the process leaves
        self.stable: dict[int, bytes] = {}  # what a loss of power leaves
        self.pending: deque[tuple[dict[int, bytes], bool, Callable[[], None]]] = deque()

    def start_write(self, pages: Mapping[int, bytes], *, durable: bool, done: Callable[[], None]) -> None:
        """See ``MapWriter``."""
        self.pending.append((dict(pages), durable, done))
        if self.at_once:
            self.end_writes()

    def end_writes(self, count: int = 1 << 30) -> None:
        """The oldest writes that are under way end."""
        while self.pending and count:
            pages, durable, done = self.pending.popleft()
            self.pages |= pages
            if durable:
                self.stable = dict(self.pages)
            count -= 1
            done()

    def load(self, blocks: int, *, power_lost: bool = False) -> BlockMap:
        """What a start after a death finds."""
        return BlockMap.load(blocks, self.stable if power_lost else self.pages)


def no_differences(size_bytes: int, block_bytes: int = 64 << 10) -> Differences:
    """Of a new volume, with files that are written at once."""
    return load_differences(size_bytes, MemoryMap(), MemoryMap(), block_bytes=block_bytes)


def load_differences(
    size_bytes: int, intents: MemoryMap, dirty: MemoryMap, *, block_bytes: int = 64 << 10, power_lost: bool = False
) -> Differences:
    """What a start finds in these files."""
    module: Any = differences_module  # tests make both smaller there
    regions = blocks_of(size_bytes, module.INTENT_REGION_BYTES)
    blocks = blocks_of(size_bytes, block_bytes)
    found = intents.load(regions, power_lost=power_lost), dirty.load(blocks, power_lost=power_lost)
    return Differences(size_bytes, block_bytes, *found, intents, dirty)


class MemoryLink:
    """The sending side of a link. ``room_bytes`` of what is sent leave at once, the rest is backlog."""

    def __init__(self, room_bytes: int | None = None) -> None:
        self.sent = bytearray()
        self.backlog_bytes = 0
        self._room_bytes = room_bytes

    def send(self, buffers: list[Buffer], length: int) -> None:
        """See ``Link``."""
        data = b"".join(map(bytes, buffers))
        assert len(data) == length
        self.sent += data
        if self._room_bytes is not None:
            taken = min(self._room_bytes, length)
            self._room_bytes -= taken
            self.backlog_bytes += length - taken

    def take(self) -> bytes:
        """What was sent since the last call."""
        sent, self.sent = bytes(self.sent), bytearray()
        return sent

    def frames(self) -> list[Frame]:
        """What was sent since the last call, as frames; CHANGES with their payload."""
        return frames_of(self.take())


def frames_of(stream: bytes) -> list[Frame]:
    """A stream of whole frames."""
    found, at, view = list[Frame](), 0, memoryview(stream)
    while (frame := wire.next_frame(view, at, len(stream), None)) is not None:
        at += wire.HEADER.size
        payload = bytes(view[at : at + frame.length])
        assert len(payload) == frame.length
        found.append(frame._replace(payload=payload))
        at += frame.length
    assert at == len(stream)
    return found


def kinds(frames: list[Frame]) -> list[Kind]:
    """What each frame is."""
    return [Kind(frame.kind) for frame in frames]


class Reply(NamedTuple):
    """A simple reply without payload."""

    error: int
    cookie: int


def simple_replies(stream: bytes) -> list[Reply]:
    """A stream of whole simple replies without payload."""
    found = []
    for magic, error, cookie in struct.iter_unpack(">IIQ", stream):
        assert magic == 0x67446698
        found.append(Reply(error, cookie))
    return found


class MemoryClient:
    """A client of the primary: what it was told, and whether it is paused."""

    def __init__(self) -> None:
        self.output = b""
        self.paused = False

    def answer(self, replies: bytes) -> None:
        """See ``Client``."""
        self.output += replies

    def pause(self) -> None:
        """See ``Client``."""
        self.paused = True

    def resume(self) -> None:
        """See ``Client``."""
        assert self.paused
        self.paused = False

    def answered(self) -> list[int]:
        """The cookies of all answers since the last call; none is an error."""
        replies, self.output = simple_replies(self.output), b""
        assert not any(reply.error for reply in replies)
        return [reply.cookie for reply in replies]
