"""The NBD handshake, option by option. Layouts are written out here, independently of the code."""

import struct
import tracemalloc

import pytest

from stortrends_ha.protocol.nbd_handshake import (
    LISTS_MAX,
    OPTION_SKIPPED_MAX_BYTES,
    OPTIONS_MAX,
    REPLIES_BASE_MAX_BYTES,
    Export,
    Handshake,
)
from stortrends_ha.protocol.nbd_negotiation import OPTION_MAX_BYTES

FIXED, NO_ZEROES = 1, 2
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META, SET_META, EXTENDED_HEADERS = (
    1, 2, 3, 5, 6, 7, 8, 9, 10, 11,
)  # fmt: skip
ACK, SERVER, REP_INFO, META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_SHUTDOWN, ERR_BLOCK_SIZE_REQD, ERR_TOO_BIG = (
    2**31 + number for number in (1, 3, 6, 7, 8, 9)
)
I_EXPORT, I_NAME, I_DESCRIPTION, I_BLOCK_SIZE = 0, 1, 2, 3
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_DF, WRITE_ZEROES, FAST_ZERO = 1, 2, 4, 128, 64, 2048

FLAGS = HAS_FLAGS | SEND_FLUSH
VM_A = Export("vm-a", 1 << 30, FLAGS, description="the first")
VM_B = Export("vm-b", 1 << 20, FLAGS | READ_ONLY)
EXPORTS = {"vm-a": VM_A, "vm-b": VM_B}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(data)) + data


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length) + data


