"""What a data process may say, and that nothing else gets through."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stortrends_ha.errors import ProtocolError
from stortrends_ha.node.messages import Counters, Done, Failed, Ready, Report, VolumeCounters, parse

STATUS: dict[str, Any] = {
    "type": "status",
    "group": "rg-a",
    "role": "primary",
    "state": "syncing",
    "why": "node-b is being synced",
    "epoch": 1,
    "owner": "node-a",
    "in_sync": ["node-a"],
    "session": True,
    "joinable": False,
    "peer_unfit": "",
    "owner_lineage": "",
    "comparison": None,
    "fit": {
        "lineage": "0" * 32,
        "blank": False,
        "lost_cache": False,
        "needs_sync": False,
        "settled_epoch": 0,
        "differs": False,
        "failure": "",
    },
    "serving": True,
    "cannot_listen": "",
    "endpoints": [["192.0.2.31", 40000, "192.0.2.21", 10809]],
    "link": {
        "state": "connected",
        "peer": "node-b",
        "address": "127.0.0.1:7802",
        "why": "",
        "round_trip_ms": None,
        "protocol": 1,
        "peer_version": "0.1.0",
    },
    "resync": {"done_bytes": 1, "total_bytes": 2, "copied_bytes": 1, "rate": 0.5, "why": "the link is full"},
    "verify": {
        "running": {
            "run": "1f",
            "repair": True,
            "source": "node-a",
            "done_bytes": 1,
            "total_bytes": 2,
            "copied_bytes": 1,
            "rate": 0.5,
            "why": "",
            "found_bytes": 65536,
        },
        "last": {
            "run": "1e",
            "repair": False,
            "source": "",
            "ended_s": 1.7e9,
            "why": "the link broke",
            "done_bytes": 1,
            "total_bytes": 2,
            "unreadable_bytes": 0,
            "volumes": {
                "vm-a": {"found_bytes": 65536, "found": [[0, 65536]], "repaired_bytes": 0, "left_bytes": 65536},
            },
        },
        "volumes": {"vm-a": {"verified_s": None, "differing_bytes": 65536, "ranges": [[0, 65536]]}},
    },
    "window": {"changes": 3, "bytes": 12288, "oldest_ms": 0.4},
    "clients": 2,
    "counters": dict.fromkeys(Counters.__annotations__, 0),
    "volumes": {
        "vm-a": {
            "size_bytes": 1 << 30,
            "read_only": False,
            "in_flight": 3,
            "intent_regions": 2,
            "dirty_bytes": 65536,
            "counters": dict.fromkeys(VolumeCounters.__annotations__, 0),
        }
    },
}


def line(message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"


def paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from paths(inner, (*path, key))


COMPARISON: dict[str, Any] = {
    "keep": True, "state": "done", "why": "", "file": "/kept", "done_bytes": 1, "total_bytes": 1, "differing_bytes": 1,
    "past": {"node-a": {"lineages": ["made here"], "records": []}},
    "volumes": {"vm-a": {"size_bytes": 1, "differing_bytes": 1, "ranges": [[0, 1]], "more_ranges": 0}},
}  # fmt: skip


def test_comparison_is_understood_or_refused_as_a_whole() -> None:
    report = parse(line({**STATUS, "comparison": COMPARISON}))
    assert isinstance(report, Report)
    assert report.status["comparison"] is not None
    assert dict(report.status["comparison"]) == COMPARISON
    for key, wrong in (("done_bytes", "1"), ("past", {"node-a": []}), ("volumes", {"vm-a": {}}), ("state", None)):
        with pytest.raises(ProtocolError, match=f"status.comparison.{key}"):
            parse(line({**STATUS, "comparison": {**COMPARISON, key: wrong}}))


def test_every_message_is_understood() -> None:
    assert parse(line({"type": "done", "id": 3, "error": ""})) == Done(3, "")
    assert parse(line({"type": "ready"})) == Ready()
    assert parse(line({"type": "failed", "message": "vm-a.img is missing."})) == Failed("vm-a.img is missing.")
    report = parse(line(STATUS))
    assert isinstance(report, Report)
    assert report.status == {key: value for key, value in STATUS.items() if key != "type"}


@pytest.mark.parametrize("path", list(paths(STATUS)), ids=".".join)
@pytest.mark.parametrize("wrong", [[[]], {"nonsense": {}}])
def test_a_status_with_any_value_of_a_wrong_type_is_refused(path: tuple[str, ...], wrong: object) -> None:
    message = copy.deepcopy(STATUS)
    inner = message
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = wrong
    with pytest.raises(ProtocolError):
        parse(line(message))


MAY_BE_MISSING = [("resync",), ("comparison",), ("verify", "running"), ("verify", "last")]


@pytest.mark.parametrize("path", [path for path in paths(STATUS) if path not in MAY_BE_MISSING and path[-1] != "vm-a"])
def test_a_status_without_any_of_its_keys_is_refused(path: tuple[str, ...]) -> None:
    message = copy.deepcopy(STATUS)
    inner = message
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(ProtocolError):
        parse(line(message))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_are_refused_and_nothing_else_happens(garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse(garbage)


def test_deeply_nested_json_is_refused() -> None:
    with pytest.raises(ProtocolError):
        parse(b"[" * 100_000)


@pytest.mark.parametrize("message", [[], 1, None, {}, {"type": "stop"}, {"type": []}, {"type": "failed"}])
def test_json_that_is_no_message_is_refused(message: object) -> None:
    with pytest.raises(ProtocolError):
        parse(line(message))
