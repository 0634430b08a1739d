"""What a node tells the service manager and the journal."""

import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stortrends_ha.notify import notify

LOG_A_WARNING = "import logging; from stortrends_ha import logs; logs.configure(); logging.warning('two\\nlines')"


def logged(environment: dict[str, str], stderr: Path) -> str:
    with stderr.open("wb") as file:
        clean = {key: value for key, value in os.environ.items() if key != "JOURNAL_STREAM"}
        subprocess.run([sys.executable, "-c", LOG_A_WARNING], env=clean | environment, stderr=file, check=True)
    return stderr.read_text()


def test_a_line_has_time_and_severity_in_words(tmp_path: Path) -> None:
    date, _, severity = logged({}, tmp_path / "log").splitlines()[0].split()[:3]
    assert (len(date), severity) == (len("2000-01-01"), "WARNING")


def test_a_line_for_the_journal_has_its_severity_and_no_time(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    stream = (tmp_path / "log").stat()
    environment = {"JOURNAL_STREAM": f"{stream.st_dev}:{stream.st_ino}"}
    assert logged(environment, tmp_path / "log") == "<4>two\n<4>lines\n"


def test_a_journal_that_is_not_stderr_changes_nothing(tmp_path: Path) -> None:
    assert "WARNING" in logged({"JOURNAL_STREAM": "1:2"}, tmp_path / "log")


LOG_MUCH = """
import logging, sys
from stortrends_ha import logs
logs.configure()
for number in range(3 * logs.LINES_MAX):
    logging.warning("line %d of a log that nobody reads for now", number)
print("done", flush=True)
sys.stdin.read()
logs.flush(60)
logging.warning("the last line")
"""


def test_a_log_that_nobody_takes_holds_nothing_up_and_what_is_lost_is_counted() -> None:
    pipe, command = subprocess.PIPE, [sys.executable, "-c", LOG_MUCH]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "done\n"  # it has logged all, and nobody has read any of it
        _, log = process.communicate("")
    *lines, last = log.splitlines()
    assert last.endswith("the last line")
    # Said each time that a line fits again: for as long as the pipe takes some, that may be more than once.
    dropped = [re.search(r"WARNING (\d+) lines of the log were dropped, as nobody took them\.", line) for line in lines]
    said = [int(match[1]) for match in dropped if match]
    assert said
    assert len(lines) - len(said) + sum(said) == 30_000


def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_the_service_manager_is_told_at_an_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"stortrends-ha-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify("STOPPING=1")
        assert manager.recv(100) == b"STOPPING=1"


def test_a_service_manager_that_is_gone_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    with caplog.at_level(logging.WARNING):
        notify("READY=1")
    assert "could not be told READY=1" in caplog.text