def info_request(name: str | bytes, *wanted: int) -> bytes:
    return string(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def meta_request(name: str, *queries: str | bytes) -> bytes:
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def replies(output: bytes, asked: int) -> list[tuple[int, bytes]]:
    """The (type, data) of every reply; all must belong to the option that was asked."""
    found = []
    while output:
        magic, number, kind, length = struct.unpack_from(">QIII", output)
        assert (magic, number) == (0x3E889045565A9, asked)
        assert len(output) >= 20 + length
        found.append((kind, output[20 : 20 + length]))
        output = output[20 + length :]
    return found


class Client:
    """A client in the middle of option haggling."""

    def __init__(self, *exports: Export, flags: int = FIXED | NO_ZEROES) -> None:
        self.server = Handshake({export.name: export for export in exports} or EXPORTS)
        assert self.server.receive(struct.pack(">I", flags)) == b""

    def ask(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        return replies(self.server.receive(option(number, data)), number)

    def error(self, number: int, data: bytes = b"") -> int:
        """Ask for something that is refused without anything else being said; return the error."""
        [(kind, message)] = self.ask(number, data)
        assert kind & 1 << 31
        assert message.decode()
        return kind

    def assert_in_sync(self) -> None:
        """The connection goes on: the next option is understood."""
        assert self.server.closed is None
        assert self.ask(LIST)[-1] == (ACK, b"")


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def structured(client: Client) -> Client:
    assert client.ask(STRUCTURED_REPLY) == [(ACK, b"")]
    return client


# --- The beginning ----------------------------------------------------------------------------


def test_greeting_is_fixed_newstyle_without_zeroes_and_nothing_else() -> None:
    assert Handshake(EXPORTS).greeting == b"NBDMAGICIHAVEOPT\x00\x03"


@pytest.mark.parametrize("flags", [4, 1 << 31, FIXED | 8, 0xFFFFFFFF])
def test_unknown_client_flag_closes(flags: int) -> None:
    server = Handshake(EXPORTS)
    assert server.receive(struct.pack(">I", flags)) == b""
    assert server.closed == f"the client sent unknown flags ({flags:#010x})"
    assert server.violations == 1


@pytest.mark.parametrize("number", [ABORT, LIST, GO, STARTTLS, 99])
def test_client_without_fixed_newstyle_may_only_send_export_name(number: int) -> None:
    server = Handshake(EXPORTS)
    assert server.receive(struct.pack(">I", 0) + option(number)) == b""
    assert server.closed is not None
    assert "fixed newstyle" in server.closed


def test_something_other_than_an_option_closes(client: Client) -> None:
    assert client.server.receive(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n") == b""
    assert client.server.closed == "the client sent something that is not an option"
    assert client.server.violations == 1


def test_input_after_closing_is_ignored(client: Client) -> None:
    client.server.receive(bytes(16))
    why = client.server.closed
    assert client.server.receive(option(LIST) * 3) == b""
    assert client.server.closed == why


# --- EXPORT_NAME ------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [0, FIXED])
def test_export_name_is_followed_by_zeroes_unless_declined(fixed: int) -> None:
    description = struct.pack(">QH", 1 << 20, FLAGS | READ_ONLY)
    with_zeroes, without = Client(flags=fixed).server, Client(flags=fixed | NO_ZEROES).server
    assert with_zeroes.receive(option(EXPORT_NAME, b"vm-b")) == description + bytes(124)
    assert without.receive(option(EXPORT_NAME, b"vm-b")) == description
    assert with_zeroes.result == without.result
    assert without.result is not None
    assert without.result.export is VM_B


@pytest.mark.parametrize("name", [b"vm-c", b"vm-a\0", b"\xff", b"v" * 4097, b"v" * 5000])
def test_export_name_that_cannot_be_served_closes_without_a_word(client: Client, name: bytes) -> None:
    assert client.server.receive(option(EXPORT_NAME, name)) == b""
    assert client.server.closed is not None
    assert client.server.closed.startswith("the client's choice of an export was refused: ")


def test_export_name_after_structured_replies_carries_send_df(structured: Client) -> None:
    expected = struct.pack(">QH", 1 << 30, FLAGS | SEND_DF)
    assert structured.server.receive(option(EXPORT_NAME, b"vm-a")) == expected
    assert structured.server.result is not None
    assert structured.server.result.structured_replies


# --- ABORT, LIST, unknown options -------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"whatever", bytes(OPTION_MAX_BYTES + 1)])
def test_abort_is_acknowledged_whatever_its_data(client: Client, data: bytes) -> None:
    assert client.ask(ABORT, data) == [(ACK, b"")]
    assert client.server.closed == "the client ended the handshake"
    assert client.server.violations == 0


def test_list_names_every_export_with_its_description(client: Client) -> None:
    assert client.ask(LIST) == [(SERVER, string("vm-a") + b"the first"), (SERVER, string("vm-b")), (ACK, b"")]


def test_list_of_nothing_is_just_acknowledged() -> None:
    server = Handshake({})
    output = server.receive(struct.pack(">I", FIXED) + option(LIST))
    assert replies(output, LIST) == [(ACK, b"")]


@pytest.mark.parametrize("number", [LIST, STRUCTURED_REPLY])
@pytest.mark.parametrize("size", [1, 100, OPTION_MAX_BYTES + 1])
def test_data_in_an_option_that_takes_none_is_invalid(client: Client, number: int, size: int) -> None:
    assert client.error(number, bytes(size)) == ERR_INVALID
    assert client.server.violations == 1
    client.assert_in_sync()


def test_refused_structured_reply_is_not_agreed(client: Client) -> None:
    client.error(STRUCTURED_REPLY, b"x")
    client.ask(GO, info_request("vm-a"))
    assert client.server.result is not None
    assert not client.server.result.structured_replies


@pytest.mark.parametrize("number", [0, 4, 12, 99, 0xFFFFFFFF])
@pytest.mark.parametrize("size", [0, 5, OPTION_MAX_BYTES + 1])
def test_unknown_option_is_unsupported_and_its_data_skipped(client: Client, number: int, size: int) -> None:
    assert client.error(number, b"IHAVEOPT".ljust(size, b"\1")[:size]) == ERR_UNSUP
    client.assert_in_sync()


@pytest.mark.parametrize("data", [b"", b"unexpected"])
def test_starttls_is_unsupported(client: Client, data: bytes) -> None:
    assert client.error(STARTTLS, data) == ERR_UNSUP
    client.assert_in_sync()


def test_extended_headers_are_unsupported(client: Client) -> None:
    assert client.error(EXTENDED_HEADERS) == ERR_UNSUP
    client.assert_in_sync()


# --- INFO and GO ------------------------------------------------------------------------------


def told(answers: list[tuple[int, bytes]]) -> dict[int, bytes]:
    """The information told in a granted INFO or GO, by type."""
    *information, last = answers
    assert last == (ACK, b"")
    assert all(kind == REP_INFO for kind, _ in information)
    assert len({data[:2] for _, data in information}) == len(information)
    return {int.from_bytes(data[:2]): data[2:] for _, data in information}


@pytest.mark.parametrize("number", [INFO, GO])
def test_size_and_flags_are_told_even_if_nothing_is_asked(client: Client, number: int) -> None:
    assert told(client.ask(number, info_request("vm-b"))) == {I_EXPORT: struct.pack(">QH", 1 << 20, FLAGS | READ_ONLY)}


@pytest.mark.parametrize("number", [INFO, GO])
def test_everything_asked_for_is_told(client: Client, number: int) -> None:
    wanted = (I_BLOCK_SIZE, I_DESCRIPTION, I_NAME, I_EXPORT)
    assert told(client.ask(number, info_request("vm-a", *wanted))) == {
        I_EXPORT: struct.pack(">QH", 1 << 30, FLAGS),
        I_NAME: b"vm-a",
        I_DESCRIPTION: b"the first",
        I_BLOCK_SIZE: struct.pack(">III", 1, 4096, 32 << 20),
    }


def test_description_is_left_out_if_there_is_none(client: Client) -> None:
    assert I_DESCRIPTION not in told(client.ask(INFO, info_request("vm-b", I_DESCRIPTION)))


@pytest.mark.parametrize("wanted", [[77], [4, 65535], [I_NAME, 9, I_NAME]])
def test_unknown_and_repeated_information_requests_are_ignored(client: Client, wanted: list[int]) -> None:
    assert told(client.ask(INFO, info_request("vm-a", *wanted))).keys() <= {I_EXPORT, I_NAME}


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize("name", ["vm-c", "VM-A", "vm-a ", "v" * 4096])
def test_unknown_export_is_said_to_be_unknown(client: Client, number: int, name: str) -> None:
    assert client.error(number, info_request(name)) == ERR_UNKNOWN
    assert client.server.result is None
    assert client.server.violations == 0
    client.assert_in_sync()


def test_empty_name_means_the_first_export_and_its_name_is_told(client: Client) -> None:
    assert told(client.ask(GO, info_request("", I_NAME)))[I_NAME] == b"vm-a"
    assert client.server.result is not None
    assert client.server.result.export is VM_A


def test_empty_name_is_unknown_where_there_is_no_export() -> None:
    server = Handshake({})
    output = server.receive(struct.pack(">I", FIXED) + option(GO, info_request("")))
    assert [kind for kind, _ in replies(output, GO)] == [ERR_UNKNOWN]


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        struct.pack(">I", 0),  # no count
        struct.pack(">I", 4) + b"vm-a" + b"\0",  # half a count
        struct.pack(">I", 5) + b"vm-a" + b"\0\0",  # the name takes from the count
        struct.pack(">I", 7) + b"vm-a" + b"\0\0",  # CVE-2022-26495: the name is longer than the data
        struct.pack(">I", 0xFFFFFFFF) + b"vm-a" + b"\0\0",
        struct.pack(">I", 4) + b"vm-a" + struct.pack(">H", 1),  # a request is missing
        info_request("vm-a", 0) + b"\0",
        info_request(b"vm\0a"),
        info_request(b"vm-\xff"),
        info_request(b"v" * 4097),
    ],
)
def test_malformed_info_and_go_are_invalid(client: Client, number: int, data: bytes) -> None:
    assert client.error(number, data) == ERR_INVALID
    assert client.server.result is None
    assert client.server.violations == 1
    client.assert_in_sync()


@pytest.mark.parametrize("number", [INFO, GO, LIST_META, SET_META])
def test_too_long_an_option_is_refused_and_skipped(structured: Client, number: int) -> None:
    assert structured.error(number, bytes(OPTION_MAX_BYTES + 1)) == ERR_TOO_BIG
    structured.assert_in_sync()


@pytest.mark.parametrize("wanted", [(), (I_BLOCK_SIZE,), (I_NAME, I_DESCRIPTION, I_EXPORT)])
def test_info_and_then_go_tell_the_same(structured: Client, wanted: tuple[int, ...]) -> None:
    request = info_request("vm-a", *wanted)
    assert structured.ask(INFO, request) == structured.ask(GO, request)


def test_info_does_not_end_the_handshake(client: Client) -> None:
    client.ask(INFO, info_request("vm-a"))
    assert client.server.result is None
    client.assert_in_sync()


@pytest.mark.parametrize("flags", [FIXED, FIXED | NO_ZEROES])
def test_go_ends_with_its_ack_and_leaves_the_rest_of_the_input(flags: int) -> None:
    server = Client(flags=flags).server
    output = server.receive(option(GO, info_request("vm-a")) + b"\x25\x60\x95\x13 the first request")
    assert replies(output, GO)[-1] == (ACK, b"")
    assert server.result is not None
    assert server.result.leftover == b"\x25\x60\x95\x13 the first request"


def test_input_for_the_transmission_phase_is_not_swallowed(client: Client) -> None:
    client.ask(GO, info_request("vm-a"))
    with pytest.raises(RuntimeError):
        client.server.receive(b"a request")


# --- Block sizes ------------------------------------------------------------------------------

SECTORS = Export("sectors", 1 << 20, FLAGS, 512, 4096, 32 << 20)
PAGES = Export("pages", 1 << 20, FLAGS, 4096, 65536, 32 << 20)
SHORT = Export("short", 1 << 20, FLAGS, 1, 4096, 1 << 20)


@pytest.mark.parametrize("export", [SECTORS, PAGES, SHORT])
@pytest.mark.parametrize("number", [INFO, GO])
def test_block_sizes_are_told_to_who_asks(export: Export, number: int) -> None:
    expected = struct.pack(
        ">III", export.minimum_block_bytes, export.preferred_block_bytes, export.maximum_payload_bytes
    )
    assert told(Client(export).ask(number, info_request("", I_BLOCK_SIZE)))[I_BLOCK_SIZE] == expected


@pytest.mark.parametrize("number", [INFO, GO])
def test_unusual_block_sizes_are_told_to_a_client_that_did_not_ask(number: int) -> None:
    assert I_BLOCK_SIZE in told(Client(SECTORS).ask(number, info_request("sectors")))


@pytest.mark.parametrize("export", [PAGES, SHORT])
@pytest.mark.parametrize("number", [INFO, GO])
def test_sizes_that_an_uninformed_client_would_break_must_be_asked_for(export: Export, number: int) -> None:
    client = Client(export)
    *information, (kind, _) = client.ask(number, info_request(export.name, I_NAME))
    assert kind == ERR_BLOCK_SIZE_REQD
    assert I_BLOCK_SIZE in [int.from_bytes(data[:2]) for _, data in information]
    assert client.server.result is None
    client.ask(GO, info_request(export.name, I_BLOCK_SIZE))
    assert client.server.result is not None


@pytest.mark.parametrize("export", [PAGES, SHORT])
def test_export_name_of_such_an_export_closes(export: Export) -> None:
    server = Client(export).server
    assert server.receive(option(EXPORT_NAME, export.name.encode())) == b""
    assert server.closed is not None
    assert "ask for its block sizes" in server.closed
    assert server.violations == 0


def test_export_name_of_an_export_with_sectors_is_served() -> None:
    client = Client(SECTORS)
    client.server.receive(option(EXPORT_NAME, b"sectors"))
    assert client.server.result is not None


@pytest.mark.parametrize(
    ("minimum", "preferred", "maximum"),
    [
        (0, 4096, 1 << 20),
        (3, 4096, 3 << 20),
        (1 << 17, 1 << 17, 1 << 20),
        (1, 256, 1 << 20),
        (1, 5000, 1 << 20),
        (8192, 4096, 1 << 20),
        (1, 4096, 2048),
        (512, 4096, 5000),
        (1, 4096, (32 << 20) + 1),  # a write of that would close the connection
    ],
)
def test_export_with_block_sizes_that_must_not_be_told_cannot_be_made(
    minimum: int, preferred: int, maximum: int
) -> None:
    with pytest.raises(ValueError, match="vm"):
        Export("vm", 1 << 20, FLAGS, minimum, preferred, maximum)


def test_export_whose_size_is_no_multiple_of_its_minimum_block_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="multiple"):
        Export("vm", 1000, FLAGS, 512)


