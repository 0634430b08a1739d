"""Events that anybody on the network can cause: all of them counted, few of them logged."""

import logging
import time
from collections import Counter

# One line of each kind in this time, so that nobody can fill the disk with our log.
QUIET_S = 10.0


class Counted:
    """Counts by kind; logs the first of each kind, and then at most one every `QUIET_S` with how many there were."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._counts: Counter[str] = Counter()
        self._logged: dict[str, tuple[float, int]] = {}  # when, and what the count was then

    def __getitem__(self, kind: str) -> int:
        return self._counts[kind]

    def __str__(self) -> str:
        return ", ".join(f"{kind}: {count}" for kind, count in sorted(self._counts.items())) or "it was not asked"

    def count(self, kind: str) -> None:
        """Count only."""
        self._counts[kind] += 1

    def add(self, kind: str, clause: str) -> None:
        """Count, and perhaps log: `clause` says what happened, for people."""
        self._counts[kind] += 1
        now_s = time.monotonic()
        last_s, then = self._logged.get(kind, (now_s - QUIET_S, 0))
        if now_s - last_s < QUIET_S:
            return
        unsaid = self._counts[kind] - then - 1
        self._logged[kind] = (now_s, self._counts[kind])
        self._log.warning("%s%s", clause, f" (and {unsaid} more since the last line of this kind)" if unsaid else "")
