"""The owner's end of a group: takes changes from clients, mirrors them, answers late. Pure but for its stores.

How late depends on the record (rule 1):
- *mirrored*, both nodes are in sync: a change is answered when both replicas have applied it, FLUSH and FUA when both
  have flushed. Rule 2: while the peer is away changes are applied here, remembered and *not answered*; reads go on.
  Before the first session nothing is taken: what this node was doing when it was killed may be on it alone.
- *alone*, granted: a change is answered when it is stable here (``write_through``), FLUSH and FUA when this node has
  flushed. The window is empty without a session, as the next one compares everything. While a full sync runs, changes
  are in the window until the peer has them, whether or not they were answered.
- *late*, alone and everything has been copied: an answer waits for both nodes as if mirrored, and is stable here, too.
  The flushes that end the sync begin after that, so when they are done the secondary has everything that was ever
  answered, stable if that was promised. When it says that this is durable (SYNCED), it is ``joinable``.
- *locked*: the supervisor was told ``joinable``, so the record may have it in sync already, whatever is known here. If
  the session breaks, nothing is answered (``held``) until the supervisor has said by ``change_record`` what the record
  is. Without this lock a takeover could lose what was answered after the break.

Per volume, ``Cache.ALWAYS`` leaves out the flush while alone, ``Cache.NEVER`` makes every write FUA.
Rule 7: a change goes to the link and to the own store in one call, in the same order everywhere.
Rule 15: when ``window_changes`` or ``window_bytes`` are unanswered all clients are paused: one batch more at most. (A
change that waits for the own disk and for the peer counts twice.)

If this process dies, what was not answered may be on one replica only: the next owner is alone, or syncs in full
(see ``session``). On the hot path: ``submit`` and ``receive``, each once per batch.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from stortrends_ha.errors import PeerFailedError, ProtocolError, StorageError
from stortrends_ha.limits import LINK_BACKLOG_BYTES
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Kind, Verdict
from stortrends_ha.protocol.nbd_transmission import Batch, Change
from stortrends_ha.replication.differences import Differences
from stortrends_ha.replication.flow import Flow
from stortrends_ha.replication.interfaces import Buffer, Client, Link, Store
from stortrends_ha.replication.ordering import RegionsInFlight
from stortrends_ha.replication.pace import Probe
from stortrends_ha.replication.session import Plan
from stortrends_ha.replication.stream import JobFlush, Stream
from stortrends_ha.replication.window import AllFlushed, Entry, Flush
from stortrends_ha.replication.write_through import UNLIMITED, Cache, Owed, WriteThrough


class Primary(Stream):
    """The owner of a group, over all sessions with its secondary and all records that it owns it by."""

    def __init__(
        self,
        stores: Sequence[Store],
        differences: Sequence[Differences],
        epoch: int,
        *,
        alone: bool,
        window_changes: int,
        window_bytes: int,
        failed: Callable[[StorageError], None],
        settled: Callable[[int], None] = lambda _epoch: None,
        uncopied: Callable[[StorageError], None] = lambda _error: None,
        changed: Callable[[], None] = lambda: None,
        caches: Sequence[Cache] | None = None,
        probe: Probe | None = None,
    ) -> None:
        super().__init__(stores, differences, epoch, failed)
        self._window_changes = window_changes
        self._window_bytes = window_bytes
        self._report_settled = settled
        self._report_uncopied = uncopied
        self._report_change = changed  # ``joinable`` has
        caches = caches or [Cache.MIRRORED for _ in stores]
        self._never = [cache is Cache.NEVER for cache in caches]
        self.probe = probe or Probe(lambda: 0.0, lambda _latency_s: None)
        cached = [cache is Cache.ALWAYS for cache in caches]
        self._through = WriteThrough(stores, cached, self._became_stable, self.probe)
        self._owes = False  # whether ``_through`` owes anything
        self._room_changes, self._room_bytes = window_changes, window_bytes  # what it leaves of the bounds
        self._special = self._never  # volumes whose changes are not answered by the acknowledgement alone
        self._regions = [RegionsInFlight() for _ in stores]
        self._flow = Flow()
        self.attach, self.detach = self._flow.attach, self._flow.detach
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._when_idle: Callable[[], None] | None = None
        self._ending = False
        self._alone = False
        self._late = False
        self._synced = False  # in this session the secondary has said so
        self._locked = False
        self.opened = False  # there has been a session that made the replicas equal, or none was needed
        self.ahead = False  # the record has the peer in sync, and it lacks what was answered
        self.pong = 0  # the number of the newest ping that was answered
        self._begins: bool | None = None  # a resync, when both nodes are ready; of a secondary that is blank
        self._regions_to_come = False  # the secondary says what it knows
        self._covered = True  # what it has to cover is durable here
        self._compare = False  # and compares all of it
        for of in differences:
            of.crowded = self.checkpoint
        if alone:
            self._go_alone()

    # --- From clients -------------------------------------------------------------------------

    def logged(self, volume: int, changes: list[Change], then: Callable[[], None]) -> bool:
        """Rule 8: whether these changes may be submitted now; else ``then`` is called when it is worth asking again."""
        differences = self._differences[volume]
        return differences.logged(changes) or differences.log(changes, then)

    def submit(self, client: Client, volume: int, batch: Batch, view: Buffer) -> int:
        """Take the changes of a batch: to the link first, so that both nodes work at once, then to the own store.

        Returns how many bytes were written.
        """
        special = self._special[volume]
        if special:
            entry, durable = self._special_entry(client, volume, batch)
        else:
            entry, durable = Entry(self.issued + 1, client, volume, batch.changes, batch.replies), batch.durable
        self.issued = entry.last
        self.bytes_in_flight += entry.nbytes
        self._window.append(entry)
        link = self._link
        if link is not None and not self._unsent and link.backlog_bytes <= LINK_BACKLOG_BYTES:
            length = sum(map(len, batch.frames))
            header = wire.changes_header(self._epoch, entry.first, volume, length)
            link.send([header, *batch.frames], wire.HEADER_BYTES + length)
        else:
            self._unsent.append(entry)
        self._regions[volume].note(batch.changes, entry.last)
        try:
            self._stores[volume].apply(batch.changes, view)
        except StorageError as e:
            self._fail(e)
            return entry.nbytes
        if special and self._alone:
            self._differences[volume].written(batch.changes)
            self._write_through(client, entry, batch)
        if durable:
            self.flush(client, volume, durable)
        if self.full:
            self._update_flow()
        return entry.nbytes

    def _special_entry(self, client: Client, volume: int, batch: Batch) -> tuple[Entry, list[bytes]]:
        """What goes into the window when the answers come another way, and the answers that wait for a flush."""
        replies, durable = batch.replies, batch.durable
        if self._never[volume]:
            replies, durable = [b""] * len(replies), [*durable, *filter(None, replies)]
        if not self._alone:
            return Entry(self.issued + 1, client, volume, batch.changes, replies), durable
        self._unwaited += len(batch.changes)
        return Entry(self.issued + 1, None, volume, batch.changes, []), durable

    def _write_through(self, client: Client, entry: Entry, batch: Batch) -> None:
        """Owe the answers to what has been applied. FUA has its own, and still counts: reads of it wait."""
        if self._link is None and not self._late:
            self._give_up_window()
        replies = b"" if self._never[entry.volume] else b"".join(batch.replies)
        self._through.owe(entry.volume, Owed(entry.first, entry.last, entry.nbytes, client, replies))
        self._note_owed()
        self._through.commit(entry.volume)
        self._became_stable()  # at once, for a volume that is always cached

    def flush(self, client: Client, volume: int, replies: list[bytes], *, everywhere: bool = False) -> None:
        """Answer ``replies`` when all that was taken before is stable on every replica that is in sync, or
        ``everywhere``."""
        self._flush_number = number = self._flush_number + 1
        only_here = self._alone and not (self._late or everywhere)
        self._flushes[number] = Flush(self.issued, client, volume, replies, peer=only_here)
        if not only_here:
            self._flushes_unsent.append(number)
            self.pump()
        self._stores[volume].start_flush(lambda: self._flushed(number, local=True))
        if self.full:
            self._update_flow()

    # --- What is in flight ----------------------------------------------------------------------

    @property
    def changing(self) -> bool:
        """Whether any read may have to wait: if not, ``in_flight`` need not be asked."""
        return self.issued != self.acked or self._owes or self.failed

    def in_flight(self, volume: int, offset: int, length: int) -> bool:
        """Whether a range overlaps changes that were not answered: then a read must wait (``when_settled``).

        When the own replica has failed, it always must.
        """
        if self.failed:
            return True
        if self._alone or self._owes:
            answered = self._through.before(volume, self.issued if self._alone else self.acked)
            return answered != self.issued and self._regions[volume].overlaps(offset, length, answered)
        return self.issued != self.acked and self._regions[volume].overlaps(offset, length, self.acked)

    def is_sent(self, volume: int, offset: int, length: int) -> bool:
        """See ``Stream``."""
        return not self._unsent or not self._regions[volume].overlaps(offset, length, self._unsent[0].first - 1)

    def when_settled(self, do: Callable[[], None]) -> None:
        """Call back when every change that is in flight now has been answered."""
        self._waiting.append((self.issued, do))
        if self.full:
            self._update_flow()

    @property
    def full(self) -> bool:
        """Whether a bound of the window is reached."""
        under_way = self.issued - self.acked + len(self._flushes) + len(self._waiting)
        return under_way >= self._room_changes or self.bytes_in_flight >= self._room_bytes

    def _note_owed(self) -> None:
        """What is owed has changed: once a batch here, so that those who are mirrored need not look."""
        self._owes = self._through.changes > 0
        self._room_changes = self._window_changes - self._through.changes
        self._room_bytes = self._window_bytes - self._through.nbytes

    @property
    def unanswered(self) -> int:
        """Changes and flushes of clients, and reads that wait for them; not what only the peer has to get."""
        flushes = sum(not isinstance(flush.client, JobFlush | AllFlushed) for flush in self._flushes.values())
        waited = self.issued - self.acked - self._unwaited
        return waited + self._through.changes + flushes + len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether everything has been answered, and the peer has it if it needs it; not while they are made equal."""
        return self.opened and self.issued == self.acked and not self._flushes and not self._owes

    # --- Flow ---------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Let regions leave the intent log that were not written for a while (rule 8)."""
        if self.failed:
            return
        if self.resync is not None:
            self.resync.flush()
        mirrored = not self._alone or self._late
        if mirrored and self._link is None:
            return  # the secondary cannot flush
        for volume, differences in enumerate(self._differences):
            if number := differences.begin_checkpoint():
                ended = partial(differences.end_checkpoint, number)
                if mirrored:
                    self.flush(AllFlushed(1, ended), volume, [])
                else:
                    differences.save_dirty(ended)

    def stop_taking(self, idle: Callable[[], None] = lambda: None) -> None:
        """Take no more requests; finish what there is, then call ``idle``, once."""
        self._ending, self._when_idle = True, idle
        self._update_flow()
        self._settled()

    def flush_all(self, flushed: Callable[[], None]) -> None:
        """Make stable everything that has been taken so far, where it is in sync, and call ``flushed``."""
        last = AllFlushed(len(self._stores), flushed)
        for volume in range(len(self._stores)):
            self.flush(last, volume, [])

    def drain(self, drained: Callable[[], None]) -> None:
        """Take no more requests, answer what there is, flush it all, call ``drained``."""
        self.stop_taking(lambda: self.flush_all(drained))

    def take_again(self) -> None:
        """The stop was called off."""
        self._ending, self._when_idle = False, None
        self._update_flow()

    def _update_flow(self) -> None:
        self._flow.set(not self.opened or self._ending or self.failed or self.full)

    def halt(self) -> None:
        """See ``Stream``."""
        super().halt()
        self._update_flow()

    # --- When the disk fails --------------------------------------------------------------------

    @property
    def alone(self) -> bool:
        """Whether the record has this owner alone in sync."""
        return self._alone

    @property
    def is_last_copy(self) -> bool:
        """Rule 13: no other node has a good one."""
        return self._alone and not self._locked

    def cannot_read(self, error: StorageError) -> bool:
        """A client's read has failed: true if it must be told, as nobody else can answer it."""
        if not (self.is_last_copy or self.failed):
            self._fail(error)
        return self.is_last_copy

    def cannot_copy(self, error: StorageError) -> None:
        """See ``Stream``."""
        if self.is_last_copy:
            self._report_uncopied(error)
        else:
            self._fail(error)

    # --- The record -----------------------------------------------------------------------------

    @property
    def joinable(self) -> bool:
        """Rule 9: the secondary has everything, durably, and every answer waits for it, too: the record may add it."""
        return self._late and self._synced and self._link is not None

    def lock(self) -> None:
        """The supervisor is being told that the secondary is ``joinable``: see the module."""
        self._locked = self._locked or self.joinable

    @property
    def locked(self) -> bool:
        """Whether the record may have the peer in sync, though this owner was told that it is alone."""
        return self._locked

    @property
    def held(self) -> bool:
        """Whether nothing is answered until ``change_record`` says what became of the record."""
        return self._locked and self._link is None

    def change_record(self, epoch: int, alone: bool) -> None:
        """The owner acts for another record, or is told after a lock that it is still the same. Without a session."""
        assert self._link is None
        self._locked = False
        self._epoch = epoch
        if alone:
            self._go_alone()
        elif self._alone:
            self._join()
        self._update_flow()

    def unlock(self) -> None:
        """The record has not changed, and the session is open: what comes is answered as before the lock."""
        self._locked = False

    def _go_alone(self) -> None:
        """Rule 2: granted. What was held is answered as soon as it is stable, and all that was cached is flushed."""
        if not self._alone:
            for differences in self._differences:
                differences.doubt_log()
        for entry in self._window:
            if entry.client is not None:
                replies = b"".join(entry.replies)
                self._through.owe(entry.volume, Owed(entry.first, entry.last, entry.nbytes, entry.client, replies))
        self._note_owed()
        self._alone = self.opened = True
        self.ahead = False
        self._special = [True for _ in self._stores]
        self._need_no_peer()
        for volume in range(len(self._stores)):
            self._through.commit(volume)
        self._through.settle(partial(self._report_settled, self._epoch))
        self._update_flow()

    def _need_no_peer(self) -> None:
        """Answers wait for this node only: what the peer lacks is in ``differences``."""
        for differences in self._differences:
            differences.void_checkpoint()  # the peer does not flush any more
        self._late = False
        for number, flush in list(self._flushes.items()):
            if not flush.peer:
                self._flushed(number, local=False)
        self._give_up_window()
        self._became_stable()

    def _join(self) -> None:
        """Rule 9: the record has the peer in sync. The window has what it lacks, if it ever was ``joinable``."""
        self.ahead = not self._late
        if self._late:
            for differences in self._differences:
                differences.settle()
        self._alone = self._late = False
        self._special = self._never
        self._through.unsettle()

    # --- The session --------------------------------------------------------------------------

    def open_session(
        self, link: Link, plan: Plan, *, compare: bool = False, fill: Callable[[], None] | None = None
    ) -> None:
        """The secondary has accepted: send again what is in the window, and copy what it may lack if that is the plan.

        ``compare``: it may have most of it. ``fill``: everything is to be copied; to be called when that is durable.
        """
        if self.failed:
            return
        assert (plan is Plan.SYNC) == self._alone  # rule 9
        self.opened = plan is not Plan.RECONCILE
        self._attach_link(link)
        for differences in self._differences:
            differences.begin_session(sync=plan is Plan.SYNC)
        self._regions_to_come = plan is not Plan.RESUME
        if plan is not Plan.RESUME:
            self._begins, self._covered, self._compare = None, fill is None, compare
        if fill is not None:
            self._fill(fill)
        self._update_flow()

    def _fill(self, filled: Callable[[], None]) -> None:
        """Everything is to be copied: make that durable."""
        left = set(range(len(self._differences)))
        link = self._link

        def saved(volume: int) -> None:
            left.discard(volume)
            if not left and link is self._link:
                filled()
                self._covered = True
                self._begin_resync()

        for volume, differences in enumerate(self._differences):
            differences.doubt_all(partial(saved, volume))

    def _begin_resync(self) -> None:
        if self._begins is not None and self._covered:
            blank, self._begins = self._begins, None
            self.begin_resync(blank=blank, compare=self._compare)

    def close_session(self) -> None:
        """The link is gone. What waits for the peer stays in the window; an owner that is alone needs it no more."""
        self._detach_link()
        self._synced = False
        self._begins, self._regions_to_come = None, False
        for differences in self._differences:
            differences.end_session()
        if self._alone and not self._locked and not self.failed:
            self._need_no_peer()
            self._update_flow()

    def resync_copied(self) -> None:
        """From now on answers wait for both nodes; the flushes that follow cover all that was answered before."""
        self._late = self._alone

    # --- From the secondary -------------------------------------------------------------------

    def receive(self, view: memoryview, end: int) -> int:
        """Handle what the link brought; return where the unfinished rest begins. Raises ProtocolError."""
        if self.failed:
            return end
        at, newest = 0, self.acked
        try:
            while at < end and (frame := wire.next_frame(view, at, end, self._epoch)) is not None:
                at += wire.HEADER_BYTES + frame.length
                if frame.kind == wire.ACK:
                    newest = frame.seq
                else:
                    self._receive_other(frame)
        except StorageError as e:
            self.cannot_copy(e)
            return end
        if newest != self.acked:
            self._acknowledged(newest)
        if self._unsent or self._flushes_unsent or self.resync is not None or self.verify is not None:
            self.pump()
        return at

    def _receive_other(self, frame: wire.Frame) -> None:
        if frame.kind == Kind.FLUSHED:
            flush = self._flushes.get(frame.seq)
            if flush is None or flush.peer or not flush.sent:
                raise ProtocolError(f"the end of a flush number {frame.seq} that was not asked for")
            self._flushed(frame.seq, local=False)
        elif frame.kind == Kind.PONG:
            self.pong = frame.seq
        elif frame.kind == Kind.FAILED:
            raise PeerFailedError(str(wire.decode_object(frame.payload).get("reason")))
        elif frame.kind == Kind.RESULT and self.resync is not None:
            offset, length, verdict = wire.decode_result(frame.payload)
            self.resync.result(frame.volume, offset, length, verdict is Verdict.EQUAL)
        elif frame.kind == Kind.RESULT and self.verify is not None:
            self.verify.result(frame.volume, *wire.decode_result(frame.payload))
        elif frame.kind == Kind.VERIFY:
            self.asked(frame.payload)
        elif frame.kind == Kind.REGIONS:
            self._receive_regions(frame)
        elif frame.kind == Kind.SYNCED and self.resync is not None and self.resync.ended:
            self.resync, self._synced = None, True
            if not self._alone:
                self._reconciled()
            self._report_change()
        else:
            raise ProtocolError(f"an unexpected {Kind(frame.kind).name} frame")

    def _receive_regions(self, frame: wire.Frame) -> None:
        """The secondary says what may differ, as far as it knows; the last frame has none, and says whether it is
        blank."""
        if not self._regions_to_come:
            raise ProtocolError("an unexpected REGIONS frame")
        if frame.volume >= len(self._stores):
            raise ProtocolError(f"a frame for volume number {frame.volume} of {len(self._stores)}")
        if ranges := wire.decode_regions(frame.payload):
            self._differences[frame.volume].doubt(ranges)
        else:
            self._begins, self._regions_to_come = frame.seq == 1, False
            self._begin_resync()

    def _reconciled(self) -> None:
        """Both were in sync all the time, and now have the same."""
        for differences in self._differences:
            differences.settle()
        self.opened = True
        self._settled()

    def _acknowledged(self, seq: int) -> None:
        """Both replicas have applied everything up to ``seq``: answer it."""
        sent = self._unsent[0].first - 1 if self._unsent else self.issued
        if not self.acked < seq <= sent:
            raise ProtocolError(f"an acknowledgement of change {seq}, outside {self.acked} to {sent}")
        self.acked = seq
        window = self._window
        answers: dict[Client, list[bytes]] = {}
        while window and window[0].first <= seq:
            entry = window[0]
            client, done = entry.client, entry.replies
            if client is None:
                self._unwaited -= min(seq, entry.last) - entry.first + 1
            if entry.last <= seq:
                window.popleft()
                self.bytes_in_flight -= entry.nbytes
            else:
                done = entry.split(seq)
            if client is not None:
                answers.setdefault(client, []).extend(done)
        for client, replies in answers.items():
            client.answer(b"".join(replies))
        if self._owes:
            self._became_stable()
        elif not window:
            for regions in self._regions:
                regions.clear()
        if self._waiting or self._flow.stopped:
            self._settled()

    # --- Answers ------------------------------------------------------------------------------

    def _became_stable(self) -> None:
        """Something is stable here, or was acknowledged: answer what waits for nothing else."""
        if self.failed:
            return
        answers = self._through.answers(UNLIMITED if self._alone and not self._late else self.acked)
        self._note_owed()
        for client, replies in answers.items():
            client.answer(b"".join(replies))
        if self._alone and not self._owes:
            for regions in self._regions:
                regions.clear()
        self._settled()

    def _flushed(self, number: int, local: bool) -> None:
        if self.failed:
            return
        flush = self._flushes[number]
        flush.local, flush.peer = flush.local or local, flush.peer or not local
        if flush.local and flush.peer:
            del self._flushes[number]
            flush.client.answer(b"".join(flush.replies))
            self._settled()

    def _settled(self) -> None:
        """Something was answered: go on with who waited for it."""
        if self.failed:
            return
        if self._waiting:
            answered = self._through.before_all(self.issued if self._alone else self.acked)
            if not self._alone:
                answered = min(answered, self.acked)
            while self._waiting and self._waiting[0][0] <= answered:
                self._waiting.popleft()[1]()
        if self._flow.stopped:
            self._update_flow()
            if self._when_idle is not None and self.idle:
                idle, self._when_idle = self._when_idle, None
                idle()
