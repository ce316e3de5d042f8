"""Runs pytest in forks of a process that has imported the slow libraries once: a second a mutant instead of three.

The server imports nothing of the suite, so that each fork imports the suite from the copy that it runs in.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 120
_LIBRARIES = (
    "filelock", "hypothesis", "hypothesis.strategies", "ml_dtypes", "numpy", "packaging.version", "pydantic", "pytest",
    "rich.console", "rich.table", "safetensors.numpy", "scipy.special", "scipy.stats", "xml.etree.ElementTree",
)  # fmt: skip
# Of the run that the self-tests are in, which measures nothing: to read what is shipped takes a third of a second.
_SMALL = ("--matrix=small.toml", "--reference=nothing")


@dataclass(frozen=True)
class Outcome:
    """What a run of pytest says of itself; `failures`: first lines of what failed, `errors`: of what broke elsewhere."""

    code: int
    tests: int
    failures: tuple[str, ...]
    errors: tuple[str, ...]
    skipped: int
    output: str


class Warm:
    """The server's handle; `run` blocks. One run at a time."""

    def __init__(self) -> None:
        # Hypothesis has a profile for CI, which it chooses when it is imported: the same examples in every run.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "QUANTDET_"))}
        environment |= {"CI": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def run(self, root: Path, tests: list[str]) -> Outcome:
        """Run `tests` (node ids, at least one: without any, pytest would measure) in the checkout `root`."""
        assert tests
        assert self._server.stdin is not None and self._server.stdout is not None
        report, output = root / "mutation.xml", root / "mutation.txt"
        report.unlink(missing_ok=True)
        command = ["-q", "-p", "no:cacheprovider", "--assert=plain", "--tb=short", f"--junitxml={report}", *_SMALL, *tests]
        print(json.dumps({"root": str(root), "output": str(output), "command": command}), file=self._server.stdin, flush=True)
        code = int(self._server.stdout.readline())
        text = output.read_text(encoding="utf-8", errors="replace")
        if not report.is_file():
            return Outcome(code, 0, (), (), 0, text)
        cases = list(ET.parse(report).getroot().iter("testcase"))

        def messages(kind: str) -> tuple[str, ...]:
            return tuple(str(found.get("message")) for case in cases for found in case.findall(kind))

        return Outcome(code, len(cases), messages("failure"), messages("error"), len(messages("skipped")), text)

    def close(self) -> None:
        with self._server as server:  # closes its pipes, upon which it ends, and waits for it
            server.stdin.close()  # type: ignore[union-attr]
            server.wait(timeout=10)


def _serve() -> None:
    for name in _LIBRARIES:
        with contextlib.suppress(ImportError):  # a library that the suite has dropped costs time, no more
            __import__(name)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(order)
        print(_waited(pid), flush=True)


def _child(order: dict[str, str]) -> None:
    """Never returns."""
    os.setsid()
    signal.alarm(LIMIT_S)
    code = 3
    try:
        output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.chdir(order["root"])
        tests = str(Path(order["root"], "tests"))
        os.environ["PYTHONPATH"] = tests  # of the engines that the self-tests start
        sys.path[0] = tests
        import pytest

        code = int(pytest.main(list(order["command"])))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _waited(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):  # what the run has left behind
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    _serve()
