"""One volume as clients see it, and what is counted of it and of its server."""

import logging
from concurrent.futures import Executor
from dataclasses import dataclass, field

from stortrends_ha.config import Volume
from stortrends_ha.errors import StorageError
from stortrends_ha.protocol.nbd_handshake import Export as HandshakeExport
from stortrends_ha.protocol.nbd_options import TransmissionFlag
from stortrends_ha.protocol.nbd_transmission import Geometry
from stortrends_ha.storage.backing import Backing

log = logging.getLogger(__name__)


@dataclass(slots=True)
class VolumeCounters:
    """Totals of one volume since the process started."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    flushes: int = 0
    trims: int = 0
    zeroes: int = 0
    errors: int = 0

    @property
    def requests(self) -> int:
        """All that were taken."""
        return self.reads + self.writes + self.flushes + self.trims + self.zeroes


@dataclass(slots=True)
class ServerCounters:
    """Totals of a group's server."""

    connections_accepted: int = 0
    connections_refused: int = 0
    nbd_bad_input: int = 0
    disk_errors: int = 0


@dataclass(slots=True)
class LinkCounters:
    """Totals of a group's link, in whatever role."""

    sessions: int = 0
    bad_input: int = 0
    refusals: int = 0  # connections that were too many


@dataclass(slots=True, eq=False)
class Export:
    """One volume as clients see it, and what its connections share."""

    index: int
    offer: HandshakeExport
    geometry: Geometry
    store: Backing
    executor: Executor
    totals: ServerCounters
    counters: VolumeCounters = field(default_factory=VolumeCounters)

    def bad_input(self) -> None:
        """A client broke the protocol."""
        self.totals.nbd_bad_input += 1

    def disk_error(self, error: StorageError) -> None:
        """A read failed, and the client was told so."""
        self.totals.disk_errors += 1
        self.counters.errors += 1
        log.error("%s", error)


def make_export(
    index: int,
    volume: Volume,
    store: Backing,
    totals: ServerCounters,
    counters: VolumeCounters,
    *,
    only_read: bool = False,
) -> Export:
    """A volume of a group, by its number; ``only_read``: whatever the configuration says."""
    read_only = volume.read_only or only_read
    geometry = Geometry(
        volume.size_bytes,
        read_only,
        volume.minimum_block_bytes,
        volume.maximum_payload_bytes,
        can_trim=store.can_punch,
        can_fast_zero=store.can_zero_fast,
        can_fast_zero_allocated=store.can_zero_allocated_fast,
    )
    offer = HandshakeExport(
        name=volume.name,
        size_bytes=volume.size_bytes,
        flags=export_flags(read_only),
        minimum_block_bytes=volume.minimum_block_bytes,
        preferred_block_bytes=volume.preferred_block_bytes,
        maximum_payload_bytes=volume.maximum_payload_bytes,
        description=volume.description,
    )
    return Export(index, offer, geometry, store, store.executor, totals, counters)


def export_flags(read_only: bool) -> TransmissionFlag:
    """The transmission flags of a volume: the same on both nodes and at any time, as clients may not compare them."""
    has = TransmissionFlag
    always = has.HAS_FLAGS | has.SEND_FLUSH | has.SEND_FUA | has.CAN_MULTI_CONN | has.SEND_CACHE
    changes = has.SEND_TRIM | has.SEND_WRITE_ZEROES | has.SEND_FAST_ZERO
    return always | (has.READ_ONLY if read_only else changes)
