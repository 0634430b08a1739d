"""A model of the data process: what its channel promises, on a few blocks, with nothing of the real code in it.

It is as free as the promises allow: where they leave something open (when a status is sent, how long a flush takes),
the seed decides. Stands beside the real thing (``replication``), which is under test elsewhere; here ``cluster`` is.
"""

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stortrends_ha.cluster import effects as do
from stortrends_ha.cluster.view import Replica
from stortrends_ha.record import Record

from .actor import Actor, Pipe
from .clients import ClientConnection
from .clock import MS, S
from .connection import Connection
from .history import Operation, Violation

if TYPE_CHECKING:
    from .host import Host
    from .supervisor import Supervisor

_WINDOW = 40
_RELEASE_NS = 5 * S
_KEEP_NS = S


@dataclass(slots=True, eq=False)
class _Entry:
    """A request that changes something, or a flush; it is in the stream at ``seq``."""

    seq: int
    connection: ClientConnection | None
    operation: Operation
    durable: bool
    answered: bool = False


class ModelProcess(Actor):
    """One life of it. ``pipe`` leads to its supervisor.

    The flags are parts of the rules that are kept here: for tests of what is missed when they are not kept.
    """

    locks = True  # once ``joinable`` is reported, every answer needs both
    locked_needs_lease = True
    opens_while_locked = False  # a full sync would spoil a peer that the record may have in sync
    ends_sessions = True  # rule 4: idle and lead end the old owner's stream
    gate = True  # rule 5

    def __init__(self, host: "Host", pipe: Pipe, supervisor: "Supervisor") -> None:
        super().__init__(host.world.clock)
        self.name = host.name
        self._host = host
        self._world = host.world
        self._random = host.world.random
        self._pipe = pipe
        self._supervisor = supervisor
        self._disk = host.disk
        self._state = host.state
        self._commands: deque[Any] = deque()
        self._busy = True
        self._started = False
        self.role = "idle"
        self.record: Record | None = None
        self._failure = ""
        self._session: Connection | None = None
        self._opening: Connection | None = None
        self._undead: Connection | None = None  # only without ``ends_sessions``
        self._reported: Replica | None = None
        self._reporting = False
        # The owner:
        self._seq = 0
        self._window: deque[_Entry] = deque()
        self._reads: list[tuple[ClientConnection, Operation]] = []
        self._held_replies: list[tuple[ClientConnection, Operation, int]] = []
        self._held_requests: list[tuple[ClientConnection, Operation]] = []
        self._connections: dict[ClientConnection, None] = {}
        self._acked = 0
        self._peer_flushed = 0
        self._stable = 0
        self._flushing = False
        self._unsettled = 0
        self._clean_cache = False  # what former lives left in the cache has been flushed
        self._peer_unfit = ""
        self._opened = False
        self._full = False
        self._to_copy = 0
        self._joining = False
        self._synced = False
        self._locked = False
        self._not_before_ns = 0
        self._until_ns = 0
        self._releasing: do.Release | None = None
        self._release_flush: _Entry | None = None
        self._released = False
        self._dialing = False
        self._dial_again_ns = 0
        self.after(self._random.randrange(5 * MS, 60 * MS), self._start)

    # --- Life -----------------------------------------------------------------------------------------

    def _start(self) -> None:
        state = self._state
        if state.boot not in (0, self._host.boots):
            state.lost_cache = True
            state.boot = self._host.boots
        if state.open:
            state.unclean, state.open = True, False
        self._started, self._busy = True, False
        self._changed()
        self._next_command()

    def die(self) -> None:
        """SIGKILL, or the end."""
        if not self.alive:
            return
        self.alive = False
        for link in (self._session, self._opening):
            if link is not None:
                link.close(self, silently=not self._host.on)
        for connection in self._connections:
            connection.lost(silently=not self._host.on)
        supervisor = self._supervisor
        if supervisor.alive:
            self._clock.after(self._random.randrange(MS, 20 * MS), supervisor.event, supervisor.process_ended, self)

    def stop(self, then: Any) -> None:
        """An orderly end."""
        self._stop_serving()
        self._close_session()
        self.role = "idle"
        flushed = self._disk.begin_flush()

        def ended() -> None:
            self._disk.end_flush(flushed)
            self._state.boot = 0
            then()

        self.after(self._random.randrange(20 * MS), ended)

    # --- The channel ----------------------------------------------------------------------------------

    def command(self, command: Any) -> None:
        """A line from the supervisor has been read."""
        match command:
            case do.Lease(until_ns):
                self._until_ns = until_ns
                self._drive()
            case do.Drop():
                self._drop_kept()
            case _:
                self._commands.append(command)
                self._next_command()

    def _next_command(self) -> None:
        if not self._busy and self._commands:
            self._busy = True
            self.after(self._random.randrange(3 * MS), self._carry_out, self._commands.popleft())

    def _carry_out(self, command: Any) -> None:
        self._world.trace.say(f"{self.name} data", "does", command)
        self._world.chaos.provoked(self._host)
        match command:
            case do.Follow(number, record):
                self._follow(record)
                self._done(number)
            case do.Lead():
                self._done(command.number, self._lead(command))
            case do.Idle(number):
                self._stop_serving()
                self._close_session()
                self.role = "idle"
                self._done(number)
            case do.Release():
                self._release(command)
        self._drive()

    def _done(self, number: int, error: str = "") -> None:
        self._busy = False
        if self._replica() != self._reported:
            self._report()  # what a command causes is said before that it is done
        self._pipe.send(self._random.randrange(MS), self._supervisor.process_done, self, number, error)
        self._next_command()

    def _replica(self) -> Replica:
        state, record = self._state, self.record
        owner = self.role == "primary"
        return Replica(
            epoch=record.epoch if record else 0,
            leading=owner,
            session=self._session is not None,
            serving=self.serves,
            joinable=owner and self._may_join,
            peer_unfit=self._why_alone if owner else "",
            failure=self._failure,
            lost_cache=state.lost_cache,
            needs_sync=state.needs_sync,
            settled_epoch=state.settled_epoch,
        )

    @property
    def _may_join(self) -> bool:
        complete = self._is_alone and self._synced and self._session is not None
        return complete and self._host.clock.now_ns() < self._until_ns

    @property
    def _why_alone(self) -> str:
        if self._is_alone:
            return ""
        return "the owner was killed" if self._state.unclean else self._peer_unfit

    def _changed(self) -> None:
        """Say so, within a short time."""
        if self._started and not self._reporting and self._replica() != self._reported:
            self._reporting = True
            self.after(self._random.randrange(10 * MS), self._report)

    def _report(self) -> None:
        self._reporting = False
        status = self._replica()
        if status != self._reported:
            self._reported = status
            if status.joinable and self.locks:
                self._locked = True
            self._pipe.send(self._random.randrange(MS), self._supervisor.process_status, self, status)

    # --- Roles ----------------------------------------------------------------------------------------

    @property
    def _is_alone(self) -> bool:
        return self.record is not None and self.record.alone

    def _follow(self, record: Record) -> None:
        if self.role == "secondary" and record == self.record:
            return
        kept = self._connections if self._released else {}
        self._connections = {} if self._released else self._connections
        self._stop_serving()
        self._close_session()
        self._connections = kept
        if kept:
            self.after(_KEEP_NS, self._drop_kept)
        self.role, self.record = "secondary", record
        self._host.cached_epoch = record.epoch
        self._state.boot = self._host.boots

    def _lead(self, command: do.Lead) -> str:
        record, state = command.record, self._state
        if self._failure:
            return self._failure
        if state.needs_sync and not command.forced:
            return "a sync did not end"
        if state.lost_cache and not command.clears_loss and not command.forced:
            return "its cache is lost"
        self._world.checks.leads(self._host, command)
        if command.clears_loss or command.forced:
            state.lost_cache = False
        if command.forced:
            state.needs_sync = False
        state.open, state.boot = True, self._host.boots
        new = self.role != "primary"
        if new:
            self._become_owner()
        if new or record != self.record:
            self._close_session()
            self._locked = False
            self._peer_unfit = ""
            self.record = record
            if not record.alone:
                self._host.cached_epoch = record.epoch
            if record.alone:
                self._opened = True
                self._unsettled = record.epoch
                self._flush_soon(anew=True)
        self.role = "primary"
        self._locked = self._locked and self._may_join
        self._not_before_ns = command.not_before_ns
        self._clock.at(self._host.clock.true_ns(self._not_before_ns), self.event, self._drive)
        self._released, self._releasing = False, None
        held, self._held_requests = self._held_requests, []
        for connection, operation in held:
            self._submit(connection, operation)
        self._dial_soon()
        return ""

    def _become_owner(self) -> None:
        self._drop_kept()
        if self.ends_sessions:
            self._close_session()
        else:
            self._undead, self._session = self._session, None
        self._seq = self._acked = self._peer_flushed = self._stable = 0
        self._window.clear()
        self._opened = self._clean_cache = False
        self._until_ns = 0

    def _stop_serving(self) -> None:
        """For good: what is under way is never answered."""
        if self.role == "primary":
            self._state.open = False
            if any(entry.seq > self._acked for entry in self._window):
                self._state.unclean = True
        self._window.clear()
        self._reads.clear()
        self._held_replies.clear()
        self._held_requests.clear()
        self._releasing, self._released, self._locked = None, False, False
        self._drop_kept()

    def _drop_kept(self) -> None:
        if self.role != "primary" or self._releasing is None:
            connections, self._connections = self._connections, {}
            for connection in connections:
                connection.lost(silently=False)

    # --- Release --------------------------------------------------------------------------------------

    def _release(self, command: do.Release) -> None:
        if self.role != "primary" or self._is_alone:
            self._done(command.number, "it does not mirror")
            return
        self._releasing, self._release_flush = command, None
        self.after(_RELEASE_NS, self._release_late, command)

    def _release_late(self, command: do.Release) -> None:
        if self._releasing is command and not self._released:
            self._done(command.number, "requests are still under way")

    def _go_on_releasing(self) -> None:
        command = self._releasing
        if command is None or self._released or self._session is None:
            return
        if self._release_flush is None:
            if not self._window and not self._reads and not self._held_replies:
                self._release_flush = self._append(None, Operation("flush", 0, 0, 0))
        elif self._release_flush.answered:
            self._released = True
            self._state.open = False
            self._close_session()
            self._done(command.number)

    # --- Requests -------------------------------------------------------------------------------------

    @property
    def accepts(self) -> bool:
        """Whether a client can connect."""
        return self.alive and self.role == "primary" and self._releasing is None and not self._failure

    def connect(self, connection: ClientConnection) -> None:
        """A client."""
        self._connections[connection] = None

    def request(self, connection: ClientConnection, operation: Operation) -> None:
        """A client asks for something."""
        if connection not in self._connections:
            return
        if self.role != "primary" or self._failure:
            return
        if self._releasing is not None or len(self._window) >= _WINDOW:
            self._held_requests.append((connection, operation))
            return
        self._submit(connection, operation)
        self._drive()

    def _submit(self, connection: ClientConnection, operation: Operation) -> None:
        if operation.kind == "read":
            self._reads.append((connection, operation))
        else:
            self._append(connection, operation)

    def _append(self, connection: ClientConnection | None, operation: Operation) -> _Entry:
        self._seq += 1
        entry = _Entry(self._seq, connection, operation, operation.kind in ("flush", "fua"))
        if operation.kind != "flush":
            self._disk.write(operation.block, operation.value)
        self._window.append(entry)
        self._put(entry)
        return entry

    def _put(self, entry: _Entry, *, write: bool = True) -> None:
        """Onto the stream."""
        if self._session is None:
            return
        epoch = self.record.epoch if self.record else 0
        if write and entry.operation.kind != "flush":
            self._session.send(self, ("write", epoch, entry.seq, entry.operation.block, entry.operation.value))
        if entry.durable:
            self._session.send(self, ("flush", epoch, entry.seq))

    # --- Answers --------------------------------------------------------------------------------------

    @property
    def _needs_both(self) -> bool:
        return not self._is_alone or self._joining or self._locked

    @property
    def may_answer(self) -> bool:
        """Whether a client could get an answer right now: the gate is open (rule 5)."""
        if not self.alive or self.role != "primary" or self._released or self._failure or not self._opened:
            return False
        now_ns = self._host.clock.now_ns()
        if not self.gate:
            return True
        if now_ns < self._not_before_ns:
            return False
        if self._locked and self._session is None:
            return False
        if self._is_alone and not (self._locked and self.locked_needs_lease):
            return True
        return now_ns < self._until_ns

    @property
    def serves(self) -> bool:
        """Whether clients do get answers."""
        return self.may_answer and self._releasing is None and (self._is_alone or self._session is not None)

    def _ready(self, entry: _Entry) -> bool:
        if self._is_alone and self._stable < entry.seq:
            return False
        if entry.durable and self._stable < entry.seq:
            return False
        if self._needs_both:
            return entry.seq <= self._acked and (not entry.durable or entry.seq <= self._peer_flushed)
        return True

    def _drive(self) -> None:
        """Whatever can go on goes on."""
        if self.role == "primary" and not self._failure:
            if self._wants_flush():
                self._flush_soon()
            if self.may_answer:
                self._world.checks.may_answer(self._host)
                self._answer_writes()
                self._answer_reads()
                self._send_held_replies()
            self._go_on_releasing()
        self._changed()

    def _answer_writes(self) -> None:
        for entry in self._window:
            if not entry.answered and self._ready(entry):
                entry.answered = True
                if entry.connection is not None:
                    stable = self._host.bit if self._is_alone else 0
                    self._answer(entry.connection, entry.operation, 0, stable)
        keep = self._needs_both
        while self._window and self._window[0].answered and (not keep or self._window[0].seq <= self._acked):
            self._window.popleft()
        while self._held_requests and self._releasing is None and len(self._window) < _WINDOW:
            self._submit(*self._held_requests.pop(0))

    def _answer_reads(self) -> None:
        if not self._reads or (self._is_alone and not self._clean_cache):
            return
        blocked = {entry.operation.block for entry in self._window if not self._ready(entry)}
        waiting = []
        for connection, operation in self._reads:
            if operation.block in blocked:
                waiting.append((connection, operation))
            else:
                reply = (connection, operation, self._disk.read(operation.block))
                self._held_replies.append(reply)
                self.after(self._random.randrange(MS), self._drive)
        self._reads = waiting

    def _send_held_replies(self) -> None:
        """After the I/O, right before the reply: the gate is open now."""
        replies, self._held_replies = self._held_replies, []
        for connection, operation, value in replies:
            self._answer(connection, operation, value, 0)

    def _answer(self, connection: ClientConnection, operation: Operation, value: int, stable_on: int) -> None:
        if connection in self._connections:
            self._world.trace.client(f"{self.name} data", f"answers {value or ''}:", operation)
            self._world.history.end(operation, value, stable_on)
            connection.answer(operation)

    # --- The own disk ---------------------------------------------------------------------------------

    def _wants_flush(self) -> bool:
        if self._stable >= self._seq and not self._unsettled:
            return False
        return self._is_alone or any(entry.durable and entry.seq > self._stable for entry in self._window)

    def _flush_soon(self, *, anew: bool = False) -> None:
        if self._flushing and not anew:
            return
        self._flushing = True
        contents, seq, unsettled = self._disk.begin_flush(), self._seq, self._unsettled
        self.after(self._random.randrange(MS // 2, self._world.flush_ns), self._flushed, contents, seq, unsettled)

    def _flushed(self, contents: list[int], seq: int, unsettled: int) -> None:
        self._flushing = False
        if self._disk_failed():
            return
        self._disk.end_flush(contents)
        if self.role != "primary":
            return
        self._stable = max(self._stable, seq)
        self._clean_cache = self._clean_cache or unsettled > 0
        if unsettled and unsettled == self._unsettled:
            self._unsettled = 0
            self._state.settled_epoch = unsettled
        self._drive()

    def _disk_failed(self) -> bool:
        if not self._host.disk_fails and not self._failure:
            return False
        if not self._failure:
            self._world.trace.say(f"{self.name} data", "DISK FAILED")
            self._failure = "Input/output error"
            self._state.lost_cache = True
            self._close_session()
            self._changed()
        return True

    # --- The link: both sides -------------------------------------------------------------------------

    def _close_session(self) -> None:
        for link in (self._session, self._opening):
            if link is not None:
                link.close(self)
        self._session_lost()
        self._opening = None

    def _session_lost(self) -> None:
        self._session = None
        self._joining = self._synced = self._full = False

    def link_ended(self, connection: Connection) -> None:
        """The other end is gone."""
        if connection is self._opening:
            self._opening = None
        if connection is self._session:
            self._session_lost()
            self._drive()

    def link_message(self, connection: Connection, message: Any) -> None:
        """The next message of the peer."""
        if self._failure:
            return
        if connection is self._undead and message[0] == "write":
            self._disk.write(*message[3:])
            connection.send(self, ("ack", message[2]))
        elif self.role == "primary":
            self._owner_message(connection, message)
        elif self.role == "secondary":
            self._secondary_message(connection, message)
        else:
            connection.close(self)

    # --- The link: the owner's side -------------------------------------------------------------------

    def _dial_soon(self) -> None:
        if not self._dialing:
            self._dialing = True
            self.after(self._random.randrange(5 * MS, 100 * MS), self._dial)

    def _dial(self) -> None:
        self._dialing = False
        if self.role != "primary" or self._released or self._failure:
            return
        self._dial_soon()
        if self._session is not None:
            return
        if self._locked and not self.opens_while_locked:  # the record may have the peer in sync: do not spoil it
            return
        if self._opening is not None:
            if self._clock.now_ns < self._dial_again_ns:
                return
            self._opening.close(self)
        self._opening = None
        world, peer = self._world, self._host.peer.process
        both_ways = world.network.passes(self.name, self._host.peer.name, "link") and world.network.passes(
            self._host.peer.name, self.name, "link"
        )
        if peer is not None and both_ways:
            self._opening = Connection(world.clock, self._random, world.network, (self, peer))
            self._opening.send(self, ("hello", self.record))
            self._dial_again_ns = self._clock.now_ns + S

    def _owner_message(self, connection: Connection, message: Any) -> None:
        match message:
            case ("welcome", record, why_full):
                if connection is self._opening:
                    self._welcomed(connection, record, why_full)
            case _ if connection is not self._session:
                return
            case ("ack", seq):
                self._acked = max(self._acked, seq)
                self._drive()
            case ("flushed", seq):
                self._peer_flushed = max(self._peer_flushed, seq)
                self._drive()
            case ("synced", seq):
                self._acked = self._peer_flushed = seq
                self._synced = True
                self._state.unclean = False
                self._drive()

    def _welcomed(self, connection: Connection, record: Record, why_full: str) -> None:
        self._opening = None
        if record != self.record or self._released:
            connection.close(self)
            return
        if self._is_alone:
            self._open_full(connection)
        else:
            if why_full or self._state.unclean:
                self._peer_unfit = why_full
                connection.close(self)
            else:
                self._open_resume(connection)
        self._drive()

    def _open_full(self, connection: Connection) -> None:
        self._session, self._full = connection, True
        self._acked = self._peer_flushed = -1
        self._to_copy = 0
        connection.send(self, ("full",))
        self.after(self._random.randrange(self._world.copy_ns), self._copy, connection)

    def _open_resume(self, connection: Connection) -> None:
        self._session = connection
        self._peer_unfit, self._opened = "", True
        connection.send(self, ("resume",))
        for entry in self._window:
            self._put(entry, write=entry.seq > self._acked)

    def _copy(self, connection: Connection) -> None:
        if connection is not self._session or not self._full or self.record is None:
            return
        epoch = self.record.epoch
        if self._to_copy < self._disk.blocks:
            connection.send(self, ("write", epoch, -1, self._to_copy, self._disk.read(self._to_copy)))
            self._to_copy += 1
            self.after(self._random.randrange(self._world.copy_ns), self._copy, connection)
        else:
            self._seq += 1
            self._joining = True
            connection.send(self, ("end", epoch, self._seq))
        self._drive()

    # --- The link: the secondary's side ---------------------------------------------------------------

    def _secondary_message(self, connection: Connection, message: Any) -> None:
        state = self._state
        match message:
            case ("hello", record):
                if record != self.record:
                    connection.close(self)
                    return
                self._close_session()
                self._opening = connection
                connection.send(self, ("welcome", record, self._why_full()))
            case ("full",) if connection is self._opening:
                state.needs_sync = True
                self._session, self._opening = connection, None
            case ("resume",) if connection is self._opening:
                self._session, self._opening = connection, None
            case _ if connection is not self._session:
                return
            case ("write", epoch, seq, block, value):
                self._check_epoch(epoch)
                self._disk.write(block, value)
                if seq >= 0:
                    connection.send(self, ("ack", seq))
            case ("flush", _, seq):
                self._flush_for_owner(connection, ("flushed", seq), ends_sync=False)
                connection.send(self, ("ack", seq))
            case ("end", _, seq):
                self._flush_for_owner(connection, ("synced", seq), ends_sync=True)
        self._changed()

    def _why_full(self) -> str:
        state = self._state
        if state.lost_cache:
            return "its cache is lost"
        if state.needs_sync:
            return "a sync of it did not end"
        return "it was the owner and was not released" if state.unclean else ""

    def _check_epoch(self, epoch: int) -> None:
        if self.record is None or epoch != self.record.epoch:
            raise Violation(f"{self.name} applies a change of epoch {epoch} at {self.record} (rule 6)")

    def _flush_for_owner(self, connection: Connection, then: Any, *, ends_sync: bool) -> None:
        contents = self._disk.begin_flush()

        def flushed() -> None:
            if self._disk_failed():
                return
            self._disk.end_flush(contents)
            if connection is self._session and self.role == "secondary":
                if ends_sync:
                    self._state.needs_sync = self._state.lost_cache = self._state.unclean = False
                    self._changed()
                connection.send(self, then)

        self.after(self._random.randrange(MS // 2, self._world.flush_ns), flushed)
