"""The node's status and metrics: complete at every moment, and the same in the documents."""

import re
import socket
import struct
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stortrends_ha.boottime import now_ns
from stortrends_ha.cluster.lease import Timing
from stortrends_ha.cluster.membership import Membership
from stortrends_ha.config import Address, Cluster, Group, Node, Volume
from stortrends_ha.errors import StartError
from stortrends_ha.node import metrics
from stortrends_ha.node.children import View
from stortrends_ha.node.groups import Wishes
from stortrends_ha.node.heartbeats import PathView
from stortrends_ha.node.messages import Status, VolumeCounters
from stortrends_ha.node.rates import Rates
from stortrends_ha.node.status import GroupView, NodeStatus, Ownership, VolumeView, group_view, node_status
from stortrends_ha.record import Record

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
MIB = 1 << 20


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    nodes = {
        name: Node(name, f"10.0.0.{number}", tmp_path / name, Address("127.0.0.1", 9810 + number))
        for number, name in enumerate(("node-a", "node-b"), start=1)
    }
    volume = Volume("vm-a", {name: tmp_path / f"{name}.img" for name in nodes}, 1 << 30)
    ports = {"node-a": 7801, "node-b": 7802}
    group = Group("rg-a", "node-a", Address("10.0.0.9", 10809), {}, ports, (volume,))
    return Cluster("test", nodes, {"rg-a": group})


def view(status: Status | None = None, **changes: Any) -> View:
    values: dict[str, Any] = {
        "group": "rg-a",
        "status": status,
        "report_age_s": 0.1,
        "state": status["state"] if status else "starting",
        "why": status["why"] if status else "its data process is being started",
        "pid": 7,
        "restarts": 0,
        "bad_messages": 0,
        "rates": {},
    }
    return View(**values | changes)


def ownership(cluster: Cluster, **changes: Any) -> Ownership:
    """What the node decides while all is well, changed."""
    record = Record(2, "node-a", tuple(cluster.nodes))
    values: dict[str, Any] = {
        "record": record,
        "phase": "leading",
        "state": None,
        "why": "",
        "waits_for": "",
        "moves": {"takeover": 1},
        "last_move": {"kind": "takeover", "duration_ms": 1650.0, "ago_s": 3.0},
        "addresses": "",
    }
    return Ownership(**values | changes)


def status_of(cluster: Cluster, *views: View, heard: bool | None = None, **changes: Any) -> NodeStatus:
    """The node's status; `heard`: whether the peer is heard now, or has been; None: never."""
    life = Membership("test", "node-a", "node-b", 1, Timing(), now_ns())
    if heard is not None:
        peer = Membership("test", "node-b", "node-a", 2, Timing(), now_ns())
        at_ns = now_ns() - (0 if heard else 5_000_000_000)
        for _ in range(3):
            peer.heard(life.compose(at_ns), 0, at_ns)
            life.heard(peer.compose(at_ns), 0, at_ns)
    path = PathView(Address("10.0.0.1", 7800), Address("10.0.0.2", 7800), "", "", 9, 0, 1, 8, 0, 2, 0, 0, 0.05)
    owned = {each.group: ownership(cluster, **changes) for each in views}
    return node_status(cluster, "node-a", 1.0, views, owned, wishes=Wishes(), membership=life, paths=[path])


def collector(cluster: Cluster, views: Sequence[View]) -> metrics.NodeCollector:
    return metrics.NodeCollector("test", "node-a", lambda: views, lambda: status_of(cluster, *views))


def reported(cluster: Cluster, **changes: Any) -> Status:
    """A complete status message: what a node says before the first one, changed."""
    status = cast(dict[str, Any], group_view(cluster, "node-a", view(), ownership(cluster)))
    return cast(Status, status | {"state": "in-sync", "why": "", "in_sync": ["node-a", "node-b"], **changes})


def with_link(status: GroupView | Status, **changes: Any) -> Mapping[str, Any]:
    return {**status["link"], **changes}


def test_before_the_first_report_the_status_has_every_group_and_volume_and_says_why(cluster: Cluster) -> None:
    status = status_of(cluster, view())
    group = status["groups"]["rg-a"]
    assert (group["state"], group["why"]) == ("starting", "its data process is being started")
    assert (group["role"], group["owner"], group["link"]["address"]) == ("idle", "node-a", "10.0.0.2:7802")
    assert cast(VolumeView, group["volumes"]["vm-a"])["uri"] == "nbd://10.0.0.9:10809/vm-a"
    assert group["volumes"]["vm-a"]["size_bytes"] == 1 << 30
    assert status["nodes"]["node-a"]["state"] == "up"
    assert status["nodes"]["node-b"]["state"] == "unknown"


@pytest.mark.parametrize(("heard", "peer"), [(True, "up"), (False, "not answering")])
def test_the_peer_is_up_when_its_heartbeat_is_heard(cluster: Cluster, heard: bool, peer: str) -> None:
    assert status_of(cluster, view(reported(cluster)), heard=heard)["nodes"]["node-b"]["state"] == peer


