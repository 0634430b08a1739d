"""Opening a session: who sends what, and what is durable before what. Pure: it talks through a generator.

A *talk* yields a number when it wants so many bytes and bytes when it wants them sent, and returns what was agreed.
The data process runs it over a socket.

Order that matters (each step can be the last before a death):
- The owner's lineage is durable before its HELLO (``lead`` sees to that).
- Rule 6: both say for which record they act; neither goes on unless it is the same one, owned by who opens.
- The secondary looks at itself again when OPEN has come, ends the session before, and makes lineage and
  ``needs_sync`` durable (``begin``) in the same turn, with nothing awaited in between: before OPENED leaves, so before
  anything of the session is applied. A death after that leaves a secondary that says so in its next HELLO.
- An owner that dies before OPENED leaves a secondary in a session that nobody uses; the next one ends it.
- Until OPENED the owner changes nothing. In a session that begins with a sync, the first CHANGES frame says its
  own number, so an owner that is alone goes on answering during the talk.

Bounds: frames of LINK_FRAME_BYTES; whoever runs a talk limits its time.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from stortrends_ha.errors import PeerUnfitError, ProtocolError, SessionRefusedError
from stortrends_ha.limits import LINK_FRAME_BYTES
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import HEADER, PREFACE, Frame, Kind
from stortrends_ha.replication import session
from stortrends_ha.replication.session import CHANGES, Hello, Plan

T = TypeVar("T")
_PLANS = {plan.value: plan for plan in (Plan.RESUME, Plan.RECONCILE, Plan.SYNC)}
Talk = Generator[int | bytes, bytes, T]


class Opener(Protocol):
    """The owner, as the talk sees it."""

    def hello(self) -> Hello:
        """What this node says of itself now."""

    def first(self) -> int:
        """The number of the first change that a session which resumes will bring."""

    def new_filling(self) -> str:
        """A name for a copying of everything that begins now: no other has it."""


class Joiner(Protocol):
    """The secondary, as the talk sees it."""

    def hello(self) -> Hello:
        """What this node says of itself now."""

    def obstacle(self) -> str:
        """Why it can open no session now, whoever asks; empty if it can."""

    def met(self, owner: Hello) -> None:
        """This is the owner by the record, whether or not a session is opened."""

    def begin(self, lineage: str, plan: Plan, fill: str) -> None:
        """End the session before, then make durable what this one needs; ``fill``: the name of a copying of everything,
        or empty. Raises StorageError."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The owner's end: the stream may begin."""

    theirs: Hello
    plan: Plan
    fill: str  # the name of a copying of everything that begins; empty if none does
    why: str

    @property
    def protocol(self) -> int | None:
        """The link protocol that both speak: the newest."""
        return session.common_protocol(wire.PROTOCOL_VERSIONS, self.theirs.protocols)


@dataclass(frozen=True, slots=True)
class Inspected:
    """Either end: no session, as the replicas have no common history. The secondary compares them; nothing changes."""

    theirs: Hello


@dataclass(frozen=True, slots=True)
class Joined(Opened):
    """The secondary's end: ``opened`` is to be sent when the receiver is in place."""

    first: int  # 0: the first CHANGES frame says it
    opened: bytes


# --- The owner --------------------------------------------------------------------------------


def as_owner(me: Opener) -> Talk[Opened | Inspected]:
    """Open a session, or let the secondary inspect. Raises SessionRefusedError, PeerUnfitError, ProtocolError."""
    mine = me.hello()
    epoch = mine.record.epoch
    yield PREFACE + wire.encode_object(Kind.HELLO, epoch, mine.encode())
    yield from _preface()
    value = _expect(Kind.HELLO, (yield from _frame()))
    if reason := session.incompatible(mine, value):
        yield refuse(epoch, reason)
        raise SessionRefusedError(reason)
    theirs = Hello.decode(value)
    decision, why = session.plan(mine, theirs)
    reason = session.refusal(mine, theirs, mine)
    if not reason and theirs.inspects and decision is Plan.HOLD and session.diverged(mine, theirs):
        yield wire.frame(Kind.INSPECT, epoch)
        return Inspected(theirs)
    if reason or decision in (Plan.HOLD, Plan.UNFIT):
        yield refuse(epoch, reason or why)
        raise PeerUnfitError(why) if not reason and decision is Plan.UNFIT else SessionRefusedError(reason or why)
    sync = decision is Plan.SYNC
    fill = me.new_filling() if sync and session.must_fill(mine, theirs) else ""
    first = 0 if sync else me.first()
    said = {"plan": decision.value, "first": first, "lineage": mine.lineage, "fill": fill}
    yield wire.encode_object(Kind.OPEN, epoch, said)
    _expect(Kind.OPENED, (yield from _frame(epoch)))
    return Opened(theirs, decision, fill, why)


