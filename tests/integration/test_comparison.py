"""Rule 10 in a real data process whose owner is spoken by hand: what it says of itself and its data may be anything."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_process import DataProcess, OrderRefused, Pair
from files import MIB
from harness import OWNER as A
from harness import SECONDARY as B
from link_peer import hello, opening, receive
from nbd_raw import is_closed

from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Frame, Kind
from stortrends_ha.record import Record

ALONE = Record(7, A, (A,))
ANOTHER = "1" * 32
SIZE = 16 * MIB
PAST = wire.encode_object(Kind.INSPECT, 7, {"lineages": ["made there"], "records": ["of old", 7], "more": 1})
NOTHING_OVERWRITTEN = "nothing was overwritten"


@dataclass
class Loser:
    """A secondary with data, whose owner is this test."""

    pair: Pair
    process: DataProcess
    before: bytes

    def hello(self, **changes: Any) -> dict[str, Any]:
        described: Any = SimpleNamespace(volumes={"vm-a": {}}, size_bytes=lambda _: SIZE)
        return hello(described, A, record=ALONE.encode(), **{"lineage": ANOTHER, "blank": False, **changes})

    @contextlib.contextmanager
    def met(self, **changes: Any) -> Iterator[tuple[socket.socket, dict[str, Any]]]:
        """A connection of the owner, with the answer to its HELLO."""
        with socket.create_connection(("127.0.0.1", self.pair.ports[2]), 10) as connection:
            connection.sendall(opening(self.hello(**changes)))
            yield connection, wire.decode_object(receive(connection).payload)

    def wait_met(self, **changes: Any) -> None:
        with self.met(**changes) as (_, said):
            assert said["lineage"] != ANOTHER
        self.process.wait("has met it", lambda status: status["owner_lineage"] == changes.get("lineage", ANOTHER))

    def inspected(self, answer: Callable[[Frame], bytes]) -> dict[str, Any]:
        """How a comparison ends whose questions are answered so."""
        with self.met() as (connection, said):
            assert said["inspects"]
            connection.sendall(wire.frame(Kind.INSPECT, 7) + PAST)
            with contextlib.suppress(ConnectionError):
                while True:
                    connection.sendall(answer(receive(connection, preface=False)))
        ended = self.process.wait("has ended", lambda status: status["comparison"]["state"] in ("done", "failed"))
        found: dict[str, Any] = ended["comparison"]
        return found

    def assert_untouched(self) -> None:
        state = self.process.state_file()
        assert (state["given_up_for"], state["needs_sync"], state["filling"]) == ("", False, "")
        assert self.pair.backing(B).read_bytes() == self.before
        assert not self.kept()

    def kept(self) -> list[Path]:
        return list((self.pair.directory / B / "kept").glob("*"))


@pytest.fixture
def loser(tmp_path: Path) -> Iterator[Loser]:
    with Pair(tmp_path) as pair:
        owner, secondary, _ = pair.in_sync()
        owner.kill()
        with pair.backing(B).open("r+b") as file:
            os.pwrite(file.fileno(), b"x" * MIB, 3 * MIB)
        secondary.follow(ALONE)
        yield Loser(pair, secondary, pair.backing(B).read_bytes())


@pytest.mark.parametrize("order", [("give-up", {}), ("compare", {"keep": True})], ids=str)
def test_nothing_is_given_up_for_an_owner_that_is_not_known_or_not_complete(
    loser: Loser, order: tuple[str, dict[str, Any]]
) -> None:
    kind, said = order
    with pytest.raises(OrderRefused, match="node-a has not connected to node-b yet"):
        loser.process.order(kind, **said)
    for flaw in ({"needs_sync": True}, {"lost_cache": True}):
        loser.wait_met(**flaw)
        with pytest.raises(OrderRefused, match="the copy of node-a is not complete itself"):
            loser.process.order(kind, **said)
    with loser.met(lineage="", blank=True):
        pass
    loser.process.wait("has met it", lambda status: status["owner_lineage"] == "")
    with pytest.raises(OrderRefused, match="has not connected"):
        loser.process.order(kind, **said)
    loser.assert_untouched()


def test_copy_with_another_history_is_not_given_up_without_keeping_it(loser: Loser) -> None:
    loser.wait_met()
    with pytest.raises(OrderRefused, match="no common history"):
        loser.process.order("give-up")
    loser.assert_untouched()


def test_owner_gives_nothing_up(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        owner, secondary, _ = pair.in_sync()
        for kind, said in (("give-up", {}), ("compare", {"keep": True}), ("show", {"host": "::1", "port": 1})):
            with pytest.raises(OrderRefused, match="node-a is not the secondary of rg-a"):
                owner.order(kind, **said)
        with pytest.raises(OrderRefused, match="have a common history"):
            secondary.order("compare", keep=True)
        assert owner.status["serving"]


def digests(
    ask: Frame, *, covered: int | None = None, count: int | None = None, volume: int = 0, shift: int = 0
) -> bytes:
    offset, length = wire.decode_ask(ask.payload)
    covered = length if covered is None else covered
    data = bytes(32) * (-(-covered // (64 << 10)) if count is None else count)
    return wire.encode_digests(7, volume, offset + shift, covered, data)


BAD_ANSWERS: dict[str, Callable[[Frame], bytes]] = {
    "too few digests": lambda ask: digests(ask, count=1, covered=128 << 10),
    "too many digests": lambda ask: digests(ask, count=500),
    "of another volume": lambda ask: digests(ask, volume=1),
    "of another range": lambda ask: digests(ask, shift=64 << 10),
    "of more than was asked for": lambda _: wire.encode_digests(7, 0, 0, 1 << 40, b""),
    "of nothing": lambda _: wire.encode_digests(7, 0, 0, 0, b""),
    "of half a block": lambda ask: digests(ask, covered=1000),
    "a session instead": lambda _: wire.encode_object(
        Kind.OPEN, 7, {"plan": "sync", "first": 0, "lineage": ANOTHER, "fill": "f"}
    ),
    "changes instead": lambda _: wire.changes_header(7, 1, 0, 100) + bytes(100),
    "of another epoch": lambda _: wire.encode_digests(8, 0, 0, SIZE, b""),
    "a refusal": lambda _: wire.encode_object(Kind.REFUSE, 7, {"reason": "node-a cannot: its disk is on fire"}),
}


@pytest.mark.parametrize("what", BAD_ANSWERS)
def test_bad_answer_of_the_owner_ends_the_comparison_and_nothing_is_given_up(loser: Loser, what: str) -> None:
    loser.wait_met()
    loser.process.order("compare", keep=True)
    found = loser.inspected(BAD_ANSWERS[what])
    assert found["state"] == "failed"
    assert NOTHING_OVERWRITTEN in found["why"]
    assert what != "a refusal" or "its disk is on fire" in found["why"]
    loser.assert_untouched()


def all_zeroes(ask: Frame) -> bytes:
    offset, length = wire.decode_ask(ask.payload)
    return wire.encode_digests(7, 0, offset, length, b"")


def test_what_was_given_up_is_for_that_lineage_only_and_owns_nothing(loser: Loser) -> None:
    loser.wait_met()
    loser.process.order("compare", keep=True)
    found = loser.inspected(all_zeroes)
    assert (found["state"], found["differing_bytes"]) == ("done", MIB)
    assert found["past"]["node-a"] == {"lineages": ["made there"], "records": ["of old", "7"]}
    assert found["volumes"]["vm-a"]["ranges"] == [[3 * MIB, MIB]]
    assert [str(path) for path in loser.kept()] == [found["file"]]
    state = loser.process.state_file()
    assert (state["given_up_for"], state["needs_sync"]) == (ANOTHER, True)

    with loser.met(lineage="2" * 32) as (connection, said):
        assert (said["gives_up"], said["inspects"]) == (ANOTHER, False)
        fill = {"plan": "sync", "first": 0, "lineage": "2" * 32, "fill": "f"}
        connection.sendall(wire.encode_object(Kind.OPEN, 7, fill))
        assert is_closed(connection)
    with loser.met() as (connection, _):  # only all of it may be copied
        connection.sendall(
            wire.encode_object(Kind.OPEN, 7, {"plan": "sync", "first": 0, "lineage": ANOTHER, "fill": ""})
        )
        assert is_closed(connection)
    assert loser.pair.backing(B).read_bytes() == loser.before
    with pytest.raises(OrderRefused, match="a sync of this replica did not end"):
        loser.process.lead(Record(8, B, (B,)))

    # Nothing has been overwritten yet: the operator can still have it.
    loser.process.lead(Record(8, B, (B,)), forced=True)
    state = loser.process.state_file()
    assert (state["given_up_for"], state["needs_sync"]) == ("", False)
    assert "forced here by the operator, though a sync of it had not ended" in state["lineages"][-1]
    assert loser.pair.backing(B).read_bytes() == loser.before


def test_comparison_that_the_operator_ends_or_whose_record_changes_gives_nothing_up(loser: Loser) -> None:
    ends: list[Callable[[], None]] = [
        lambda: loser.process.order("end-compare"),
        lambda: loser.process.follow(Record(8, A, (A,))),
    ]
    for end in ends:
        loser.wait_met()
        loser.process.order("compare", keep=True)
        with loser.met() as (connection, _):
            connection.sendall(wire.frame(Kind.INSPECT, 7) + PAST)
            assert receive(connection, preface=False).kind == Kind.ASK
            end()
            assert is_closed(connection)
        loser.process.wait("has ended", lambda status: status["comparison"]["state"] == "failed")
        loser.assert_untouched()


def test_two_comparisons_are_not_made_at_one_time(loser: Loser) -> None:
    loser.wait_met()
    loser.process.order("compare", keep=False)
    with pytest.raises(OrderRefused, match="under way already"):
        loser.process.order("compare", keep=True)
    assert loser.inspected(all_zeroes)["state"] == "done"
    loser.assert_untouched()
