"""Check the rules: ``python -m tests.rules_model --all --writes 2 --faults 2 --epochs 4``."""

import argparse
import sys
import time
from collections.abc import Iterator

from . import invariants, rules
from .search import search
from .world import Arbiter, Bounds, Setting


def main() -> int:
    """The command line: 0 if all rules hold, and each rule removed alone is missed."""
    args = _arguments()
    bounds = Bounds(args.writes, args.faults, args.epochs)
    checks = invariants.VISIBLE if args.visible else invariants.ALL
    as_expected = True
    for arbiter in [Arbiter(args.arbiter)] if args.arbiter else Arbiter:
        for without in _removals(arbiter) if args.all else [tuple(args.without)]:
            kept = (rules.ALL | set(args.added)) - set(without)
            holds = _check(Setting(arbiter, bounds, kept), without, checks)
            as_expected &= holds == (not without)
    return 0 if as_expected else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.rules_model", description=__doc__)
    parser.add_argument("--arbiter", choices=[arbiter.value for arbiter in Arbiter], help="only with this one")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="all rules, and then without each of them")
    which.add_argument("--without", metavar="RULE", action="append", default=[], choices=sorted(rules.ALL))
    parser.add_argument(
        "--with", metavar="RULE", dest="added", action="append", default=[], choices=sorted(rules.OPTIONAL),
        help="one that is not needed: " + ", ".join(rules.OPTIONAL),
    )  # fmt: skip
    parser.add_argument("--visible", action="store_true", help="look only for what the client would notice")
    parser.add_argument("--writes", type=int, default=2, help="so many versions are written (default 2)")
    parser.add_argument("--faults", type=int, default=1, help="kills, power losses, broken links... (default 1)")
    parser.add_argument("--epochs", type=int, default=4, help="the highest epoch (default 4)")
    return parser.parse_args()


def _removals(arbiter: Arbiter) -> Iterator[tuple[str, ...]]:
    yield ()
    for rule in rules.of(arbiter.value):
        yield (rule,)


def _check(setting: Setting, without: tuple[str, ...], checks: tuple[invariants.Invariant, ...]) -> bool:
    began_s = time.monotonic()
    found = search(setting, checks)
    took_s = time.monotonic() - began_s
    name = "without " + ", ".join(without) if without else "all rules"
    outcome = found.wrong or f"holds, every state is within {found.depth} steps"
    print(f"{setting.arbiter.value:8}  {name:34} {found.states:>9} states, {took_s:5.1f} s: {outcome}")
    for number, line in enumerate(found.trace, 1):
        print(f"    {number:2}. {line}")
    sys.stdout.flush()
    return found.wrong is None


if __name__ == "__main__":
    sys.exit(main())
