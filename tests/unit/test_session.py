"""Opening a session: what nodes say of themselves, whether they fit, and what must be copied."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stortrends_ha.errors import ProtocolError
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Kind
from stortrends_ha.record import Record
from stortrends_ha.replication.session import (
    Hello,
    Plan,
    common_protocol,
    incompatible,
    may_follow,
    must_fill,
    passing,
    plan,
    refusal,
)

BOTH = ("node-a", "node-b")
OWNER = Hello(
    cluster="demo",
    group="rg-a",
    node="node-a",
    peer="node-b",
    protocols=(1, 1),
    software="0.1.0",
    record=Record(5, "node-a", BOTH),
    volumes=(("vm-a", 1 << 30), ("vm-b", 4096)),
    lineage="1234567890abcdef",
    blank=False,
    lost_cache=False,
    needs_sync=False,
    differs=False,
    unknown=False,
    filling="",
    gives_up="",
    behind=False,
    inspects=False,
)
SECONDARY = replace(OWNER, node="node-b", peer="node-a")


# --- HELLO ------------------------------------------------------------------------------------

names = st.text(max_size=20)
flags = st.booleans()
hellos = st.builds(
    Hello,
    cluster=names, group=names, node=names, peer=names, software=names, lineage=names, filling=names,
    gives_up=names,
    protocols=st.tuples(st.integers(), st.integers()),
    record=st.builds(
        lambda epoch, in_sync: Record(epoch, in_sync[0], tuple(sorted(in_sync))),
        st.integers(1, 2**62), st.lists(names, min_size=1, max_size=3, unique=True),
    ),
    volumes=st.lists(st.tuples(names, st.integers())).map(tuple),
    blank=flags, lost_cache=flags, needs_sync=flags, differs=flags, unknown=flags, behind=flags,
)  # fmt: skip


def through_the_wire(value: dict[str, Any]) -> dict[str, Any]:
    data = wire.encode_object(Kind.HELLO, 1, value)
    return wire.decode_object(data[wire.HEADER.size :])


@given(hellos)
def test_hello_comes_back_as_it_was_made(hello: Hello) -> None:
    assert Hello.decode(through_the_wire(hello.encode())) == hello


@given(hellos)
def test_whatever_a_hello_says_there_is_an_answer_that_can_be_sent(hello: Hello) -> None:
    for reason in (refusal(OWNER, hello, OWNER), refusal(SECONDARY, hello, hello)):
        assert reason
        wire.encode_object(Kind.REFUSE, 1, {"reason": reason})
    wire.encode_object(Kind.HELLO, hello.record.epoch, hello.encode())


def test_hello_of_a_newer_version_may_say_more() -> None:
    more = {**SECONDARY.encode(), "colour": "blue", "record": {**SECONDARY.encode()["record"], "x": 1}}
    assert Hello.decode(through_the_wire(more)) == SECONDARY


@pytest.mark.parametrize("epoch", [-1, 2**63, 2**64, 2**64 - 1, 10**30])
def test_hello_with_an_epoch_that_no_frame_can_carry_is_refused(epoch: int) -> None:
    value = SECONDARY.encode()
    value["record"]["epoch"] = epoch
    with pytest.raises(ProtocolError):
        Hello.decode(through_the_wire(value))


WRONG: list[Any] = [None, 1, 1.5, "x", True, [], {}, [1], {"epoch": 1}]
Path = tuple[str | int, ...]


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """The path to everything in a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def hello_and_place(path: Path) -> tuple[dict[str, Any], Any]:
    """A HELLO, and what of it holds the last key of the path."""
    place = value = through_the_wire(SECONDARY.encode())
    for key in path[:-1]:
        place = place[key]  # type: ignore[index]
    return value, place


@pytest.mark.parametrize("path", list(places(through_the_wire(SECONDARY.encode()))), ids=str)
def test_wrong_type_anywhere_in_a_hello_is_refused(path: Path) -> None:
    for wrong in WRONG:
        value, place = hello_and_place(path)
        if type(wrong) is not type(place[path[-1]]):
            place[path[-1]] = wrong
            with pytest.raises(ProtocolError):
                Hello.decode(value)


