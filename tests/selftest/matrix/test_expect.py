"""Files of somebody's own expectations (`--expect`): they come before the matrix's, and their mistakes are theirs."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from quantdet.matrix.cell import Cell
from quantdet.matrix.load import MatrixError, load
from quantdet.matrix.matrix import Matrix
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import MATRIX, expect, setting

pytest_plugins = ["pytester"]

GPTQ, CT, AWQ = (Cell("alpha", name, "cpu-here") for name in ("gptq", "ct", "awq"))
PAIR = '\n[[expect]]\nwhen = { format = "ct" }\noutcome = "distinct_from"\nformats = ["gptq"]\nreason = "r"\nsource = "s"\n'


def loaded(folder: Path, *files: str, matrix: str = MATRIX) -> Matrix:
    (folder / "m.toml").write_text(matrix, encoding="utf-8")
    return load(folder / "m.toml", written(folder, files))


def written(folder: Path, files: Sequence[str]) -> list[Path]:
    paths = [folder / f"e{index}.toml" for index in range(len(files))]
    for path, text in zip(paths, files, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def said(folder: Path, *files: str, matrix: str = MATRIX) -> str:
    with pytest.raises(MatrixError) as caught:
        loaded(folder, *files, matrix=matrix)
    return str(caught.value)


def test_ones_own_rows_count_before_the_matrix(tmp_path: Path) -> None:
    """The same two formats that the matrix calls identical; the other rows of the matrix stay."""
    matrix = MATRIX + expect("awq", "noisy")

    before, after = (loaded(tmp_path, *files, matrix=matrix).expectations("0.32.0") for files in ((), (PAIR,)))

    outcomes = [getattr(known.twins(GPTQ, CT), "outcome", None) for known in (before, after)]
    assert ["identical_to", "distinct_from"] == outcomes
    assert before.noise(AWQ, "decode") == after.noise(AWQ, "decode") is not None


def test_of_several_files_the_first_row_counts(tmp_path: Path) -> None:
    """In the order in which they are given."""
    files = (expect("awq", "may_be_noisy"), expect("awq", "noisy"))

    orders = (loaded(tmp_path, *order).expectations("0.32.0").noise(AWQ, "decode") for order in (files, files[::-1]))

    assert ["may_be_noisy", "noisy"] == [getattr(row, "outcome", None) for row in orders]


def test_the_matrix_itself_is_not_changed(tmp_path: Path) -> None:
    """But for its rows."""
    with_rows = loaded(tmp_path, PAIR)

    assert loaded(tmp_path) == with_rows.model_copy(update={"expect": with_rows.expect[1:]})


@pytest.mark.parametrize("phase", [None, "decode", "prefill"])
def test_a_default_takes_back_what_the_matrix_says(tmp_path: Path, phase: str | None) -> None:
    """A new vLLM that is no longer noisy, or no longer refuses: of one phase it takes back that phase's noise alone."""
    matrix = MATRIX + expect("gptq", "noisy") + expect("gptq", "unsupported")
    known = loaded(tmp_path, expect("gptq", "default", phase), matrix=matrix).expectations("0.32.0")

    left = [one for one in ("decode", "prefill") if known.noise(GPTQ, one) is not None]  # type: ignore[arg-type]

    assert {None: [], "decode": ["prefill"], "prefill": ["decode"]}[phase] == left
    assert (phase is None) == (known.unsupported(GPTQ) is None)
    assert (phase is None) == (known.twins(GPTQ, CT) is None) == (known.twins(CT, GPTQ) is None)


def test_a_default_says_nothing_of_another_format(tmp_path: Path) -> None:
    """Nor of rows before it."""
    text = expect("awq", "noisy") + expect("awq", "default")
    known = loaded(tmp_path, text, matrix=MATRIX + expect("awq", "unsupported")).expectations("0.32.0")

    assert known.twins(GPTQ, CT) is not None and known.noise(AWQ, "decode") is not None
    assert known.unsupported(AWQ) is None


