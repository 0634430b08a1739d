"""Each safety rule, taken out of the code by changing one small method: the simulator must notice.

What a rule is for is only known when its absence is seen. If one of these fails, either the simulator has become
blind to that rule, or something else keeps it, too: then say so here, and take that out as well.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

from stortrends_ha.cluster import effects as do
from stortrends_ha.cluster import judgement
from stortrends_ha.cluster.answers import Answer, Unreachable
from stortrends_ha.cluster.group import Group
from stortrends_ha.cluster.phases import PROMISING, Phase
from stortrends_ha.cluster.view import Saved, View
from stortrends_ha.dataplane.owner import Owner
from stortrends_ha.dataplane.owner_link import OwnerLink
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.nbd_transmission import OP_WRITE, Change
from stortrends_ha.record import Record
from stortrends_ha.replication import resync, session
from stortrends_ha.replication.block_map import BlockMap
from stortrends_ha.replication.differences import Differences
from stortrends_ha.replication.gate import FOREVER_NS, Gate
from stortrends_ha.replication.ordering import RegionsInFlight
from stortrends_ha.replication.primary import Primary
from stortrends_ha.replication.window import AllFlushed, Entry
from stortrends_ha.replication.write_through import UNLIMITED, WriteThrough
from stortrends_ha.storage.map_file import MapFile

from .disk import BLOCK_BYTES
from .history import Violation
from .run import RunFailed, run

_SEEDS = 400  # within which it must be noticed

Patch = pytest.MonkeyPatch


def goes_on_alone_without_asking(patch: Patch) -> None:
    """Rule 2: an owner that misses its peer takes the next record for granted."""
    propose = Group._propose

    def mutant(self: Group, new: Record, why: str, view: View) -> None:
        if self.phase is Phase.LEADING and new.alone and not self.record.alone and self._saving is None:
            self._adopt(new, why)
        else:
            propose(self, new, why, view)

    patch.setattr(Group, "_propose", mutant)


def owns_without_its_cache(patch: Patch) -> None:
    """Rule 3: a node whose host lost power serves what is left."""
    obstacle = judgement.obstacle
    patch.setattr(judgement, "obstacle", lambda *a, in_spite: obstacle(*a, in_spite=in_spite or True))


def owns_though_it_is_not_in_sync(patch: Patch) -> None:
    """Rule 3: a node takes over from an owner that is alone."""
    obstacle = judgement.obstacle

    def mutant(record: Record, alone_since: int, me: str, replica: Any, *, in_spite: bool) -> str:
        both = Record(record.epoch, record.owner, tuple(sorted({record.owner, me})))
        return obstacle(record if me in record.in_sync else both, alone_since, me, replica, in_spite=in_spite)

    patch.setattr(judgement, "obstacle", mutant)


def goes_on_listening(patch: Patch) -> None:
    """Rule 4: the stream of the old owner is applied while its successor proposes to take over."""

    def mutant(self: Group, _view: View, _why: str) -> None:
        self._to(Phase.STOPPING)
        self._to(Phase.STANDING)

    patch.setattr(Group, "_stop_listening", mutant)


def promises_while_it_takes_over(patch: Patch) -> None:
    """Rule 5: the lease of the old owner goes on while its successor waits for its end, and serves.

    Who waits counts from its last promise: so only promises that come after that are noticed.
    """

    def mutant(self: Group, view: View) -> bool:
        return self.record.owner == self._peer and view.peer is not None and view.peer.record == self.record

    patch.setattr(Group, "promise", mutant)


def promises_for_any_record(patch: Patch) -> None:
    """Rule 5: an owner that its secondary knows to be out of date keeps its lease."""
    patch.setattr(Group, "promise", lambda self, _view: self.phase in PROMISING)


def serves_at_once(patch: Patch) -> None:
    """Rule 5: a new owner does not wait for the end of the old lease."""
    patch.setattr(Group, "_after_old_lease", lambda _self, _view: 0)


def does_not_reckon_with_drift(patch: Patch) -> None:
    """Rule 5: a new owner waits for the length of the lease on its own clock."""
    from . import supervisor

    patch.setattr(supervisor, "may_serve_from_ns", lambda heard_ns, timing: heard_ns + timing.lease_ns)


def answers_without_a_lease(patch: Patch) -> None:
    """Rule 5: the gate is always open."""
    patch.setattr(Gate, "open_at", lambda _self, _now_ns: True)


def answers_reads_while_it_may_not_be_alone(patch: Patch) -> None:
    """Rule 5: between ``joinable`` and the next record, reads are answered without a lease."""
    set_gate = Owner._set_gate

    def mutant(self: Owner) -> None:
        lease_ns = self._lease_ns
        self._lease_ns = FOREVER_NS if self.record.alone else lease_ns
        set_gate(self)
        self._lease_ns = lease_ns

    patch.setattr(Owner, "_set_gate", mutant)


def forgets_that_the_peer_may_have_joined(patch: Patch) -> None:
    """Rule 9: an owner whose session breaks after ``joinable`` goes on alone."""
    lost = OwnerLink._lost

    def mutant(self: OwnerLink, why: str) -> None:
        if not self._connector.cancelling():  # it was not ended on purpose
            self._primary.unlock()
        lost(self, why)

    patch.setattr(OwnerLink, "_lost", mutant)


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
        if not local or self._alone:
            self._flushes[number].local = True
            flushed(self, number, local)

    patch.setattr(Primary, "_flushed", mutant)


def answers_what_was_held(patch: Patch) -> None:
    """Rule 2: when the link is lost, what waits is answered instead of held."""
    close_session = Primary.close_session

    def mutant(self: Primary) -> None:
        close_session(self)
        self._unsent.clear()
        if not self._alone and self.acked < self.issued and not self.failed:
            self._acknowledged(self.issued)

    patch.setattr(Primary, "close_session", mutant)


def forgets_the_far_regions_of_a_change(patch: Patch) -> None:
    """Rule 5: a read waits only for changes that begin in one of its regions."""
    patch.setattr(RegionsInFlight, "_note_long", lambda *_: None)


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
    blocks: dict[tuple[Primary, int, int], bytes] = {}

    def mutant_compare(self: Primary, volume: int, offset: int, length: int, digest: bytes) -> None:
        content = bytes(self._stores[volume].read(offset, length))
        for at in range(0, length, BLOCK_BYTES):
            blocks[self, volume, offset + at] = content[at : at + BLOCK_BYTES]
        compare(self, volume, offset, length, digest)

    def mutant_put(self: Primary, volume: int, op: int, offset: int, length: int, data: Any) -> None:
        put(self, volume, op, offset, length, blocks.pop((self, volume, offset), data) if op == OP_WRITE else data)

    patch.setattr(Primary, "compare", mutant_compare)
    patch.setattr(Primary, "put", mutant_put)


def ends_a_sync_without_a_flush(patch: Patch) -> None:
    """Rule 9: the secondary counts as synced before what was copied is stable on it."""
    patch.setattr(Primary, "flush_everywhere", lambda _self, _volume, done: done())


def adds_a_peer_that_answers_do_not_wait_for(patch: Patch) -> None:
    """Rule 9: the secondary is joinable while answers do not wait for it yet."""
    patch.setattr(Primary, "resync_copied", lambda _: None)
    patch.setattr(Primary, "joinable", property(lambda self: self._synced and self._link is not None))


def takes_without_bound(patch: Patch) -> None:
    """Rule 15: the window is never full."""
    patch.setattr(Primary, "full", property(lambda _: False))


def reads_what_is_in_flight(patch: Patch) -> None:
    """Rule 5: a read returns what the secondary may lack."""
    patch.setattr(Primary, "in_flight", lambda *_: False)


def opens_sessions_of_any_epoch(patch: Patch) -> None:
    """Rule 6: the record of the peer is not looked at; nor is the epoch of a frame, which would keep the rule, too."""
    next_frame = wire.next_frame
    patch.setattr(wire, "next_frame", lambda view, at, end, _epoch: next_frame(view, at, end, None))
    patch.setattr(session, "_record_differences", lambda *_: [])


def takes_no_answer_for_a_no(patch: Patch) -> None:
    """Rule 11: a proposal that was not answered is taken for refused."""
    said = Group.arbiter_said

    def mutant(self: Group, number: int, answer: Answer, view: View) -> list[do.Effect]:
        return said(
            self, number, Unreachable(answer.why, asked=False) if isinstance(answer, Unreachable) else answer, view
        )

    patch.setattr(Group, "arbiter_said", mutant)


def acts_before_the_record_is_saved(patch: Patch) -> None:
    """A record is acted on at once, and is durable some time later."""
    adopt, step = Group._adopt, Group._step
    waiting: dict[Group, Saved] = {}

    def adopts(self: Group, record: Record, why: str) -> None:
        adopt(self, record, why)
        assert self._saving is not None
        waiting[self] = self._saving

    def steps(self: Group, view: View) -> None:
        step(self, view)
        saving = waiting.pop(self, None)
        if saving is not None and saving == self._saving:
            self._saving = None
            before, self.record, self._alone_since = self.record, saving.record, saving.alone_since
            self._old_record = False
            self._enter(before, view)

    patch.setattr(Group, "_adopt", adopts)
    patch.setattr(Group, "_step", steps)


def leads_at_once_after_a_start(patch: Patch) -> None:
    """An owner that was alone does not settle what its former life may have proposed."""
    patch.setattr(Group, "_may_be_open", lambda _self, _replica: False)


def claims_before_it_owns(patch: Patch) -> None:
    """Rule 12: a node takes the addresses while its takeover is only proposed."""
    stand = Group._step_standing

    def mutant(self: Group, view: View) -> None:
        self._orders.claim()
        stand(self, view)

    patch.setitem(Group._STEPS, Phase.STANDING, mutant)


def writes_before_the_region_is_logged(patch: Patch) -> None:
    """Rule 8: a change does not wait until its region is durably in the log."""

    def mutant(self: Primary, volume: int, changes: list[Change], _then: Callable[[], None]) -> bool:
        self._differences[volume].log(changes, lambda: None)
        return True

    patch.setattr(Primary, "logged", mutant)


def checkpoints_without_the_secondary(patch: Patch) -> None:
    """Rule 8: a region leaves the log when the owner has flushed."""
    flush = Primary.flush

    def mutant(self: Primary, client: Any, volume: int, replies: list[bytes], *, everywhere: bool = False) -> None:
        if isinstance(client, AllFlushed) and client._volumes == 1 and not self._ending:
            self._stores[volume].start_flush(lambda: client.answer(b""))
        else:
            flush(self, client, volume, replies, everywhere=everywhere)

    patch.setattr(Primary, "flush", mutant)


def checkpoints_by_the_dirty_map_while_joining(patch: Patch) -> None:
    """Rule 8: a region leaves the log for the dirty map, which is given up when the secondary is added."""
    checkpoint = Primary.checkpoint

    def mutant(self: Primary) -> None:
        late, self._late = self._late, False
        checkpoint(self)
        self._late = late

    patch.setattr(Primary, "checkpoint", mutant)


def loads_what_is_only_cached(patch: Patch) -> None:
    """Rule 8: what a killed process has not made durable counts as if it had."""
    write = MapFile.write

    def mutant(self: MapFile, pages: Any, *, durable: bool) -> None:
        if inspect.stack()[1].function != "_open":
            write(self, pages, durable=durable)

    patch.setattr(MapFile, "write", mutant)


def does_not_ask_what_the_secondary_knows(patch: Patch) -> None:
    """Rule 9: a resync is about what the owner knows."""
    patch.setattr(Differences, "doubt", lambda _self, _ranges: None)


def does_not_compare_what_is_doubtful(patch: Patch) -> None:
    """Rule 9: a resync is about the dirty map."""
    todo = resync._todo

    def mutant(store: Any, differences: Differences) -> BlockMap:
        differences.doubtful.clear()
        return todo(store, differences)

    patch.setattr(resync, "_todo", mutant)


def takes_blocks_for_clean_before_they_are_flushed(patch: Patch) -> None:
    """Rule 9: a block that was put on the stream is clean."""

    def mutant(self: resync.Resync) -> None:
        for differences, todo in zip(self._differences, self._todo, strict=True):
            differences.begin_flush()
            differences.clean(todo)

    patch.setattr(resync.Resync, "flush", mutant)


def takes_lost_maps_for_empty(patch: Patch) -> None:
    """Rule 9: nothing differs if a map is lost."""
    open_ = MapFile._open
    patch.setattr(MapFile, "_open", lambda self, _expected: open_(self, False))


# What the simulator says when the rule is missing, and seeds that have said so. Another change of the simulator may
# draw other events from them; then all others are tried.
_WRONG_ANSWER = r"was answered with|may answer clients|was lost before|went back"
_DIFFER = _WRONG_ANSWER + "|rules 8 and 9|the replicas differ"
RULES: list[tuple[Callable[[Patch], None], str, tuple[int, ...]]] = [
    (goes_on_alone_without_asking, _WRONG_ANSWER, (0,)),
    (owns_without_its_cache, r"rule 3", (1,)),
    (owns_though_it_is_not_in_sync, _WRONG_ANSWER, (1,)),
    (goes_on_listening, r"rule 4", (0,)),
    (promises_while_it_takes_over, r"rule 5", (0,)),
    (promises_for_any_record, r"rule 5", (0,)),
    (serves_at_once, r"rule 5", (1,)),
    (does_not_reckon_with_drift, r"rule 5", (149,)),
    (answers_without_a_lease, r"rule 5", (0,)),
    (answers_reads_while_it_may_not_be_alone, r"rule 5|was answered with", (12,)),
    (forgets_that_the_peer_may_have_joined, _WRONG_ANSWER, (12,)),
    (answers_alone_what_is_not_stable, r"rule 1", (0,)),
    (settles_without_a_flush, r"rule 1", (1,)),
    (answers_without_the_ack, _WRONG_ANSWER, (0,)),
    (reads_what_is_in_flight, _WRONG_ANSWER + "|rule 1", (0,)),
    (opens_sessions_of_any_epoch, r"rule 6", (1,)),
    (takes_no_answer_for_a_no, _WRONG_ANSWER + "|two records|not all is well", (404,)),
    (acts_before_the_record_is_saved, r"has not saved", (0,)),
    (leads_at_once_after_a_start, _WRONG_ANSWER, (25,)),
    (claims_before_it_owns, r"rule 12", (0,)),
    (flushes_without_the_peer, _DIFFER, (0,)),
    (flushes_without_the_own_disk, _DIFFER, (2,)),
    (answers_what_was_held, _WRONG_ANSWER, (13,)),
    (forgets_the_far_regions_of_a_change, _WRONG_ANSWER + "|rule 1", (0,)),
    (sends_the_window_in_another_order, _DIFFER, (21,)),
    (copies_a_block_as_it_was, _DIFFER, (1,)),
    (ends_a_sync_without_a_flush, _DIFFER, (0,)),
    (adds_a_peer_that_answers_do_not_wait_for, r"not all is well|has not helped|is not any more", (0,)),
    (takes_without_bound, r"rule 15", (0,)),
    (writes_before_the_region_is_logged, _DIFFER, (0,)),
    (checkpoints_without_the_secondary, _DIFFER, (0,)),
    (checkpoints_by_the_dirty_map_while_joining, _DIFFER, (3,)),
    (loads_what_is_only_cached, _DIFFER, (28,)),
    (does_not_ask_what_the_secondary_knows, _DIFFER, (0,)),
    (does_not_compare_what_is_doubtful, _DIFFER, (0,)),
    (takes_blocks_for_clean_before_they_are_flushed, _DIFFER, (0,)),
    (takes_lost_maps_for_empty, _DIFFER, (28,)),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("remove", "said", "seeds"), RULES, ids=[remove.__name__ for remove, *_ in RULES])
def test_the_simulator_notices_code_that(
    remove: Callable[[Patch], None], said: str, seeds: tuple[int, ...], monkeypatch: Patch
) -> None:
    remove(monkeypatch)
    others = []
    for seed in (*seeds, *range(_SEEDS)):
        try:
            run(seed)
        except RunFailed as e:
            if isinstance(e.__cause__, Violation) and re.search(said, str(e.__cause__)):
                print(f"noticed by seed {seed}: {e.__cause__}")
                return
            others.append(f"seed {seed}: {e.__cause__!r}"[:300])
    pytest.fail(f"not noticed in {_SEEDS} seeds; what was: {others[:5]}")
