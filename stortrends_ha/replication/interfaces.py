"""What the pure mirror asks of the world around it: a store, a link, clients. All calls are direct."""

from collections.abc import Callable, Sequence
from typing import Protocol

from stortrends_ha.protocol.nbd_transmission import Change

Buffer = bytes | bytearray | memoryview


class Store(Protocol):
    """One volume's replica on this node. Raises StorageError when the disk fails."""

    @property
    def size_bytes(self) -> int:
        """The size of the volume."""

    def apply(self, changes: Sequence[Change], view: Buffer) -> None:
        """Apply changes in their order; payloads are at the given places in ``view``."""

    def read(self, offset: int, length: int) -> Buffer:
        """The current content."""

    def renew(self, offset: int, length: int) -> None:
        """Have a range read from the disk anew, in the background: a hint, of which writes lose nothing."""

    def extent(self, offset: int) -> tuple[bool, int]:
        """(whether it holds data, its end) of the extent at ``offset``; what holds no data reads as zeroes."""

    def start_flush(self, done: Callable[[], None]) -> None:
        """Make stable all that was applied before this call, then call ``done``; never if it fails."""


class Link(Protocol):
    """The sending side of a connection to the peer."""

    @property
    def backlog_bytes(self) -> int:
        """What the network has not yet taken; when it falls, ``pump`` is called."""

    def send(self, buffers: list[Buffer], length: int) -> None:
        """Send buffers of together ``length`` bytes, in order; they may be reused afterwards."""


class Client(Protocol):
    """A connection of a client to one volume."""

    def answer(self, replies: bytes) -> None:
        """Send finished replies."""

    def pause(self) -> None:
        """Take no more requests: a bound was reached."""

    def resume(self) -> None:
        """Take requests again."""
