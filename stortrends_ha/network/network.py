"""The floating addresses of a node, as its supervisor uses them.

Job: with the ownership of a group its addresses come here: added, announced to the neighbours, and made known to the
clients of the old owner; with the end of ownership they go.
Invariants: without floating addresses everything does nothing. An address that is not here, or perhaps no longer
ours, is never spoken for: each announcement asks again. They end before the address is removed. No call raises for a
reason that an operator can mend; `problem` says it. Per group there is one task that announces, with a fixed number of
rounds.
Neighbours: `addresses` has the addresses on this node; `announce` and `tickle` send.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stortrends_ha.network.addresses import Addresses
from stortrends_ha.network.announce import announce
from stortrends_ha.network.floating import FloatingAddress, NetworkError, Placed
from stortrends_ha.network.tickle import Endpoint, endpoints_of, tickle

log = logging.getLogger(__name__)

# When neighbours are told, counted from an address's arrival. Packets get lost, a switch may be learning, and an old
# owner that hangs answers for its address until the kernel has taken it off: the last are after that.
ANNOUNCE_AFTER_S = (0.0, 0.1, 0.3, 1.0, 2.0, 4.0)
# In the first rounds clients are told, too. Linux answers a wrong ACK twice a second at most.
TICKLE_ROUNDS = 4


def _always(_group: str) -> bool:
    return True


class Network:
    """The floating addresses of one node: `placed` is made by `floating_addresses`.

    `may_hold` says whether the group is surely still owned by this node (its lease holds, or it is alone in sync);
    while it is not, its addresses are not renewed and not announced, so that they expire. It must not block.
    """

    def __init__(self, placed: Placed, may_hold: Callable[[str], bool] = _always) -> None:
        self._placed = placed
        self._addresses = Addresses(placed, may_hold, self._came_up) if placed else None
        self._endpoints: dict[str, tuple[Endpoint, ...]] = {}
        self._telling: dict[str, asyncio.Task[None]] = {}
        self._untold: dict[str, str] = {}

    async def start(self) -> None:
        """Remove addresses that are left over on this node. Takes up to 3 s if one cannot be removed."""
        if self._addresses:
            await self._addresses.start()

    async def claim(self, group: str, endpoints: Iterable[Sequence[Any]] = ()) -> None:
        """Have the group's addresses here until `release`; returns when that has been tried once.

        `endpoints`: the clients of the old owner, (client_host, client_port, server_host, server_port) each.
        """
        if not self._addresses or group not in self._placed:
            return
        self._endpoints[group] = endpoints_of(endpoints)
        self.announce(group)  # if they are here already, for the new endpoints
        await self._addresses.claim(group)

    def announce(self, group: str) -> None:
        """Tell neighbours and clients again, as after a claim."""
        if self._addresses and group in self._placed and self._addresses.here(group):
            self._came_up(group)

    async def release(self, group: str) -> None:
        """Have none of them here; returns when they are gone. If one cannot be removed, `problem` says so then."""
        if not self._addresses or group not in self._placed:
            return
        await self._stop_telling(group)
        self._endpoints.pop(group, None)
        await self._addresses.release(group)
        await self._stop_telling(group)  # begun by a renewal that was under way

    async def stop(self) -> None:
        """Release every group, and do nothing any more."""
        if self._addresses:
            await asyncio.gather(*map(self.release, self._placed))
            await self._addresses.stop()

    def problem(self, group: str) -> str:
        """What keeps the group's addresses from being here and known; empty if nothing does."""
        if not self._addresses or group not in self._placed:
            return ""
        return " ".join(filter(None, (self._addresses.problem(group), self._untold.get(group))))

    def _came_up(self, group: str) -> None:
        if earlier := self._telling.get(group):
            earlier.cancel()
        self._telling[group] = asyncio.create_task(self._tell(group))

    async def _stop_telling(self, group: str) -> None:
        self._untold.pop(group, None)
        if task := self._telling.pop(group, None):
            task.cancel()
            await asyncio.wait({task})

    async def _tell(self, group: str) -> None:
        began_s = asyncio.get_running_loop().time()
        for attempt, after_s in enumerate(ANNOUNCE_AFTER_S):
            await asyncio.sleep(began_s + after_s - asyncio.get_running_loop().time())
            try:
                here = self._announce_once(group)
                if attempt < TICKLE_ROUNDS:
                    await self._tickle_once(group, here, attempt)
                self._untold.pop(group, None)
            except NetworkError as error:
                if str(error) != self._untold.get(group):
                    log.warning("Group %s: %s", group, error)
                self._untold[group] = str(error)

    def _announce_once(self, group: str) -> list[FloatingAddress]:
        assert self._addresses is not None
        here = self._addresses.here(group)
        for floating in here:
            announce(floating)
        return here

    async def _tickle_once(self, group: str, here: list[FloatingAddress], attempt: int) -> None:
        sent = await tickle(self._endpoints.get(group, ()), {floating.ip for floating in here}, attempt)
        if sent and not attempt:
            log.info("Group %s: %d clients of the old owner are told to reconnect.", group, sent)
