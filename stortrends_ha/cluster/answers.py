"""What an arbiter can answer. Pure.

An outcome that is not known (a time-out after the request was sent) is ``Unreachable``: the caller proposes again, and
never assumes. A proposal whose ``new`` is the current record already is ``Granted``: an epoch has one proposer, so it
was this one.
"""

from dataclasses import dataclass

from stortrends_ha.record import Record


@dataclass(frozen=True, slots=True)
class Granted:
    """The record is the proposed one now, durably; or ``instead``, which says the same at a later epoch."""

    instead: Record | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """The register holds something else than the old record of the proposal; None: it holds nothing for this group."""

    current: Record | None


@dataclass(frozen=True, slots=True)
class Known:
    """The answer to a read; None: the arbiter has no record of this group (new, or it has lost its registers)."""

    current: Record | None


@dataclass(frozen=True, slots=True)
class Unreachable:
    """No answer, or one that does not say what happened."""

    why: str  # a clause for people, naming the arbiter
    asked: bool = True  # the request may have been, or may yet be, carried out


Answer = Granted | Refused | Known | Unreachable
