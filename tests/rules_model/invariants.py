"""What must hold in every state. Each function says what is wrong, or nothing."""

from collections.abc import Callable

from .world import Setting, World, can_answer


def one_server(world: World, setting: Setting) -> str | None:
    """At most one node answers."""
    first, second = world.nodes
    if can_answer(first, setting) and can_answer(second, setting):
        return "two nodes answer"
    return None


def nothing_lost(world: World, setting: Setting) -> str | None:
    """A node that answers has everything that was acknowledged: nothing is lost, and no read is stale."""
    for node in world.nodes:
        if node.mem < world.acked and can_answer(node, setting):
            return f"a node answers with version {node.mem} when {world.acked} was acknowledged"
    return None


def same_replicas(world: World, _setting: Setting) -> str | None:
    """In a session the replicas differ in nothing but the write that is under way."""
    first, second = world.nodes
    if world.session is not None and first.mem != second.mem and not world.nodes[world.session].busy:
        return "the replicas differ in a session"
    return None


def one_record(world: World, _setting: Setting) -> str | None:
    """Two records of one epoch are the same."""
    first, second = (node.rec for node in world.nodes)
    if first.epoch == second.epoch and first != second:
        return f"there are two records of epoch {first.epoch}"
    return None


Invariant = Callable[[World, Setting], str | None]

ALL: tuple[Invariant, ...] = (one_server, nothing_lost, same_replicas, one_record)

VISIBLE: tuple[Invariant, ...] = (nothing_lost,)
"""What the client would notice. The others find the cause of it some steps earlier."""