# --- Structured replies and transmission flags ------------------------------------------------


def flags_told(client: Client, name: str) -> int:
    return int.from_bytes(told(client.ask(INFO, info_request(name)))[I_EXPORT][8:])


def test_send_df_is_told_only_once_structured_replies_are_agreed(client: Client) -> None:
    assert not flags_told(client, "vm-a") & SEND_DF
    assert client.ask(STRUCTURED_REPLY) == [(ACK, b"")]
    assert flags_told(client, "vm-a") & SEND_DF


def test_structured_replies_may_be_asked_for_again(structured: Client) -> None:
    assert structured.ask(STRUCTURED_REPLY) == [(ACK, b"")]
    structured.ask(GO, info_request("vm-a"))
    assert structured.server.result is not None
    assert structured.server.result.structured_replies


def test_has_flags_is_always_told() -> None:
    assert flags_told(Client(Export("vm", 1, 0)), "vm") == HAS_FLAGS


def test_read_only_is_told(client: Client) -> None:
    assert flags_told(client, "vm-b") & READ_ONLY
    assert not flags_told(client, "vm-a") & READ_ONLY


@pytest.mark.parametrize("flags", [-1, 1 << 16, SEND_DF | HAS_FLAGS, FAST_ZERO | HAS_FLAGS])
def test_export_with_flags_that_must_not_be_told_cannot_be_made(flags: int) -> None:
    with pytest.raises(ValueError, match="vm"):
        Export("vm", 1 << 20, flags)


