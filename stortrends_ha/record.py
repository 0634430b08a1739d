"""The record of a group: who owns it and who is in sync. Pure, and the same on the nodes, the wire and the arbiter.

A record changes only by compare-and-set in the arbiter, from epoch *e* to *e+1*. The methods below are the only ways
to make the next one; each names the rule that allows it, but whether it is allowed *now* is decided in ``cluster``.
"""

from dataclasses import dataclass
from typing import Any

# An epoch has 64 bits on the wire.
EPOCHS = 1 << 63


@dataclass(frozen=True, slots=True)
class Record:
    """``in_sync``: the nodes that hold every acknowledged write, sorted by name; the owner is one of them."""

    epoch: int
    owner: str
    in_sync: tuple[str, ...]

    @property
    def alone(self) -> bool:
        """Whether the owner is the only node in sync: then nobody else may take over."""
        return self.in_sync == (self.owner,)

    def owned_alone(self, node: str) -> "Record":
        """``node`` owns it, alone: a takeover (rule 3), going on alone (rule 2), the operator's override (rule 11)."""
        return Record(self.epoch + 1, node, (node,))

    def joined_by(self, node: str) -> "Record":
        """``node`` has been synced and is added (rule 9)."""
        return Record(self.epoch + 1, self.owner, tuple(sorted({*self.in_sync, node})))

    def handed_to(self, node: str) -> "Record":
        """A handover: the owner has stopped, ``node`` owns it from now on, both stay in sync (rule 5)."""
        return Record(self.epoch + 1, node, self.in_sync)

    def encode(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"epoch": self.epoch, "owner": self.owner, "in_sync": list(self.in_sync)}

    @staticmethod
    def decode(value: Any) -> "Record":
        """From a JSON object, which may be foreign. Raises ValueError."""
        if not isinstance(value, dict):
            raise ValueError(f"a record is an object, not {str(value)[:40]!r}")
        epoch, owner, in_sync = value.get("epoch"), value.get("owner"), value.get("in_sync")
        if type(epoch) is not int or not 0 < epoch < EPOCHS:
            raise ValueError(f"a record's epoch is a number from 1 on, not {str(epoch)[:40]!r}")
        if not isinstance(in_sync, list) or not all(isinstance(node, str) for node in [owner, *in_sync]):
            raise ValueError("a record's owner and in_sync are names of nodes")
        if owner not in in_sync or len(set(in_sync)) != len(in_sync):
            raise ValueError("a record's in_sync names each node once, and the owner among them")
        return Record(epoch, str(owner), tuple(sorted(in_sync)))

    def __str__(self) -> str:
        return f"epoch {self.epoch}: {self.owner} owns, in sync {' and '.join(self.in_sync)}"
