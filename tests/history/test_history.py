"""The checker, compared with a brute-force one, and with large histories that are right, or wrong in one place."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .brute_force import is_possible
from .check import check
from .contents import BLOCK_BYTES, Contents
from .generator import Generated, generate
from .operations import FOREIGN, ZEROES, Entry, History, Loss, Note, Operation, from_line, to_line

LARGE = 100_000
# Of processor time: about 2 s, but a busy machine may be slow.
LARGE_S = 20.0
MOMENTS = 16


@st.composite
def histories(draw: st.DrawFn, losses: int) -> History:
    """Up to seven operations on one block. Most reads find what was written by one that began before they ended."""
    entries: list[Operation | Loss] = []
    moments = st.integers(1, MOMENTS)
    writes: list[Operation] = []
    for number in range(draw(st.integers(1, 7))):
        begin, end = sorted((draw(moments), draw(moments)))
        kind = draw(st.sampled_from(["write", "write", "read", "read", "read", "zero", *["flush"] * bool(losses)]))
        one = Operation(kind, number, begin, end)
        if kind == "write":
            one.value = number + 1
        if kind in ("write", "zero"):
            one.fua = draw(st.integers(0, 3)) == 0
            one.end = None if draw(st.integers(0, 3)) == 0 else end
            writes.append(one)
        entries.append(one)
    values = [ZEROES, *(one.value for one in writes)]
    for entry in entries:
        if isinstance(entry, Operation) and entry.kind == "read":
            early = [one.value for one in writes if one.begin <= (entry.end or 0)]
            entry.found = [draw(st.sampled_from(early * 3 + values))]
    for _ in range(losses):
        at = draw(moments)
        entries.append(Loss(at, at, draw(st.integers(0, 3)) == 0))
    return History.of(entries)


def assert_alike(history: History) -> None:
    problems = check(history)
    assert bool(problems) != is_possible(history), "\n".join([*map(to_line, history.operations), *problems])


@settings(max_examples=1500)
@given(histories(losses=0))
def test_it_says_what_brute_force_says(history: History) -> None:
    assert_alike(history)


@settings(max_examples=1500)
@given(histories(losses=1))
def test_it_says_what_brute_force_says_about_a_loss_of_power(history: History) -> None:
    assert_alike(history)


@settings(max_examples=500)
@given(histories(losses=2))
def test_it_says_what_brute_force_says_about_two(history: History) -> None:
    assert_alike(history)


@pytest.fixture(scope="module")
def large() -> Generated:
    return generate(random.Random(1), LARGE, losses=3)


def test_large_history_is_accepted_within_seconds(large: Generated) -> None:
    began_s = time.process_time()
    assert check(large.history()) == []
    assert time.process_time() - began_s < LARGE_S
    assert sum(not one.answered for one in large.history().operations) > 100


@pytest.mark.parametrize("seed", range(20))
def test_right_history_is_accepted(seed: int) -> None:
    assert check(generate(random.Random(seed), 2000, blocks=6, losses=seed % 4).history()) == []


@pytest.mark.parametrize(
    ("mutate", "says"),
    [
        (Generated.stale_read, "been there"),
        (Generated.lost_write, "been there"),
        (Generated.read_from_the_future, "found before it was written"),
        (Generated.torn_block, "torn"),
        (Generated.lost_flushed_write, "though"),
    ],
)
@pytest.mark.parametrize("seed", range(8))
def test_history_with_one_mistake_is_refused(
    mutate: Callable[[Generated, random.Random], int], says: str, seed: int
) -> None:
    rng = random.Random(seed)
    generated = generate(rng, 3000, blocks=6, losses=1)
    block = mutate(generated, rng)
    problems = check(generated.history())
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"block {block}: ")
    assert says in problems[0]
    assert len(problems[0].splitlines()) <= 8  # short enough to read


def test_one_mistake_in_a_large_history_is_found() -> None:
    spoilt = generate(random.Random(2), LARGE, losses=3)
    block = spoilt.stale_read(random.Random(2))
    assert [problem.split(":")[0] for problem in check(spoilt.history())] == [f"block {block}"]


def test_counterexample_is_readable() -> None:
    history = History.of(
        [
            Operation("write", 1, 10**9, 2 * 10**9, block=3, count=2, value=1 << 32 | 1),
            Note("node-a is killed", 25 * 10**8),
            Operation("write", 2, 3 * 10**9, 4 * 10**9, block=3, value=2 << 32 | 1, fua=True),
            Operation("write", 2, 3 * 10**9, None, block=3, value=2 << 32 | 2),
            Operation("read", 1, 5 * 10**9, 6 * 10**9, block=3, found=[1 << 32 | 1]),
        ]
    )
    assert check(history) == [
        "block 3: 2#1 must have been there while 1#1 was there without a break\n"
        "     0.000000    1.000000  client 1: write 3-4 = 1#1\n"
        "     1.500000              node-a is killed\n"
        "     2.000000    3.000000  client 2: write 3 = 2#1 FUA\n"
        "     4.000000    5.000000  client 1: read 3 found 1#1"
    ]


def test_blocks_of_a_request_are_registers_of_their_own() -> None:
    history = History.of(
        [
            Operation("zero", 1, 0, 1, count=2),
            Operation("write", 1, 2, 9, count=2, value=5),
            Operation("read", 2, 3, 4, count=2, found=[5, ZEROES]),
        ]
    )
    assert check(history) == []


def test_value_that_was_written_twice_is_refused() -> None:
    history = History.of(Operation("write", client, 1, 2, value=5) for client in (1, 2))
    assert "written twice" in check(history)[0]


def test_contents_tell_values_tears_and_what_is_foreign() -> None:
    contents = Contents(run=7)
    one, other = contents.write(3, 11), contents.write(3, 12)
    assert contents.read(3, one) == 11
    assert contents.read(3, bytes(BLOCK_BYTES)) == ZEROES
    assert contents.read(4, one) == Contents(run=8).read(3, one) == FOREIGN
    assert contents.read(3, one[:512] + other[512:]) == [11, 12]
    assert contents.read(3, other[:-512] + bytes(512)) == [12, ZEROES]


def test_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    entries: list[Entry] = [
        Operation("write", 1, 10, 20, value=5, fua=True),
        Operation("read", 1, 30, 40, found=[[5, ZEROES]]),
        Operation("read", 2, 30, None),
        Loss(50, 60),
        Note("all is on again", 60),
    ]
    lines = [to_line(entry) for entry in entries]
    assert [from_line(line) for line in lines] == entries
    path = tmp_path / "history.jsonl"
    path.write_text("\n".join(lines))
    command = [sys.executable, "-m", "tests.history.check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1, done.stderr
    assert "block 0: torn: 0#5, zeroes in one block" in done.stdout
    path.write_text(lines[0])
    assert subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[2]).returncode == 0
