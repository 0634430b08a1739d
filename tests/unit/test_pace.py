"""The pace of a resync: on a simulated disk, whose latency grows with what the resync takes of it, and with garbage."""

import math
import random

import pytest
from fakes import WRITE, MemoryClient, MemoryLink, MemoryStore, no_differences, request
from hypothesis import given
from hypothesis import strategies as st

from stortrends_ha.limits import COMPARE_BLOCK_BYTES, LINK_BACKLOG_BYTES, WRITE_PIECE_BYTES
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.nbd_transmission import Decoder, Geometry
from stortrends_ha.replication.pace import (
    IDLE_S,
    LEARN_S,
    PERIOD_S,
    RELEARN_S,
    SAMPLES,
    UNLIMITED,
    Pace,
    Probe,
    RecentRate,
)
from stortrends_ha.replication.primary import Primary
from stortrends_ha.replication.resync import Resync
from stortrends_ha.replication.session import Plan

MIB = 1 << 20
MINIMUM = 16 * MIB
TICK_S = 0.01


class Disk:
    """A disk for clients and a resync: answers take the longer, the more of ``capacity`` (bytes a second) is taken."""

    def __init__(self, seed: int = 0, capacity: float = 800 * MIB, base_s: float = 0.002) -> None:
        self.random = random.Random(seed)
        self.capacity, self.base_s = capacity, base_s

    def latency_s(self, rate: float) -> float:
        """Of one request: it varies by itself, too."""
        return self.base_s * self.random.uniform(0.5, 1.5) / max(1 - rate / self.capacity, 0.01)

    @property
    def p99_s(self) -> float:
        """Without a resync."""
        return self.base_s * 1.49


class World:
    """A resync with clients that ask 2,000 times a second while they are ``busy``."""

    def __init__(self, pace: Pace, disk: Disk) -> None:
        self.pace, self.disk = pace, disk
        self.now_s = 1000.0
        self.busy = True
        self.bytes = 0.0
        self.latencies_s: list[float] = []
        self._used = 0

    def run(self, seconds: float) -> None:
        """Let time go by."""
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            allowed = self.pace.allow(self.now_s, self._used, active=self.busy)
            self._used = min(allowed, int(self.disk.capacity * TICK_S))
            self.bytes += self._used
            for _ in range(20 if self.busy else 0):
                latency_s = self.disk.latency_s(self._used / TICK_S)
                self.latencies_s.append(latency_s)
                self.pace.sample(latency_s)

    def measure(self, seconds: float) -> tuple[float, float]:
        """Bytes a second, and the p99 of clients' latency (s), of the time to come."""
        self.bytes, self.latencies_s = 0, []
        self.run(seconds)
        return self.bytes / seconds, sorted(self.latencies_s)[len(self.latencies_s) * 99 // 100] if self.busy else 0.0


def test_without_clients_there_is_no_limit_and_nothing_to_say() -> None:
    pace = Pace(2, MINIMUM)
    assert {pace.allow(at / 10, 1 << 40, active=False) for at in range(100)} == {UNLIMITED}
    assert pace.why == ""


@pytest.mark.parametrize("factor", [1.5, 2, 4])
@pytest.mark.parametrize("capacity", [100 * MIB, 800 * MIB, 5000 * MIB])
def test_p99_settles_below_the_target_and_the_resync_gets_what_that_leaves(factor: float, capacity: float) -> None:
    world = World(Pace(factor, MINIMUM), Disk(capacity=capacity))
    world.run(12)
    rate, p99_s = world.measure(8)
    assert p99_s < 1.05 * factor * world.disk.p99_s
    assert rate > 0.6 * capacity * (1 - 1 / factor)


def test_the_minimum_is_kept_on_a_disk_that_is_too_slow_for_it() -> None:
    world = World(Pace(2, MINIMUM), Disk(capacity=20 * MIB))
    world.run(3)
    rate, _ = world.measure(3 * (RELEARN_S + LEARN_S + TICK_S))
    assert MINIMUM <= rate < 1.2 * MINIMUM
    assert "at the minimum rate" in world.pace.why


def test_the_limit_is_gone_as_soon_as_clients_are_idle_and_back_as_soon_as_they_come() -> None:
    world = World(Pace(2, MINIMUM), Disk())
    world.run(5)
    paced = world.pace.allow(world.now_s + TICK_S, 0, active=True)
    assert 0 < paced < 800 * MIB * TICK_S
    world.busy = False
    world.run(IDLE_S + 2 * TICK_S)
    assert world.pace.allow(world.now_s + TICK_S, 0, active=False) == UNLIMITED
    world.busy = True
    assert world.pace.allow(world.now_s + 2 * TICK_S, 0, active=True) <= 2 * paced


def test_what_clients_have_without_the_resync_is_learnt_at_once_and_again_later() -> None:
    world = World(Pace(2, MINIMUM), Disk())
    rate, p99_s = world.measure(LEARN_S - TICK_S)
    assert rate == 0
    assert p99_s < 1.05 * world.disk.p99_s
    assert "is being measured" in world.pace.why
    world.run(1)
    assert world.pace.base_s == pytest.approx(world.disk.p99_s, rel=0.05)
    assert "without it): " in world.pace.why
    world.disk.base_s *= 10  # clients do something else
    world.run(RELEARN_S + 1)
    assert world.pace.base_s == pytest.approx(world.disk.p99_s, rel=0.05)


def test_a_rate_that_is_not_used_does_not_grow() -> None:
    world = World(Pace(2, MINIMUM), Disk(capacity=1 << 50))
    allowed = [world.pace.allow(world.now_s + at * TICK_S, 0, active=True) for at in range(500)]
    assert max(allowed) <= 1.1 * MINIMUM * TICK_S
    for at in range(500):
        world.pace.sample(0.001)
        world.pace.allow(2000 + at * TICK_S, int(50 * MIB * TICK_S), active=True)
    assert world.pace.allow(2005, 0, active=True) <= 110 * MIB * TICK_S


def test_one_request_that_waits_long_slows_the_resync_down_without_any_answer() -> None:
    world = World(Pace(2, MINIMUM), Disk())
    world.run(5)
    rates = []
    for at in range(400):
        now_s = world.now_s + at * TICK_S
        rates.append(world.pace.allow(now_s, 1 << 20, active=True, waiting_s=at * TICK_S) / TICK_S)
    assert rates[-1] <= max(0.3 * rates[1], 1.1 * MINIMUM)


ANY_TIME = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6)
STEP = st.tuples(
    st.floats(min_value=0, max_value=2),  # seconds until then
    st.lists(st.floats(), max_size=5),
    st.booleans(),
    st.one_of(st.just(0.0), st.floats(min_value=0)),
    st.integers(-UNLIMITED, UNLIMITED),
)


