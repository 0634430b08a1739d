"""The status message of a data process: what every role says in the same words, and when it is sent.

A status is sent at once when something has changed that the supervisor acts on, else once a second. What is told is
held to: before a status that says ``joinable`` is sent, ``told`` is called (see ``replication.primary``, *locked*).
"""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from stortrends_ha.record import Record

from .replica import Replica

STATUS_S = 1.0
_LOOK_S = 0.1  # how often to look for what nobody tells: words, clients
Status = dict[str, Any]
_KEYS = (
    *("role", "epoch", "session", "joinable", "peer_unfit", "fit", "owner_lineage", "serving", "state", "why"),
    "endpoints",
)


def base(replica: Replica, record: Record | None) -> Status:
    """A status without a role: nothing is led or followed."""
    server, link = replica.server_counters, replica.link_counters
    return {
        "group": replica.group.name,
        "epoch": record.epoch if record else 0,
        "owner": record.owner if record else "",
        "in_sync": list(record.in_sync) if record else [],
        "role": "idle",
        "session": False,
        "joinable": False,
        "peer_unfit": "",
        "fit": replica.fit(),
        "owner_lineage": "",
        "serving": False,
        "cannot_listen": "",
        "endpoints": replica.endpoints,
        "state": "failed" if replica.failure else "idle",
        "why": replica.failure or "it has no role: its supervisor has not given it one",
        "link": link_status(replica, "idle", ""),
        "resync": None,
        "verify": replica.verify_status(),
        "comparison": None,
        "window": {"changes": 0, "bytes": 0, "oldest_ms": 0.0},
        "clients": 0,
        "counters": {
            **asdict(server),
            "connections_refused": server.connections_refused + link.refusals,
            "link_bad_input": link.bad_input,
            "link_sessions": link.sessions,
        },
        "volumes": {},
    }


def link_status(replica: Replica, state: str, address: str, why: str = "") -> Status:
    """The link, by default without a session."""
    return {
        "state": state,
        "peer": replica.peer.name,
        "address": address,
        "why": why,
        "round_trip_ms": None,
        "protocol": None,
        "peer_version": None,
    }


class Reporter:
    """Sends the status when it should be."""

    def __init__(
        self, status: Callable[[], Status], told: Callable[[Status], None], send: Callable[[Status], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._status = status
        self._told = told
        self._send = send
        self._last: tuple[Any, ...] = ()
        self._last_s = 0.0
        self._soon: asyncio.Handle | None = None
        self._timer = self._loop.call_soon(self._look)

    def changed(self) -> None:
        """Something may have changed: look at the end of this turn of the loop."""
        if self._soon is None:
            self._soon = self._loop.call_soon(self.now)

    def now(self) -> None:
        """Send it if it has changed, or if it is time."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        status = self._status()
        runs = [of and of["run"] for of in (status["verify"]["running"], status["verify"]["last"])]
        comparison = status["comparison"] and status["comparison"]["state"]
        key = (*(status[name] for name in _KEYS), status["link"]["state"], *runs, comparison)
        if key != self._last or self._loop.time() - self._last_s >= STATUS_S:
            self._last, self._last_s = key, self._loop.time()
            self._told(status)
            self._send(status)

    def _look(self) -> None:
        self.now()
        self._timer = self._loop.call_later(_LOOK_S, self._look)

    def stop(self) -> None:
        """Send nothing more."""
        self._timer.cancel()
        if self._soon is not None:
            self._soon.cancel()
