"""Invariants tested: the NBD handshake answers the same however its input is cut, it never raises, and
every valid client gets what it negotiated.

Clients are made of whole options, right, nearly right and wrong; then their bytes are cut or damaged.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hypothesis import example, given
from hypothesis import strategies as st

from stortrends_ha.protocol.nbd_handshake import Export, Handshake, Negotiated

EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED_REPLY, LIST_META, SET_META = 1, 2, 3, 6, 7, 8, 9, 10
ACK, META_CONTEXT = 1, 4
SEND_DF = 128

EXPORTS = {
    "a": Export("a", 1 << 30, 1, description="the first"),
    "ö": Export("ö", 1 << 20, 3, 512, 4096, 32 << 20),
    "pages": Export("pages", 1 << 20, 1, 4096, 4096, 1 << 20),
}


# --- Clients ----------------------------------------------------------------------------------


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def option(number: int, data: bytes) -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def info_request(name: bytes, wanted: list[int]) -> bytes:
    return string(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def meta_request(name: bytes, queries: list[bytes]) -> bytes:
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


known_names = st.sampled_from(["", *EXPORTS]).map(str.encode)
names = known_names | st.sampled_from([b"nobody", b"\xff", b"a\0", b"n" * 4097])
information = st.lists(st.sampled_from([0, 1, 2, 3, 4, 65535]), max_size=5, unique=True)
queries = st.lists(st.sampled_from([b"base:allocation", b"base:", b"base:x", b"", b"qemu:x", b"q" * 4097]), max_size=4)
numbers = st.sampled_from(range(13)) | st.integers(0, 2**32 - 1)
info_requests = st.builds(info_request, names, information)
meta_requests = st.builds(meta_request, names, queries)
options = st.one_of(
    st.builds(option, st.sampled_from([INFO, GO]), info_requests),
    st.builds(option, st.sampled_from([LIST_META, SET_META]), meta_requests),
    st.builds(option, st.just(EXPORT_NAME), names),
    st.builds(option, st.sampled_from([ABORT, LIST, STRUCTURED_REPLY]), st.just(b"")),
    st.builds(option, numbers, info_requests | meta_requests | st.binary(max_size=50)),
    st.builds(option, numbers, st.sampled_from([5000, 65536, 65537, 100_000]).map(bytes)),
)
client_flags = st.sampled_from([3, 3, 3, 1, 2, 0, 7]).map(lambda flags: struct.pack(">I", flags))
# Most options that come first leave the handshake open, so that later ones are reached.
harmless = st.sampled_from([option(STRUCTURED_REPLY, b""), option(LIST, b""), option(99, b"?")])
streams = st.builds(
    lambda flags, first, then, rest: flags + b"".join(first) + b"".join(then) + rest,
    client_flags,
    st.lists(harmless, max_size=2),
    st.lists(options, max_size=5),
    st.binary(max_size=40),
)


# --- However the input is cut -----------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """All that can be seen of a handshake."""

    output: bytes
    result: Negotiated | None
    closed: str | None
    violations: int


def outcome(pieces: Iterator[bytes]) -> Outcome:
    """Feed a handshake piece by piece; what comes after the end of it belongs to the leftover."""
    server = Handshake(EXPORTS)
    output = b""
    for piece in pieces:
        output += server.receive(piece)
        if server.result:
            break
    assert server.result is None or server.closed is None
    result = server.result and replace(server.result, leftover=server.result.leftover + b"".join(pieces))
    return Outcome(output, result, server.closed, server.violations)


def cut(stream: bytes, cuts: list[int]) -> Iterator[bytes]:
    at = 0
    for end in [*sorted(min(end, len(stream)) for end in cuts), len(stream)]:
        yield stream[at:end]
        at = end


def byte_by_byte(stream: bytes) -> Iterator[bytes]:
    return (stream[at : at + 1] for at in range(len(stream)))


@given(streams.filter(lambda stream: len(stream) < 20_000))
@example(b"\0\0\0\3" + option(GO, info_request(b"a", [])) + b"a request")
@example(b"\0\0\0\3" + option(ABORT, b"") + b"more")
def test_byte_by_byte_is_the_same_as_at_once(stream: bytes) -> None:
    assert outcome(byte_by_byte(stream)) == outcome(iter([stream]))


@given(streams, st.lists(st.integers(0, 2000) | st.integers(0, 200_000), max_size=10))
def test_any_pieces_are_the_same_as_at_once(stream: bytes, cuts: list[int]) -> None:
    assert outcome(cut(stream, cuts)) == outcome(iter([stream]))


# --- Whatever the input is --------------------------------------------------------------------


def assert_sane(seen: Outcome) -> None:
    """It went on, ended well, or closed with a sentence; and said nothing but whole replies or an export."""
    assert seen.closed is None or len(seen.closed) > 10
    assert_well_formed(seen.output, ended_by_name=seen.result is not None)


def assert_well_formed(output: bytes, ended_by_name: bool) -> None:
    while output.startswith(struct.pack(">Q", 0x3E889045565A9)):
        (length,) = struct.unpack_from(">I", output, 16)
        assert length <= len(output) - 20
        output = output[20 + length :]
    assert output == b"" or (ended_by_name and len(output) in (10, 10 + 124))


@given(st.binary(max_size=300))
def test_noise_is_survived(noise: bytes) -> None:
    assert_sane(outcome(iter([noise])))


@given(st.lists(st.builds(option, numbers, st.binary(max_size=60)), max_size=20).map(b"".join))
def test_options_full_of_noise_are_survived(stream: bytes) -> None:
    seen = outcome(iter([b"\0\0\0\3", option(STRUCTURED_REPLY, b""), stream]))
    assert_sane(seen)


@given(streams, st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_clients_are_survived(stream: bytes, damage: list[tuple[int, int]]) -> None:
    damaged = bytearray(stream)
    for at, value in damage:
        damaged[at % len(damaged)] = value
    assert_sane(outcome(iter([bytes(damaged)])))


@given(streams, st.integers(0, 500))
def test_truncated_clients_leave_it_waiting_or_over(stream: bytes, end: int) -> None:
    whole, part = outcome(iter([stream])), outcome(iter([stream[:end]]))
    assert whole.output.startswith(part.output)
    assert part.closed in (None, whole.closed)


# --- Valid clients get what they negotiated ----------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One valid option and the name and queries in it."""

    number: int
    name: bytes = b""
    wanted: tuple[int, ...] = ()
    queries: tuple[bytes, ...] = ()

    @property
    def encoded(self) -> bytes:
        if self.number in (INFO, GO):
            return option(self.number, info_request(self.name, list(self.wanted)))
        if self.number in (LIST_META, SET_META):
            return option(self.number, meta_request(self.name, list(self.queries)))
        return option(self.number, b"")


