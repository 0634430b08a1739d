"""The datagrams between the two supervisors, pure: beats, and questions for the peer's consent.

A datagram is ``PREFACE`` (4 bytes), version, kind, an HMAC-SHA256 (32 bytes) over everything else, and a JSON object.
These places never change, so that any two versions can tell each other apart.

Invariants:
- ``decode`` raises nothing but ProtocolError, whatever it is given, and parses nothing that is not authentic.
- What it returns has been checked field by field: types, ranges, names as the configuration allows them, printable
  text. Fields that it does not know are ignored, so that a newer version may add some.
- Whether a message is *fresh* is not decided here but in ``cluster.membership``: an authentic one may be a replay.
- What ``encode`` makes of up to ``HEARTBEAT_GROUPS`` groups fits a datagram (``limits``).
"""

import hmac
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stortrends_ha.errors import ProtocolError
from stortrends_ha.limits import (
    HEARTBEAT_DATAGRAM_BYTES,
    HEARTBEAT_GREETS,
    HEARTBEAT_GROUPS,
    HEARTBEAT_NAME_CHARACTERS,
    HEARTBEAT_REASON_BYTES,
    HEARTBEAT_SECTIONS,
    HEARTBEAT_WORD_BYTES,
)
from stortrends_ha.record import Record

PREFACE = b"SHHB"
VERSION = 1
MAC_BYTES = 32
_HEADER_BYTES = len(PREFACE) + 2
_BODY_AT = _HEADER_BYTES + MAC_BYTES

