"""The talk that opens a session: who says what in which order, and what is durable before what."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from fakes import frames_of
from hypothesis import given
from hypothesis import strategies as st

from stortrends_ha.errors import PeerUnfitError, ProtocolError, SessionRefusedError, StorageError
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import PREFACE, Kind
from stortrends_ha.record import Record
from stortrends_ha.replication import opening
from stortrends_ha.replication.opening import Joined, Opened, Talk
from stortrends_ha.replication.session import Hello, Plan

BOTH = Record(5, "node-a", ("node-a", "node-b"))
ALONE = Record(5, "node-a", ("node-a",))
OWNER = Hello(
    cluster="demo", group="rg-a", node="node-a", peer="node-b", protocols=(1, 1), software="0.1.0", record=BOTH,
    volumes=(("vm-a", 4096),), lineage="abc", blank=False, lost_cache=False, needs_sync=False, differs=False,
    unknown=False, filling="", gives_up="", behind=False, inspects=False,
)  # fmt: skip
SECONDARY = replace(OWNER, node="node-b", peer="node-a")


@dataclass
class Side:
    """Either node. ``log`` tells when something became durable, in the order of all that happened."""

    said: Hello
    log: list[str] = field(default_factory=list)
    why_not: str = ""
    disk_is_full: bool = False
    owner: Hello | None = None

    def hello(self) -> Hello:
        return self.said

    def first(self) -> int:
        return 42

    def obstacle(self) -> str:
        return self.why_not

    def new_filling(self) -> str:
        return "f1"

    def met(self, owner: Hello) -> None:
        self.owner = owner

    def begin(self, lineage: str, plan: Plan, fill: str) -> None:
        if self.disk_is_full:
            raise StorageError("no space is left")
        self.log.append(f"durable: {lineage}, {plan.value} {fill}".rstrip())


@dataclass
class Line:
    """One end of a connection, with the talk on it."""

    talk: Talk[Any]
    name: str
    log: list[str]
    inbox: bytearray = field(default_factory=bytearray)
    wanted: int = 0
    result: Any = None

    def start(self, other: "Line") -> None:
        self._step(other, None)

    def go_on(self, other: "Line") -> bool:
        if self.result is not None or len(self.inbox) < self.wanted:
            return False
        piece = bytes(self.inbox[: self.wanted])
        del self.inbox[: self.wanted]
        self._step(other, piece)
        return True

    def _step(self, other: "Line", piece: bytes | None) -> None:
        try:
            step = next(self.talk) if piece is None else self.talk.send(piece)
            while not isinstance(step, int):
                other.inbox += step
                kinds = [Kind(frame.kind).name for frame in frames_of(step.removeprefix(PREFACE))]
                self.log.append(f"{self.name}: {' '.join(kinds)}")
                step = self.talk.send(b"")
            self.wanted = step
        except StopIteration as end:
            self.result = end.value
            if isinstance(end.value, Joined):
                other.inbox += end.value.opened
        except (SessionRefusedError, ProtocolError, StorageError) as e:
            self.result = e


def negotiate(owner: Side, secondary: Side) -> tuple[Any, Any, list[str]]:
    """Both results, and the log."""
    log = owner.log = secondary.log
    left = Line(opening.as_owner(owner), "owner", log)
    right = Line(opening.as_secondary(secondary), "secondary", log)
    left.start(right)
    right.start(left)
    while left.go_on(right) or right.go_on(left):
        pass
    return left.result, right.result, log


def test_session_is_opened_when_the_secondary_has_made_durable_what_it_needs() -> None:
    opened, joined, log = negotiate(Side(OWNER), Side(SECONDARY))
    assert isinstance(opened, Opened)
    assert isinstance(joined, Joined)
    assert (opened.plan, opened.fill, joined.first, opened.protocol) == (Plan.RESUME, "", 42, 1)
    assert (joined.plan, joined.fill) == (Plan.RESUME, "")
    assert log == ["owner: HELLO", "secondary: HELLO", "owner: OPEN", "durable: abc, resume"]


def test_what_may_differ_is_made_equal_from_the_first_change_on_that_was_not_acknowledged() -> None:
    for own, its in ((True, False), (False, True), (True, True)):
        sides = Side(replace(OWNER, differs=own)), Side(replace(SECONDARY, differs=its))
        opened, joined, log = negotiate(*sides)
        assert opened.plan is joined.plan is Plan.RECONCILE
        assert (joined.first, joined.fill) == (42, "")
        assert log[-1] == "durable: abc, reconcile"


def test_sync_lets_the_first_change_say_its_number() -> None:
    opened, joined, log = negotiate(Side(replace(OWNER, record=ALONE)), Side(replace(SECONDARY, record=ALONE)))
    assert opened.plan is joined.plan is Plan.SYNC
    assert (opened.fill, joined.fill, joined.first) == ("", "", 0)
    assert log[-1] == "durable: abc, sync"


@pytest.mark.parametrize(
    "change", [{"lineage": "", "blank": True}, {"unknown": True}, {"filling": "f0"}], ids=str
)  # fmt: skip
def test_copying_of_everything_has_a_new_name_on_both(change: dict[str, Any]) -> None:
    owner, secondary = Side(replace(OWNER, record=ALONE)), Side(replace(SECONDARY, record=ALONE, **change))
    opened, joined, log = negotiate(owner, secondary)
    assert opened.plan is joined.plan is Plan.SYNC
    assert opened.fill == joined.fill == "f1"
    assert log[-1] == "durable: abc, sync f1"


def test_copying_of_everything_that_was_interrupted_goes_on() -> None:
    owner, secondary = Side(replace(OWNER, record=ALONE, filling="f0")), Side(replace(SECONDARY, record=ALONE))
    secondary.said = replace(secondary.said, filling="f0", needs_sync=True)
    opened, joined, log = negotiate(owner, secondary)
    assert opened.fill == joined.fill == ""
    assert log[-1] == "durable: abc, sync"


def test_owner_of_a_secondary_that_needs_a_sync_and_is_in_sync_by_the_record_is_told_so() -> None:
    opened, joined, log = negotiate(Side(OWNER), Side(replace(SECONDARY, lost_cache=True)))
    assert isinstance(opened, PeerUnfitError)
    assert isinstance(joined, SessionRefusedError)
    assert "host of node-b restarted" in str(opened)
    assert str(joined) == str(opened)
    assert log == ["owner: HELLO", "secondary: HELLO", "owner: REFUSE"]


@pytest.mark.parametrize(
    "change", [{"lineage": "", "blank": True}, {"gives_up": "abc", "needs_sync": True}], ids=str
)  # fmt: skip
def test_what_was_given_up_for_this_owner_is_filled_and_for_another_is_not(change: dict[str, Any]) -> None:
    owner, secondary = Side(replace(OWNER, record=ALONE)), Side(replace(SECONDARY, record=ALONE, **change))
    assert negotiate(owner, secondary)[2][-1] == "durable: abc, sync f1"
    secondary.said = replace(secondary.said, lineage="def", blank=False, gives_up="ghi")
    opened, _, log = negotiate(owner, secondary)
    assert "no common history" in str(opened)
    assert log[-1] == "owner: REFUSE"


# --- Without a session --------------------------------------------------------------------------


def test_secondary_without_a_common_history_may_compare_and_nothing_becomes_durable() -> None:
    owner = Side(replace(OWNER, record=ALONE))
    secondary = Side(replace(SECONDARY, record=ALONE, lineage="def", inspects=True))
    opened, joined, log = negotiate(owner, secondary)
    assert opened == opening.Inspected(secondary.said)
    assert joined == opening.Inspected(owner.said)
    assert secondary.owner == owner.said
    assert log == ["owner: HELLO", "secondary: HELLO", "owner: INSPECT"]


@pytest.mark.parametrize(
    ("own", "its", "refused"),
    [
        ({}, {"inspects": True}, ""),  # a common history: an ordinary session
        ({}, {"inspects": True, "gives_up": "abc", "needs_sync": True, "lineage": "def"}, ""),  # that is over
        ({}, {"lineage": "def"}, "no common history"),
        ({}, {"inspects": True, "lineage": ""}, "unknown origin"),
        ({"cluster": "other"}, {"inspects": True, "lineage": "def"}, "the cluster"),
        ({"volumes": (("vm-a", 8192),)}, {"inspects": True, "lineage": "def"}, "volume vm-a has"),
    ],
)
def test_only_replicas_of_this_group_without_a_common_history_are_compared(
    own: dict[str, Any], its: dict[str, Any], refused: str
) -> None:
    owner, secondary = Side(replace(OWNER, record=ALONE, **own)), Side(replace(SECONDARY, record=ALONE, **its))
    opened, joined, _ = negotiate(owner, secondary)
    if refused:
        assert isinstance(opened, SessionRefusedError)
        assert refused in str(opened)
    else:
        assert isinstance(joined, Joined)


def test_owner_that_lets_a_secondary_inspect_which_has_not_asked_breaks_the_protocol() -> None:
    talk = opening.as_secondary(Side(SECONDARY))
    hello = wire.encode_object(Kind.HELLO, 5, OWNER.encode())
    inbox = bytearray(PREFACE + hello + wire.frame(Kind.INSPECT, 5))
    step = next(talk)

    def goes_on(step: int | bytes) -> int | bytes:
        piece = bytes(inbox[:step]) if isinstance(step, int) else b""
        del inbox[: len(piece)]
        return talk.send(piece)

    while inbox != wire.frame(Kind.INSPECT, 5) or not isinstance(step, int):
        step = goes_on(step)
    with pytest.raises(ProtocolError):
        goes_on(step)


def test_secondary_that_does_not_know_the_record_yet_refuses_for_the_moment() -> None:
    secondary = replace(SECONDARY, record=Record(4, "node-b", ("node-a", "node-b")))
    opened, joined, log = negotiate(Side(OWNER), Side(secondary))
    for error in (opened, joined):
        assert isinstance(error, SessionRefusedError)
        assert error.passing
        assert "not known on node-b yet" in str(error)
    assert log == ["owner: HELLO", "secondary: REFUSE"]


def test_session_of_an_older_record_is_refused_for_good() -> None:
    opened, _, _ = negotiate(Side(OWNER), Side(replace(SECONDARY, record=Record(6, "node-b", ("node-b",)))))
    assert isinstance(opened, SessionRefusedError)
    assert not opened.passing
    assert "older than epoch 6" in str(opened)


def test_peer_of_another_protocol_is_told_so() -> None:
    for changed in (Side(replace(OWNER, protocols=(7, 9))), Side(replace(SECONDARY, protocols=(7, 9)))):
        sides = (changed, Side(SECONDARY)) if changed.said.node == "node-a" else (Side(OWNER), changed)
        opened, joined, _ = negotiate(*sides)
        assert "speaks link protocols" in str(opened)
        assert str(opened) == str(joined)


def test_secondary_with_an_obstacle_says_it() -> None:
    opened, _, log = negotiate(Side(OWNER), Side(SECONDARY, why_not="its disk has failed"))
    assert str(opened) == "its disk has failed"
    assert log == ["owner: HELLO", "secondary: REFUSE"]


def test_secondary_that_cannot_make_it_durable_opens_nothing() -> None:
    opened, joined, _ = negotiate(Side(OWNER), Side(SECONDARY, disk_is_full=True))
    assert opened is None
    assert isinstance(joined, StorageError)


CHANGES = [
    {"record": Record(6, "node-b", ("node-b",))}, {"lost_cache": True}, {"needs_sync": True}, {"lineage": "other"},
    {"unknown": True}, {"differs": True},
]  # fmt: skip
WRONG_PLANS: list[Any] = [None, 0, "", [], {}, "full", "unfit", "hold"]
GOOD = {"plan": "resume", "first": 1, "lineage": "abc", "fill": ""}


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_secondary_looks_at_itself_again_when_open_has_come(change: dict[str, Any]) -> None:
    me = Side(SECONDARY)
    talk = opening.as_secondary(me)
    feed(talk, PREFACE + wire.encode_object(Kind.HELLO, 5, OWNER.encode()))
    me.said = replace(SECONDARY, **change)
    with pytest.raises(ProtocolError):
        feed(talk, wire.encode_object(Kind.OPEN, 5, GOOD), at=24)
    assert me.log == []


def test_the_open_that_the_tests_below_spoil_is_good() -> None:
    me = Side(SECONDARY)
    talk = opening.as_secondary(me)
    feed(talk, PREFACE + wire.encode_object(Kind.HELLO, 5, OWNER.encode()))
    with pytest.raises(StopIteration):
        feed(talk, wire.encode_object(Kind.OPEN, 5, GOOD), at=24)
    assert me.log == ["durable: abc, resume"]


@pytest.mark.parametrize(
    "message",
    [
        {}, {**GOOD, "first": 0}, {**GOOD, "first": True}, {**GOOD, "first": 1 << 63}, {**GOOD, "first": -1},
        {**GOOD, "lineage": None}, {**GOOD, "lineage": "other"}, {**GOOD, "fill": None}, {**GOOD, "fill": "f"},
        *({**GOOD, "plan": plan} for plan in WRONG_PLANS),
        {**GOOD, "plan": "sync"}, {**GOOD, "plan": "sync", "first": 0},
        {**GOOD, "plan": "sync", "first": 0, "fill": "f"},
        *({key: value for key, value in GOOD.items() if key != left_out} for left_out in GOOD),
    ],
    ids=str,
)  # fmt: skip
def test_open_that_does_not_fit_is_refused(message: dict[str, Any]) -> None:
    me = Side(SECONDARY)
    talk = opening.as_secondary(me)
    feed(talk, PREFACE + wire.encode_object(Kind.HELLO, 5, OWNER.encode()))
    with pytest.raises(ProtocolError):
        feed(talk, wire.encode_object(Kind.OPEN, 5, message), at=24)
    assert me.log == []


def feed(talk: Talk[Any], data: bytes, at: int = 0) -> None:
    """Give it these bytes; ``at``: how many it has asked for already."""
    wanted = at or next(talk)
    while data:
        assert isinstance(wanted, int)
        piece, data = data[:wanted], data[wanted:]
        wanted = talk.send(piece)
        while not isinstance(wanted, int):
            wanted = talk.send(b"")


@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_noise_is_refused_by_both(noise: bytes, as_owner: bool, preface: bool) -> None:
    talk: Talk[Any] = opening.as_owner(Side(OWNER)) if as_owner else opening.as_secondary(Side(SECONDARY))
    data = PREFACE * preface + noise
    with pytest.raises((ProtocolError, SessionRefusedError)):  # noqa: PT012
        step = next(talk)
        for _ in range(50):
            if isinstance(step, int):
                piece, data = data[:step].ljust(step, b"\0"), data[step:]
                step = talk.send(piece)
            else:
                step = talk.send(b"")