def test_export_with_fast_zero_and_write_zeroes_can_be_made() -> None:
    assert Export("vm", 1, FAST_ZERO | WRITE_ZEROES).flags == FAST_ZERO | WRITE_ZEROES


@pytest.mark.parametrize(("name", "text"), [("", ""), ("a\0b", ""), ("v" * 4097, ""), ("vm", "\0"), ("vm", "ä" * 2049)])
def test_export_with_strings_that_must_not_be_told_cannot_be_made(name: str, text: str) -> None:
    with pytest.raises(ValueError, match="export"):
        Export(name, 1, FLAGS, description=text)


@pytest.mark.parametrize("size_bytes", [-1, 1 << 63])
def test_export_with_an_impossible_size_cannot_be_made(size_bytes: int) -> None:
    with pytest.raises(ValueError, match="size"):
        Export("vm", size_bytes, FLAGS)


# --- Meta contexts ----------------------------------------------------------------------------

LISTED = (META_CONTEXT, struct.pack(">I", 0) + b"base:allocation")
SELECTED = (META_CONTEXT, struct.pack(">I", 1) + b"base:allocation")
ACKED = (ACK, b"")


@pytest.mark.parametrize("number", [LIST_META, SET_META])
def test_meta_contexts_need_structured_replies(client: Client, number: int) -> None:
    assert client.error(number, meta_request("vm-a", "base:allocation")) == ERR_INVALID
    client.assert_in_sync()


