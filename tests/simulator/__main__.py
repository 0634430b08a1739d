"""Run the simulator: ``python -m tests.simulator --seed S``, or ``--seeds N [--start S]`` for many, on all cores."""

import argparse
import multiprocessing
import sys
import time
from collections import Counter

from .run import STEPS, RunFailed, run
from .trace import EVENTS


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one, with its trace")
    parser.add_argument("--seeds", type=int, default=1000, help="run so many (default 1000)")
    parser.add_argument("--start", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"faults of a run (default {STEPS})")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count(), help="processes (default: cores)")
    parser.add_argument("--keep", type=int, default=EVENTS, help=f"events of the trace to show (default {EVENTS})")
    parser.add_argument("--failures", type=int, default=5, help="stop after so many (default 5)")
    args = parser.parse_args()
    if args.seed is not None:
        return _run_one(args.seed, args.steps, args.keep)
    return _run_many(range(args.start, args.start + args.seeds), args.steps, args.jobs, args.failures)


def _run_one(seed: int, steps: int, keep: int) -> int:
    try:
        world = run(seed, steps, keep=keep)
    except RunFailed as e:
        print(e)
        return 1
    print(f"{world.trace}\n\nseed {seed}: no rule was broken")
    return 0


def _run_many(seeds: range, steps: int, jobs: int, failures: int) -> int:
    counts: Counter[str] = Counter()
    failed = done = 0
    began_s = time.monotonic()
    with multiprocessing.Pool(jobs) as pool:
        for error, count in pool.imap_unordered(_run_quietly, [(seed, steps) for seed in seeds], chunksize=8):
            done += 1
            counts += count
            if error:
                failed += 1
                print(f"\n{error}\n", flush=True)
                if failed >= failures:
                    break
            if done % 100 == 0 or done == len(seeds):
                rate = done / (time.monotonic() - began_s)
                print(f"{done} of {len(seeds)} seeds, {failed} failed, {rate:.1f} a second", file=sys.stderr)
    for name in sorted(counts):
        print(f"  {counts[name]:9}  {name}")
    return 1 if failed else 0


def _run_quietly(job: tuple[int, int]) -> tuple[str, Counter[str]]:
    try:
        world = run(*job)
    except RunFailed as e:
        return str(e), Counter()
    return "", world.count


if __name__ == "__main__":
    sys.exit(main())