INCARNATIONS = 1 << 64
SEQS = 1 << 63
WANTS = ("", "move")
LEFT = "left"
"""Among the sections: for which arbiter and timings the sender has left all others (``node.agreement``)."""
_NODES = 2
# As in ``config.values``: what a name in the configuration looks like.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class GroupBeat:
    """What a node says of one group."""

    name: str
    record: Record  # the newest that it has, durably
    phase: str  # what it is to the group, for people
    promise: bool  # it will not take over before the lease has ended that this beat's echo gives (rule 5)
    fit: str  # why it could not own the group, whatever the record says; empty if it could
    lost: bool  # it is not fit only because its cache was lost
    leading: bool  # it may be answering clients
    serving: bool  # it is answering clients
    want: str  # "move": please hand the group over to me


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One beat. Numbers of lives ("incarnations") are random and not 0; 0 stands for "none"."""

    cluster: str
    node: str
    incarnation: int  # of the sender's present life
    seq: int  # from 1 on, one more with each beat of this life
    echo_incarnation: int  # the life of the receiver that the sender has met; 0: none yet
    echo_seq: int  # the newest beat of that life that the sender has received
    greets: tuple[tuple[int, int], ...]  # (incarnation, newest seq) of lives heard of, not met: they may be replays
    drained: bool  # nothing is to be owned by this node
    stopping: bool  # this node is being stopped
    version: str  # of the software, for people
    groups: tuple[GroupBeat, ...]
    sections: tuple[tuple[str, str], ...] = ()  # of the cluster file: (name, digest)

    def group(self, name: str) -> GroupBeat | None:
        """What it says of this group, if anything."""
        return next((group for group in self.groups if group.name == name), None)


@dataclass(frozen=True, slots=True)
class Ask:
    """Do you consent to this change of the record? (The fencing and manual arbiters.)"""

    cluster: str
    node: str
    incarnation: int
    echo_incarnation: int  # the life of the peer that is asked; no other may answer
    number: int  # of the question, from 1 on in this life
    group: str
    old: Record
    new: Record


@dataclass(frozen=True, slots=True)
class Answer:
    """Granted: the record is ``new`` on the answering node, durably. Else ``current`` is what it has; None: nothing."""

    cluster: str
    node: str
    incarnation: int
    echo_incarnation: int
    number: int  # of the question
    granted: bool
    current: Record | None


Message = Heartbeat | Ask | Answer


def encode(key: bytes, message: Message) -> bytes:
    """As one datagram. ``fit`` is cut to its bound; a message that is too long all the same is a bug: ValueError."""
    kind, body = _ENCODERS[type(message)]
    header = PREFACE + bytes((VERSION, kind))
    text = json.dumps(body(message), separators=(",", ":"), ensure_ascii=False).encode()
    data = header + _mac(key, header, text) + text
    if len(data) > HEARTBEAT_DATAGRAM_BYTES:
        raise ValueError(f"a datagram of {len(data)} bytes: more than {HEARTBEAT_GROUPS} groups?")
    return data


def decode(key: bytes, data: bytes) -> Message:
    """From a datagram of anybody. Raises ProtocolError."""
    if len(data) > HEARTBEAT_DATAGRAM_BYTES:
        raise ProtocolError(f"a datagram of more than {HEARTBEAT_DATAGRAM_BYTES} bytes")
    if len(data) < _BODY_AT or not data.startswith(PREFACE):
        raise ProtocolError("a datagram that is no heartbeat")
    header, mac, body = data[:_HEADER_BYTES], data[_HEADER_BYTES:_BODY_AT], data[_BODY_AT:]
    if not hmac.compare_digest(mac, _mac(key, header, body)):
        raise ProtocolError("a datagram that is not signed with this cluster's key")
    version, kind = header[-2:]
    if version != VERSION:
        raise ProtocolError(f"a heartbeat of format {version}; this node speaks format {VERSION}")
    if kind not in _DECODERS:
        raise ProtocolError(f"a heartbeat of unknown kind {kind}")
    return _DECODERS[kind](_Fields(_object(body)))


def clip(text: str) -> str:
    """Text for people, as it may stand in a beat: printable, and cut to ``HEARTBEAT_REASON_BYTES``."""
    printable = "".join(character if character.isprintable() else " " for character in text[:HEARTBEAT_REASON_BYTES])
    return printable.encode()[:HEARTBEAT_REASON_BYTES].decode(errors="ignore")


def _mac(key: bytes, header: bytes, body: bytes) -> bytes:
    return hmac.digest(key, header + body, "sha256")


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode())
    except (ValueError, RecursionError):
        raise ProtocolError("a heartbeat that is no JSON") from None
    if not isinstance(value, dict):
        raise ProtocolError("a heartbeat that is no JSON object")
    return value


class _Fields:
    """Checked access to a foreign JSON object; every method raises ProtocolError."""

    __slots__ = ("_values",)

    def __init__(self, values: Any) -> None:
        if not isinstance(values, dict):
            raise ProtocolError("a heartbeat with a group that is no JSON object")
        self._values = values

    def get(self, key: str, good: Callable[[Any], bool]) -> Any:
        value = self._values.get(key)
        if not good(value):
            raise ProtocolError(f"a heartbeat with a bad {key!r}")
        return value

    def number(self, key: str, first: int, end: int) -> int:
        return int(self.get(key, lambda value: _is_number(value, first, end)))

    def flag(self, key: str) -> bool:
        return bool(self.get(key, lambda value: isinstance(value, bool)))

    def name(self, key: str) -> str:
        return str(self.get(key, _is_name))

    def text(self, key: str, bytes_max: int) -> str:
        return str(self.get(key, lambda value: _is_text(value, bytes_max)))

    def items(self, key: str, count_max: int) -> list[Any]:
        return list(self.get(key, lambda value: isinstance(value, list) and len(value) <= count_max))

    def record(self, key: str) -> Record:
        try:
            record = Record.decode(self._values.get(key))
        except ValueError:
            raise ProtocolError(f"a heartbeat with a bad {key!r}") from None
        if len(record.in_sync) > _NODES or not all(map(_is_name, record.in_sync)):
            raise ProtocolError(f"a heartbeat with a bad {key!r}")
        return record

    def record_or_none(self, key: str) -> Record | None:
        return None if self._values.get(key) is None else self.record(key)


def _is_number(value: Any, first: int, end: int) -> bool:
    return type(value) is int and first <= value < end


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= HEARTBEAT_NAME_CHARACTERS and _NAME.fullmatch(value) is not None


def _is_text(value: Any, bytes_max: int) -> bool:
    # Printable also says: no surrogates, so that it can be encoded; its length in bytes is asked for after that.
    return isinstance(value, str) and value.isprintable() and len(value.encode()) <= bytes_max


# --- Beats ------------------------------------------------------------------------------------


def _heartbeat_body(beat: Heartbeat) -> dict[str, Any]:
    return {
        "cluster": beat.cluster,
        "node": beat.node,
        "incarnation": beat.incarnation,
        "seq": beat.seq,
        "echo_incarnation": beat.echo_incarnation,
        "echo_seq": beat.echo_seq,
        "greets": beat.greets,
        "drained": beat.drained,
        "stopping": beat.stopping,
        "version": beat.version,
        "groups": [_group_body(group) for group in beat.groups],
        "sections": beat.sections,
    }


def _group_body(group: GroupBeat) -> dict[str, Any]:
    return {
        "name": group.name,
        "record": group.record.encode(),
        "phase": group.phase,
        "promise": group.promise,
        "fit": clip(group.fit),
        "lost": group.lost,
        "leading": group.leading,
        "serving": group.serving,
        "want": group.want,
    }


def _heartbeat(fields: _Fields) -> Heartbeat:
    groups = tuple(_group(_Fields(value)) for value in fields.items("groups", HEARTBEAT_GROUPS))
    if len({group.name for group in groups}) != len(groups):
        raise ProtocolError("a heartbeat that names a group twice")
    return Heartbeat(
        cluster=fields.name("cluster"),
        node=fields.name("node"),
        incarnation=fields.number("incarnation", 1, INCARNATIONS),
        seq=fields.number("seq", 1, SEQS),
        echo_incarnation=fields.number("echo_incarnation", 0, INCARNATIONS),
        echo_seq=fields.number("echo_seq", 0, SEQS),
        greets=tuple(_greeting(value) for value in fields.items("greets", HEARTBEAT_GREETS)),
        drained=fields.flag("drained"),
        stopping=fields.flag("stopping"),
        version=fields.text("version", HEARTBEAT_NAME_CHARACTERS),
        groups=groups,
        sections=tuple(_section(value) for value in fields.items("sections", HEARTBEAT_SECTIONS)),
    )


def _section(value: Any) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2 or not all(_is_name(word) for word in value):
        raise ProtocolError("a heartbeat with bad 'sections'")
    name, digest = value
    return name, digest


def _greeting(value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ProtocolError("a heartbeat with a bad 'greets'")
    incarnation, seq = value
    if not _is_number(incarnation, 1, INCARNATIONS) or not _is_number(seq, 1, SEQS):
        raise ProtocolError("a heartbeat with a bad 'greets'")
    return incarnation, seq


def _group(fields: _Fields) -> GroupBeat:
    return GroupBeat(
        name=fields.name("name"),
        record=fields.record("record"),
        phase=fields.text("phase", HEARTBEAT_WORD_BYTES),
        promise=fields.flag("promise"),
        fit=fields.text("fit", HEARTBEAT_REASON_BYTES),
        lost=fields.flag("lost"),
        leading=fields.flag("leading"),
        serving=fields.flag("serving"),
        want=str(fields.get("want", lambda value: value in WANTS)),
    )


# --- Consent ----------------------------------------------------------------------------------


def _consent_body(message: Ask | Answer) -> dict[str, Any]:
    return {
        "cluster": message.cluster,
        "node": message.node,
        "incarnation": message.incarnation,
        "echo_incarnation": message.echo_incarnation,
        "number": message.number,
    }


def _ask_body(ask: Ask) -> dict[str, Any]:
    return {**_consent_body(ask), "group": ask.group, "old": ask.old.encode(), "new": ask.new.encode()}


def _answer_body(answer: Answer) -> dict[str, Any]:
    current = answer.current.encode() if answer.current else None
    return {**_consent_body(answer), "result": "granted" if answer.granted else "refused", "current": current}


def _consent(fields: _Fields) -> dict[str, Any]:
    return {
        "cluster": fields.name("cluster"),
        "node": fields.name("node"),
        "incarnation": fields.number("incarnation", 1, INCARNATIONS),
        "echo_incarnation": fields.number("echo_incarnation", 1, INCARNATIONS),
        "number": fields.number("number", 1, SEQS),
    }


def _ask(fields: _Fields) -> Ask:
    common = _consent(fields)
    return Ask(**common, group=fields.name("group"), old=fields.record("old"), new=fields.record("new"))


def _answer(fields: _Fields) -> Answer:
    result = fields.get("result", lambda value: value in ("granted", "refused"))
    return Answer(**_consent(fields), granted=result == "granted", current=fields.record_or_none("current"))


_ENCODERS: dict[type[Message], tuple[int, Callable[[Any], dict[str, Any]]]] = {
    Heartbeat: (1, _heartbeat_body),
    Ask: (2, _ask_body),
    Answer: (3, _answer_body),
}
_DECODERS: dict[int, Callable[[_Fields], Message]] = {1: _heartbeat, 2: _ask, 3: _answer}
