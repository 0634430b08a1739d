"""The channel between the supervisor and a data process: one JSON object a line, both ways.

Job: the shape of every message, and `parse`, the only way in.
Invariants: what `parse` returns has every key that the rest of `node` uses, with the right type, so that a
data process gone wrong can neither crash the supervisor nor show nonsense; a line is bounded in length.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, cast, get_args

from stortrends_ha.errors import ProtocolError

# A status message grows with the volumes of the group, some 400 bytes each: room for thousands.
MESSAGE_BYTES_MAX = 4 << 20

Role = Literal["primary", "secondary", "idle"]
State = Literal["starting", "idle", "connecting", "syncing", "in-sync", "alone", "held", "failed"]
STATES: tuple[State, ...] = get_args(State)


class VolumeCounters(TypedDict):
    """Totals of one volume since its data process started."""

    reads: int
    read_bytes: int
    writes: int
    written_bytes: int
    flushes: int
    trims: int
    zeroes: int
    errors: int


class VolumeStatus(TypedDict):
    """One volume, as its data process sees it."""

    size_bytes: int
    read_only: bool
    in_flight: int
    intent_regions: int  # in the intent log
    dirty_bytes: int  # that the peer is known to lack
    counters: VolumeCounters


class Counters(TypedDict):
    """Totals of one group since its data process started."""

    connections_accepted: int
    connections_refused: int
    nbd_bad_input: int
    link_bad_input: int
    link_sessions: int
    disk_errors: int


class LinkStatus(TypedDict):
    """The replication link of a group."""

    state: Literal["connected", "connecting", "listening", "refused", "idle"]
    peer: str
    address: str
    why: str
    round_trip_ms: float | None
    protocol: int | None
    peer_version: str | None


class Resync(TypedDict):
    """How far a resync is. ``why``: what it waits for, or what slows it down; empty if nothing."""

    done_bytes: int
    total_bytes: int
    copied_bytes: int
    rate: float  # bytes a second, over the last seconds
    why: str


class VolumeVerified(TypedDict):
    """What is known of one volume from verifies; sizes and ranges (offset, length) in bytes, in whole blocks."""

    verified_s: float | None  # when this node came to the end of one last, in seconds since 1970
    differing_bytes: int  # found, and not found equal since
    ranges: list[tuple[int, int]]  # the first of them


class VerifyRunning(Resync):
    """How far a verify is. ``run`` is its name; ``copied_bytes``: put on the stream as a repair."""

    run: str
    repair: bool
    source: str
    found_bytes: int


class VolumeOutcome(TypedDict):
    """What one verify came to on one volume. ``left_bytes``: that differ now."""

    found_bytes: int
    found: list[tuple[int, int]]  # the first ranges
    repaired_bytes: int
    left_bytes: int


class VerifyEnded(TypedDict):
    """The verify that has ended last. ``why``: what ended it before everything was compared; a clause, or empty."""

    run: str
    repair: bool
    source: str
    ended_s: float
    why: str
    done_bytes: int
    total_bytes: int
    unreadable_bytes: int
    volumes: dict[str, VolumeOutcome]


class Verify(TypedDict):
    """Verifies of a group, as this node knows of them."""

    running: VerifyRunning | None
    last: VerifyEnded | None
    volumes: dict[str, VolumeVerified]


class Comparison(TypedDict):
    """How far a secondary is with comparing its copy with one that has no common history, and what it has found.

    ``state``: waiting, comparing, saving, done or failed. ``past``: of each node, ``lineages`` and ``records``: lines.
    ``volumes``, when it is done: ``size_bytes``, ``differing_bytes``, ``ranges`` (offset, length) and how many
    ``more_ranges`` there are.
    """

    keep: bool
    state: str
    why: str
    file: str
    done_bytes: int
    total_bytes: int
    differing_bytes: int
    past: dict[str, Any]
    volumes: dict[str, Any]


class Window(TypedDict):
    """The changes that the peer has not answered yet."""

    changes: int
    bytes: int
    oldest_ms: float


class Fit(TypedDict):
    """What a replica says of itself when the question is whether its node may own the group."""

    lineage: str
    blank: bool
    lost_cache: bool
    needs_sync: bool
    settled_epoch: int
    differs: bool
    failure: str


class Status(TypedDict):
    """A group, as its data process sees it: sent at every change of state and once a second.

    ``epoch``, ``owner`` and ``in_sync`` are of the record that it acts for; 0, "" and [] before the first order.
    ``cannot_listen``: why clients cannot connect; on the secondary, why they could not if it owned. A clause.
    ``owner_lineage``: the identity of the owner's data, as the secondary heard last by this record, or empty.
    ``endpoints``: TCP connections of the owner's clients: client host, its port, server host, its port.
    """

    group: str
    role: Role
    state: State
    why: str
    epoch: int
    owner: str
    in_sync: list[str]
    session: bool
    joinable: bool
    peer_unfit: str
    fit: Fit
    owner_lineage: str
    serving: bool
    cannot_listen: str
    endpoints: list[tuple[str, int, str, int]]
    link: LinkStatus
    resync: Resync | None
    verify: Verify
    comparison: Comparison | None
    window: Window
    clients: int
    counters: Counters
    volumes: dict[str, VolumeStatus]


@dataclass(frozen=True, slots=True)
class Ready:
    """The data process serves, or is ready to follow its peer."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The data process cannot go on, and ends."""

    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """The newest status of the group."""

    status: Status


