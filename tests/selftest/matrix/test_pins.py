"""The shipped pins and picks, resolved: for each kernel and layout, what vLLM of some version is told."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdet.checkpoints import Checkpoint
from quantdet.engines.plan import Plan
from quantdet.judging.results import Missing
from quantdet.judging.verdicts import Verdict
from quantdet.matrix import workload
from quantdet.matrix.cell import Cell
from quantdet.matrix.load import load
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.pins import filled, holds, probes
from quantdet.matrix.rows import CARRIES, ONLINE
from quantdet.session.plans import plan_for
from selftest.fakes.matrix import ROOT

VERSIONS = ("0.20.2", "0.22.1", "0.23.0", "0.24.0", "0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.33.0")
PROMPTS = ROOT / "fixtures" / "prompts"

BLOCK = ("FlashInferFp8DeepGEMMDynamicBlockScaled", "DeepGemmFp8BlockScaledMM", "CutlassFp8BlockScaledMM",
         "MarlinFP8ScaledMMLinear", "TritonFp8BlockScaledMM")  # fmt: skip
INTEGER = ("MacheteLinear", "AllSparkLinear", "MarlinLinear", "ConchLinear", "ExllamaLinear")


def without(names: tuple[str, ...], kept: str, **more: str) -> dict[str, str]:
    """The environment that disables all kernels of a list but one."""
    return {"VLLM_DISABLED_KERNELS": ",".join(f"{name}Kernel" for name in names if not name.startswith(kept))} | more


def backend(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    return {"linear_backend": name}, {}


NO_DEEPGEMM = {"VLLM_USE_DEEP_GEMM": "0"}
MOE_MARLIN: tuple[dict[str, Any], dict[str, str]] = ({"linear_backend": "marlin", "moe_backend": "marlin"}, {})
MOE_TRITON: tuple[dict[str, Any], dict[str, str]] = (
    {"linear_backend": "cutlass", "moe_backend": "triton"}, NO_DEEPGEMM,
)  # fmt: skip
FORCED = {"VLLM_TEST_FORCE_FP8_MARLIN": "1"}
INT4 = (
    '{"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": 128, '
    '"int4_packing_format": "tile_packed_to_4d", "set_inductor_config": false}}'
)
ONLINE_INT4: tuple[dict[str, Any], dict[str, str]] = (
    {"quantization": "torchao", "hf_overrides": {"quantization_config_dict_json": INT4}}, {},
)  # fmt: skip

# format: what each version is told, from the first that is told so; a text: why there is no way.
Told = tuple[dict[str, Any], dict[str, str]] | str
TABLE: dict[str, dict[str, Told]] = {
    "awq": {
        "0.20.2": ({"quantization": "awq"}, {}),
        "0.24.0": "quantization='awq' means auto_awq there",
    },
    "awq_marlin": {"0.20.2": ({"quantization": "awq_marlin"}, without(INTEGER, "Marlin")), "0.22.1": backend("marlin")},
    "awq_machete": {"0.20.2": ({"quantization": "awq_marlin"}, without(INTEGER, "Machete")), "0.22.1": backend("machete")},
    "gptq": {"0.20.2": ({"quantization": "gptq"}, {}), "0.22.1": backend("exllama")},
    "gptq_marlin": {"0.20.2": ({"quantization": "gptq_marlin"}, without(INTEGER, "Marlin")), "0.22.1": backend("marlin")},
    "gptq_machete": {"0.20.2": ({"quantization": "gptq_marlin"}, without(INTEGER, "Machete")), "0.22.1": backend("machete")},
    "gptq_triton": {"0.20.2": "for ROCm alone before 0.23", "0.23.0": backend("triton")},
    "ct_w4a16_marlin": {"0.20.2": ({}, without(INTEGER, "Marlin")), "0.22.1": backend("marlin")},
    "gptq_int8": {"0.20.2": ({"quantization": "gptq"}, {}), "0.22.1": backend("exllama")},
    "gptq_int8_marlin": {"0.20.2": ({"quantization": "gptq_marlin"}, without(INTEGER, "Marlin")), "0.22.1": backend("marlin")},
    "int8_w8a8_triton": {
        "0.20.2": ({}, {"VLLM_DISABLED_KERNELS": "CutlassInt8ScaledMMLinearKernel"}),
        "0.22.1": backend("triton"),
    },
    "fp8_w8a16": {
        "0.20.2": ({}, FORCED),
        "0.22.1": ({"linear_backend": "marlin"}, FORCED),
        "0.29.0": backend("marlin"),
    },
    "nvfp4_w4a4_marlin": {"0.20.2": ({}, {"VLLM_NVFP4_GEMM_BACKEND": "marlin"}), "0.22.1": backend("marlin")},
    "fp8_block_cutlass": {
        "0.20.2": ({}, without(BLOCK, "Cutlass", **NO_DEEPGEMM)),
        "0.22.1": ({"linear_backend": "cutlass"}, NO_DEEPGEMM),
    },
    "fp8_block_triton": {
        "0.20.2": ({}, without(BLOCK, "Triton", **NO_DEEPGEMM)),
        "0.22.1": ({"linear_backend": "triton"}, NO_DEEPGEMM),
    },
    "fp8_block_deepgemm": {
        "0.20.2": ({}, without(BLOCK, "DeepGemm", VLLM_USE_DEEP_GEMM="1")),
        "0.22.1": ({"linear_backend": "deep_gemm"}, {"VLLM_USE_DEEP_GEMM": "1"}),
    },
    "gptq_moe_wna16": {
        "0.20.2": ({"quantization": "moe_wna16"}, without(INTEGER, "Marlin")),
        "0.22.1": ({"quantization": "moe_wna16", "linear_backend": "marlin"}, {}),
        "0.27.1": "out of reach",
    },
    "gptq_moe_marlin": {
        "0.20.2": ({"quantization": "gptq_marlin"}, without(INTEGER, "Marlin")),
        "0.22.1": ({"linear_backend": "marlin", "moe_backend": "marlin"}, {}),
    },
    "gptq_int8_moe_marlin": {"0.20.2": "4 bits only", "0.22.1": "4 bits only", "0.23.0": MOE_MARLIN},
    "awq_moe_marlin": {"0.20.2": ({"quantization": "awq_marlin"}, without(INTEGER, "Marlin")), "0.22.1": MOE_MARLIN},
    "awq_moe_wna16": {
        "0.20.2": ({"quantization": "moe_wna16"}, without(INTEGER, "Marlin")),
        "0.22.1": ({"quantization": "moe_wna16", "linear_backend": "marlin"}, {}),
        "0.27.1": "out of reach",
    },
    "ct_moe_w4a16": {"0.20.2": ({}, without(INTEGER, "Marlin")), "0.22.1": MOE_MARLIN},
    "int8_w8a8_moe_triton": {"0.20.2": ({"moe_backend": "triton"}, {}), "0.22.1": MOE_TRITON},
    "fp8_channel_moe_triton": {"0.20.2": ({"moe_backend": "triton"}, {}), "0.22.1": MOE_TRITON},
    "fp8_channel_moe_cutlass": {
        "0.20.2": ({"moe_backend": "cutlass"}, {}),
        "0.22.1": ({"linear_backend": "cutlass", "moe_backend": "cutlass"}, {}),
    },
    "fp8_block_moe_triton": {
        "0.20.2": ({"moe_backend": "triton"}, without(BLOCK, "Cutlass", **NO_DEEPGEMM)),
        "0.22.1": MOE_TRITON,
    },
    "pytorch_int4": {"0.20.2": ONLINE_INT4},
    "bnb_nf4": {"0.20.2": ({}, {}), "0.28.0": "vllm-bnb-plugin"},
    "bnb_int8": {"0.20.2": ({}, {}), "0.28.0": "vllm-bnb-plugin"},
}


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return load(ROOT / "quant_matrix.toml")


def told(matrix: Matrix, format_id: str, version: str, model_id: str = "tiny-qwen3") -> Told:
    """The pin as the engine gets it."""
    model, format_ = matrix.models[model_id], matrix.formats[format_id]
    pin = matrix.pin_for(format_, version, model)
    if pin is None or pin.unsupported:
        return pin.unsupported if pin else "none"
    return filled(pin.args, model.group_size), pin.env


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("format_id", TABLE)
def test_what_a_version_is_told(matrix: Matrix, format_id: str, version: str) -> None:
    """The arguments and variables, or the reason, of the last version in the table that is not newer."""
    wanted = [told for since, told in TABLE[format_id].items() if VERSIONS.index(since) <= VERSIONS.index(version)][-1]

    found = told(matrix, format_id, version)

    if isinstance(wanted, str):
        assert isinstance(found, str)
        assert wanted in found
    else:
        assert wanted == found


def test_the_table_is_whole(matrix: Matrix) -> None:
    """Every format with a kernel of its own is above, or has the pin of one that is."""

    def key(name: str) -> tuple[str, str, str]:
        row = matrix.formats[name]
        return row.kernel, row.layout, row.weights

    known = {key(name) for name in TABLE}
    assert [] == [
        name
        for name, row in matrix.formats.items()
        if row.engine == "vllm" and row.kernel not in ("auto", "unquantized") and key(name) not in known
    ]


def test_every_pin_is_about_numbers_that_its_layouts_carry(matrix: Matrix) -> None:
    """A row never names weights that none of its layouts has."""
    for pin in matrix.pin:
        carried = {weights for layout in pin.layout for weights, _ in CARRIES[layout]}
        assert set(pin.weights) <= carried, pin


def test_published_weights_are_not_quantized_again(matrix: Matrix) -> None:
    """A torchao checkpoint brings its own configuration; plain weights are given one, with the model's groups."""
    assert ({}, {}) == told(matrix, "pytorch_int4", "0.26.0", "qwen3-8b")
    args, _ = told(matrix, "pytorch_int4", "0.26.0", "smollm2-135m")
    assert '"group_size": 64,' in args["hf_overrides"]["quantization_config_dict_json"]  # type: ignore[index]
    assert {"torchao"} == ONLINE


