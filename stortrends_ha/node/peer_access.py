"""The node's access to its peer for the arbiters that have no third machine.

Invariant: that the peer was seen since this machine booted is remembered over restarts of the daemon (rule: a node
that has just booted may not fence before it has seen its peer once), by the boot id in ``state_dir/peer-seen``; a
mark that cannot be written or read counts as not seen.
"""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from stortrends_ha.cluster.answers import Granted, Known, Refused, Unreachable
from stortrends_ha.cluster.membership import Membership
from stortrends_ha.node.heartbeats import Heartbeats, now_ns
from stortrends_ha.record import Record

ASK_TIMEOUT_S = 1.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class PeerAccess:
    """Implements ``arbiter.fencing.Peer`` over the heartbeats."""

    def __init__(self, membership: Membership, state_dir: Path, own_record: Callable[[str], Record]) -> None:
        self._membership = membership
        self._mark = state_dir / "peer-seen"
        self._own_record = own_record
        self._boot_id = _BOOT_ID.read_text().strip()
        self._seen = False
        with contextlib.suppress(OSError):
            self._seen = self._mark.read_text() == self._boot_id
        self.heartbeats: Heartbeats | None = None  # set by the supervisor before anything runs

    @property
    def name(self) -> str:
        """Of the peer."""
        return self._membership.peer_name

    def note_beat(self) -> None:
        """A beat of the peer has come that counts."""
        if not self._seen:
            self._seen = True
            asyncio.get_running_loop().run_in_executor(None, self._remember)  # beats never wait for a disk

    def _remember(self) -> None:
        with contextlib.suppress(OSError):
            self._mark.write_text(self._boot_id)

    async def consent(self, group: str, old: Record, new: Record) -> Granted | Refused | Unreachable:
        """See ``arbiter.fencing.Peer``."""
        assert self.heartbeats is not None
        return await self.heartbeats.ask(group, old, new, ASK_TIMEOUT_S)

    async def ask(self, group: str) -> Known | Unreachable:
        """See ``arbiter.fencing.Peer``: a proposal that changes nothing tells the peer's record."""
        own = self._own_record(group)
        match await self.consent(group, own, own):
            case Granted():
                return Known(own)
            case Refused(current):
                return Known(current)
            case Unreachable() as answer:
                return answer

    def seen(self) -> bool:
        """See ``arbiter.fencing.Peer``."""
        return self._seen

    def alive(self) -> bool:
        """See ``arbiter.fencing.Peer``."""
        return self._membership.alive(now_ns())

    def heard_ns(self) -> int:
        """See ``arbiter.fencing.Peer``."""
        return self._membership.last_heard_ns if self._membership.peer else 0
