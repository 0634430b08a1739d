"""The witness's registers: what is granted, what is kept, and what damage looks like."""

import sqlite3
from pathlib import Path

import pytest

from stortrends_ha.arbiter import registers
from stortrends_ha.arbiter.registers import Registers, judge
from stortrends_ha.errors import StorageError
from stortrends_ha.protocol.witness import Answer, Force, Propose, Read, Seed
from stortrends_ha.record import Record

R1 = Record(1, "node-a", ("node-a",))
R2 = R1.joined_by("node-b")
R3 = R2.owned_alone("node-b")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "witness.db"


def history(path: Path) -> list[tuple[int, str, str]]:
    with sqlite3.connect(path) as database:
        rows = database.execute('SELECT epoch, who, note FROM history WHERE "group" = ? ORDER BY id', ("g",)).fetchall()
    database.close()
    return rows


class TestJudge:
    @pytest.mark.parametrize(
        ("current", "change", "granted"),
        [
            (R1, Propose("g", R1, R2), True),
            (R2, Propose("g", R1, R2), True),  # asked twice
            (R3, Propose("g", R1, R2), False),
            (None, Propose("g", R1, R2), False),
            (R2, Propose("g", R1, R1.owned_alone("node-b")), False),
            (R1, Propose("g", R1, R3), False),  # not the next
            (None, Seed("g", R2), True),
            (R2, Seed("g", R2), True),
            (R1, Seed("g", R2), False),
            (None, Force("g", R3, ""), True),
            (R1, Force("g", R3, ""), True),
            (R3, Force("g", R3, ""), True),
            (R3, Force("g", R2, ""), False),
            (R2, Force("g", R1.owned_alone("node-b"), ""), False),
        ],
    )
    def test_judge(self, current: Record | None, change: Propose | Seed | Force, granted: bool) -> None:
        new = change.new if isinstance(change, Propose) else change.record
        answer, record = judge(current, change)
        assert answer == (Answer("granted") if granted else Answer("refused", current))
        assert record == (new if granted and current != new else None)


class TestRegisters:
    def test_kept_over_a_new_start(self, path: Path) -> None:
        first = Registers(path)
        assert first.carry_out("c", "node-a", Seed("g", R1)) == Answer("granted")
        assert first.carry_out("c", "node-a", Propose("g", R1, R2)) == Answer("granted")
        second = Registers(path)  # the first one is not even closed
        assert second.carry_out("c", "node-b", Read("g")) == Answer("known", R2)
        first.close()
        second.close()

    def test_clusters_and_groups_are_separate(self, path: Path) -> None:
        found = Registers(path)
        found.carry_out("c", "node-a", Seed("g", R1))
        assert found.carry_out("d", "node-a", Read("g")) == Answer("known", None)
        assert found.carry_out("c", "node-a", Read("h")) == Answer("known", None)
        found.close()

    def test_history(self, path: Path) -> None:
        found = Registers(path)
        found.carry_out("c", "node-a", Seed("g", R1))
        found.carry_out("c", "node-b", Propose("g", R1, R2))
        found.carry_out("c", "node-b", Propose("g", R1, R2))
        found.carry_out("c", "node-a", Propose("g", R1, R2.owned_alone("x")))
        found.carry_out("c", "node-a", Force("g", R3, "node-a burnt down"))
        found.close()
        assert history(path) == [
            (1, "node-a", "seeded"), (2, "node-b", "granted"), (3, "node-a", "forced: node-a burnt down"),
        ]  # fmt: skip

    def test_history_is_bounded_and_keeps_the_newest(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registers, "HISTORY_PER_GROUP", 5)
        found, record = Registers(path), R1
        found.carry_out("c", "node-a", Seed("g", R1))
        for _ in range(9):
            old, record = record, record.owned_alone("node-a")
            found.carry_out("c", "node-a", Propose("g", old, record))
            found.carry_out("c", "node-a", Seed(f"other-{record.epoch}", R1))
        found.close()
        assert [epoch for epoch, _, _ in history(path)] == [6, 7, 8, 9, 10]

    def test_groups_are_bounded(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registers, "GROUPS_PER_CLUSTER", 2)
        found = Registers(path)
        answers = [found.carry_out("c", "node-a", Seed(group, R1)).kind for group in ("g", "h", "i")]
        assert answers == ["granted", "granted", "error"]
        assert found.carry_out("c", "node-a", Propose("g", R1, R2)) == Answer("granted")
        assert found.carry_out("d", "node-a", Seed("g", R1)) == Answer("granted")
        found.close()

    def test_an_operator_who_reads_for_too_long_gets_no_false_answers(self, path: Path) -> None:
        found = Registers(path)
        found.carry_out("c", "node-a", Seed("g", R1))
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM history").fetchall()
        with pytest.raises(StorageError, match="locked"):
            found.carry_out("c", "node-a", Propose("g", R1, R2))
        reader.close()
        assert found.carry_out("c", "node-a", Read("g")) == Answer("known", R1)
        assert found.carry_out("c", "node-a", Propose("g", R1, R2)) == Answer("granted")
        found.close()


class TestDamage:
    def make(self, path: Path) -> None:
        found = Registers(path)
        record = R1
        found.carry_out("c", "node-a", Seed("g", R1))
        for _ in range(50):
            old, record = record, record.owned_alone("node-a")
            found.carry_out("c", "node-a", Propose("g", old, record))
        found.close()

    @pytest.mark.parametrize("at", [0, 4096, 8192])
    def test_overwritten(self, path: Path, at: int) -> None:
        self.make(path)
        content = bytearray(path.read_bytes())
        content[at : at + 200] = b"\xff" * 200
        path.write_bytes(content)
        with pytest.raises(StorageError, match=r"witness\.db are damaged.*Move the file away"):
            Registers(path).open()

    def test_cut_short(self, path: Path) -> None:
        self.make(path)
        path.write_bytes(path.read_bytes()[:6000])
        with pytest.raises(StorageError, match="damaged"):
            Registers(path).open()

    def test_no_record_in_it(self, path: Path) -> None:
        self.make(path)
        with sqlite3.connect(path) as database:
            database.execute("UPDATE registers SET record = 'x'")
        database.close()
        with pytest.raises(StorageError, match="damaged"):
            Registers(path).carry_out("c", "node-a", Read("g"))

    def test_of_a_newer_version(self, path: Path) -> None:
        self.make(path)
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 7")
        database.close()
        with pytest.raises(StorageError, match="form 7"):
            Registers(path).open()
