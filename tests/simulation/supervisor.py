"""What supervisors and arbiter do, as far as the mirror alone needs it: one register, and orders that come late.

The owner is always node-a. It goes alone when it misses its peer, or must; the peer is added when it may be; a proposal
to add it may be granted long after it was made, whatever has happened to the session meanwhile.
"""

from typing import TYPE_CHECKING

from .follower import Follower
from .owner import Owner

if TYPE_CHECKING:
    from .world import World


class Supervisor:
    """Of both nodes."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._joining = False  # joinable was told, so the record may change at any time

    # --- Orders: each returns whether it did something ------------------------------------------------

    def order(self) -> bool:
        """Tell a process the record, as it is now; and the owner, what became of adding the secondary."""
        world = self._world
        owner, follower = world.owner.process, world.secondary.process
        if isinstance(follower, Follower) and follower.record != world.record and world.random.random() < 0.7:
            world.run(follower, follower.follow, world.record)
        elif isinstance(owner, Owner) and not owner.failure and (owner.record != world.record or owner.primary.held):
            self._joining = False  # nothing that was proposed before can be granted any more
            world.run(owner, owner.lead, world.record)
        else:
            return False
        return True

    # --- Decisions --------------------------------------------------------------------------------

    def decide(self) -> bool:
        """What an owner would have the arbiter do, and the arbiter does."""
        world, owner = self._world, self._world.owner.process
        if self._joining and (world.settling or world.random.random() < 0.5):
            self._join()
        elif not isinstance(owner, Owner) or owner.failure or owner.record != world.record:
            return False
        elif owner.record.alone:
            return self._tell(owner)
        else:
            return self._go_alone(owner)
        return True

    def _join(self) -> None:
        self._joining = False
        self._world.record = self._world.record.joined_by(self._world.secondary.name)
        self._world.happened("secondary added")
        if self._world.secondary.in_sync:
            self._world.history.synced()

    def _tell(self, owner: Owner) -> bool:
        """The owner says that the secondary is joinable, and is held to it."""
        if not owner.primary.joinable or owner.primary.locked:
            return False
        owner.primary.lock()
        self._joining = True
        return True

    def _go_alone(self, owner: Owner) -> bool:
        world = self._world
        misses = owner.link is None and world.random.random() < 0.03
        if not (owner.peer_unfit or misses):
            return False
        world.record = world.record.owned_alone(world.owner.name)
        world.happened("owner goes alone")
        return True

    def may_lead(self) -> bool:
        """Rule 3: whether the owner may serve its copy. If its cache is lost: if that lost nothing, or if both did."""
        world, owner = self._world, self._world.owner
        if self._joining and world.random.random() < 0.5:
            self._join()
        self._joining = False
        if not owner.lost_cache:
            return True
        if world.record.alone and owner.state.settled_epoch == world.record.epoch:
            world.history.go_back(owner.disks, settled=True)
            world.count["a settled owner lost its cache"] += 1
            return True
        if not world.record.alone and world.secondary.lost_cache:
            world.history.go_back(owner.disks, settled=False)
            return True
        world.count["owner may not lead"] += 1
        world.held()
        return False
