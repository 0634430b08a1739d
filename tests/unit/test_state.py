"""A node's durable state: written whole or not at all, damage is said, a lost cache is found."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stortrends_ha.errors import StorageError
from stortrends_ha.storage import state as state_module
from stortrends_ha.storage.state import ReplicaState, StateFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "groups" / "rg-a.json"


def load(path: Path) -> StateFile:
    return StateFile(path, "rg-a")


def boot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, boot_id: str) -> None:
    """The host boots: a file as the kernel's, with another content."""
    (tmp_path / "boot_id").write_text(boot_id + "\n")
    monkeypatch.setattr(state_module, "BOOT_ID", tmp_path / "boot_id")


# --- Kept -------------------------------------------------------------------------------------


def test_new_replica_has_the_initial_state_and_no_file(path: Path) -> None:
    file = load(path)
    assert file.state == ReplicaState()
    assert not path.exists()


def test_changes_are_kept(path: Path) -> None:
    file = load(path)
    file.update(settled_epoch=7, lineage="abc", needs_sync=True)
    file.update(lost_cache=True)
    again = load(path)
    assert again.state == file.state == ReplicaState("abc", settled_epoch=7, lost_cache=True, needs_sync=True)


def test_copying_of_everything_is_known_by_its_name_at_both_ends(path: Path) -> None:
    load(path).begin(filling="from-a", fills="to-b")
    assert (load(path).state.filling, load(path).state.fills) == ("from-a", "to-b")
    load(path).update(filling="")
    assert (load(path).state.filling, load(path).state.fills) == ("", "to-b")


def test_nothing_is_written_when_nothing_changes(path: Path) -> None:
    file = load(path)
    file.update(lineage="abc")
    before = path.stat().st_ino
    file.update(lineage="abc")
    assert path.stat().st_ino == before


def test_file_is_readable_by_people_and_says_whose_it_is(path: Path) -> None:
    load(path).update(lineage="abc")
    assert json.loads(path.read_text())["group"] == "rg-a"


# --- A lost cache -----------------------------------------------------------------------------


def test_restart_of_the_process_loses_no_cache(path: Path) -> None:
    load(path).begin(lineage="abc")
    assert not load(path).state.lost_cache


