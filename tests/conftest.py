"""What holds for all tests: hypothesis' profiles, and that continuous integration skips nothing.

The profile "ci" is the default everywhere; "fuzz" is for `make fuzz`.
"""

import os
import signal
from collections.abc import Generator

import pytest
from hypothesis import settings

# No deadlines: a busy machine is no bug. Every run tries new examples, so a failure prints how to repeat it.
settings.register_profile("ci", deadline=None, derandomize=False, print_blob=True)
settings.register_profile("fuzz", settings.get_profile("ci"), max_examples=5000)
settings.load_profile("ci")

# A shell that starts the tests in the background lets them ignore SIGINT, and all that they start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

IN_CI = os.environ.get("CI", "").lower() in ("true", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not hasattr(report, "wasxfail"):  # pytest counts an expected failure as skipped, too
        _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report)
    return report


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if IN_CI and report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"Nothing may be skipped in CI. {reason}"
