"""The fixed limits, made small: what takes megabytes and thousands of requests in production takes kilobytes here."""

import contextlib
from collections.abc import Iterator

from stortrends_ha import limits
from stortrends_ha.protocol import nbd_transmission
from stortrends_ha.replication import ordering, primary, resync, secondary, stream

_MODULES = (nbd_transmission, ordering, primary, resync, secondary, stream)
_COUNTS = {"REQUESTS_PER_BATCH": 6, "ORDER_REGIONS": 24, "ORDER_REGIONS_PER_CHANGE": 4, "COMPARE_BLOCKS_IN_FLIGHT": 3}
_LENGTHS = (
    "WRITE_WHOLE_BYTES", "WRITE_PIECE_BYTES", "LINK_BACKLOG_BYTES", "ORDER_REGION_BYTES", "COMPARE_BLOCK_BYTES",
    "ZERO_PIECE_BYTES", "INPUT_BUFFER_BYTES",
)  # fmt: skip


class Limits:
    """The limits of a run: those of production, divided by ``divisor`` (1: as they are)."""

    def __init__(self, divisor: int) -> None:
        self.divisor = divisor
        small = divisor > 1
        self.values: dict[str, int] = {name: getattr(limits, name) // divisor for name in _LENGTHS}
        if small:
            self.values["ZERO_PIECE_BYTES"] = self.values["COMPARE_BLOCK_BYTES"] * 2
        self.values["CHANGES_FRAME_BYTES"] = self.values["INPUT_BUFFER_BYTES"] + 4 * limits.KIB
        self.values.update({name: count if small else getattr(limits, name) for name, count in _COUNTS.items()})

    def __getitem__(self, name: str) -> int:
        return self.values[name]

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """The production modules see these limits."""
        before = [
            (module, name, getattr(module, name))
            for module in _MODULES
            for name in self.values
            if hasattr(module, name)
        ]
        before.append((ordering, "_SHIFT", ordering._SHIFT))
        try:
            for module, name, _ in before[:-1]:
                setattr(module, name, self.values[name])
            ordering._SHIFT = self.values["ORDER_REGION_BYTES"].bit_length() - 1
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)
