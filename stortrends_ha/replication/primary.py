"""The owner's end of a group: takes changes from clients, mirrors them, answers late. Pure but for its stores.

Rule 1: a change is answered when both replicas have applied it; FLUSH and FUA when both have flushed.
Rule 2: while the peer is away changes are applied here, remembered and *not answered*; reads go on. Before the
first session nothing is taken at all: what this node was doing when it was killed may be on it alone.
Rule 7: a change goes to the link and to the own store in one call, in the same order everywhere.
Rule 15: when ``window_changes`` or ``window_bytes`` are unanswered all clients are paused: one batch more at most.

The *window* is the ordered list of unanswered changes. It keeps where they are, not their data: what must be
sent again after the link broke is read from the own store, as it is by then. That is right because every
later change to the same place comes later in the window, too. The same happens when the link is slower than
the clients, so nothing is ever queued for it beyond ``LINK_BACKLOG_BYTES``.

    issued >= sent >= acked: numbers of the newest change taken, put on the link, applied on both.
    ``_unsent`` empty <=> sent == issued: then a batch goes to the link straight from the client's buffer.

If this process dies, what was not answered may be on one replica only: the next owner session compares
(see ``session``). On the hot path: ``submit`` and ``receive``, each once per batch.
"""

from collections import deque
from collections.abc import Callable, Sequence

from stortrends_ha.errors import PeerFailedError, ProtocolError, StorageError
from stortrends_ha.limits import LINK_BACKLOG_BYTES
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Kind
from stortrends_ha.protocol.nbd_transmission import HEAD_OF_OP, OP_WRITE, REQUEST, Batch, Change
from stortrends_ha.replication.interfaces import Buffer, Client, Link, Store
from stortrends_ha.replication.ordering import RegionsInFlight
from stortrends_ha.replication.resync import Resync

NO_COOKIE = bytes(8)


class Entry:
    """Changes of one batch in the window, and whom to answer."""

    __slots__ = ("changes", "client", "first", "last", "nbytes", "replies", "volume")

    def __init__(
        self, first: int, client: Client | None, volume: int, changes: list[Change], replies: list[bytes]
    ) -> None:
        self.first = first
        self.last = first + len(changes) - 1
        self.client = client
        self.volume = volume
        self.changes = changes
        self.replies = replies
        self.nbytes = sum([length for op, _, length, _ in changes if op == OP_WRITE])


class Flush:
    """A flush that is under way on both replicas."""

    __slots__ = ("after", "client", "local", "peer", "replies", "sent", "volume")

    def __init__(self, after: int, client: Client, volume: int, replies: list[bytes]) -> None:
        self.after = after  # the newest change it covers: it goes on the link behind that one
        self.client = client
        self.volume = volume
        self.replies = replies
        self.sent = False  # in this session
        self.local = False
        self.peer = False


class _ResyncEnd:
    """The client of the flushes that end a resync."""

    def __init__(self, primary: "Primary", resync: Resync) -> None:
        self._primary = primary
        self._resync = resync

    def answer(self, _: bytes) -> None:
        self._primary.resync_flushed(self._resync)

    def pause(self) -> None:
        """A resync takes no requests; ``Primary.full`` holds it."""

    def resume(self) -> None:
        """See ``pause``."""


