"""What is in a block: the run, the block's number and a value, again and again, so that each sector tells all three."""

import struct

from .operations import FOREIGN, ZEROES, Found

BLOCK_BYTES = 4096
_CELL = struct.Struct(">IIQ")
_CELLS = BLOCK_BYTES // _CELL.size
_EMPTY = bytes(_CELL.size)


class Contents:
    """The blocks of one run: a number by which they are told from those of other runs."""

    def __init__(self, run: int) -> None:
        self._run = run

    def write(self, block: int, value: int) -> bytes:
        return _CELL.pack(self._run, block, value) * _CELLS

    def read(self, block: int, data: bytes) -> Found:
        if data == data[: _CELL.size] * _CELLS:
            return self._value(block, data[: _CELL.size])
        cells = dict.fromkeys(data[at : at + _CELL.size] for at in range(0, BLOCK_BYTES, _CELL.size))
        return [self._value(block, cell) for cell in cells]

    def _value(self, block: int, cell: bytes) -> int:
        if cell == _EMPTY:
            return ZEROES
        run, number, value = _CELL.unpack(cell)
        return value if (run, number) == (self._run, block) else FOREIGN