@pytest.mark.parametrize("path", [path for path in places(SECONDARY.encode()) if isinstance(path[-1], str)], ids=str)
def test_anything_missing_in_a_hello_is_refused(path: Path) -> None:
    value, place = hello_and_place(path)
    del place[path[-1]]
    with pytest.raises(ProtocolError):
        Hello.decode(value)


@pytest.mark.parametrize("key", ["volumes", "protocols"])
@pytest.mark.parametrize("wrong", [[1], ["vm-a"], [[]], [["vm-a"]], [["vm-a", 1, 2]], [["vm-a", "1"]]])
def test_lists_of_the_wrong_shape_in_a_hello_are_refused(key: str, wrong: list[Any]) -> None:
    with pytest.raises(ProtocolError):
        Hello.decode({**SECONDARY.encode(), key: wrong})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(list(SECONDARY.encode())), json_values))
def test_a_hello_of_anything_is_refused_or_understood(some: dict[str, Any]) -> None:
    with suppress(ProtocolError):
        Hello.decode({**SECONDARY.encode(), **some})


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_a_hello_of_deeply_nested_values_is_refused(opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"
    for depth in itertools.chain(range(1, 50), range(850, 1100)):
        nested = opening * depth + (b"1" if opening != b"[" else b"") + closing * depth
        with pytest.raises(ProtocolError):
            Hello.decode(wire.decode_object(b'{"record": {"epoch": %s}, "cluster": %s}' % (nested, nested)))


# --- Whether they fit -------------------------------------------------------------------------


def test_nodes_that_fit_are_not_refused_by_either() -> None:
    assert refusal(OWNER, SECONDARY, OWNER) == ""
    assert refusal(SECONDARY, OWNER, OWNER) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cluster": "other"}, ["the cluster", "'other' on node-b", "'demo' on node-a"]),
        ({"group": "rg-b"}, ["the group", "'rg-b' on node-b", "'rg-a' on node-a"]),
        ({"node": "node-a"}, ["node-a is not node-b, the peer of node-a"]),
        ({"node": "node-x"}, ["node-x is not node-b, the peer of node-a"]),
        ({"peer": "node-c"}, ["node-a is not node-c, the peer of node-b"]),
        ({"volumes": (("vm-a", 1 << 30),)}, ["vm-b is missing on node-b"]),
        ({"volumes": (*OWNER.volumes, ("vm-c", 1))}, ["vm-c is missing on node-a"]),
        ({"volumes": (("vm-a", 7), ("vm-b", 4096))}, ["vm-a", "7 bytes on node-b", "1073741824 on node-a"]),
        ({"volumes": OWNER.volumes[::-1]}, ["another order on node-b than on node-a"]),
        ({"volumes": (*OWNER.volumes, ("vm-a", 1 << 30))}, ["volumes"]),
        ({"record": Record(4, "node-a", BOTH)}, ["epoch 5 is not known on node-b yet, which is at 4"]),
        ({"record": Record(6, "node-a", BOTH)}, ["session of node-a", "epoch 5", "older than epoch 6 on node-b"]),
        ({"record": Record(5, "node-b", BOTH)}, ["epoch 5", "node-b on node-b", "node-a on node-a"]),
        ({"record": Record(5, "node-a", ("node-a",))}, ["in sync", "node-a on node-b", "node-a, node-b on node-a"]),
    ],
)  # fmt: skip
def test_every_difference_is_named(change: dict[str, Any], words: list[str]) -> None:
    reason = refusal(OWNER, replace(SECONDARY, **change), OWNER)
    for word in words:
        assert word in reason
    assert refusal(replace(SECONDARY, **change), OWNER, OWNER)


def test_all_differences_are_named_at_once() -> None:
    theirs = replace(SECONDARY, cluster="other", group="rg-b", volumes=(("vm-a", 5), ("vm-c", 6)))
    reason = refusal(OWNER, theirs, OWNER)
    for words in (
        "cluster",
        "group",
        "vm-a has 5",
        "vm-b is missing on node-b",
        "vm-c is missing on node-a",
    ):
        assert words in reason


