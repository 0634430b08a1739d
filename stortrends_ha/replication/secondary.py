"""The secondary's end of a session: it applies the owner's stream, in stream order. Pure but for its store.

Invariants:
- Rule 7: changes are applied strictly in their order; numbers have no gap.
- Rule 1: ACK n is sent after changes up to n have been applied; FLUSHED after a flush that began later
  than everything before FLUSH in the stream has ended.
- Rule 6: a frame of any other epoch ends the session, and nothing of it is applied.
- A change is applied when all of it has arrived; what is cut off by the end of a connection never is.
- Rule 9: SYNCED is answered when it is durable here that this replica is complete: before the record may add it.
- It never falls silent for long: after ZERO_PIECE_BYTES of trims and zeroes, which may be slow, ``receive`` returns
  with ``behind`` set, and is called again in a later turn of the event loop.

On the hot path: ``receive`` handles all that one read of the socket brought and answers it with one ACK.
"""

from collections.abc import Callable, Sequence

from stortrends_ha.errors import ProtocolError, StorageError
from stortrends_ha.limits import (
    CHANGES_FRAME_BYTES,
    COMPARE_BLOCK_BYTES,
    HOLE_COMPARE_BYTES,
    REQUEST_HEADER_BYTES,
    ZERO_PIECE_BYTES,
)
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import HOLE, Kind, Purpose, Verdict
from stortrends_ha.protocol.nbd_transmission import OP_WRITE, PLAIN_WRITE, REQUEST, Change, change_op
from stortrends_ha.replication.interfaces import Link, Store
from stortrends_ha.replication.resync import digest
from stortrends_ha.replication.verify import FreshReads


