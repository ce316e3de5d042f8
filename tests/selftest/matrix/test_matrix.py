"""The matrix file: the shipped one holds, every mistake is told by its TOML path, and all of them at once."""

import datetime
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantdet.matrix.cell import Cell
from quantdet.matrix.expectations import Expect
from quantdet.matrix.load import MatrixError, load
from quantdet.matrix.matrix import Matrix
from selftest.fakes.matrix import EXPERTS, MATRIX, ROOT

Edit = Callable[[dict[str, Any]], object]


def toml(value: Any) -> str:
    """A value as inline TOML."""
    match value:
        case bool():
            return "true" if value else "false"
        case dict():
            return "{" + ", ".join(f"{toml(str(key))} = {toml(inner)}" for key, inner in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(toml, value)) + "]"
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case datetime.date():
            return value.isoformat()
        case _:
            return str(value)


def document(*edits: Edit) -> str:
    """The small matrix with edits, as TOML."""
    raw = tomllib.loads(MATRIX)
    for edit in edits:
        edit(raw)
    return "\n".join(f"{toml(key)} = {toml(value)}" for key, value in raw.items())


def parse(tmp_path: Path, text: str) -> Matrix:
    path = tmp_path / "matrix.toml"
    path.write_text(text, encoding="utf-8")
    return load(path)


def mistakes(tmp_path: Path, *edits: Edit) -> list[str]:
    with pytest.raises(MatrixError) as caught:
        parse(tmp_path, document(*edits))
    assert str(tmp_path / "matrix.toml") in str(caught.value)
    assert all(mistake in str(caught.value) for mistake in caught.value.mistakes)
    return caught.value.mistakes


def test_the_shipped_matrix_loads() -> None:
    """quant_matrix.toml has the hardware, the published labels and the models that the suite promises."""
    matrix = load(ROOT / "quant_matrix.toml")

    assert {"cpu-avx2", "cpu-avx512", "cpu-amx", "cpu-arm64", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120"} <= set(
        matrix.hardware
    )
    assert {"awq", "awq_marlin", "gptq", "gptq_marlin", "pytorch_int4", "bf16", "fp16"} <= set(matrix.formats)
    assert {"tiny-qwen3", "smollm2-135m", "qwen3-8b", "qwen3-8b-shape"} <= set(matrix.models)
    assert ("exllama", "marlin", "marlin") == tuple(
        matrix.formats[name].kernel for name in ("gptq", "gptq_marlin", "awq_marlin")
    )


def test_shipped_ids_are_safe_and_cells_unique() -> None:
    """Every cell id is one path of three plain parts, once."""
    cells = list(load(ROOT / "quant_matrix.toml").cells())

    assert len(cells) == len({cell.id for cell in cells})
    for cell in cells:
        parts = Path(cell.id).parts
        assert (cell.model_id, cell.format_id, cell.hardware_id) == parts
        assert not set(cell.id) & set("[]:<>|*?\"\\ ~'")


def test_cells_are_those_that_can_exist(tmp_path: Path) -> None:
    """A cell needs the model's format and hardware, and hardware that its kernel can exist on; order as in the file."""
    matrix = parse(tmp_path, MATRIX)

    here = [f"alpha/{name}/cpu-here" for name in ("bf16", "gptq", "ct", "awq", "int8")]
    found = [cell.id for cell in matrix.cells()]
    assert here == [name for name in found if name.startswith("alpha") and name.endswith("cpu-here")]
    assert ["alpha/bf16/sm90", "alpha/awq/sm90"] == [name for name in found if name.endswith("sm90")]
    assert "alpha/int8/cpu-elsewhere" not in found
    assert ["beta/bf16/cpu-here", "beta/ct/cpu-here"] == [name for name in found if name.startswith("beta")]


def test_formats_of_experts_are_had_by_models_with_experts(tmp_path: Path) -> None:
    """Globs of other models do not reach them, of unknown models neither; an unknown model may name one."""
    unknown = '\n[models.unknown]\ntitle = "x"\nworkload = "synthetic-v1"\npath = "/w"\nformats = ["*"]\n'
    named = unknown.replace("models.unknown", "models.named").replace('"*"', '"moe"')
    alike = unknown.replace("models.unknown", "models.alike") + 'layers_as = "mixture"\n'

    matrix = parse(tmp_path, MATRIX + EXPERTS + unknown + named + alike)

    cells = {cell.id for cell in matrix.cells() if cell.format_id == "moe" and cell.hardware_id == "cpu-here"}
    assert {"mixture/moe/cpu-here", "named/moe/cpu-here", "alike/moe/cpu-here"} == cells


