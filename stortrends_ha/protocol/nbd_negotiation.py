"""How each option of the NBD handshake is answered, pure: one whole option in, its replies out.

Invariants:
- Every option gets exactly one final reply: ACK or an error. EXPORT_NAME, which has none, ends it instead.
- What was agreed (structured replies, meta contexts) lives here and nowhere else.
- INFO and a GO with the same data get the same replies.

The table ``_OPTIONS`` says who answers which option and how much data it may have.
Neighbours: ``nbd_handshake`` cuts the input into options; ``nbd_options`` has the numbers and layouts.
Source: doc/proto.md of the NBD project.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from stortrends_ha.protocol.nbd_options import (
    DEFAULT_BLOCK_SIZES,
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    STRING_MAX_BYTES,
    Export,
    Info,
    Option,
    Refused,
    Rep,
    TransmissionFlag,
    decode_info_request,
    decode_meta_request,
    decode_string,
    info_data,
    meta_context_data,
    reply,
    server_data,
)

# Room for the longest name a client may send, and for more queries than there are meta contexts.
OPTION_MAX_BYTES: Final = 64 << 10

META_CONTEXT: Final = "base:allocation"
META_CONTEXT_ID: Final = 1
_META_NAMESPACE: Final = "base:"

_TOLD_IF_WANTED: Final = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What the transmission phase begins with.

    ``contexts`` maps the ids of the selected meta contexts to their names. ``leftover`` is the input that
    came after the handshake.
    """

    export: Export
    structured_replies: bool
    contexts: Mapping[int, str]
    leftover: bytes = b""


class Negotiation:
    """What one client has agreed on so far. It is over when ``result`` or ``ended`` (a sentence) is set."""

    def __init__(self, exports: Mapping[str, Export]) -> None:
        self.result: Negotiated | None = None
        self.ended: str | None = None
        self.shutting_down = False
        self.zeroes = True  # whether the client wants the 124 of EXPORT_NAME
        self.invalid = 0  # options that the client should not have sent like that
        self._exports = exports
        self._option = 0
        self._output = b""
        self._structured_replies = False
        self._contexts: Mapping[int, str] = {}
        self._contexts_of = ""  # the name they were selected for, as the client wrote it

    def answer(self, option: int, data: bytes | None) -> bytes:
        """Answer an option; ``data`` is None if it was longer than ``data_max_bytes`` allows."""
        self._option, self._output = option, b""
        if option == Option.SET_META_CONTEXT:  # it replaces the earlier choice even when it fails
            self._contexts = {}
        try:
            self._dispatch(data)
        except Refused as refused:
            self._refuse(refused)
        return self._output

    def _dispatch(self, data: bytes | None) -> None:
        if self.shutting_down and self._option != Option.ABORT:
            raise Refused(Rep.ERR_SHUTDOWN, "the server is shutting down")
        answerer = _OPTIONS.get(self._option, _UNSUPPORTED)
        if data is None:
            answerer.answer_longer(self, b"")
        else:
            answerer.answer(self, data)

    def _refuse(self, refused: Refused) -> None:
        self.invalid += refused.reply in (Rep.ERR_INVALID, Rep.ERR_TOO_BIG)
        if self._option == Option.EXPORT_NAME:  # it has no error reply
            self.ended = f"the client's choice of an export was refused: {refused}"
        else:
            self._reply(refused.reply, str(refused).encode())

    def _reply(self, kind: Rep, data: bytes = b"") -> None:
        self._output += reply(self._option, kind, data)

    def _export(self, name: str) -> Export:
        """The export of this name; the empty name means the default one."""
        export = self._exports.get(name) if name else next(iter(self._exports.values()), None)
        if export is None:
            raise Refused(Rep.ERR_UNKNOWN, f"there is no export named {name[:64]!r}")
        return export

    def _flags(self, export: Export) -> int:
        flags = export.flags | TransmissionFlag.HAS_FLAGS
        return flags | TransmissionFlag.SEND_DF if self._structured_replies else flags

    def _choose(self, export: Export, name: str) -> None:
        """Enter the transmission phase with an export that the client called ``name``."""
        contexts = self._contexts if name == self._contexts_of else {}
        self.result = Negotiated(export, self._structured_replies, contexts)

    def _export_name(self, data: bytes) -> None:
        name = decode_string(data)
        export = self._export(name)
        _require_uninformed_fit(export)
        self._output = EXPORT_NAME_REPLY.pack(export.size_bytes, self._flags(export))
        if self.zeroes:
            self._output += EXPORT_NAME_ZEROES
        self._choose(export, name)

    def _abort(self, _data: bytes) -> None:
        self._reply(Rep.ACK)
        self.ended = "the client ended the handshake"

    def _list(self, _data: bytes) -> None:
        self._output = listing(self._exports)
        self._reply(Rep.ACK)

    def _info(self, data: bytes) -> None:
        self._tell(*decode_info_request(data))

    def _go(self, data: bytes) -> None:
        name, wanted = decode_info_request(data)
        self._choose(self._tell(name, wanted), name)

    def _tell(self, name: str, wanted: frozenset[int]) -> Export:
        """Tell what INFO or GO asked for, up to the ACK."""
        export = self._export(name)
        told = [kind for kind in _TOLD_IF_WANTED if _is_told(kind, export, wanted)]
        for kind in (Info.EXPORT, *told):
            self._reply(Rep.INFO, info_data(kind, export, self._flags(export)))
        if Info.BLOCK_SIZE not in wanted:
            _require_uninformed_fit(export)
        self._reply(Rep.ACK)
        return export

    def _structured_reply(self, _data: bytes) -> None:
        self._structured_replies = True
        self._reply(Rep.ACK)

    def _list_meta_context(self, data: bytes) -> None:
        _, queries = self._meta_request(data)
        if not queries or META_CONTEXT in queries or _META_NAMESPACE in queries:
            self._reply(Rep.META_CONTEXT, meta_context_data(0, META_CONTEXT))  # 0: nothing is selected
        self._reply(Rep.ACK)

    def _set_meta_context(self, data: bytes) -> None:
        name, queries = self._meta_request(data)
        if META_CONTEXT in queries:
            self._contexts, self._contexts_of = {META_CONTEXT_ID: META_CONTEXT}, name
            self._reply(Rep.META_CONTEXT, meta_context_data(META_CONTEXT_ID, META_CONTEXT))
        self._reply(Rep.ACK)

    def _meta_request(self, data: bytes) -> tuple[str, list[str]]:
        if not self._structured_replies:
            raise Refused(Rep.ERR_INVALID, "meta contexts need structured replies, which were not agreed")
        name, queries = decode_meta_request(data)
        self._export(name)
        return name, queries

    def _unwanted_data(self, _data: bytes) -> None:
        raise Refused(Rep.ERR_INVALID, "this option takes no data")

    def _too_big(self, _data: bytes) -> None:
        raise Refused(Rep.ERR_TOO_BIG, "the option is longer than this server reads")

    def _unsupported(self, _data: bytes) -> None:
        raise Refused(Rep.ERR_UNSUP, f"this server does not support option {self._option}")


