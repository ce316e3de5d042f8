"""What `--model` says of each checkpoint configuration, on real vLLM: one run over all of them, and one of those that end it.

    pytest tests/layouts --part 1/2

The rows were measured on a CPU with AVX-512 and no AMX. On another one a good checkpoint may be refused, or run where it was
refused; a bad one is INVALID everywhere.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from layouts import make
from layouts.part import chosen
from layouts.rows import AT_THE_START, Row, rows

pytest.importorskip("vllm")

ROOT = Path(__file__).resolve().parents[2]
MEASURED = "cpu-avx512"  # the hardware row of the column `cpu`
_ENGINES = ("BIT_EXACT", "UNSUPPORTED", "UNAVAILABLE")  # what is the engine's and the machine's to decide


@dataclass
class Judged:
    """What a run said of one model: verdicts of failures, and every text of its cases."""

    hardware: str = ""
    failed: list[str] = field(default_factory=list)
    skipped: int = 0
    passed: int = 0
    texts: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """BIT_EXACT where every case passed; else the one that failed, or why none ran."""
        if self.failed or not self.skipped:
            return " and ".join(self.failed) or "BIT_EXACT"
        return "UNAVAILABLE" if not self.passed else "some skipped"


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The suite, as a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "QUANTDET_", "GITHUB_"))}
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return make.make(None, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def judged(
    folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Judged]:
    """Every configuration of this part, by its folder's name."""
    names = [row.name for row in chosen(request.config)]
    report, store = (tmp_path_factory.mktemp("run") / name for name in ("junit.xml", "store"))
    told = [*(f"--model={folders[name]}" for name in names), f"--store={store}", f"--junitxml={report}"]
    done = run(["-n", "2", "--no-controls", "--no-hidden-states", "--repeats", "2", "-k", "test_repeat or test_kernel", *told])
    assert report.is_file(), done.stdout + done.stderr
    found: dict[str, Judged] = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        properties = {str(one.get("name")): str(one.get("value")) for one in case.iter("property")}
        one = found.setdefault(properties["case.model"].removesuffix("-model"), Judged(properties["case.hardware"]))
        ends = [child for child in case if child.tag in ("failure", "error", "skipped")]
        one.texts += [*properties.values(), *(str(child.get("message")) for child in ends)]
        one.failed += [properties["verdict"] for child in ends if child.tag != "skipped"]
        one.skipped += sum(child.tag == "skipped" for child in ends)
        one.passed += not ends
    return found


def test_the_run_says_what_the_table_says(row: Row, judged: dict[str, Judged]) -> None:
    """The verdict, told once, and its reason; of a good checkpoint the kernel."""
    # A GGUF file is called by its own name, with its folder's where a run has two of them.
    called = [name for name in (row.name, row.name.replace("_", "-"), "model") if name in judged]
    found = judged[called[0]]
    fixed = found.hardware == MEASURED or row.cpu == "INVALID"
    assert found.verdict in ((row.cpu,) if fixed else (row.cpu, row.amx, *_ENGINES)), found.texts
    if fixed or found.verdict == row.cpu:
        assert any(row.message in text for text in found.texts), found.texts


def test_what_is_no_checkpoint_ends_the_run_at_its_start(folders: Mapping[str, Path]) -> None:
    """All of them in one command: every one is named with what it lacks, nothing is collected, exit code 4."""
    bad = {row.name: row for row in rows().values() if row.cpu == AT_THE_START}
    done = run([f"--model={folders[name]}" for name in bad])

    assert done.returncode == 4
    assert len(bad) > 5
    for name, row in bad.items():
        told = [line for line in done.stderr.splitlines() if name in line]
        assert told and any(row.message in line for line in told), (name, row.message, done.stderr)
