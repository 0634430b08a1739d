"""What breaks, and how a node starts again."""

from collections.abc import Iterator

from . import rules
from .world import Arbiter, Busy, Lease, Node, Role, Setting, Step, World


def _ended(node: Node, setting: Setting) -> Node:
    """What is left of a node whose process has ended: what is durable, and the page cache."""
    mirrored = not node.rec.alone or node.ask is not None
    died_mirrored = node.role == Role.OWNER and mirrored and setting.has(rules.RECONCILE)
    return node._replace(
        role=Role.OFF,
        ask=node.ask if setting.has(rules.REMEMBER_PROPOSAL) else None,
        busy=Busy.NO,
        unclean=node.unclean or died_mirrored,
        wait=False,
        lease=Lease.NONE,
        excused=False,
        fencing=False,
    )


def power_off(world: World, n: int, setting: Setting) -> World:
    """What was only cached is lost, and after the next boot the node has not seen its peer."""
    node = _ended(world.nodes[n], setting)
    seen = setting.arbiter is not Arbiter.FENCING
    return world.put(n, node._replace(mem=node.disk, lost=True, seen=seen), session=None)


def kill(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The node's process is killed; the page cache stays."""
    if world.faults < setting.bounds.faults:
        killed = world.put(n, _ended(world.nodes[n], setting), session=None)
        yield Step("{0} is killed", n, killed._replace(faults=world.faults + 1))


def lose_power(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The node's host loses power."""
    if world.faults < setting.bounds.faults:
        yield Step("{0} loses power", n, power_off(world, n, setting)._replace(faults=world.faults + 1))


def break_link(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The session ends."""
    if world.session == n and world.faults < setting.bounds.faults:
        yield Step("the link breaks", n, world._replace(session=None, faults=world.faults + 1))


def boot(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The node starts, with what it has stored."""
    node = world.nodes[n]
    excused = not setting.has(rules.BOOT_WAIT)
    yield Step("{0} starts", n, world.put(n, node._replace(role=Role.FOLLOWER, excused=excused)))


def lose_register(world: World, n: int, setting: Setting) -> Iterator[Step]:
    """The witness's disk is lost."""
    if n == 0 and world.register is not None and world.faults < setting.bounds.faults:
        yield Step("the register is lost", n, world._replace(register=None, faults=world.faults + 1))
