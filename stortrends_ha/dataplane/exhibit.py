"""The volumes of a secondary without a session, read-only over NBD, so that somebody can look into them.

Rule 10: both copies can be looked at before one of them is given up. Nothing of it is durable, and nobody waits for it.
It ends with the follower's role, with a session (which changes what is shown), or when nobody has asked for it to go on
for RENEWED_S, as whoever shows it may have been killed.
It is the ordinary server, on a primary of its own that is never given a change. Bounds: as the server's; one at a time.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

from stortrends_ha.config import Address
from stortrends_ha.errors import OrderError
from stortrends_ha.limits import INTENT_REGION_BYTES
from stortrends_ha.replication.block_map import BlockMap
from stortrends_ha.replication.differences import Differences, blocks_of
from stortrends_ha.replication.gate import FOREVER_NS, Gate
from stortrends_ha.replication.primary import Primary

from .export import ServerCounters, VolumeCounters, make_export
from .nbd_server import NbdServer
from .replica import Replica

log = logging.getLogger(__name__)

RENEWED_S = 10.0


class _NoFile:
    """Nothing is changed, so nothing has to be remembered."""

    def start_write(self, _pages: Mapping[int, bytes], *, durable: bool, done: Callable[[], None]) -> None:
        """See ``MapWriter``."""
        del durable
        done()


class Exhibit:
    """It is there from when it is made until ``end``."""

    def __init__(self, replica: Replica, epoch: int, address: Address) -> None:
        """Raises OrderError if that address cannot be listened on."""
        self.address = address
        self._group = replica.group.name
        limits, counters = replica.cluster.limits, ServerCounters()
        primary = Primary(
            replica.stores,
            [_no_differences(store.size_bytes) for store in replica.stores],
            epoch,
            alone=True,
            window_changes=limits.window_changes,
            window_bytes=limits.window_bytes,
            failed=replica.fail,
        )
        exports = {
            volume.name: make_export(index, volume, store, counters, VolumeCounters(), only_read=True)
            for index, (volume, store) in enumerate(zip(replica.group.volumes, replica.stores, strict=True))
        }
        self._server = NbdServer(exports, primary, Gate(0, FOREVER_NS), limits, counters, lambda: None)
        self._server.listen(address, None)
        if why := self._server.why:
            self._stop()
            raise OrderError(why)
        self.shown = True
        self._timer = asyncio.get_running_loop().call_later(RENEWED_S, self.end)
        log.info("group %s: what is here is shown, read-only, at %s", self._group, address)

    def renew(self) -> None:
        """Somebody wants it still."""
        self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(RENEWED_S, self.end)

    def end(self) -> None:
        """Close it, with all connections."""
        if not self.shown:
            return
        self.shown = False
        self._timer.cancel()
        self._stop()
        log.info("group %s: what is here is shown no more", self._group)

    def _stop(self) -> None:
        self._server.stop_listening()
        self._server.drop_clients()


def _no_differences(size_bytes: int) -> Differences:
    regions = blocks_of(size_bytes, INTENT_REGION_BYTES)
    return Differences(size_bytes, INTENT_REGION_BYTES, BlockMap(regions), BlockMap(regions), _NoFile(), _NoFile())