valid_wanted = st.lists(st.sampled_from([0, 1, 2]), unique=True).map(lambda some: (*some, 3))
valid_queries = st.lists(
    st.sampled_from([b"base:allocation", b"base:", b"qemu:dirty-bitmap:b", b"x-y:z"]), max_size=3
).map(tuple)
valid_steps = st.one_of(
    st.builds(Step, st.just(LIST)),
    st.builds(Step, st.just(INFO), known_names, valid_wanted),
    st.builds(Step, st.sampled_from([LIST_META, SET_META]), known_names, queries=valid_queries),
)
valid_goes = st.builds(Step, st.just(GO), known_names, valid_wanted)


def reply_types(output: bytes, asked: int) -> list[int]:
    found = []
    while output:
        magic, number, kind, length = struct.unpack_from(">QIII", output)
        assert (magic, number) == (0x3E889045565A9, asked)
        found.append(kind)
        output = output[20 + length :]
    return found


@given(st.booleans(), st.lists(valid_steps, max_size=6), valid_goes)
def test_valid_clients_get_what_they_negotiated(structured: bool, steps: list[Step], go: Step) -> None:
    server = Handshake(EXPORTS)
    server.receive(b"\0\0\0\3")
    if structured:
        server.receive(Step(STRUCTURED_REPLY).encoded)
    steps = [step for step in steps if structured or step.number not in (LIST_META, SET_META)]
    contexts, contexts_of = {}, b""
    for step in steps:
        kinds = reply_types(server.receive(step.encoded), step.number)
        assert kinds[-1] == ACK
        assert all(1 < kind < 5 for kind in kinds[:-1])
        if step.number == SET_META:
            contexts = {1: "base:allocation"} if b"base:allocation" in step.queries else {}
            contexts_of = step.name
            assert kinds.count(META_CONTEXT) == len(contexts)
    output = server.receive(go.encoded)
    assert reply_types(output, GO)[-1] == ACK
    assert bool(flags_in(output) & SEND_DF) == structured
    assert server.violations == 0
    assert server.result == Negotiated(
        export=EXPORTS[go.name.decode() or "a"],
        structured_replies=structured,
        contexts=contexts if go.name == contexts_of else {},
    )


def flags_in(output: bytes) -> int:
    """The transmission flags in the INFO_EXPORT that every granted INFO or GO begins with."""
    kind, _, flags = struct.unpack_from(">HQH", output, 20)
    assert kind == 0
    return int(flags)


@given(st.lists(valid_steps, max_size=4), st.lists(valid_steps | valid_goes, min_size=1, max_size=4))
def test_nobody_gets_in_once_it_is_shutting_down(before: list[Step], after: list[Step]) -> None:
    server = Handshake(EXPORTS)
    server.receive(b"\0\0\0\3")
    for step in before:
        server.receive(step.encoded)
    server.shut_down()
    for step in after:
        assert reply_types(server.receive(step.encoded), step.number) == [2**31 + 7]
    assert server.result is None
    assert server.closed is None
