"""Each safety rule, taken out of the code by changing one small method: the simulator must notice.

What a rule is for is only known when its absence is seen. If one of these fails, either the simulator has become
blind to that rule, or something else keeps it, too: then say so here, and take that out as well.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest

from stortrends_ha.cluster import effects as do
from stortrends_ha.cluster import judgement
from stortrends_ha.cluster.answers import Answer, Unreachable
from stortrends_ha.cluster.group import Group
from stortrends_ha.cluster.phases import PROMISING, Phase
from stortrends_ha.cluster.view import Saved, View
from stortrends_ha.record import Record

from .history import Violation
from .model_process import ModelProcess
from .run import RunFailed, run

_SEEDS = 400  # within which it must be noticed

Patch = pytest.MonkeyPatch


def goes_on_alone_without_asking(patch: Patch) -> None:
    """Rule 2: an owner that misses its peer takes the next record for granted."""
    propose = Group._propose

    def mutant(self: Group, new: Record, why: str, view: View) -> None:
        if self.phase is Phase.LEADING and new.alone and not self.record.alone and self._saving is None:
            self._adopt(new, why)
        else:
            propose(self, new, why, view)

    patch.setattr(Group, "_propose", mutant)


def owns_without_its_cache(patch: Patch) -> None:
    """Rule 3: a node whose host lost power serves what is left."""
    obstacle = judgement.obstacle
    patch.setattr(judgement, "obstacle", lambda *a, in_spite: obstacle(*a, in_spite=in_spite or True))


def owns_though_it_is_not_in_sync(patch: Patch) -> None:
    """Rule 3: a node takes over from an owner that is alone."""
    obstacle = judgement.obstacle

    def mutant(record: Record, alone_since: int, me: str, replica: Any, *, in_spite: bool) -> str:
        both = Record(record.epoch, record.owner, tuple(sorted({record.owner, me})))
        return obstacle(record if me in record.in_sync else both, alone_since, me, replica, in_spite=in_spite)

    patch.setattr(judgement, "obstacle", mutant)


def goes_on_listening(patch: Patch) -> None:
    """Rule 4: the stream of the old owner is applied after its successor was granted the group.

    ``Lead`` ends the old session, too; only without that, too, there is anything to be seen.
    """

    def mutant(self: Group, _view: View, _why: str) -> None:
        self._to(Phase.STOPPING)
        self._to(Phase.STANDING)

    patch.setattr(Group, "_stop_listening", mutant)
    patch.setattr(ModelProcess, "ends_sessions", False)


def promises_while_it_takes_over(patch: Patch) -> None:
    """Rule 5: the lease of the old owner goes on while its successor waits for its end, and serves.

    Who waits counts from its last promise: so only promises that come after that are noticed.
    """

    patch.setattr(Group, "promise", lambda _self, _view: True)


def promises_for_any_record(patch: Patch) -> None:
    """Rule 5: an owner that its secondary knows to be out of date keeps its lease."""

    def mutant(self: Group, _view: View) -> bool:
        return self.phase in PROMISING and self.record.owner != self._me

    patch.setattr(Group, "promise", mutant)


def serves_at_once(patch: Patch) -> None:
    """Rule 5: a new owner does not wait for the end of the old lease."""
    patch.setattr(Group, "_after_old_lease", lambda _self, _view: 0)


def does_not_reckon_with_drift(patch: Patch) -> None:
    """Rule 5: a new owner waits for the length of the lease on its own clock."""
    from . import supervisor

    patch.setattr(supervisor, "may_serve_from_ns", lambda heard_ns, timing: heard_ns + timing.lease_ns)


def answers_without_a_lease(patch: Patch) -> None:
    """Rule 5: the gate is always open."""
    patch.setattr(ModelProcess, "gate", False)


def answers_reads_while_it_may_not_be_alone(patch: Patch) -> None:
    """Rule 5: between ``joinable`` and the next record, reads are answered without a lease."""
    patch.setattr(ModelProcess, "locked_needs_lease", False)


def forgets_that_the_peer_may_have_joined(patch: Patch) -> None:
    """Rule 9: an owner whose session breaks after ``joinable`` goes on alone."""
    patch.setattr(ModelProcess, "locks", False)


def takes_no_answer_for_a_no(patch: Patch) -> None:
    """Rule 11: a proposal that was not answered is taken for refused."""
    said = Group.arbiter_said

    def mutant(self: Group, number: int, answer: Answer, view: View) -> list[do.Effect]:
        return said(
            self, number, Unreachable(answer.why, asked=False) if isinstance(answer, Unreachable) else answer, view
        )

    patch.setattr(Group, "arbiter_said", mutant)


def acts_before_the_record_is_saved(patch: Patch) -> None:
    """A record is acted on at once, and is durable some time later."""
    adopt, step = Group._adopt, Group._step
    waiting: dict[Group, Saved] = {}

    def adopts(self: Group, record: Record, why: str) -> None:
        adopt(self, record, why)
        assert self._saving is not None
        waiting[self] = self._saving

    def steps(self: Group, view: View) -> None:
        step(self, view)
        saving = waiting.pop(self, None)
        if saving is not None and saving == self._saving:
            self._saving = None
            before, self.record, self._alone_since = self.record, saving.record, saving.alone_since
            self._old_record = False
            self._enter(before, view)

    patch.setattr(Group, "_adopt", adopts)
    patch.setattr(Group, "_step", steps)


def leads_at_once_after_a_start(patch: Patch) -> None:
    """An owner that was alone does not settle what its former life may have proposed."""
    consider = Group._consider_leading

    def mutant(self: Group, view: View, replica: Any) -> None:
        self._old_record = False
        consider(self, view, replica)

    patch.setattr(Group, "_consider_leading", mutant)


def claims_before_it_owns(patch: Patch) -> None:
    """Rule 12: a node takes the addresses while its takeover is only proposed."""
    stand = Group._step_standing

    def mutant(self: Group, view: View) -> None:
        self._orders.claim()
        stand(self, view)

    patch.setattr(Group, "_step_standing", mutant)


# What the simulator says when the rule is missing.
_WRONG_ANSWER = r"was answered with|may answer clients|was lost before"
RULES: list[tuple[Callable[[Patch], None], str]] = [
    (goes_on_alone_without_asking, _WRONG_ANSWER),
    (owns_without_its_cache, r"rule 3"),
    (owns_though_it_is_not_in_sync, _WRONG_ANSWER),
    (goes_on_listening, _WRONG_ANSWER + "|rule 6"),
    (promises_while_it_takes_over, r"rule 5"),
    (promises_for_any_record, r"rule 5"),
    (serves_at_once, r"rule 5"),
    (does_not_reckon_with_drift, r"rule 5"),
    (answers_without_a_lease, r"rule 5|was answered with"),
    (answers_reads_while_it_may_not_be_alone, r"rule 5|was answered with"),
    (forgets_that_the_peer_may_have_joined, _WRONG_ANSWER),
    (takes_no_answer_for_a_no, _WRONG_ANSWER + "|not all is well"),
    (acts_before_the_record_is_saved, _WRONG_ANSWER),
    (leads_at_once_after_a_start, _WRONG_ANSWER),
    (claims_before_it_owns, r"rule 12"),
]


@pytest.mark.parametrize(("remove", "said"), RULES, ids=[remove.__name__ for remove, _ in RULES])
def test_the_simulator_notices_code_that(remove: Callable[[Patch], None], said: str, monkeypatch: Patch) -> None:
    remove(monkeypatch)
    others = []
    for seed in range(_SEEDS):
        try:
            run(seed)
        except RunFailed as e:
            if isinstance(e.__cause__, Violation) and re.search(said, str(e.__cause__)):
                print(f"noticed by seed {seed}: {e.__cause__}")
                return
            others.append(f"seed {seed}: {e.__cause__!r}"[:300])
    pytest.fail(f"not noticed in {_SEEDS} seeds; what was: {others[:5]}")
