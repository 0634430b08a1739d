"""The owner's end of the ordered stream: numbers changes, keeps the window, puts both on the link. Pure but for stores.

Rule 7: what is put on the stream has its place in it for good: clients' changes, flushes behind the changes that they
cover, and the blocks and comparisons of a *job*: of a resync or a verify, of which there is one at a time.

The *window* is the ordered list of changes that the secondary has not acknowledged. It keeps where they are, not their
data: what must be sent again after the link broke is read from the own store, as it is by then. That is right because
every later change to the same place comes later in the window, too. The same happens when the link is slower than the
clients, so nothing is ever queued for it beyond ``LINK_BACKLOG_BYTES``.

    issued >= sent >= acked: numbers of the newest change taken, put on the link, applied on both.
    ``_unsent`` empty <=> sent == issued: then a batch goes to the link straight from the client's buffer.

Neighbours: ``primary`` decides what is answered when, and puts clients' changes here; ``resync``, ``verify`` and
``secondary``.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from stortrends_ha.errors import StorageError
from stortrends_ha.limits import LINK_BACKLOG_BYTES, LINK_FRAME_BYTES
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Kind, Purpose
from stortrends_ha.protocol.nbd_transmission import HEAD_OF_OP, OP_WRITE, REQUEST
from stortrends_ha.replication.differences import Differences
from stortrends_ha.replication.interfaces import Buffer, Client, Link, Store
from stortrends_ha.replication.resync import Resync
from stortrends_ha.replication.verify import Verify
from stortrends_ha.replication.window import Entry, Flush

NO_COOKIE = bytes(8)


def _nothing() -> None:
    """Nobody sets a pace."""


class JobFlush:
    """The client of a flush that a job has asked for: nobody hears of its end when the job has ended before."""

    def __init__(self, stream: "Stream", done: Callable[[], None]) -> None:
        self._stream = stream
        self._job = stream.job
        self._done = done

    def answer(self, _: bytes) -> None:
        """It is stable on both, if there was a session until now."""
        if self._stream.job is self._job:
            self._done()

    def pause(self) -> None:
        """A job takes no requests; ``Stream.full`` holds it."""

    def resume(self) -> None:
        """See ``pause``."""


class Stream:
    """Numbers, window and link of an owner. ``Primary`` adds the clients."""

    def __init__(
        self,
        stores: Sequence[Store],
        differences: Sequence[Differences],
        epoch: int,
        failed: Callable[[StorageError], None],
    ) -> None:
        self._stores = stores
        self._differences = differences
        self._epoch = epoch
        self._report_failure = failed
        self._link: Link | None = None
        self._window: deque[Entry] = deque()
        self._unsent: deque[Entry] = deque()
        self._unwaited = 0  # changes in the window that nobody waits for there
        self._flushes: dict[int, Flush] = {}
        self._flushes_unsent: deque[int] = deque()
        self._flush_number = 0
        self.issued = 0
        self.acked = 0
        self.bytes_in_flight = 0
        self.resync: Resync | None = None
        self.verify: Verify | None = None
        self.job_begun: Callable[[], None] = _nothing  # it may be given a budget
        self.asked: Callable[[bytes], None] = lambda _payload: None  # an operator at the secondary, for a verify
        self.failed = False

    # --- What ``Primary`` decides ---------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether a bound is reached: a job waits then."""
        raise NotImplementedError

    def is_sent(self, volume: int, offset: int, length: int) -> bool:
        """Whether everything that was ever applied to a range is on the link."""
        raise NotImplementedError

    def flush(self, client: Client, volume: int, replies: list[bytes], *, everywhere: bool = False) -> None:
        """See ``Primary``."""
        raise NotImplementedError

    def resync_copied(self) -> None:
        """Everything has been put on the stream and compared; the flushes that end the resync come next."""
        raise NotImplementedError

    def halt(self) -> None:
        """The own replica cannot be trusted any more: nothing is taken or answered from now on."""
        self.failed = True
        self._link = None
        self._end_verify("this node's replica has failed, or serves no more")

    def _fail(self, error: StorageError) -> None:
        self.halt()
        self._report_failure(error)

    def cannot_copy(self, error: StorageError) -> None:
        """What the secondary lacks cannot be read here."""
        raise NotImplementedError

    # --- The session --------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether a session is open."""
        return self._link is not None

    def _attach_link(self, link: Link) -> None:
        """Send again what is in the window."""
        self._link = link
        self._unsent = deque(self._window)
        for flush in self._flushes.values():
            flush.sent = False
        self._flushes_unsent = deque(number for number, flush in self._flushes.items() if not flush.peer)
        self.pump()

    def begin_resync(self, *, blank: bool, compare: bool) -> None:
        """The secondary has said what it knows of differences."""
        self.resync = Resync(self, self._stores, self._differences, blank=blank, compare=compare)
        self.job_begun()
        self.pump()

    def begin_verify(self, verify: Verify) -> None:
        """Only in a session of two nodes in sync, and without another job."""
        assert self.connected
        assert self.job is None
        self.verify = verify
        self.job_begun()
        self.pump()

    def tell_of_verify(self, payload: bytes) -> None:
        """Tell the secondary, if there is a session, what became of a verify."""
        if self._link is not None and len(payload) <= LINK_FRAME_BYTES:
            message = wire.frame(Kind.VERIFY, self._epoch, payload=payload)
            self._link.send([message], len(message))

    def _end_verify(self, why: str = "") -> None:
        verify, self.verify = self.verify, None
        if verify is not None:
            verify.end(why)

    @property
    def job(self) -> Resync | Verify | None:
        """What is under way besides the clients' changes."""
        return self.resync or self.verify

    def _detach_link(self) -> None:
        self._link = None
        self.resync = None
        self._end_verify("the link broke")
        self._unsent = deque(self._window)

    def _give_up_window(self) -> None:
        """Nobody waits for the secondary: what it lacks is in ``differences``."""
        self._window.clear()
        self._unsent.clear()
        self._flushes_unsent.clear()
        self.acked = self.issued
        self.bytes_in_flight = self._unwaited = 0

    def pump(self) -> None:
        """Send what waits for the link: unsent changes, then flushes, then the next blocks of a job."""
        if self._link is None:
            return
        try:
            self._pump(self._link)
        except StorageError as e:
            self.cannot_copy(e)

    def _pump(self, link: Link) -> None:
        has_job = self.resync is not None or self.verify is not None
        if has_job:  # first, so that clients who fill the link cannot keep it from going on
            self._step(link)
        self._send_flushes(link)
        while self._unsent and link.backlog_bytes <= LINK_BACKLOG_BYTES:
            self._send_from_store(link, self._unsent.popleft())
            self._send_flushes(link)
        while has_job and self._step(link):
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

    # --- Resync and verify --------------------------------------------------------------------

    def _step(self, link: Link) -> bool:
        """Go on with the job, if there is one and the bounds allow; whether it went on."""
        if self.resync is not None:
            return self._step_resync(link, self.resync)
        return self.verify is not None and self._step_verify(link, self.verify)

    def _step_verify(self, link: Link, verify: Verify) -> bool:
        if verify.finished:
            self._end_verify()
            return False
        if link.backlog_bytes > LINK_BACKLOG_BYTES or self.full or verify.waiting:
            return False
        return verify.step()

    def _step_resync(self, link: Link, resync: Resync) -> bool:
        """Go on with the resync if the bounds allow; whether it went on."""
        if link.backlog_bytes > LINK_BACKLOG_BYTES or self.full or resync.waiting:
            if resync.finished and resync.ending is None:
                resync.ending = len(self._stores)
                self.resync_copied()
                for volume in range(len(self._stores)):
                    self.flush_everywhere(volume, partial(self._resync_flushed, resync))
            return False
        resync.step()
        return True

    @property
    def job_waits(self) -> str:
        """What the job waits for at this moment, a clause; empty if only for the bytes that it is allowed."""
        job, link = self.job, self._link
        if job is None or link is None:
            return ""
        if self.resync is not None and self.resync.ending is not None:
            return "waiting until everything is flushed on both nodes"
        if self.full:
            return "the window is full of what the secondary has not applied yet"
        if link.backlog_bytes > LINK_BACKLOG_BYTES:
            return "the link is full"
        return "waiting for the secondary's comparisons" if job.comparing else ""

    def _resync_flushed(self, resync: Resync) -> None:
        """Rule 9: with the last volume that is stable on both after all was copied, the secondary is told so."""
        assert resync.ending
        resync.ending -= 1
        if resync.ended and self._link is not None:
            message = wire.frame(Kind.SYNCED, self._epoch)
            self._link.send([message], len(message))

    def flush_everywhere(self, volume: int, done: Callable[[], None]) -> None:
        """Call ``done`` when all that was put on the stream before is stable on both; never if the session ends."""
        self.flush(JobFlush(self, done), volume, [], everywhere=True)

    def put(self, volume: int, op: int, offset: int, length: int, data: Buffer) -> None:
        """Put a change that only the secondary needs on the stream, now."""
        assert self._link is not None
        entry = Entry(self.issued + 1, None, volume, [(op, offset, length, 0)], [])
        self._unwaited += 1
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

    def compare(self, volume: int, offset: int, length: int, digest: bytes, purpose: Purpose = Purpose.SYNC) -> None:
        """Put a comparison on the stream, now."""
        assert self._link is not None
        message = wire.encode_compare(self._epoch, volume, offset, length, digest, purpose)
        self._link.send([message], len(message))
