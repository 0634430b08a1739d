"""What is said in the NBD handshake: numbers, exports, the data of options and of replies, pure.

Invariants:
- An ``Export`` that would make a server break the protocol cannot be built.
- Reading an option's data never raises anything but ``Refused``, whatever the bytes are.

Neighbours: ``nbd_negotiation`` decides what is answered; ``dataplane`` builds the exports.
Source of every number and layout here: doc/proto.md of the NBD project (github.com/NetworkBlockDevice/nbd).
"""

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

from stortrends_ha.errors import ProtocolError
from stortrends_ha.limits import ABUSIVE_PAYLOAD_BYTES

INIT_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
REPLY_MAGIC: Final = 0x3E889045565A9

STRING_MAX_BYTES: Final = 4096
MINIMUM_BLOCK_MAX_BYTES: Final = 1 << 16
PREFERRED_BLOCK_MIN_BYTES: Final = 1 << 9
# What a client that was told no block sizes keeps to ("for maximum interoperability").
UNINFORMED_ALIGNMENT_BYTES: Final = 1 << 9
UNINFORMED_PAYLOAD_BYTES: Final = 1 << 25
DEFAULT_BLOCK_SIZES: Final = (1, 4096, UNINFORMED_PAYLOAD_BYTES)

CLIENT_FLAGS = Struct(">I")
OPTION_HEADER = Struct(">8sII")  # magic, option, length of its data
REPLY_HEADER = Struct(">QIII")  # magic, option, reply type, length of its data
EXPORT_NAME_REPLY = Struct(">QH")  # size, transmission flags; then perhaps the zeroes
EXPORT_NAME_ZEROES: Final = bytes(124)
_INFO_EXPORT = Struct(">HQH")
_INFO_BLOCK_SIZE = Struct(">HIII")
_U16 = Struct(">H")
_U32 = Struct(">I")


class HandshakeFlag(IntFlag):
    """What server and client say of themselves first; the values are the same on both sides."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """What a client may do with an export."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Option(IntEnum):
    """The options that are answered with more than "not supported"."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Rep(IntEnum):
    """Types of replies to options; errors have bit 31 set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_INVALID = 1 << 31 | 3
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9


