"""What the operator wants of one group, and the change of owner that is under way. Pure."""

from dataclasses import dataclass

from stortrends_ha.cluster import effects as do
from stortrends_ha.cluster.outbox import Outbox
from stortrends_ha.cluster.view import Timing


@dataclass(frozen=True, slots=True)
class _Move:
    kind: str
    since_ns: int


class Wishes:
    """The wishes for one group; each is forgotten after ``move_timeout_ns``."""

    def __init__(self, outbox: Outbox, timing: Timing) -> None:
        self._outbox = outbox
        self._timing = timing
        self._move_until_ns = 0
        self._force_until_ns = 0
        self._move: _Move | None = None

    @property
    def move(self) -> bool:
        """The group shall go to the other node, or come to this one."""
        return self._move_until_ns > 0

    @property
    def force(self) -> bool:
        """This node shall own it, whatever may be lost (rule 11)."""
        return self._force_until_ns > 0

    def want_move(self, now_ns: int) -> None:
        """The operator asks for it."""
        self._move_until_ns = now_ns + self._timing.move_timeout_ns

    def want_force(self, now_ns: int) -> None:
        """The operator overrides."""
        self._force_until_ns = now_ns + self._timing.move_timeout_ns

    def drop_move(self) -> None:
        """It is done, or cannot be."""
        self._move_until_ns = 0

    def drop_force(self) -> None:
        """It is done, or not needed any more."""
        self._force_until_ns = 0

    def forget(self, now_ns: int) -> None:
        """Nothing came of them in time."""
        if now_ns >= self._move_until_ns:
            self.drop_move()
        if now_ns >= self._force_until_ns:
            self.drop_force()

    def begin(self, kind: str, since_ns: int) -> None:
        """A change of owner has begun; clients may have been waiting since then."""
        self._move = _Move(kind, since_ns)

    def begin_once(self, kind: str, since_ns: int) -> None:
        """The same, seen again and again: the first time counts."""
        if self._move is None or self._move.kind != kind:
            self.begin(kind, since_ns)

    @property
    def begun(self) -> str:
        """The kind of the change that is under way; empty without one."""
        return self._move.kind if self._move else ""

    def begun_no_more(self) -> None:
        """Nothing came of the change that had begun."""
        self._move = None

    def end(self, now_ns: int) -> None:
        """Clients are answered again: tell how long that took, if a change was under way."""
        if self._move is not None:
            self._outbox.put(do.Moved(self._move.kind, now_ns - self._move.since_ns))
            self._move = None
