"""The wall clock can be set by anybody, so nothing is decided by it (row 16): where it is looked at all, for people."""

import ast
from pathlib import Path

import pytest

import stortrends_ha

# The modules in which it may be, and what they put the date on.
ALLOWED = {
    "arbiter/registers.py": "the history of registers",
    "cli/report.py": "how long ago something was verified",
    "dataplane/replica.py": "the history of lineages",
    "dataplane/verifying.py": "when something was verified",
    "logs.py": "lines of the log",
    "node/records.py": "the history of records",
    "storage/kept_file.py": "the names of files of what was kept",
}
# What modules `time` and `os` have of it; all of `datetime` counts, and so does a log's "asctime".
CLOCK = {
    "time",
    "time_ns",
    "localtime",
    "gmtime",
    "ctime",
    "asctime",
    "mktime",
    "strftime",
    "CLOCK_REALTIME",
    "CLOCK_TAI",
}
FILES = {f"{which}{unit}" for which in ("st_mtime", "st_ctime", "st_atime") for unit in ("", "_ns")}
FILES |= {"getmtime", "getctime", "getatime"}


def uses(source: str) -> set[str]:
    """The names by which a module looks at the wall clock."""
    found: set[str] = set()
    clocks = {"time"}  # names of the module; an event loop has a `time()`, too
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                found |= {"datetime" for name in names if name.name == "datetime"}
                clocks |= {name.asname for name in names if name.name == "time" and name.asname}
            case ast.ImportFrom("datetime"):
                found.add("datetime")
            case ast.ImportFrom("time", names):
                found |= {name.name for name in names} & CLOCK
            case ast.Attribute(ast.Name(of), name) if of in clocks and name in CLOCK:
                found.add(name)
            case ast.Attribute(_, name) if name in FILES:
                found.add(name)
            case ast.Constant(str(text)) if "%(asctime)" in text:
                found.add("asctime")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.time()",
        "import time as clock\nclock.time()",
        "import time\ntime.time_ns()",
        "from time import time\ntime()",
        "from time import strftime as now",
        "import time\ntime.clock_gettime(time.CLOCK_REALTIME)",
        "import datetime\ndatetime.datetime.now(datetime.UTC)",
        "from datetime import datetime\ndatetime.today()",
        "path.stat().st_mtime_ns",
        "os.path.getmtime(path)",
        "logging.Formatter('%(asctime)s')",
    ],
)
def test_a_use_is_found(source: str) -> None:
    assert uses(source)


@pytest.mark.parametrize("source", ["import time\ntime.monotonic()", "loop.time()", "boottime.now_ns()"])
def test_other_clocks_are_no_use(source: str) -> None:
    assert not uses(source)


def test_only_what_is_for_people_looks_at_the_wall_clock() -> None:
    root = Path(stortrends_ha.__file__).parent
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if uses(path.read_text())}
    assert found == set(ALLOWED)
