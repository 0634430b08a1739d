"""Which writes in flight a read overlaps.

A read must not return what the secondary may lack, or a failover would take it back: a read that overlaps
a change in flight waits until everything in flight at that moment has been answered. Remembered by region
(``ORDER_REGION_BYTES``), so a false alarm is possible and a miss is not. On the hot path: one dictionary
store per change, and nothing at all for reads while no change is in flight.

Bound: ``ORDER_REGIONS`` entries; beyond, ``note`` empties the table and every read waits for what is in flight then.
"""

from collections.abc import Sequence

from stortrends_ha.limits import ORDER_REGION_BYTES, ORDER_REGIONS, ORDER_REGIONS_PER_CHANGE
from stortrends_ha.protocol.nbd_transmission import Change

_SHIFT = ORDER_REGION_BYTES.bit_length() - 1


class RegionsInFlight:
    """region -> the number of the newest change to it, of one volume."""

    __slots__ = ("_latest", "_wide")

    def __init__(self) -> None:
        self._latest: dict[int, int] = {}
        self._wide = 0  # the newest change that was too long to remember by region

    def note(self, changes: Sequence[Change], seq: int) -> None:
        """Remember changes; ``seq`` is the number of the last of them."""
        latest = self._latest
        for _, offset, length, _ in changes:
            region = offset >> _SHIFT
            latest[region] = seq
            if (offset + length - 1) >> _SHIFT != region:
                self._note_long(region, (offset + length - 1) >> _SHIFT, seq)
        if len(latest) > ORDER_REGIONS:
            self._wide = seq  # simpler than finding out which are still in flight; costs a moment's waiting
            latest.clear()

    def _note_long(self, first: int, last: int, seq: int) -> None:
        if last - first > ORDER_REGIONS_PER_CHANGE:
            self._wide = seq
        else:
            self._latest.update(dict.fromkeys(range(first, last + 1), seq))

    def overlaps(self, offset: int, length: int, acked: int) -> bool:
        """Whether a read overlaps a change that is newer than ``acked``."""
        first, last = offset >> _SHIFT, (offset + length - 1) >> _SHIFT
        latest = self._latest
        if self._wide > acked or latest.get(first, 0) > acked:
            return True
        return first != last and any(latest.get(region, 0) > acked for region in range(first + 1, last + 1))

    def clear(self) -> None:
        """Nothing is in flight."""
        self._latest.clear()
