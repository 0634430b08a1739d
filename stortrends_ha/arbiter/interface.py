"""What every arbiter can be asked (see the safety rules, "Arbiters"); what it answers is in ``cluster.answers``."""

from typing import Protocol

from stortrends_ha.cluster.answers import Granted, Known, Refused, Unreachable
from stortrends_ha.record import Record

__all__ = ["Arbiter", "Granted", "Known", "Refused", "Unreachable"]


class Arbiter(Protocol):
    """One for the whole node. No method raises for what network or arbiter do; each returns in bounded time."""

    async def read(self, group: str) -> Known | Unreachable:
        """The current record of a group."""

    async def propose(self, group: str, old: Record, new: Record) -> Granted | Refused | Unreachable:
        """Compare-and-set from ``old`` to ``new``, whose epoch is the next."""

    async def seed(self, group: str, record: Record) -> Granted | Refused | Unreachable:
        """Set the record of a group that has none: both nodes agree on it."""

    async def force(self, group: str, record: Record, note: str) -> Granted | Refused | Unreachable:
        """The operator's override (rule 11): set ``record`` whatever is there, if its epoch is newer; leave a trace.

        ``note``: one line for the record's history: who decided it, and why.
        """

    async def close(self) -> None:
        """End all connections."""