@pytest.mark.parametrize(
    ("queries", "listed"),
    [
        ([], True),
        (["base:allocation"], True),
        (["base:"], True),
        (["base:", "base:allocation", "base:allocation"], True),
        (["base:other"], False),
        (["base"], False),
        ([""], False),
        (["qemu:dirty-bitmap:x", "x-y:"], False),
        (["qemu:allocation-depth", "base:allocation"], True),
    ],
)
def test_listing_meta_contexts(structured: Client, queries: list[str], listed: bool) -> None:
    expected = [LISTED, ACKED] if listed else [ACKED]
    assert structured.ask(LIST_META, meta_request("vm-a", *queries)) == expected


@pytest.mark.parametrize(
    ("queries", "selected"),
    [
        ([], False),
        (["base:allocation"], True),
        (["base:allocation", "base:allocation"], True),
        (["base:"], False),
        (["base:other", "qemu:x", "", "BASE:allocation"], False),
        (["x-y:z", "base:allocation"], True),
    ],
)
def test_selecting_meta_contexts(structured: Client, queries: list[str], selected: bool) -> None:
    expected = [SELECTED, ACKED] if selected else [ACKED]
    assert structured.ask(SET_META, meta_request("vm-a", *queries)) == expected
    structured.ask(GO, info_request("vm-a"))
    assert structured.server.result is not None
    assert structured.server.result.contexts == ({1: "base:allocation"} if selected else {})


