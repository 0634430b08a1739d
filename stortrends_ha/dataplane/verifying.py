"""An owner's verifies, one at a time: begins and ends them, keeps what came of them, tells how far one is.

The secondary passes on what it is asked (``Asking``), in a VERIFY frame, and is told the same as the own supervisor.

It begins only while both nodes are in sync, in session, with no resync under way, and ends with the session: nothing
waits for it. If this process dies, the verify is over; what it has found until then is on the disk of both nodes, in
``Findings``. When one came to its end is durable when it is told. Bounds: see ``replication.verify``.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from stortrends_ha.errors import ProtocolError
from stortrends_ha.limits import COMPARE_GRAIN_BYTES, LINK_FRAME_BYTES, MIB
from stortrends_ha.protocol import link as wire
from stortrends_ha.replication import verify
from stortrends_ha.replication.interfaces import Link
from stortrends_ha.replication.primary import Primary
from stortrends_ha.replication.verify import Repair

from . import commands
from .replica import Replica
from .throttle import Throttle

log = logging.getLogger(__name__)


Answer = Callable[[str], None]
Command = commands.Verify | commands.EndVerify


class Verifying:
    """Of one owner."""

    def __init__(
        self, replica: Replica, primary: Primary, throttle: Throttle, asked: Callable[[Command, Answer], None]
    ) -> None:
        """``asked``: what to do with a command of the secondary."""
        self._replica = replica
        self._primary = primary
        self._throttle = throttle
        self._asked = asked
        self._order = commands.Verify(0, "", (), False, "")  # the newest one
        self._told: tuple[Any, Any] | None = None
        primary.asked = self._hear

    def carry_out(self, command: Command, obstacle: str, answer: Answer) -> None:
        """``obstacle``: what keeps one from beginning, as far as it is known already, a clause. ``answer`` gets a
        sentence that says why it was not done, or nothing."""
        if isinstance(command, commands.Verify):
            answer(self._begin(command, obstacle))
        elif self._primary.verify is None:
            answer(f"No verify of group {self._replica.group.name} is under way.")
        else:
            self.stop("it was stopped")
            answer("")

    def _begin(self, order: commands.Verify, obstacle: str) -> str:
        names = [volume.name for volume in self._replica.group.volumes]
        if why := obstacle or self._obstacle(order, names):
            return f"Group {self._replica.group.name} cannot be verified now: {why}."
        self._order = order
        repair = (Repair.ALL if order.source else Repair.UNREADABLE) if order.repair else Repair.NOTHING
        volumes = [names.index(name) for name in order.volumes]
        log.info("group %s: a verify of %s begins", self._replica.group.name, ", ".join(order.volumes))
        begun = verify.Verify(
            self._primary,
            self._replica.stores,
            self._replica.differences,
            volumes,
            repair,
            self._replica.compared,
            lambda: self._ended(begun, order),
        )
        self._primary.begin_verify(begun)
        return ""

    def _obstacle(self, order: commands.Verify, names: list[str]) -> str:
        """Why not, a clause."""
        node, peer = self._replica.node, self._replica.peer.name
        if unknown := [name for name in order.volumes if name not in names]:
            return f"it has no volume {unknown[0]!r}; its volumes are {', '.join(names)}"
        if self._replica.failure:
            return self._replica.failure
        if self._primary.alone:
            return f"{peer} is not in sync; what it lacks is copied first"
        if self._primary.resync is not None or not self._primary.opened:
            return "a resync is under way; ask again when it has ended"
        if self._primary.verify is not None:
            stop = f"stortrends-ha verify {self._replica.group.name} --stop"
            return f"a verify is under way already; `stortrends-ha status` shows how far it is, `{stop}` ends it"
        if order.source not in ("", node, peer):
            return f"there is no node {order.source[:70]!r}; the nodes are {node} and {peer}"
        if order.source == peer:
            move = f"stortrends-ha group move {self._replica.group.name} --to {peer}"
            return f"only the owner's copy can be repaired from, as clients write to it: first `{move}`, then ask again"
        return ""

    def stop(self, why: str) -> None:
        """End the one that is under way, if there is one, as soon as nothing of it is."""
        if self._primary.verify is not None:
            self._primary.verify.stop(why)

    # --- What comes of it -----------------------------------------------------------------------

    def _ended(self, ended: verify.Verify, order: commands.Verify) -> None:
        replica, now_s = self._replica, time.time()
        names = [volume.name for volume in replica.group.volumes]
        if not ended.why:
            replica.verified(order.volumes, now_s)
        replica.last_verify = {
            **_named(order),
            "ended_s": now_s,
            "why": ended.why,
            "done_bytes": ended.done_bytes,
            "total_bytes": ended.total_bytes,
            "unreadable_bytes": ended.unreadable_bytes,
            "volumes": {
                names[volume]: {
                    "found_bytes": found.count * COMPARE_GRAIN_BYTES,
                    "found": verify.ranges_of(found),
                    "repaired_bytes": ended.repaired_bytes[volume],
                    "left_bytes": replica.findings[volume].nbytes,
                }
                for volume, found in ended.found.items()
            },
        }
        self._log(ended)
        self.tell(replica.verify_status())  # the session may be about to end

    def _log(self, ended: verify.Verify) -> None:
        found = sum(blocks.count for blocks in ended.found.values()) * COMPARE_GRAIN_BYTES
        repaired = sum(ended.repaired_bytes.values())
        log.log(
            logging.WARNING if found or ended.why else logging.INFO,
            "group %s: the verify has ended%s: of %.1f of %.1f MiB %.1f MiB differed%s, %.1f MiB were repaired",
            self._replica.group.name, f" early ({ended.why})" if ended.why else "", ended.done_bytes / MIB,
            ended.total_bytes / MIB, found / MIB,
            f" ({ended.unreadable_bytes / MIB:.1f} MiB cannot be read on {self._replica.peer.name})"
            if ended.unreadable_bytes else "", repaired / MIB,
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """What is known from verifies, and how far the one is that is under way."""
        running = self._primary.verify
        progress = self._throttle.status(running)
        if running is None or progress is None:
            return self._replica.verify_status()
        found = sum(blocks.count for blocks in running.found.values()) * COMPARE_GRAIN_BYTES
        return self._replica.verify_status() | {"running": {**_named(self._order), **progress, "found_bytes": found}}

    # --- The secondary --------------------------------------------------------------------------

    def _hear(self, payload: bytes) -> None:
        """Raises ProtocolError."""
        command = commands.parse(payload)
        if not isinstance(command, Command):
            raise ProtocolError("a VERIFY frame that asks for something else")

        def answer(error: str) -> None:
            self._primary.tell_of_verify(json.dumps({"id": command.number, "error": error}).encode())

        self._asked(command, answer)

    def tell(self, status: dict[str, Any]) -> None:
        """Tell the secondary what has changed since this was done last, in this session."""
        told = (status["running"], status["last"]) if self._primary.connected else None
        if told is not None and told not in (self._told, (None, None)):
            self._primary.tell_of_verify(_fitting(*told))
        self._told = told


class Asking:
    """The secondary's end: passes on what it is asked, and knows what the owner says. Bound: ASKED at a time."""

    ASKED = 64

    def __init__(self, replica: Replica, changed: Callable[[], None]) -> None:
        self._replica = replica
        self._changed = changed
        self._answers: dict[int, Answer] = {}
        self._running: dict[str, Any] | None = None

    def ask(self, command: Command, link: Link | None, epoch: int, answer: Answer) -> None:
        """Ask the owner."""
        if link is None or len(self._answers) >= self.ASKED:
            group, peer = self._replica.group.name, self._replica.peer.name
            answer(f"Group {group} cannot be verified now: {peer} owns it, and there is no link to it.")
            return
        self._answers[command.number] = answer
        message = wire.frame(wire.Kind.VERIFY, epoch, payload=commands.encode(command))
        link.send([message], len(message))

    def hear(self, payload: bytes) -> None:
        """The owner says something. Raises ProtocolError."""
        said = wire.decode_object(payload)
        if "id" in said:
            if (answer := self._answers.pop(_shaped(said, _ANSWER)["id"], None)) is not None:
                answer(said["error"])
            return
        running, last = said.get("running"), said.get("last")
        self._running = running and _shaped(running, _RUNNING)
        if last and _ended(last) != self._replica.last_verify:
            last = _ended(last)
            self._replica.last_verify = last
            if not last["why"]:
                own = [volume.name for volume in self._replica.group.volumes if volume.name in last["volumes"]]
                self._replica.verified(own, last["ended_s"])
        self._changed()

    def lost(self) -> None:
        """The session has ended."""
        self._running = None
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            answer(f"The link of group {self._replica.group.name} broke while its owner was asked: ask again.")

    def status(self) -> dict[str, Any]:
        """What is known from verifies."""
        return self._replica.verify_status() | {"running": self._running}


