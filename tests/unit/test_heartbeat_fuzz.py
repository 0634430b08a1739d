"""Invariant tested: whatever is decoded, authentic or not, either is a checked message or raises ProtocolError."""

import json
from contextlib import suppress
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from test_heartbeat import KEY, MESSAGES, signed

from stortrends_ha.errors import ProtocolError
from stortrends_ha.protocol import heartbeat
from stortrends_ha.protocol.heartbeat import Answer, Ask, GroupBeat, Heartbeat, Message, decode, encode
from stortrends_ha.record import EPOCHS, Record

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", fullmatch=True)
lives, seqs = st.integers(1, 2**64 - 1), st.integers(1, 2**63 - 1)
words = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), max_size=32)


@st.composite
def records(draw: st.DrawFn) -> Record:
    owner, other = draw(names), draw(names)
    in_sync = {owner, other} if draw(st.booleans()) else {owner}
    return Record(draw(st.integers(1, EPOCHS - 1)), owner, tuple(sorted(in_sync)))


flags = st.booleans()
groups = st.builds(
    GroupBeat, names, records(), words, flags, words, flags, flags, flags, st.sampled_from(heartbeat.WANTS)
)  # fmt: skip
beats = st.builds(
    Heartbeat, names, names, lives, seqs, st.just(0) | lives, st.just(0) | seqs,
    st.lists(st.tuples(lives, seqs), max_size=16).map(tuple), flags, flags, words,
    st.lists(groups, max_size=5, unique_by=lambda group: group.name).map(tuple),
)  # fmt: skip
asks = st.builds(Ask, names, names, lives, lives, seqs, names, records(), records())
answers = st.builds(Answer, names, names, lives, lives, seqs, flags, st.none() | records())


def decode_anything(data: bytes) -> None:
    with suppress(ProtocolError):
        assert isinstance(decode(KEY, data), Heartbeat | Ask | Answer)


@given(beats | asks | answers)
def test_what_is_encoded_is_decoded(message: Message) -> None:
    assert decode(KEY, encode(KEY, message)) == message


@given(st.binary(max_size=200), st.booleans())
def test_garbage(data: bytes, with_preface: bool) -> None:
    decode_anything(heartbeat.PREFACE + data if with_preface else data)


@given(st.binary(max_size=200), st.integers(0, 255))
def test_authentic_garbage(body: bytes, kind: int) -> None:
    decode_anything(signed(body, kind))


@given(json_values, st.integers(1, 3))
def test_authentic_json(value: Any, kind: int) -> None:
    decode_anything(signed(json.dumps(value).encode(), kind))


@given(st.sampled_from(MESSAGES), st.data())
def test_one_field_anywhere_is_something_else(message: Message, data: st.DataObject) -> None:
    encoded = encode(KEY, message)
    body = json.loads(encoded[heartbeat._BODY_AT :])
    at = body
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else list(range(len(at)))))
        if not (isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans())):
            break
        at = at[key]
    at[key] = data.draw(json_values)
    decode_anything(signed(json.dumps(body).encode(), encoded[5]))
