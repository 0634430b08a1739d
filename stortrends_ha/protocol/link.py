"""Frames of the link between the two data processes of a group, pure.

A connection begins, in both directions, with ``PREFACE`` and a HELLO frame; these two never change their
form, so that any two versions can tell each other why they do not fit. Then the owner opens the session
(OPEN, OPENED) and the stream runs: CHANGES, FLUSH, COMPARE and SYNCED from the owner, ACK, FLUSHED, RESULT and SYNCED
from the secondary, and REGIONS before anything is synced; PING from the owner, PONG from the secondary; CLIENTS from
the owner, unanswered; VERIFY from both: what an operator asks of the owner at the secondary, and what comes of it.
Where there can be no session, the secondary may compare instead: INSPECT and DIGESTS from the owner, ASK from the
secondary.

Invariants:
- Every frame carries the epoch of its session (rule 6): ``next_frame`` refuses any other.
- CHANGES carries changes as NBD requests, just as clients sent them; its ``seq`` numbers the first one.
- ACK is cumulative: everything up to ``seq`` has been applied (not: is stable; that is FLUSHED).
- All frames but CHANGES are at most ``LINK_FRAME_BYTES``.

Neighbours: ``replication.primary`` and ``replication.secondary`` speak it; ``docs/protocol.md`` describes it.
"""

import json
from collections.abc import Sequence
from enum import IntEnum
from struct import Struct
from typing import Any, NamedTuple

from stortrends_ha.errors import ProtocolError
from stortrends_ha.limits import LINK_FRAME_BYTES

PREFACE = b"STORHA\r\n"
PROTOCOL_VERSIONS = (1, 1)  # the oldest and the newest that this code speaks

HEADER = Struct(">BBHIQQ")  # kind, zero, volume, payload length, epoch, seq
HEADER_BYTES = HEADER.size
# client host, its port, server host, its port
Endpoint = tuple[str, int, str, int]
_COMPARE = Struct(">QI32s")
_RESULT = Struct(">QIB")
_REGION = Struct(">QQ")
_REGIONS_PER_FRAME = 4000
DIGEST_BYTES = 32


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    REFUSE = 2
    OPEN = 3
    OPENED = 4
    CHANGES = 5
    ACK = 6
    FLUSH = 7
    FLUSHED = 8
    COMPARE = 9
    RESULT = 10
    SYNCED = 11
    PING = 12
    PONG = 13
    FAILED = 14
    CLIENTS = 15
    REGIONS = 16
    VERIFY = 17
    INSPECT = 20
    ASK = 21
    DIGESTS = 22


class Purpose(IntEnum):
    """What a comparison is for: the ``seq`` of COMPARE."""

    SYNC = 0
    VERIFY = 1
    REPAIR = 2  # a verify that will repair what the secondary cannot read: it says so, and does not fail


class Verdict(IntEnum):
    """The outcome of a comparison."""

    DIFFERS = 0
    EQUAL = 1
    UNREADABLE = 2  # at the secondary


# Instead of a digest: whether all of it is a hole.
HOLE = bytes(32)

# Plain numbers, as members of an enumeration are slow to look up on the hot path.
CHANGES, ACK = int(Kind.CHANGES), int(Kind.ACK)
_KINDS = frozenset(map(int, Kind))
_VERDICTS = frozenset(map(int, Verdict))


class Frame(NamedTuple):
    """A frame other than CHANGES, or the header of CHANGES (without its payload)."""

    kind: int
    volume: int
    seq: int
    length: int
    payload: bytes


def frame(kind: Kind, epoch: int, seq: int = 0, volume: int = 0, payload: bytes = b"") -> bytes:
    """Encode a frame other than CHANGES."""
    return HEADER.pack(kind, 0, volume, len(payload), epoch, seq) + payload


def changes_header(epoch: int, first: int, volume: int, length: int) -> bytes:
    """The header of a CHANGES frame whose payload, ``length`` bytes of changes, follows."""
    return HEADER.pack(CHANGES, 0, volume, length, epoch, first)


def next_frame(view: memoryview, at: int, end: int, epoch: int | None) -> Frame | None:
    """The frame at ``at``, or None if it is not all there yet; of CHANGES, only the header.

    ``epoch`` is the session's; None before there is one. Raises ProtocolError.
    """
    if end - at < HEADER_BYTES:
        return None
    kind, zero, volume, length, its_epoch, seq = HEADER.unpack_from(view, at)
    if kind not in _KINDS or zero:
        raise ProtocolError(f"a frame of unknown kind {kind}")
    if epoch is not None and its_epoch != epoch:
        raise ProtocolError(f"a frame of epoch {its_epoch} in a session of epoch {epoch}")
    if kind == CHANGES:
        return Frame(kind, volume, seq, length, b"")
    if length > LINK_FRAME_BYTES:
        raise ProtocolError(f"a {Kind(kind).name} frame of {length} bytes is longer than {LINK_FRAME_BYTES}")
    at += HEADER_BYTES
    if end - at < length:
        return None
    return Frame(kind, volume, seq, length, bytes(view[at : at + length]))


