"""What two nodes must know of each other before a session: whether they fit, and what it begins with. Pure.

Rule 6: a session is for (cluster, group, epoch, owner); a secondary opens one for exactly the record that it was told.
Rule 10: replicas of unrelated lineage never sync by themselves; only a blank one may be filled, or one that the
operator has given up for the data of this very owner.
Rule 3: an owner that may have lost acknowledged writes does not serve from its own copy.
Rule 9: a sync overwrites only a node that the record does not have in sync (``SYNC`` asks for an owner that is alone),
so whoever may take over is never half overwritten. While both are in sync, each has every write that was answered: what
was under way when one of them was killed may differ, and is made equal by the owner's copy (``RECONCILE``), whichever
part of that was done.

``opening`` is the talk in which this is asked and answered.
"""

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from stortrends_ha.errors import ProtocolError
from stortrends_ha.record import Record

# A frame has 64 bits for the number of a change.
CHANGES = 1 << 63


_STRINGS = ("cluster", "group", "node", "peer", "software", "lineage", "filling", "gives_up")
_FLAGS = ("blank", "lost_cache", "needs_sync", "differs", "unknown", "behind", "inspects")


@dataclass(frozen=True, slots=True)
class Hello:
    """What a node says of itself and its replica when a link connects."""

    cluster: str
    group: str
    node: str
    peer: str  # the node that it expects at the other end
    protocols: tuple[int, int]  # the oldest and the newest link protocol it speaks
    software: str  # its version, for people
    record: Record
    volumes: tuple[tuple[str, int], ...]  # names and sizes in bytes
    lineage: str  # the identity of the group's data; empty if the replica has none yet
    blank: bool  # no lineage, and nothing but zeroes on its volumes
    lost_cache: bool  # its host restarted, so writes that were only cached may be missing
    needs_sync: bool  # it was being synced and that did not end
    differs: bool  # by its intent log and dirty map the replicas may differ by more than what is in flight
    unknown: bool  # it does not know what may differ
    filling: str  # which copying of everything to it has begun and did not end; empty for none
    gives_up: str  # the lineage for which the operator has given this replica up; empty if he has not
    behind: bool  # the owner answered writes alone that the secondary has not got, though the record has it in sync
    inspects: bool  # a secondary whose operator wants to see what differs, where there can be no session

    def encode(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "record": self.record.encode()}

    @staticmethod
    def decode(value: dict[str, Any]) -> "Hello":
        """From a JSON object of a peer; it may have more keys than are known. Raises ProtocolError."""
        try:
            hello = Hello(
                **{key: typed(value[key], str) for key in _STRINGS},
                protocols=_pair(value["protocols"], int, int),
                record=Record.decode(value["record"]),
                volumes=tuple(_pair(volume, str, int) for volume in typed(value["volumes"], list)),
                **{key: typed(value[key], bool) for key in _FLAGS},
            )
        except (LookupError, TypeError, ValueError) as e:
            raise ProtocolError(f"a HELLO that does not say what it should: {e!r}") from None
        return hello


def typed(value: Any, kind: type) -> Any:
    """A value of foreign JSON, which must be of this very type (a bool is no int). Raises TypeError."""
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value


def _pair(value: Any, first: type, second: type) -> tuple[Any, Any]:
    one, other = typed(value, list)
    return typed(one, first), typed(other, second)


def refusal(mine: Hello, theirs: Hello, owner: Hello) -> str:
    """Why this node will not open a session with that peer, all reasons in a sentence; empty if it will.

    ``owner`` is the one of the two that opens the session.
    """
    me, peer = mine.node, theirs.node
    reasons = [
        f"{what} is {its!r} on {peer} and {own!r} on {me}"
        for what, own, its in (
            ("the cluster", mine.cluster, theirs.cluster),
            ("the group", mine.group, theirs.group),
        )
        if own != its
    ]
    if peer != mine.peer:
        reasons.append(f"{peer} is not {mine.peer}, the peer of {me}")
    if me != theirs.peer:
        reasons.append(f"{me} is not {theirs.peer}, the peer of {peer}")
    reasons += _volume_differences(mine, theirs)
    if not reasons:
        reasons += _record_differences(owner, theirs if owner is mine else mine)
    return "; ".join(reasons)


