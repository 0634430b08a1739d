"""The units that are shipped are what systemd understands."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "systemd"
PROGRAM = "/opt/stortrends-ha/bin/stortrends-ha"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for unit in UNITS.iterdir():
        text = unit.read_text()
        assert PROGRAM in text or unit.suffix == ".timer"
        (tmp_path / unit.name).write_text(text.replace(PROGRAM, sys.executable))
    units = [str(tmp_path / unit.name.replace("@", "@node-a")) for unit in UNITS.iterdir()]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