class Secondary:
    """One session of the secondary.

    ``first`` is the number of the first change that will come; 0 if the change itself says it. ``synced`` makes
    durable that this replica is complete; ``clients`` is told the connections of the owner's clients, ``verified``
    what a verify has compared (volume, offset, length, verdict), ``verifying`` what the owner says of one.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        epoch: int,
        link: Link,
        first: int,
        synced: Callable[[], None],
        clients: Callable[[list[wire.Endpoint]], None] = lambda _endpoints: None,
        verified: Callable[[int, int, int, Verdict], None] = lambda _volume, _offset, _length, _verdict: None,
        verifying: Callable[[bytes], None] = lambda _payload: None,
    ) -> None:
        self._stores = stores
        self._epoch = epoch
        self._link = link
        self._synced = synced
        self._clients = clients
        self._verified = verified
        self._fresh = [FreshReads(store) for store in stores]
        self._applied = first - 1  # -1: not known yet
        self._store = stores[0]
        self.behind = False  # there is more to do than one call may
        self._to_come = 0  # bytes of the CHANGES frame that is being received
        self._handlers: dict[int, Callable[[wire.Frame], None]] = {
            Kind.FLUSH: self._on_flush,
            Kind.COMPARE: self._on_compare,
            Kind.SYNCED: self._on_synced,
            Kind.PING: self._on_ping,
            Kind.CLIENTS: self._on_clients,
            Kind.VERIFY: lambda frame: verifying(frame.payload),
        }

    def receive(self, view: memoryview, end: int) -> int:
        """Handle what is in ``view[:end]``; return where the unfinished rest begins.

        Raises ProtocolError (end the session) and StorageError (the replica has failed).
        """
        at, before = 0, self._applied
        self.behind = False
        while at < end:
            if self._to_come:
                used = self._apply(view, at, min(end, at + self._to_come))
                self._to_come -= used
                at += used
                if self._to_come or at == end or self.behind:
                    break
            frame = wire.next_frame(view, at, end, self._epoch)
            if frame is None:
                break
            at += wire.HEADER_BYTES
            if frame.kind == wire.CHANGES:
                self._begin_changes(frame)
            else:
                at += frame.length
                self._handler(frame.kind)(frame)
        if self._applied != before:
            ack = wire.HEADER.pack(wire.ACK, 0, 0, 0, self._epoch, self._applied)
            self._link.send([ack], len(ack))
        return at

    def _apply(self, view: memoryview, at: int, end: int) -> int:
        """Apply the whole changes in ``view[at:end]``; return how many bytes they took."""
        start, changes, zeroed = at, list[Change](), 0
        size, unpack, header = self._store.size_bytes, REQUEST.unpack_from, REQUEST_HEADER_BYTES
        while end - at >= header:
            head, _, offset, length = unpack(view, at)
            if not length or offset + length > size:
                raise ProtocolError(f"a change of {length} bytes at {offset} in a volume of {size}")
            payload = at + header
            op = OP_WRITE if head == PLAIN_WRITE else change_op(head)
            if op is None:
                raise ProtocolError(f"a change that begins with {head:#018x}")
            if op == OP_WRITE:
                if payload + length > end:
                    if payload + length > start + self._to_come:
                        raise ProtocolError(f"a write of {length} bytes is longer than the frame that it is in")
                    break
                at = payload + length
            else:
                at = payload
                zeroed += length
            changes.append((op, offset, length, payload))
            if zeroed >= ZERO_PIECE_BYTES:
                self.behind = True
                break
        if at != start + self._to_come and start + self._to_come - at < header:
            raise ProtocolError("a frame of changes that ends in the middle of one")
        self._store.apply(changes, view)
        self._applied += len(changes)
        return at - start

    def _begin_changes(self, frame: wire.Frame) -> None:
        if self._applied < 0 < frame.seq:
            self._applied = frame.seq - 1
        if frame.seq != self._applied + 1:
            raise ProtocolError(f"change {frame.seq} came after change {self._applied}")
        if frame.length > CHANGES_FRAME_BYTES:
            raise ProtocolError(f"a CHANGES frame of {frame.length} bytes is longer than {CHANGES_FRAME_BYTES}")
        self._store = self._volume(frame.volume)
        self._to_come = frame.length

    def _handler(self, kind: int) -> Callable[[wire.Frame], None]:
        if kind not in self._handlers:
            raise ProtocolError(f"an unexpected {Kind(kind).name} frame")
        return self._handlers[kind]

    def _volume(self, index: int) -> Store:
        if index >= len(self._stores):
            raise ProtocolError(f"a frame for volume number {index} of {len(self._stores)}")
        return self._stores[index]

    def _on_flush(self, frame: wire.Frame) -> None:
        answer = wire.frame(Kind.FLUSHED, self._epoch, frame.seq, frame.volume)
        self._volume(frame.volume).start_flush(lambda: self._link.send([answer], len(answer)))

    def _on_compare(self, frame: wire.Frame) -> None:
        offset, length, theirs = wire.decode_compare(frame.payload)
        store, longest = self._volume(frame.volume), HOLE_COMPARE_BYTES if theirs == HOLE else COMPARE_BLOCK_BYTES
        if not 0 < length <= longest or offset + length > store.size_bytes:
            raise ProtocolError(f"a comparison of {length} bytes at {offset} in a volume of {store.size_bytes}")
        verdict = self._compare(frame, store, offset, length, theirs)
        if frame.seq != Purpose.SYNC:
            self._verified(frame.volume, offset, length, verdict)
        answer = wire.encode_result(self._epoch, frame.volume, offset, length, verdict)
        self._link.send([answer], len(answer))

    def _compare(self, frame: wire.Frame, store: Store, offset: int, length: int, theirs: bytes) -> Verdict:
        """Rule 13: what cannot be read is a failure, unless the owner is about to repair it."""
        if theirs == HOLE:
            is_data, end = store.extent(offset)
            return Verdict(not is_data and end >= offset + length)
        try:
            read = store.read if frame.seq == Purpose.SYNC else self._fresh[frame.volume].read
            return Verdict(digest(read(offset, length)) == theirs)
        except StorageError:
            if frame.seq != Purpose.REPAIR:
                raise
            return Verdict.UNREADABLE

    def _on_synced(self, _: wire.Frame) -> None:
        self._synced()
        answer = wire.frame(Kind.SYNCED, self._epoch)
        self._link.send([answer], len(answer))

    def _on_clients(self, frame: wire.Frame) -> None:
        self._clients(wire.decode_clients(frame.payload))

    def _on_ping(self, frame: wire.Frame) -> None:
        pong = wire.frame(Kind.PONG, self._epoch, frame.seq)
        self._link.send([pong], len(pong))