def common_protocol(mine: tuple[int, int], theirs: tuple[int, int]) -> int | None:
    """The newest link protocol that both speak, of the oldest and newest of each."""
    newest = min(mine[1], theirs[1])
    return newest if newest >= max(mine[0], theirs[0]) else None


def incompatible(mine: Hello, value: dict[str, Any]) -> str:
    """Why the peer's link protocol does not fit; empty if it does. To be asked before the rest of its HELLO is decoded.

    These three keys keep their meaning in every version. Raises ProtocolError.
    """
    try:
        theirs = _pair(value["protocols"], int, int)
        peer, software = typed(value["node"], str), typed(value["software"], str)
    except (LookupError, TypeError, ValueError) as e:
        raise ProtocolError(f"a HELLO that does not say what it should: {e!r}") from None
    if common_protocol(mine.protocols, theirs) is not None:
        return ""
    return (
        f"{peer} (version {software}) speaks link protocols {theirs[0]} to {theirs[1]} and {mine.node} "
        f"(version {mine.software}) speaks {mine.protocols[0]} to {mine.protocols[1]}"
    )


def _volume_differences(mine: Hello, theirs: Hello) -> list[str]:
    own, its = dict(mine.volumes), dict(theirs.volumes)
    reasons = [f"volume {name} is missing on {theirs.node}" for name in own if name not in its]
    reasons += [f"volume {name} is missing on {mine.node}" for name in its if name not in own]
    reasons += [
        f"volume {name} has {its[name]} bytes on {theirs.node} and {own[name]} on {mine.node}"
        for name in own
        if name in its and own[name] != its[name]
    ]
    if not reasons and mine.volumes != theirs.volumes:
        reasons.append(f"the volumes are in another order on {theirs.node} than on {mine.node}")
    return reasons


def passing(mine: Hello, theirs: Hello) -> bool:
    """Whether a refusal by this secondary is a matter of milliseconds: it has yet to hear of the owner's record."""
    return theirs.record.epoch > mine.record.epoch


def _record_differences(owner: Hello, secondary: Hello) -> list[str]:
    """Rule 6: a session is of exactly the record that both act for."""
    session, known = owner.record, secondary.record
    if session.epoch < known.epoch:
        return [
            f"a session of {owner.node} would be of epoch {session.epoch}, which is older than "
            f"epoch {known.epoch} on {secondary.node}"
        ]
    reasons = []
    if session.owner != owner.node:
        reasons.append(f"{owner.node} is not the owner, {session.owner} is")
    if session.epoch > known.epoch:
        return [*reasons, f"epoch {session.epoch} is not known on {secondary.node} yet, which is at {known.epoch}"]
    if session.owner != known.owner:
        owners = f"{session.owner} on {owner.node} and {known.owner} on {secondary.node}"
        reasons.append(f"at epoch {session.epoch} the owner is {owners}")
    if set(session.in_sync) != set(known.in_sync):
        one, other = (", ".join(sorted(record.in_sync)) for record in (session, known))
        reasons.append(f"at epoch {session.epoch} in sync are {one} on {owner.node} and {other} on {secondary.node}")
    return reasons


class Plan(Enum):
    """What an opened session begins with, or why there is none."""

    RESUME = "resume"  # only what was in flight is sent again
    RECONCILE = "reconcile"  # and what may differ is made equal, though both are in sync
    SYNC = "sync"  # what the secondary may lack is copied
    UNFIT = "unfit"  # nothing: the secondary must be synced, so the record may not have it in sync any longer
    HOLD = "hold"  # nothing: an operator has to decide


