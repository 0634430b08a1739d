"""The simulation, with seeds that are new at every run and seeds that once found something."""

import random
import time

import pytest

from .run import run

_FRESH_SEEDS = 300
_AT_MOST_S = 25.0

# Seed -> what it finds when that mistake is made again; none of them is in the code any more. A change of the
# simulation draws other events from a seed: then these are no more than any other seeds, until new ones are found.
KEPT = {
    1001: "a failed sync was forgotten when the process was started again",
    1007: "an owner whose disk had failed handled what was still arriving from the peer",
    1012: "reads that waited for changes in flight were not bounded",
    1015: "changes before the first session of a process were not covered by the mark that it is open",
    1022: "an owner that had been killed answered reads before anything was compared",
    1035: "clients that connected while the window was full brought one more batch each",
    1439: "a sync that failed in an orderly stop was forgotten",
    1672: "a sync that failed in a thread during an orderly stop was forgotten",
    2241: "reads from the disk were answered after the replica had failed",
}


@pytest.mark.parametrize("seed", KEPT)
def test_seeds_that_once_found_something(seed: int) -> None:
    run(seed)


def test_fresh_seeds_break_no_rule(capsys: pytest.CaptureFixture[str]) -> None:
    first = random.SystemRandom().randrange(1 << 32)
    began_s = time.monotonic()
    seeds = answered = 0
    while seeds < _FRESH_SEEDS and time.monotonic() - began_s < _AT_MOST_S:
        answered += run(first + seeds).answered
        seeds += 1
    with capsys.disabled():
        print(f"\nsimulated seeds {first} to {first + seeds - 1}: {answered} requests answered")
    assert seeds
    assert answered > 10 * seeds, "the runs do not do enough to find anything"


def test_a_seed_repeats_exactly() -> None:
    first, second = run(7), run(7)
    assert (first.trace(), first.count) == (second.trace(), second.count)
