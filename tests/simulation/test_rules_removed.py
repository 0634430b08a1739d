"""Each safety rule, taken out of the code by changing one small method: the simulation must notice.

What a rule is for is only known when its absence is seen. If one of these fails, either the simulation has become
blind to that rule, or something else keeps it, too: then say so here, and take that out as well.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.nbd_transmission import OP_WRITE
from stortrends_ha.replication import session
from stortrends_ha.replication.ordering import RegionsInFlight
from stortrends_ha.replication.primary import Primary
from stortrends_ha.replication.stream import ResyncEnd
from stortrends_ha.replication.window import Entry
from stortrends_ha.replication.write_through import UNLIMITED, WriteThrough

from .checks import Violation
from .follower import Follower
from .node import Process
from .owner import Owner
from .run import RunFailed, run

_SEEDS = 150  # within which it must be noticed

Patch = pytest.MonkeyPatch


def answers_without_the_ack(patch: Patch) -> None:
    """Rule 1: a write is answered when the own store has it."""
    submit = Primary.submit

    def mutant(self: Primary, *arguments: Any) -> int:
        result = submit(self, *arguments)
        if self._window and (client := self._window[-1].client) is not None:
            entry = self._window[-1]
            replies, entry.replies = entry.replies, [b""] * len(entry.replies)
            client.answer(b"".join(replies))
        return result

    patch.setattr(Primary, "submit", mutant)


def flushes_without_the_peer(patch: Patch) -> None:
    """Rule 1: a flush is answered when the own disk has ended it."""
    flushed = Primary._flushed

    def mutant(self: Primary, number: int, local: bool) -> None:
        if local:
            self._flushes[number].peer = True
            flushed(self, number, local)

    patch.setattr(Primary, "_flushed", mutant)
    patch.setattr(Primary, "_send_flushes", lambda self, _link: self._flushes_unsent.clear())


def flushes_without_the_own_disk(patch: Patch) -> None:
    """Rule 1: a flush is answered when the peer has ended it."""
    flushed = Primary._flushed

    def mutant(self: Primary, number: int, local: bool) -> None:
        if not local:
            self._flushes[number].local = True
            flushed(self, number, local)

    patch.setattr(Primary, "_flushed", mutant)


def goes_on_alone(patch: Patch) -> None:
    """Rule 2: when the link is lost, what waits is answered instead of held."""
    close_session = Primary.close_session

    def mutant(self: Primary) -> None:
        close_session(self)
        self._unsent.clear()
        if not self._alone and self.acked < self.issued and not self.failed:
            self._acknowledged(self.issued)

    patch.setattr(Primary, "close_session", mutant)


def takes_frames_of_any_epoch(patch: Patch) -> None:
    """Rule 6: the epoch of a frame is not looked at."""
    next_frame = wire.next_frame
    patch.setattr(wire, "next_frame", lambda view, at, end, _epoch: next_frame(view, at, end, None))


def opens_sessions_of_any_epoch(patch: Patch) -> None:
    """Rule 6: the record of the peer is not looked at; nor is the epoch of a frame, which would keep the rule, too."""
    takes_frames_of_any_epoch(patch)
    patch.setattr(session, "_record_differences", lambda *_: [])


def sends_the_window_in_another_order(patch: Patch) -> None:
    """Rule 7: the changes of a batch that is sent again are in another order."""
    send_from_store = Primary._send_from_store

    def mutant(self: Primary, link: Any, entry: Entry) -> None:
        changes = entry.changes
        entry.changes = changes[::-1]
        send_from_store(self, link, entry)
        entry.changes = changes

    patch.setattr(Primary, "_send_from_store", mutant)


def copies_a_block_as_it_was(patch: Patch) -> None:
    """Rule 7: a resync copies a block as it was when it was compared, not as it is at its place in the stream."""
    compare, put = Primary.compare, Primary.put
    blocks: dict[Primary, dict[tuple[int, int], bytes]] = {}

    def mutant_compare(self: Primary, volume: int, offset: int, length: int, digest: bytes) -> None:
        blocks.setdefault(self, {})[volume, offset] = bytes(self._stores[volume].read(offset, length))
        compare(self, volume, offset, length, digest)

    def mutant_put(self: Primary, volume: int, op: int, offset: int, length: int, data: Any) -> None:
        if op == OP_WRITE:
            start, block = max(
                (at, block) for (number, at), block in blocks[self].items() if number == volume and at <= offset
            )
            data = block[offset - start : offset - start + length]
        put(self, volume, op, offset, length, data)

    patch.setattr(Primary, "compare", mutant_compare)
    patch.setattr(Primary, "put", mutant_put)


def reads_what_is_in_flight(patch: Patch) -> None:
    """A read does not wait for changes that the secondary may lack."""
    patch.setattr(Primary, "in_flight", lambda *_: False)


def forgets_the_far_regions_of_a_change(patch: Patch) -> None:
    """A read waits only for changes that begin in one of its regions."""
    patch.setattr(RegionsInFlight, "_note_long", lambda *_: None)


def does_not_compare_after_a_kill(patch: Patch) -> None:
    """Rule 9: an owner that was killed goes on as if nothing was under way."""
    plan = session.plan
    patch.setattr(session, "plan", lambda owner, secondary: plan(replace(owner, unclean=False), secondary))
    patch.setattr(Owner, "peer_unfit", property(lambda self: bool(self.unfit)))


def does_not_notice_that_the_secondary_lost_its_cache(patch: Patch) -> None:
    """Rule 3: a secondary whose host restarted goes on as if it had all it acknowledged."""
    update = Process.update

    def mutant(self: Process, **changes: Any) -> None:
        if isinstance(self, Follower):
            changes.pop("lost_cache", None)
        update(self, **changes)

    patch.setattr(Process, "update", mutant)


def ends_a_sync_without_a_flush(patch: Patch) -> None:
    """Rule 9: the secondary counts as synced before what was copied is stable on it."""
    flush = Primary.flush

    def mutant(self: Primary, client: Any, volume: int, replies: list[bytes]) -> None:
        if isinstance(client, ResyncEnd):
            client.answer(b"")
        else:
            flush(self, client, volume, replies)

    patch.setattr(Primary, "flush", mutant)


def serves_before_the_first_session(patch: Patch) -> None:
    """Rule 5: an owner that was killed serves its copy at once, with what it never answered."""
    init = Primary.__init__

    def mutant(self: Primary, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **named)
        self.opened, self._flow.stopped = True, False

    patch.setattr(Primary, "__init__", mutant)


def goes_on_with_a_failed_replica(patch: Patch) -> None:
    """Rule 13: an owner whose disk failed answers what the peer acknowledges."""
    patch.setattr(Primary, "halt", lambda _: None)


def holds_reads_without_bound(patch: Patch) -> None:
    """Rule 15: reads that wait for changes in flight pause nobody."""
    patch.setattr(Primary, "when_settled", lambda self, do: self._waiting.append((self.issued, do)))


def takes_without_bound(patch: Patch) -> None:
    """Rule 15: the window is never full."""
    patch.setattr(Primary, "full", property(lambda _: False))


def answers_alone_what_is_not_stable(patch: Patch) -> None:
    """Rule 1: an owner that is alone answers what only its cache has."""
    init = WriteThrough.__init__

    def mutant(self: WriteThrough, *arguments: Any) -> None:
        init(self, *arguments)
        self._stable = [UNLIMITED for _ in self._stable]

    patch.setattr(WriteThrough, "__init__", mutant)


def settles_without_a_flush(patch: Patch) -> None:
    """Rule 1: an owner that goes alone says that it has settled before what was cached is stable."""
    patch.setattr(WriteThrough, "settle", lambda _self, settled: settled())


def forgets_that_the_peer_may_have_been_added(patch: Patch) -> None:
    """Rule 9: an owner answers alone when its session breaks, though the record may have the peer in sync by then."""
    patch.setattr(Primary, "lock", lambda _: None)


def adds_a_peer_that_answers_do_not_wait_for(patch: Patch) -> None:
    """Rule 9: the secondary is joinable while answers do not wait for it yet."""
    patch.setattr(Primary, "resync_copied", lambda _: None)
    patch.setattr(Primary, "joinable", property(lambda self: self._synced and self._link is not None))


# What the simulation says when the rule is missing.
RULES: list[tuple[Callable[[Patch], None], str]] = [
    (answers_without_the_ack, "before the secondary applied"),
    (flushes_without_the_peer, "was stable on node-b"),
    (flushes_without_the_own_disk, "was stable on node-a"),
    (goes_on_alone, "before the secondary applied"),
    (takes_frames_of_any_epoch, "a change that is not of its session"),
    (opens_sessions_of_any_epoch, "a change that is not of its session"),
    (sends_the_window_in_another_order, "the replicas differ|before the secondary applied"),
    (copies_a_block_as_it_was, "counts as in sync and lacks"),
    (reads_what_is_in_flight, "which the secondary lacks"),
    (forgets_the_far_regions_of_a_change, "which the secondary lacks"),
    (does_not_compare_after_a_kill, "the replicas differ"),
    (does_not_notice_that_the_secondary_lost_its_cache, "which the secondary lacks"),
    (ends_a_sync_without_a_flush, "is not stable"),
    (answers_alone_what_is_not_stable, "was stable on the owner"),
    (settles_without_a_flush, "had to be stable|is not stable"),
    (forgets_that_the_peer_may_have_been_added, "counts as in sync and lacks|before the secondary applied"),
    (adds_a_peer_that_answers_do_not_wait_for, "counts as in sync and lacks|before the secondary applied"),
    (serves_before_the_first_session, "which the secondary lacks"),
    (goes_on_with_a_failed_replica, "before the owner applied it"),
    (holds_reads_without_bound, "rule 15"),
    (takes_without_bound, "rule 15"),
]


@pytest.mark.parametrize(("remove", "said"), RULES, ids=[remove.__name__ for remove, _ in RULES])
def test_the_simulation_notices_code_that(remove: Callable[[Patch], None], said: str, monkeypatch: Patch) -> None:
    remove(monkeypatch)
    others = []
    for seed in range(_SEEDS):
        try:
            run(seed)
        except RunFailed as e:
            if isinstance(e.__cause__, Violation) and re.search(said, str(e.__cause__)):
                return
            others.append(f"seed {seed}: {e.__cause__!r}")
    pytest.fail(f"not noticed in {_SEEDS} seeds; what was: {others[:5]}")
