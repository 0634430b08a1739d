"""Who may own, and who may answer: proposals, leading, leases (rules 2 to 5)."""

from collections.abc import Iterator

from . import rules
from .world import Arbiter, Lease, Node, Proposal, Record, Role, Setting, Step, World


def propose(world: World, n: int, owner: int, alone: bool, setting: Setting, text: str) -> Iterator[Step]:
    """Store the proposal, then send it. The same is sent again as long as its outcome is not known.

    Between two proposals of one epoch the register decides. Without one, what the peer may have granted is never
    contradicted: the next proposal has the epoch after.
    """
    node = world.nodes[n]
    proposal = node.ask
    if proposal is None or (proposal.record.owner, proposal.record.alone) != (owner, alone):
        old: tuple[Record, ...] = (node.rec,)
        if proposal is not None and setting.arbiter is Arbiter.FENCING and setting.has(rules.FRESH_EPOCH):
            old = (*proposal.old, proposal.record)
        proposal = Proposal(n, Record(old[-1].epoch + 1, owner, alone), old)
    if proposal.record.epoch <= setting.bounds.epochs and (node.ask != proposal or proposal not in world.wire):
        yield Step(text, n, world.put(n, node._replace(ask=proposal), wire=world.wire | {proposal}))


def go_alone(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """Rule 2. Also how an owner that is sealed or drained gets out of it when its proposal is not granted."""
    node = world.nodes[n]
    goes_on_alone_already = node.rec.alone and node.ask is None
    if world.session is None and not goes_on_alone_already:
        yield from propose(world, n, n, True, setting, "{0} proposes to go alone")


def go_alone_unasked(world: World, n: int, _setting: Setting) -> Iterator[Step]:
    """Rule removed: the owner just goes alone."""
    node = world.nodes[n]
    if world.session is None and not node.rec.alone:
        yield Step("{0} goes alone unasked", n, world.put(n, node._replace(rec=node.rec._replace(alone=True))))


def take_over(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """Rules 3 and 4: a follower in sync that lost nothing stops listening, then proposes itself.

    Also for an owner that was restarted, when it was mirrored, or cannot know what became of its proposal.
    """
    node = world.nodes[n]
    in_sync = node.rec.has_in_sync(n) or not setting.has(rules.INSYNC_ONLY)
    sure_already = node.rec.alone and node.rec.owner == n and node.ask is None
    if in_sync and not sure_already and _is_complete(node, n, setting):
        session = None if setting.has(rules.STOP_FIRST) else world.session
        yield from propose(world._replace(session=session), n, n, True, setting, "{0} proposes to take over")


def last_owner_wins(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """Both lost their caches: the owner's copy wins, by going alone. Only what was never flushed may be lost."""
    node, peer = world.nodes[n], world.nodes[1 - n]
    both_wait = peer.role == Role.FOLLOWER and node.rec == peer.rec and node.rec.owner == n
    if not both_wait or not (node.lost and peer.lost):
        return
    if not node.rec.alone or node.ask is not None:
        yield from propose(world, n, n, True, setting, "{0} proposes to go alone, as both lost their caches")
    elif not node.settled:
        led = world.put(n, node._replace(role=Role.OWNER, lost=False, wait=setting.has(rules.LEASE_WAIT)))
        acked = node.mem if node.mem >= world.flushed else world.acked
        yield Step("{0} leads with its copy, as both lost their caches", n, led._replace(acked=acked))


def lead(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The record names the node owner: by its own proposal, by a handover, or it was restarted."""
    node = world.nodes[n]
    if node.rec.owner != n or node.ask is not None:
        return
    if not _is_complete(node, n, setting):
        return
    if setting.has(rules.CONFIRM_ALONE) and node.rec.alone and not _is_confirmed(world, n, setting):
        return
    owner = node._replace(
        role=Role.OWNER,
        lost=False,
        unclean=node.unclean and not node.rec.alone,
        wait=node.rec.alone and setting.has(rules.LEASE_WAIT) and not node.excused,
        excused=False,
    )
    yield Step("{0} leads", n, world.put(n, owner))


def _is_complete(node: Node, n: int, setting: Setting) -> bool:
    """Rule 3: it has everything that was acknowledged, if the record says that it is in sync."""
    was_settled = node.rec.alone and node.rec.owner == n and (node.settled or not setting.has(rules.SETTLE))
    return not node.lost or was_settled or not setting.has(rules.LOST_NOTHING)


def _is_confirmed(world: World, n: int, setting: Setting) -> bool:
    node, peer = world.nodes[n], world.nodes[1 - n]
    if setting.arbiter is Arbiter.REGISTER:
        return node.rec == world.register
    return peer.rec == node.rec if peer.role else node.seen


def hear_not_leading(world: World, n: int, _setting: Setting) -> Iterator[Step]:
    """Rule removed: a node that stands hears from the old owner that it is not leading, and will not wait for it."""
    node, peer = world.nodes[n], world.nodes[1 - n]
    if node.standing and not node.excused and peer.role == Role.FOLLOWER:
        yield Step("{1} says that it does not lead", n, world.put(n, node._replace(excused=True)))


def promise(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The peer's promise not to take over, renewed. Only what a mirrored owner needs."""
    node, peer = world.nodes[n], world.nodes[1 - n]
    if node.lease or peer.role != Role.FOLLOWER or node.rec.owner != n:
        return
    if node.rec.alone and node.ask is None and not setting.has(rules.JOIN_WITH_LEASE):
        return
    if peer.ask is not None and setting.has(rules.NO_PROMISE_WHILE_STANDING):
        return
    if peer.rec == node.rec or not setting.has(rules.PROMISE_NAMES_RECORD):
        lease = Lease.UNCOUNTED if peer.ask is not None else Lease.PROMISED
        yield Step("{1} promises {0} not to take over", n, world.put(n, node._replace(lease=lease)))


def expire(world: World, n: int, _setting: Setting) -> Iterator[Step]:
    """The promise has run out, on both clocks."""
    node = world.nodes[n]
    if node.lease:
        yield Step("{0}'s lease ends", n, world.put(n, node._replace(lease=Lease.NONE)))


def end_wait(world: World, n: int, _setting: Setting) -> Iterator[Step]:
    """A new owner has waited until every promise that it gave has run out. A peer that has the new record uses none."""
    node, peer = world.nodes[n], world.nodes[1 - n]
    if node.wait and peer.lease != Lease.PROMISED:
        yield Step("{0} has waited", n, world.put(n, node._replace(wait=False)))
