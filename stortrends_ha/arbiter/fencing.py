"""No third machine: the records live on the two nodes, and the peer's consent or its being off is what grants.

Job: ``FencingArbiter`` and ``ManualArbiter``, for both sides: `propose` asks the peer, `consider` answers the peer.
Invariants:
- A change is granted only when the peer has adopted it durably, or when it drops the peer and the fence agent has
  reported the peer off, twice (rule 11: no grant and no confirmed fencing means: hold).
- Never both: while a proposal of ours may still be granted by the peer, we consent to no other of the same epoch, and
  while we adopt one of the peer's we propose none. Two proposals that meet are both refused; who asked tries again
  after a time that is not the same on both nodes.
- A node that is alone, and has not asked the peer to join since, stays alone without being granted anything: nobody
  else can own, but by the operator's override. That it is about to ask the peer to join is durable first.
- A node fences only after it has seen its peer since it booted: one that comes back from being fenced learns first
  what has happened meanwhile. And never a peer that is alive and says no.
- One fence action at a time. That the peer is off is believed, for all groups, until anything is heard from it.
Neighbours: the node gives its access to the peer and its own records; `fence_agent` runs the agent.
Death between steps: fenced, but not granted: asked again, the agent finds the peer off. Consent given, but the answer
lost: asked again, the peer has adopted it already, which is a grant.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from stortrends_ha import boottime
from stortrends_ha.arbiter.counted import Counted
from stortrends_ha.arbiter.fence_agent import FenceError, turn_off
from stortrends_ha.arbiter.interface import Granted, Known, Refused, Unreachable
from stortrends_ha.config import FenceAgent
from stortrends_ha.record import Record

log = logging.getLogger(__name__)

# A peer whose heartbeat goes on but who does not answer, because its disk hangs for example, is fenced after this.
UNANSWERED_S = 10.0
NS_PER_S = 1_000_000_000


class Peer(Protocol):
    """The node's access to its peer, over paths that are authenticated.

    `consent` and `ask` reach the peer in the order in which they are sent: when a later one is answered, no earlier
    one can arrive any more (one connection, and a peer that drops the old one before it serves a new one). Each
    returns in bounded time, about a second. The peer answers them with the `consider` and `tell` of its own arbiter.
    What is remembered is remembered over restarts of the node.
    """

    @property
    def name(self) -> str:
        """Of the peer."""

    async def consent(self, group: str, old: Record, new: Record) -> Granted | Refused | Unreachable:
        """Ask the peer to make `new` its record."""

    async def ask(self, group: str) -> Known | Unreachable:
        """The newest record that the peer knows."""

    def seen(self) -> bool:
        """Whether the peer has been heard since this machine booted, by this process or one before it."""

    def alive(self) -> bool:
        """Whether its heartbeat is being heard."""

    def has_same_arbiter(self) -> bool:
        """Whether its cluster file has the same arbiter and timings, as far as it has said."""

    def heard_ns(self) -> int:
        """When the peer was heard last, or a life of it that may know this node since; CLOCK_BOOTTIME, 0 for never."""

    async def will_ask_to_join(self, group: str, epoch: int) -> bool:
        """Remember that the peer is asked for a record of this epoch which has it in sync; false: it is not durable."""

    def asked_to_join(self, group: str) -> int:
        """The newest such epoch; 0 for none."""


OwnRecord = Callable[[str], Record]
"""The newest record of a group that this node knows, as it is on its disk."""

Adopt = Callable[[str, Record], Awaitable[bool]]
"""Make a record that the peer proposes our own, durably, after having stopped what it does not allow any more; false:
not now."""


class TwoNodes(ABC):
    """What is common to the arbiters without a third machine."""

    def __init__(self, peer: Peer, own_record: OwnRecord, adopt: Adopt) -> None:
        self._peer = peer
        self._own_record = own_record
        self._adopt = adopt
        self._proposing: set[str] = set()
        self._adopting: dict[str, asyncio.Event] = {}  # set when it is over
        self._unknown: dict[str, Record] = {}  # proposals that the peer may have granted, or may grant still
        self._granted: dict[str, Record] = {}  # the record that one was granted in place of, without the peer

    # --- Asking the peer ---

    async def read(self, group: str) -> Known | Unreachable:
        """See ``Arbiter``. The own record is current without the peer's word if nobody else may have changed it."""
        answer = await self._ask(group)
        own = self._own_record(group)
        if isinstance(answer, Unreachable):
            return Known(own) if own.alone and own.owner != self._peer.name else answer
        current = answer.current
        if current is None or current == own or current.epoch < own.epoch:
            return Known(own)
        if current.epoch > own.epoch:
            return Known(current)
        return Unreachable(f"{self._peer.name} has another record of the same epoch ({current}; here: {own})")

    async def _ask(self, group: str) -> Known | Unreachable:
        """Ask the peer for its record; the answer decides what became of a proposal that was sent before."""
        unknown = None if group in self._proposing else self._unknown.get(group)
        answer = await self._peer.ask(group)
        if unknown and self._unknown.get(group) is unknown and isinstance(answer, Known):
            current = answer.current
            if group not in self._proposing and (current is None or current.epoch < unknown.epoch):
                del self._unknown[group]
        return answer

    async def propose(self, group: str, old: Record, new: Record) -> Granted | Refused | Unreachable:
        """See ``Arbiter``. Refused with ``old`` means: not now, as the peer proposes something, too."""
        own = self._own_record(group)
        if own == new:
            return Granted()
        if own != old or group in self._adopting or group in self._proposing:
            return Refused(own)
        self._proposing.add(group)
        try:
            return await self._propose(group, old, new)
        finally:
            self._proposing.discard(group)

    async def _propose(self, group: str, old: Record, new: Record) -> Granted | Refused | Unreachable:
        joins = self._peer.name in new.in_sync
        if joins and not await self._peer.will_ask_to_join(group, new.epoch):
            return Unreachable("what is about to be asked cannot be written down", asked=False)
        unknown = self._unknown.get(group)
        first = unknown is None or unknown.epoch < new.epoch
        self._unknown[group] = new
        answer = await self._peer.consent(group, old, new)
        if isinstance(answer, Refused) or (isinstance(answer, Unreachable) and first and not answer.asked):
            del self._unknown[group]
        if isinstance(answer, Refused):
            return self._refused(old, answer)
        if isinstance(answer, Granted) or joins:
            return answer  # nobody but the peer can grant what keeps it in sync
        stays_alone = (
            old.alone and new.alone and old.owner == new.owner and self._peer.asked_to_join(group) <= old.epoch
        )
        instead = Granted() if stays_alone else await self._without_peer(group, answer)
        if isinstance(instead, Granted):
            if (own := self._own_record(group)) != old:
                return Refused(own)  # learnt meanwhile
            # The peer may have saved an earlier proposal of ours before it went off: no epoch has two records.
            self._granted[group] = old
            return Granted(replace(new, epoch=new.epoch + 1))
        return instead

    def _refused(self, old: Record, answer: Refused) -> Refused | Unreachable:
        if answer.current is None or answer.current.epoch < old.epoch:
            return Unreachable(f"{self._peer.name} has not learnt of {old} yet", asked=False)
        return answer

    @abstractmethod
    async def _without_peer(self, group: str, answer: Unreachable) -> Granted | Unreachable:
        """A change that drops the peer, which did not answer."""

    async def seed(self, group: str, record: Record) -> Granted | Refused | Unreachable:
        """See ``Arbiter``. There is always a record: the node's own."""
        own = self._own_record(group)
        return Granted() if own == record else Refused(own)

    async def force(self, group: str, record: Record, note: str) -> Granted | Refused | Unreachable:
        """See ``Arbiter``. The register is the node's own record; the trace is its log."""
        own = self._own_record(group)
        if own != record and record.epoch <= own.epoch:
            return Refused(own)
        log.warning("Group %s is forced from %s to %s: %s.", group, own, record, note)
        return Granted()

    async def close(self) -> None:
        """See ``Arbiter``. The paths to the peer are the node's."""
        return

    # --- Answering the peer ---

    async def consider(self, group: str, old: Record, new: Record) -> Granted | Refused:
        """The answer to a proposal of the peer; granted when it is our record, too. Refused with ``old``: not now."""
        own = self._own_record(group)
        if own == new:
            return Granted()
        if own != old or new.epoch != old.epoch + 1 or group in self._proposing or group in self._adopting:
            return Refused(own)
        self._adopting[group] = over = asyncio.Event()  # from here on nothing is proposed
        try:
            adopted = await self._decided(group, own) and await self._adopt(group, new)
        finally:
            del self._adopting[group]
            over.set()
        return Granted() if adopted else Refused(self._own_record(group))

    async def tell(self, group: str) -> Known:
        """The answer to the peer's `ask`: only when it is known what becomes of a proposal that came before."""
        while over := self._adopting.get(group):
            await over.wait()
        return Known(self._own_record(group))

    def _is_granted(self, group: str) -> bool:
        """Whether the node is about to make a record its own that was granted without the peer: not when it has learnt
        of another one meanwhile."""
        return self._granted.get(group) == self._own_record(group)

    async def _decided(self, group: str, own: Record) -> bool:
        """Whether no earlier proposal of ours has been granted, or can be."""
        if self._is_granted(group):
            return False
        unknown = self._unknown.get(group)
        if unknown is None or unknown.epoch <= own.epoch:
            return True
        await self._ask(group)
        return group not in self._unknown and self._own_record(group) == own