def test_a_dense_model_cannot_name_a_format_of_experts(tmp_path: Path) -> None:
    """Known to have none: a mistake."""
    with pytest.raises(MatrixError) as caught:
        parse(tmp_path, MATRIX.replace('formats = ["bf16", "ct"]', 'formats = ["bf16", "ct", "moe"]') + EXPERTS)

    assert ["models.beta.formats: 'moe' is a format of models with experts"] == caught.value.mistakes


def test_the_inline_form_is_the_same_matrix(tmp_path: Path) -> None:
    """What these tests edit is the file that they think it is."""
    assert parse(tmp_path, MATRIX) == parse(tmp_path, document())


def test_a_pin_is_chosen_by_version(tmp_path: Path) -> None:
    """The first row whose layout, weights and version fit; none: None. Pre-releases count as their version."""

    def edit(raw: dict[str, Any]) -> None:
        new = {"kernel": "fake4", "layout": ["gptq"], "vllm": ">=0.30", "args": {"way": "new"}}
        old = {"kernel": "fake4", "layout": ["gptq"], "vllm": "<0.25", "args": {"way": "old"}}
        raw["pin"] = [new, old]

    matrix = parse(tmp_path, document(edit))
    gptq, ct = matrix.formats["gptq"], matrix.formats["ct"]

    def way(version: str) -> object:
        pin = matrix.pin_for(gptq, version)
        return None if pin is None else pin.args["way"]

    assert ["old", None, "new", "new"] == [way(version) for version in ("0.24.1", "0.27.0", "0.31.0rc1+cpu", "0.32.0")]
    assert matrix.pin_for(ct, "0.32.0") is None


def test_auto_kernels_are_judged_by_pick(tmp_path: Path) -> None:
    """`picks` by hardware glob; where none matches there is nothing to judge."""
    matrix = parse(tmp_path, MATRIX)

    assert ("fake4", ("Fake4Kernel",)) == matrix.kernel_classes(Cell("alpha", "awq", "cpu-here"))
    assert ("auto", ()) == matrix.kernel_classes(Cell("alpha", "awq", "sm90"))
    assert ("fake4", ("Fake4Kernel",)) == matrix.kernel_classes(Cell("alpha", "ct", "cpu-here"))


def test_picks_may_change_with_the_version(tmp_path: Path) -> None:
    """Ranges of versions; without a version, what any of them gives; outside of all, nothing is judged."""

    def edit(raw: dict[str, Any]) -> None:
        raw["kernels"]["other"] = {"classes": ["OtherKernel"], "hardware": ["*"]}
        raw["formats"]["awq"]["picks"] = {"cpu-here": {"<0.30": "fake4", ">=0.32": "other"}}

    matrix, cell = parse(tmp_path, document(edit)), Cell("alpha", "awq", "cpu-here")

    assert ("fake4", ("Fake4Kernel",)) == matrix.kernel_classes(cell, "0.29.1+cpu")
    assert ("auto", ()) == matrix.kernel_classes(cell, "0.31.0")
    assert ("other", ("OtherKernel",)) == matrix.kernel_classes(cell, "0.32.0")
    assert ("fake4 or other", ("Fake4Kernel", "OtherKernel")) == matrix.kernel_classes(cell)


def test_dtype_by_kind(tmp_path: Path) -> None:
    """A dtype table is looked up by kind, with a default."""
    awq = parse(tmp_path, MATRIX).formats["awq"]

    assert ("bfloat16", "float16") == (awq.dtype_on("cpu"), awq.dtype_on("cuda"))


def test_an_expectation_may_be_about_versions() -> None:
    """A row with a specifier holds for these versions; without vLLM every row holds."""
    base = {"outcome": "noisy", "reason": "r", "source": "s"}
    row = Expect.model_validate({**base, "vllm": ">=0.26,<0.30"})

    assert [False, True, True, False] == [row.holds_for(v) for v in ("0.25.9", "0.26.0", "0.29.1+cpu", "0.30.0")]
    assert row.holds_for(None)
    assert Expect.model_validate(base).holds_for("0.1")