@given(st.floats(1.1, 1000), st.integers(1 << 16, 1 << 36), st.lists(STEP, max_size=60))
def test_whatever_it_is_told_it_allows_the_minimum_but_while_it_learns(
    factor: float, minimum: int, steps: list[tuple[float, list[float], bool, float, int]]
) -> None:
    pace, now_s, allowed, paused_s = Pace(factor, minimum), 5.0, 0, 0.0
    due = 0.0
    for pause_s, samples, active, waiting_s, used in steps:
        now_s += pause_s
        for sample in samples:
            pace.sample(sample)
        found = pace.allow(now_s, used, active=active, waiting_s=waiting_s)
        assert 0 <= found <= UNLIMITED
        assert pace.why == "" or found < UNLIMITED
        if "is being measured" in pace.why:
            paused_s += pause_s
        else:
            allowed += found
            due += minimum * min(pause_s, PERIOD_S)
            paused_s = 0.0
            assert allowed + len(steps) >= due  # but for a byte that is not whole
        assert paused_s <= LEARN_S + 2 or not active
        assert math.isfinite(pace.base_s)


@given(st.lists(st.tuples(ANY_TIME, st.floats(), st.booleans()), max_size=60))
def test_a_clock_that_jumps_does_no_harm(steps: list[tuple[float, float, bool]]) -> None:
    pace = Pace(2, MINIMUM)
    for now_s, sample, active in steps:
        pace.sample(sample)
        assert 0 <= pace.allow(now_s, 0, active=active) <= UNLIMITED


def test_memory_is_bounded() -> None:
    pace = Pace(2, MINIMUM)
    for _ in range(10 * SAMPLES):
        pace.sample(0.001)
    assert len(pace._samples_s) == SAMPLES


# --- What is timed ----------------------------------------------------------------------------


class Clock:
    """Seconds, by hand."""

    def __init__(self) -> None:
        self.now_s = 7.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def timed() -> tuple[Probe, Clock, list[float]]:
    clock, samples = Clock(), list[float]()
    probe = Probe(clock, samples.append)
    probe.on = True
    return probe, clock, samples


def test_one_change_at_a_time_is_timed_to_its_answer(timed: tuple[Probe, Clock, list[float]]) -> None:
    probe, clock, samples = timed
    probe.begin(0, 5)
    clock.now_s += 1
    probe.begin(0, 6)
    probe.answered(0, 4)
    probe.answered(1, 9)
    assert (samples, probe.waiting_s) == ([], 1.0)
    clock.now_s += 1
    probe.answered(0, 8)
    assert (samples, probe.waiting_s) == ([2.0], 0.0)
    probe.answered(0, 9)
    assert samples == [2.0]


def test_a_probe_that_is_off_reads_no_clock() -> None:
    def clock() -> float:
        raise AssertionError

    probe = Probe(clock, lambda _: None)
    probe.begin(0, 1)
    probe.answered(0, 1)
    done = list[int]()
    probe.timed(lambda: done.append(1))()
    assert (done, probe.waiting_s) == ([1], 0.0)


