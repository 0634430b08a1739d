"""The dialogue with the arbiter about one group's record: one request at a time, paced, and what an answer means. Pure.

Rule 11: no answer changes nothing. A proposal that may have been granted is *open*: it is made again, or another one
to the same next epoch, until there is an answer. A read does not settle it, as a delayed request may still arrive.
"""

from dataclasses import dataclass

from stortrends_ha.cluster import effects as do
from stortrends_ha.cluster.answers import Answer, Granted, Known, Refused, Unreachable
from stortrends_ha.cluster.outbox import Outbox
from stortrends_ha.cluster.view import Timing
from stortrends_ha.record import Record


@dataclass(frozen=True, slots=True)
class Newer:
    """There is a newer record: the one that was proposed, or another."""

    record: Record
    why: str


@dataclass(frozen=True, slots=True)
class NotGranted:
    """What was proposed was certainly not granted, and cannot be any more."""

    why: str


@dataclass(frozen=True, slots=True)
class Empty:
    """The arbiter has no record of the group; ``proposed``: so a proposal was certainly not granted."""

    proposed: bool


@dataclass(frozen=True, slots=True)
class Agreed:
    """The arbiter has the very record that this node has."""


_EMPTY = "the arbiter has no record of this group; it gets one when both nodes see each other, and ask the same arbiter"

Verdict = Newer | NotGranted | Empty | Agreed | None


@dataclass(frozen=True, slots=True)
class _Ask:
    """A request that is under way; ``new``: the record that it would make, None for a read."""

    number: int
    new: Record | None


class Register:
    """The arbiter's register of one group, as this node knows it."""

    def __init__(self, outbox: Outbox, timing: Timing) -> None:
        self._outbox = outbox
        self._timing = timing
        self._ask: _Ask | None = None
        self._next_ask_ns = 0
        self._next_check_ns = 0
        self.open: Record | None = None  # a proposal that may have been granted, or may be yet
        self.waits_for = ""  # why the arbiter's last answer was none, a clause; empty if it was one
        self._answered_ns: int | None = None  # when it answered last
        self._told: Record | None = None  # the proposal that the log has

    @property
    def asking(self) -> bool:
        """Whether a request is under way."""
        return self._ask is not None

    @property
    def proposing(self) -> bool:
        """Whether a change is asked for, or perhaps granted."""
        return self.open is not None or (self._ask is not None and self._ask.new is not None)

    # --- Questions ----------------------------------------------------------------------------

    def propose(self, old: Record, new: Record, why: str, now_ns: int) -> None:
        """Ask for a change, unless a request is under way or it is too early for the next one."""
        if self.may_ask(now_ns):
            if new != self._told:
                self._outbox.say(f"proposing {new}, because {why}", old.epoch)
            self._told = new
            self._outbox.put(do.Propose(self._begin(new), old, new))

    def force(self, new: Record, now_ns: int) -> bool:
        """Ask for the operator's override; whether it was asked."""
        may = self.may_ask(now_ns)
        if may:
            self._outbox.put(do.Force(self._begin(new), new))
        return may

    def seed(self, record: Record) -> None:
        """Give the arbiter, which has said that it has none, the record that both nodes agree on."""
        self._outbox.say(f"giving the arbiter, which has none, the record on which both agree: {record}", record.epoch)
        self._outbox.put(do.Seed(self._begin(record), record))

    def read(self, now_ns: int) -> None:
        """Ask what the register has."""
        if self.may_ask(now_ns):
            self._outbox.put(do.Read(self._begin(None)))

    def check(self, now_ns: int) -> None:
        """Read it now and then: it may have something newer, or have been lost."""
        if now_ns >= self._next_check_ns:
            self.read(now_ns)

    def answers(self, now_ns: int) -> bool:
        """Whether the arbiter has answered within the last ``suspect_after_ns``; if not, it is asked."""
        if self._answered_ns is not None and now_ns - self._answered_ns < self._timing.suspect_after_ns:
            return True
        self.read(now_ns)
        return False

    def put_off_check(self, now_ns: int) -> None:
        """There is no need to check it for a while."""
        self._next_check_ns = now_ns + self._timing.check_ns

    def may_ask(self, now_ns: int) -> bool:
        """Whether a question now would be asked."""
        return self._ask is None and now_ns >= self._next_ask_ns

    def _begin(self, new: Record | None) -> int:
        self._ask = _Ask(self._outbox.count(), new)
        return self._ask.number

    def settle(self) -> None:
        """A record newer than any old one of a proposal is known: whatever was asked does not matter any more."""
        self._ask = self.open = None

    # --- Answers ------------------------------------------------------------------------------

    def take(self, number: int, answer: Answer, record: Record, now_ns: int) -> Verdict:
        """What an answer means for a node that has ``record``."""
        if self._ask is None or number != self._ask.number:
            return None
        new, self._ask = self._ask.new, None
        self.put_off_check(now_ns)
        self.waits_for = ""
        if not isinstance(answer, Unreachable):
            self._answered_ns = now_ns
        match answer:
            case Unreachable(why, asked):
                return self._unreachable(new if new != record else None, why, asked, now_ns)
            case Granted(instead):
                granted = instead or new
                return Agreed() if granted in (None, record) else Newer(granted, "the arbiter granted it")
            case Refused(None) | Known(None):
                self._wait(_EMPTY, now_ns)
                self.open = None if new else self.open
                return Empty(proposed=new is not None)
            case Refused(current) | Known(current):
                assert current is not None
                return self._has(current, new, record, now_ns)

    def _unreachable(self, proposed: Record | None, why: str, asked: bool, now_ns: int) -> Verdict:
        self._wait(why, now_ns)
        if asked and proposed is not None:
            self.open = proposed
        return NotGranted(why) if self.open is None else None

    def _has(self, current: Record, proposed: Record | None, record: Record, now_ns: int) -> Verdict:
        if current.epoch > record.epoch:
            return Newer(current, "the arbiter has it")
        if current != record:
            self._wait(f"the arbiter has an older record ({current}): was it restored from a backup?", now_ns)
            return None
        if proposed is None:
            return Agreed()
        self.open = None
        self._next_ask_ns = now_ns + self._timing.retry_ns
        return NotGranted("it was refused for now")

    def _wait(self, why: str, now_ns: int) -> None:
        self.waits_for = why
        self._next_ask_ns = now_ns + self._timing.retry_ns
        self._next_check_ns = now_ns + self._timing.suspect_after_ns  # what the operator asks for waits for it