def listing(exports: Mapping[str, Export]) -> bytes:
    """All exports, as LIST tells them."""
    return b"".join(reply(Option.LIST, Rep.SERVER, server_data(export)) for export in exports.values())


def data_max_bytes(option: int) -> int:
    """How much data of an option is worth keeping; of a longer one, none is."""
    return _OPTIONS.get(option, _UNSUPPORTED).data_max_bytes


def _is_told(kind: Info, export: Export, wanted: frozenset[int]) -> bool:
    """Whether information is sent: if it was asked for and there is any; unusual block sizes always."""
    if kind is Info.BLOCK_SIZE and export.block_sizes != DEFAULT_BLOCK_SIZES:
        return True
    return kind in wanted and (kind is not Info.DESCRIPTION or export.description != "")


def _require_uninformed_fit(export: Export) -> None:
    """Refuse a client that did not ask for block sizes, if even a careful one would run into them.

    The document leaves the choice: refuse it, or fail each command that does not fit. It tells a client that
    knows no sizes to keep to multiples of 512 bytes and to 32 MiB, so within these nobody is refused.
    Beyond them, a clear refusal at the start is better than a disk that fails once a guest writes to it.
    It applies to INFO as to GO, because the document wants the same answer to both.
    """
    if not export.fits_uninformed_client:
        minimum, _, maximum = export.block_sizes
        sizes = f"multiples of {minimum} bytes, at most {maximum}"
        raise Refused(Rep.ERR_BLOCK_SIZE_REQD, f"export {export.name} takes {sizes}: ask for its block sizes")


_Answer = Callable[[Negotiation, bytes], None]


@dataclass(frozen=True, slots=True)
class _Answerer:
    """Who answers an option with up to so much data, and who answers one with more."""

    answer: _Answer
    data_max_bytes: int
    answer_longer: _Answer


def _with_data(answer: _Answer, data_max_bytes: int = OPTION_MAX_BYTES) -> _Answerer:
    return _Answerer(answer, data_max_bytes, Negotiation._too_big)


def _without_data(answer: _Answer) -> _Answerer:
    return _Answerer(answer, 0, Negotiation._unwanted_data)


def _whatever_the_data(answer: _Answer) -> _Answerer:
    return _Answerer(answer, 0, answer)


# STARTTLS (5) and EXTENDED_HEADERS (11) are absent on purpose: "not supported" is the answer to both.
_OPTIONS: Final[Mapping[int, _Answerer]] = {
    Option.EXPORT_NAME: _with_data(Negotiation._export_name, STRING_MAX_BYTES),
    Option.ABORT: _whatever_the_data(Negotiation._abort),
    Option.LIST: _without_data(Negotiation._list),
    Option.INFO: _with_data(Negotiation._info),
    Option.GO: _with_data(Negotiation._go),
    Option.STRUCTURED_REPLY: _without_data(Negotiation._structured_reply),
    Option.LIST_META_CONTEXT: _with_data(Negotiation._list_meta_context),
    Option.SET_META_CONTEXT: _with_data(Negotiation._set_meta_context),
}
_UNSUPPORTED: Final = _whatever_the_data(Negotiation._unsupported)