WRONG: dict[str, tuple[str, str]] = {
    "no such cell": (expect("awq", "noisy").replace("cpu-here", "sm90") + expect("int8", "noisy").replace("cpu-here", "sm90"),
                     "expect.1: matches no cell of this matrix (row 2 of [[expect]], line 8: when = "),
    "unknown format": (expect("gtpq", "noisy"), "expect.0.when.format: 'gtpq' matches no format in this matrix (row 1 of"),
    "no reason": (expect("awq", "noisy").replace('reason = "for the test"', ""), "expect.0.reason: missing (row 1 of"),
    "no source": (expect("awq", "noisy").replace('source = "the test"', ""), "expect.0.source: missing (row 1 of"),
    "unknown table": (PAIR + "\n[formats.x]\n", "formats: unknown key"),
    "unknown key": (PAIR + "colour = 1\n", "expect.0.colour: unknown key"),
    "no rows": ("schema = 1\n", "expect: missing"),
    "another schema": ("schema = 2\n" + PAIR, "schema: Input should be 1"),
    "not TOML": ("[[expect", "not readable as TOML: "),
    "not printable": (PAIR.replace('"r"', '"\\u001b"'), "expect.0.reason: has a character that is not printable"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_mistake_is_told_by_its_file(tmp_path: Path, kind: str) -> None:
    """The second of two files: its name, the row and the line in it."""
    text, words = WRONG[kind]

    found = said(tmp_path, "schema = 1\n" + PAIR, text)

    assert found.startswith(f"{tmp_path / 'e1.toml'}: 1 mistake\n  {words}")
    assert "m.toml" not in found and "e0.toml" not in found


def test_mistakes_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    """Of the matrix too."""
    found = said(tmp_path, "x = 1", expect("gtpq", "noisy"), matrix=MATRIX.replace('title = "AWQ"', ""))

    heads = [line for line in found.splitlines() if not line.startswith(" ")]
    assert [f"{tmp_path / name}: " for name in ("m.toml", "e0.toml", "e1.toml")] == [
        head[: head.rindex(":") + 2] for head in heads
    ]
    assert "formats.awq.title: missing" in found and "x: unknown key" in found and "'gtpq' matches no format" in found


def test_a_run_goes_by_ones_own_expectations(suite: Suite, tmp_path: Path) -> None:
    """Noise that nobody declared fails; with a row for it the case passes, live and replayed, and the rerun command has it."""
    noisy = MATRIX + setting("awq", "noise")
    (path,) = written(tmp_path, (expect("awq", "may_be_noisy"),))
    chosen = ("-k", "alpha/awq and test_repeat")

    failing = suite(*chosen, "--record=r", matrix=noisy)
    passing = suite(*chosen, f"--expect={path}", matrix=noisy)
    replayed = suite(*chosen, f"--expect={path}", "--replay=r", matrix=noisy)

    assert failing.failures() and not passing.failures() and not replayed.failures()
    assert {"NOISY"} == set(failing.failures().values())
    for run in (passing, replayed):
        said = {case.properties["expectation"] for case in run.ran().values()}
        assert {"may_be_noisy: for the test [the test]"} == said
        assert "matrix quant_matrix.toml, e0.toml; " in run.words


def test_the_rerun_command_has_the_files(suite: Suite, tmp_path: Path) -> None:
    """What a verdict rests on is given again."""
    paths = written(tmp_path, (expect("ct", "may_be_noisy"), expect("gptq", "may_be_noisy")))

    run = suite(
        "-k", "alpha/awq and test_repeat", *(f"--expect={path}" for path in paths), matrix=MATRIX + setting("awq", "noise")
    )

    assert run.failures()
    assert all(f"--expect={path}" in run.words for path in paths)


def test_a_wrong_file_ends_the_run_before_anything(suite: Suite, tmp_path: Path) -> None:
    """Exit code 4, and its name; a file that is not there too."""
    (path,) = written(tmp_path, ("x = 1",))

    runs = [suite(f"--expect={name}") for name in (path, tmp_path / "none.toml")]

    assert [(4, {}), (4, {})] == [(run.code, run.cases) for run in runs]
    assert f"{path}: 2 mistakes" in runs[0].output and "x: unknown key" in runs[0].output
    assert f"{tmp_path / 'none.toml'}: 1 mistake\n  no such file" in runs[1].output
