"""The node's Prometheus metrics, made at each scrape from the newest reports of the data processes.

Job: the table of metrics, the collector that reads it, and the HTTP server.
Invariants: a scrape reads what is in memory and asks nobody; a group whose data process has not reported has
no values except those that the supervisor itself knows. `docs/metrics.md` describes exactly this table.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from stortrends_ha import __version__
from stortrends_ha.config import Address
from stortrends_ha.errors import StartError
from stortrends_ha.node.children import View
from stortrends_ha.node.messages import STATES, Status, VolumeStatus, VolumeVerified
from stortrends_ha.node.status import GroupView, HeartbeatPath, NodeStatus

log = logging.getLogger(__name__)

PREFIX = "stortrends_ha_"
MOVES = ("takeover", "handover", "override")
Kind = Literal["gauge", "counter"]
Sample = tuple[tuple[str, ...], float | None]


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric: its name without the prefix, and how to read it from a group's view."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    text: str
    samples: Callable[[View], Iterable[Sample]]


def _known(name: str, kind: Kind, text: str, value: Callable[[View], float | None]) -> Definition:
    """What the supervisor knows of a group, even while its data process is away."""
    return Definition(name, kind, ("group",), text, lambda view: [((view.group,), value(view))])


def _group(name: str, kind: Kind, text: str, value: Callable[[Status], float | None]) -> Definition:
    def samples(view: View) -> Iterator[Sample]:
        if view.status:
            yield (view.group,), value(view.status)

    return Definition(name, kind, ("group",), text, samples)


def _link(name: str, text: str, value: Callable[[Status], float | None]) -> Definition:
    def samples(view: View) -> Iterator[Sample]:
        if view.status:
            yield (view.group, view.status["link"]["peer"]), value(view.status)

    return Definition(name, "gauge", ("group", "peer"), text, samples)


def _volume(name: str, kind: Kind, text: str, value: Callable[[VolumeStatus], float]) -> Definition:
    def samples(view: View) -> Iterator[Sample]:
        for volume, status in view.status["volumes"].items() if view.status else ():
            yield (view.group, volume), value(status)

    return Definition(name, kind, ("group", "volume"), text, samples)


def _verified(name: str, text: str, value: Callable[[VolumeVerified], float | None]) -> Definition:
    def samples(view: View) -> Iterator[Sample]:
        for volume, known in view.status["verify"]["volumes"].items() if view.status else ():
            yield (view.group, volume), value(known)

    return Definition(name, "gauge", ("group", "volume"), text, samples)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


DEFINITIONS: tuple[Definition, ...] = (
    _known("data_process_up", "gauge", "1 while the group's data process runs.",
           lambda view: view.pid is not None),
    _known("data_process_restarts", "counter", "Times the data process ended and was started again.",
           lambda view: view.restarts),
    _known("data_process_bad_messages", "counter", "Messages of the data process that were not understood.",
           lambda view: view.bad_messages),
    _known("data_process_report_age_seconds", "gauge", "Age of the data process's newest report.",
           lambda view: view.report_age_s if view.status else None),
    _group("group_primary", "gauge", "1 where this node is the group's primary, 0 where it is the secondary.",
           lambda status: status["role"] == "primary"),
    _group("group_clients", "gauge", "NBD clients that are connected.", lambda status: status["clients"]),
    _link("link_connected", "1 while the replication link is connected.",
          lambda status: status["link"]["state"] == "connected"),
    _link("link_round_trip_seconds", "Time from a heartbeat to its answer on the link.",
          lambda status: _seconds(status["link"]["round_trip_ms"])),
    _group("resync_done_bytes", "gauge", "Bytes of the running resync that are done; absent without one.",
           lambda status: status["resync"] and status["resync"]["done_bytes"]),
    _group("resync_total_bytes", "gauge", "Bytes of the running resync in all; absent without one.",
           lambda status: status["resync"] and status["resync"]["total_bytes"]),
    _group("resync_remaining_bytes", "gauge", "Bytes of the running resync that are left; 0 without one.",
           lambda status: status["resync"]["total_bytes"] - status["resync"]["done_bytes"] if status["resync"] else 0),
    _group("resync_copied_bytes", "gauge", "Bytes that the running resync had to copy; absent without one.",
           lambda status: status["resync"] and status["resync"]["copied_bytes"]),
    _group("resync_bytes_per_second", "gauge", "Rate of the running resync over the last seconds; 0 without one.",
           lambda status: status["resync"]["rate"] if status["resync"] else 0),
    _group("verify_done_bytes", "gauge", "Bytes of the running verify that are done; absent without one.",
           lambda status: status["verify"]["running"] and status["verify"]["running"]["done_bytes"]),
    _group("verify_total_bytes", "gauge", "Bytes of the running verify in all; absent without one.",
           lambda status: status["verify"]["running"] and status["verify"]["running"]["total_bytes"]),
    _verified("volume_verified_timestamp_seconds",
              "When a verify of the volume came to its end last, as far as this node knows; absent before.",
              lambda volume: volume["verified_s"]),
    _verified("volume_differing_bytes", "Bytes that a verify found to differ, and none found equal since.",
              lambda volume: volume["differing_bytes"]),
    _group("window_changes", "gauge", "Changes that the peer has not answered yet.",
           lambda status: status["window"]["changes"]),
    _group("window_bytes", "gauge", "Bytes of those changes.", lambda status: status["window"]["bytes"]),
    _group("window_oldest_seconds", "gauge", "Age of the oldest of those changes.",
           lambda status: _seconds(status["window"]["oldest_ms"])),
    _group("connections_accepted", "counter", "NBD connections accepted.",
           lambda status: status["counters"]["connections_accepted"]),
    _group("connections_refused", "counter", "NBD connections refused because of a limit.",
           lambda status: status["counters"]["connections_refused"]),
    _group("nbd_bad_input", "counter", "NBD connections closed because of input that breaks the protocol.",
           lambda status: status["counters"]["nbd_bad_input"]),
    _group("link_bad_input", "counter", "Link connections closed because of input that breaks the protocol.",
           lambda status: status["counters"]["link_bad_input"]),
    _group("link_sessions", "counter", "Link sessions opened.",
           lambda status: status["counters"]["link_sessions"]),
    _group("disk_errors", "counter", "Failed reads, writes and flushes of backing files.",
           lambda status: status["counters"]["disk_errors"]),
    _volume("volume_size_bytes", "gauge", "Size of the volume.", lambda volume: volume["size_bytes"]),
    _volume("volume_in_flight", "gauge", "Requests that are not answered yet.",
            lambda volume: volume["in_flight"]),
    _volume("volume_intent_regions", "gauge", "Regions of 4 MiB in the intent log: what is compared after a crash.",
            lambda volume: volume["intent_regions"]),
    _volume("volume_dirty_bytes", "gauge", "Bytes that the peer is known to lack.",
            lambda volume: volume["dirty_bytes"]),
    _volume("volume_reads", "counter", "Reads.", lambda volume: volume["counters"]["reads"]),
    _volume("volume_read_bytes", "counter", "Bytes read.", lambda volume: volume["counters"]["read_bytes"]),
    _volume("volume_writes", "counter", "Writes.", lambda volume: volume["counters"]["writes"]),
    _volume("volume_written_bytes", "counter", "Bytes written.",
            lambda volume: volume["counters"]["written_bytes"]),
    _volume("volume_flushes", "counter", "Flushes.", lambda volume: volume["counters"]["flushes"]),
    _volume("volume_trims", "counter", "Trims.", lambda volume: volume["counters"]["trims"]),
    _volume("volume_zeroes", "counter", "Writes of zeroes.", lambda volume: volume["counters"]["zeroes"]),
    _volume("volume_errors", "counter", "Requests answered with an error.",
            lambda volume: volume["counters"]["errors"]),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NodeDefinition:
    """One metric of what the node decides: its name without the prefix, and how to read it from the node's status."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    text: str
    samples: Callable[[NodeStatus], Iterable[Sample]]


