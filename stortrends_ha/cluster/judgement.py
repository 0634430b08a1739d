"""The questions on which a group's decisions rest, each answered from what is known now. Pure functions.

Answers that are reasons are clauses for log and status; an empty one means no.
"""

from stortrends_ha.cluster.view import Replica, Timing, View
from stortrends_ha.record import Record


def obstacle(record: Record, alone_since: int, me: str, replica: Replica, *, in_spite: bool) -> str:
    """Rule 3: why this node's copy may not be served. ``in_spite``: it may although its cache was lost (both nodes lost
    theirs, or the operator overrides)."""
    if me not in record.in_sync:
        return f"{record.owner} alone has every acknowledged write"
    if replica.failure:
        return f"its disk failed: {replica.failure}"
    if record.epoch > 1 and not replica.has_data:
        return "it has no data of the group: its disk was replaced, its state is lost, or it never had any"
    if replica.needs_sync:
        return "a sync of its copy did not end"
    settled = record.alone and replica.settled_epoch >= alone_since
    if replica.lost_cache and not settled and not in_spite:
        return "its host restarted or its disk failed, so its copy may lack acknowledged writes"
    return ""


def heard_ns(view: View) -> int:
    """When the peer was heard last, on this node's clock; now, while it lives."""
    return view.now_ns - (0 if view.alive else view.silent_ns)


def both_lost(record: Record, me: str, view: View) -> bool:
    """Rule 3: both nodes are here and have lost their caches: the last owner's copy wins."""
    peer, replica = view.peer, view.replica
    if record.owner != me or replica is None or replica.failure or replica.needs_sync:
        return False
    if not view.alive or peer is None or peer.record != record or peer.leading:
        return False
    return replica.lost_cache and peer.lost


def reason_to_take_over(record: Record, peer_name: str, view: View, timing: Timing, behind_ns: int) -> str:
    """Why the secondary should reach for ownership. An owner that lives is given time to go on alone first; a node that
    is being stopped itself does not begin. ``behind_ns``: how long the peer ``is_behind``."""
    if view.stopping:
        return ""
    patience_ns = timing.suspect_after_ns + timing.takeover_delay_ns
    if view.suspected:
        return silence(peer_name, view) if view.silent_ns >= patience_ns else ""
    if behind_ns >= patience_ns:
        return f"{peer_name} has not taken the group for {behind_ns / 1e9:.1f} s: it could not save its record"
    peer = view.peer
    if view.alive and peer is not None and peer.record == record and not peer.leading:
        if peer.unfit:
            return f"{peer_name} cannot serve: {peer.unfit}"
        return difference(peer_name, view)
    return ""


def is_behind(record: Record, view: View) -> bool:
    """Whether the peer lives by an older record, and so does not yet own what this one gives to it."""
    peer = view.peer
    return view.alive and peer is not None and peer.record.epoch < record.epoch and not peer.leading


def reason_to_go_alone(record: Record, peer_name: str, view: View, timing: Timing, absent_ns: int) -> str:
    """Rules 2 and 3: why the record must not say any longer that the peer is in sync. ``absent_ns``: how long there
    has been no link session."""
    if view.suspected:
        return silence(peer_name, view)
    replica = view.replica
    if replica is not None and replica.peer_unfit and replica.epoch == record.epoch:
        return replica.peer_unfit
    if view.alive and view.peer_stopping and not view.stopping:
        return f"{peer_name} is being stopped"
    if other := difference(peer_name, view):
        return other
    if view.alive and absent_ns >= timing.suspect_after_ns:
        return f"there has been no link to {peer_name} for {absent_ns / 1e9:.1f} s"
    return ""


def may_override(view: View) -> bool:
    """Rule 11: as far as this node can know, the peer serves nobody. A node in doubt (it has just started, or has just
    been continued) listens first."""
    if view.alive:
        return view.peer is None or not view.peer.leading
    return view.suspected


def owner_is_back(record: Record, view: View) -> bool:
    """Whether the owner that was missed is heard, has this very record still, and can serve by it."""
    peer = view.peer
    if not view.alive or peer is None or peer.record != record or peer.unfit:
        return False
    return peer.leading or not view.differs


def may_join(record: Record, view: View) -> bool:
    """Rules 9 and 5: the peer has everything, and its promise holds."""
    replica, peer = view.replica, view.peer
    if replica is None or peer is None:
        return False
    complete = replica.joinable and replica.epoch == record.epoch
    stays = view.alive and not view.peer_stopping
    return complete and stays and peer.promise and view.now_ns < view.lease_until_ns


def peer_can_own(record: Record, peer_name: str, view: View) -> bool:
    """Whether a handover to the peer, now, would leave the group well."""
    peer = view.peer
    if peer is None or not view.alive or view.peer_stopping:
        return False
    return peer_name in record.in_sync and peer.record == record and peer.promise and not peer.unfit


def nobody_else_answers(record: Record, view: View) -> bool:
    """Rule 5: the peer itself says that it does not serve, and as it has saved this record, which gives the group to
    us, it cannot begin to."""
    return view.alive and view.peer is not None and view.peer.record == record and not view.peer.leading


def difference(peer_name: str, view: View) -> str:
    """That no promise of the peer, which lives, counts, as the arbiter or the leases are not the same there; empty if
    they are, or it is not heard."""
    return f"the cluster file on {peer_name} has another {view.differs}" if view.alive and view.differs else ""


def silence(peer_name: str, view: View) -> str:
    """That the peer is not heard."""
    return f"{peer_name} has not been heard for {view.silent_ns / 1e9:.1f} s"
