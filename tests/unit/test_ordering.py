"""Invariant tested: no read misses a change in flight that it overlaps; and few are held up for nothing."""

from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stortrends_ha.limits import ORDER_REGION_BYTES, ORDER_REGIONS, ORDER_REGIONS_PER_CHANGE
from stortrends_ha.protocol.nbd_transmission import Change
from stortrends_ha.replication import ordering
from stortrends_ha.replication.ordering import RegionsInFlight

REGION = ORDER_REGION_BYTES


@dataclass
class Naive:
    """Remembers everything."""

    changes: list[tuple[int, int, int]] = field(default_factory=list)

    def note(self, changes: list[Change], seq: int) -> None:
        self.changes += [(offset, length, seq) for _, offset, length, _ in changes]

    def overlaps(self, offset: int, length: int, acked: int) -> bool:
        return any(seq > acked and at < offset + length and offset < at + size for at, size, seq in self.changes)


near = st.builds(lambda n, d: max(0, n * REGION + d), st.integers(0, 40), st.integers(-2, 2))
offsets = near | st.integers(0, 60 * REGION) | st.integers(0, 2**50)
lengths = st.one_of(
    st.integers(1, 5000),
    st.builds(lambda n, d: max(1, n * REGION + d), st.integers(0, 5), st.integers(-1, 1)),
    st.sampled_from([ORDER_REGIONS_PER_CHANGE * REGION, (ORDER_REGIONS_PER_CHANGE + 1) * REGION, 2**32 - 1]),
)
changes = st.builds(lambda offset, length: (0, offset, length, 0), offsets, lengths)
steps = st.one_of(
    st.tuples(st.just("note"), st.lists(changes, min_size=1, max_size=5)),
    st.tuples(st.just("ack"), st.integers(0, 10)),
    st.tuples(st.just("read"), st.tuples(offsets, lengths.filter(lambda length: length < 1 << 25))),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(steps, max_size=30), st.sampled_from([4, ORDER_REGIONS]))
def test_no_overlap_is_missed(script: list[tuple[str, object]], bound: int) -> None:
    regions, naive = RegionsInFlight(), Naive()
    issued = acked = 0
    with patch.object(ordering, "ORDER_REGIONS", bound):
        for what, value in script:
            if isinstance(value, list):
                issued += len(value)
                regions.note(value, issued)
                naive.note(value, issued)
            elif isinstance(value, int):
                acked = min(issued, acked + value)
                if acked == issued:
                    regions.clear()
            elif isinstance(value, tuple):
                offset, length = value
                if naive.overlaps(offset, length, acked):
                    assert regions.overlaps(offset, length, acked), what


def test_everything_answered_holds_no_read() -> None:
    regions = RegionsInFlight()
    regions.note([(0, 0, 2**32 - 1, 0), (0, 5, 1, 0)], 2)
    assert regions.overlaps(0, 1, 1)
    assert not regions.overlaps(0, 2**25, 2)


@pytest.mark.parametrize(("offset", "held"), [(0, False), (REGION - 1, False), (REGION, True), (2 * REGION, False)])
def test_reads_of_other_regions_go_on(offset: int, held: bool) -> None:
    regions = RegionsInFlight()
    regions.note([(0, REGION + 5, 100, 0)], 1)
    assert regions.overlaps(offset, 1, 0) == held


def test_long_change_holds_reads_in_its_middle_and_only_the_wide_ones_hold_all() -> None:
    regions = RegionsInFlight()
    regions.note([(0, 0, ORDER_REGIONS_PER_CHANGE * REGION, 0)], 1)
    assert regions.overlaps(ORDER_REGIONS_PER_CHANGE // 2 * REGION, 1, 0)
    assert not regions.overlaps((ORDER_REGIONS_PER_CHANGE + 5) * REGION, 1, 0)


def test_what_is_remembered_is_bounded() -> None:
    regions = RegionsInFlight()
    with patch.object(ordering, "ORDER_REGIONS", 100):
        for n in range(1000):
            regions.note([(0, n * REGION, 1, 0)], n + 1)
            assert len(regions._latest) <= 100
    assert all(regions.overlaps(n * REGION, 1, 0) for n in range(1000))


def test_huge_change_is_not_remembered_by_region() -> None:
    regions = RegionsInFlight()
    regions.note([(0, 0, 2**32 - 1, 0)], 1)
    assert len(regions._latest) <= ORDER_REGIONS_PER_CHANGE
    assert regions.overlaps(2**31, 1, 0)