# --- The secondary ----------------------------------------------------------------------------


def as_secondary(me: Joiner) -> Talk[Joined | Inspected]:
    """Answer who connected. Raises SessionRefusedError, ProtocolError, StorageError."""
    yield from _preface()
    value = _expect(Kind.HELLO, (yield from _frame()))
    mine = me.hello()
    if reason := session.incompatible(mine, value):
        yield PREFACE + refuse(mine.record.epoch, reason)
        raise SessionRefusedError(reason)
    theirs = Hello.decode(value)
    refusal = session.refusal(mine, theirs, theirs)
    if not refusal:
        me.met(theirs)
    if reason := me.obstacle() or refusal:
        passing = session.passing(mine, theirs)
        yield PREFACE + refuse(mine.record.epoch, reason, passing)
        raise SessionRefusedError(reason, passing)
    epoch = theirs.record.epoch
    yield PREFACE + wire.encode_object(Kind.HELLO, epoch, mine.encode())
    answer = yield from _frame(epoch)
    if answer.kind == Kind.INSPECT and mine.inspects:
        return Inspected(theirs)
    message = _expect(Kind.OPEN, answer)
    # From here to the return nothing is yielded: what was true at HELLO may have changed since, and is asked again.
    return _join(me, theirs, message)


def _join(me: Joiner, theirs: Hello, message: dict[str, Any]) -> Joined:
    first, named, lineage, fill = (message.get(key) for key in ("first", "plan", "lineage", "fill"))
    plan = _PLANS.get(named) if isinstance(named, str) else None
    if plan is None or type(first) is not int or not isinstance(lineage, str) or not isinstance(fill, str):
        raise ProtocolError("an OPEN that does not say what it should")
    if not (first == 0 if plan is Plan.SYNC else 1 <= first < CHANGES):
        raise ProtocolError(f"an OPEN whose first change is number {first}")
    mine = me.hello()
    if me.obstacle() or session.refusal(mine, theirs, theirs):
        raise ProtocolError("an OPEN that has been overtaken by another session, or by a failure of this replica")
    if lineage != theirs.lineage or not session.may_follow(mine, lineage, plan, fill):
        raise ProtocolError("a session of another lineage, or without the sync that this replica needs")
    me.begin(lineage, plan, fill)
    return Joined(theirs, plan, fill, "", first, wire.frame(Kind.OPENED, theirs.record.epoch))


# --- Without a session ------------------------------------------------------------------------


def receive(epoch: int, kind: Kind) -> Talk[Frame]:
    """One frame, of this kind. Raises SessionRefusedError if the other side will not, ProtocolError."""
    frame = yield from _frame(epoch)
    if frame.kind == Kind.REFUSE:
        raise SessionRefusedError(str(wire.decode_object(frame.payload).get("reason")))
    if frame.kind != kind:
        raise ProtocolError(f"{Kind(frame.kind).name} came where {kind.name} belongs")
    return frame


# --- Frames -----------------------------------------------------------------------------------


def refuse(epoch: int, reason: str, passing: bool = False) -> bytes:
    """The frame that says why this node goes no further."""
    return wire.encode_object(Kind.REFUSE, epoch, {"reason": reason, "passing": passing})


def _expect(kind: Kind, frame: Frame) -> dict[str, Any]:
    """The object of a frame that must be of this kind. Raises SessionRefusedError if it refuses, ProtocolError."""
    if frame.kind == Kind.REFUSE:
        value = wire.decode_object(frame.payload)
        raise SessionRefusedError(str(value.get("reason")), value.get("passing") is True)
    if frame.kind != kind:
        raise ProtocolError(f"{Kind(frame.kind).name} came where {kind.name} belongs")
    return wire.decode_object(frame.payload) if frame.payload else {}


def _frame(epoch: int | None = None) -> Talk[Frame]:
    """One frame other than CHANGES. Raises ProtocolError."""
    header = yield HEADER.size
    length = HEADER.unpack(header)[3]
    if length > LINK_FRAME_BYTES:
        raise ProtocolError(f"a frame of {length} bytes is longer than {LINK_FRAME_BYTES}")
    data = memoryview(header + ((yield length) if length else b""))
    frame = wire.next_frame(data, 0, len(data), epoch)
    if frame is None or frame.kind == Kind.CHANGES:
        raise ProtocolError("changes before the session was open")
    return frame


def _preface() -> Talk[None]:
    """The first bytes of a connection. Raises ProtocolError."""
    if (yield len(PREFACE)) != PREFACE:
        raise ProtocolError("it does not speak the link protocol")
