"""What a node and a witness say to each other, pure: lines of JSON, authenticated with the cluster's key.

A connection begins with a hello of each side, in clear, with a nonce of its own; from then on every line is a body
sealed by ``Seal``. The client's first sealed line is OPEN; the witness answers WELCOME, or refuses in clear, as it has
no key in common with a stranger. So a client sends no request before the witness has proved that it has the key.

Invariants:
- A sealed line is genuine: HMAC-SHA256 over the direction, both hellos (with cluster, version and both nonces), a
  counter and the body. It can be neither forged, nor replayed (in this connection or another), nor left out, nor sent
  back to whom it came from. Answers are sealed like requests: nobody but the witness can grant.
- Answers come in the order of the requests.
- A line is at most ``LINE_BYTES_MAX``.

Neighbours: ``arbiter.witness_server`` and ``arbiter.witness_client`` speak it.
"""

import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from stortrends_ha.errors import ProtocolError
from stortrends_ha.record import Record

VERSIONS = (1, 1)  # the oldest and the newest that this code speaks
LINE_BYTES_MAX = 16 * 1024
NONCE_BYTES = 16
NOTE_CHARACTERS_MAX = 500
NAME_CHARACTERS_MAX = 64  # of clusters, nodes and groups, as in the configuration

CLIENT, WITNESS = b"client", b"witness"
_PURPOSE = b"stortrends-ha witness"  # the same key authenticates other things, which must not be taken for these


# --- Before there is a common secret ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClientHello:
    """Who wants to talk; ``versions`` are the oldest and the newest that it speaks."""

    cluster: str
    who: str
    nonce: bytes
    versions: tuple[int, int] = VERSIONS

    def encode(self) -> bytes:
        """As a line."""
        return _line(
            {"hello": self.cluster, "who": self.who, "nonce": self.nonce.hex(), "versions": list(self.versions)}
        )

    @staticmethod
    def decode(line: bytes) -> "ClientHello":
        """Raises ProtocolError."""
        value = _object(line)
        versions = value.get("versions")
        if not isinstance(versions, list) or [type(version) for version in versions] != [int, int]:
            raise ProtocolError("a hello without versions")
        return ClientHello(_name(value, "hello"), _name(value, "who"), _nonce(value), (versions[0], versions[1]))

    @property
    def version(self) -> int | None:
        """The newest version that both sides speak, if there is one."""
        newest = min(self.versions[1], VERSIONS[1])
        return newest if newest >= max(self.versions[0], VERSIONS[0]) else None


@dataclass(frozen=True, slots=True)
class WitnessHello:
    """The witness's answer, the same for friend and stranger."""

    nonce: bytes
    version: int

    def encode(self) -> bytes:
        """As a line."""
        return _line({"witness": self.version, "nonce": self.nonce.hex()})


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the witness does not talk to this client: a sentence. Not authenticated, so good for people only."""

    sentence: str

    def encode(self) -> bytes:
        """As a line."""
        return _line({"refused": self.sentence})


def decode_reply(line: bytes) -> WitnessHello | Refusal:
    """What a witness sends in clear. Raises ProtocolError."""
    value = _object(line)
    if "refused" in value:
        return _refusal(value)
    version = value.get("witness")
    if type(version) is not int or not VERSIONS[0] <= version <= VERSIONS[1]:
        raise ProtocolError(f"a witness of version {str(version)[:20]}")
    return WitnessHello(_nonce(value), version)


def _refusal(value: dict[str, Any]) -> Refusal:
    sentence = str(value["refused"])[:NOTE_CHARACTERS_MAX]
    return Refusal(sentence if sentence.isprintable() else repr(sentence))


# --- Sealed lines -------------------------------------------------------------------------------


class Seal:
    """One end of a connection: seals what it sends, and opens what it receives, each line once and in order."""

    def __init__(self, key: bytes, client_hello: bytes, witness_hello: bytes, sends: bytes) -> None:
        """``client_hello``, ``witness_hello``: the lines as they were on the wire; ``sends``: CLIENT or WITNESS."""
        hellos = hashlib.sha256(client_hello).digest() + hashlib.sha256(witness_hello).digest()
        self._key = key
        self._sending = b"%s %s\0%s" % (_PURPOSE, sends, hellos)
        self._receiving = b"%s %s\0%s" % (_PURPOSE, WITNESS if sends == CLIENT else CLIENT, hellos)
        self._sent = 0
        self._received = 0

    def seal(self, body: dict[str, Any]) -> bytes:
        """The next line to send."""
        text = json.dumps(body, separators=(",", ":"))
        self._sent += 1
        return _line({"n": self._sent, "body": text, "mac": self._mac(self._sending, self._sent, text)})

    def open(self, line: bytes) -> dict[str, Any]:
        """The body of the next line received. Raises ProtocolError if it is not that line, from the other end."""
        value = _object(line)
        text, mac = value.get("body"), value.get("mac")
        if not isinstance(text, str) or not isinstance(mac, str):
            raise ProtocolError("a line without body or proof")
        expected = self._mac(self._receiving, self._received + 1, text)
        if not hmac.compare_digest(expected.encode(), mac.encode("utf-8", "replace")):
            raise ProtocolError("a line that was not sealed with the key of the cluster, or is not the next one")
        self._received += 1
        return _object(text.encode("utf-8", "replace"))

    def _mac(self, direction: bytes, number: int, text: str) -> str:
        message = direction + number.to_bytes(8, "big") + text.encode("utf-8", "replace")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()


# --- Requests -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Open:
    """The first request: proves the key, and asks the witness to do the same."""


@dataclass(frozen=True, slots=True)
class Read:
    """What is the record of a group?"""

    group: str


@dataclass(frozen=True, slots=True)
class Propose:
    """Compare-and-set."""

    group: str
    old: Record
    new: Record


@dataclass(frozen=True, slots=True)
class Seed:
    """Set the record of a group that has none."""

    group: str
    record: Record


@dataclass(frozen=True, slots=True)
class Force:
    """The operator's override (rule 11): set the record, whatever is there; its epoch must be newer."""

    group: str
    record: Record
    note: str