@pytest.mark.parametrize("number", [LIST_META, SET_META])
def test_meta_contexts_of_an_unknown_export(structured: Client, number: int) -> None:
    assert structured.error(number, meta_request("vm-c", "base:allocation")) == ERR_UNKNOWN
    structured.assert_in_sync()


MALFORMED_META = [
    b"",
    b"\0\0\0\x04vm",
    string("vm-a"),
    string("vm-a") + b"\0\0",
    string("vm-a") + struct.pack(">I", 1),
    string("vm-a") + struct.pack(">I", 0xFFFFFFFF),
    string("vm-a") + struct.pack(">II", 1, 15) + b"base:alloc",
    string("vm-a") + struct.pack(">II", 1, 0xFFFFFFFF) + b"base:allocation",
    meta_request("vm-a", "base:allocation") + b"\0",
    meta_request("vm-a", b"base:\0"),
    meta_request("vm-a", b"base:\xff"),
    meta_request("vm-a", b"q" * 4097),
    meta_request("v" * 4097),
]


@pytest.mark.parametrize("number", [LIST_META, SET_META])
@pytest.mark.parametrize("data", MALFORMED_META)
def test_malformed_meta_context_options_are_invalid(structured: Client, number: int, data: bytes) -> None:
    assert structured.error(number, data) == ERR_INVALID
    structured.assert_in_sync()


@pytest.mark.parametrize(
    "second",
    [
        meta_request("vm-a"),
        meta_request("vm-a", "base:"),
        meta_request("vm-c", "base:allocation"),
        b"malformed",
        bytes(OPTION_MAX_BYTES + 1),
    ],
)
def test_selecting_again_replaces_the_choice_even_when_it_fails(structured: Client, second: bytes) -> None:
    structured.ask(SET_META, meta_request("vm-a", "base:allocation"))
    structured.ask(SET_META, second)
    structured.ask(GO, info_request("vm-a"))
    assert structured.server.result is not None
    assert structured.server.result.contexts == {}


def test_listing_does_not_change_the_choice(structured: Client) -> None:
    structured.ask(SET_META, meta_request("vm-a", "base:allocation"))
    structured.ask(LIST_META, meta_request("vm-b"))
    structured.ask(GO, info_request("vm-a"))
    assert structured.server.result is not None
    assert structured.server.result.contexts == {1: "base:allocation"}


