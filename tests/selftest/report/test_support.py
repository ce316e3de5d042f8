"""The support table: what it says, and that its page has the one that the matrix gives."""

from pathlib import Path

import pytest

from quantdet.matrix.load import load
from quantdet.report import support
from selftest.fakes.matrix import MATRIX, ROOT, expect


def words(matrix: str, folder: Path) -> dict[str, dict[str, str]]:
    path = folder / "matrix.toml"
    path.write_text(matrix, encoding="utf-8")
    header, _, *rows = support.table(load(path)).splitlines()
    columns = [word.strip() for word in header.strip("|").split("|")][1:]
    cells = [[word.strip() for word in row.strip("|").split("|")] for row in rows]
    return {row[0].strip("`"): dict(zip(columns, row[1:], strict=True)) for row in cells}


def test_says_what_is_expected_of_each_format_on_each_hardware(tmp_path: Path) -> None:
    """Refused, noisy, or neither; a column per hardware row."""
    plain = words(MATRIX, tmp_path)
    found = words(MATRIX + expect("awq", "noisy") + expect("int8", "unsupported"), tmp_path)

    assert "yes" == plain["awq"]["cpu-here"] == plain["int8"]["cpu-here"] == found["bf16"]["cpu-here"]
    assert ("noisy", "refused") == (found["awq"]["cpu-here"], found["int8"]["cpu-here"])


def test_the_page_has_the_table_of_the_matrix() -> None:
    """`(cd tests && python -m quantdet.report.support)` writes it."""
    text = support.PAGE.read_text(encoding="utf-8")

    assert support.replaced(text, support.section(load(ROOT / "quant_matrix.toml"))) == text


def test_a_text_without_the_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        support.replaced("no table here", "new")


def test_each_kind_of_hardware_has_the_newest_version_that_was_measured_there(tmp_path: Path) -> None:
    """CPU and GPU builds differ in their newest; what was measured nowhere says so."""
    path = tmp_path / "matrix.toml"
    path.write_text(MATRIX.replace("[run]", '[engine]\nmeasured = { cpu = ["0.32.0", "0.9.0"] }\n\n[run]'), encoding="utf-8")
    assert {"cpu": "0.32.0", "cuda": "0.32.0"} == support.versions(load(path))
    assert "vLLM 0.32.0 for CPU, 0.32.0 for CUDA (by its sources; not measured):" in support.section(load(path))
