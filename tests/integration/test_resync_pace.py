"""A resync between real data processes: fast while clients are idle, not below the minimum while they are not."""

import os
import time
from pathlib import Path

import clients
from data_process import BOTH, A, B, DataProcess, Pair
from files import MIB

from stortrends_ha.record import Record

SIZE = 192 * MIB
TO_COPY = 160 * MIB
MINIMUM = 8 * MIB


class Syncing:
    """A pair whose secondary lacks TO_COPY, and may have it as soon as it follows."""

    def __init__(self, pair: Pair) -> None:
        self.uri = f"nbd://127.0.0.1:{pair.nbd_port}/vm-a"
        self._pair = pair
        for node in BOTH:
            os.truncate(pair.backing(node), SIZE)
        self.owner, secondary, record = pair.in_sync()
        secondary.kill()
        self.owner.wait("has lost its secondary", lambda status: not status["session"])
        self.record = record.owned_alone(A)
        self.owner.lead(self.record)
        clients.fio(self.uri, rw="write", bs="128k", iodepth=4, offset=SIZE - TO_COPY, size=TO_COPY)
        lacking = self.owner.wait("has it all", lambda status: status["volumes"]["vm-a"]["dirty_bytes"] >= TO_COPY)
        assert lacking["volumes"]["vm-a"]["dirty_bytes"] <= TO_COPY + 4 * MIB
        assert lacking["resync"] is None
        self.secondary: DataProcess = pair.start(B)

    def follow(self) -> None:
        """Let the resync begin."""
        self.secondary.follow(self.record)
        self.owner.wait("syncs", lambda status: status["resync"])

    def join(self) -> Record:
        return self._pair.join(self.owner, self.secondary, self.record)


def seconds_since(start_s: float) -> float:
    return time.monotonic() - start_s


def test_under_load_a_resync_keeps_its_minimum_and_without_it_has_no_limit(tmp_path: Path) -> None:
    limits = {"resync_latency_factor": 1.1, "resync_min_rate": MINIMUM}
    with Pair(tmp_path, limits, size=SIZE) as pair:
        syncing = Syncing(pair)
        owner = syncing.owner
        with clients.load(syncing.uri) as load:
            busy_from = owner.status["volumes"]["vm-a"]["counters"]["writes"]
            owner.wait("clients write", lambda s: s["volumes"]["vm-a"]["counters"]["writes"] > busy_from + 1000)
            start_s = time.monotonic()
            syncing.follow()
            first = owner.wait("is held back for clients", lambda s: "clients are served first" in s["resync"]["why"])
            assert first["resync"]["total_bytes"] >= TO_COPY
            half = owner.wait("half of it is done", lambda s: s["resync"]["done_bytes"] >= TO_COPY // 2)
            # The pauses for learning, the words once a second, and a machine that others use, too.
            assert seconds_since(start_s) < TO_COPY // 2 / MINIMUM + 5
            assert half["resync"]["copied_bytes"] >= TO_COPY // 2
            assert half["resync"]["rate"] > 0
            load.finish()
        left = SIZE - half["resync"]["done_bytes"]
        start_s = time.monotonic()
        owner.wait("has it all", lambda status: status["joinable"])
        assert seconds_since(start_s) < left / MINIMUM
        syncing.join()
        assert owner.status["resync"] is None
        assert owner.wait("nothing is lacking", lambda s: not s["volumes"]["vm-a"]["dirty_bytes"])
        pair.assert_identical()


def test_while_clients_are_idle_a_resync_has_no_limit(tmp_path: Path) -> None:
    with Pair(tmp_path, {"resync_min_rate": "64KiB"}, size=SIZE) as pair:
        syncing = Syncing(pair)
        start_s = time.monotonic()
        syncing.follow()
        syncing.owner.wait("has it all", lambda status: status["joinable"])
        assert TO_COPY / seconds_since(start_s) > 5 * MIB  # eighty times the minimum
        whys = {status["resync"]["why"] for status in syncing.owner.statuses if status["resync"]}
        assert not any("clients" in why for why in whys), whys
        syncing.join()
        pair.assert_identical()
