"""Link sessions, and what needs one: adding the peer (rule 9) and handing over (rule 5)."""

from collections.abc import Iterator

from . import rules
from .ownership import propose
from .world import Arbiter, Busy, Node, Role, Setting, Step, World


def _can_follow(peer: Node, owner: Node) -> bool:
    """Rule 6: a session is opened for one record, which both have."""
    return peer.role == Role.FOLLOWER and peer.ask is None and peer.rec == owner.rec


def resume_session(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """Both are in sync, and the peer lost nothing: only what is not answered is sent again. If one of them was killed
    while it owned, what it was doing is made equal by the owner's copy, and flushed."""
    node, peer = world.nodes[n], world.nodes[1 - n]
    fit = not peer.lost or not setting.has(rules.LOST_NOTHING)
    if world.session is None and not node.rec.alone and _can_follow(peer, node) and fit:
        opened = world._replace(session=n)
        if (node.unclean or peer.unclean) and setting.has(rules.RECONCILE):
            busy = Busy.ON_BOTH if node.busy else Busy.NO
            opened = opened.put(1 - n, peer._replace(mem=node.mem, disk=node.mem, unclean=False))
            opened = opened.put(n, node._replace(disk=node.mem, busy=busy, unclean=False))
        yield Step("{0} and {1} open a session", n, opened)


def sync_peer(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """An owner that is alone opens a session, and everything is copied and flushed (rule 9)."""
    node, peer = world.nodes[n], world.nodes[1 - n]
    ready = node.rec.alone and node.ask is None and not node.wait
    if world.session is not None or not ready or not _can_follow(peer, node):
        return
    disk = node.mem if setting.has(rules.FLUSH_TARGET) else peer.disk
    copied = peer._replace(mem=node.mem, disk=disk, lost=False, settled=False, unclean=False)
    busy = Busy.ON_BOTH if node.busy else Busy.NO
    yield Step("{0} syncs {1}", n, world.put(1 - n, copied).put(n, node._replace(busy=busy), session=n))


def propose_join(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The owner proposes to add the peer that has been synced."""
    node = world.nodes[n]
    if world.session != n or not node.rec.alone or node.ask is not None:
        return
    if setting.has(rules.JOIN_WITH_LEASE) and not node.lease:
        return
    yield from propose(world, n, n, False, setting, "{0} proposes to add {1}")


def propose_handover(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The owner stops, with everything answered, ends the session and proposes its peer as owner."""
    node = world.nodes[n]
    if world.session != n or node.rec.alone or node.busy or node.ask is not None:
        return
    role = Role.DRAINED if setting.has(rules.STOP_BEFORE_HANDOVER) else Role.OWNER
    stopped = world.put(n, node._replace(role=role), session=None)
    yield from propose(stopped, n, 1 - n, False, setting, "{0} stops and proposes to hand over to {1}")


def resume_without_grant(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """Rule removed: an owner that stopped reads that nothing has changed, and leads on at the old record."""
    node, peer = world.nodes[n], world.nodes[1 - n]
    read = world.register if setting.arbiter is Arbiter.REGISTER else peer.rec if peer.role else None
    if read == node.rec:
        leads = node._replace(role=Role.OWNER, ask=None)
        yield Step("{0} reads that nothing has changed and leads on", n, world.put(n, leads))
