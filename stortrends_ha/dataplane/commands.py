"""What the supervisor tells a data process: one JSON object a line, checked here and nowhere else.

``lease``, ``drop`` and ``stop`` are carried out at once and have no answer; each of the others has a number and is
answered by ``done``: the orders when they have been carried out, in order, one at a time; ``verify`` and ``end_verify``
at once, with whether it has begun, or will end.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from stortrends_ha.config import Address
from stortrends_ha.errors import ProtocolError
from stortrends_ha.record import Record


@dataclass(frozen=True, slots=True)
class Follow:
    """Be the secondary for exactly this record."""

    number: int
    record: Record


@dataclass(frozen=True, slots=True)
class Lead:
    """Be the owner by this record; answer nothing before ``not_before_ns`` (CLOCK_BOOTTIME)."""

    number: int
    record: Record
    not_before_ns: int
    forced: bool  # rule 11: the data gets a new lineage
    clears_loss: bool  # the record was granted although the cache was lost


@dataclass(frozen=True, slots=True)
class Idle:
    """Rule 4: serve, apply and acknowledge nothing any more."""

    number: int


@dataclass(frozen=True, slots=True)
class Release:
    """Finish what is under way and stop, for a handover."""

    number: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """A secondary's copy may be overwritten by the owner's: what the operator says of a disk that was replaced."""

    number: int


@dataclass(frozen=True, slots=True)
class Compare:
    """Find out where a secondary differs from an owner with which it has no common history. ``keep``: keep what differs
    here in a file, then give this copy up."""

    number: int
    keep: bool


@dataclass(frozen=True, slots=True)
class Show:
    """Serve a secondary's volumes read-only at an address, or go on with that, for some seconds."""

    number: int
    address: Address


@dataclass(frozen=True, slots=True)
class EndCompare:
    """End what ``Compare`` and ``Show`` have begun, if it has not ended."""

    number: int


@dataclass(frozen=True, slots=True)
class Lease:
    """Rule 5: a mirrored owner may answer until then (CLOCK_BOOTTIME)."""

    until_ns: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the connections kept after a handover."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End in order."""


@dataclass(frozen=True, slots=True)
class Verify:
    """Compare volumes with the secondary's, and repair: from ``source``, or where only one disk reports an error."""

    number: int
    run: str  # its name
    volumes: tuple[str, ...]
    repair: bool
    source: str


@dataclass(frozen=True, slots=True)
class EndVerify:
    """End the verify that is under way."""

    number: int


Order = Follow | Lead | Idle | Release | GiveUp | Compare | Show | EndCompare
Command = Order | Verify | EndVerify | Lease | Drop | Stop


def parse(line: bytes) -> Command:
    """The command in a line. Raises ProtocolError."""
    try:
        return _parse(json.loads(line))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise ProtocolError(f"a command that cannot be understood ({e!r}): {line[:200]!r}") from None


def _parse(message: Any) -> Command:
    match message["type"]:
        case "lease":
            return Lease(_typed(message["until_ns"], int))
        case "drop":
            return Drop()
        case "stop":
            return Stop()
    number = _typed(message["id"], int)
    match message["type"]:
        case "follow":
            return Follow(number, Record.decode(message["record"]))
        case "lead":
            return Lead(
                number,
                Record.decode(message["record"]),
                _typed(message["not_before_ns"], int),
                _typed(message["forced"], bool),
                _typed(message["clears_loss"], bool),
            )
        case "idle":
            return Idle(number)
        case "release":
            return Release(number)
        case "verify":
            return Verify(
                number,
                _typed(message["run"], str),
                tuple(_typed(name, str) for name in _typed(message["volumes"], list)),
                _typed(message["repair"], bool),
                _typed(message["source"], str),
            )
        case "end_verify":
            return EndVerify(number)
        case "give-up":
            return GiveUp(number)
        case "compare":
            return Compare(number, _typed(message["keep"], bool))
        case "show":
            return Show(number, Address(_typed(message["host"], str), _typed(message["port"], int)))
        case "end-compare":
            return EndCompare(number)
        case other:
            raise ValueError(f"an unknown type {other!r}")


def encode(command: Verify | EndVerify) -> bytes:
    """As ``parse`` takes it."""
    return json.dumps({"type": "verify" if isinstance(command, Verify) else "end_verify", **_fields(command)}).encode()


def _fields(command: Verify | EndVerify) -> dict[str, Any]:
    fields = asdict(command)
    return {"id": fields.pop("number"), **fields}


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
