"""The simulator, with seeds that are new at every run and seeds that once found something."""

import multiprocessing
import random
from collections import Counter

import pytest

from .run import RunFailed, run

_FRESH_SEEDS = 200
_PROCESSES = 2

# Seed -> what it finds when that mistake is made again; none of them is in the code any more. A change of the
# simulator draws other events from a seed: then these are no more than any other seeds, until new ones are found.
KEPT = {
    14: "a new group whose owner was restarted before it had served never came up (witness)",
    48: "the same, with no third machine",
    880062: "an override of a new group was granted, and its node lost power before it had led",
    2026112362: "a read between a failed sync and its report found what the kernel had put back",
    2026112765: "a node that had fenced its peer in vain, and lost its cache then, never met it again",
    2759106231: "by fencing: a peer that had consented while it was being turned off was never met again",
    3000004221: "the last copy refused a read after a failed sync: the checker did not allow it before it was reported",
    2280375548: "a volume that is always cached lost its cache a second time: the checker did not allow it",
}


@pytest.mark.parametrize("seed", KEPT)
def test_seeds_that_once_found_something(seed: int) -> None:
    run(seed)


def _tried(seed: int) -> tuple[str, Counter[str]]:
    try:
        return "", run(seed).count
    except RunFailed as e:
        return str(e), Counter()


@pytest.mark.timeout(300)
def test_fresh_seeds_break_no_rule(capsys: pytest.CaptureFixture[str]) -> None:
    first = random.SystemRandom().randrange(1 << 32)
    count = Counter[str]()
    with multiprocessing.get_context("spawn").Pool(_PROCESSES) as pool:
        for error, counted in pool.imap(_tried, range(first, first + _FRESH_SEEDS)):
            assert not error, error
            count += counted
    with capsys.disabled():
        print(f"\nsimulated seeds {first} to {first + _FRESH_SEEDS - 1}: {count['moved: takeover']} takeovers")
    assert count["moved: takeover"] > _FRESH_SEEDS // 10, "the runs do not do enough to find anything"


def test_a_seed_repeats_exactly() -> None:
    first, second = run(7), run(7)
    assert (str(first.trace), first.count) == (str(second.trace), second.count)
