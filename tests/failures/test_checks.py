"""What the tests and the benchmark rely on: the client notices what it must, and a missed target is said."""

from pathlib import Path

import pytest

from bench.stalls import Stalls, table
from stortrends_ha.node.records import Records

from .blocks import BLOCK_BYTES, Blocks


@pytest.fixture
def blocks() -> Blocks:
    return Blocks(first=100, count=4, run=7)


class TestBlocks:
    def test_what_was_answered_is_read(self, blocks: Blocks) -> None:
        which, data = blocks.write(2)
        blocks.written(2, which)
        assert not blocks.read(2, blocks.floor(2), data)
        assert blocks.known() == [2]

    def test_a_lost_write_is_noticed(self, blocks: Blocks) -> None:
        _, before = blocks.write(2)
        blocks.written(2, 1)
        blocks.write(2)
        blocks.written(2, 2)
        assert "must hold 2 to 2" in blocks.read(2, blocks.floor(2), before)
        assert "lost write 2" in blocks.read(2, blocks.floor(2), bytes(BLOCK_BYTES))
        assert "lost write 2" in blocks.read(2, blocks.floor(2), Blocks(100, 4, run=6).write(2)[1])

    def test_a_write_under_way_may_be_there_or_not_but_it_does_not_go_away(self, blocks: Blocks) -> None:
        _, before = blocks.write(2)
        blocks.written(2, 1)
        _, after = blocks.write(2)
        assert not blocks.may_write(2)
        assert not blocks.read(2, 1, before)
        assert not blocks.read(2, 1, after)
        assert blocks.floor(2) == 2
        assert blocks.read(2, blocks.floor(2), before)

    def test_a_torn_block_and_one_of_another_place_are_noticed(self, blocks: Blocks) -> None:
        _, data = blocks.write(2)
        blocks.written(2, 1)
        assert "torn" in blocks.read(2, 1, data[:512] + bytes(BLOCK_BYTES - 512))
        assert "lost" in blocks.read(2, 1, blocks.write(3)[1])

    def test_what_was_never_written_is_not_known(self, blocks: Blocks) -> None:
        assert not blocks.read(2, blocks.floor(2), bytes(BLOCK_BYTES))
        assert not blocks.known()


class TestKnownClients:
    async def test_kept_over_a_restart(self, tmp_path: Path) -> None:
        clients = [("192.0.2.1", 40000, "192.0.2.21", 10809), ("2001:db8::1", 40001, "2001:db8::21", 10809)]
        await Records(tmp_path).keep_clients("rg-a", clients)
        assert Records(tmp_path).clients("rg-a") == clients
        assert Records(tmp_path).clients("rg-b") == []

    @pytest.mark.parametrize("text", ["", "{", "[1]", "[[1, 2]]", '[["192.0.2.1", "x", "192.0.2.21", 1]]'])
    def test_a_damaged_file_is_no_reason_not_to_start(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "records" / "rg-a.clients"
        path.parent.mkdir()
        path.write_text(text)
        assert Records(tmp_path).clients("rg-a") == []


def test_missed_targets_are_said() -> None:
    well = Stalls("a planned move", 0.15, 0.5, [0.1, 0.2, 0.1])
    late = Stalls("another", 0.15, 0.5, [0.1, 0.6, 0.1])
    slow = Stalls("a third", 0.15, 0.5, [0.2, 0.6, 0.2])
    assert (well.missed, late.missed, slow.missed) == ("", "missed: max", "missed: p50 and max")
    assert table([well, slow]) == (
        "event           times  p50 ms  max ms  target ms (p50, max)\n"
        "a planned move      3     100     200              150, 500\n"
        "a third             3     200     600              150, 500  missed: p50 and max\n"
    )
