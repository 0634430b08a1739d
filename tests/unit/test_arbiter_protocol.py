"""What a node and a witness say to each other: only what is genuine, whole, new and in order is read."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stortrends_ha.errors import ProtocolError
from stortrends_ha.protocol.witness import (
    CLIENT,
    LINE_BYTES_MAX,
    WITNESS,
    Answer,
    ClientHello,
    Force,
    Open,
    Propose,
    Read,
    Refusal,
    Seal,
    Seed,
    WitnessHello,
    decode_answer,
    decode_reply,
    decode_request,
    encode_answer,
    encode_request,
)
from stortrends_ha.record import Record

KEY = b"k" * 32
HELLO = ClientHello("test", "node-a", b"c" * 16).encode()
REPLY = WitnessHello(b"w" * 16, 1).encode()
RECORD = Record(5, "node-a", ("node-a", "node-b"))


def ends(key: bytes = KEY) -> tuple[Seal, Seal]:
    return Seal(key, HELLO, REPLY, CLIENT), Seal(KEY, HELLO, REPLY, WITNESS)


class TestSeal:
    def test_both_directions(self) -> None:
        client, witness = ends()
        for number in range(3):
            assert witness.open(client.seal({"ask": number})) == {"ask": number}
            assert client.open(witness.seal({"say": number})) == {"say": number}

    def test_another_key(self) -> None:
        client, witness = ends(b"x" * 32)
        with pytest.raises(ProtocolError, match="not sealed"):
            witness.open(client.seal({}))

    def test_a_replayed_line(self) -> None:
        client, witness = ends()
        line = client.seal({})
        witness.open(line)
        with pytest.raises(ProtocolError):
            witness.open(line)

    def test_a_line_left_out(self) -> None:
        client, witness = ends()
        client.seal({})
        with pytest.raises(ProtocolError):
            witness.open(client.seal({}))

    def test_a_line_sent_back_to_its_sender(self) -> None:
        client, _ = ends()
        with pytest.raises(ProtocolError):
            client.open(client.seal({}))

    @pytest.mark.parametrize(
        "hello", [ClientHello("test", "node-a", b"d" * 16), ClientHello("tesT", "node-a", b"c" * 16)]
    )
    def test_a_line_of_another_connection(self, hello: ClientHello) -> None:
        other = Seal(KEY, hello.encode(), REPLY, CLIENT)
        with pytest.raises(ProtocolError):
            ends()[1].open(other.seal({}))

    def test_a_line_for_another_witness(self) -> None:
        other = Seal(KEY, HELLO, WitnessHello(b"v" * 16, 1).encode(), CLIENT)
        with pytest.raises(ProtocolError):
            ends()[1].open(other.seal({}))

    def test_a_changed_body(self) -> None:
        client, witness = ends()
        line = json.loads(client.seal({"answer": "refused"}))
        line["body"] = line["body"].replace("refused", "granted")
        with pytest.raises(ProtocolError):
            witness.open(json.dumps(line).encode())

    def test_the_counter_is_its_own_and_not_what_the_line_says(self) -> None:
        client, witness = ends()
        line = client.seal({})
        witness.open(line)
        again = {**json.loads(line), "n": 2}
        with pytest.raises(ProtocolError):
            witness.open(json.dumps(again).encode())

    @given(st.binary(max_size=200))
    def test_garbage(self, line: bytes) -> None:
        with pytest.raises(ProtocolError):
            ends()[1].open(line)


class TestBodies:
    @pytest.mark.parametrize(
        "request_",
        [
            Open(),
            Read("g"),
            Propose("g", RECORD, RECORD.owned_alone("node-b")),
            Seed("g", RECORD),
            Force("g", RECORD, "why"),
        ],
    )
    def test_requests(self, request_: Open | Read | Propose | Seed | Force) -> None:
        assert decode_request(encode_request(request_)) == request_

    @pytest.mark.parametrize(
        "answer",
        [Answer("welcome"), Answer("granted"), Answer("refused", RECORD), Answer("known"), Answer("error", why="disk")],
    )
    def test_answers(self, answer: Answer) -> None:
        assert decode_answer(encode_answer(answer)) == answer

    @pytest.mark.parametrize(
        "body",
        [
            {},
            {"request": "grant"},
            {"request": ["read"]},
            {"request": "read"},
            {"request": "read", "group": ""},
            {"request": "read", "group": "g" * 65},
            {"request": "read", "group": "g\n"},
            {"request": "seed", "group": "g", "record": {"epoch": True, "owner": "a", "in_sync": ["a"]}},
            {"request": "seed", "group": "g", "record": {"epoch": 1, "owner": "a", "in_sync": ["b"]}},
            {"request": "propose", "group": "g", "old": RECORD.encode(), "new": RECORD.encode()},
            {"request": "force", "group": "g", "record": RECORD.encode(), "note": "two\nlines"},
            {"request": "force", "group": "g", "record": RECORD.encode(), "note": "n" * 501},
        ],
    )
    def test_wrong_requests(self, body: dict[str, object]) -> None:
        with pytest.raises(ProtocolError):
            decode_request(body)

    @given(
        st.dictionaries(st.sampled_from(["answer", "current", "why"]), st.sampled_from(["granted", 1, None, {}, []]))
    )
    def test_odd_answers(self, body: dict[str, object]) -> None:
        with contextlib.suppress(ProtocolError):
            assert decode_answer(body).kind == "granted"


class TestHellos:
    def test_round_trip(self) -> None:
        assert ClientHello.decode(HELLO) == ClientHello("test", "node-a", b"c" * 16)
        assert decode_reply(REPLY) == WitnessHello(b"w" * 16, 1)
        assert decode_reply(Refusal("No.").encode()) == Refusal("No.")

    def test_a_refusal_is_one_short_line_for_a_terminal(self) -> None:
        refusal = decode_reply(Refusal("\x1b[2J" + "x" * 5000).encode())
        assert isinstance(refusal, Refusal)
        assert refusal.sentence.isprintable()
        assert len(refusal.sentence) < 600

    @pytest.mark.parametrize(("versions", "version"), [((1, 1), 1), ((1, 9), 1), ((2, 9), None), ((0, 0), None)])
    def test_versions(self, versions: tuple[int, int], version: int | None) -> None:
        assert ClientHello("c", "n", b"c" * 16, versions).version == version

    @given(st.binary(max_size=300))
    def test_garbage(self, line: bytes) -> None:
        for decode in (ClientHello.decode, decode_reply):
            with pytest.raises(ProtocolError):
                decode(line)

    def test_deep_and_long_lines(self) -> None:
        for line in (
            b"[" * LINE_BYTES_MAX,
            b'{"hello":"' + b"x" * LINE_BYTES_MAX,
            b"9" * 10000,
            b'{"hello":{"hello":1}}',
        ):
            with pytest.raises(ProtocolError):
                ClientHello.decode(line)
