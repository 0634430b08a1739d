"""Comparing copies block by block, and the file of what was given up: written, read, damaged, without room."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import MemoryStore
from hypothesis import given, settings
from hypothesis import strategies as st

from stortrends_ha.dataplane.comparison import merged
from stortrends_ha.dataplane.inspection import look
from stortrends_ha.errors import StorageError
from stortrends_ha.limits import COMPARE_GRAIN_BYTES, INSPECT_PIECE_BYTES
from stortrends_ha.protocol.nbd_transmission import OP_WRITE
from stortrends_ha.replication.block_map import BlockMap
from stortrends_ha.replication.differences import blocks_of
from stortrends_ha.replication.resync import digest
from stortrends_ha.storage.kept_file import Kept, KeptFiles, read_header, read_ranges

BLOCK = COMPARE_GRAIN_BYTES
SIZE = 9 * BLOCK + 512
HEADER: dict[str, Any] = {
    "cluster": "demo", "group": "rg-a", "node": "node-a", "lineage": "abc", "kept_lineage": "def",
    "volumes": [["vm-a", SIZE], ["vm-b", SIZE]],
}  # fmt: skip


def store_of(*writes: tuple[int, bytes]) -> MemoryStore:
    store = MemoryStore(SIZE)
    for offset, data in writes:
        store.apply([(OP_WRITE, offset, len(data), 0)], data)
    return store


def blocks(*numbers: int) -> BlockMap:
    found = BlockMap(blocks_of(SIZE, BLOCK))
    for number in numbers:
        found.add(number, number)
    return found


def read(path: Path) -> list[Kept]:
    with path.open("rb") as file:
        return list(read_ranges(file, read_header(file, path), path))


# --- Kept ---------------------------------------------------------------------------------------


def test_what_differs_is_kept_with_its_place_and_zeroes_take_no_room(tmp_path: Path) -> None:
    one, other = store_of((3 * BLOCK, b"a" * BLOCK), (9 * BLOCK, b"end")), store_of((0, b"b"))
    path = KeptFiles(tmp_path, "rg-a").write(HEADER, [(one, blocks(0, 2, 3, 9)), (other, blocks(0))])
    assert path.parent == tmp_path / "kept"
    assert [(kept.volume, kept.offset, kept.length) for kept in read(path)] == [
        (0, 0, BLOCK), (0, 2 * BLOCK, 2 * BLOCK), (0, 9 * BLOCK, 512), (1, 0, BLOCK),
    ]  # fmt: skip
    zero, run, end, b = (kept.data for kept in read(path))
    assert (zero, run, end) == (None, bytes(BLOCK) + b"a" * BLOCK, b"end" + bytes(509))
    assert b is not None
    assert b[:2] == b"b\0"
    with path.open("rb") as file:
        header = read_header(file, path)
    assert (header["lineage"], header["kept_lineage"], header["volumes"][1]) == ("abc", "def", ("vm-b", SIZE))
    assert len(header["time"]) > 18


def test_two_in_one_second_do_not_overwrite_each_other_and_what_is_left_of_one_is_removed(tmp_path: Path) -> None:
    files = KeptFiles(tmp_path, "rg-a")
    first = files.write(HEADER, [(store_of(), blocks(1))])
    rest = first.with_name("rg-a-20200101T000000.part")
    rest.write_bytes(b"half")
    before = first.read_bytes()
    second = files.write(HEADER, [(store_of(), blocks(1, 2))])
    assert second != first
    assert first.read_bytes() == before
    assert not rest.exists()


@contextlib.contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_file_that_cannot_be_written_to_its_end_is_no_file(tmp_path: Path) -> None:
    files = KeptFiles(tmp_path, "rg-a")
    with files_of_at_most(BLOCK), pytest.raises(StorageError, match="cannot be kept in"):
        files.write(HEADER, [(store_of((0, b"x" * SIZE)), blocks(*range(9)))])
    assert os.listdir(files.directory) == []


def test_file_that_was_cut_off_or_changed_is_said_to_be_damaged(tmp_path: Path) -> None:
    path = KeptFiles(tmp_path, "rg-a").write(HEADER, [(store_of((0, b"x" * BLOCK)), blocks(0, 4))])
    whole = path.read_bytes()
    for length in (*range(0, 60, 7), 300, len(whole) - BLOCK, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StorageError, match=r"damaged|no file of kept blocks"):
            read(path)
    data = whole.index(b"xxxx")
    for at in (0, 9, 14, data - 40, data + 5, len(whole) - 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with pytest.raises(StorageError, match=r"damaged|no file of kept blocks"):
            read(path)


# --- Compared -----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * BLOCK)), max_size=4))
@settings(max_examples=60, deadline=None)
def test_digests_are_those_of_the_blocks_and_holes_have_none(writes: list[tuple[int, int]]) -> None:
    store = store_of(*((offset, b"y" * min(length, SIZE - offset)) for offset, length in writes))
    offset = 0
    while offset < SIZE:
        covered, digests = look(store, offset, SIZE - offset)
        assert 0 < covered <= SIZE - offset
        assert covered % BLOCK == 0 or offset + covered == SIZE
        assert covered <= INSPECT_PIECE_BYTES or not digests
        data = bytes(store.read(offset, covered))
        wanted = b"".join(digest(data[at : at + BLOCK]) for at in range(0, covered, BLOCK))
        assert digests == (wanted if digests else b"")
        if not digests:
            assert data.count(0) == covered
        offset += covered


def test_ranges_are_merged_counted_and_end_with_the_volume() -> None:
    found = blocks(0, 1, 2, 5, 8, 9)
    assert merged(found, SIZE, 10) == ([(0, 3 * BLOCK), (5 * BLOCK, BLOCK), (8 * BLOCK, BLOCK + 512)], 3)
    assert merged(found, SIZE, 1) == ([(0, 3 * BLOCK)], 3)
    assert merged(blocks(), SIZE, 10) == ([], 0)
