"""A vLLM that is newer than what the matrix was measured with runs, and everything that is read first says so."""

import json
from pathlib import Path

import pytest

from quantdet.matrix.load import MatrixError, load
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import MATRIX

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[3]
ONE = "alpha/bf16/cpu-here and test_kernel"


def measured(*versions: str) -> str:
    return MATRIX.replace("[run]", f"[engine]\nmeasured = {{ cpu = {json.dumps(versions)} }}\n\n[run]", 1)


def test_a_newer_version_is_said_first(suite: Suite, tmp_path: Path) -> None:
    """The fake's machine has 0.32.0: header, JUnit, page and job summary; the case passes."""
    run = suite("-k", ONE, f"--report={tmp_path / 'page'}", matrix=measured("0.20.2", "0.31.0"))

    words = "vLLM 0.32.0 is newer than what was measured (CPU: 0.20.2, 0.31.0)"
    assert 0 == run.code
    assert words in " ".join(run.output.split()) and words in run.suite["vllm.newer"]
    assert run.output.index("NEWER THAN MEASURED") < run.output.index("collected")
    assert words in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("versions", [("0.32.0",), ("0.31.0", "0.33.0"), (), ("0.32.0+cpu",)])
def test_what_was_measured_says_nothing(suite: Suite, versions: tuple[str, ...]) -> None:
    """The same version, an older one, a matrix that names none, and the label of a build."""
    run = suite("-k", ONE, matrix=measured(*versions))

    assert "" == run.suite["vllm.newer"] and "NEWER" not in run.output


def test_a_version_that_is_none_is_a_mistake_of_the_matrix(tmp_path: Path) -> None:
    path = tmp_path / "matrix.toml"
    path.write_text(measured("latest"), encoding="utf-8")

    with pytest.raises(MatrixError, match=r"engine.measured.cpu.0.*'latest' is not a version"):
        load(path)


def test_the_matrix_names_the_versions_of_the_recordings() -> None:
    """What lies in fixtures/recordings is what was measured on GPUs."""
    folders = {path.name.split("-")[1] for path in (ROOT / "fixtures" / "recordings" / "sm90").iterdir() if path.is_dir()}

    assert folders == set(load(ROOT / "quant_matrix.toml").engine.measured["cuda"])