@pytest.mark.parametrize("format_id", ["awq_moe_marlin", "awq_moe_wna16", "ct_moe_w4a16"])
def test_layers_that_a_kernel_does_not_take(matrix: Matrix, format_id: str) -> None:
    """DeepSeek-Coder-V2-Lite has a K of 10944, no multiple of 128: before 0.24 other kernels would run there."""
    for version in ("0.20.2", "0.23.0"):
        assert "a multiple of 128 before 0.24" in str(told(matrix, format_id, version, "deepseek-coder-v2-lite-shape"))
        assert isinstance(told(matrix, format_id, version, "qwen3-30b-a3b-shape"), tuple)
    assert isinstance(told(matrix, format_id, "0.24.0", "deepseek-coder-v2-lite-shape"), tuple)
    assert told(matrix, format_id, "0.20.2", "deepseek-coder-v2-lite") == told(
        matrix, format_id, "0.20.2", "deepseek-coder-v2-lite-shape"
    )  # hub weights, the same layers


def plan(matrix: Matrix, format_id: str, version: str, folder: Path) -> Plan | Missing:
    return plan_for(
        Cell("tiny-qwen3", format_id, "sm90"), matrix, workload.load("synthetic-v1", PROMPTS),
        Checkpoint(folder, "0" * 64, "here"), {}, vllm_version=version, engine="vllm", repeats=None, inject=None,
    )  # fmt: skip