class Info(IntEnum):
    """What INFO and GO tell of an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Refused(ProtocolError):
    """An option cannot be granted: the error reply it gets, and why in a sentence."""

    def __init__(self, reply: Rep, why: str) -> None:
        super().__init__(why)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Export:
    """A volume as clients see it.

    ``flags`` are its transmission flags without SEND_DF; the handshake adds that, and HAS_FLAGS if it is
    missing. Raises ``ValueError`` for what the protocol forbids a server to say.
    """

    name: str
    size_bytes: int
    flags: int
    minimum_block_bytes: int = 1
    preferred_block_bytes: int = 4096
    maximum_payload_bytes: int = UNINFORMED_PAYLOAD_BYTES
    description: str = ""

    def __post_init__(self) -> None:
        for wrong in (_wrong_strings(self), _wrong_flags(self), _wrong_sizes(self)):
            if wrong:
                raise ValueError(f"export {self.name!r}: {wrong}")

    @property
    def block_sizes(self) -> tuple[int, int, int]:
        """Minimum, preferred and maximum, as INFO_BLOCK_SIZE tells them."""
        return self.minimum_block_bytes, self.preferred_block_bytes, self.maximum_payload_bytes

    @property
    def fits_uninformed_client(self) -> bool:
        """Whether a careful client that was told no block sizes keeps within ours."""
        return (
            self.minimum_block_bytes <= UNINFORMED_ALIGNMENT_BYTES
            and self.maximum_payload_bytes >= UNINFORMED_PAYLOAD_BYTES
        )


def _wrong_strings(export: Export) -> str:
    texts = (export.name, export.description)
    if any(len(text.encode()) > STRING_MAX_BYTES or "\0" in text for text in texts):
        return f"a name or description has a NUL or is longer than {STRING_MAX_BYTES} bytes"
    return "" if export.name else "the name is empty"


def _wrong_flags(export: Export) -> str:
    flag = TransmissionFlag
    if not 0 <= export.flags < 1 << 16:
        return "the flags do not fit into 16 bits"
    if export.flags & flag.SEND_DF:
        return "SEND_DF depends on the client: the handshake adds it"
    if export.flags & flag.SEND_FAST_ZERO and not export.flags & flag.SEND_WRITE_ZEROES:
        return "SEND_FAST_ZERO needs SEND_WRITE_ZEROES"
    return ""


def _wrong_sizes(export: Export) -> str:
    minimum, preferred, maximum = export.block_sizes
    if not 0 <= export.size_bytes < 1 << 63:  # a size is 64 bits wide, but offsets of files are signed
        return "the size is not one that a file can have"
    if not (_is_power_of_two(minimum) and minimum <= MINIMUM_BLOCK_MAX_BYTES):
        return f"the minimum block is not a power of two up to {MINIMUM_BLOCK_MAX_BYTES}"
    if not (_is_power_of_two(preferred) and preferred >= max(minimum, PREFERRED_BLOCK_MIN_BYTES)):
        return f"the preferred block is not a power of two from {max(minimum, PREFERRED_BLOCK_MIN_BYTES)} up"
    if not preferred <= maximum <= ABUSIVE_PAYLOAD_BYTES:
        return f"the maximum payload is not between the preferred block and {ABUSIVE_PAYLOAD_BYTES}"
    if maximum % minimum or export.size_bytes % minimum:
        return "the size or the maximum payload is not a multiple of the minimum block"
    return ""


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


class OptionData:
    """Reads the data of one option from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, layout: Struct) -> int:
        """Read one number."""
        (value,) = layout.unpack(self._take(layout.size))
        return int(value)

    def string(self) -> str:
        """Read a string that is preceded by its length in 32 bits."""
        return decode_string(self._take(self.number(_U32)))

    def end(self) -> None:
        """Refuse the option if it has more data."""
        if self._at < len(self._data):
            raise Refused(Rep.ERR_INVALID, f"the option has {len(self._data) - self._at} bytes too many")

    def _take(self, size: int) -> bytes:
        missing = size - (len(self._data) - self._at)
        if missing > 0:
            raise Refused(Rep.ERR_INVALID, f"the option ends {missing} bytes too early")
        self._at += size
        return self._data[self._at - size : self._at]


def decode_string(data: bytes) -> str:
    """A string as the protocol defines it."""
    if len(data) > STRING_MAX_BYTES:
        raise Refused(Rep.ERR_INVALID, f"a string is longer than {STRING_MAX_BYTES} bytes")
    if 0 in data:
        raise Refused(Rep.ERR_INVALID, "a string contains a NUL character")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Refused(Rep.ERR_INVALID, "a string is not valid UTF-8") from None


def decode_info_request(data: bytes) -> tuple[str, frozenset[int]]:
    """The data of INFO and GO: the export's name, and which information is asked for."""
    option = OptionData(data)
    name = option.string()
    wanted = frozenset(option.number(_U16) for _ in range(option.number(_U16)))
    option.end()
    return name, wanted


def decode_meta_request(data: bytes) -> tuple[str, list[str]]:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT: the export's name, and the queries."""
    option = OptionData(data)
    name = option.string()
    queries = [option.string() for _ in range(option.number(_U32))]
    option.end()
    return name, queries


def reply(option: int, kind: Rep, data: bytes = b"") -> bytes:
    """One reply to an option."""
    return REPLY_HEADER.pack(REPLY_MAGIC, option, kind, len(data)) + data


def server_data(export: Export) -> bytes:
    """The data of a SERVER reply: one export in a list, with its description as the detail."""
    name = export.name.encode()
    return _U32.pack(len(name)) + name + export.description.encode()


def info_data(kind: Info, export: Export, flags: int) -> bytes:
    """The data of an INFO reply."""
    if kind is Info.EXPORT:
        return _INFO_EXPORT.pack(kind, export.size_bytes, flags)
    if kind is Info.BLOCK_SIZE:
        return _INFO_BLOCK_SIZE.pack(kind, *export.block_sizes)
    text = export.name if kind is Info.NAME else export.description
    return _U16.pack(kind) + text.encode()


def meta_context_data(context_id: int, name: str) -> bytes:
    """The data of a META_CONTEXT reply."""
    return _U32.pack(context_id) + name.encode()
