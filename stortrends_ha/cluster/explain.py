"""Why a group is not simply in sync, and what would end that: one sentence for the status. Pure.

Invariants: a state never comes without a reason; no reason names a remedy that would not work (an override serves no
copy on a failed disk, and does not help while the arbiter does not answer). A reason stands after "GROUP on NODE is
STATE: ", so it begins in the middle of a sentence and has no full stop.
"""

from stortrends_ha.cluster.group import Group
from stortrends_ha.cluster.judgement import difference
from stortrends_ha.cluster.phases import Phase
from stortrends_ha.cluster.view import Replica, View

_S_NS = 1_000_000_000


def explain(group: Group, peer_name: str, view: View) -> tuple[str, str]:
    """(state, why): what the node's decisions add to what its data process says. Empty strings add nothing; with an
    empty state only the reason is a better one."""
    match group.phase:
        case Phase.LEARNING | Phase.RESTING:
            return _without_role(group, peer_name, view)
        case Phase.FOLLOWING:
            return _following(group, peer_name, view)
        case Phase.STOPPING | Phase.STANDING:
            return "held", _taking(group, peer_name, view)
        case Phase.RELEASING:
            return "held", f"it is being handed over to {peer_name}: what is under way is answered first"
        case Phase.HANDING:
            return "held", f"it is being handed over to {peer_name}: this node has stopped{_refused(group)}"
        case _:
            return _leading(group, peer_name, view)


def silence(peer_name: str, view: View) -> str:
    """That the peer is not heard, and for how long: a clause."""
    if view.peer is None:
        return f"{peer_name} has not been heard since this node started, {duration(view.silent_ns)} ago"
    return f"{peer_name} has not been heard for {duration(view.silent_ns)}"


def duration(ns: int) -> str:
    """In the unit that people would use."""
    seconds = max(ns, 0) / _S_NS
    for unit_s, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.1f} s"


# --- A node without a role ------------------------------------------------------------------------


def _without_role(group: Group, peer_name: str, view: View) -> tuple[str, str]:
    """Just started, or the owner by a record by which it cannot serve."""
    record = group.record
    if view.replica is None:
        return "", ""  # its data process says why
    if record.owner == peer_name:
        return "connecting", f"{peer_name} owns it, and this node is about to follow"
    unfit = group.unfit(view.replica)
    if unfit:
        return "held", f"this node owns it but must not serve it, as {unfit}; {_end_of_rest(group, peer_name, view)}"
    if record.epoch == 1:
        begins = "its first record is made when both nodes see each other and the arbiter answers"
        return "held", f"the group is new: {begins}{_waits(group)}"
    if record.alone and (other := difference(peer_name, view)):
        return "held", f"{other}, and it is not confirmed that this node serves alone{_waits(group)}"
    if record.alone:
        return "held", f"this node serves it alone as soon as the arbiter confirms that{_refused(group)}"
    if view.suspected:
        return "held", _going_alone(group, peer_name, silence(peer_name, view))
    if other := difference(peer_name, view):
        return "held", _going_alone(group, peer_name, other, back=False)
    if view.alive:
        return "connecting", f"this node serves it as soon as {peer_name} promises not to take over"
    return "connecting", f"waiting to hear {peer_name}"


def _end_of_rest(group: Group, peer_name: str, view: View) -> str:
    """What ends that the owner cannot serve."""
    override = _override(group, view.replica, "losing what is not here")
    if peer_name not in group.record.in_sync:
        return override or "no other node has everything: mend the disk and start this node again"
    if not view.alive:
        return f"it goes on when {peer_name} is back" + (f", or {override}" if override else "")
    if view.peer is not None and view.peer.unfit:
        return f"{peer_name} must not either, as {view.peer.unfit}" + (f"; {override}" if override else "")
    return f"{peer_name} takes over{_refused(group)}"


# --- The secondary --------------------------------------------------------------------------------


