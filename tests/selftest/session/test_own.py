"""Cells of checkpoints that describe themselves: which formats are made, what is known of them, what is wrong."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantdet import checkpoints
from quantdet.checkpoints.described import Mistaken
from quantdet.matrix import load
from quantdet.matrix.cell import Cell
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.models import Model
from quantdet.session import own
from selftest.fakes.checkpoints import BF16, make_format, make_model

ROOT = Path(__file__).resolve().parents[3]
GPTQ, AWQ, FP8 = make_format("gptq", "int4-sym"), make_format("awq", "int4-asym"), make_format("ct", "fp8-channel", "fp8")


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return load.load(ROOT / "quant_matrix.toml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Checkpoints gptq, gptq-other (another maker's), awq, fp8, plain."""
    root = tmp_path_factory.mktemp("own")
    other = make_model(synthetic={**make_model().synthetic.model_dump(), "seed": 1})  # type: ignore[union-attr]
    for name, format_, model in (
        ("gptq", GPTQ, make_model()), ("gptq-other", GPTQ, other), ("awq", AWQ, make_model()), ("fp8", FP8, make_model()),
        ("plain", BF16, make_model()),
    ):  # fmt: skip
        shutil.copytree(checkpoints.resolve("m", model, format_, cache=root / "cache").path, root / name)
    yield root


def made(matrix: Matrix, folder: Path, *models: str, **asked: object) -> own.Made:
    wanted = own.Asked(models, **asked)  # type: ignore[arg-type]
    reader = own.Reader(folder, allow_download=False)
    return own.expanded(own.alone(matrix, wanted, reader), wanted, reader)


def formats(found: own.Made, hardware: str) -> list[str]:
    return [cell.format_id for cell in found.matrix.cells() if cell.hardware_id == hardware]


H200 = {"hardware": ("sm90",), "vllm": "0.26.0"}


def test_every_kernel_that_can_be_pinned_is_a_format(matrix: Matrix, folder: Path) -> None:
    """vLLM's choice first; then by the pins of this version and layout. On a CPU there is none."""
    whole = ["gptq-int4-g128", *(f"gptq-int4-g128-{kernel}" for kernel in ("exllama", "marlin", "machete", "triton"))]
    assert whole == formats(made(matrix, folder, "gptq", **H200), "sm90")
    old = formats(made(matrix, folder, "awq", hardware=("sm90",), vllm="0.20.2"), "sm90")
    assert ["awq-int4-g128", "awq-int4-g128-awq_gemm", "awq-int4-g128-marlin", "awq-int4-g128-machete"] == old
    assert ["gptq-int4-g128"] == formats(made(matrix, folder, "gptq", hardware=("cpu-amx",), vllm="0.32.0"), "cpu-amx")


def test_only_the_models_of_the_command_line(matrix: Matrix, folder: Path) -> None:
    """The matrix's models, its questions, and other hardware are left out; hidden states and claims are not."""
    found = made(matrix, folder, "gptq", "plain", **H200).matrix

    assert ["gptq", "plain"] == list(found.models)
    assert {} == found.questions
    assert {"sm90"} == {cell.hardware_id for cell in found.cells()}
    assert all(model.hidden_states and model.claims is not None for model in found.models.values())


def test_the_unquantized_twin_stands_beside_it(matrix: Matrix, folder: Path) -> None:
    found = made(matrix, folder, "gptq", base="plain", hardware=("cpu-amx",), vllm="0.32.0")

    assert ["bf16", "gptq-int4-g128"] == sorted(formats(found, "cpu-amx"))
    assert str(folder / "plain") == found.matrix.models["gptq"].checkpoints["bf16"]
    with pytest.raises(Mistaken, match="base awq: needs unquantized weights, have awq"):
        made(matrix, folder, "gptq", base="awq")


def test_checkpoints_of_one_base_are_formats_of_one_model(matrix: Matrix, folder: Path) -> None:
    found = made(matrix, folder, "gptq", "gptq-other", same_base=True, hardware=("cpu-amx",), vllm="0.32.0")

    assert ["gptq-vs-gptq-other"] == list(found.matrix.models)
    assert ["gptq-own", "gptq-other"] == formats(found, "cpu-amx")  # the first is the matrix's word for something else
    apart = made(matrix, folder, "gptq", "gptq-other", hardware=("cpu-amx",), vllm="0.32.0")
    assert ["gptq-int4-g128"] * 2 == formats(apart, "cpu-amx")


def test_what_the_matrix_knows_of_a_kernel_holds(matrix: Matrix, folder: Path) -> None:
    """exllama adds with atomics, whoever made the integers; Marlin does not."""
    known = made(matrix, folder, "gptq", **H200).matrix.expectations("0.26.0")

    noise = known.noise(Cell("gptq", "gptq-int4-g128-exllama", "sm90"), "decode")
    assert noise is not None
    assert "exllama" in noise.reason
    assert known.noise(Cell("gptq", "gptq-int4-g128-marlin", "sm90"), "decode") is None


