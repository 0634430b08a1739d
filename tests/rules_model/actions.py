"""The table of actions: in which role a node does what. Each decides by itself whether it is possible now."""

from collections.abc import Callable, Iterator, Mapping

from . import rules
from .arbiters import confirm, consent, fence, grant, greet, hear, read, seed
from .data import answer, flush, replicate, settle, write
from .faults import boot, break_link, kill, lose_power, lose_register
from .link import propose_handover, propose_join, resume_session, resume_without_grant, sync_peer
from .ownership import (
    end_wait,
    expire,
    go_alone,
    go_alone_unasked,
    hear_not_leading,
    last_owner_wins,
    lead,
    promise,
    take_over,
)
from .world import Arbiter, Role, Setting, Step, World

Action = Callable[[World, int, Setting], Iterator[Step]]
Table = Mapping[Role, tuple[Action, ...]]

ACTIONS: Mapping[Role, tuple[Action, ...]] = {
    Role.OFF: (boot,),
    Role.FOLLOWER: (take_over, last_owner_wins, lead),
    Role.OWNER: (
        *(write, replicate, answer, flush, settle),
        *(resume_session, sync_peer, propose_join, propose_handover),
        *(go_alone, end_wait, break_link),
    ),
    Role.DRAINED: (go_alone,),
}

WHILE_ON: tuple[Action, ...] = (hear, promise, expire, kill, lose_power)

# A proposal on its way is granted whatever its proposer does meanwhile.
ALWAYS: Mapping[Arbiter, tuple[Action, ...]] = {Arbiter.REGISTER: (grant, lose_register), Arbiter.FENCING: (consent,)}
BY_ARBITER: Mapping[Arbiter, tuple[Action, ...]] = {
    Arbiter.REGISTER: (read, seed),
    Arbiter.FENCING: (fence, confirm, greet),
}

# What happens only where a rule is removed.
WITHOUT: Mapping[str, tuple[Role, Action]] = {
    rules.ASK_FIRST: (Role.OWNER, go_alone_unasked),
    rules.WAIVER_NAMES_RECORD: (Role.FOLLOWER, hear_not_leading),
    rules.RESUME_BY_CAS: (Role.DRAINED, resume_without_grant),
}


def table(setting: Setting) -> Table:
    """What a node may do in each role."""
    actions = {role: (*ACTIONS[role], *ALWAYS[setting.arbiter]) for role in Role}
    for role in Role:
        if role != Role.OFF:
            actions[role] += (*WHILE_ON, *BY_ARBITER[setting.arbiter])
    for rule, (role, action) in WITHOUT.items():
        if not setting.has(rule):
            actions[role] += (action,)
    return actions