def test_records_of_one_epoch_that_differ_are_refused_by_name() -> None:
    reason = refusal(OWNER, replace(SECONDARY, record=Record(5, "node-b", ("node-b",))), OWNER)
    assert "owner" in reason
    assert "in sync" in reason


def test_order_of_in_sync_does_not_matter() -> None:
    theirs = replace(SECONDARY, record=Record(5, "node-a", ("node-b", "node-a")))
    assert refusal(OWNER, theirs, OWNER) == ""


@pytest.mark.parametrize("record", [Record(4, "node-a", BOTH), Record(4, "node-b", ("node-b",))])
def test_secondary_that_knows_an_older_record_will_soon_know_this_one(record: Record) -> None:
    secondary = replace(SECONDARY, record=record)
    assert "not known on node-b yet" in refusal(OWNER, secondary, OWNER)
    assert "not known on node-b yet" in refusal(secondary, OWNER, OWNER)
    assert passing(secondary, OWNER)
    assert not passing(SECONDARY, OWNER)


def test_session_of_a_node_that_is_not_the_owner_is_refused() -> None:
    theirs = replace(OWNER, record=Record(6, "node-b", BOTH))
    assert "node-a is not the owner, node-b is" in refusal(SECONDARY, theirs, theirs)


def test_session_older_than_the_own_record_is_refused() -> None:
    mine = replace(SECONDARY, record=Record(6, "node-b", ("node-b",)))
    assert "older than epoch 6 on node-b" in refusal(mine, OWNER, OWNER)


@pytest.mark.parametrize(
    ("mine", "theirs", "common"),
    [
        ((1, 1), (1, 1), 1),
        ((1, 3), (2, 5), 3),
        ((2, 5), (1, 2), 2),
        ((1, 2), (3, 4), None),
        ((3, 4), (1, 2), None),
        ((1, 3), (2, 1), None),
    ],
)
def test_newest_common_protocol(mine: tuple[int, int], theirs: tuple[int, int], common: int | None) -> None:
    assert common_protocol(mine, theirs) == common


def test_peer_of_another_protocol_is_told_so_whatever_else_its_hello_says() -> None:
    reason = incompatible(OWNER, {"node": "node-b", "software": "0.9", "protocols": [2, 3], "record": "new form"})
    assert reason == "node-b (version 0.9) speaks link protocols 2 to 3 and node-a (version 0.1.0) speaks 1 to 1"
    assert incompatible(OWNER, SECONDARY.encode() | {"protocols": [1, 4]}) == ""


@pytest.mark.parametrize("protocols", [None, [], [1], [1, "2"], {"1": 2}])
def test_hello_without_its_protocols_is_bad_input(protocols: object) -> None:
    with pytest.raises(ProtocolError):
        incompatible(OWNER, {"node": "node-b", "software": "0.9", "protocols": protocols})


ALONE = Record(5, "node-a", ("node-a",))


SAME = OWNER.lineage