def encode_object(kind: Kind, epoch: int, value: dict[str, Any]) -> bytes:
    """A frame whose payload is a JSON object: HELLO, REFUSE, OPEN, FAILED, CLIENTS, VERIFY."""
    return frame(kind, epoch, payload=json.dumps(value, separators=(",", ":")).encode())


def decode_object(payload: bytes) -> dict[str, Any]:
    """The JSON object of a frame. Raises ProtocolError."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        raise ProtocolError("a frame whose payload is no JSON") from None
    if not isinstance(value, dict):
        raise ProtocolError("a frame whose payload is no JSON object")
    return value


def encode_clients(epoch: int, endpoints: Sequence[Endpoint]) -> bytes:
    """The TCP connections of the owner's clients; of very many, only as many as a frame holds.

    They help clients to notice a takeover at once; one that is missing notices it by itself, later.
    """
    while True:
        value = {"endpoints": endpoints}
        if len(json.dumps(value)) <= LINK_FRAME_BYTES:
            return encode_object(Kind.CLIENTS, epoch, value)
        endpoints = endpoints[: len(endpoints) * 3 // 4]


def decode_clients(payload: bytes) -> list[Endpoint]:
    """Raises ProtocolError."""
    found = decode_object(payload).get("endpoints")
    if not isinstance(found, list) or not all(map(_is_endpoint, found)):
        raise ProtocolError("a CLIENTS frame that does not say what it should")
    return [(client, port, server, its_port) for client, port, server, its_port in found]


def _is_endpoint(value: Any) -> bool:
    if not isinstance(value, list) or [type(item) for item in value] != [str, int, str, int]:
        return False
    return all(0 < port < 1 << 16 for port in (value[1], value[3]))


def encode_compare(
    epoch: int, volume: int, offset: int, length: int, digest: bytes, purpose: Purpose = Purpose.SYNC
) -> bytes:
    """Ask whether the secondary's block has this digest (32 bytes) at this point of the stream."""
    return frame(Kind.COMPARE, epoch, purpose, volume, _COMPARE.pack(offset, length, digest))


def decode_compare(payload: bytes) -> tuple[int, int, bytes]:
    """(offset, length, digest). Raises ProtocolError."""
    if len(payload) != _COMPARE.size:
        raise ProtocolError("a COMPARE frame of the wrong length")
    return _COMPARE.unpack(payload)


def encode_result(epoch: int, volume: int, offset: int, length: int, verdict: int) -> bytes:
    """The secondary's answer to COMPARE: a ``Verdict``."""
    return frame(Kind.RESULT, epoch, 0, volume, _RESULT.pack(offset, length, verdict))


def decode_result(payload: bytes) -> tuple[int, int, Verdict]:
    """(offset, length, verdict). Raises ProtocolError."""
    if len(payload) != _RESULT.size:
        raise ProtocolError("a RESULT frame of the wrong length")
    offset, length, verdict = _RESULT.unpack(payload)
    if verdict not in _VERDICTS:
        raise ProtocolError(f"a RESULT frame with the unknown verdict {verdict}")
    return offset, length, Verdict(verdict)


def encode_regions(epoch: int, volume: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """What may differ, as the secondary knows: (offset, length) of ranges of a volume."""
    pieces = [ranges[at : at + _REGIONS_PER_FRAME] for at in range(0, len(ranges), _REGIONS_PER_FRAME)]
    return [frame(Kind.REGIONS, epoch, 0, volume, b"".join(_REGION.pack(*each) for each in piece)) for piece in pieces]


def end_of_regions(epoch: int, blank: bool) -> bytes:
    """That was all; ``blank``: the secondary has nothing but zeroes."""
    return frame(Kind.REGIONS, epoch, int(blank))


def decode_regions(payload: bytes) -> list[tuple[int, int]]:
    """(offset, length) of ranges; none ends them. Raises ProtocolError."""
    if len(payload) % _REGION.size:
        raise ProtocolError("a REGIONS frame of the wrong length")
    return [(offset, length) for offset, length in _REGION.iter_unpack(payload)]


def encode_ask(epoch: int, volume: int, offset: int, length: int) -> bytes:
    """Ask the owner for the digests of a range."""
    return frame(Kind.ASK, epoch, 0, volume, _REGION.pack(offset, length))


def decode_ask(payload: bytes) -> tuple[int, int]:
    """(offset, length). Raises ProtocolError."""
    if len(payload) != _REGION.size:
        raise ProtocolError("an ASK frame of the wrong length")
    offset, length = _REGION.unpack(payload)
    return offset, length


def encode_digests(epoch: int, volume: int, offset: int, length: int, digests: bytes) -> bytes:
    """The answer, for as much as was looked at; without digests it has nothing but zeroes."""
    return frame(Kind.DIGESTS, epoch, 0, volume, _REGION.pack(offset, length) + digests)


def decode_digests(payload: bytes) -> tuple[int, int, bytes]:
    """(offset, length, digests). Raises ProtocolError."""
    if len(payload) < _REGION.size or (len(payload) - _REGION.size) % DIGEST_BYTES:
        raise ProtocolError("a DIGESTS frame of the wrong length")
    offset, length = _REGION.unpack_from(payload)
    return offset, length, payload[_REGION.size :]


assert _REGIONS_PER_FRAME * _REGION.size <= LINK_FRAME_BYTES
