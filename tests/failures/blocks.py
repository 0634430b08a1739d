"""What a client knows of the blocks that it writes, and what a read of them may return. Pure.

Every write of a block has a number of its own, the next one. While it is under way nothing else is written there, and
it is sent again until it is answered; so a read may return the newest number that was answered, or had been read, when
the read began, or a later one that was sent before it ended: never an older one. What an earlier run wrote is not
known.
"""

import struct
from dataclasses import dataclass

BLOCK_BYTES = 4096
_VALUE = struct.Struct(">QQQQ")


@dataclass(slots=True)
class _Block:
    floor: int = 0  # the newest number that was answered or read
    newest: int = 0  # the newest that was sent
    writing: bool = False


class Blocks:
    """Blocks `first` to `first + count - 1` of a volume; `run` tells the values of this run from those of others."""

    def __init__(self, first: int, count: int, run: int) -> None:
        self.first = first
        self._run = run
        self._blocks = [_Block() for _ in range(count)]

    def __len__(self) -> int:
        return len(self._blocks)

    def may_write(self, number: int) -> bool:
        return not self._blocks[number].writing

    def write(self, number: int) -> tuple[int, bytes]:
        """(which, what) to write next."""
        block = self._blocks[number]
        assert not block.writing
        block.newest += 1
        block.writing = True
        value = _VALUE.pack(self.first + number, self._run, block.newest, 0)
        return block.newest, value * (BLOCK_BYTES // len(value))

    def written(self, number: int, which: int) -> None:
        """It was answered."""
        block = self._blocks[number]
        block.writing = False
        block.floor = max(block.floor, which)

    def floor(self, number: int) -> int:
        """To be noted when a read begins."""
        return self._blocks[number].floor

    def known(self) -> list[int]:
        """The blocks of which a write was answered."""
        return [number for number, block in enumerate(self._blocks) if block.floor]

    def read(self, number: int, floor: int, data: bytes) -> str:
        """What is wrong with what was read; empty if nothing."""
        block = self._blocks[number]
        place, run, which, _ = _VALUE.unpack_from(data)
        here = f"block {self.first + number}"
        if data != data[: _VALUE.size] * (BLOCK_BYTES // _VALUE.size):
            return f"{here} is torn"
        if run != self._run or place != self.first + number:
            return f"{here} lost write {floor}: it holds what is not of this run" if floor else ""
        if not floor <= which <= block.newest:
            return f"{here} holds write {which}, and must hold {floor} to {block.newest}"
        block.floor = max(block.floor, which)
        return ""
