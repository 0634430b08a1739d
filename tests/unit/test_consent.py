"""Questions about a record between two lives: repeated, delivered twice and late, answered once."""

import asyncio
from collections.abc import Callable

import pytest
from test_membership import met

from stortrends_ha.cluster.answers import Granted, Refused, Unreachable
from stortrends_ha.node.consent import Consent, Outcome
from stortrends_ha.protocol.heartbeat import Answer, Ask
from stortrends_ha.record import Record

OLD = Record(5, "a", ("a",))
Message = Ask | Answer
NEW = OLD.joined_by("b")


class Pair:
    """Node a asks node b, which answers with what ``outcomes`` has next; what is sent is kept."""

    def __init__(self, *outcomes: Outcome) -> None:
        a, b = met()
        self.outcomes = list(outcomes)
        self.asked: list[Message] = []
        self.answers: list[Message] = []
        self.a = Consent(a, self._send(self.asked, lambda ask: self.b.received(ask)), self._on_ask)
        self.b = Consent(b, self._send(self.answers, lambda answer: self.a.received(answer)), self._on_ask)

    def _send(
        self, kept: list[Ask | Answer], deliver: Callable[[Ask | Answer], bool]
    ) -> Callable[[Ask | Answer], None]:
        def send(message: Ask | Answer) -> None:
            kept.append(message)
            deliver(message)

        return send

    async def _on_ask(self, _group: str, _old: Record, _new: Record) -> Outcome:
        return self.outcomes.pop(0)

    async def settled(self) -> None:
        while self.b._answering:
            await asyncio.sleep(0)


@pytest.mark.parametrize("outcome", [Granted(), Refused(OLD), Refused(None)])
async def test_a_question_is_answered(outcome: Outcome) -> None:
    pair = Pair(outcome)
    assert await pair.a.ask("g", OLD, NEW, 1.0) == outcome


async def test_a_question_that_comes_again_gets_the_answer_that_it_got() -> None:
    pair = Pair(Refused(OLD), Granted())
    assert await pair.a.ask("g", OLD, NEW, 1.0) == Refused(OLD)  # so the asker believes that it will not be granted
    assert pair.b.received(pair.asked[0])
    await pair.settled()
    assert pair.answers[1] == pair.answers[0]
    assert await pair.a.ask("g", OLD, NEW, 1.0) == Granted()  # another question may have another one


async def test_a_question_that_was_overtaken_is_not_answered_any_more() -> None:
    pair = Pair(Refused(OLD), Granted())
    await pair.a.ask("g", OLD, NEW, 1.0)
    await pair.a.ask("g", OLD, NEW, 1.0)
    assert not pair.b.received(pair.asked[0])
    assert len(pair.answers) == 2


async def test_a_question_without_an_outcome_is_considered_again_when_it_comes_again() -> None:
    pair = Pair(Unreachable("not yet known"), Granted())
    asking = asyncio.create_task(pair.a.ask("g", OLD, NEW, 5.0))
    assert await asking == Granted()
    assert len(pair.asked) == 2
