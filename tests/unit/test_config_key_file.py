"""The cluster's key file: in which ways a key can be written, and what is said of a file that will not do."""

import base64
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stortrends_ha.config import read_key
from stortrends_ha.config.key_file import FILE_BYTES_MAX
from stortrends_ha.errors import ConfigError

KEY = bytes(range(160, 200))
MAKE = "head -c 32 /dev/urandom | base64 > {path}; chmod 600 {path}"


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def problem_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_key(path)
    (problem,) = caught.value.problems
    assert str(path) in problem
    assert problem.isprintable()
    return problem


@pytest.mark.parametrize(
    "content",
    [
        KEY,
        KEY.hex().encode(),
        KEY.hex().upper().encode() + b"\n",
        KEY.hex(" ", 2).encode(),
        base64.b64encode(KEY),
        base64.encodebytes(KEY).replace(b"\n", b"\r\n"),
    ],
)
def test_a_key_is_the_same_however_it_is_written(tmp_path: Path, content: bytes) -> None:
    assert read_key(write(tmp_path / "key", content)) == KEY


@given(key=st.binary(min_size=32, max_size=32))
def test_every_key_can_be_written_as_hex_and_as_base64(tmp_path_factory: pytest.TempPathFactory, key: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "key"
    for content in (key.hex().encode(), base64.b64encode(key)):
        assert read_key(write(path, content)) == key


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_its_owner_may_do_anything(tmp_path: Path, mode: int) -> None:
    assert read_key(write(tmp_path / "key", KEY, mode)) == KEY


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666])
def test_a_file_that_is_open_to_others_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    problem = problem_of(write(tmp_path / "key", KEY, mode))
    assert f"mode {mode:04o}" in problem
    assert f"chmod 600 {tmp_path}/key" in problem


def test_a_missing_file_is_named_with_how_to_make_it(tmp_path: Path) -> None:
    problem = problem_of(tmp_path / "key")
    assert problem.startswith(f"The key file {tmp_path}/key does not exist. ")
    assert MAKE.format(path=tmp_path / "key") in problem
    assert "the other node and the witness" in problem


def test_how_to_make_it_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert os.system(problem_of(path).split("`")[1]) == 0
    assert len(read_key(path)) == 32


@pytest.mark.parametrize("length", [0, 1, 31])
def test_a_short_key_is_refused_however_it_is_written(tmp_path: Path, length: int) -> None:
    key = KEY[:length]
    for content in (key, key.hex().encode(), base64.b64encode(key)):
        assert "expected at least 32. Make a key with" in problem_of(write(tmp_path / "key", content))


@pytest.mark.parametrize("text", ["change me, change me, change me, change me", "x" * 33, "Jürgen" * 10, "- " * 40])
def test_text_that_is_no_key_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    content = text.encode("ascii", "ignore")
    problem = problem_of(write(tmp_path / "key", content))
    assert "neither hex nor base64" in problem
    assert text not in problem


@pytest.mark.parametrize("size", [FILE_BYTES_MAX + 1, 1 << 20])
def test_a_large_file_is_refused(tmp_path: Path, size: int) -> None:
    assert f"larger than {FILE_BYTES_MAX} bytes" in problem_of(write(tmp_path / "key", b"a" * size))


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "directory").mkdir(mode=0o700)
    for name in ("fifo", "directory"):
        assert "is not a regular file" in problem_of(tmp_path / name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert "cannot be read: No such device or address" in problem_of(tmp_path / "socket")


def test_a_link_to_a_key_will_do(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(write(tmp_path / "key", KEY))
    assert read_key(tmp_path / "link") == KEY


def test_a_path_that_no_file_can_have_is_a_sentence(tmp_path: Path) -> None:
    assert "cannot be read: File name too long" in problem_of(tmp_path / ("x" * 300))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(tmp_path / "nul\0")
