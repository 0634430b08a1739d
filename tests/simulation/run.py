"""One run, and what to tell when it fails."""

from .world import World

DEFAULT_STEPS = 1500


class RunFailed(AssertionError):
    """A run broke a rule or the code under test; the text is a trace and how to repeat it."""


def run(seed: int, steps: int = DEFAULT_STEPS) -> World:
    """Run one seed. Raises RunFailed."""
    world = World(seed)
    try:
        world.play(steps)
    except Exception as e:
        raise RunFailed(
            f"seed {seed}, at step {world.step_number}: {type(e).__name__}: {e}\n{world.trace()}\n"
            f"repeat it: python -m tests.simulation --seed {seed} --steps {steps}"
        ) from e
    return world