def plan(owner: Hello, secondary: Hello) -> tuple[Plan, str]:
    """What the owner must do with this secondary, and why."""
    if reason := _obstacle(owner, secondary):
        return Plan.HOLD, reason
    reason = _why_incomplete(owner, secondary)
    if owner.record.alone:
        return Plan.SYNC, reason or f"{secondary.node} is not in sync"
    if secondary.node not in owner.record.in_sync:
        reason = reason or f"{secondary.node} is not in sync"
    if reason:
        return Plan.UNFIT, reason
    for each in (owner, secondary):
        if each.differs:
            return Plan.RECONCILE, f"what {each.node} was doing when it ceased to own may be on one replica only"
    return Plan.RESUME, "nothing was lost"


def must_fill(owner: Hello, secondary: Hello) -> bool:
    """Whether all of the volumes has to be copied: the secondary has nothing, or nobody knows what it lacks. Not again,
    if that has begun and this owner has kept what is left of it."""
    begun_elsewhere = bool(secondary.filling) and secondary.filling != owner.filling
    return begun_elsewhere or bool(secondary.gives_up) or not secondary.lineage or secondary.unknown


def _obstacle(owner: Hello, secondary: Hello) -> str:
    """Why nothing at all may be copied from this owner to this secondary; empty if it may."""
    given_up = bool(secondary.gives_up) and secondary.gives_up == owner.lineage
    if not (secondary.lineage or secondary.blank or given_up):
        return (
            f"{secondary.node} has data of unknown origin on its volumes, and a sync would overwrite it: "
            f"if it is not needed, `stortrends-ha volume replace {secondary.volumes[0][0]} --node {secondary.node}`"
        )
    if diverged(owner, secondary) and not given_up:
        return (
            f"the replicas on {owner.node} and {secondary.node} have no common history (lineage "
            f"{owner.lineage[:8]} and {secondary.lineage[:8]}): `stortrends-ha group diff {owner.group}` shows where "
            "they differ, `group resolve` keeps one of them"
        )
    if owner.needs_sync:
        return f"a sync of {owner.node} did not end, so its copy is not complete and must not be used"
    if owner.lost_cache:
        return (
            f"the host of {owner.node} restarted or its disk failed, so its copy may lack acknowledged writes: "
            "it must not be served or copied"
        )
    return ""


def diverged(one: Hello, other: Hello) -> bool:
    """Rule 10: both have data, with no common history."""
    return bool(one.lineage and other.lineage) and one.lineage != other.lineage


def _why_incomplete(owner: Hello, secondary: Hello) -> str:
    """Why the secondary may lack what was answered; empty if it does not."""
    if secondary.gives_up:
        return f"what {secondary.node} has was given up by its operator"
    if not secondary.lineage:
        return f"{secondary.node} is blank"
    if secondary.lost_cache:
        return f"the host of {secondary.node} restarted or its disk failed, so its copy may lack writes"
    if secondary.needs_sync:
        return f"an earlier sync of {secondary.node} did not end"
    if owner.behind:
        return f"{secondary.node} has not got everything that was answered while {owner.node} was alone"
    if owner.unknown or secondary.unknown:
        return "nobody knows what may differ, as an intent log or dirty map was lost"
    return ""


def may_follow(mine: Hello, lineage: str, plan: Plan, fill: str) -> bool:
    """Whether a secondary may join a session of this lineage that begins with this plan. ``fill``: everything is copied
    to it, by this name of the copying.

    It holds by itself what ``plan`` decides at the owner: no owner can make it lose a copy that has another history, or
    overwrite it while the record that it was told has it in sync (rule 9), or leave out what it lacks.
    """
    if (plan is Plan.SYNC) != mine.record.alone:
        return False
    if plan is Plan.SYNC:
        if mine.gives_up and mine.gives_up == lineage:
            return bool(fill)
        known = mine.lineage == lineage if mine.lineage else mine.blank and bool(fill)
        return known and (bool(fill) or not (mine.unknown or mine.gives_up))
    if mine.lineage != lineage or not lineage or mine.needs_sync or mine.lost_cache or mine.unknown or fill:
        return False
    if mine.gives_up:
        return False
    return plan is Plan.RECONCILE or not mine.differs
