"""Checkpoints that lack a tensor, or have one too many, on real vLLM, which loads each of them without a word."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faults.cases import rows, shows
from quantdet import checkpoints
from quantdet.checkpoints.tensors import load_folder, save
from quantdet.engines.plan import Plan
from quantdet.engines.process import process
from quantdet.engines.process.outcome import Completed, Invalid, Outcome
from quantdet.judging import layers
from quantdet.matrix import load, workload
from quantdet.matrix.cell import Cell
from quantdet.observations.header import Header
from quantdet.observations.observation import HEADER_FILE
from quantdet.session import plans
from quantdet.session.machine import machine
from selftest.fakes.matrix import ROOT

SOFTWARE, MATRIX = machine.software(), load.load(ROOT / "quant_matrix.toml")
ROWS = [row for row in machine.detect().rows(MATRIX) if MATRIX.hardware[row].kind == SOFTWARE.flavour]
pytestmark = pytest.mark.skipif(not ROWS, reason=f"needs vLLM for this machine, have {SOFTWARE.vllm or 'none'}")
MODEL = "tiny-qwen3"
EXTRA = "model.layers.0.self_attn.rotary_emb.inv_freq"  # of older models; another name vLLM refuses by itself
# What is taken out, by row of the table, and the format.
INT8 = {
    "load-weight": "model.layers.0.self_attn.o_proj.weight",
    "load-scale": "model.layers.0.mlp.down_proj.weight_scale",
    "load-shard": "model.layers.1.self_attn.q_proj.weight_scale",
    "load-norm": "model.norm.weight",
}
GPTQ = "model.layers.0.self_attn.k_proj.qweight"
ONLINE = "model.layers.1.mlp.up_proj.weight"

Measured = Callable[..., tuple[Outcome, Header | None]]


def planned(format_id: str, folder: Path) -> Plan:
    """A plan of one short request to the tiny model."""
    cell = Cell(MODEL, format_id, ROWS[0])
    work = workload.load(MATRIX.models[MODEL].workload, ROOT / "fixtures" / "prompts")
    made = plans.plan_for(
        cell, MATRIX, replace(work, prompts=work.prompts[:1]), checkpoints.Checkpoint(folder, "0" * 64, "here"), {},
        vllm_version=SOFTWARE.vllm or "0", engine="vllm", repeats=1, inject=None,
    )  # fmt: skip
    assert isinstance(made, Plan)
    return replace(made, identity={**made.identity, "key": "0" * 64, "created": "", "lifetime": 0})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Measures the tiny model in a format `without` some tensors and `with_` others."""
    cache = tmp_path_factory.mktemp("cache")

    def measure(
        format_id: str, without: tuple[str, ...] = (), with_: dict[str, Any] | None = None, **args: Any
    ) -> tuple[Outcome, Header | None]:
        whole = checkpoints.resolve(MODEL, MATRIX.models[MODEL], MATRIX.formats[format_id], cache=cache).path
        folder, answer = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("answer")
        for path in whole.iterdir():
            if path.suffix not in (".safetensors", ".sha256"):
                (folder / path.name).write_bytes(path.read_bytes())
        tensors = {**load_folder(whole), **(with_ or {})}
        for name in without:
            del tensors[name]
        save(tensors, folder / "model.safetensors")
        plan = planned(format_id, folder)
        outcome = process.run(process.VLLM, replace(plan, args={**plan.args, **args}), answer, answer / "log", 300)
        header = answer / HEADER_FILE
        return outcome, Header.model_validate(json.loads(header.read_text())) if header.is_file() else None

    return measure


@pytest.fixture(scope="module")
def incomplete(measured: Measured) -> Outcome:
    """INT8 without four tensors: one start tells all of them."""
    outcome, header = measured("int8_w8a8", tuple(INT8.values()))
    assert header is None
    return outcome


@pytest.mark.parametrize("id_", rows("faults/test_loading.py::test_int8_without_a_tensor"))
def test_int8_without_a_tensor(incomplete: Outcome, id_: str) -> None:
    """A weight, a scale, one shard's scale of a fused layer, a norm: each by the name of the parameter."""
    assert isinstance(incomplete, Invalid), incomplete
    shows(id_, "INVALID", incomplete.message)
    assert len(INT8) == incomplete.message.count("nothing filled")


@pytest.mark.parametrize("id_", rows("faults/test_loading.py::test_another_layout_without_a_tensor"))
def test_another_layout_without_a_tensor(measured: Measured, id_: str) -> None:
    """GPTQ's integers of one shard; and a shard of weights that vLLM quantizes as they come, layer by layer."""
    if id_ == "load-gptq":
        outcome, _ = measured("gptq_auto", (GPTQ,))
    else:
        outcome, _ = measured("bf16", (ONLINE,), quantization="fp8_per_channel")

    assert isinstance(outcome, Invalid), outcome
    shows(id_, "INVALID", outcome.message)


def test_a_whole_checkpoint_and_a_tensor_too_many(measured: Measured) -> None:
    """Everything is filled, or by a rule not, and what filled nothing is listed; layers say what they were filled from."""
    outcome, header = measured("int8_w8a8", with_={EXTRA: np.ones((2, 2), np.float16)})

    assert isinstance(outcome, Completed), outcome
    assert header is not None and header.loading is not None and header.executed is not None
    assert ((EXTRA,), 1) == (header.loading.unused, header.loading.unused_count)
    assert header.loading.filled > 0 and header.loading.tensors > header.loading.filled  # fused layers
    assert {".attn."} == {name[name.index(".attn.") :][:6] for names in header.loading.by_rule.values() for name in names}
    assert {(("weight:I8", "weight_scale:F32"), 8)} == {(layer.stored, layer.bits) for layer in header.executed.linear}
    assert all(layer.group == layer.k and layers.quantized(layer) for layer in header.executed.linear)
    assert all(layer.names for layer in header.executed.layers)
