"""Run the simulation: ``python -m tests.simulation --seed S --steps M``, or ``--seeds N [--start S]`` for many."""

import argparse
import sys
import time
from collections import Counter

from .run import DEFAULT_STEPS, RunFailed, run


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--seeds", type=int, default=1000, help="run so many (default 1000)")
    parser.add_argument("--start", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, help=f"events of a run before it settles (default {DEFAULT_STEPS})"
    )
    args = parser.parse_args()
    seeds = [args.seed] if args.seed is not None else range(args.start, args.start + args.seeds)
    return _run_all(list(seeds), args.steps)


def _run_all(seeds: list[int], steps: int) -> int:
    counts: Counter[str] = Counter()
    answered = failed = 0
    began_s = time.monotonic()
    for done, seed in enumerate(seeds, 1):
        try:
            world = run(seed, steps)
        except RunFailed as e:
            failed += 1
            print(f"\n{e}\n", flush=True)
        else:
            counts += world.count
            answered += world.answered
        rate = done / (time.monotonic() - began_s)
        if sys.stderr.isatty() or done % 100 == 0 or done == len(seeds):
            end = "\r" if sys.stderr.isatty() and done < len(seeds) else "\n"
            print(
                f"{done} of {len(seeds)} seeds, {failed} failed, {rate:.1f} seeds/s",
                end=end,
                file=sys.stderr,
                flush=True,
            )
    print(f"{answered} requests answered; in the runs that did not fail:")
    for name in sorted(counts):
        print(f"  {counts[name]:9}  {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
