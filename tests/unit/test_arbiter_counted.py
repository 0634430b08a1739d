"""What strangers cause is counted, and fills no log."""

import logging

import pytest

from stortrends_ha.arbiter import counted
from stortrends_ha.arbiter.counted import Counted

log = logging.getLogger("test")


def test_the_first_of_each_kind_is_logged_the_others_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    found = Counted(log)
    for number in range(100):
        found.add("garbage", f"garbage {number}")
        found.add("timeouts", f"slow {number}")
    assert [record.message for record in caplog.records] == ["garbage 0", "slow 0"]
    assert found["garbage"] == found["timeouts"] == 100
    assert str(found) == "garbage: 100, timeouts: 100"


def test_what_was_not_logged_is_said_later(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Counted(log)
    for _ in range(4):
        found.add("garbage", "garbage")
    monkeypatch.setattr(counted, "QUIET_S", 0.0)
    found.add("garbage", "garbage")
    assert [record.message for record in caplog.records] == [
        "garbage", "garbage (and 3 more since the last line of this kind)",
    ]  # fmt: skip
