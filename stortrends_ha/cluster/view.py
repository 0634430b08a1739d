"""What the state machine of a group looks at: the peer, the own replica, the operator's wishes for the node. Pure."""

from dataclasses import dataclass, field

from stortrends_ha.record import Record


@dataclass(frozen=True, slots=True)
class Replica:
    """What the group's data process says of itself; there is none while it does not run."""

    epoch: int  # of the record that it acts for; 0: it has no role
    leading: bool
    session: bool  # a link session is open at this epoch
    serving: bool  # clients are answered
    joinable: bool  # the secondary has everything, and every answer waits for it, too
    peer_unfit: str  # why the secondary needs a full sync, though the record has it in sync
    failure: str  # its disk failed
    lost_cache: bool  # its host restarted, or a flush failed: writes that were only cached may be missing
    needs_sync: bool  # a sync of it began and did not end
    settled_epoch: int  # the epoch alone at which all that was cached had become stable
    has_data: bool = True  # it has a lineage: it was served or synced once
    cannot_listen: str = ""  # why clients cannot connect here, or could not if it owned


@dataclass(frozen=True, slots=True)
class Peer:
    """What the peer said of the group in its newest beat."""

    record: Record
    leading: bool  # it may be answering clients
    serving: bool
    promise: bool  # the acknowledgement in this beat extends our lease
    unfit: str  # why it could not own the group
    lost: bool  # its cache is lost
    wants: bool  # its operator asks for the group to be moved to it
    releasing: bool = False  # it is handing the group over


@dataclass(frozen=True, slots=True)
class View:
    """The surroundings of the machine at one moment."""

    now_ns: int  # CLOCK_BOOTTIME
    alive: bool  # the peer was heard within ``suspect_after_s``
    suspected: bool  # it was not, for that long, while this node was awake; both false: in doubt
    silent_ns: int  # since the peer was heard, or since this node started
    peer: Peer | None  # its newest beat, however old; None: it was not heard in this life
    lease_until_ns: int  # rule 5: until when we may answer while the peer is in sync
    may_serve_from_ns: int  # if we take over: when any lease that our promises have given has ended for sure
    draining: bool  # the operator wants nothing to be owned here
    peer_draining: bool
    stopping: bool  # this node is being stopped
    peer_stopping: bool
    replica: Replica | None
    differs: str = ""  # what the peer's cluster file has another one of, and must not: "arbiter", "timing", or both


@dataclass(frozen=True, slots=True)
class Saved:
    """What a node keeps of a group durably."""

    record: Record
    alone_since: int  # the epoch since which it has owned alone without a break, else the record's; 0: never saved
    why: str = field(default="", compare=False)  # a clause for the history


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations that the machine needs, in nanoseconds."""

    suspect_after_ns: int
    takeover_delay_ns: int  # the secondary waits so much longer than an owner that lives and goes on alone
    retry_ns: int  # between two questions to the arbiter
    check_ns: int  # between two looks at the register while all is well
    hold_down_ns: int  # an automatic failback waits until all has been well for so long
    move_timeout_ns: int  # a wish to move is forgotten after that