def test_restart_of_the_host_after_an_orderly_stop_loses_no_cache(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(path).begin(lineage="abc")
    load(path).update(boot_id="")  # everything is flushed
    boot(monkeypatch, tmp_path, "another")
    assert not load(path).state.lost_cache


def test_lost_cache_is_found_again_after_each_restart_of_the_host(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second", "third"):
        boot(monkeypatch, tmp_path, name)
        found = load(path)
        assert found.state.lost_cache == (name != "first")
        found.begin(lost_cache=False)


def test_cache_lost_by_a_restart_of_the_host_is_found_once(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(path).begin(lineage="abc")
    boot(monkeypatch, tmp_path, "another")
    found = load(path)
    assert found.state.lost_cache
    found.begin(needs_sync=True)  # the next session
    found.update(needs_sync=False, lost_cache=False)  # it has mended it
    assert not load(path).state.lost_cache  # the process was killed, the host was not


def test_lost_cache_stays_until_a_sync_mends_it(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(path).begin(lineage="abc")
    for boot_id in ("second", "second", "third"):
        boot(monkeypatch, tmp_path, boot_id)
        assert load(path).state.lost_cache
    load(path).update(boot_id="")
    assert load(path).state.lost_cache


def test_cache_is_lost_again_by_the_next_restart_of_the_host(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(path).begin(lineage="abc")
    boot(monkeypatch, tmp_path, "second")
    load(path).update(lost_cache=False)
    boot(monkeypatch, tmp_path, "third")
    assert load(path).state.lost_cache


# --- Killed at any step -----------------------------------------------------------------------

# Kills itself before the n-th call of anything outside of Python during an update.
KILLED = """
import os, signal, sys
from pathlib import Path
from stortrends_ha.storage.state import StateFile
path, kill_at = Path(sys.argv[1]), int(sys.argv[2])
file = StateFile(path, "rg-a")
calls = 0
def watch(frame, event, function):
    global calls
    if event == "c_call":
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
sys.setprofile(watch)
file.begin(settled_epoch=2, lineage="abc")
sys.setprofile(None)
print(calls)
"""


def update_in_a_child(path: Path, kill_at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", "-c", KILLED, str(path), str(kill_at)]
    root = str(Path(state_module.__file__).parents[2])
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": root}, check=False)


def steps_of_an_update(path: Path) -> int:
    done = update_in_a_child(path, 0)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("existing", [False, True])
def test_killed_at_any_step_the_old_or_the_new_state_is_there(tmp_path: Path, existing: bool) -> None:
    steps = steps_of_an_update(tmp_path / "dry-run" / "rg-a.json")
    outcomes = []
    # The calls around the file are the last ones; the many before them make the text.
    for kill_at in range(max(1, steps - 60), steps + 1):
        path = tmp_path / str(kill_at) / "rg-a.json"
        if existing:
            load(path).update(lineage="abc")
        assert update_in_a_child(path, kill_at).returncode == -signal.SIGKILL
        outcomes.append(load(path).state.settled_epoch)
        load(path).update(lineage="next")  # what was left over is in nobody's way
        assert load(path).state.lineage == "next"
    assert outcomes == [0] * outcomes.count(0) + [2] * outcomes.count(2)
    assert outcomes.count(0) > 5
    assert outcomes.count(2) > 0


def test_content_is_on_the_disk_before_its_name_and_its_name_before_update_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure cannot be made here, so the order of the system calls is looked at."""
    seen = list[str]()

    def watched(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            where = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[-1])
            seen.append(f"{name} {where.removeprefix(str(path.parent.parent)).lstrip('/')}")
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "mkdir"):
        monkeypatch.setattr(os, name, watched(name))
    load(path).update(lineage="abc")
    assert [step for step in seen if not step.startswith("mkdir")][:3] == [
        "fsync groups/rg-a.new",
        "replace groups/rg-a.json",
        "fsync groups",
    ]


def test_directory_that_was_made_is_made_durable_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power failure takes the whole directory back, and the node knows nothing of its replica."""
    synced = list[str]()
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    load(path).update(lineage="abc")
    assert str(path.parent.parent) in synced


# --- Damage -----------------------------------------------------------------------------------


def good() -> dict[str, Any]:
    return {
        "group": "rg-a",
        "settled_epoch": 1,
        "lineage": "abc",
        "boot_id": "x",
        "lost_cache": False,
        "needs_sync": False,
    }


def damaged(**changes: Any) -> str:
    return json.dumps({**good(), **changes})


def without(key: str) -> str:
    return json.dumps({name: value for name, value in good().items() if name != key})


@pytest.mark.parametrize(
    "text",
    [
        "", "\0" * 300, "{", "[]", "null", "1", "{}", json.dumps(good())[:-20], "[" * 100_000,
        damaged(group="rg-b"), damaged(settled_epoch="1"), damaged(settled_epoch=True), damaged(settled_epoch=None),
        damaged(lineage=None), damaged(filling=1), damaged(filling=None), damaged(fills=False),
        damaged(needs_sync=None),
        damaged(lost_cache=0), damaged(boot_id=1),
        *map(without, good()),
    ],
)  # fmt: skip
def test_damaged_file_is_said_to_be_damaged(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(StorageError) as raised:
        load(path)
    message = str(raised.value)
    assert message.startswith(f"group rg-a: its state {path} is damaged (")
    assert "restore the file" in message
    assert path.read_text() == text


def test_file_of_a_version_without_names_of_copyings_is_as_if_there_was_none(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(damaged(open=True))
    assert (load(path).state.filling, load(path).state.fills) == ("", "")


def test_file_of_a_version_that_kept_the_record_in_it_says_what_to_do(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(damaged(record={"epoch": 1, "owner": "node-a", "in_sync": ["node-a"]}))
    with pytest.raises(StorageError, match='kept the record in it: stop both nodes, take out "record"'):
        load(path)


def test_file_that_is_not_text_or_cannot_be_read_is_said(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(StorageError, match=rf"group rg-a: .*{path}"):
        load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match=rf"group rg-a: cannot read its state {path}: .*Is a directory"):
        load(path)


def test_state_that_cannot_be_written_is_said_and_not_taken_for_written(path: Path) -> None:
    file = load(path)
    path.parent.write_text("in the way")
    with pytest.raises(StorageError, match=f"group rg-a: cannot write its state {path}: "):
        file.update(lineage="abc")
    assert file.state.lineage == ""
    path.parent.unlink()
    file.update(lineage="abc")
    assert load(path).state.lineage == "abc"