def _owned(name: str, kind: Kind, text: str, value: Callable[[GroupView], float | None]) -> NodeDefinition:
    def samples(status: NodeStatus) -> Iterator[Sample]:
        for group, view in status["groups"].items():
            yield (group,), value(view)

    return NodeDefinition(name, kind, ("group",), text, samples)


def _states(status: NodeStatus) -> Iterator[Sample]:
    for group, view in status["groups"].items():
        for state in STATES:
            yield (group, state), float(state == view["state"])


def _moves(status: NodeStatus) -> Iterator[Sample]:
    for group, view in status["groups"].items():
        for kind in MOVES:
            yield (group, kind), view["moves"].get(kind, 0)


def _path(name: str, kind: Kind, text: str, value: Callable[[HeartbeatPath], float]) -> NodeDefinition:
    def samples(status: NodeStatus) -> Iterator[Sample]:
        for path in status["heartbeats"]:
            yield (path["own"], path["peer"]), value(path)

    return NodeDefinition(name, kind, ("own", "peer"), text, samples)


NODE_DEFINITIONS: tuple[NodeDefinition, ...] = (
    NodeDefinition("peer_up", "gauge", ("peer",), "1 while the peer's heartbeat is heard on any path.",
                   lambda status: [((node,), state["state"] == "up") for node, state in status["nodes"].items()
                                   if node != status["node"]]),
    NodeDefinition("node_drained", "gauge", ("node",), "1 while the operator keeps groups away from the node.",
                   lambda status: [((node,), state["drained"]) for node, state in status["nodes"].items()]),
    _path("heartbeat_silent_seconds", "gauge", "Time since the peer was heard on this path.",
          lambda path: path["silent_s"]),
    _path("heartbeats_sent", "counter", "Heartbeats sent on this path.", lambda path: path["sent"]),
    _path("heartbeats_received", "counter", "Heartbeats of the peer received on this path.",
          lambda path: path["received"]),
    _path("heartbeats_dropped", "counter", "Datagrams dropped on this path: forged, replayed, reordered or foreign.",
          lambda path: path["dropped"]),
    NodeDefinition("group_state", "gauge", ("group", "state"),
                   "1 for the state the group is in on this node, 0 for the others.", _states),
    _owned("group_epoch", "gauge", "Epoch of the newest record of the group that this node has.",
           lambda view: view["epoch"]),
    _owned("group_in_sync_nodes", "gauge", "Nodes that hold every acknowledged write, by that record.",
           lambda view: len(view["in_sync"])),
    _owned("group_owned", "gauge", "1 where this node owns the group, by the newest record that it has.",
           lambda view: view["phase"] in ("leading", "releasing", "handing")),
    _owned("group_serving", "gauge", "1 where clients of the group are answered.", lambda view: view["serving"]),
    _owned("group_arbiter_waiting", "gauge", "1 while the arbiter does not answer a question about the group.",
           lambda view: bool(view["arbiter"])),
    NodeDefinition("group_moves", "counter", ("group", "kind"),
                   "Changes of who serves the group that this node has seen to their end.", _moves),
    _owned("group_last_move_seconds", "gauge", "For how long clients were held by the newest of them; absent before.",
           lambda view: view["last_move"]["duration_ms"] / 1000 if view["last_move"] else None),
)  # fmt: skip