@pytest.mark.parametrize(
    ("state", "lineage", "begins", "fill", "may"),
    [
        ({}, SAME, Plan.RESUME, "", True),
        ({}, SAME, Plan.RECONCILE, "", True),
        ({}, SAME, Plan.SYNC, "", False),  # rule 9: the record has it in sync
        ({}, SAME, Plan.SYNC, "f", False),
        ({}, SAME, Plan.RESUME, "f", False),
        ({}, "another", Plan.RESUME, "", False),
        ({}, "another", Plan.RECONCILE, "", False),
        ({"differs": True}, SAME, Plan.RESUME, "", False),
        ({"differs": True}, SAME, Plan.RECONCILE, "", True),
        ({"needs_sync": True}, SAME, Plan.RECONCILE, "", False),
        ({"lost_cache": True}, SAME, Plan.RECONCILE, "", False),
        ({"unknown": True}, SAME, Plan.RECONCILE, "", False),
        ({"lineage": "", "blank": True}, "", Plan.RESUME, "", False),
        ({"record": ALONE}, SAME, Plan.RESUME, "", False),
        ({"record": ALONE}, SAME, Plan.RECONCILE, "", False),
        ({"record": ALONE}, SAME, Plan.SYNC, "", True),
        ({"record": ALONE}, SAME, Plan.SYNC, "f", True),
        ({"record": ALONE}, "another", Plan.SYNC, "f", False),
        ({"record": ALONE, "lost_cache": True, "needs_sync": True, "differs": True}, SAME, Plan.SYNC, "", True),
        ({"record": ALONE, "unknown": True}, SAME, Plan.SYNC, "", False),
        ({"record": ALONE, "unknown": True}, SAME, Plan.SYNC, "f", True),
        ({"record": ALONE, "lineage": "", "blank": True}, "any", Plan.SYNC, "f", True),
        ({"record": ALONE, "lineage": "", "blank": True}, "any", Plan.SYNC, "", False),
        ({"record": ALONE, "lineage": "", "blank": False}, "any", Plan.SYNC, "f", False),
        ({"gives_up": SAME}, SAME, Plan.RESUME, "", False),
        ({"gives_up": SAME}, SAME, Plan.RECONCILE, "", False),
        ({"gives_up": "another"}, "another", Plan.SYNC, "f", False),  # rule 9: the record has it in sync
        ({"record": ALONE, "gives_up": "another"}, "another", Plan.SYNC, "f", True),
        ({"record": ALONE, "gives_up": "another"}, "another", Plan.SYNC, "", False),
        ({"record": ALONE, "gives_up": "another"}, "a third", Plan.SYNC, "f", False),
        ({"record": ALONE, "gives_up": "another"}, SAME, Plan.SYNC, "", False),
        ({"record": ALONE, "lineage": "", "gives_up": "another"}, "another", Plan.SYNC, "f", True),
        ({"record": ALONE, "lineage": "", "gives_up": "another"}, "a third", Plan.SYNC, "f", False),
    ],
)
def test_secondary_decides_for_itself_what_it_may_follow(
    state: dict[str, Any], lineage: str, begins: Plan, fill: str, may: bool
) -> None:
    assert may_follow(replace(SECONDARY, **state), lineage, begins, fill) == may


# --- What must be copied ----------------------------------------------------------------------


def expected_plan(owner: Hello, secondary: Hello) -> Plan:
    """The safety rules, in their own order: first what forbids a session, then what asks for a copy."""
    unrelated = bool(secondary.lineage) and secondary.lineage != owner.lineage
    unknown_data = not secondary.lineage and not secondary.blank
    if (unrelated or unknown_data) and secondary.gives_up != owner.lineage:  # rule 10
        return Plan.HOLD
    if owner.needs_sync or owner.lost_cache:  # rules 9 and 3
        return Plan.HOLD
    if owner.record.alone:
        return Plan.SYNC
    if may_lack_answered_writes(owner, secondary) or owner.unknown or secondary.unknown:
        return Plan.UNFIT
    return Plan.RECONCILE if owner.differs or secondary.differs else Plan.RESUME


def may_lack_answered_writes(owner: Hello, secondary: Hello) -> bool:
    recorded = secondary.node in owner.record.in_sync
    has_data = bool(secondary.lineage) and not secondary.gives_up
    return not (recorded and has_data) or secondary.lost_cache or secondary.needs_sync or owner.behind


def said_of(names: Sequence[str], values: Sequence[object]) -> dict[str, Any]:
    return dict(zip(names, values, strict=True))


def pairs(record: Record) -> Iterator[tuple[Hello, Hello]]:
    """An owner and a secondary with this record, in every combination of what they may say."""
    lineages = [("", False), ("", True), (SAME, False), ("another", False)]
    own = ("lost_cache", "needs_sync", "differs", "unknown", "behind", "filling")
    its = ("lost_cache", "needs_sync", "differs", "unknown", "filling", "gives_up")
    fillings = ("", "one", "two")
    owners = [
        replace(OWNER, record=record, **said_of(own, said))
        for said in itertools.product(*[(False, True)] * 5, fillings)
    ]
    secondaries = [
        replace(SECONDARY, record=record, lineage=lineage, blank=blank, **said_of(its, said))
        for lineage, blank in lineages
        for said in itertools.product(*[(False, True)] * 4, fillings, ("", SAME, "another"))
    ]
    return itertools.product(owners, secondaries)


