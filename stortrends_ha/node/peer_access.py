"""The node's access to its peer for the arbiters that have no third machine.

Invariant: that the peer was seen since this machine booted is remembered over restarts of the daemon (rule: a node
that has just booted may not fence before it has seen its peer once), by the boot id in ``state_dir/peer-seen``; a
mark that cannot be written or read counts as not seen. For which epochs the peer was asked to join is in
``state_dir/peer-asked``, durable before it is asked.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from stortrends_ha.boottime import now_ns
from stortrends_ha.cluster.answers import Granted, Known, Refused, Unreachable
from stortrends_ha.cluster.membership import Membership
from stortrends_ha.errors import StartError
from stortrends_ha.node.agreement import differing
from stortrends_ha.node.heartbeats import Heartbeats
from stortrends_ha.node.records import replace_file
from stortrends_ha.record import Record
from stortrends_ha.storage.state import BOOT_ID

log = logging.getLogger(__name__)

ASK_TIMEOUT_S = 1.0


class PeerAccess:
    """Implements ``arbiter.fencing.Peer`` over the heartbeats."""

    def __init__(self, membership: Membership, state_dir: Path, own_record: Callable[[str], Record]) -> None:
        self._membership = membership
        self._mark = state_dir / "peer-seen"
        self._own_record = own_record
        self._asked = _Asked(state_dir / "peer-asked")
        self._boot_id = BOOT_ID.read_text().strip()
        self._seen = False
        with contextlib.suppress(OSError, ValueError):
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

    async def will_ask_to_join(self, group: str, epoch: int) -> bool:
        """See ``arbiter.fencing.Peer``."""
        return await self._asked.note(group, epoch)

    def asked_to_join(self, group: str) -> int:
        """See ``arbiter.fencing.Peer``."""
        return self._asked.of(group)

    def seen(self) -> bool:
        """See ``arbiter.fencing.Peer``."""
        return self._seen

    def alive(self) -> bool:
        """See ``arbiter.fencing.Peer``."""
        return self._membership.alive(now_ns())

    def has_same_arbiter(self) -> bool:
        """See ``arbiter.fencing.Peer``."""
        return not differing(self._membership)

    def heard_ns(self) -> int:
        """See ``arbiter.fencing.Peer``."""
        return self._membership.last_noticed_ns


class _Asked:
    """A file of epochs, one for each group."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writing = asyncio.Lock()
        self._epochs: dict[str, int] = {}
        try:
            self._epochs = {str(group): int(epoch) for group, epoch in json.loads(path.read_text()).items()}
        except FileNotFoundError:
            return
        except OSError as error:
            raise StartError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, AttributeError, TypeError) as error:
            raise StartError(f"{path} is damaged ({error}): remove it while the peer is running.") from None

    def of(self, group: str) -> int:
        """The epoch that was noted."""
        return self._epochs.get(group, 0)

    async def note(self, group: str, epoch: int) -> bool:
        """Make it durable, if it is new; false if that cannot be done."""
        async with self._writing:
            if self._epochs.get(group, 0) >= epoch:
                return True
            epochs = self._epochs | {group: epoch}
            try:
                await replace_file(self._path, json.dumps(epochs) + "\n")
            except OSError as error:
                log.warning("%s cannot be written: %s.", self._path, error.strerror)
                return False
            self._epochs = epochs
            return True