Request: TypeAlias = Open | Read | Propose | Seed | Force


def encode_request(request: Request) -> dict[str, Any]:
    """The body of a request."""
    match request:
        case Open():
            return {"request": "open"}
        case Read(group):
            return {"request": "read", "group": group}
        case Propose(group, old, new):
            return {"request": "propose", "group": group, "old": old.encode(), "new": new.encode()}
        case Seed(group, record):
            return {"request": "seed", "group": group, "record": record.encode()}
        case Force(group, record, note):
            return {"request": "force", "group": group, "record": record.encode(), "note": note}


def decode_request(body: dict[str, Any]) -> Request:
    """Raises ProtocolError."""
    try:
        match body.get("request"):
            case "open":
                return Open()
            case "read":
                return Read(_name(body, "group"))
            case "propose":
                return _proposal(_name(body, "group"), Record.decode(body.get("old")), Record.decode(body.get("new")))
            case "seed":
                return Seed(_name(body, "group"), Record.decode(body.get("record")))
            case "force":
                return Force(_name(body, "group"), Record.decode(body.get("record")), _note(body))
    except ValueError as error:
        raise ProtocolError(str(error)) from None
    raise ProtocolError(f"an unknown request {str(body.get('request'))[:40]!r}")


def _proposal(group: str, old: Record, new: Record) -> Propose:
    if new.epoch != old.epoch + 1:
        raise ProtocolError(f"a proposal from epoch {old.epoch} to {new.epoch}, which is not the next")
    return Propose(group, old, new)


def _note(body: dict[str, Any]) -> str:
    note = body.get("note")
    if not isinstance(note, str) or not note.isprintable() or len(note) > NOTE_CHARACTERS_MAX:
        raise ProtocolError(f"a note is one line of at most {NOTE_CHARACTERS_MAX} characters")
    return note


# --- Answers ------------------------------------------------------------------------------------

AnswerKind = Literal["welcome", "granted", "refused", "known", "error"]
_ANSWERS: tuple[AnswerKind, ...] = ("welcome", "granted", "refused", "known", "error")


@dataclass(frozen=True, slots=True)
class Answer:
    """``current`` goes with "refused" and "known" (None: no record); ``why``, a clause, with "error"."""

    kind: AnswerKind
    current: Record | None = None
    why: str = ""


def encode_answer(answer: Answer) -> dict[str, Any]:
    """The body of an answer."""
    return {
        "answer": answer.kind,
        "current": answer.current.encode() if answer.current else None,
        "why": answer.why[:NOTE_CHARACTERS_MAX],
    }


def decode_answer(body: dict[str, Any]) -> Answer:
    """Raises ProtocolError."""
    current = body.get("current")
    for kind in _ANSWERS:
        if body.get("answer") == kind:
            try:
                return Answer(kind, None if current is None else Record.decode(current), str(body.get("why", "")))
            except ValueError as error:
                raise ProtocolError(str(error)) from None
    raise ProtocolError(f"an unknown answer {str(body.get('answer'))[:40]!r}")


# --- Lines --------------------------------------------------------------------------------------


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > LINE_BYTES_MAX:
        raise ProtocolError(f"a line of more than {LINE_BYTES_MAX} bytes")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ProtocolError("a line that is no JSON") from None
    if not isinstance(value, dict):
        raise ProtocolError("a line that is no JSON object")
    return value


def _name(value: dict[str, Any], key: str) -> str:
    name = value.get(key)
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= NAME_CHARACTERS_MAX:
        raise ProtocolError(f"{key} is no name")
    return name


def _nonce(value: dict[str, Any]) -> bytes:
    try:
        nonce = bytes.fromhex(value.get("nonce", ""))
    except (ValueError, TypeError):
        nonce = b""
    if len(nonce) != NONCE_BYTES:
        raise ProtocolError(f"a nonce is {NONCE_BYTES} bytes in hex")
    return nonce
