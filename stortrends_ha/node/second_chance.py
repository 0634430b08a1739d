"""When a secondary whose disk failed is tried again, by starting its data process anew. Pure.

A disk may have failed for a moment only (it was full, its path was lost): then the copy comes back by itself. One that
fails again and again is tried less and less often, as each time may cost clients a short pause.
"""

LAST_PAUSE_S = 3600.0


class SecondChance:
    """Of one replica. Times are in seconds, of any clock that goes on."""

    def __init__(self, first_pause_s: float) -> None:
        self._first_s = self._pause_s = first_pause_s
        self._failed_since: float | None = None
        self._well_since: float | None = None

    def due(self, now_s: float, *, failed: bool, well: bool) -> bool:
        """Whether to try it now. To be asked often, with how the replica is; ``well``: it is in sync."""
        self._well_since = (self._well_since or now_s) if well else None
        if self._well_since is not None and now_s - self._well_since > self._pause_s:
            self._pause_s = self._first_s
        if not failed:
            self._failed_since = None
            return False
        self._failed_since = self._failed_since or now_s
        if now_s - self._failed_since < self._pause_s:
            return False
        self._failed_since, self._pause_s = None, min(2 * self._pause_s, LAST_PAUSE_S)
        return True
