"""The phases of a group on a node, and which may follow which: everything else is a bug. Pure."""

from enum import StrEnum


class Phase(StrEnum):
    """What this node is to the group."""

    LEARNING = "learning"  # just started: it has no role yet
    FOLLOWING = "following"  # the secondary
    STOPPING = "stopping"  # about to take over: its data process is told to stop listening
    STANDING = "standing"  # it has stopped listening, for good at this epoch, and proposes to take over
    LEADING = "leading"  # the owner
    RELEASING = "releasing"  # an owner that finishes what is under way, for a handover
    HANDING = "handing"  # it has stopped serving and proposes the handover
    RESTING = "resting"  # the owner by the record, but it cannot serve


_P = Phase
TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    _P.LEARNING: frozenset({_P.FOLLOWING, _P.LEADING, _P.RESTING, _P.STOPPING}),
    _P.FOLLOWING: frozenset({_P.STOPPING, _P.LEADING, _P.RESTING}),
    _P.STOPPING: frozenset({_P.STANDING, _P.FOLLOWING, _P.LEADING, _P.RESTING}),
    _P.STANDING: frozenset({_P.LEADING, _P.FOLLOWING, _P.RESTING}),
    _P.LEADING: frozenset({_P.RELEASING, _P.FOLLOWING, _P.RESTING}),
    _P.RELEASING: frozenset({_P.HANDING, _P.LEADING, _P.FOLLOWING, _P.RESTING}),
    _P.HANDING: frozenset({_P.FOLLOWING, _P.LEADING, _P.RESTING}),
    _P.RESTING: frozenset({_P.LEADING, _P.FOLLOWING, _P.STOPPING}),
}
# Rule 5: in these a node that follows may acknowledge the owner's beats with a promise.
PROMISING = frozenset({_P.LEARNING, _P.FOLLOWING, _P.RESTING})


class IllegalMove(AssertionError):
    """The machine was about to do what its table forbids: a bug."""


def moved(group: str, old: Phase, new: Phase) -> Phase:
    """The new phase. Raises IllegalMove."""
    if new is not old and new not in TRANSITIONS[old]:
        raise IllegalMove(f"group {group}: from {old} to {new}")
    return new
