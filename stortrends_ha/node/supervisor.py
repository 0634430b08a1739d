"""The supervisor of a node: the wiring of its parts, from start to stop.

Job: take the lock, exchange heartbeats with the peer, run one data process and one ``GroupRunner`` per group, serve
control and metrics, and on SIGTERM or SIGINT hand over what it owns and stop. It never touches volume data.
Invariants: everything that can be refused (lock, key, sockets) is refused before any data process is started; a
signal at any moment leads to an orderly stop; data processes end before the lock is given up. An exception that
nobody has caught ends the node at once: the peer takes over, which is better than a node that half works.
Neighbours: `groups` carries out the decisions of ``cluster``; `children` keeps a data process; `heartbeats` talks to
the peer; `status` and `metrics` say how things are; `control` is asked.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from stortrends_ha import __version__, logs
from stortrends_ha.arbiter.factory import AnyArbiter, make_arbiter
from stortrends_ha.arbiter.fencing import FencingArbiter, ManualArbiter
from stortrends_ha.boottime import now_ns
from stortrends_ha.cluster.answers import Granted, Refused, Unreachable
from stortrends_ha.cluster.membership import Membership
from stortrends_ha.config import Cluster, load, read_key, sections
from stortrends_ha.errors import ConfigError, StartError
from stortrends_ha.network.floating import floating_addresses
from stortrends_ha.network.network import Network
from stortrends_ha.node import control, lock, metrics
from stortrends_ha.node.agreement import AgreedArbiter, Agreement
from stortrends_ha.node.children import Child, Patience, View
from stortrends_ha.node.groups import STEP_S, GroupRunner, Wishes, leases
from stortrends_ha.node.heartbeats import Heartbeats, News, new_incarnation
from stortrends_ha.node.operator import Operator
from stortrends_ha.node.peer_access import PeerAccess
from stortrends_ha.node.records import Records
from stortrends_ha.node.repair import Repair
from stortrends_ha.node.status import NodeStatus, Ownership, node_status
from stortrends_ha.notify import notify
from stortrends_ha.record import Record

log = logging.getLogger(__name__)

DATA_PROCESS = (sys.executable, "-m", "stortrends_ha.dataplane")
PATIENCE = Patience()
# An orderly stop hands the node's groups over; what cannot be handed over by then is taken over by the peer.
HAND_OVER_S = 10.0


class Supervisor:
    """One node of a cluster."""

    def __init__(
        self,
        cluster: Cluster,
        config: Path,
        name: str,
        program: Sequence[str] = DATA_PROCESS,
        patience: Patience = PATIENCE,
    ) -> None:
        self._cluster = cluster
        self._config = config
        self._name = name
        self._program = program
        self._patience = patience
        self._started_s = time.monotonic()
        self._wishes = Wishes()
        self._children: list[Child] = []
        self._runners: dict[str, GroupRunner] = {}
        node, peer = cluster.nodes[name], cluster.peer_of(name)
        self._records = Records(node.state_dir)
        self._membership = Membership(
            cluster.name, name, peer.name, new_incarnation(), leases(cluster), now_ns(), len(node.heartbeat)
        )
        self._access = PeerAccess(self._membership, node.state_dir, lambda group: self._runners[group].core.record)
        self._network = Network(floating_addresses(cluster, name), self._may_hold)
        self._beats: Heartbeats | None = None
        self._arbiter: AnyArbiter | None = None
        self._agreement: Agreement | None = None

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; raises a `StorTrendsError` if that is not possible."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_die)
        stop_asked = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop_asked.set)
        serving = asyncio.create_task(self._serve())
        asked = asyncio.create_task(stop_asked.wait())
        await asyncio.wait({serving, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if not serving.done():
            log.info("Node %s is asked to stop.", self._name)
            notify("STOPPING=1")
            await self._hand_over()
            serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        log.info("Node %s has stopped.", self._name)

    async def _serve(self) -> None:
        node = self._cluster.nodes[self._name]
        key = read_key(self._cluster.key_file[self._name])
        async with contextlib.AsyncExitStack() as stack:
            lock_fd = await stack.enter_async_context(lock.hold(node.state_dir))
            self._wishes.draining = self._records.drained
            files = sections(self._cluster, key)
            self._agreement = Agreement(node.state_dir / "arbiter", self._membership, files)
            await self._agreement.begin()
            stack.push_async_callback(self._agreement.close)
            self._make_groups(lock_fd, self._agreement)
            self._arbiter = self._make_arbiter(key, self._agreement)
            stack.push_async_callback(self._arbiter.close)
            operator = Operator(self._name, self._cluster, self._runners, self._records, self._wishes, self._kick)
            repair = Repair(self._name, self._cluster, self._runners)
            commands = {"status": lambda _: self.status(), **operator.commands(), **repair.commands()}
            await stack.enter_async_context(control.serve(node.control, commands))
            collector = metrics.NodeCollector(self._cluster.name, self._name, self._views, self.status)
            stack.enter_context(metrics.serve(node.metrics, collector))
            await self._network.start()
            stack.push_async_callback(self._network.stop)
            log.info("Node %s of cluster %s, version %s, starts.", self._name, self._cluster.name, __version__)
            self._beats = self._heartbeats(key)
            self._access.heartbeats = await stack.enter_async_context(self._beats)
            stepping = asyncio.create_task(self._step_often())
            stack.callback(stepping.cancel)
            await self._keep_children()

    def _make_groups(self, lock_fd: int, agreement: Agreement) -> None:
        for name, group in self._cluster.groups.items():
            runner = GroupRunner(
                self._cluster,
                self._name,
                name,
                self._records.load(name, group.preferred_owner, self._cluster.nodes),
                membership=self._membership,
                agreement=agreement,
                records=self._records,
                wishes=self._wishes,
                network=self._network,
                changed=self._kick,
            )
            command = [*self._program, "--config", str(self._config), "--node", self._name, "--group", name]
            runner.child = Child(name, command, lock_fd, self._patience, runner)
            self._runners[name] = runner
            self._children.append(runner.child)

    def _make_arbiter(self, key: bytes, agreement: Agreement) -> AnyArbiter:
        arbiter = make_arbiter(
            self._cluster,
            self._name,
            key,
            peer=self._access,
            own_record=lambda group: self._runners[group].core.record,
            adopt=lambda group, record: self._runners[group].adopt(record),
        )
        for runner in self._runners.values():
            runner.arbiter = AgreedArbiter(arbiter, agreement)
        return arbiter

    def _heartbeats(self, key: bytes) -> Heartbeats:
        own, peer = self._cluster.nodes[self._name], self._cluster.peer_of(self._name)
        paths = list(zip(own.heartbeat, peer.heartbeat, strict=True))
        return Heartbeats(self._membership, key, paths, self._news, self._on_beat, self._on_ask)

    # --- Heartbeats ---------------------------------------------------------------------------

    def _news(self) -> News:
        self._membership.meets_nobody = isinstance(self._arbiter, FencingArbiter) and self._arbiter.fencing
        beats = [runner.beat() for runner in self._runners.values()]
        return News(beats, self._wishes.draining, self._wishes.stopping)

    def _on_beat(self, _path: int) -> None:
        self._access.note_beat()
        if self._agreement is not None:
            self._agreement.note_beat()
        for runner in self._runners.values():
            runner.step()

    async def _on_ask(self, group: str, old: Record, new: Record) -> Granted | Refused | Unreachable:
        """The peer proposes a change, where the records live on the two nodes."""
        if not isinstance(self._arbiter, FencingArbiter | ManualArbiter) or group not in self._runners:
            return Unreachable("this cluster has another arbiter")
        if self._agreement is None or not self._agreement.reached:
            return Unreachable("the arbiter is not agreed yet")
        return await self._arbiter.consider(group, old, new)

    def _kick(self) -> None:
        if self._beats:
            self._beats.kick()

    async def _step_often(self) -> None:
        while True:
            for runner in self._runners.values():
                runner.tick()
            await asyncio.sleep(STEP_S)

    def _may_hold(self, group: str) -> bool:
        return self._runners[group].core.may_hold_addresses(self._runners[group].view())

    # --- Data processes -----------------------------------------------------------------------

    async def _keep_children(self) -> None:
        """Run all data processes until cancelled, or until one of them cannot start."""
        runs = [asyncio.create_task(child.run()) for child in self._children]
        all_ready = asyncio.create_task(self._all_ready())
        try:
            await asyncio.wait({*runs, all_ready}, return_when=asyncio.FIRST_COMPLETED)
            if all_ready.done():
                log.info("Node %s is ready.", self._name)
                notify("READY=1")
                await asyncio.wait(runs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            all_ready.cancel()
            for child in self._children:
                child.stop()
            results = await asyncio.gather(*runs, return_exceptions=True)
            for runner in self._runners.values():
                await runner.stop()
        _raise_failures(results)

    async def _all_ready(self) -> None:
        for child in self._children:
            await child.ready.wait()

    async def _hand_over(self) -> None:
        """Before an orderly stop: what the peer can own goes to it, so that clients feel a planned move only."""
        self._wishes.stopping = True
        self._kick()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HAND_OVER_S):
                while any(runner.core.leaving(runner.view()) for runner in self._runners.values()):
                    await asyncio.sleep(STEP_S)

    # --- What others see ----------------------------------------------------------------------

    def _views(self) -> list[View]:
        return [child.view() for child in self._children]

    def status(self) -> NodeStatus:
        """What the control socket answers."""
        return node_status(
            self._cluster,
            self._name,
            time.monotonic() - self._started_s,
            self._views(),
            {name: Ownership.of(runner, self._network.problem(name)) for name, runner in self._runners.items()},
            wishes=self._wishes,
            membership=self._membership,
            paths=self._beats.paths() if self._beats else [],
        )


def _die(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Nobody has caught an exception: what this node knows may be wrong, so it ends, and its data processes with it."""
    loop.default_exception_handler(context)
    log.critical("This node ends at once: %s.", context.get("exception") or context.get("message"))
    logs.flush()
    os._exit(1)


def _raise_failures(results: Sequence[BaseException | None]) -> None:
    """Data processes that cannot start are the operator's to mend, all at once; anything else is a bug."""
    for result in results:
        if result is not None and not isinstance(result, StartError):
            raise result
    raise StartError("\n".join(str(result) for result in results if result is not None))


def _ask_for_real_time() -> None:
    """Be scheduled before ordinary processes: a machine that is merely busy must not look dead to the peer. What this
    process starts (data processes, threads that wait for a disk) does not inherit it."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError as error:
        log.warning("No real-time scheduling (%s): on a busy machine heartbeats may be late.", error.strerror)


def run(config: Path, name: str) -> None:
    """Be node `name` of the cluster that the file describes, until told to stop."""
    config = Path(os.path.abspath(config))
    cluster = load(config)
    if name not in cluster.nodes:
        raise ConfigError([f"{config} has no node {name!r}; its nodes are {' and '.join(cluster.nodes)}."])
    _ask_for_real_time()
    uvloop.run(Supervisor(cluster, config, name).run())