@dataclass(frozen=True, slots=True)
class Done:
    """The data process has carried out a command; ``error`` says why it could not, a clause, or is empty."""

    number: int
    error: str


Message = Ready | Failed | Report | Done

STOP_LINE = b'{"type": "stop"}\n'


@dataclass(frozen=True, slots=True)
class _EachValue:
    """An object with any keys, whose values all have one shape."""

    shape: Any


@dataclass(frozen=True, slots=True)
class _EachItem:
    """A list of lists that all have items of these types."""

    types: tuple[type, ...]

    def fits(self, value: Any) -> bool:
        return isinstance(value, list) and all(map(self._item_fits, value))

    def _item_fits(self, item: Any) -> bool:
        right = isinstance(item, list) and len(item) == len(self.types)
        return right and all(map(isinstance, item, self.types))


_NUMBER = (int, float)
_STATUS_SHAPE: Mapping[str, Any] = {
    "group": str,
    "role": set(get_args(Role)),
    "state": set(STATES),
    "why": str,
    "epoch": int,
    "owner": str,
    "in_sync": [str],
    "session": bool,
    "joinable": bool,
    "peer_unfit": str,
    "fit": {
        "lineage": str,
        "blank": bool,
        "lost_cache": bool,
        "needs_sync": bool,
        "settled_epoch": int,
        "differs": bool,
        "failure": str,
    },
    "owner_lineage": str,
    "serving": bool,
    "cannot_listen": str,
    "endpoints": _EachItem((str, int, str, int)),
    "link": {
        "state": {"connected", "connecting", "listening", "refused", "idle"},
        "peer": str,
        "address": str,
        "why": str,
        "round_trip_ms": (*_NUMBER, type(None)),
        "protocol": (int, type(None)),
        "peer_version": (str, type(None)),
    },
    "verify": {
        "volumes": _EachValue(
            {
                "verified_s": (*_NUMBER, type(None)),
                "differing_bytes": int,
                "ranges": _EachItem((int, int)),
            }
        )
    },
    "window": {"changes": int, "bytes": int, "oldest_ms": _NUMBER},
    "clients": int,
    "counters": dict.fromkeys(Counters.__annotations__, int),
    "volumes": _EachValue(
        {
            "size_bytes": int,
            "read_only": bool,
            "in_flight": int,
            "intent_regions": int,
            "dirty_bytes": int,
            "counters": dict.fromkeys(VolumeCounters.__annotations__, int),
        }
    ),
}
_RESYNC_SHAPE = {"done_bytes": int, "total_bytes": int, "copied_bytes": int, "rate": _NUMBER, "why": str}
_ASKED_SHAPE = {"run": str, "repair": bool, "source": str}
_RUNNING_SHAPE = _RESYNC_SHAPE | _ASKED_SHAPE | {"found_bytes": int}
_OUTCOME_SHAPE = {"found_bytes": int, "found": _EachItem((int, int)), "repaired_bytes": int, "left_bytes": int}
_ENDED_SHAPE = _ASKED_SHAPE | {
    "ended_s": _NUMBER,
    "why": str,
    "done_bytes": int,
    "total_bytes": int,
    "unreadable_bytes": int,
    "volumes": _EachValue(_OUTCOME_SHAPE),
}


