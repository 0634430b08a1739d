"""Which arbiter the records rest on: two nodes never ask two arbiters, and never reckon with two lengths of a lease.

A node whose cluster file has another arbiter, or other timings, than before asks its arbiter nothing (but for the
operator's override), and promises nothing, until the peer has them, too. That is *agreed* in two steps, each durable in
``state_dir/arbiter`` before it counts: when the peer, alive, has the same, this node will never ask the old arbiter
again; when the peer says the same of itself, this node asks the new one. A node that dies between any two steps, and
starts with either file, asks an arbiter only if no node can be asking another one.

A node without the file is new, and has no record but the first: it begins with what its cluster file says. A file that
cannot be read is an error of the start; one that cannot be written is tried again with the next beat.
"""

import asyncio
import logging
from pathlib import Path

from stortrends_ha.arbiter.interface import Arbiter
from stortrends_ha.boottime import now_ns
from stortrends_ha.cluster.answers import Granted, Known, Refused, Unreachable
from stortrends_ha.cluster.membership import Membership
from stortrends_ha.config import BINDING, Sections
from stortrends_ha.errors import StartError
from stortrends_ha.node.records import replace_file
from stortrends_ha.protocol.heartbeat import LEFT
from stortrends_ha.record import Record

log = logging.getLogger(__name__)

_AGREED = "agreed"


def binding(sections: Sections) -> str:
    """What must be the same on both nodes, in one word."""
    return "-".join(digest for name, digest in sections if name in BINDING)


def differing(membership: Membership) -> list[str]:
    """What must be the same on the peer, and is not, as it said last."""
    return [name for name in membership.other_sections if name in BINDING]


class Agreement:
    """Of one node with its peer."""

    def __init__(self, path: Path, membership: Membership, sections: Sections) -> None:
        """Raises StartError."""
        self._path = path
        self._membership = membership
        self._sections = sections
        self._own = binding(sections)
        self._left, self._is_agreed = self._own, True
        self._writing: asyncio.Task[None] | None = None
        try:
            self._left, *more = path.read_text().split()
            self._is_agreed = more == [_AGREED]
        except FileNotFoundError:
            self._is_new = True
        except OSError as error:
            raise StartError(f"{path} cannot be read: {error.strerror}.") from None
        except ValueError:
            raise StartError(f"{path} is damaged: remove it while the other node is running.") from None
        else:
            self._is_new = False
        self._tell()

    @property
    def reached(self) -> bool:
        """Whether the arbiter of the cluster file may be asked."""
        return self._is_agreed and self._left == self._own

    @property
    def differs(self) -> str:
        """For ``cluster.view.View``. Until it is agreed the peer may still ask another arbiter."""
        names = differing(self._membership) or ([] if self.reached else ["arbiter"])
        return " and another ".join(names)

    @property
    def why_not(self) -> str:
        """Why not, a clause."""
        return (
            f"the arbiter, or a timing, of the cluster file is new here: it counts when {self._membership.peer_name} "
            "runs with the same"
        )

    async def begin(self) -> None:
        """Note what a new node begins with. Raises StartError."""
        if self._is_new:
            try:
                await self._write(self._own, agreed=True)
            except OSError as error:
                raise StartError(f"{self._path} cannot be written: {error.strerror}.") from None

    def note_beat(self) -> None:
        """A beat of the peer has come that counts: the next step may be due."""
        if self.reached or (self._writing is not None and not self._writing.done()):
            return
        of = self._membership
        theirs = of.peer.sections if of.peer is not None and of.alive(now_ns()) else ()
        if binding(theirs) != self._own:
            return
        if self._left != self._own:
            self._writing = asyncio.create_task(self._take_step(agreed=False))
        elif dict(theirs).get(LEFT) == self._own:
            self._writing = asyncio.create_task(self._take_step(agreed=True))

    async def _take_step(self, *, agreed: bool) -> None:
        try:
            await self._write(self._own, agreed=agreed)
        except OSError as error:
            log.warning("%s cannot be written: %s.", self._path, error.strerror)
            return
        if agreed:
            log.info("Both nodes have the same arbiter and timings, which are new here: they count from now on.")

    async def _write(self, left: str, *, agreed: bool) -> None:
        await replace_file(self._path, f"{left} {_AGREED}\n" if agreed else f"{left}\n")
        self._left, self._is_agreed = left, agreed
        self._tell()

    def _tell(self) -> None:
        self._membership.sections = (*self._sections, (LEFT, self._left))

    async def close(self) -> None:
        """Wait until nothing is being written."""
        if self._writing is not None:
            await self._writing


class AgreedArbiter:
    """An arbiter that is asked only when it is agreed. Implements ``Arbiter``."""

    def __init__(self, arbiter: Arbiter, agreement: Agreement) -> None:
        self._arbiter = arbiter
        self._agreement = agreement

    def _refusal(self) -> Unreachable | None:
        return None if self._agreement.reached else Unreachable(self._agreement.why_not, asked=False)

    async def read(self, group: str) -> Known | Unreachable:
        """See ``Arbiter``."""
        return self._refusal() or await self._arbiter.read(group)

    async def propose(self, group: str, old: Record, new: Record) -> Granted | Refused | Unreachable:
        """See ``Arbiter``."""
        return self._refusal() or await self._arbiter.propose(group, old, new)

    async def seed(self, group: str, record: Record) -> Granted | Refused | Unreachable:
        """See ``Arbiter``."""
        return self._refusal() or await self._arbiter.seed(group, record)

    async def force(self, group: str, record: Record, note: str) -> Granted | Refused | Unreachable:
        """See ``Arbiter``. The operator decides."""
        return await self._arbiter.force(group, record, note)

    async def close(self) -> None:
        """See ``Arbiter``."""
        await self._arbiter.close()
