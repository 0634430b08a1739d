"""The server's side of the NBD handshake (fixed newstyle, without TLS), pure: bytes in, bytes out.

Invariants:
- Any input, cut into any pieces, gives the same output, result and reason for closing.
- No input raises: it gets a reply, an error reply, or closes the connection with a reason.
- Never more than one option is kept, of at most ``OPTION_MAX_BYTES``; a longer one is skipped unread.
- Every client is done after a bounded number of options, skipped bytes and bytes of replies.

The table ``_STEPS`` says what is read next.
Neighbours: ``nbd_negotiation`` answers the options; ``dataplane`` feeds this and limits its time;
``nbd_transmission`` takes over with ``result``. Source: doc/proto.md of the NBD project.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum, auto
from typing import Final

from stortrends_ha.protocol.nbd_negotiation import Negotiated, Negotiation, data_max_bytes, listing
from stortrends_ha.protocol.nbd_options import (
    CLIENT_FLAGS,
    INIT_MAGIC,
    OPTION_HEADER,
    OPTION_MAGIC,
    Export,
    HandshakeFlag,
    Option,
)

__all__ = ["GREETING", "Export", "Handshake", "Negotiated"]

HANDSHAKE_FLAGS: Final = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
GREETING: Final = INIT_MAGIC + OPTION_MAGIC + HANDSHAKE_FLAGS.to_bytes(2)

# As in QEMU, and what the document calls no abuse in a write. A longer option closes the connection.
OPTION_SKIPPED_MAX_BYTES: Final = 32 << 20
# A client needs fewer than ten options to connect. One that looks at all exports needs about two for each,
# so this is enough for 500 volumes in a group, and answering so many takes milliseconds.
OPTIONS_MAX: Final = 1024
# A LIST of 16 bytes is answered with all exports. A client that has been told everything so many times,
# and this much more in errors and INFO, only wants to fill our memory.
LISTS_MAX: Final = 8
REPLIES_BASE_MAX_BYTES: Final = 256 << 10


class _Step(Enum):
    """What is read next."""

    CLIENT_FLAGS = auto()
    OPTION = auto()
    DATA = auto()
    SKIPPED = auto()
    NOTHING = auto()  # it is over


class Handshake:
    """One client's handshake: send ``greeting``, then feed ``receive`` until ``result`` or ``closed`` is set.

    ``closed`` is a sentence: send what ``receive`` returned, then close the connection. ``violations``
    counts what the client did against the protocol. ``exports`` are by name; the first is the default one.
    """

    greeting: Final = GREETING

    def __init__(self, exports: Mapping[str, Export]) -> None:
        self.result: Negotiated | None = None
        self.closed: str | None = None
        self._broken = 0
        self._negotiation = Negotiation(exports)
        self._replies_max_bytes = REPLIES_BASE_MAX_BYTES + LISTS_MAX * len(listing(exports))
        self._replied_bytes = 0
        self._options = 0
        self._fixed_newstyle = False
        self._step = _Step.CLIENT_FLAGS
        self._input = bytearray()
        self._output = bytearray()
        self._option = 0  # the option whose data is being read
        self._to_come_bytes = 0  # of its data

    @property
    def violations(self) -> int:
        """How often the client broke the protocol."""
        return self._broken + self._negotiation.invalid

    def shut_down(self) -> None:
        """From now on refuse every option but ABORT."""
        self._negotiation.shutting_down = True

    def receive(self, data: bytes) -> bytes:
        """Take a piece of input, of any size; return what to send now."""
        if self.result:
            raise RuntimeError("the handshake is over: this input belongs to the transmission phase")
        if self.closed is not None:
            return b""
        self._input += data
        while _STEPS[self._step](self):
            pass
        output = bytes(self._output)
        self._output.clear()
        return output

    # Each step returns whether there may be more to do with the input that is there.

    def _read_client_flags(self) -> bool:
        data = self._take(CLIENT_FLAGS.size)
        if data is None:
            return False
        (flags,) = CLIENT_FLAGS.unpack(data)
        if flags | HANDSHAKE_FLAGS != HANDSHAKE_FLAGS:  # "& ~" of an IntFlag would miss what it does not name
            return self._break(f"the client sent unknown flags ({flags:#010x})")
        self._fixed_newstyle = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        self._negotiation.zeroes = not flags & HandshakeFlag.NO_ZEROES
        self._step = _Step.OPTION
        return True

    def _read_option(self) -> bool:
        data = self._take(OPTION_HEADER.size)
        if data is None:
            return False
        magic, self._option, self._to_come_bytes = OPTION_HEADER.unpack(data)
        self._options += 1
        if why := self._why_not_read(magic):
            return self._break(why)
        kept = self._to_come_bytes <= data_max_bytes(self._option)
        self._step = _Step.DATA if kept else _Step.SKIPPED
        return True

    def _why_not_read(self, magic: bytes) -> str:
        """Why the option that begins here ends the handshake; empty if it does not."""
        if magic != OPTION_MAGIC:
            return "the client sent something that is not an option"
        if not self._fixed_newstyle and self._option != Option.EXPORT_NAME:
            return f"the client sent option {self._option} without having agreed to fixed newstyle"
        if self._to_come_bytes > OPTION_SKIPPED_MAX_BYTES:
            return f"the client sent an option of {self._to_come_bytes} bytes"
        if self._options > OPTIONS_MAX or self._replied_bytes > self._replies_max_bytes:
            return f"the client has not chosen an export after {self._options - 1} options"
        return ""

    def _read_data(self) -> bool:
        data = self._take(self._to_come_bytes)
        return data is not None and self._answer(data)

    def _skip_data(self) -> bool:
        skipped = min(self._to_come_bytes, len(self._input))
        del self._input[:skipped]
        self._to_come_bytes -= skipped
        return not self._to_come_bytes and self._answer(None)

    def _answer(self, data: bytes | None) -> bool:
        """Answer the option that has been read, and see what comes next."""
        output = self._negotiation.answer(self._option, data)
        self._output += output
        self._replied_bytes += len(output)
        self._step = _Step.OPTION
        if self._negotiation.ended is not None:
            return self._close(self._negotiation.ended)
        if self._negotiation.result:
            self.result = replace(self._negotiation.result, leftover=bytes(self._input))
            return self._finish()
        return True

    def _take(self, size: int) -> bytes | None:
        """Take so many bytes from the input, if they are all there."""
        if len(self._input) < size:
            return None
        taken = bytes(self._input[:size])
        del self._input[:size]
        return taken

    def _break(self, why: str) -> bool:
        self._broken += 1
        return self._close(why)

    def _close(self, why: str) -> bool:
        self.closed = why
        return self._finish()

    def _finish(self) -> bool:
        self._input.clear()
        self._step = _Step.NOTHING
        return False


_STEPS: Final[Mapping[_Step, Callable[[Handshake], bool]]] = {
    _Step.CLIENT_FLAGS: Handshake._read_client_flags,
    _Step.OPTION: Handshake._read_option,
    _Step.DATA: Handshake._read_data,
    _Step.SKIPPED: Handshake._skip_data,
}
