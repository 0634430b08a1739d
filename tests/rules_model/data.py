"""Writes, flushes, and the way of a write to the peer (rules 1, 2 and 7)."""

from collections.abc import Iterator

from . import rules
from .world import Busy, Setting, Step, World, acts_alone, can_answer, must_reconcile


def write(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The owner applies a write. Whether it may answer is decided when it does."""
    node = world.nodes[n]
    if must_reconcile(node, setting):
        return
    if not node.wait and not node.busy and world.writes < setting.bounds.writes:
        version = world.writes + 1
        yield Step("{0} applies a write", n, world.put(n, node._replace(mem=version, busy=Busy.HERE), writes=version))


def replicate(world: World, n: int, _setting: Setting) -> Iterator[Step]:
    """The peer applies what is on the stream, and says so."""
    node, peer = world.nodes[n], world.nodes[1 - n]
    if world.session == n and node.busy == Busy.HERE:
        applied = world.put(1 - n, peer._replace(mem=node.mem))
        yield Step("{1} applies it, too", n, applied.put(n, node._replace(busy=Busy.ON_BOTH)))


def answer(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The owner answers its write: an owner that is alone writes through, and joining its peer, too, waits for it."""
    node = world.nodes[n]
    if not node.busy or not can_answer(node, setting):
        return
    needs_peer = not acts_alone(node, setting) or world.session == n
    if needs_peer and node.busy != Busy.ON_BOTH and setting.has(rules.LATE_ACK):
        return
    stable = node.mem if node.rec.alone else node.disk
    flushed = world.flushed if needs_peer else node.mem
    told = world._replace(acked=max(world.acked, node.mem), flushed=max(world.flushed, flushed))
    yield Step("{0} answers it", n, told.put(n, node._replace(busy=Busy.NO, disk=stable)))


def flush(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """FLUSH on a mirrored owner is answered when both have flushed."""
    node, peer = world.nodes[n], world.nodes[1 - n]
    idle = node.rec.alone or node.busy or world.flushed == world.acked
    if world.session != n or idle or not can_answer(node, setting):
        return
    both = world.put(n, node._replace(disk=node.mem)).put(1 - n, peer._replace(disk=peer.mem))
    yield Step("{0} and {1} flush", n, both._replace(flushed=world.acked))


def settle(world: World, n: int, _setting: Setting) -> Iterator[Step]:
    """An owner that is alone has flushed what was cached when it was mirrored."""
    node = world.nodes[n]
    if node.rec.alone and not node.settled:
        yield Step("{0} is settled", n, world.put(n, node._replace(disk=node.mem, settled=True)))