def test_anything_else_is_timed_until_it_is_done(timed: tuple[Probe, Clock, list[float]]) -> None:
    probe, clock, samples = timed
    done = list[int]()
    ended = probe.timed(lambda: done.append(1))
    clock.now_s += 0.5
    ended()
    assert (done, samples) == ([1], [0.5])


def test_the_rate_is_that_of_the_last_seconds() -> None:
    recent = RecentRate()
    assert recent.bytes_s == 0
    for at in range(1001):
        recent.add(at / 100, 10 * at if at < 500 else 5000 + 20 * (at - 500))
    assert recent.bytes_s == pytest.approx(2000, rel=0.01)
    assert len(recent._totals) < 20
    for at in range(1001, 2000):
        recent.add(at / 100, 15000)
    assert recent.bytes_s == 0


# --- In the stream ----------------------------------------------------------------------------

SIZE = 1 << 20
EPOCH = 7


class Owner:
    """An owner that is alone with a full volume, and a secondary that lacks it and never answers by itself."""

    def __init__(self, probe: Probe | None = None) -> None:
        self.store, self.link, self.client = MemoryStore(SIZE), MemoryLink(), MemoryClient()
        self.primary = Primary(
            [self.store], [no_differences(SIZE)], EPOCH, alone=True, window_changes=1000, window_bytes=1 << 30,
            failed=lambda error: pytest.fail(str(error)), probe=probe,
        )  # fmt: skip
        self.store.end_flushes()
        for at in range(0, SIZE, 1 << 18):
            self.write(at)
            self.store.end_flushes()
        self.primary.job_begun = self._begun

    def write(self, at: int) -> None:
        stream = request(WRITE, 1, at, payload=b"x" * (1 << 18))
        batch = Decoder(Geometry(SIZE)).decode(memoryview(stream), len(stream))
        self.primary.submit(self.client, 0, batch, memoryview(stream))

    def _begun(self) -> None:
        self.resync.budget_bytes = 0

    @property
    def resync(self) -> Resync:
        assert self.primary.resync is not None
        return self.primary.resync

    def begin(self, *, compare: bool = False) -> None:
        self.primary.open_session(self.link, Plan.SYNC, compare=compare)
        self.receive(wire.end_of_regions(EPOCH, blank=False))

    def receive(self, frame: bytes) -> None:
        assert self.primary.receive(memoryview(frame), len(frame)) == len(frame)

    def copied(self, budget_bytes: int) -> int:
        """How much more is copied with such a budget."""
        before, self.resync.budget_bytes = self.resync.copied_bytes, budget_bytes
        self.primary.pump()
        return self.resync.copied_bytes - before


def test_a_resync_copies_no_more_than_one_piece_above_what_it_is_allowed() -> None:
    owner = Owner()
    owner.begin()
    assert owner.copied(0) == owner.copied(-1) == 0
    assert owner.primary.job_waits == ""
    assert owner.copied(1) == WRITE_PIECE_BYTES
    assert owner.copied(3 * WRITE_PIECE_BYTES) == 3 * WRITE_PIECE_BYTES
    assert owner.copied(WRITE_PIECE_BYTES + 1) == 2 * WRITE_PIECE_BYTES
    assert owner.copied(UNLIMITED) == SIZE - 6 * WRITE_PIECE_BYTES
    assert UNLIMITED - owner.resync.budget_bytes == SIZE - 6 * WRITE_PIECE_BYTES
    assert owner.resync.done_bytes == owner.resync.total_bytes == SIZE


def test_what_a_job_waits_for_is_said() -> None:
    owner = Owner()
    assert owner.primary.job_waits == ""
    owner.begin()
    owner.link.backlog_bytes = LINK_BACKLOG_BYTES + 1
    assert owner.copied(UNLIMITED) == 0
    assert owner.primary.job_waits == "the link is full"
    owner.link.backlog_bytes = 0
    owner.copied(UNLIMITED)
    assert owner.primary.job_waits == "waiting until everything is flushed on both nodes"
    comparing = Owner()
    comparing.begin(compare=True)
    assert comparing.copied(UNLIMITED) == 0
    assert comparing.primary.job_waits == "waiting for the secondary's comparisons"


def test_what_differed_is_in_the_budget_too() -> None:
    owner = Owner()
    owner.begin(compare=True)
    owner.copied(1)
    assert owner.resync.budget_bytes == 1 - COMPARE_BLOCK_BYTES
    owner.receive(wire.encode_result(EPOCH, 0, 0, COMPARE_BLOCK_BYTES, False))
    assert owner.resync.copied_bytes == COMPARE_BLOCK_BYTES
    assert owner.resync.budget_bytes == 1 - 2 * COMPARE_BLOCK_BYTES


def test_an_owner_that_is_alone_times_a_write_until_it_is_stable(timed: tuple[Probe, Clock, list[float]]) -> None:
    probe, clock, samples = timed
    owner = Owner(probe)
    assert samples == [0.0] * 4
    owner.write(0)
    clock.now_s += 0.3
    owner.write(0)
    owner.store.end_flushes()
    assert samples == [0.0] * 4 + [pytest.approx(0.3)]