class ManualArbiter(TwoNodes):
    """Nothing happens by itself: changes by consent of both nodes, everything else by the operator's override."""

    async def _without_peer(self, group: str, answer: Unreachable) -> Unreachable:
        return Unreachable(f"manual: {answer.why}; only the operator can decide for group {group}", answer.asked)


class FencingArbiter(TwoNodes):
    """Goes on without the peer when a fence agent has turned it off; ``agent``: how to fence the peer."""

    def __init__(
        self,
        peer: Peer,
        own_record: OwnRecord,
        adopt: Adopt,
        agent: FenceAgent,
        timeout_s: float,
        unanswered_s: float = UNANSWERED_S,
        now_ns: Callable[[], int] = boottime.now_ns,
    ) -> None:
        super().__init__(peer, own_record, adopt)
        self._agent = agent
        self._timeout_s = timeout_s
        self._unanswered_ns = int(unanswered_s * NS_PER_S)
        self._now_ns = now_ns
        self._fencing = asyncio.Lock()
        self._off_ns = 0  # when the peer was confirmed off; 0: never
        self._counted = Counted(log)
        self._unanswered: dict[str, tuple[int, int]] = {}  # when a question was not answered: first and last, in a row

    async def propose(self, group: str, old: Record, new: Record) -> Granted | Refused | Unreachable:
        """See ``Arbiter``. Takes as long as the fence agent, at most the configured time and a second."""
        answer = await super().propose(group, old, new)
        if not isinstance(answer, Unreachable):
            self._unanswered.pop(group, None)
        return answer

    @property
    def fencing(self) -> bool:
        """Whether the peer is being turned off, or something may be granted, or saved, because it is off."""
        if self._fencing.locked() or (self._proposing and self._is_off()):
            return True
        return any(map(self._is_granted, self._granted))

    async def _without_peer(self, group: str, answer: Unreachable) -> Granted | Unreachable:
        if hold := self._may_not_fence(group):
            return Unreachable(f"{answer.why}; {hold}", answer.asked)
        async with self._fencing:
            if not self._is_off():
                try:
                    await self._fence()
                except FenceError as error:
                    self._counted.add("fencing failed", f"{error}.")
                    return Unreachable(str(error), answer.asked)
        if self._is_off():
            return Granted()
        return Unreachable(f"{self._peer.name} was reported off, but is heard still or again", answer.asked)

    def _may_not_fence(self, group: str) -> str:
        """Why the peer may not be fenced now, as a clause; empty if it may."""
        name = self._peer.name
        if self._peer.alive() and not self._peer.has_same_arbiter():
            return f"{name} is not fenced, as it lives, and its cluster file has another arbiter"
        if not self._peer.seen():
            return f"{name} is not fenced, as it has not been seen since this machine booted"
        now_ns = self._now_ns()
        since_ns, last_ns = self._unanswered.get(group, (now_ns, now_ns))
        if now_ns - last_ns > self._unanswered_ns:  # long ago, and of another trouble
            since_ns = now_ns
        self._unanswered[group] = since_ns, now_ns
        if self._peer.alive() and now_ns - since_ns < self._unanswered_ns:
            return f"{name} is alive, and fenced only when it does not answer for {self._unanswered_ns / NS_PER_S:g} s"
        return ""

    def _is_off(self) -> bool:
        """Whether it was confirmed off, and nothing has been heard since."""
        return self._off_ns > 0 and self._peer.heard_ns() < self._off_ns and not self._peer.alive()

    async def _fence(self) -> None:
        self._counted.add("fencing", f"{self._peer.name} does not answer: fencing it with {self._agent.agent}.")
        await turn_off(self._peer.name, self._agent, self._timeout_s)
        self._off_ns = self._now_ns()
        log.warning("%s is off, as %s says.", self._peer.name, self._agent.agent)
