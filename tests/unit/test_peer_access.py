"""What a node without a third machine remembers of its peer: that it was seen since boot, and for what it was asked."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from test_membership import met

from stortrends_ha.errors import StartError
from stortrends_ha.node import peer_access
from stortrends_ha.node.peer_access import PeerAccess
from stortrends_ha.record import Record

RECORD = Record(5, "a", ("a",))


@pytest.fixture(autouse=True)
def boot_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's boot ID, which a test may change."""
    path = tmp_path / "boot_id"
    path.write_text("first\n")
    monkeypatch.setattr(peer_access, "BOOT_ID", path)
    return path


def start(state_dir: Path) -> PeerAccess:
    """The one of a daemon that starts there."""
    membership, _ = met()
    return PeerAccess(membership, state_dir, lambda _: RECORD)


def hears(state_dir: Path) -> PeerAccess:
    """The one of a daemon that has started there, has heard the peer, and has ended."""

    async def run() -> PeerAccess:
        peer = start(state_dir)
        peer.note_beat()
        assert peer.seen()
        return peer

    return asyncio.run(run())  # the loop's threads have ended, too


class TestSeen:
    def test_it_survives_a_restart_of_the_daemon_and_no_boot(self, tmp_path: Path, boot_id: Path) -> None:
        assert not start(tmp_path).seen()
        hears(tmp_path)
        assert start(tmp_path).seen()
        boot_id.write_text("second\n")
        assert not start(tmp_path).seen()
        hears(tmp_path)
        assert start(tmp_path).seen()

    @pytest.mark.parametrize("mark", [b"", b"fir", b"\0\0\0\0\0\0", b"\xff\xfe"])
    def test_a_damaged_mark_counts_as_not_seen(self, tmp_path: Path, mark: bytes) -> None:
        (tmp_path / "peer-seen").write_bytes(mark)
        assert not start(tmp_path).seen()

    def test_a_mark_that_cannot_be_written_counts_as_not_seen_after_a_restart(self, tmp_path: Path) -> None:
        (tmp_path / "peer-seen").mkdir()
        assert hears(tmp_path).seen()
        assert not start(tmp_path).seen()


class TestAsked:
    async def test_it_is_remembered_by_group_and_only_the_newest(self, tmp_path: Path) -> None:
        peer = start(tmp_path)
        assert peer.asked_to_join("g") == 0
        for epoch in (7, 6):
            assert await peer.will_ask_to_join("g", epoch)
            assert [of.asked_to_join("g") for of in (peer, start(tmp_path))] == [7, 7]
        assert await peer.will_ask_to_join("h", 3)
        again = start(tmp_path)
        assert [again.asked_to_join(group) for group in ("g", "h", "i")] == [7, 3, 0]

    async def test_it_is_stable_before_the_peer_is_asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stable: list[int] = []
        monkeypatch.setattr(os, "fsync", noted(os.fsync, stable))
        assert await start(tmp_path).will_ask_to_join("g", 7)
        assert stable[:2] == [(tmp_path / "peer-asked").stat().st_ino, tmp_path.stat().st_ino]

    async def test_what_cannot_be_written_is_not_asked(self, tmp_path: Path) -> None:
        peer = start(tmp_path)
        assert await peer.will_ask_to_join("g", 7)
        (tmp_path / "peer-asked.new").mkdir()  # where the new one is made
        assert not await peer.will_ask_to_join("g", 8)
        assert [of.asked_to_join("g") for of in (peer, start(tmp_path))] == [7, 7]
        assert await peer.will_ask_to_join("g", 7)

    @pytest.mark.parametrize("text", ["", "[1]", '{"g": "x"}', '{"g": null}', "\udcff"])
    def test_a_damaged_file_stops_the_node(self, tmp_path: Path, text: str) -> None:
        """Nobody knows what the peer may have been granted."""
        (tmp_path / "peer-asked").write_text(text, errors="surrogateescape")
        with pytest.raises(StartError, match="peer-asked is damaged"):
            start(tmp_path)

    def test_a_file_that_cannot_be_read_stops_the_node(self, tmp_path: Path) -> None:
        (tmp_path / "peer-asked").mkdir()
        with pytest.raises(StartError, match="peer-asked cannot be read"):
            start(tmp_path)


def noted(fsync: Callable[[int], None], stable: list[int]) -> Callable[[int], None]:
    """`fsync`, and which files and directories were made stable."""

    def note(fd: int) -> None:
        fsync(fd)
        stable.append(os.fstat(fd).st_ino)

    return note