def test_settings_of_the_matrix_hold_too(matrix: Matrix, folder: Path) -> None:
    """FP8 per channel on a CPU with AMX is multiplied by torch's own code, or each step takes minutes."""
    found = made(matrix, folder, "fp8", hardware=("cpu-amx",), vllm="0.32.0").matrix
    (cell,) = found.cells()

    assert [False] == [row.onednn_fp8 for row in found.settings(cell) if row.onednn_fp8 is not None]


def test_arguments_reach_the_cells(matrix: Matrix, folder: Path) -> None:
    args = {"kv_cache_dtype": "fp8", "max_model_len": 512, "tensor_parallel_size": 2, "dtype": "half", "enforce_eager": False}
    found = made(matrix, folder, "gptq", base="plain", args=args, **H200).matrix

    for cell in found.cells():
        assert ["fp8"] == [row.args["kv_cache_dtype"] for row in found.settings(cell) if "kv_cache_dtype" in row.args]
        assert 2 == found.tensor_parallel_size(cell)
        assert "float16" == found.formats[cell.format_id].dtype_on("cuda")
    assert "compiled" == found.formats["gptq-int4-g128-fp16"].mode


def test_a_chosen_kernel_leaves_nothing_to_pin(matrix: Matrix, folder: Path) -> None:
    """Otherwise a cell would run another kernel than its name says."""
    assert ["gptq-int4-g128"] == formats(made(matrix, folder, "gptq", args={"linear_backend": "marlin"}, **H200), "sm90")


def test_quantization_while_loading_stands_beside_what_it_is_made_of(matrix: Matrix, folder: Path) -> None:
    found = made(matrix, folder, "plain", args={"quantization": "fp8_per_channel"}, hardware=("cpu-amx",), vllm="0.32.0").matrix
    online, plain = (Cell("plain", name, "cpu-amx") for name in ("bf16-fp8-per-channel", "bf16"))

    assert {online, plain} == set(found.cells())
    assert ["fp8_per_channel"] == [row.args["quantization"] for row in found.settings(online) if "quantization" in row.args]
    assert [] == [row for row in found.settings(plain) if "quantization" in row.args]


def test_every_mistake_at_once(matrix: Matrix, folder: Path) -> None:
    with pytest.raises(Mistaken) as error:
        made(matrix, folder, "/no/such", "someone/nothing-of-this-name", "gptq", base="./nowhere")

    assert 3 == len(error.value.mistakes)


def test_two_checkpoints_of_one_name(matrix: Matrix, folder: Path, tmp_path: Path) -> None:
    """Their folders tell them apart; where these have one name too, one has to be renamed."""
    for place in "here", "there/here":
        shutil.copytree(folder / "gptq", tmp_path / place / "gptq")
    shutil.copytree(folder / "gptq", tmp_path / "elsewhere" / "gptq")

    found = made(matrix, tmp_path, "here/gptq", "elsewhere/gptq", **H200)

    assert ["here-gptq", "elsewhere-gptq"] == list(found.matrix.models)
    with pytest.raises(Mistaken, match="its cells would have the name of here/gptq: here-gptq"):
        made(matrix, tmp_path, "here/gptq", "there/here/gptq")


def test_a_row_of_the_matrix_asks_for_the_same(matrix: Matrix, folder: Path) -> None:
    """Beside the matrix's other models, none of which gets the formats that are made for it."""
    row = Model.model_validate({"title": "mine", "checkpoint": "./gptq", "base": "./plain"})
    mixed = matrix.model_copy(update={"models": {**matrix.models, "mine": row}})
    found = own.expanded(mixed, own.Asked(vllm="0.26.0"), own.Reader(folder, allow_download=False)).matrix

    before, after = (set(one.cells()) for one in (matrix, found))
    assert before == {cell for cell in after if cell.model_id != "mine"}
    assert {"bf16", "gptq-int4-g128", "gptq-int4-g128-marlin"} <= {cell.format_id for cell in after - before}


def test_two_revisions_of_one_repository_are_told_apart(matrix: Matrix, folder: Path, tmp_path: Path) -> None:
    """Neither takes the other's place: by the folders that they lie in, or by their commits."""
    for place in "one", "two":
        shutil.copytree(folder / "gptq", tmp_path / place / "mine")
    found = made(matrix, tmp_path, "one/mine", "two/mine", same_base=True, hardware=("cpu-amx",), vllm="0.32.0")

    assert ["one-mine", "two-mine"] == formats(found, "cpu-amx")
    with pytest.raises(Mistaken, match="two checkpoints would be the format one-mine"):
        shutil.copytree(folder / "gptq", tmp_path / "more/one/mine")
        made(matrix, tmp_path, "one/mine", "more/one/mine", same_base=True)


def test_an_unquantized_checkpoint_and_its_twin_are_two(matrix: Matrix, folder: Path, tmp_path: Path) -> None:
    """In the same mode, and neither takes the other's place."""
    shutil.copytree(folder / "plain", tmp_path / "other")
    args = {"enforce_eager": False}
    found = made(matrix, folder, "plain", base=str(tmp_path / "other"), args=args, **H200).matrix

    (model,) = found.models.values()
    assert 2 == len(model.checkpoints) == len(set(model.checkpoints.values()))
    assert {"compiled"} == {found.formats[name].mode for name in model.formats}
