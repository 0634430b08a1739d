"""Breadth first through every state, so that the first counterexample is a shortest one.

The two nodes are alike: of two states that differ only in the nodes' names one is visited (the one whose newest record
names node 0 owner). ``Found.trace`` gives them their names back.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from . import arbiters, invariants
from .actions import Table, table
from .invariants import Invariant
from .world import Node, Proposal, Record, Setting, Step, World, start


@dataclass(frozen=True)
class Found:
    """``wrong`` is None if everything holds; ``depth`` is the length of the longest shortest way to a state."""

    states: int
    depth: int
    wrong: str | None = None
    trace: tuple[str, ...] = ()


class _Arrival(NamedTuple):
    """How a state was first reached: ``swapped`` says that the nodes' names were exchanged after ``step``."""

    before: World
    text: str
    node: int
    swapped: bool


def steps(world: World, actions: Table, setting: Setting) -> Iterator[Step]:
    """All that can happen next."""
    for n, node in enumerate(world.nodes):
        for action in actions[node.role]:
            yield from action(world, n, setting)


def search(setting: Setting, checks: Sequence[Invariant] = invariants.ALL, *, fold: bool = True) -> Found:
    """Visit every state within the bounds, or stop at the first that is wrong. Not to ``fold`` takes twice as long."""
    with _no_garbage_collection():
        return _search(setting, table(setting), checks, fold)


def _search(setting: Setting, actions: Table, checks: Sequence[Invariant], fold: bool) -> Found:
    first = start(setting)
    arrivals: dict[World, _Arrival | None] = {first: None}
    frontier, depth = [first], 0
    while frontier:
        reached: list[World] = []
        for world in frontier:
            for step in steps(world, actions, setting):
                after = arbiters.forget_dead_proposals(step.world, setting)
                swapped = fold and after.newest().owner == 1
                if swapped:
                    after = _swap(after)
                if after in arrivals:
                    continue
                arrivals[after] = _Arrival(world, step.text, step.node, swapped)
                wrong = _wrong(after, setting, checks)
                if wrong is not None:
                    return Found(len(arrivals), depth + 1, wrong, _trace(arrivals, after))
                reached.append(after)
        frontier = reached
        depth += bool(reached)
    return Found(len(arrivals), depth)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """States hold no cycles, and looking for some among millions takes most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _wrong(world: World, setting: Setting, checks: Sequence[Invariant]) -> str | None:
    for invariant in checks:
        wrong = invariant(world, setting)
        if wrong is not None:
            return wrong
    return None


def _trace(arrivals: dict[World, _Arrival | None], last: World) -> tuple[str, ...]:
    """What happened, with the names that the nodes had at the start."""
    way: list[_Arrival] = []
    arrival = arrivals[last]
    while arrival is not None:
        way.append(arrival)
        arrival = arrivals[arrival.before]
    lines: list[str] = []
    names = "AB"
    for arrival in reversed(way):
        lines.append(arrival.text.format(names[arrival.node], names[1 - arrival.node]))
        if arrival.swapped:
            names = names[::-1]
    return tuple(lines)


def _swap(world: World) -> World:
    first, second = world.nodes
    return world._replace(
        register=None if world.register is None else _swap_record(world.register),
        nodes=(_swap_node(second), _swap_node(first)),
        wire=frozenset(map(_swap_proposal, world.wire)),
        session=None if world.session is None else 1 - world.session,
    )


def _swap_node(node: Node) -> Node:
    return node._replace(rec=_swap_record(node.rec), ask=None if node.ask is None else _swap_proposal(node.ask))


def _swap_proposal(proposal: Proposal) -> Proposal:
    return Proposal(1 - proposal.by, _swap_record(proposal.record), tuple(map(_swap_record, proposal.old)))


def _swap_record(record: Record) -> Record:
    return record._replace(owner=1 - record.owner)
