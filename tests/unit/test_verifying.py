"""What the secondary makes of the owner's word on verifies: of anything that could come over the link."""

import json
from typing import Any

import pytest
from fakes import MemoryLink
from hypothesis import given
from hypothesis import strategies as st

from stortrends_ha.dataplane.commands import EndVerify, Verify, parse
from stortrends_ha.dataplane.verifying import Asking, _fitting
from stortrends_ha.errors import ProtocolError
from stortrends_ha.limits import LINK_FRAME_BYTES

RUNNING = {
    "run": "1f", "repair": True, "source": "", "done_bytes": 1, "total_bytes": 2, "copied_bytes": 0, "rate": 0.5,
    "why": "", "found_bytes": 0,
}  # fmt: skip
OUTCOME = {"found_bytes": 65536, "found": [[0, 65536]], "repaired_bytes": 0, "left_bytes": 65536}
LAST = {
    "run": "1e", "repair": False, "source": "", "ended_s": 1.7e9, "why": "", "done_bytes": 2, "total_bytes": 2,
    "unreadable_bytes": 0, "volumes": {"vm-a": OUTCOME, "of another version": OUTCOME},
}  # fmt: skip
ASK = Verify(-3, "20", ("vm-a",), True, "node-a")


class _Named:
    """A volume, a group or a node, of which only the name matters."""

    def __init__(self, name: str, *volumes: str) -> None:
        self.name = name
        self.volumes = [_Named(volume) for volume in volumes]


class Here:
    """What ``Asking`` uses of a replica."""

    def __init__(self) -> None:
        self.group, self.peer = _Named("rg-a", "vm-a", "vm-b"), _Named("node-a")
        self.last_verify: dict[str, Any] | None = None
        self.ended: list[tuple[list[str], float]] = []

    def verified(self, volumes: list[str], ended_s: float) -> None:
        self.ended.append((volumes, ended_s))

    def verify_status(self) -> dict[str, Any]:
        return {"running": None, "last": self.last_verify, "volumes": {}}


class Secondary:
    def __init__(self) -> None:
        self.here, self.link, self.changes = Here(), MemoryLink(), 0
        self.asking = Asking(self.here, self._changed)  # type: ignore[arg-type]
        self.answers: list[str] = []

    def _changed(self) -> None:
        self.changes += 1

    def hear(self, message: object) -> None:
        self.asking.hear(json.dumps(message).encode())


@pytest.fixture
def secondary() -> Secondary:
    return Secondary()


def test_the_owner_gets_just_what_was_asked_and_its_answer_is_passed_on(secondary: Secondary) -> None:
    for command in (ASK, EndVerify(-4)):
        secondary.asking.ask(command, secondary.link, 7, secondary.answers.append)
        [frame] = secondary.link.frames()
        assert parse(frame.payload) == command
    secondary.hear({"id": -4, "error": ""})
    secondary.hear({"id": -3, "error": "No."})
    secondary.hear({"id": -3, "error": "Again."})
    assert secondary.answers == ["", "No."]


def test_without_a_link_and_when_it_breaks_there_is_an_answer_at_once(secondary: Secondary) -> None:
    secondary.asking.ask(ASK, None, 7, secondary.answers.append)
    assert "there is no link to it" in secondary.answers.pop()
    secondary.asking.ask(ASK, secondary.link, 7, secondary.answers.append)
    assert secondary.answers == []
    secondary.asking.lost()
    assert "broke while its owner was asked" in secondary.answers.pop()


def test_what_waits_for_an_answer_is_bounded(secondary: Secondary) -> None:
    for number in range(Asking.ASKED + 1):
        secondary.asking.ask(EndVerify(number), secondary.link, 7, secondary.answers.append)
    assert len(secondary.answers) == 1


def test_it_knows_what_the_owner_knows(secondary: Secondary) -> None:
    secondary.hear({"running": RUNNING, "last": None})
    assert secondary.asking.status()["running"] == RUNNING
    for _ in range(2):
        secondary.hear({"running": None, "last": LAST, "later": "more"})
    assert secondary.asking.status() == {"running": None, "last": LAST, "volumes": {}}
    assert secondary.here.ended == [(["vm-a"], 1.7e9)]
    secondary.hear({"running": None, "last": {**LAST, "run": "1d", "why": "the link broke"}})
    assert len(secondary.here.ended) == 1


@pytest.mark.parametrize("what", ["running", "last"])
@pytest.mark.parametrize("wrong", [None, [], {"x": 1}, [[1]], 1, "x"])
def test_anything_wrong_ends_the_session(secondary: Secondary, what: str, wrong: object) -> None:
    good: dict[str, Any] = {"running": RUNNING, "last": LAST}
    for key, value in good[what].items():
        if type(value) is not type(wrong) or isinstance(wrong, dict):
            with pytest.raises(ProtocolError):
                secondary.hear({what: {**good[what], key: wrong}})
    with pytest.raises(ProtocolError):
        secondary.hear({"last": {**LAST, "volumes": {"vm-a": {**OUTCOME, "found": [wrong]}}}})
    assert secondary.here.last_verify is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["id", "error", "running", "last", "x"]), json_values) | json_values)
def test_noise_crashes_nothing(message: object) -> None:
    secondary = Secondary()
    try:
        secondary.hear(message)
    except ProtocolError:
        return
    status = secondary.asking.status()
    assert not status["running"]
    assert not status["last"]


def test_what_is_told_fits_into_a_frame() -> None:
    ranges = [[1 << 40, 1 << 40]] * 32
    last = {**LAST, "volumes": {f"vm-{number}": {**OUTCOME, "found": ranges} for number in range(100)}}
    payload = _fitting(RUNNING, last)
    assert len(payload) <= LINK_FRAME_BYTES
    assert json.loads(payload)["last"]["volumes"]["vm-99"] == {**OUTCOME, "found": []}
    assert json.loads(_fitting(None, LAST)) == {"running": None, "last": LAST}
