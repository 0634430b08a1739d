"""What a node keeps of its groups: what is not understood is not guessed."""

import asyncio
from pathlib import Path

import pytest

from stortrends_ha.cluster.view import Saved
from stortrends_ha.errors import StartError
from stortrends_ha.node.records import Records
from stortrends_ha.record import Record

NODES = ("node-a", "node-b")


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    records, saved = Records(tmp_path), Saved(Record(7, "node-b", NODES), 5)
    assert records.load("rg-a", "node-a", NODES) == Saved(Record(1, "node-a", ("node-a",)), 0)
    asyncio.run(records.save("rg-a", saved))
    assert records.load("rg-a", "node-a", NODES) == saved
    assert records.load("rg-b", "node-b", NODES) == Saved(Record(1, "node-b", ("node-b",)), 0)


def test_the_history_says_how_each_record_came_about(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for epoch, why in ((7, ""), (8, "the operator overrides")):
        asyncio.run(records.save("rg-a", Saved(Record(epoch, "node-b", NODES), 5, why)))
    lines = (tmp_path / "records" / "rg-a.history").read_text().splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        "epoch 7: node-b owns, in sync node-a and node-b",
        "epoch 8: node-b owns, in sync node-a and node-b, because the operator overrides",
    ]


@pytest.mark.parametrize("in_sync", [("node-x",), ("node-a", "node-x")])
def test_a_record_with_a_node_that_there_is_not_is_damaged(tmp_path: Path, in_sync: tuple[str, ...]) -> None:
    records = Records(tmp_path)
    asyncio.run(records.save("rg-a", Saved(Record(7, in_sync[0], in_sync), 5)))
    with pytest.raises(StartError, match=r"is damaged .the cluster file has no node node-x: was one renamed"):
        records.load("rg-a", "node-a", NODES)
