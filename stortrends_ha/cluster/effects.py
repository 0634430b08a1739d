"""What the state machine of a group wants done. The supervisor does it and tells the outcome. Pure.

Those marked *awaited* are answered by a call of the machine (``saved``, ``arbiter_said``, ``done``); the machine
goes on from there. They are carried out in the order in which they were given.
"""

from dataclasses import dataclass

from stortrends_ha.cluster.view import Saved
from stortrends_ha.record import Record


@dataclass(frozen=True, slots=True)
class Save:
    """Awaited. Make the record durable on this node: before anything is done because of it."""

    saved: Saved


@dataclass(frozen=True, slots=True)
class Read:
    """Awaited. Ask the arbiter for the current record."""

    number: int


@dataclass(frozen=True, slots=True)
class Propose:
    """Awaited. Ask the arbiter to change the record from ``old`` to ``new``."""

    number: int
    old: Record
    new: Record


@dataclass(frozen=True, slots=True)
class Seed:
    """Awaited. Give the arbiter, which has none, this record: both nodes agree on it."""

    number: int
    record: Record


@dataclass(frozen=True, slots=True)
class Force:
    """Awaited. The operator's override (rule 11): set the record, whatever the arbiter has."""

    number: int
    record: Record


@dataclass(frozen=True, slots=True)
class Follow:
    """Awaited. The data process becomes, or stays, the secondary for this record."""

    number: int
    record: Record


@dataclass(frozen=True, slots=True)
class Lead:
    """Awaited. The data process serves as the owner, but answers nothing before ``not_before_ns`` (CLOCK_BOOTTIME)."""

    number: int
    record: Record
    not_before_ns: int
    forced: bool  # rule 11: the data gets a new lineage
    clears_loss: bool  # the record was granted although this node's cache was lost


@dataclass(frozen=True, slots=True)
class Idle:
    """Awaited. The data process serves nothing, applies nothing and acknowledges nothing any more (rule 4)."""

    number: int


@dataclass(frozen=True, slots=True)
class Release:
    """Awaited. The data process answers what is under way, flushes both replicas and stops: before a handover."""

    number: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The data process closes connections of clients that were kept over a handover: the new owner is there."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The data process may answer until then (CLOCK_BOOTTIME)."""

    until_ns: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Bring up the group's floating addresses here; the new owner listens already."""


@dataclass(frozen=True, slots=True)
class Unclaim:
    """Awaited. Take down the group's floating addresses here (rule 12)."""

    number: int


@dataclass(frozen=True, slots=True)
class Decision:
    """For the log: what was decided, why, and at which epoch."""

    text: str


@dataclass(frozen=True, slots=True)
class Moved:
    """Clients are answered again after a change of the record that had held them: for the log and the metrics."""

    kind: str  # "takeover", "handover", "override", or "alone": the owner went on without its secondary
    duration_ns: int  # since the other node was heard, or served, last


Effect = (
    Save | Read | Propose | Seed | Force | Follow | Lead | Idle | Release | Drop | Lease | Claim | Unclaim | Decision
    | Moved
)  # fmt: skip