def test_contexts_selected_for_another_export_are_not_usable(structured: Client) -> None:
    structured.ask(SET_META, meta_request("vm-a", "base:allocation"))
    structured.ask(GO, info_request("vm-b"))
    assert structured.server.result is not None
    assert structured.server.result.contexts == {}


def test_contexts_are_usable_after_export_name_too(structured: Client) -> None:
    structured.ask(SET_META, meta_request("", "base:allocation"))
    structured.server.receive(option(EXPORT_NAME))
    assert structured.server.result is not None
    assert structured.server.result.contexts == {1: "base:allocation"}


# --- Shutting down ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [LIST, INFO, GO, STRUCTURED_REPLY, LIST_META, SET_META, STARTTLS, 99])
@pytest.mark.parametrize("data", [b"", info_request("vm-a")])
def test_options_are_refused_while_shutting_down(client: Client, number: int, data: bytes) -> None:
    client.server.shut_down()
    assert client.error(number, data) == ERR_SHUTDOWN
    assert client.server.closed is None
    assert client.server.violations == 0


def test_abort_is_acknowledged_while_shutting_down(client: Client) -> None:
    client.server.shut_down()
    assert client.ask(ABORT) == [(ACK, b"")]


def test_export_name_closes_while_shutting_down(client: Client) -> None:
    client.server.shut_down()
    assert client.server.receive(option(EXPORT_NAME, b"vm-a")) == b""
    assert client.server.closed is not None
    assert client.server.closed.endswith("the server is shutting down")


def test_option_that_is_still_arriving_when_shutting_down_is_refused(client: Client) -> None:
    go = option(GO, info_request("vm-a"))
    client.server.receive(go[:-1])
    client.server.shut_down()
    assert [kind for kind, _ in replies(client.server.receive(go[-1:]), GO)] == [ERR_SHUTDOWN]


# --- Bounds -----------------------------------------------------------------------------------


def test_a_client_that_never_chooses_is_closed(client: Client) -> None:
    for _ in range(OPTIONS_MAX):
        client.error(99)
    assert client.server.receive(option(GO, info_request("vm-a"))) == b""
    assert client.server.closed == f"the client has not chosen an export after {OPTIONS_MAX} options"


def test_a_client_may_look_at_every_export_of_a_large_server() -> None:
    exports = [Export(f"vm-{number:060}", 1 << 30, FLAGS, description="x" * 100) for number in range(500)]
    client = Client(*exports)
    assert len(client.ask(LIST)) == 501
    for export in exports:
        told(client.ask(INFO, info_request(export.name, I_NAME, I_DESCRIPTION, I_BLOCK_SIZE)))
    told(client.ask(GO, info_request(exports[-1].name)))


def test_replies_to_a_client_that_only_lists_are_bounded() -> None:
    exports = [Export(f"vm-{number}", 1 << 30, FLAGS, description="x" * 4000) for number in range(100)]
    client = Client(*exports)
    one = len(Client(*exports).server.receive(option(LIST)))
    output = client.server.receive(option(LIST) * OPTIONS_MAX)
    assert client.server.closed is not None
    assert LISTS_MAX * one <= len(output) <= (LISTS_MAX + 1) * one + REPLIES_BASE_MAX_BYTES


def test_an_abusive_length_closes_at_once(client: Client) -> None:
    assert client.server.receive(option(99, length=OPTION_SKIPPED_MAX_BYTES + 1)) == b""
    assert client.server.closed == f"the client sent an option of {OPTION_SKIPPED_MAX_BYTES + 1} bytes"


@pytest.mark.parametrize("number", [EXPORT_NAME, ABORT, LIST, GO, SET_META, 99])
def test_the_data_of_a_long_option_is_not_kept(client: Client, number: int) -> None:
    piece = bytes(64 << 10)
    client.server.receive(option(number, length=len(piece) * 128))
    tracemalloc.start()
    try:
        for _ in range(127):
            assert client.server.receive(piece) == b""
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * len(piece)