class Primary:
    """The owner of a group, over all sessions with its secondary."""

    def __init__(
        self,
        stores: Sequence[Store],
        epoch: int,
        *,
        window_changes: int,
        window_bytes: int,
        failed: Callable[[StorageError], None],
        synced: Callable[[], None],
    ) -> None:
        self._stores = stores
        self._epoch = epoch
        self._window_changes = window_changes
        self._window_bytes = window_bytes
        self._report_failure = failed
        self._report_synced = synced
        self._window: deque[Entry] = deque()
        self._unsent: deque[Entry] = deque()
        self._regions = [RegionsInFlight() for _ in stores]
        self._link: Link | None = None
        self._flushes: dict[int, Flush] = {}
        self._flushes_unsent: deque[int] = deque()
        self._flush_number = 0
        self._clients: dict[Client, None] = {}
        self._stopped = True  # clients are paused
        self.opened = False  # there has been a session
        self._ending = False
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self.issued = 0
        self.acked = 0
        self.bytes_in_flight = 0
        self.resync: Resync | None = None
        self._copying = 0  # changes in the window that are a resync's
        self.failed = False
        self.pong = 0  # the number of the newest ping that was answered

    # --- From clients -------------------------------------------------------------------------

    def submit(self, client: Client, volume: int, batch: Batch, view: Buffer) -> int:
        """Take the changes of a batch: to the link first, so that both nodes work at once, then to the own store.

        Returns how many bytes were written.
        """
        entry = Entry(self.issued + 1, client, volume, batch.changes, batch.replies)
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
        if batch.durable:
            self.flush(client, volume, batch.durable)
        if self.full:
            self._update_flow()
        return entry.nbytes

    def flush(self, client: Client, volume: int, replies: list[bytes]) -> None:
        """Answer ``replies`` when all that was taken before is stable on both replicas."""
        self._flush_number = number = self._flush_number + 1
        self._flushes[number] = Flush(self.issued, client, volume, replies)
        self._flushes_unsent.append(number)
        self.pump()
        self._stores[volume].start_flush(lambda: self._flushed(number, local=True))
        if self.full:
            self._update_flow()

    def in_flight(self, volume: int, offset: int, length: int) -> bool:
        """Whether a range overlaps changes that the secondary may lack: then a read must wait (``when_settled``).

        When the own replica has failed, it always must.
        """
        if self.failed:
            return True
        return self.issued != self.acked and self._regions[volume].overlaps(offset, length, self.acked)

    def when_settled(self, do: Callable[[], None]) -> None:
        """Call back when everything that is in flight now has been answered."""
        self._waiting.append((self.issued, do))
        if self.full:
            self._update_flow()

    @property
    def full(self) -> bool:
        """Whether a bound of the window is reached."""
        under_way = self.issued - self.acked + len(self._flushes) + len(self._waiting)
        return under_way >= self._window_changes or self.bytes_in_flight >= self._window_bytes

    @property
    def unanswered(self) -> int:
        """Changes and flushes of clients, and reads that wait for them; not what a resync has under way."""
        flushes = sum(not isinstance(flush.client, _ResyncEnd) for flush in self._flushes.values())
        return self.issued - self.acked - self._copying + flushes + len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether everything has been answered."""
        return self.issued == self.acked and not self._flushes

    # --- Flow ---------------------------------------------------------------------------------

    def attach(self, client: Client) -> None:
        """A client has come: it may submit, unless it is paused at once."""
        self._clients[client] = None
        if self._stopped:
            client.pause()

    def detach(self, client: Client) -> None:
        """A client has gone: what it submitted goes on."""
        self._clients.pop(client, None)

    def stop_taking(self) -> None:
        """Take no more requests, for good; finish what there is."""
        self._ending = True
        self._update_flow()

    def _update_flow(self) -> None:
        """Pause all clients, or let them go on, when that has changed."""
        stopped = not self.opened or self._ending or self.failed or self.full
        if stopped == self._stopped:
            return
        self._stopped = stopped
        for client in list(self._clients):
            if self._stopped != stopped:  # the one before has filled the window
                break
            if stopped:
                client.pause()
            else:
                client.resume()

    def halt(self) -> None:
        """The own replica cannot be trusted any more: nothing is taken or answered from now on."""
        self.failed = True
        self._link = None
        self._update_flow()

    def _fail(self, error: StorageError) -> None:
        self.halt()
        self._report_failure(error)

    # --- The session --------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether a session is open."""
        return self._link is not None

    def open_session(self, link: Link, full: bool) -> None:
        """The secondary has accepted: send again what is unanswered, and compare everything if ``full``."""
        if self.failed:
            return
        self.opened = True
        self._link = link
        self._unsent = deque(self._window)
        for flush in self._flushes.values():
            flush.sent = False
        self._flushes_unsent = deque(number for number, flush in self._flushes.items() if not flush.peer)
        self.resync = Resync(self, self._stores) if full else None
        self.pump()
        self._update_flow()

    def close_session(self) -> None:
        """The link is gone. What is unanswered stays in the window."""
        self._link = None
        self._unsent = deque(self._window)

    def pump(self) -> None:
        """Send what waits for the link: unsent changes, then flushes, then the next blocks of a resync."""
        if self._link is None:
            return
        try:
            self._pump(self._link)
        except StorageError as e:
            self._fail(e)

    def _pump(self, link: Link) -> None:
        if self.resync is not None:  # first, so that clients who fill the link cannot keep it from going on
            self._step_resync(link, self.resync)
        self._send_flushes(link)
        while self._unsent and link.backlog_bytes <= LINK_BACKLOG_BYTES:
            self._send_from_store(link, self._unsent.popleft())
            self._send_flushes(link)
        while self.resync is not None and self._step_resync(link, self.resync):
            pass

    def _send_flushes(self, link: Link) -> None:
        """Send the flushes whose changes are all on the link."""
        while self._flushes_unsent:
            number = self._flushes_unsent[0]
            flush = self._flushes[number]
            if self._unsent and self._unsent[0].first <= flush.after:
                return
            self._flushes_unsent.popleft()
            flush.sent = True
            message = wire.frame(Kind.FLUSH, self._epoch, number, flush.volume)
            link.send([message], len(message))

    def _send_from_store(self, link: Link, entry: Entry) -> None:
        """Send changes again, with the data that their places hold by now."""
        buffers: list[Buffer] = [b""]
        store = self._stores[entry.volume]
        for op, offset, length, _ in entry.changes:
            buffers.append(REQUEST.pack(HEAD_OF_OP[op], NO_COOKIE, offset, length))
            if op == OP_WRITE:
                buffers.append(store.read(offset, length))
        length = sum(map(len, buffers))
        buffers[0] = wire.changes_header(self._epoch, entry.first, entry.volume, length)
        link.send(buffers, wire.HEADER_BYTES + length)

    def _step_resync(self, link: Link, resync: Resync) -> bool:
        """Go on with the resync if the bounds allow; whether it went on."""
        if resync.finished and not resync.flushing:
            resync.flushing = len(self._stores)
            for volume in range(len(self._stores)):
                self.flush(_ResyncEnd(self, resync), volume, [])
        if resync.waiting or link.backlog_bytes > LINK_BACKLOG_BYTES or self.full:
            return False
        resync.step()
        return True

    def resync_flushed(self, resync: Resync) -> None:
        """One more volume is stable on both replicas after everything was copied; with the last, they are in sync."""
        resync.flushing -= 1
        if resync is self.resync and not resync.flushing and self._link is not None:
            self.resync = None
            self._report_synced()  # durable here before the secondary hears of it
            if self._link is not None:  # it was, or this replica has failed
                message = wire.frame(Kind.SYNCED, self._epoch)
                self._link.send([message], len(message))

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
            self._fail(e)
            return end
        if newest != self.acked:
            self._acknowledged(newest)
        if self._unsent or self._flushes_unsent or self.resync is not None:
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
            self.resync.result(frame.volume, *wire.decode_result(frame.payload))
        else:
            raise ProtocolError(f"an unexpected {Kind(frame.kind).name} frame")

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
            done = entry.replies
            if entry.last <= seq:
                window.popleft()
                self.bytes_in_flight -= entry.nbytes
            else:
                done = self._split(entry, seq)
            if entry.client is None:
                self._copying -= 1
            else:
                answers.setdefault(entry.client, []).extend(done)
        for client, replies in answers.items():
            client.answer(b"".join(replies))
        if not window:
            for regions in self._regions:
                regions.clear()
        if self._waiting or self._stopped:
            self._settled()

    @staticmethod
    def _split(entry: Entry, seq: int) -> list[bytes]:
        """Take the changes up to ``seq`` off the entry; return their replies."""
        count = seq - entry.first + 1
        done, entry.replies = entry.replies[:count], entry.replies[count:]
        entry.changes = entry.changes[count:]
        entry.first = seq + 1
        return done

    def _settled(self) -> None:
        """Something was answered: go on with who waited for it."""
        while self._waiting and self._waiting[0][0] <= self.acked:
            self._waiting.popleft()[1]()
        if self._stopped:
            self._update_flow()

    def _flushed(self, number: int, local: bool) -> None:
        if self.failed:
            return
        flush = self._flushes[number]
        flush.local, flush.peer = flush.local or local, flush.peer or not local
        if flush.local and flush.peer:
            del self._flushes[number]
            flush.client.answer(b"".join(flush.replies))
            self._settled()

    # --- For the resync -----------------------------------------------------------------------

    def put(self, volume: int, op: int, offset: int, length: int, data: Buffer) -> None:
        """Put a change that only the secondary needs on the stream, now."""
        assert self._link is not None
        entry = Entry(self.issued + 1, None, volume, [(op, offset, length, 0)], [])
        self._copying += 1
        self.issued = entry.last
        self.bytes_in_flight += entry.nbytes
        self._window.append(entry)
        request = REQUEST.pack(HEAD_OF_OP[op], NO_COOKIE, offset, length)
        if self._unsent:
            self._unsent.append(entry)
            return
        size = len(request) + len(data)
        header = wire.changes_header(self._epoch, entry.first, volume, size)
        self._link.send([header, request, data], wire.HEADER_BYTES + size)

    def compare(self, volume: int, offset: int, length: int, digest: bytes) -> None:
        """Put a comparison on the stream, now."""
        assert self._link is not None
        message = wire.encode_compare(self._epoch, volume, offset, length, digest)
        self._link.send([message], len(message))
