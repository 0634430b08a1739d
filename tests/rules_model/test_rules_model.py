"""The rules hold in every state of the model within small bounds, and none of them can be left out.

Larger bounds: ``python -m tests.rules_model`` (docs/rules-model.md says how long they take).
"""

from pathlib import Path

import pytest

from . import invariants, rules
from .search import Found, search
from .world import Arbiter, Bounds, Setting

REGISTER, FENCING = Arbiter.REGISTER, Arbiter.FENCING
SMALL = Bounds(writes=1, faults=1, epochs=4)
TWO_WRITES = Bounds(writes=2, faults=1, epochs=3)
TWO_FAULTS = Bounds(writes=1, faults=2, epochs=4)
DOCUMENT = Path(__file__).parents[2] / "docs" / "rules-model.md"

# What the client notices: an acknowledged write is missing, or a read is stale. Found with few enough steps to read.
VISIBLE_WITH_REGISTER = [rule for rule in rules.of("register") if rule not in (rules.RECONCILE, rules.FLUSH_TARGET)]
STEPS_MAX = 16


def without(rule: str, arbiter: Arbiter, *added: str) -> Setting:
    return Setting(arbiter, SMALL, (rules.ALL | set(added)) - {rule})


def assert_missed(found: Found, steps_max: int = STEPS_MAX) -> None:
    assert found.wrong is not None
    assert 0 < len(found.trace) <= steps_max, "\n".join(found.trace)


@pytest.mark.parametrize(
    ("arbiter", "bounds"), [(REGISTER, TWO_WRITES), (REGISTER, TWO_FAULTS), (FENCING, SMALL)], ids=str
)
def test_all_rules_together_hold_in_every_state(arbiter: Arbiter, bounds: Bounds) -> None:
    found = search(Setting(arbiter, bounds))
    assert found.wrong is None, "\n".join([found.wrong, *found.trace])
    assert found.states > 10_000


@pytest.mark.parametrize("rule", VISIBLE_WITH_REGISTER)
def test_without_the_rule_a_client_loses_a_write_or_reads_an_old_version(rule: str) -> None:
    assert_missed(search(without(rule, REGISTER), invariants.VISIBLE))


def test_without_flushing_the_target_a_flushed_write_is_lost_when_both_lose_their_caches() -> None:
    assert_missed(search(without(rules.FLUSH_TARGET, FENCING), invariants.VISIBLE), steps_max=20)


def test_without_reconciling_the_replicas_differ_for_good() -> None:
    assert_missed(search(without(rules.RECONCILE, REGISTER)))


@pytest.mark.parametrize("rule", sorted(rules.FENCING_ONLY))
def test_without_the_rule_of_the_fencing_arbiter_there_are_two_records_of_one_epoch(rule: str) -> None:
    found = search(without(rule, FENCING), [invariants.one_record])
    assert_missed(found)


def test_when_a_fence_agent_is_not_waited_for_a_client_loses_a_write() -> None:
    assert_missed(search(without(rules.FENCE_CONFIRM, FENCING), invariants.VISIBLE))


def test_a_lease_at_the_time_of_proposing_does_not_replace_the_seal() -> None:
    setting = without(rules.SEAL_JOIN, REGISTER, rules.JOIN_WITH_LEASE)
    assert_missed(search(setting, invariants.VISIBLE), steps_max=18)


def test_reading_the_arbiter_after_a_restart_does_not_replace_remembering_the_proposal() -> None:
    setting = without(rules.REMEMBER_PROPOSAL, REGISTER, rules.CONFIRM_ALONE)
    assert_missed(search(setting, invariants.VISIBLE))


def test_with_fencing_no_lease_is_needed() -> None:
    kept = rules.ALL - set(rules.REGISTER_ONLY)
    assert search(Setting(FENCING, Bounds(writes=1, faults=1, epochs=3), kept)).wrong is None


@pytest.mark.parametrize("arbiter", Arbiter)
@pytest.mark.parametrize("rule", [None, rules.LATE_ACK, rules.STOP_BEFORE_HANDOVER])
def test_taking_the_nodes_for_alike_finds_the_same(arbiter: Arbiter, rule: str | None) -> None:
    setting = Setting(arbiter, Bounds(writes=1, faults=1, epochs=2), rules.ALL - {rule})
    folded, whole = search(setting), search(setting, fold=False)
    assert (folded.wrong, folded.depth, len(folded.trace)) == (whole.wrong, whole.depth, len(whole.trace))
    assert folded.states <= whole.states <= 2 * folded.states


def test_each_rule_is_in_the_document() -> None:
    text = DOCUMENT.read_text()
    assert [rule for rule in (*sorted(rules.ALL), *rules.OPTIONAL) if f"`{rule}`" not in text] == []
