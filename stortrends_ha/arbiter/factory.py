"""Makes the arbiter that the configuration asks for."""

from stortrends_ha.arbiter.etcd_client import EtcdArbiter
from stortrends_ha.arbiter.fencing import Adopt, FencingArbiter, ManualArbiter, OwnRecord, Peer
from stortrends_ha.arbiter.witness_client import WitnessArbiter
from stortrends_ha.config import Cluster, Etcd, Fencing, Witness

AnyArbiter = WitnessArbiter | EtcdArbiter | FencingArbiter | ManualArbiter


def make_arbiter(
    cluster: Cluster, me: str, key: bytes, *, peer: Peer, own_record: OwnRecord, adopt: Adopt
) -> AnyArbiter:
    """The arbiter of a cluster for node `me`; `key` is the cluster's.

    The last three are what the arbiters without a third machine need; their `consider` answers the peer's proposals.
    """
    match cluster.arbiter:
        case Witness(address):
            return WitnessArbiter(address, cluster.name, me, key)
        case Etcd(endpoints):
            return EtcdArbiter(endpoints, cluster.name, me)
        case Fencing(agents, timeout_s):
            return FencingArbiter(peer, own_record, adopt, agents[peer.name], timeout_s)
        case _:
            return ManualArbiter(peer, own_record, adopt)
