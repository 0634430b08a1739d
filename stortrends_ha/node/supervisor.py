"""The supervisor of a node: the wiring of its parts, from start to stop.

Job: take the lock, serve control and metrics, keep one data process per group running, stop on SIGTERM or
SIGINT. It never touches volume data.
Invariants: everything that can be refused (lock, sockets) is refused before any data process is started; a
signal at any moment leads to an orderly stop; data processes end before the lock is given up.
Neighbours: `children` keeps one data process; `status` and `metrics` say how things are; `control` is asked.
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

import uvloop

from stortrends_ha import __version__
from stortrends_ha.config import Cluster, load
from stortrends_ha.errors import ConfigError, StartError
from stortrends_ha.node import control, lock, metrics
from stortrends_ha.node.children import Child, Patience, View
from stortrends_ha.node.notify import notify
from stortrends_ha.node.status import NodeStatus, node_status

log = logging.getLogger(__name__)

DATA_PROCESS = (sys.executable, "-m", "stortrends_ha.dataplane")
PATIENCE = Patience()


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
        self._children: list[Child] = []

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; raises a `StorTrendsError` if that is not possible."""
        stop_asked = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop_asked.set)
        serving = asyncio.create_task(self._serve())
        asked = asyncio.create_task(stop_asked.wait())
        await asyncio.wait({serving, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if not serving.done():
            log.info("Node %s is asked to stop.", self._name)
            notify("STOPPING=1")
            serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        log.info("Node %s has stopped.", self._name)

    async def _serve(self) -> None:
        node = self._cluster.nodes[self._name]
        async with contextlib.AsyncExitStack() as stack:
            lock_fd = await stack.enter_async_context(lock.hold(node.state_dir))
            self._children = [self._child(group, lock_fd) for group in self._cluster.groups]
            await stack.enter_async_context(control.serve(node.control, {"status": self.status}))
            collector = metrics.NodeCollector(self._cluster.name, self._name, self._views)
            stack.enter_context(metrics.serve(node.metrics, collector))
            log.info("Node %s of cluster %s, version %s, starts.", self._name, self._cluster.name, __version__)
            await self._keep_children()

    def _child(self, group: str, lock_fd: int) -> Child:
        command = [*self._program, "--config", str(self._config), "--node", self._name, "--group", group]
        return Child(group, command, lock_fd, self._patience)

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
        _raise_failures(results)

    async def _all_ready(self) -> None:
        for child in self._children:
            await child.ready.wait()

    def _views(self) -> list[View]:
        return [child.view() for child in self._children]

    def status(self) -> NodeStatus:
        """What the control socket answers."""
        return node_status(self._cluster, self._name, time.monotonic() - self._started_s, self._views())


def _raise_failures(results: Sequence[BaseException | None]) -> None:
    """Data processes that cannot start are the operator's to mend, all at once; anything else is a bug."""
    for result in results:
        if result is not None and not isinstance(result, StartError):
            raise result
    raise StartError("\n".join(str(result) for result in results if result is not None))


def run(config: Path, name: str) -> None:
    """Be node `name` of the cluster that the file describes, until told to stop."""
    config = Path(os.path.abspath(config))
    cluster = load(config)
    if name not in cluster.nodes:
        raise ConfigError([f"{config} has no node {name!r}; its nodes are {' and '.join(cluster.nodes)}."])
    uvloop.run(Supervisor(cluster, config, name).run())
