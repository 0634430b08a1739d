"""Which floating addresses are on this node: each claimed one is put there again and again, for a moment at a time.

Invariants (rule 12): an address is on an interface only with a lifetime of LIFETIME_S, which the kernel counts; it is
renewed by a task of the supervisor's own event loop, so when the process is killed, stops or hangs, the kernel takes
the address off within LIFETIME_S (and a quarter second, the fuzz of its timer). A renewal that comes late is not made:
not by a worker thread that was stuck, and not by a process that was stopped and continued, unless `may_hold` says that
the group is still owned. (Stopped in the very instant of a renewal, it may still make that one: it expires, too.)
A group that is not claimed has none of its addresses here: what an earlier life left, or a person put there for good,
is removed at start and at each release. A claimed address that was put there for good becomes a temporary one, as
otherwise it would outlive its owner.
Nothing here raises for what an operator can mend: `problem` says it, and it is tried again when a renewal is due.
All requests to the kernel go through one worker thread, in order, so an address that is released while its renewal is
under way is gone afterwards, and the event loop never waits (rule 14). At most one request a group is queued (rule 15).
Death between steps: before the first renewal there is nothing, after it there is a lifetime.
Neighbours: `kernel` does it; `network` is told when addresses have come up, and tells others.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from stortrends_ha.network.floating import FloatingAddress, IPAddress, NetworkError, Placed

log = logging.getLogger(__name__)

T = TypeVar("T")

# Whole seconds is what the kernel counts in. One would leave a busy machine a third of a second to renew it.
LIFETIME_S = 2
RENEWALS_PER_LIFETIME = 3
# While ownership is not confirmed: how soon to look again.
UNCONFIRMED_RETRY_S = 0.05
# The kernel's timer may be this much late (ADDRCONF_TIMER_FUZZ); then even what could not be removed is gone.
EXPIRY_FUZZ_S = 0.5


@dataclass(slots=True, eq=False)
class _Address:
    floating: FloatingAddress
    until_s: float = 0.0  # time.monotonic(): it may be on its interface until then
    problem: str = ""


@dataclass(slots=True, eq=False)
class _Group:
    name: str
    addresses: list[_Address]
    problem: str = ""
    claimed: bool = False
    confirmed_until_s: float = 0.0  # time.monotonic(): whoever claims knows, so `may_hold` is not asked before
    task: asyncio.Task[None] | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Addresses:
    """The floating addresses of this node.

    `may_hold`: whether the group is surely still owned; asked on the event loop before each renewal, except in the
    first LIFETIME_S of a claim.
    `came_up`: told, on the event loop, of a group of which an address is there that was not, or can be reached again.
    """

    def __init__(self, placed: Placed, may_hold: Callable[[str], bool], came_up: Callable[[str], None]) -> None:
        self._groups = {name: _Group(name, list(map(_Address, placed[name]))) for name in placed}
        self._own = frozenset(floating.ip for addresses in placed.values() for floating in addresses)
        self._may_hold = may_hold
        self._came_up = came_up
        self._worker = ThreadPoolExecutor(1, "network")

    async def start(self) -> None:
        """Remove what is left over; returns as `release` does."""
        await self.release_all()

    async def claim(self, group: str) -> None:
        """Have the group's addresses here. Returns when that has been tried once; it is tried until `release`."""
        state = self._groups[group]
        async with state.lock:
            if not state.claimed:
                state.claimed = True
                state.confirmed_until_s = time.monotonic() + LIFETIME_S
                await self._switch(state, self._keep(state))

    async def release(self, group: str) -> None:
        """Have none of them here. Returns when they are gone; if one cannot be removed, when it must have expired."""
        state = self._groups[group]
        async with state.lock:
            state.claimed = False
            await self._switch(state, self._take_off(state))

    async def release_all(self) -> None:
        """Release every group."""
        await asyncio.gather(*map(self.release, self._groups))

    async def stop(self) -> None:
        """Release every group, and do nothing any more."""
        await self.release_all()
        for state in self._groups.values():
            await _end(state.task)
        self._worker.shutdown(wait=False, cancel_futures=True)

    def problem(self, group: str) -> str:
        """What keeps the group's addresses from being where they belong; empty if nothing does."""
        state = self._groups[group]
        return " ".join(dict.fromkeys(filter(None, [state.problem, *(address.problem for address in state.addresses)])))

    def here(self, group: str) -> list[FloatingAddress]:
        """Those of the group that are on this node now, and may be: what it may speak for."""
        state = self._groups[group]
        if not state.claimed or not self._is_confirmed(state):
            return []
        now_s = time.monotonic()
        return [address.floating for address in state.addresses if now_s < address.until_s]

    def _is_confirmed(self, state: _Group) -> bool:
        return time.monotonic() < state.confirmed_until_s or self._may_hold(state.name)

    async def _switch(self, state: _Group, work: Coroutine[Any, Any, None]) -> None:
        """From here on do this for the group; returns when it has got somewhere."""
        await _end(state.task)
        state.settled = asyncio.Event()
        state.task = asyncio.create_task(work)
        await state.settled.wait()

    async def _keep(self, state: _Group) -> None:
        while True:
            began_s = time.monotonic()
            if self._is_confirmed(state):
                self._say(state, "")
                await self._renew(state, began_s)
                again_s = began_s + LIFETIME_S / RENEWALS_PER_LIFETIME
            else:
                self._say(state, "Its addresses are not renewed, as it is not sure that this node owns it.")
                again_s = began_s + UNCONFIRMED_RETRY_S
            state.settled.set()
            await asyncio.sleep(again_s - time.monotonic())

    async def _renew(self, state: _Group, began_s: float) -> None:
        new = {address.floating for address in state.addresses if address.problem or address.until_s <= began_s}
        wanted = [address.floating for address in state.addresses]
        problems = await self._in_worker(lambda: _put_all(wanted, new, self._own, began_s))
        outcomes = zip(state.addresses, problems, strict=True)
        up = [_note(state, address, problem, address.floating in new) for address, problem in outcomes]
        for address in state.addresses:
            if not address.problem:
                address.until_s = began_s + LIFETIME_S
        if any(up):
            self._came_up(state.name)

    async def _take_off(self, state: _Group) -> None:
        expired_s = time.monotonic() + LIFETIME_S + EXPIRY_FUZZ_S
        for address in state.addresses:
            address.problem = ""
        ips = [address.floating.ip for address in state.addresses]
        while problem := await self._in_worker(lambda: _remove_all(state.name, ips)):
            self._say(state, problem)
            if time.monotonic() >= expired_s:
                state.settled.set()
            await asyncio.sleep(LIFETIME_S / RENEWALS_PER_LIFETIME)
        self._say(state, "")
        for address in state.addresses:
            address.until_s = 0.0
        state.settled.set()

    async def _in_worker(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def _say(self, state: _Group, problem: str) -> None:
        if problem and problem != state.problem:
            log.warning("Group %s: %s", state.name, problem)
        state.problem = problem


def _note(state: _Group, address: _Address, problem: str, is_new: bool) -> bool:
    """How a renewal went; whether the address has come up by it."""
    if problem and problem != address.problem:
        log.warning("Group %s: %s", state.name, problem)
    elif is_new and not problem:
        log.info("Group %s: %s is on %s.", state.name, address.floating, address.floating.interface)
    address.problem = problem
    return is_new and not problem


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait({task})


# --- In the worker thread; netlink is loaded there, and only if there are floating addresses ---


def _put_all(
    wanted: Iterable[FloatingAddress], new: set[FloatingAddress], own: frozenset[IPAddress], began_s: float
) -> list[str]:
    """Put the addresses on their interfaces; what the problem is with each."""
    return [_put(floating, floating in new, own, began_s) for floating in wanted]


def _put(floating: FloatingAddress, is_new: bool, own: frozenset[IPAddress], began_s: float) -> str:
    from stortrends_ha.network import kernel

    try:
        if time.monotonic() > began_s + LIFETIME_S:
            return f"{floating} was not renewed in time."
        if is_new:
            for stray in kernel.remove_strays(floating):
                log.warning("%s was on %s already, put there by something else.", floating, stray.interface)
        kernel.put(floating, LIFETIME_S, own)
        return kernel.link_problem(floating.interface)
    except NetworkError as error:
        return str(error)
    except Exception:
        log.exception("A bug: %s could not be put on %s.", floating, floating.interface)
        return f"{floating} could not be put on {floating.interface}: see the log."


def _remove_all(group: str, ips: Iterable[IPAddress]) -> str:
    """Take the addresses off, wherever they are; what the problem is."""
    from stortrends_ha.network import kernel

    try:
        for found in kernel.remove_all(frozenset(ips)):
            kind = ", put there for good by something else," if found.permanent else ""
            log.info("Group %s: %s%s has been removed from %s.", group, found.ip, kind, found.interface)
    except NetworkError as error:
        return str(error)
    except Exception:
        log.exception("A bug: addresses of group %s could not be removed.", group)
        return "Addresses could not be removed: see the log."
    return ""
