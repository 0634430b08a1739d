"""`verify`: which groups and volumes are meant, what is told at the end, which exit code it is."""

from pathlib import Path
from typing import Any

import pytest
from test_cli_status import CONFIG

from stortrends_ha.cli import verify
from stortrends_ha.cli.main import main
from stortrends_ha.config import Cluster, load
from stortrends_ha.errors import ConfigError

BLOCK = 64 << 10
TWO = """
  rg-b:
    preferred_owner: node-b
    nbd: 127.0.0.1:10810
    link_ports: {{node-a: 7803, node-b: 7804}}
    volumes:
      vm-b: {{size: 1GiB, backing: {{node-a: ba.img, node-b: bb.img}}}}
      vm-c: {{size: 1GiB, backing: {{node-a: ca.img, node-b: cb.img}}}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text((CONFIG.rstrip() + TWO).format(dir=tmp_path))
    return path


@pytest.fixture
def cluster(config: Path) -> Cluster:
    return load(config)


def outcome(why: str = "", **of: Any) -> dict[str, Any]:
    volume = {"found_bytes": 0, "found": [], "repaired_bytes": 0, "left_bytes": 0} | of
    return {"why": why, "done_bytes": 1 << 29, "total_bytes": 1 << 30, "volumes": {"vm-a": volume}}


def test_groups_and_volumes_are_found_by_name_and_each_is_verified_once(cluster: Cluster, config: Path) -> None:
    assert verify._wanted(cluster, config, ["rg-b", "vm-b", "vm-a"]) == {"rg-b": ["vm-b", "vm-c"], "rg-a": ["vm-a"]}
    assert verify._wanted(cluster, config, ["vm-c"]) == {"rg-b": ["vm-c"]}
    with pytest.raises(ConfigError, match="no group and no volume 'vm-d'; its groups are: rg-a, rg-b"):
        verify._wanted(cluster, config, ["vm-d"])


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (outcome(), 0),
        (outcome(found_bytes=BLOCK, repaired_bytes=BLOCK), 0),
        (outcome(found_bytes=BLOCK, left_bytes=BLOCK), 2),
        (outcome("the link broke"), 1),
        (outcome("the link broke", found_bytes=BLOCK, left_bytes=BLOCK), 1),
        ({"error": "No."}, 1),
    ],
)
def test_exit_codes(found: dict[str, Any], code: int) -> None:
    assert verify._code(found) == code


def test_what_differs_is_told_with_what_to_do(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    found = [[0, BLOCK], [1 << 20, 4 * BLOCK]]
    told = outcome(found_bytes=9 * BLOCK, found=found, repaired_bytes=2 * BLOCK, left_bytes=7 * BLOCK)
    verify._tell(cluster, "rg-a", told)
    assert capsys.readouterr().out.splitlines() == [
        "vm-a: 576 KiB differed, in blocks of 64 KiB:",
        "  64 KiB at byte 0",
        "  256 KiB at byte 1048576",
        "  and 256 KiB more",
        "vm-a: 128 KiB were repaired, stable on both nodes, and are the same now.",
        "vm-a: 448 KiB differ, as far as it is known. To repair them, say whose data counts: "
        "stortrends-ha verify vm-a --repair --from NODE (node-a or node-b)",
    ]


def test_a_verify_that_ended_early_does_not_say_that_all_is_the_same(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    verify._tell(cluster, "rg-a", outcome("the link broke"))
    said = capsys.readouterr()
    assert said.out == ""
    assert "ended when 512 MiB of 1 GiB were compared: the link broke. Begin again" in said.err


def test_a_node_that_does_not_run_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "vm-b", "--config", str(config)]) == 1
    assert "it is not running" in capsys.readouterr().err
