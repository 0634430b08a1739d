"""What the data process and the addresses of one group have been told, and whether they have done it. Pure.

Invariants: only the newest order counts, as the data process carries them out in their order; ``exposed`` is true from
the moment it is told to lead until it has said that it stopped, or has ended: so long it may be answering clients.
"""

from stortrends_ha.cluster import effects as do
from stortrends_ha.cluster.outbox import Outbox
from stortrends_ha.cluster.view import Timing
from stortrends_ha.record import Record

Order = do.Follow | do.Lead | do.Idle | do.Release


class Orders:
    """The orders of one group."""

    def __init__(self, outbox: Outbox, timing: Timing) -> None:
        self._outbox = outbox
        self._timing = timing
        self._newest: Order | None = None
        self._again_ns = 0
        self._lease_ns = 0
        self._unclaiming = 0
        self.carried_out = False  # the newest one
        self.exposed = False
        self.claimed = False  # the addresses are here, or on their way

    @property
    def missing(self) -> bool:
        """Whether the data process that runs has no order, or could not carry it out."""
        return self._newest is None

    @property
    def idling(self) -> bool:
        """Whether the data process was told to have no role."""
        return isinstance(self._newest, do.Idle)

    @property
    def unclaiming(self) -> bool:
        """Whether the addresses are being taken down."""
        return self._unclaiming > 0

    def may_order(self, now_ns: int) -> bool:
        """Whether it is not too early after an order that failed."""
        return now_ns >= self._again_ns

    # --- Giving -------------------------------------------------------------------------------

    def follow(self, record: Record) -> None:
        """Be the secondary."""
        self._give(do.Follow(self._outbox.count(), record))

    def lead(self, record: Record, not_before_ns: int, *, forced: bool, clears_loss: bool) -> None:
        """Be the owner."""
        self.exposed = True
        self._lease_ns = 0
        self._give(do.Lead(self._outbox.count(), record, not_before_ns, forced, clears_loss))

    def idle(self) -> None:
        """Stop listening and serving."""
        self._give(do.Idle(self._outbox.count()))

    def stop_exposed(self) -> None:
        """Whatever the data process does, it must not serve: unless it is stopping already."""
        if self.exposed and not isinstance(self._newest, do.Idle):
            self.idle()

    def release(self) -> None:
        """Stop for a handover."""
        self._give(do.Release(self._outbox.count()))

    def _give(self, order: Order) -> None:
        self._newest, self.carried_out = order, False
        self._outbox.put(order)

    def lease(self, until_ns: int) -> None:
        """Tell it until when it may answer, if that has changed."""
        if until_ns != self._lease_ns:
            self._lease_ns = until_ns
            self._outbox.put(do.Lease(until_ns))

    def claim(self) -> None:
        """Bring up the addresses, unless they are."""
        if not self.claimed and not self._unclaiming:
            self.claimed = True
            self._outbox.put(do.Claim())

    def unclaim(self) -> None:
        """Take them down, if they are up."""
        if self.claimed:
            self.claimed = False
            self._unclaiming = self._outbox.count()
            self._outbox.put(do.Unclaim(self._unclaiming))

    # --- Outcomes -----------------------------------------------------------------------------

    def done(self, number: int, error: str, now_ns: int) -> Order | None:
        """The outcome of what was awaited under this number: the order, if it was the newest one."""
        if number == self._unclaiming:
            self._unclaiming = 0
        if self._newest is None or number != self._newest.number:
            return None
        order, self.carried_out = self._newest, True
        if error:
            self._newest = None
            self._again_ns = now_ns + self._timing.retry_ns
        elif not isinstance(order, do.Lead):
            self.exposed = False
        return order

    def gone(self) -> None:
        """The data process has ended, and with it what it was told."""
        self._newest, self.exposed = None, False