class NodeCollector(Collector):
    """Makes the metrics of a node from the views of its data processes, and from its status."""

    def __init__(
        self, cluster: str, node: str, views: Callable[[], Sequence[View]], status: Callable[[], NodeStatus]
    ) -> None:
        self._identity = (cluster, node, __version__)
        self._views = views
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Every metric of the table, and the node's identity; called by the HTTP server's threads."""
        identity = GaugeMetricFamily(
            f"{PREFIX}node_info", "Always 1: what this node is.", labels=("cluster", "node", "version")
        )
        identity.add_metric(self._identity, 1)
        yield identity
        views = self._views()
        for definition in DEFINITIONS:
            yield _family(definition, [sample for view in views for sample in definition.samples(view)])
        status = self._status()
        for of_node in NODE_DEFINITIONS:
            yield _family(of_node, of_node.samples(status))


def _family(definition: Definition | NodeDefinition, samples: Iterable[Sample]) -> Metric:
    family_of = GaugeMetricFamily if definition.kind == "gauge" else CounterMetricFamily
    family = family_of(PREFIX + definition.name, definition.text, labels=definition.labels)
    for labels, value in samples:
        if value is not None:
            family.add_metric(labels, value)
    return family


def _client_has_gone(_request: object, client_address: object) -> None:
    """Called within the exception that ended a connection, of which the server would print a traceback."""
    log.debug("A connection to the metrics from %s has ended: %r", client_address, sys.exc_info()[1])


@contextlib.contextmanager
def serve(address: Address, collector: Collector) -> Iterator[None]:
    """Serve the metrics over HTTP at `address`."""
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = prometheus_client.start_http_server(address.port, address.host, registry)
    except OSError as error:
        what_to_do = "stop what uses it, or change it in the configuration"
        raise StartError(f"The metrics cannot be served at {address}: {error.strerror}; {what_to_do}.") from error
    server.handle_error = _client_has_gone  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
