"""What a data process is, as its supervisor says: nothing, the secondary or the owner of its group; and the changes.

Orders are carried out one at a time, in their order. Whatever the role, the volumes stay open.

Rule 4: ``idle`` is done when nothing can be applied or answered any more; the takeover is proposed only after that.
Connections of clients survive a handover for KEPT_S at most: by then the new owner serves, or it was no handover.

A death in any of them leaves what the state file says (``replica``); the supervisor has the record and orders anew.
"""

import asyncio
import logging
from collections.abc import Callable

from stortrends_ha.errors import OrderError, StorageError
from stortrends_ha.record import Record

from .commands import (
    Compare,
    Drop,
    EndCompare,
    EndVerify,
    Follow,
    GiveUp,
    Idle,
    Lead,
    Lease,
    Order,
    Release,
    Show,
    Verify,
)
from .follower import Follower
from .owner import Owner
from .replica import Replica
from .report import Status, base
from .watch import end_with

log = logging.getLogger(__name__)

KEPT_S = 1.0


class Roles:
    """The role of a data process."""

    def __init__(self, replica: Replica, changed: Callable[[], None]) -> None:
        self._replica = replica
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._role: Owner | Follower | None = None
        self._kept: Owner | None = None  # handed over, with its clients still connected
        self._kept_timer: asyncio.TimerHandle | None = None
        self._looking = end_with(asyncio.create_task(self._look_if_blank()))
        self._watching = end_with(asyncio.create_task(replica.watch_disks()))

    async def _look_if_blank(self) -> None:
        try:
            await self._replica.look_if_blank()
        except StorageError as e:
            self._replica.fail_unless_last(e)
        self._changed()

    @property
    def _owner(self) -> Owner | None:
        return self._role if isinstance(self._role, Owner) else None

    # --- Orders -------------------------------------------------------------------------------

    async def carry_out(self, order: Order) -> None:
        """Raises StorTrendsError with the reason why it was not done."""
        try:
            match order:
                case Follow(_, record):
                    self._follow(record)
                case Lead(_, record):
                    self._lead(order, record)
                case Idle():
                    self._rest()
                case Release():
                    await self._release()
                case GiveUp():
                    self._follower().give_up()
                case Compare(_, keep):
                    self._follower().compare(keep)
                case Show(_, address):
                    self._follower().show(address)
                case EndCompare():
                    self._follower().end_inspection("it was ended by the operator")
        except StorageError as e:
            self._replica.fail(e)
            raise
        finally:
            self._changed()

    def _follow(self, record: Record) -> None:
        if record.owner == self._replica.node:
            raise OrderError(f"{record.owner} cannot be its own secondary")
        if isinstance(self._role, Follower):
            self._role.follow(record)
            return
        owner = self._owner
        self._rest(keep=owner is not None and owner.released)
        self._role = Follower(self._replica, record, self._changed)
        self._role.start()

    def _lead(self, order: Lead, record: Record) -> None:
        if record.owner != self._replica.node:
            raise OrderError(f"{record.owner} owns the group by this record, not {self._replica.node}")
        if reason := self._replica.why_not_lead(record, order.forced, order.clears_loss):
            raise OrderError(f"{self._replica.node} must not serve {self._replica.group.name}: {reason}")
        owner = self._owner
        if owner is None:
            self._rest()
        self._replica.begin_to_lead(order.forced, order.clears_loss)
        if owner is not None:
            owner.lead(record, order.not_before_ns)
            return
        self._role = owner = Owner(self._replica, record, order.not_before_ns, self._changed)
        owner.start()
        log.info("group %s: this node serves it, %s", self._replica.group.name, record)

    def _rest(self, keep: bool = False) -> None:
        """End the role; ``keep``: its clients stay connected for a moment."""
        self.drop()
        role, self._role = self._role, None
        if isinstance(role, Owner):
            role.leave()
            self._kept = role
            if keep:
                self._kept_timer = self._loop.call_later(KEPT_S, self.drop)
            else:
                self.drop()
        elif role is not None:
            role.stop()
        self._replica.on_failure, self._replica.is_last_copy = self._changed, lambda: False

    async def _release(self) -> None:
        if self._owner is None:
            raise OrderError(f"{self._replica.node} does not serve {self._replica.group.name}")
        await self._owner.release()

    def _follower(self) -> Follower:
        """Raises OrderError."""
        if not isinstance(self._role, Follower):
            raise OrderError(f"{self._replica.node} is not the secondary of {self._replica.group.name}")
        return self._role

    # --- At once --------------------------------------------------------------------------------

    def at_once(self, command: Lease | Drop) -> None:
        """What does not wait for orders before it."""
        if isinstance(command, Drop):
            self.drop()
        elif self._owner is not None:
            self._owner.lease(command.until_ns)

    def verify(self, command: Verify | EndVerify, answer: Callable[[str], None]) -> None:
        """Begin a verify, or end it; the secondary asks the owner. ``answer`` gets a sentence that says why not, or
        nothing."""
        if self._role is None:
            answer(f"Node {self._replica.node} has no part in group {self._replica.group.name} now.")
        else:
            self._role.verify(command, answer)

    def drop(self) -> None:
        """Close the connections that were kept over a handover."""
        kept, self._kept = self._kept, None
        if self._kept_timer is not None:
            self._kept_timer.cancel()
            self._kept_timer = None
        if kept is not None:
            kept.drop()

    async def stop(self) -> None:
        """Orderly: finish what is under way, flush, mark the replica clean if it is. Raises StorageError."""
        self._looking.cancel()
        self._watching.cancel()
        if isinstance(self._role, Owner):
            await self._role.stop()
        self._rest()
        self._replica.close()

    # --- Status -------------------------------------------------------------------------------

    def status(self) -> Status:
        """The status message, without its type."""
        return self._role.status() if self._role is not None else base(self._replica, None)

    def told(self, status: Status) -> None:
        """This status is being sent."""
        if self._owner is not None:
            self._owner.told(status)