def test_a_secondary_that_reports_no_volumes_still_shows_them(cluster: Cluster) -> None:
    status = view(reported(cluster, role="secondary", volumes={}))
    assert list(group_view(cluster, "node-b", status, ownership(cluster))["volumes"]) == ["vm-a"]


def test_a_data_process_that_fell_silent_is_named_in_why(cluster: Cluster) -> None:
    silent = view(reported(cluster, why="writes are held"), report_age_s=7.2)
    why = group_view(cluster, "node-a", silent, ownership(cluster))["why"]
    assert why == "its data process (pid 7) has not reported for 7 s; its last word was: writes are held"


def test_what_the_node_decides_stands_above_what_its_data_process_says(cluster: Cluster) -> None:
    decided = ownership(cluster, state="held", why="going on alone must be granted")
    group = group_view(cluster, "node-a", view(reported(cluster, epoch=1)), decided)
    assert (group["state"], group["why"], group["epoch"]) == ("held", "going on alone must be granted", 2)


def test_rates_are_measured_over_the_last_seconds(cluster: Cluster) -> None:
    rates = Rates()
    for second in range(5):
        rates.add(float(second), _written(cluster, writes=100 * second, written_bytes=second * 3 * MIB))
        rates.add(second + 0.01, _written(cluster, writes=100 * second + 1, written_bytes=second * 3 * MIB))
    assert rates.rates()["vm-a"]["write_iops"] == pytest.approx(100, rel=0.02)
    assert rates.rates()["vm-a"]["write_mib_s"] == pytest.approx(3, rel=0.02)
    assert rates.rates()["vm-a"]["read_iops"] == 0


def test_many_reports_in_one_moment_make_no_rate_and_take_no_memory(cluster: Cluster) -> None:
    rates = Rates()
    for number in range(10_000):
        rates.add(number / 1e6, _written(cluster, writes=number))
    assert rates.rates() == {}
    assert len(rates._samples) <= 2


def _written(cluster: Cluster, **counters: int) -> Status:
    status = reported(cluster)
    volume = status["volumes"]["vm-a"]
    new = cast(VolumeCounters, volume["counters"] | counters)
    return cast(Status, {**status, "volumes": {"vm-a": {**volume, "counters": new}}})


def full(cluster: Cluster) -> View:
    """A view from which every metric has a value."""
    status = reported(cluster)
    link = with_link(status, state="connected", round_trip_ms=0.25)
    progress = {"done_bytes": 1, "total_bytes": 2, "copied_bytes": 1, "rate": 0.5, "why": ""}
    known = {"vm-a": {"verified_s": 1.7e9, "differing_bytes": 0, "ranges": []}}
    verify = {"running": {**progress, "run": "1f"}, "last": None, "volumes": known}
    return view(reported(cluster, link=link, resync=progress, verify=verify))


def test_the_document_describes_every_metric_and_no_other(cluster: Cluster) -> None:
    documented = set()
    for name, kind, labels in re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \|", DOCUMENT.read_text(), re.MULTILINE):
        documented.add((name, kind, tuple(re.findall(r"`(\w+)`", labels))))
    collected = {
        (sample.name, family.type, tuple(sample.labels))
        for family in collector(cluster, [full(cluster)]).collect()
        for sample in family.samples
    }
    assert documented == collected


def test_every_name_in_the_document_exists() -> None:
    text = DOCUMENT.read_text()
    table = set(re.findall(r"^\| `(stortrends_ha_\w+)`", text, re.MULTILINE))
    assert set(re.findall(r"stortrends_ha_\w+", text)) == table


def scrape(port: int) -> dict[tuple[str, str], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_scrape_has_the_newest_reports(cluster: Cluster) -> None:
    port = free_port()
    views = [full(cluster)]
    with metrics.serve(Address("127.0.0.1", port), collector(cluster, views)):
        found = scrape(port)
        assert found["stortrends_ha_group_state", "rg-a,in-sync"] == 1
        assert found["stortrends_ha_group_state", "rg-a,held"] == 0
        assert found["stortrends_ha_link_round_trip_seconds", "rg-a,node-b"] == 0.00025
        assert found["stortrends_ha_volume_size_bytes", "rg-a,vm-a"] == 1 << 30
        views[0] = view(None, pid=None, restarts=3)
        found = scrape(port)
        assert found["stortrends_ha_data_process_restarts_total", "rg-a"] == 3
        assert found["stortrends_ha_data_process_up", "rg-a"] == 0
        assert ("stortrends_ha_group_clients", "rg-a") not in found
        assert found["stortrends_ha_group_epoch", "rg-a"] == 2


def test_a_metrics_address_in_use_is_an_error_that_names_it(cluster: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        expected = rf"metrics cannot be served at 127\.0\.0\.1:{port}: Address already in use"
        of = collector(cluster, [view()])
        with pytest.raises(StartError, match=expected), metrics.serve(Address("127.0.0.1", port), of):
            pass


def test_client_of_the_metrics_that_is_reset_leaves_no_traceback(
    cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    with metrics.serve(Address("127.0.0.1", port), collector(cluster, [view()])):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"G")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert answer.status == 200
    assert "Traceback" not in capfd.readouterr().err
