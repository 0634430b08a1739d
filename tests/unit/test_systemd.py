"""The units of `systemd/`: our own command line understands what they run, and systemd understands them."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from stortrends_ha.cli import main as cli

ALL = sorted((Path(__file__).parents[2] / "systemd").iterdir())
UNITS = [unit for unit in ALL if unit.suffix == ".service"]
PROGRAM = "/opt/stortrends-ha/bin/stortrends-ha"
INSTANCE = "node-a"
ANALYZE = shutil.which("systemd-analyze")


def commands(unit: Path) -> dict[str, list[str]]:
    """What the unit runs, by its key; of an instance."""
    found = {}
    for line in unit.read_text().splitlines():
        key, _, command = line.partition("=")
        if key.startswith("Exec"):
            assert key not in found
            found[key] = shlex.split(command.lstrip("-").replace("%i", INSTANCE))
    return found


def test_there_are_units() -> None:
    assert [unit.name for unit in ALL] == [
        "stortrends-ha-verify.service",
        "stortrends-ha-verify.timer",
        "stortrends-ha-witness.service",
        "stortrends-ha@.service",
    ]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_what_it_runs_is_a_command_of_ours(unit: Path) -> None:
    ran = commands(unit)
    assert "ExecStart" in ran
    for program, *arguments in ran.values():
        assert program == PROGRAM
        cli._parser().parse_args(arguments)


def test_a_node_and_its_clean_up_are_of_the_same_node() -> None:
    ran = commands(UNITS[-1])
    assert set(ran) == {"ExecStart", "ExecStopPost"}
    node, clean_up = (cli._parser().parse_args(command[1:]) for command in ran.values())
    assert (node.run, clean_up.run) == (cli._node, cli._release_addresses)
    assert (node.config, node.name) == (clean_up.config, clean_up.name) == (cli.DEFAULT_CONFIG, INSTANCE)


if ANALYZE is not None:

    def test_systemd_has_nothing_to_say_about_them(tmp_path: Path) -> None:
        """But that the program is not installed: here it is something else that is."""
        assert ANALYZE is not None
        copies = [tmp_path / unit.name for unit in ALL]
        for unit, copy in zip(ALL, copies, strict=True):
            copy.write_text(unit.read_text().replace(PROGRAM, "/bin/true"))
        environment = {**os.environ, "SYSTEMD_LOG_LEVEL": "info"}
        done = subprocess.run(
            [ANALYZE, "verify", "--man=no", *copies], env=environment, capture_output=True, text=True, check=False
        )
        said = [line for line in done.stderr.splitlines() if "stortrends-ha" in line]
        assert (done.returncode, said) == (0, [])