def _fitting(running: dict[str, Any] | None, last: dict[str, Any] | None) -> bytes:
    """As a frame holds it: without ranges if they are too many; the owner has them."""
    payload = json.dumps({"running": running, "last": last}).encode()
    if len(payload) > LINK_FRAME_BYTES and last is not None:
        volumes = {name: {**of, "found": []} for name, of in last["volumes"].items()}
        payload = json.dumps({"running": running, "last": {**last, "volumes": volumes}}).encode()
    return payload


_NAMED: dict[str, type] = {"run": str, "repair": bool, "source": str, "done_bytes": int, "total_bytes": int, "why": str}
_RUNNING = {**_NAMED, "copied_bytes": int, "rate": float, "found_bytes": int}
_ENDED = {**_NAMED, "ended_s": float, "unreadable_bytes": int, "volumes": dict}
_OUTCOME = {"found_bytes": int, "found": list, "repaired_bytes": int, "left_bytes": int}
_ANSWER = {"id": int, "error": str}


def _shaped(value: Any, shape: Mapping[str, type]) -> dict[str, Any]:
    """These keys of an object that the peer has sent. Raises ProtocolError."""
    if not isinstance(value, dict) or any(type(value.get(key)) is not kind for key, kind in shape.items()):
        raise ProtocolError("a VERIFY frame that does not say what it should")
    return {key: value[key] for key in shape}


def _ended(value: Any) -> dict[str, Any]:
    """What became of a verify, as the peer has sent it. Raises ProtocolError."""
    last = _shaped(value, _ENDED)
    volumes = {name: _shaped(of, _OUTCOME) for name, of in last["volumes"].items()}
    for of in volumes.values():
        if not all(isinstance(each, list) and [*map(type, each)] == [int, int] for each in of["found"]):
            raise ProtocolError("a VERIFY frame with ranges that are none")
    return {**last, "volumes": volumes}


def _named(order: commands.Verify) -> dict[str, Any]:
    return {"run": order.run, "repair": order.repair, "source": order.source}