@pytest.mark.parametrize("record", [OWNER.record, ALONE])
def test_plan_for_all_combinations(record: Record) -> None:
    for owner, secondary in pairs(record):
        decision, why = plan(owner, secondary)
        assert decision == expected_plan(owner, secondary)
        assert len(why) > 10
        if decision in (Plan.RESUME, Plan.RECONCILE, Plan.SYNC):  # the secondary agrees by itself
            fill = "three" if decision is Plan.SYNC and must_fill(owner, secondary) else ""
            assert may_follow(secondary, owner.lineage, decision, fill)


@pytest.mark.parametrize("record", [OWNER.record, ALONE])
def test_no_plan_overwrites_who_is_in_sync_or_leaves_out_what_the_secondary_lacks(record: Record) -> None:
    for owner, secondary in pairs(record):
        decision, _ = plan(owner, secondary)
        for begins, fill in itertools.product((Plan.RESUME, Plan.RECONCILE, Plan.SYNC), ("", "three")):
            both = decision is begins and may_follow(secondary, owner.lineage, begins, fill)
            either = decision is begins or may_follow(secondary, owner.lineage, begins, fill)
            if either and secondary.node in record.in_sync:  # rule 9, by each of them alone
                assert begins is not Plan.SYNC
            if both and begins is not Plan.SYNC:
                assert not may_lack_answered_writes(owner, secondary)
            if either and begins is Plan.RESUME:
                assert not secondary.differs
            if both and begins is Plan.RESUME:
                assert not owner.differs
            if both and not fill:  # what it lacks is known
                assert secondary.lineage == owner.lineage
                assert not secondary.unknown
            if both:  # rule 10
                blank, given_up = not secondary.lineage and secondary.blank, secondary.gives_up == owner.lineage
                assert secondary.lineage == owner.lineage or (fill and (blank or given_up))


def test_record_that_has_the_secondary_not_in_sync_and_the_owner_not_alone_is_unfit() -> None:
    record = Record(5, "node-a", ("node-a", "node-c"))
    assert plan(replace(OWNER, record=record), replace(SECONDARY, record=record))[0] is Plan.UNFIT


@pytest.mark.parametrize(
    ("owner", "secondary", "must"),
    [
        ({}, {}, False),
        ({}, {"lineage": "", "blank": True}, True),
        ({}, {"unknown": True}, True),
        ({}, {"filling": "one"}, True),
        ({"filling": "two"}, {"filling": "one"}, True),
        ({"filling": "one"}, {"filling": "one"}, False),  # it goes on where it was
        ({"filling": "one"}, {}, False),
        ({"filling": "one"}, {"filling": "one", "unknown": True}, True),
        ({"filling": "one"}, {"filling": "one", "lineage": "", "blank": True}, True),  # its disk was replaced
        ({"unknown": True}, {}, False),  # all of it is doubtful
    ],
)
def test_everything_is_copied_if_it_is_not_known_what_is_lacking(
    owner: dict[str, Any], secondary: dict[str, Any], must: bool
) -> None:
    assert must_fill(replace(OWNER, **owner), replace(SECONDARY, **secondary)) == must


@pytest.mark.parametrize(
    ("owner", "secondary", "words"),
    [
        ({}, {"lineage": "", "blank": False}, ["node-b has data of unknown origin"]),
        ({}, {"lineage": "fedcba9876543210"}, ["no common history", "12345678", "fedcba98"]),
        ({"lost_cache": True}, {}, ["host of node-a restarted", "may lack acknowledged writes"]),
    ],
)
def test_who_holds_is_told_why_and_what_to_do(
    owner: dict[str, Any], secondary: dict[str, Any], words: list[str]
) -> None:
    decision, why = plan(replace(OWNER, **owner), replace(SECONDARY, **secondary))
    assert decision is Plan.HOLD
    for word in words:
        assert word in why