def _following(group: Group, peer_name: str, view: View) -> tuple[str, str]:
    if view.suspected:
        return "held", _bereft(group, peer_name, view, silence(peer_name, view), f"{peer_name} is back")
    peer = view.peer
    if view.alive and peer is not None and peer.record == group.record and peer.unfit and not peer.leading:
        return "held", _bereft(group, peer_name, view, f"{peer_name} cannot serve, as {peer.unfit}", "it can again")
    if other := difference(peer_name, view):
        return "", f"{other}; this node is in sync again when both have the same"
    return "", ""


def _bereft(group: Group, peer_name: str, view: View, trouble: str, back: str) -> str:
    """A secondary whose owner does not serve. ``back``: what would end that, after "when"."""
    unfit = group.unfit(view.replica)
    if not unfit:
        if group.waits_for:
            return (
                f"{trouble}, and taking over is not granted ({group.waits_for}); it goes on when it is, or when {back}"
            )
        return f"{trouble}, and this node is about to take over"
    override = _override(group, view.replica, f"losing what only {peer_name} has")
    ends = f"it goes on when {back}" + (f", or {override}" if override else "")
    unknown = ""
    if group.waits_for and not group.record.alone:
        unknown = f"; whether {peer_name} went on alone before is not known ({group.waits_for})"
    return f"{trouble}, and this node must not take over, as {unfit}{unknown}; {ends}"


def _taking(group: Group, peer_name: str, view: View) -> str:
    if group.record.owner != peer_name:
        return f"the operator overrides who owns it{_refused(group)}"
    cause = f"{silence(peer_name, view)}, and " if view.suspected else ""
    return f"{cause}this node is taking over{_refused(group)}"


# --- The owner ------------------------------------------------------------------------------------


def _leading(group: Group, peer_name: str, view: View) -> tuple[str, str]:
    replica = view.replica
    if replica is not None and replica.cannot_listen:
        return "held", f"this node {replica.cannot_listen}"
    if group.record.alone:
        return _alone(group, peer_name, view)
    if view.suspected:
        return "held", _going_alone(group, peer_name, silence(peer_name, view))
    if other := difference(peer_name, view):
        return "held", _going_alone(group, peer_name, other, back=False)
    if group.waits_for and replica is not None and replica.leading and not replica.session:
        if replica.peer_unfit:
            return "held", _going_alone(group, peer_name, replica.peer_unfit, back=False)
        return "held", _going_alone(group, peer_name, f"there is no link to {peer_name}")
    return "", ""


def _alone(group: Group, peer_name: str, view: View) -> tuple[str, str]:
    joinable = view.replica is not None and view.replica.joinable
    if group.waits_for and joinable:
        return "", f"{peer_name} has everything, and adding it is not granted yet ({group.waits_for})"
    if group.waits_for and group.proposing:
        unknown = f"it must be known whether it was, and the arbiter does not say ({group.waits_for})"
        return "", f"{peer_name} was lost while it was being added: {unknown}"
    if view.suspected:
        return "", f"{silence(peer_name, view)}; it is synced when it is back"
    if other := difference(peer_name, view):
        return "", f"{other}; it is in sync again when both have the same"
    return "", ""


def _going_alone(group: Group, peer_name: str, trouble: str, *, back: bool = True) -> str:
    """``back``: whether the peer would end it by being back."""
    if not group.waits_for:
        return f"{trouble}, and this node asks to go on alone"
    ends = f"it goes on when it is, or when {peer_name} is back" if back else "it goes on when it is"
    return f"{trouble}, and going on alone is not granted ({group.waits_for}); {ends}"


# --- Pieces ---------------------------------------------------------------------------------------


def _refused(group: Group) -> str:
    return f", which is not granted yet ({group.waits_for})" if group.waits_for else ""


def _waits(group: Group) -> str:
    return f" ({group.waits_for})" if group.waits_for else ""


def _override(group: Group, replica: Replica | None, price: str) -> str:
    """The operator's way out, where there is one (rule 11)."""
    if replica is None or replica.failure:
        return ""
    return f"by the operator, {price}: stortrends-ha group force-own {group.name}"