def test_the_reason_is_told(matrix: Matrix, tmp_path: Path) -> None:
    """An impossible pin is need, have, and why; a possible one is in the plan and in its identity."""
    assert Missing(
        Verdict.UNSUPPORTED,
        "pin: needs a way to use bitsandbytes for layout bnb, have none in vLLM 0.33.0: "
        "bitsandbytes left vLLM in 0.28 for the package vllm-bnb-plugin",
    ) == plan(matrix, "bnb_nf4", "0.33.0", tmp_path)

    made = plan(matrix, "pytorch_int4", "0.26.0", tmp_path)

    assert isinstance(made, Plan)
    assert INT4 == made.args["hf_overrides"]["quantization_config_dict_json"]
    assert made.args == made.identity["engine_args"]
    assert made == Plan.from_json(made.to_json())


@pytest.mark.parametrize("format_id", ["nvfp4_w4a16", "nvfp4_w4a4", "mxfp4", "mxfp8"])
@pytest.mark.parametrize(
    ("hardware", "version", "wanted"),
    [
        ("sm80", "0.20.2", "marlin"), ("sm89", "0.33.0", "marlin"), ("sm90", "0.20.2", "marlin"), ("sm90", "0.31.0", "marlin"),
        ("sm90", "0.32.0", "humming or marlin"), ("sm90", "0.33.0", "humming or marlin"), ("sm100", "0.33.0", "auto"),
    ],
)  # fmt: skip
def test_weight_only_where_there_is_no_native_fp4(
    matrix: Matrix, format_id: str, hardware: str, version: str, wanted: str
) -> None:
    """Four-bit floats run weight-only before Blackwell: Marlin, and from 0.32 on Hopper Humming, where it is installed."""
    assert wanted == matrix.kernel_classes(Cell("tiny-qwen3", format_id, hardware), version)[0]


@pytest.mark.parametrize(
    ("packages", "wanted"), [((), "marlin"), (("humming-kernels",), "humming"), (None, "humming or marlin")]
)
def test_a_pick_goes_by_what_was_installed(matrix: Matrix, packages: tuple[str, ...] | None, wanted: str) -> None:
    """Marlin is right where Humming is not installed, and a substitution where it is."""
    assert wanted == matrix.kernel_classes(Cell("tiny-qwen3", "mxfp4", "sm90"), "0.33.0", packages)[0]


def test_picks_cover_every_version(matrix: Matrix) -> None:
    """Where picks depend on the version, each version has one."""
    for name, format_ in matrix.formats.items():
        for glob, pick in format_.picks.items():
            if not isinstance(pick, str):
                for version in VERSIONS:
                    assert 1 == sum(holds(spec, version) for spec in pick), (name, glob, version)


SPECIFIERS = st.lists(
    st.builds(
        "{}{}".format,
        st.sampled_from(["<", "<=", ">", ">=", "==", "!=", "~="]),
        st.sampled_from(["0.20", "0.22.1", "0.23", "0.28", "1.0rc1"]),
    ),
    max_size=3,
).map(",".join)


@settings(max_examples=60, deadline=None)
@given(
    SPECIFIERS,
    SPECIFIERS,
    st.sampled_from(["0.1", "0.20", "0.20.2", "0.22.1", "0.22.9", "0.23", "0.25.1", "0.28", "0.30", "2"]),
)
def test_probes_find_a_common_version(one: str, other: str, version: str) -> None:
    """Ranges that share any version share one of the probes."""
    if holds(one, version) and holds(other, version):
        assert any(holds(one, probe) and holds(other, probe) for probe in probes([one, other]))


def test_any_text_after_three_equals_signs() -> None:
    """'===' compares texts; what is no version bounds nothing."""
    assert ["0", "0.0.0.1"] == [*probes(["===tip"])]
