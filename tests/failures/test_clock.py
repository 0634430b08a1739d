"""The wall clocks of machines jump: row 16."""

import re
import time
from collections.abc import Callable
from datetime import datetime

from .clients import PLANNED_S, under_load
from .cluster import Cluster
from .network import NODES

DAY_S = 24 * 3600


def what_must_stay(cluster: Cluster) -> list[object]:
    """Who owns the group by which record, and that nothing was started or connected again."""
    groups = [node.group() for node in cluster.nodes.values()]
    return [
        (of["owner"], of["epoch"], of["in_sync"], of["state"], of["pid"], of["counters"]["link_sessions"])
        for of in groups
    ]


def assert_ahead(log: str, by_s: int) -> None:
    """The wall clock of whoever wrote these lines was ahead by so much."""
    lines = re.findall(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} ", log, re.MULTILINE)
    ahead_s = [datetime.strptime(line, "%Y-%m-%d %H:%M:%S").timestamp() - time.time() for line in lines]
    assert ahead_s
    assert all(abs(ahead - by_s) < DAY_S / 2 for ahead in ahead_s), ahead_s


def test_wall_clocks_jump(make_cluster: Callable[..., Cluster]) -> None:
    """Nobody notices; and a takeover is done as ever while clocks are days apart."""
    cluster = make_cluster()
    assert cluster.witness is not None
    for name in (*NODES, "witness"):
        cluster.network.machines[name].set_wall_clock(0)
    cluster.start()
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        before = what_must_stay(cluster)
        for daemon in (owner, secondary, cluster.witness):
            for ahead_s in (DAY_S, -3 * DAY_S):
                with clients.event(stall_s=PLANNED_S):
                    daemon.machine.set_wall_clock(ahead_s)
                assert what_must_stay(cluster) == before
        owner.machine.set_wall_clock(DAY_S)
        owner_said, secondary_said = owner.log_since(), secondary.log_since()
        with clients.event():
            owner.kill()
        assert cluster.owner() is secondary
        with clients.event():
            owner.start()
            cluster.wait_in_sync()
        assert_ahead(owner_said(), DAY_S)
        assert_ahead(secondary_said(), -3 * DAY_S)
