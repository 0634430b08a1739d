"""The rules that can be removed, one by one; each guards something in the actions that ask for it by name."""

from typing import Final

# Rule 1
LATE_ACK: Final = "late-ack"
SETTLE: Final = "settle"
# Rule 2
ASK_FIRST: Final = "ask-first"
# Rule 3
INSYNC_ONLY: Final = "insync-only"
LOST_NOTHING: Final = "lost-nothing"
RECONCILE: Final = "reconcile"
# Rule 4
STOP_FIRST: Final = "stop-first"
# Rule 5
LEASE_CHECK: Final = "lease-check"
LEASE_WAIT: Final = "lease-wait"
BOOT_WAIT: Final = "boot-wait"
NO_PROMISE_WHILE_STANDING: Final = "no-promise-while-standing"
PROMISE_NAMES_RECORD: Final = "promise-names-record"
WAIVER_NAMES_RECORD: Final = "waiver-names-record"
STOP_BEFORE_HANDOVER: Final = "stop-before-handover"
SEAL_JOIN: Final = "seal-join"
JOIN_WITH_LEASE: Final = "join-with-lease"
# Rule 11
CONFIRM_ALONE: Final = "confirm-alone"
# Rule 6, and how a proposal may be followed by another
EPOCH_CAS: Final = "epoch-cas"
RESUME_BY_CAS: Final = "resume-by-cas"
REMEMBER_PROPOSAL: Final = "remember-proposal"
# Rule 9
FLUSH_TARGET: Final = "flush-target"
# The register
SEED_TOGETHER: Final = "seed-together"
# The fencing arbiter
FENCE_CONFIRM: Final = "fence-confirm"
SEE_PEER_BEFORE_FENCING: Final = "see-peer-before-fencing"
NO_GREETING_WHILE_FENCING: Final = "no-greeting-while-fencing"
ONE_PROPOSAL: Final = "one-proposal"
FRESH_EPOCH: Final = "fresh-epoch"

COMMON: Final = {
    LATE_ACK: "a write is answered when every node in sync has applied it",
    SETTLE: "an owner that went alone may own after a power loss only if it had flushed what was cached before",
    ASK_FIRST: "an owner that lost its peer goes on alone only when the record says so",
    INSYNC_ONLY: "only a node in the record's in_sync takes over",
    LOST_NOTHING: "a node whose cache was lost does not own, nor resume, what may have been only cached",
    RECONCILE: "what an owner was doing when it was killed is made equal on both before anything is answered",
    STOP_FIRST: "a node stops applying the owner's stream before it proposes to take over",
    STOP_BEFORE_HANDOVER: "an owner stops before it proposes to hand over",
    SEAL_JOIN: "from before it proposes to add its peer an owner that is alone answers as if the peer were added",
    EPOCH_CAS: "the record changes only from the epoch that the proposer knew",
    RESUME_BY_CAS: "an owner that proposed a handover leads again only at a new epoch that was granted to it",
    REMEMBER_PROPOSAL: "a proposal is stored before it is sent, and binds its proposer also after a restart",
    FLUSH_TARGET: "a peer is added only when all that was copied is flushed there",
}
"""Needed with every arbiter."""

REGISTER_ONLY: Final = {
    LEASE_CHECK: "a mirrored owner answers only while it has a lease",
    LEASE_WAIT: "a node that took over serves only when the old owner's lease is over",
    BOOT_WAIT: "a node that was restarted has forgotten what it promised, and waits all the same",
    NO_PROMISE_WHILE_STANDING: "a node that proposes to take over promises nothing",
    PROMISE_NAMES_RECORD: "a promise is for the record that both nodes have, which names the other one owner",
    WAIVER_NAMES_RECORD: "the wait is waived only when the old owner says that it has the new record",
    SEED_TOGETHER: "a register that was lost is seeded only while both nodes have the same record",
}
"""Needed with a register: by fencing the old owner is off, or has stopped and consented, before another serves."""

FENCING_ONLY: Final = {
    FENCE_CONFIRM: "without consent the record changes only when the fence agent has confirmed that the peer is off",
    SEE_PEER_BEFORE_FENCING: "a node that was booted fences only when it has seen its peer",
    NO_GREETING_WHILE_FENCING: "a node is not seen by a peer that it is fencing until its new record is stored",
    ONE_PROPOSAL: "a node with a proposal of its own under way consents to none",
    FRESH_EPOCH: "what may have been granted is never contradicted at the same epoch, only followed by the next",
}
"""Needed with the fencing arbiter alone."""

OPTIONAL: Final = {
    JOIN_WITH_LEASE: "an owner proposes to add its peer only while it has a lease",
    CONFIRM_ALONE: "a restarted owner that is alone serves only when the arbiter confirms its record",
}
"""Part of the design, but not needed for safety: they hold without."""

ALL: Final = frozenset({**COMMON, **REGISTER_ONLY, **FENCING_ONLY})


def of(arbiter: str) -> tuple[str, ...]:
    """The rules that are needed with this arbiter."""
    return (*COMMON, *(FENCING_ONLY if arbiter == "fencing" else REGISTER_ONLY))
