"""How a proposal is granted, and how nodes learn of it: by a register, or by each other and fence agents."""

from collections.abc import Iterator

from . import rules
from .faults import power_off
from .world import Arbiter, Setting, Step, World, learn


def grant(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The register receives a proposal of ``n``."""
    if world.register is None:
        return
    for proposal in world.wire:
        fits = world.register in proposal.old or not setting.has(rules.EPOCH_CAS)
        if proposal.by == n and fits:
            wire = world.wire - {proposal}
            yield Step("the register grants it to {0}", n, world._replace(register=proposal.record, wire=wire))


def seed(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The owner seeds the register that was lost, when its peer has the same record."""
    node, peer = world.nodes[n], world.nodes[1 - n]
    if world.register is not None or node.rec.owner != n:
        return
    if (peer.role and peer.rec == node.rec) or not setting.has(rules.SEED_TOGETHER):
        yield Step("{0} seeds the register", n, world._replace(register=node.rec))


def read(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The node reads the register, or is told whether its proposal was granted: it is the same."""
    node = world.nodes[n]
    if world.register is None:
        return
    newer = world.register.epoch > node.rec.epoch
    if newer or (world.register != node.rec and not setting.has(rules.EPOCH_CAS)):
        yield Step("{0} learns the record", n, learn(world, n, world.register, setting))


def hear(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The node hears its peer's record, which is newer."""
    node, peer = world.nodes[n], world.nodes[1 - n]
    if peer.role and peer.rec.epoch > node.rec.epoch and peer.rec != world.register:
        yield Step("{0} hears {1}'s record", n, learn(world, n, peer.rec, setting))


def consent(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """Without a register: the live peer of the proposer ``n`` acts on its proposal and stores it."""
    peer = world.nodes[1 - n]
    busy = peer.ask is not None and setting.has(rules.ONE_PROPOSAL)
    if not peer.role or busy:
        return
    for proposal in world.wire:
        fits = peer.rec in proposal.old or (peer.rec != proposal.record and not setting.has(rules.EPOCH_CAS))
        if proposal.by == n and fits:
            stored = learn(world, 1 - n, proposal.record, setting)
            yield Step("{1} consents to {0}'s proposal", n, stored._replace(wire=world.wire - {proposal}))


def fence(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The fence agent powers the peer off; that it did is not known yet."""
    node = world.nodes[n]
    may = node.seen or not setting.has(rules.SEE_PEER_BEFORE_FENCING)
    if node.fencing or not may or node.ask is None or not node.ask.record.alone:
        return
    if not setting.has(rules.FENCE_CONFIRM):
        yield Step("{0} assumes that {1} is off", n, learn(world, n, node.ask.record, setting))
    off = power_off(world, 1 - n, setting)
    yield Step("{0} fences {1}", n, off.put(n, node._replace(fencing=True)))


def confirm(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The fence agent says that the peer is off (it was): the record is the node's. Or its answer is lost."""
    node = world.nodes[n]
    if node.fencing and node.ask is not None:
        yield Step("{0} knows that {1} was powered off", n, learn(world, n, node.ask.record, setting))
        yield Step("the answer of {0}'s fence agent is lost", n, world.put(n, node._replace(fencing=False)))


def greet(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """A node that was booted sees its peer, and the peer's record with it."""
    node, peer = world.nodes[n], world.nodes[1 - n]
    hidden = peer.fencing and setting.has(rules.NO_GREETING_WHILE_FENCING)
    if node.seen or not peer.role or hidden:
        return
    world = world.put(n, node._replace(seen=True))
    if peer.rec.epoch > node.rec.epoch:
        world = learn(world, n, peer.rec, setting)
    yield Step("{0} sees {1}", n, world)


def forget_dead_proposals(world: World, setting: Setting) -> World:
    """What nobody can grant any more makes no difference."""
    if not world.wire or not setting.has(rules.EPOCH_CAS):
        return world
    if setting.arbiter is Arbiter.REGISTER:
        if world.register is None:
            return world
        epoch = world.register.epoch
        wire = frozenset(proposal for proposal in world.wire if proposal.record.epoch == epoch + 1)
    else:
        first, second = world.nodes
        epochs = (second.rec.epoch, first.rec.epoch)
        wire = frozenset(proposal for proposal in world.wire if proposal.record.epoch > epochs[proposal.by])
    return world if wire == world.wire else world._replace(wire=wire)
