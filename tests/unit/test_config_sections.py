"""What nodes compare of their cluster files: each part has a digest of its own, and the key's path is none of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stortrends_ha.config import BINDING, Address, Cluster, Failover, Witness, load, sections

KEY = b"k" * 32
EXAMPLE = load(Path(__file__).parents[2] / "config" / "cluster.example.yaml")


def differing(**changes: Any) -> set[str]:
    here, there = sections(EXAMPLE, KEY), sections(replace(EXAMPLE, **changes), KEY)
    return {name for (name, one), (_, other) in zip(here, there, strict=True) if one != other}


def groups() -> dict[str, Any]:
    name, group = next(iter(EXAMPLE.groups.items()))
    return {**EXAMPLE.groups, name: replace(group, preferred_owner="somebody else")}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, set()),
        ({"key_file": dict.fromkeys(EXAMPLE.nodes, Path("/elsewhere"))}, set()),
        ({"arbiter": Witness(Address("192.0.2.99", 7801))}, {"arbiter"}),
        ({"failover": Failover(lease_s=1.3)}, {"timing"}),
        ({"failover": replace(EXAMPLE.failover, hold_down_s=3.0)}, {"groups"}),
        ({"limits": replace(EXAMPLE.limits, connections=3)}, {"limits"}),
        ({"limits": replace(EXAMPLE.limits, dirty_block=4096)}, {"limits"}),
        ({"groups": groups()}, {"groups"}),
        ({"nodes": dict(list(EXAMPLE.nodes.items())[:1])}, {"nodes"}),
    ],
)
def test_each_part_has_a_digest(changes: dict[str, Any], names: set[str]) -> None:
    assert differing(**changes) == names


def test_what_could_make_two_owners_is_binding() -> None:
    assert set(BINDING) < {name for name, _ in sections(EXAMPLE, KEY)}


def test_two_nodes_that_read_the_same_file_have_the_same() -> None:
    again: Cluster = load(Path(__file__).parents[2] / "config" / "cluster.example.yaml")
    assert sections(again, KEY) == sections(EXAMPLE, KEY)
    assert all(one != other for one, other in zip(sections(again, KEY), sections(again, b"x" * 32), strict=True))
