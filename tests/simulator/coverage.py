"""Rules 8 and 9, all the time: where the two disks differ, or would after a loss of power, one of the nodes has durably
written down that they may.

Looked at whenever something could end that: a block is written, a map file changes, a state is saved. What a node has
written down is what *all* the contents say that its map files may have after its death. What is damaged or lost
counts for everything, as the node must take it for that.
"""

from collections.abc import Callable
from functools import lru_cache, reduce
from typing import TYPE_CHECKING

from stortrends_ha.replication.block_map import PAGE_BYTES
from stortrends_ha.storage import map_file

from .history import Violation
from .metadata import ZEROES, MapPages

if TYPE_CHECKING:
    from .host import Host
    from .world import World

REGION_BLOCKS = 2


@lru_cache(maxsize=4096)
def _bits(page: bytes) -> int:
    """Of the only page that a volume as small as these has; -1, which has all, if it is damaged."""
    if page == ZEROES:
        return 0
    content = map_file._unsealed(0, page)
    return -1 if content is None else int.from_bytes(content, "little")


@lru_cache(maxsize=4096)
def _is_header(page: bytes) -> bool:
    return page != ZEROES and page == map_file._sealed(0, page[:PAGE_BYTES])


def _saved(pages: MapPages | None) -> list[int]:
    """The bits that a map may have after a loss of power; the last are those that it has now."""
    if pages is None or 0 not in pages.pages:
        return [-1]
    if not any(_is_header(content) for content, _ in pages.pages[0].versions):
        return [-1]
    return [_bits(content) for content, _ in pages.pages[1].versions] if 1 in pages.pages else [0]


def _all_of(one: int, other: int) -> int:
    return one & other


def _any_of(one: int, other: int) -> int:
    return one | other


def _now(_: int, newest: int) -> int:
    return newest


class Coverage:
    """Of the two disks of each volume."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._all = (1 << world.blocks) - 1
        self._surely: dict[int, int] = {}  # of each volume: what the nodes know, since a file has changed
        self._regions = [3 << REGION_BLOCKS * region for region in range(-(-world.blocks // REGION_BLOCKS))]

    def _maps(self, host: "Host", volume: int, choose: Callable[[int, int], int]) -> int:
        """The blocks that the files of a node say may differ."""
        files, name = host.metadata.files, f"g.{self._world.volumes[volume]}"
        regions = reduce(choose, _saved(files.get(f"{name}.intents")))
        blocks = reduce(choose, _saved(files.get(f"{name}.dirty")))
        return (self._of_regions(regions) | blocks) & self._all

    def _of_regions(self, bits: int) -> int:
        found = 0
        for region, blocks in enumerate(self._regions):
            if bits >> region & 1:
                found |= blocks
        return found

    def whole_regions(self, blocks: int) -> int:
        """The regions that these blocks are in."""
        return sum(region for region in self._regions if blocks & region) & self._all

    def told(self, host: "Host", volume: int) -> int:
        """Blocks that a node may have found in its files, after whatever death."""
        return self._maps(host, volume, _any_of)

    def left(self, host: "Host", volume: int) -> int:
        """Blocks that the files of a node have now."""
        return self._maps(host, volume, _now)

    # --- Moments --------------------------------------------------------------------------------------

    def written(self, volume: int, blocks: range) -> None:
        """A write to one of the disks."""
        if self._counts():
            self._check(volume, blocks)

    def changed(self) -> None:
        """A map file, or the state of a node."""
        self._surely.clear()
        if self._counts():
            for volume in range(len(self._world.volumes)):
                self._check(volume, range(self._world.blocks))

    def _counts(self) -> bool:
        """Whether what may differ has to be known: not of data without a common history, nor while all is copied."""
        one, other = (host.state for host in self._world.hosts)
        if not one.lineage or one.lineage != other.lineage:
            return False
        return not any(to.filling and to.filling != of.fills for to, of in ((one, other), (other, one)))

    def _check(self, volume: int, blocks: range) -> None:
        hosts = self._world.hosts
        differ = 0
        one, other = (host.disks[volume] for host in hosts)
        for block in blocks:
            if not one.surely_as(other, block):
                differ |= 1 << block
        if not differ:
            return
        if volume not in self._surely:
            self._surely[volume] = self._maps(hosts[0], volume, _all_of) | self._maps(hosts[1], volume, _all_of)
        if missing := differ & ~self._surely[volume]:
            found = [block for block in blocks if missing >> block & 1]
            raise Violation(
                f"blocks {found} of volume {self._world.volumes[volume]} may differ, and neither node would know after "
                f"its death: they know of {self._surely[volume]:b} (rules 8 and 9)"
            )
