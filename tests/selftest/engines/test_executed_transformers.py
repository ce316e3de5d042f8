"""What a model of transformers executes is read from its modules: classes, weights' classes, and what a package did to them."""

from typing import Any

import pytest

from quantdet.engines.child import executed_transformers, executed_vllm
from quantdet.judging.kernel import kernel
from quantdet.judging.verdicts import Verdict
from selftest.fakes import torch_model as fake
from selftest.fakes.observation import observation
from selftest.fakes.torch_model import Model, compressed, module

PLAIN = module(fake.Linear)
NF4 = module(fake.Linear4bit, weight=type("Params4bit", (), {"quant_type": "nf4"})(), compute_dtype="torch.bfloat16")
TORCHAO = module(fake.Linear, weight=fake.Int8Tensor())


@pytest.mark.parametrize(
    ("layer", "summary", "method"),
    [
        (PLAIN, "Linear x2", "UnquantizedLinear"),
        (NF4, "Linear4bit[nf4,bfloat16] x2", "bitsandbytes"),
        (module(fake.Linear8bitLt), "Linear8bitLt x2", "bitsandbytes"),
        (TORCHAO, "Int8Tensor x2", "torchao"),
        (module(fake.FP8Linear), "FP8Linear x2", "FP8Linear"),
        (compressed(False), "Linear[decompressed] x2", "compressed-tensors"),
        (compressed(True), "Linear[decompressed,int8 simulated] x2", "compressed-tensors"),
    ],
)
def test_linear_layers_show_what_multiplies(layer: Any, summary: str, method: str) -> None:
    """The class, or the class of the weights where that is the kernel; the head, norms and routers are none of them."""
    parts = {"model.embed_tokens": module(fake.Embedding), "model.norm": module(fake.Norm)}
    parts |= {"model.layers.0.q_proj": layer, "model.layers.1.q_proj": layer}

    found = executed_transformers.describe(Model(parts))

    assert (summary, ("sdpa",)) == (found.summary, found.attention)
    assert [method] == [one.method for one in found.linear]
    assert {"linear": 2, "embedding": 2} == {kind: sum(one.count for one in found.layers if one.kind == kind) for kind in
                                            {one.kind for one in found.layers}}  # fmt: skip


def test_experts_and_routers_are_told_from_linear_layers() -> None:
    """Experts with the way in which they are multiplied."""
    config = type("Config", (), {"_experts_implementation": "grouped_mm"})()
    parts = {
        "layers.0.mlp.gate": module(fake.Router),
        "layers.0.mlp.experts": module(fake.Experts, config=config),
        "layers.0.q_proj": PLAIN,
    }

    found = executed_transformers.describe(Model(parts))

    assert "Linear x1 + Qwen3MoeExperts[grouped_mm] x1" == found.summary
    assert ["Qwen3MoeTopKRouter"] == [one.module for one in found.layers if one.kind == "router"]


def test_a_format_that_was_ignored_is_no_format() -> None:
    """A quantized checkpoint whose layers are plain: what was asked for did not run, though the class is the requested one."""
    ignored = observation().header.model_copy(update={"executed": executed_transformers.describe(Model({"q_proj": PLAIN}))})
    unpacked = ignored.model_copy(update={"executed": executed_transformers.describe(Model({"q_proj": compressed(False)}))})
    verdicts = [
        kernel(type(observation())(header, observation().prompts), "tf_linear", ("Linear",), "all").verdict
        for header in (ignored, unpacked)
    ]

    assert [Verdict.INVALID, Verdict.CONFIRMED] == verdicts


def test_one_layer_that_was_left_out_is_a_mixture() -> None:
    """A layer that stayed packed, or whose activations are not rounded, beside one that is otherwise."""
    for other in (compressed(True), compressed(False, "compressed"), NF4):
        found = executed_transformers.describe(Model({"a": compressed(False), "b": other}))
        header = observation().header.model_copy(update={"executed": found})

        judged = kernel(type(observation())(header, observation().prompts), "tf_linear", ("Linear",), "all")

        assert (Verdict.INVALID, True) == (judged.verdict, "mixed kernels" in judged.message)


def test_traces_know_the_layers_of_transformers() -> None:
    """A layer that vLLM's attributes do not describe is what its class says; a norm is none."""
    assert ("linear", "Linear4bit[nf4,bfloat16]") == executed_vllm.of_layer("layers.0.q_proj", NF4)
    assert ("", "") == executed_vllm.of_layer("model.norm", module(fake.Norm))
