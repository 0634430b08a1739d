"""A set of blocks of a volume, as a bitmap in pages: small for any size of volume, and saved page by page. Pure.

Pages with nothing in them do not exist, and those with everything share one: a volume of 64 TiB costs nothing while
its map is empty or full, and 2 MiB for each TiB (in blocks of 64 KiB) between.
"""

from collections.abc import Iterator, Mapping

PAGE_BYTES = 4064
PAGE_BLOCKS = PAGE_BYTES * 8
_FULL = b"\xff" * PAGE_BYTES


class BlockMap:
    """Which of ``blocks`` blocks are in the set. ``changed``: the pages that differ from what was saved."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.count = 0
        self.changed: set[int] = set()
        self._pages: dict[int, bytearray | bytes] = {}

    @classmethod
    def load(cls, blocks: int, pages: Mapping[int, bytes | None]) -> "BlockMap":
        """As saved. A page that cannot be trusted (None) has all its blocks, and is to be saved again."""
        loaded = cls(blocks)
        for number, page in pages.items():
            first = number * PAGE_BLOCKS
            if page is None:
                loaded.add(first, first + PAGE_BLOCKS - 1)
            elif page.count(0) != PAGE_BYTES:
                loaded._put(number, bytearray(page))
                loaded.changed.discard(number)
        return loaded

    def page(self, number: int) -> bytes:
        """The content of a page, to be saved."""
        return bytes(self._pages.get(number, bytes(PAGE_BYTES)))

    def pages_to_save(self) -> dict[int, bytes]:
        """What has changed since this was asked last."""
        changed, self.changed = self.changed, set()
        return {number: self.page(number) for number in changed}

    def rescaled(self, block_bytes: int, blocks: int, to_bytes: int) -> "BlockMap":
        """The same of the volume in ``blocks`` blocks of another size, ``to_bytes``: each that has any of it."""
        scaled, first = BlockMap(blocks), self.next_from(0)
        while first is not None:
            last = self.run_end(first, self.blocks - 1)
            scaled.add(first * block_bytes // to_bytes, ((last + 1) * block_bytes - 1) // to_bytes)
            first = self.next_from(last + 1)
        return scaled

    # --- Changes ------------------------------------------------------------------------------

    def add(self, first: int, last: int) -> None:
        """Add the blocks from ``first`` to ``last``, those that exist."""
        last = min(last, self.blocks - 1)
        while first <= last:
            number, bit = divmod(first, PAGE_BLOCKS)
            end = min(last, (number + 1) * PAGE_BLOCKS - 1)
            self._add(number, bit, end - number * PAGE_BLOCKS)
            first = end + 1

    def _add(self, number: int, bit: int, last: int) -> None:
        page = self._pages.get(number)
        if page is _FULL:
            return
        if bit == last:  # the usual case
            if page is None:
                page = self._pages[number] = bytearray(PAGE_BYTES)
            mask = 1 << (bit & 7)
            if not page[bit >> 3] & mask:
                page[bit >> 3] |= mask  # type: ignore[index]
                self.count += 1
                self.changed.add(number)
            return
        mask = ((1 << (last - bit + 1)) - 1) << bit
        bits = int.from_bytes(page or b"", "little") | mask
        self._put(number, bits.to_bytes(PAGE_BYTES, "little"))

    def _put(self, number: int, page: bytes | bytearray) -> None:
        before = self._pages.get(number, b"")
        if page == before:
            return
        self.count += _bits(page) - _bits(before)
        self.changed.add(number)
        self._pages[number] = _FULL if page == _FULL else bytearray(page)

    def discard(self, block: int) -> None:
        """Take one block out."""
        number, bit = divmod(block, PAGE_BLOCKS)
        page = self._pages.get(number)
        if page is None or not page[bit >> 3] >> (bit & 7) & 1:
            return
        if page is _FULL:
            page = self._pages[number] = bytearray(_FULL)
        assert isinstance(page, bytearray)
        page[bit >> 3] &= ~(1 << (bit & 7)) & 0xFF
        self.count -= 1
        self.changed.add(number)
        if not page[bit >> 3] and page.count(0) == PAGE_BYTES:
            del self._pages[number]

    def remove(self, first: int, last: int) -> None:
        """Take the blocks from ``first`` to ``last`` out."""
        while first <= last:
            number, bit = divmod(first, PAGE_BLOCKS)
            end = min(last, (number + 1) * PAGE_BLOCKS - 1)
            page = self._pages.get(number)
            if page is not None:
                mask = ((1 << (end - first + 1)) - 1) << bit
                bits = int.from_bytes(page, "little")
                if gone := bits & mask:
                    self.count -= gone.bit_count()
                    self.changed.add(number)
                    if bits == gone:
                        del self._pages[number]
                    else:
                        self._pages[number] = bytearray((bits ^ gone).to_bytes(PAGE_BYTES, "little"))
            first = end + 1

    def fill(self) -> None:
        """Add all blocks."""
        self.add(0, self.blocks - 1)

    def clear(self) -> None:
        """Take all blocks out."""
        self.changed.update(self._pages)
        self._pages.clear()
        self.count = 0

    def update(self, other: "BlockMap") -> None:
        """Add the blocks of another map of the same volume."""
        for number, page in other._pages.items():
            own = self._pages.get(number)
            if own is None or page is _FULL:
                self._put(number, page)
            elif own is not _FULL:
                bits = int.from_bytes(own, "little") | int.from_bytes(page, "little")
                self._put(number, bits.to_bytes(PAGE_BYTES, "little"))

    # --- Questions ----------------------------------------------------------------------------

    def __contains__(self, block: int) -> bool:
        number, bit = divmod(block, PAGE_BLOCKS)
        page = self._pages.get(number)
        return page is not None and bool(page[bit >> 3] >> (bit & 7) & 1)

    def __iter__(self) -> Iterator[int]:
        block = self.next_from(0)
        while block is not None:
            yield block
            block = self.next_from(block + 1)

    def next_from(self, block: int) -> int | None:
        """The first block of the set that is not before this one."""
        number, bit = divmod(block, PAGE_BLOCKS)
        page = self._pages.get(number)
        if page is not None and (found := _first_bit(page, bit)) is not None:
            return number * PAGE_BLOCKS + found
        later = min((each for each in self._pages if each > number), default=None)
        if later is None:
            return None
        return later * PAGE_BLOCKS + (_first_bit(self._pages[later], 0) or 0)

    def run_end(self, first: int, last: int) -> int:
        """Up to which block, at most ``last``, all from ``first`` on are in the set; ``first`` is."""
        at = first
        while at <= last:
            number, bit = divmod(at, PAGE_BLOCKS)
            page = self._pages.get(number)
            if page is None:
                break
            if page is not _FULL:
                missing = ~int.from_bytes(page, "little") >> bit
                length = (missing & -missing).bit_length() - 1
                if bit + length < PAGE_BLOCKS:
                    at += length
                    break
            at = (number + 1) * PAGE_BLOCKS
        return min(at - 1, last)

    def any_in(self, first: int, last: int) -> bool:
        """Whether any of the blocks from ``first`` to ``last`` is in the set."""
        found = self.next_from(first)
        return found is not None and found <= last


def _bits(page: bytes | bytearray) -> int:
    return int.from_bytes(page, "little").bit_count()


def _first_bit(page: bytes | bytearray, bit: int) -> int | None:
    """The first bit that is set, from this one on."""
    at = bit >> 3
    value = page[at] >> (bit & 7)
    if value:
        return bit + (value & -value).bit_length() - 1
    rest = page[at + 1 :].lstrip(b"\0")
    if not rest:
        return None
    return (PAGE_BYTES - len(rest)) * 8 + (rest[0] & -rest[0]).bit_length() - 1
