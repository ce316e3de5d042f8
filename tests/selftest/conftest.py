"""The fixture of the modules that run pytest inside pytest; each of them activates `pytester`."""

import signal

import pytest
import rich.console
import rich.table  # noqa: F401
import scipy.stats  # noqa: F401  # here once: what is first imported in an inner run is imported in each

from selftest.fakes.inner import Run, Suite, read_junit
from selftest.fakes.matrix import MATRIX, make_suite

# Started in the background of a shell, or by nohup: children would inherit it, and tests that end runs could not end them.
for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _default)


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Runs the measured tests with the fake engine; `apart=True` in a process of its own, `controls=True` with
    seeded controls beside what the test is about."""
    for name in ("CI", "GITHUB_STEP_SUMMARY", "PYTEST_ADDOPTS", "QUANTDET_INJECT", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)

    def run(*args: str, matrix: str = MATRIX, apart: bool = False, machine: str = "", controls: bool = False) -> Run:
        make_suite(pytester.path, matrix, machine)
        # Inner runs need no plugin but the suite's, and xdist where there are workers: a quarter of a second each.
        with monkeypatch.context() as patch:
            if not apart:
                patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
            return started(args if controls else (*args, "--no-controls"), apart)

    def started(args: tuple[str, ...], apart: bool) -> Run:
        report = pytester.path / "report.xml"
        report.unlink(missing_ok=True)
        start = pytester.runpytest_subprocess if apart else pytester.runpytest_inprocess
        result = start(f"--junitxml={report}", *args)
        cases, properties = read_junit(report) if report.is_file() else ({}, {})
        return Run(int(result.ret), result.stdout.str() + "\n" + result.stderr.str(), cases, properties)

    return run
