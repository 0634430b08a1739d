"""The data process of a group while this node owns it: NBD server, primary, gate, and the link to the secondary.

Order that matters (each step can be the last before a death):
- A region is in the intent log before its first change (rule 8): clients wait for that (``Connection``).
- A change of record ends the session first, then changes what is answered when, then opens a session at the new epoch.
- Rule 5: a release closes the gate when all is answered and flushed on both nodes, *then* forgets the intent log and is
  answered: the handover is proposed only after that. Who dies before has not released, and the record is unchanged.
- ``joinable`` locks the primary before the supervisor hears of it (``told``). While locked, the lease is needed again.

Clients stay connected after a release, unanswered: a new owner may listen before they try to come back.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from stortrends_ha.boottime import now_ns
from stortrends_ha.errors import ReleaseError, StorageError
from stortrends_ha.limits import CHECKPOINT_S
from stortrends_ha.record import Record
from stortrends_ha.replication.gate import FOREVER_NS, Gate
from stortrends_ha.replication.primary import Primary
from stortrends_ha.replication.write_through import Cache

from .commands import EndVerify, Verify
from .export import Export, make_export
from .nbd_server import NbdServer
from .owner_link import OwnerLink
from .replica import Replica
from .report import Status, base
from .throttle import Throttle
from .verifying import Verifying
from .watch import end_with

log = logging.getLogger(__name__)

DRAIN_S = 5.0  # how long a release or an orderly stop waits for unanswered requests
FLUSH_AHEAD_S = 20.0  # how long a release flushes before that, while clients are served
_LOOK_S = 0.05


class Owner:
    """The owner's side of one group, by one record after the other."""

    def __init__(self, replica: Replica, record: Record, not_before_ns: int, changed: Callable[[], None]) -> None:
        self._replica = replica
        self.record = record
        self._changed = changed
        self._limits = replica.cluster.limits
        self._loop = asyncio.get_running_loop()
        self.gate = Gate(not_before_ns)
        self._lease_ns = 0
        self._gate_timer: asyncio.TimerHandle | None = None
        self.released = self._releasing = self._left = False
        self._throttle = Throttle(self._limits)
        self._primary = Primary(
            replica.stores,
            replica.differences,
            record.epoch,
            alone=record.alone,
            window_changes=self._limits.window_changes,
            window_bytes=self._limits.window_bytes,
            failed=replica.fail,
            settled=replica.settled,
            uncopied=self._uncopied,
            changed=changed,
            caches=[Cache(volume.cache) for volume in replica.group.volumes],
            probe=self._throttle.probe,
        )
        replica.on_failure, replica.is_last_copy = self._failed, lambda: self._primary.is_last_copy
        self._exports = {volume.name: self._export(index) for index, volume in enumerate(replica.group.volumes)}
        self._server = NbdServer(
            self._exports, self._primary, self.gate, self._limits, replica.server_counters, self._clients_changed
        )
        self._throttle.attach(self._primary, self._requests)
        self._verifying = Verifying(replica, self._primary, self._throttle, self.verify)
        self._link: OwnerLink | None = None
        self._moved = (0, self._loop.time())  # the newest answered change, and when that was seen first

    def _export(self, index: int) -> Export:
        replica = self._replica
        return make_export(
            index, replica.group.volumes[index], replica.stores[index], replica.server_counters,
            replica.volume_counters[index],
        )  # fmt: skip

    # --- Commands -----------------------------------------------------------------------------

    def start(self) -> None:
        """Listen for clients and begin to look for the secondary. What makes it durable has been done."""
        self._listen()
        self._connect()
        self._set_gate()
        self._checkpoints = end_with(asyncio.create_task(self._make_checkpoints()))

    async def _make_checkpoints(self) -> None:
        while True:
            await asyncio.sleep(CHECKPOINT_S)
            self._primary.checkpoint()

    def _listen(self) -> None:
        group = self._replica.group
        self._server.listen(group.nbd, group.nbd_unix.get(self._replica.node))

    def _connect(self) -> None:
        endpoints, changed = self._server.endpoints, self._link_changed
        self._link = OwnerLink(self._replica, self._primary, self.record, endpoints, changed)

    def _disconnect(self, why: str) -> None:
        if self._link is not None:
            self._link.stop(why)
            self._link = None

    def lead(self, record: Record, not_before_ns: int) -> None:
        """Go on by the next record, or by the same one: after a release, or after ``joinable`` was told (see there)."""
        self.gate.not_before_ns = not_before_ns
        self.gate.until_ns = 0  # until the end of this: nothing leaves by the rules of two records
        if record != self.record or self._primary.held:
            self._disconnect(f"the record has changed: {record}" if record != self.record else "it is opened anew")
            self.record = record
            self._primary.change_record(record.epoch, record.alone)
            if self._replica.trouble and not record.alone:  # the peer has everything now: it is better there
                self._replica.fail(StorageError(self._replica.trouble))
            self._connect()
        elif not self._may_join():
            self._primary.unlock()
        if self._releasing:
            self._releasing = self.released = False
            self._listen()
            self._primary.take_again()
            if self._link is None:
                self._connect()
        self._set_gate()

    async def release(self) -> None:
        """Stop for a handover. Raises ReleaseError if that is not possible now, StorageError."""
        if self.released:
            return
        if self.record.alone or not self._primary.connected:
            raise ReleaseError(f"there is no secondary in sync to hand {self._replica.group.name} over to")
        self._verifying.stop("the group is being moved")
        flushed, drained = asyncio.Event(), asyncio.Event()
        try:
            # While clients go on: a page cache full of changes may need long, and what is left after it is little.
            self._primary.flush_all(flushed.set)
            await self._wait_in_session(flushed, FLUSH_AHEAD_S)
            self._releasing = True
            self._changed()
            self._server.stop_listening()
            self._primary.drain(drained.set)
            await self._wait_in_session(drained, DRAIN_S)
        except TimeoutError:
            raise ReleaseError("what is under way, or cached, could not be made stable in time") from None
        if self._replica.failure or not self.gate.open_at(now_ns()):
            raise ReleaseError(self._replica.failure or "the lease has run out")
        self.released = True
        self._set_gate()
        if self._link is not None:
            self._link.tell_clients()
        self._disconnect("the group is handed over")
        self._replica.forget_differences()

    async def _wait_in_session(self, event: asyncio.Event, at_most_s: float) -> None:
        """Raises TimeoutError; ReleaseError when the session ends, as what is waited for does not come then."""
        async with asyncio.timeout(at_most_s):
            while not event.is_set():
                if not self._primary.connected:
                    raise ReleaseError("the link broke")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), _LOOK_S)

    def verify(self, command: Verify | EndVerify, answer: Callable[[str], None]) -> None:
        """See ``Roles``."""
        why = "it is being handed over" if self._releasing else "" if self._primary.connected else self._state()[1]
        self._verifying.carry_out(command, why, answer)

    def lease(self, until_ns: int) -> None:
        """Rule 5: the peer does not take over before that."""
        self._lease_ns = until_ns
        self._set_gate()

    def leave(self) -> None:
        """Serve no more; clients stay connected, unanswered, until ``drop``."""
        self._left = True
        self._checkpoints.cancel()
        self._throttle.stop()
        if not self.released:
            self._primary.halt()
            for differences in self._replica.differences:
                differences.doubt_log()
        self._set_gate()
        self._server.stop_listening()
        self._disconnect("this node does not own the group any more")

    def drop(self) -> None:
        """Close all connections of clients."""
        self._server.drop_clients()

    async def stop(self) -> None:
        """Orderly: finish what is under way, drop the clients. What is flushed on both by then need not be compared."""
        self._server.stop_listening()
        if self.record.alone and not self._primary.locked:
            self._disconnect("this node stops")  # nobody waits for the peer, and a sync would not end in time
        drained = asyncio.Event()
        self._primary.drain(drained.set)
        with contextlib.suppress(TimeoutError):
            can_drain = (self.record.alone or self._primary.connected) and not self._replica.failure
            async with asyncio.timeout(DRAIN_S if can_drain else 0):
                await drained.wait()
        mirrored = not (self.record.alone or self._primary.ahead)
        if drained.is_set() and mirrored and self._primary.opened and not self._replica.failure:
            self._replica.forget_differences()
        self.leave()
        self.drop()

    # --- The gate -----------------------------------------------------------------------------

    def _set_gate(self) -> None:
        """Rule 5: until when may be answered."""
        if self._primary.held or self.released or self._left:
            self.gate.until_ns = 0
        elif self.record.alone and not self._primary.locked:
            self.gate.until_ns = FOREVER_NS
        else:
            self.gate.until_ns = self._lease_ns
        self._gate_moved()

    def _gate_moved(self) -> None:
        """The gate has changed, or time has come to one of its ends."""
        if self._gate_timer is not None:
            self._gate_timer.cancel()
            self._gate_timer = None
        now = now_ns()
        if self.gate.open_at(now):
            self._server.gate_opened()
        if self._left:
            return
        ends = [end for end in (self.gate.not_before_ns, self.gate.until_ns, self._lease_ns) if now < end < FOREVER_NS]
        if ends:
            self._gate_timer = self._loop.call_later((min(ends) - now) / 1e9 + 0.0005, self._gate_moved)
        self._changed()

    def _may_join(self) -> bool:
        """Rule 5: the record may add the peer only while its promise holds."""
        return self._primary.joinable and now_ns() < self._lease_ns

    def told(self, status: Status) -> None:
        """This status is being sent: what it promises holds from now on."""
        self._verifying.tell(status["verify"])
        if status["joinable"] and not self._primary.locked:
            self._primary.lock()
            self._set_gate()

    # --- What happens ---------------------------------------------------------------------------

    def _link_changed(self) -> None:
        self._set_gate()

    def _clients_changed(self) -> None:
        if self._link is not None:
            self._link.clients_changed()
        self._changed()

    def _failed(self) -> None:
        """Rule 13."""
        self._primary.halt()
        if self._link is not None:
            self._link.fail()
        if self._primary.is_last_copy:
            self._server.refuse()
        self._changed()

    def _uncopied(self, error: StorageError) -> None:
        """What the secondary lacks cannot be read here."""
        if self._link is not None:
            self._link.put_off(f"what {self._replica.peer.name} lacks cannot be read: {error}")

    # --- Status -------------------------------------------------------------------------------

    def status(self) -> Status:
        """The status message, without its type."""
        primary = self._primary
        state, why = self._state()
        return {
            **base(self._replica, self.record),
            "role": "primary",
            "session": primary.connected,
            "joinable": self._may_join(),
            "peer_unfit": self._peer_unfit(),
            "serving": self._serving(),
            "cannot_listen": self._server.why,
            "endpoints": self._server.endpoints(),
            "state": state,
            "why": why,
            **({"link": self._link.status()} if self._link is not None else {}),
            "resync": self._throttle.status(primary.resync),
            "verify": self._verifying.status(),
            "window": {
                "changes": primary.unanswered,
                "bytes": primary.bytes_in_flight,
                "oldest_ms": self._oldest_ms(),
            },
            "clients": len(self._server.connections),
            "volumes": {name: self._volume_status(export) for name, export in self._exports.items()},
        }

    def _serving(self) -> bool:
        """Whether clients are answered: whoever cannot even connect is not."""
        primary = self._primary
        able = self.record.alone or primary.connected
        return able and not (primary.failed or self._releasing or self._server.why) and self.gate.open_at(now_ns())

    def _peer_unfit(self) -> str:
        """Rule 9: why the owner must go alone before its secondary can be synced."""
        if self.record.alone:
            return ""
        if self._primary.ahead:
            return f"{self._replica.peer.name} has not got everything that was answered while this node was alone"
        return self._link.unfit if self._link is not None else ""

    def _state(self) -> tuple[str, str]:
        if self._replica.failure:
            clients = "get errors, as no other node has everything" if self._primary.is_last_copy else "wait"
            return "failed", f"{self._replica.failure}; clients {clients}: mend the disk and start the node again"
        if self.released:
            return "held", "it has stopped, to be handed over"
        if self._releasing:
            return "held", "what is under way is being finished, for a handover"
        if self._server.why:
            return "held", self._server.why
        if self._primary.held:
            peer = self._replica.peer.name
            return "held", f"{peer} was lost while it was being added to the record; it must be known whether it was"
        if not self.gate.open_at(now_ns()) and (self.record.alone or self._primary.connected):
            return "held", self._why_closed()
        return self._alone_state() if self.record.alone else self._mirrored_state()

    def _why_closed(self) -> str:
        if now_ns() < self.gate.not_before_ns:
            return "it answers when the lease of the former owner has ended for sure"
        return f"no promise of {self._replica.peer.name} not to take over: its lease has run out"

    def _mirrored_state(self) -> tuple[str, str]:
        peer, link = self._replica.peer.name, self._link
        if self._primary.connected:
            return "in-sync", ""
        if unfit := self._peer_unfit():
            return "held", f"clients wait until {self._replica.node} may go on alone: {unfit}"
        held = "what is written is held until it is back" if self._primary.opened else "clients wait until it is there"
        refused = link is not None and link.state == "refused"
        state = "held" if self._primary.unanswered or refused else "connecting"
        return state, f"no link to {peer} ({(link and link.why) or 'connecting'}): {held}"

    def _alone_state(self) -> tuple[str, str]:
        peer, link, trouble = self._replica.peer.name, self._link, self._replica.trouble
        trouble = trouble and f"; {trouble}: mend the disk, as this is the only good copy"
        if self._primary.joinable:
            return "syncing", f"{peer} has everything and is about to be added{trouble}"
        if self._primary.connected:
            return "syncing", f"what differs on {peer} is being copied to it{trouble}"
        why = (link and link.why) or "connecting"
        return "alone", f"no link to {peer} ({why}): writes go to the disk at once{trouble}"

    def _oldest_ms(self) -> float:
        """About how long the oldest unanswered change has been waiting: exact to the interval between two calls."""
        acked, since_s = self._moved
        if acked != self._primary.acked or self._primary.idle:
            self._moved = (self._primary.acked, self._loop.time())
            return 0.0
        return (self._loop.time() - since_s) * 1000

    def _requests(self) -> tuple[int, int]:
        """Of clients: how many have been taken so far, and how many are under way."""
        taken = sum(export.counters.requests for export in self._exports.values())
        return taken, sum(connection.in_flight for connection in self._server.connections)

    def _volume_status(self, export: Export) -> dict[str, Any]:
        counters, differences = export.counters, self._replica.differences[export.index]
        return {
            "size_bytes": export.geometry.size_bytes,
            "read_only": export.geometry.read_only,
            "in_flight": self._server.in_flight(export),
            "intent_regions": differences.regions,
            "dirty_bytes": min(differences.dirty.count * differences.block_bytes, export.geometry.size_bytes),
            "counters": {name: getattr(counters, name) for name in counters.__slots__},
        }
