"""What a supervisor may say to a data process, and that nothing else is taken for it."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stortrends_ha.config import Address
from stortrends_ha.dataplane.commands import (
    Compare,
    Drop,
    EndCompare,
    EndVerify,
    Follow,
    GiveUp,
    Idle,
    Lead,
    Lease,
    Release,
    Show,
    Stop,
    Verify,
    parse,
)
from stortrends_ha.errors import ProtocolError
from stortrends_ha.record import Record

RECORD = Record(3, "node-a", ("node-a", "node-b"))
LEAD: dict[str, Any] = {
    "type": "lead", "id": 7, "record": RECORD.encode(), "not_before_ns": 5, "forced": False, "clears_loss": True,
}  # fmt: skip
VERIFY: dict[str, Any] = {
    "type": "verify", "id": 8, "run": "1f", "volumes": ["vm-a", "vm-b"], "repair": True, "source": "node-a",
}  # fmt: skip


def line(message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"


@pytest.mark.parametrize(
    ("message", "command"),
    [
        ({"type": "follow", "id": 1, "record": RECORD.encode()}, Follow(1, RECORD)),
        (LEAD, Lead(7, RECORD, 5, False, True)),
        ({"type": "idle", "id": 2}, Idle(2)),
        ({"type": "release", "id": 3}, Release(3)),
        (VERIFY, Verify(8, "1f", ("vm-a", "vm-b"), True, "node-a")),
        ({"type": "end_verify", "id": 9}, EndVerify(9)),
        ({"type": "give-up", "id": -1}, GiveUp(-1)),
        ({"type": "compare", "id": -2, "keep": True}, Compare(-2, True)),
        ({"type": "show", "id": -4, "host": "::1", "port": 10899}, Show(-4, Address("::1", 10899))),
        ({"type": "end-compare", "id": -3}, EndCompare(-3)),
        ({"type": "lease", "until_ns": 1 << 60}, Lease(1 << 60)),
        ({"type": "drop"}, Drop()),
        ({"type": "stop"}, Stop()),
    ],
)
def test_each_command_is_understood(message: object, command: object) -> None:
    assert parse(line(message)) == command


@pytest.mark.parametrize(
    ("command", "key"), [(command, key) for command in (LEAD, VERIFY) for key in command if key != "type"]
)
@pytest.mark.parametrize("wrong", [None, {"x": 1}, [[]], 1.5])
def test_command_with_anything_wrong_or_missing_is_refused(command: dict[str, Any], key: str, wrong: object) -> None:
    for message in ({**command, key: wrong}, {name: value for name, value in command.items() if name != key}):
        with pytest.raises(ProtocolError, match="a command that cannot be understood"):
            parse(line(message))


@pytest.mark.parametrize("message", [1, [], None, {}, {"type": "sing", "id": 1}, {"type": "idle"}, {"type": ["stop"]}])
def test_what_is_no_command_is_refused(message: object) -> None:
    with pytest.raises(ProtocolError):
        parse(line(message))


@given(st.binary(max_size=100))
def test_noise_is_refused(noise: bytes) -> None:
    """Unless it happens to be a command, of which the shortest ones are found now and then."""
    with suppress(ProtocolError):
        assert isinstance(parse(noise), Drop | Stop)