_COMPARISON_SHAPE = {
    "keep": bool,
    "state": str,
    "why": str,
    "file": str,
    **dict.fromkeys(("done_bytes", "total_bytes", "differing_bytes"), int),
    "past": _EachValue({"lineages": [str], "records": [str]}),
    "volumes": _EachValue(
        {"size_bytes": int, "differing_bytes": int, "ranges": _EachItem((int, int)), "more_ranges": int}
    ),
}


def parse(line: bytes) -> Message:
    """The message in a line; raises `ProtocolError` for anything that is none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"it sent a line that is not JSON: {line[:80]!r}") from error
    kind = message.get("type") if isinstance(message, dict) else None
    if kind == "ready":
        return Ready()
    if kind == "failed" and isinstance(message.get("message"), str):
        return Failed(message["message"])
    if kind == "status":
        return Report(_status(message))
    if kind == "done" and type(message.get("id")) is int and isinstance(message.get("error"), str):
        return Done(message["id"], message["error"])
    raise ProtocolError(f"it sent a message of an unknown kind: {line[:80]!r}")


def _status(message: dict[str, Any]) -> Status:
    wrong = _first_difference(message, _STATUS_SHAPE, "status")
    if wrong is None:
        verify = message["verify"]
        wrong = (
            _difference_if_there(message, "resync", _RESYNC_SHAPE, "status")
            or _difference_if_there(message, "comparison", _COMPARISON_SHAPE, "status")
            or _difference_if_there(verify, "running", _RUNNING_SHAPE, "status.verify")
            or _difference_if_there(verify, "last", _ENDED_SHAPE, "status.verify")
        )
    if wrong is not None:
        raise ProtocolError(f"it sent a status that cannot be understood, at {wrong}")
    del message["type"]
    return cast(Status, message)


def _difference_if_there(value: dict[str, Any], key: str, shape: Any, path: str) -> str | None:
    """Where something that may be missing does not have its shape; then it is None from now on."""
    found = value.setdefault(key, None)
    return None if found is None else _first_difference(found, shape, f"{path}.{key}")


def _first_difference(value: Any, shape: Any, path: str) -> str | None:
    """Where the value does not have the shape, or None."""
    if isinstance(shape, dict):
        return _in_object(value, shape, path)
    if isinstance(shape, _EachValue):
        return _in_object(value, dict.fromkeys(value, shape.shape), path) if isinstance(value, dict) else path
    if isinstance(shape, _EachItem):
        fits = shape.fits(value)
    elif isinstance(shape, list):
        fits = isinstance(value, list) and all(isinstance(item, shape[0]) for item in value)
    elif isinstance(shape, set):
        fits = isinstance(value, str) and value in shape
    else:
        fits = isinstance(value, shape)
    return None if fits else path


def _in_object(value: Any, shape: Mapping[str, Any], path: str) -> str | None:
    if not isinstance(value, dict):
        return path
    for key, inner in shape.items():
        wrong = _first_difference(value[key], inner, f"{path}.{key}") if key in value else f"{path}.{key}"
        if wrong is not None:
            return wrong
    return None
