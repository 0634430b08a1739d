"""One run: a seed, to its end or to its failure."""

import gc

from .production import in_a_fake_world
from .trace import EVENTS
from .world import World

STEPS = 25


class RunFailed(AssertionError):
    """With what happened last, and how to see it again; the cause is chained."""


def run(seed: int, steps: int = STEPS, *, keep: int = EVENTS) -> World:
    """Raises RunFailed."""
    world = World(seed, steps, keep=keep)
    gc.disable()  # a run is short, and ends by itself what is to be ended
    try:
        with in_a_fake_world():
            world.run()
    except Exception as error:
        raise RunFailed(
            f"{world.trace}\n\n"
            f"seed {seed} failed at {world.clock.now_ns / 1e9:.6f} s: {type(error).__name__}: {error}\n"
            f"again: python -m tests.simulator --seed {seed} --steps {steps}"
        ) from error
    finally:
        world.end()
        gc.enable()
    return world
