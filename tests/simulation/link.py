"""The link between two processes: a network that holds so many bytes, gives them in pieces, and breaks anywhere.

An ``End`` does what ``dataplane.link_socket.LinkSocket`` and its ``Sender`` do: what the network does not take is a
backlog; while the session is being opened a generator takes the input, frame by frame, then a receiver does.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stortrends_ha.errors import PeerFailedError, ProtocolError, SessionRefusedError, StorageError
from stortrends_ha.replication.interfaces import Buffer
from stortrends_ha.replication.opening import Talk

from .checks import Violation

if TYPE_CHECKING:
    from .node import Process


class Connection:
    """A connection of the two processes."""

    def __init__(self, owner: "Process", follower: "Process", capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.broken = False
        self.forged = False  # bytes that neither of the two sent are on it
        self.ends = (End(self, owner), End(self, follower))
        self.ends[0].peer, self.ends[1].peer = self.ends[1], self.ends[0]

    @property
    def over(self) -> bool:
        """Whether nothing can happen on it any more."""
        return self.ends[0].closed and self.ends[1].closed


class End:
    """One process's end of it. Implements ``replication.interfaces.Link``."""

    peer: "End"

    def __init__(self, connection: Connection, process: "Process") -> None:
        self.connection = connection
        self.process = process
        self.network = bytearray()  # sent, and not yet received by the other end
        self.backlog = bytearray()  # what the network has not taken
        self.closed = False
        self._input = bytearray()
        self._talk: Talk[Any] | None = None
        self._agreed: Callable[[Any], None] = lambda _result: None
        self._wanted = 0
        self._receiver: Callable[[memoryview, int], int] | None = None
        self._lost: Callable[[str], None] = lambda _why: None
        self._drained: Callable[[], None] = lambda: None
        self._behind: Callable[[], bool] = lambda: False
        self.reading = True

    # --- Sending: mirrors Sender.send, _on_writable, close ------------------------------------------------

    @property
    def backlog_bytes(self) -> int:
        """What the network has not taken."""
        return len(self.backlog)

    def send(self, buffers: list[Buffer], length: int) -> None:
        """Whole frames, and the process can be killed before and after."""
        self.process.point()
        data = b"".join(buffers)
        if len(data) != length:
            raise Violation(f"a send of {len(data)} bytes says that it is {length}")
        if not (self.closed or self.connection.broken):
            room = 0 if self.backlog else self.connection.capacity_bytes - len(self.network)
            self.network += data[:room]
            self.backlog += data[room:]
        self.process.point()

    def drain(self) -> None:
        """The network takes some of the backlog."""
        room = self.connection.capacity_bytes - len(self.network)
        self.network += self.backlog[:room]
        del self.backlog[:room]
        if not self.backlog:
            self._drained()

    # --- Receiving: mirrors carry_out, LinkSocket.run, _on_readable ------------------------------------

    def talk(self, talk: Talk[Any], agreed: Callable[[Any], None]) -> None:
        """Let an opening talk take the input until it ends; ``agreed`` gets what it returns, in the same turn."""
        self._talk, self._agreed = talk, agreed
        self._go_on(None)

    def run(
        self,
        receiver: Callable[[memoryview, int], int],
        drained: Callable[[], None],
        lost: Callable[[str], None],
        behind: Callable[[], bool] = lambda: False,
    ) -> None:
        """From now on the input is a stream."""
        self._receiver, self._drained, self._lost, self._behind = receiver, drained, lost, behind

    def receive(self, data: bytes) -> None:
        """Some input has come."""
        self._input += data
        while self._talk is not None and not self.closed and len(self._input) >= self._wanted:
            piece = bytes(self._input[: self._wanted])
            del self._input[: self._wanted]
            self._go_on(piece)
        if self._receiver is not None and self._input and not self.closed:
            self._receive_stream(self._receiver)
            self._wait_if_behind()

    def _wait_if_behind(self) -> None:
        """A receiver that is behind gets another turn before more input."""
        self.reading = not (self._input and self._behind() and not self.closed)
        if not self.reading:
            self.process.world.soon(self.process, self._receive_more)

    def _receive_more(self) -> None:
        if self._receiver is not None and not self.closed:
            self._receive_stream(self._receiver)
            self._wait_if_behind()

    def _go_on(self, piece: bytes | None) -> None:
        assert self._talk is not None
        try:
            step = next(self._talk) if piece is None else self._talk.send(piece)
            while not isinstance(step, int):
                self.send([step], len(step))
                step = self._talk.send(b"")
            self._wanted = step
        except StopIteration as end:
            self._talk = None
            self._agreed(end.value)
        except SessionRefusedError as e:
            self._talk = None
            self.process.refused(e)
            self.close(f"refused: {e}")
        except StorageError as e:
            self._talk = None
            self.process.fail(e)
            self.close(str(e))
        except ProtocolError as e:
            self._talk = None
            self.process.world.note("%s: opening failed: %s", self.process.node.name, e)
            self.process.world.count["openings that failed"] += 1
            self.close(str(e))

    def _receive_stream(self, receiver: Callable[[memoryview, int], int]) -> None:
        try:
            used = receiver(memoryview(bytes(self._input)), len(self._input))
            del self._input[:used]
        except ProtocolError as e:
            if not self.connection.forged:
                raise Violation(f"{self.process.node.name} refused what its peer sent: {e}") from e
            self.process.world.count["forged frames refused"] += 1
            self.close(f"bad input: {e}")
        except (PeerFailedError, StorageError) as e:
            self.close(str(e))

    def close(self, why: str) -> None:
        """As ``LinkSocket.close``: what was sent still arrives, the backlog does not."""
        if not self.closed:
            self.closed = True
            self.backlog.clear()
            self._talk = None
            self.process.world.note("%s: link closed: %s", self.process.node.name, why)
            self._lost(why)

    def die(self) -> None:
        """The process is gone: as a close, but nobody is told."""
        self.closed = True
        self.backlog.clear()
        self._talk = None
