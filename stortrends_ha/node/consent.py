"""Asking the peer for its consent to a change of a record, and answering it: questions beside the beats.

Job: send a question on every path again and again until it is answered or its time is over; let ``on_ask`` answer the
peer's. What consent means is decided there (the record is durable before it says granted).
Invariants: only messages between the two present lives count (``Membership.current``); a question is never answered
after a newer one about the same group; nothing here is waited for by a beat.
Bounds: one answer under way a group, ``HEARTBEAT_GROUPS`` groups; a question that comes while one about its group is
being answered is dropped, as it will come again.
A lost or late answer is no harm: the same question gets the same answer, however often it comes (a refusal is final,
and the asker builds on that), and the asker's outcome is unknown until then.
"""

import asyncio
from collections.abc import Awaitable, Callable

from stortrends_ha.cluster.answers import Granted, Refused, Unreachable
from stortrends_ha.cluster.membership import Membership
from stortrends_ha.limits import HEARTBEAT_GROUPS
from stortrends_ha.protocol.heartbeat import Answer, Ask
from stortrends_ha.record import Record

# A round trip takes less, unless something is wrong; then it is ten small datagrams a second.
AGAIN_S = 0.1

Outcome = Granted | Refused | Unreachable
OnAsk = Callable[[str, Record, Record], Awaitable[Outcome]]


class Consent:
    """Questions in both directions; ``send`` sends a message on every path and does not block."""

    def __init__(self, membership: Membership, send: Callable[[Ask | Answer], None], on_ask: OnAsk) -> None:
        self._membership = membership
        self._send = send
        self._on_ask = on_ask
        self._number = 0
        self._waiting: dict[int, asyncio.Future[Outcome]] = {}
        self._answering: dict[str, asyncio.Task[None]] = {}
        self._newest: dict[str, Ask] = {}  # of the peer, for each group
        self._outcomes: dict[str, Answer] = {}  # of that question, once it has one

    async def ask(self, group: str, old: Record, new: Record, timeout_s: float) -> Outcome:
        """Ask the peer; Unreachable, if it has not answered in time (``asked``: it may yet consent)."""
        self._number += 1
        number, asked = self._number, False
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(timeout_s):
                while not answer.done():
                    asked |= self._put(number, group, old, new)
                    await asyncio.wait([answer], timeout=AGAIN_S)
            return answer.result()
        except TimeoutError:
            return Unreachable(f"{self._membership.peer_name} does not answer", asked)
        finally:
            del self._waiting[number]

    def _put(self, number: int, group: str, old: Record, new: Record) -> bool:
        """Put the question to the peer's present life, if there is one."""
        of = self._membership
        if not of.peer_incarnation:
            return False
        self._send(Ask(of.cluster, of.me, of.incarnation, of.peer_incarnation, number, group, old, new))
        return True

    def received(self, message: Ask | Answer) -> bool:
        """Take in an authentic message; whether it was of the two present lives and not overtaken."""
        if not self._membership.current(message):
            return False
        return self._asked(message) if isinstance(message, Ask) else self._answered(message)

    def _answered(self, answer: Answer) -> bool:
        waiting = self._waiting.get(answer.number)
        if waiting is None or waiting.done():
            return False
        waiting.set_result(Granted() if answer.granted else Refused(answer.current))
        return True

    def _asked(self, ask: Ask) -> bool:
        newest = self._newest.get(ask.group)
        same_life = newest is not None and newest.incarnation == ask.incarnation
        if newest and same_life and ask.number < newest.number:
            return False
        if ask.group in self._answering:
            return True
        if newest and same_life and ask.number == newest.number and ask.group in self._outcomes:
            self._send(self._outcomes[ask.group])
        elif newest or len(self._newest) < HEARTBEAT_GROUPS:
            self._newest[ask.group] = ask
            self._outcomes.pop(ask.group, None)
            task = self._answering[ask.group] = asyncio.create_task(self._answer(ask))
            task.add_done_callback(lambda done: self._ended(ask.group, done))
        return True

    async def _answer(self, ask: Ask) -> None:
        of = self._membership
        outcome = await self._on_ask(ask.group, ask.old, ask.new)
        if not isinstance(outcome, Unreachable):
            current = outcome.current if isinstance(outcome, Refused) else None
            granted = isinstance(outcome, Granted)
            answer = Answer(of.cluster, of.me, of.incarnation, ask.incarnation, ask.number, granted, current)
            self._outcomes[ask.group] = answer
            self._send(answer)

    def _ended(self, group: str, task: asyncio.Task[None]) -> None:
        del self._answering[group]
        if not task.cancelled() and (error := task.exception()) is not None:
            task.get_loop().call_exception_handler({"message": "answering the peer has failed", "exception": error})

    async def close(self) -> None:
        """Answer nothing more."""
        tasks = list(self._answering.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
