"""The configuration decides which arbiter there is."""

from dataclasses import replace
from pathlib import Path

import pytest

from stortrends_ha.arbiter.etcd_client import EtcdArbiter
from stortrends_ha.arbiter.factory import make_arbiter
from stortrends_ha.arbiter.fencing import FencingArbiter, ManualArbiter
from stortrends_ha.arbiter.interface import Known, Refused, Unreachable
from stortrends_ha.arbiter.witness_client import WitnessArbiter
from stortrends_ha.config import Address, Arbiter, Etcd, FenceAgent, Fencing, Manual, Witness, load
from stortrends_ha.record import Record

EXAMPLE = Path(__file__).parents[2] / "config" / "cluster.example.yaml"
RECORD = Record(1, "node-a", ("node-a",))


class Peer:
    name = "node-b"

    async def consent(self, *_: object) -> Refused:
        return Refused(RECORD)

    async def ask(self, _: str) -> Known | Unreachable:
        return Known(RECORD)

    def seen(self) -> bool:
        return True

    def alive(self) -> bool:
        return True

    async def will_ask_to_join(self, *_: object) -> bool:
        return True

    def asked_to_join(self, _: str) -> int:
        return 0

    def has_same_arbiter(self) -> bool:
        return True

    def heard_ns(self) -> int:
        return 1


async def adopt(_: str, __: Record) -> bool:
    return False


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        (Witness(Address("192.0.2.30", 7801)), WitnessArbiter),
        (Etcd(("http://192.0.2.31:2379", "https://[2001:db8::1]:2379")), EtcdArbiter),
        (Fencing({"node-a": FenceAgent("fence_a"), "node-b": FenceAgent("fence_b")}), FencingArbiter),
        (Manual(), ManualArbiter),
    ],
)
async def test_each_kind(asked: Arbiter, made: type) -> None:
    cluster = replace(load(EXAMPLE), arbiter=asked)
    arbiter = make_arbiter(cluster, "node-a", b"k" * 32, peer=Peer(), own_record=lambda _: RECORD, adopt=adopt)
    assert isinstance(arbiter, made)
    if isinstance(arbiter, FencingArbiter):
        assert arbiter._agent.agent == "fence_b"
    await arbiter.close()
