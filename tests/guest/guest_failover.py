"""A virtual machine goes on without an I/O error while the nodes of its disk are killed, come back and hand over.

Run by `make test-guest`, not with all tests. The guest re-reads everything it wrote, so what it was told to be on
stable storage must be there after all that happened. The table it prints has the longest time that the guest waited
for one of its writes. After a kill that is a little more than 1, 3, 7 or 15 s, because QEMU tries to connect at these
moments: it sleeps for 1, 2, 4, 8 and 16 s in between (its nbd/client-connection.c).
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
from clients import run
from files import differences

from .demo_cluster import DemoCluster
from .machine import WRITERS, Guest

# QEMU repeats the requests that a lost connection left unanswered for so long, then they fail.
RECONNECT_DELAY_S = 300
# One write of each writer is under way when something happens, a few may be done and not yet read from its console.
WRITES_AFTER = 20
# All that is waited for here has a deadline of its own, each named; this is for their sum on a slow machine.
TEST_S = 3600


class Events:
    """What happens to the cluster while the guest writes, and how long the guest waited each time."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._stalls_s: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def event(self, what: str) -> Iterator[None]:
        """Do what is in the block; afterwards the guest must write on."""
        before = self._guest.counts()
        yield
        self._guest.wait_writes(f"after: {what}", WRITES_AFTER)
        writes = self._guest.writes
        self._stalls_s[what] = {name: writes[name].longest_stall_s(since=before[name]) for name in WRITERS}

    def table(self) -> str:
        """The longest stall of each writer for each event."""
        width = max(map(len, self._stalls_s))
        lines = [f"\n{'longest stall in seconds':{width}}" + "".join(f"{name:>10}" for name in WRITERS)]
        for what, stalls in self._stalls_s.items():
            lines.append(f"{what:{width}}" + "".join(f"{stalls[name]:>10.2f}" for name in WRITERS))
        return "\n".join(lines)


@pytest.mark.timeout(TEST_S)
def test_a_guest_sees_no_error_while_nodes_are_killed_and_groups_move(
    cluster: DemoCluster, boot: Callable[..., Guest], capsys: pytest.CaptureFixture[str]
) -> None:
    guest = boot(reconnect_delay_s=RECONNECT_DELAY_S)
    events = Events(guest)
    first = cluster.owner()
    second = cluster.other(first)
    with events.event("nothing happens"):
        pass
    with events.event("the owner is killed"):
        cluster.kill(first)
    assert cluster.owner() == second
    with events.event("it comes back and gets what it missed"):
        cluster.start_again(first)
        cluster.wait_in_sync()
    with events.event("the group is moved back"):
        cluster.move(to=first)
    assert cluster.owner() == first
    with events.event("the secondary is killed"):
        cluster.kill(second)
    with events.event("it comes back and gets what it missed, too"):
        cluster.start_again(second)
        cluster.wait_in_sync()
    with events.event("the owner's data process is killed"):
        cluster.kill_data_process(first)
    cluster.wait_in_sync()
    with events.event("both nodes are killed and come back"):
        for node in (second, first):
            cluster.kill(node)
        for node in (second, first):
            cluster.start_again(node)
        cluster.wait_in_sync()
    with events.event("the witness is killed"):
        cluster.kill_witness()
    owner = cluster.owner()
    with events.event("the secondary is killed, too, and comes back"):
        cluster.kill(cluster.other(owner))
        cluster.start_again(cluster.other(owner))
        # The group that it owned needs the witness.
        cluster.wait_in_sync(cluster.group)
    with events.event("the owner is killed, too; the witness comes back"):
        cluster.kill(owner)
        cluster.start_witness_again()
    assert cluster.owner() != owner
    with events.event("the owner comes back"):
        cluster.start_again(owner)
        cluster.wait_in_sync()
    verdict = guest.finish()
    with capsys.disabled():
        print(events.table(), f"{sum(guest.counts().values())} writes, {verdict}", sep="\n")
    assert verdict.startswith("verdict ok"), verdict
    cluster.stop()
    assert_replicas_are_good(cluster)


def assert_replicas_are_good(cluster: DemoCluster) -> None:
    """Both are the same, byte for byte, with a file system that has no fault and nothing to replay."""
    one, other = cluster.replicas()
    assert not differences(one, other)
    for replica in (one, other):
        run("e2fsck", "-f", "-n", replica)


@pytest.mark.timeout(TEST_S)
def test_without_a_reconnect_delay_the_guest_sees_the_error(cluster: DemoCluster, boot: Callable[..., Guest]) -> None:
    """That is: the test above would notice an error."""
    guest = boot(reconnect_delay_s=0)
    guest.wait_writes("at the start", 1)
    cluster.kill(cluster.owner())
    assert guest.wait_failure()
    assert list(guest.io_errors())
