"""What an owner remembers of what is under way: changes that the secondary lacks, and flushes. Pure.

``stream`` puts them on the link, ``primary`` answers them. On the hot path: one ``Entry`` a batch.
"""

from collections.abc import Callable

from stortrends_ha.protocol.nbd_transmission import OP_WRITE, Change
from stortrends_ha.replication.interfaces import Client


class Entry:
    """Changes of one batch in the window, and whom to answer; nobody (None) if that does not wait for the peer."""

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

    def split(self, seq: int) -> list[bytes]:
        """Take the changes up to ``seq`` off; return their replies."""
        count = seq - self.first + 1
        done, self.replies = self.replies[:count], self.replies[count:]
        self.changes = self.changes[count:]
        self.first = seq + 1
        return done


class Flush:
    """A flush that is under way; ``peer`` is true from the start if only the own disk has to flush."""

    __slots__ = ("after", "client", "local", "peer", "replies", "sent", "volume")

    def __init__(self, after: int, client: Client, volume: int, replies: list[bytes], peer: bool) -> None:
        self.after = after  # the newest change it covers: it goes on the link behind that one
        self.client = client
        self.volume = volume
        self.replies = replies
        self.sent = False  # in this session
        self.local = False
        self.peer = peer


class AllFlushed:
    """The client of one flush of each volume."""

    def __init__(self, volumes: int, done: Callable[[], None]) -> None:
        self._volumes = volumes
        self._done = done

    def answer(self, _: bytes) -> None:
        """One more volume has been flushed."""
        self._volumes -= 1
        if not self._volumes:
            self._done()

    def pause(self) -> None:
        """It takes no requests."""

    def resume(self) -> None:
        """See ``pause``."""
