"""What is told beside the kernels: the KV cache, and what of the checkpoint was not used."""

from typing import Any

import pytest

from quantdet.judging import kernel
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.observations.header import Loading
from selftest.fakes.engine import executed
from selftest.fakes.observation import observation


def judge(*caches: str, args: Any = None, **header: Any) -> Judgement:
    ran = executed("K").model_copy(update={"kv_cache": caches}).model_dump()
    whole = observation(executed=ran, engine_args=args or {}, dtype="bfloat16", **header)
    return kernel.kernel(whole, "fast", ("K",), "all")


@pytest.mark.parametrize(
    ("caches", "args", "told"),
    [
        ((), {"kv_cache_dtype": "fp8"}, ""),  # an older recording
        (("bfloat16",), {}, ""),
        (("auto",), {}, ""),
        (("bfloat16",), {"kv_cache_dtype": "auto"}, ""),
        (("fp8_e4m3, k_scale 0.05",), {}, "; KV cache fp8_e4m3, k_scale 0.05"),  # of the checkpoint's own accord
        (("fp8_e4m3",), {"kv_cache_dtype": "fp8"}, "; KV cache fp8_e4m3"),
        (("float16",), {"kv_cache_dtype": "half"}, "; KV cache float16"),
        (
            ("fp8_e4m3", "bfloat16"), {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
            "; KV cache fp8_e4m3; bfloat16",
        ),
        (tuple(f"fp8_e4m3, k_scale {n}" for n in range(2, 9)), {}, "; fp8_e4m3, k_scale 3; fp8_e4m3, k_scale 4; ... (7 kinds)"),
    ],
)  # fmt: skip
def test_a_kv_cache_of_another_dtype_is_told(caches: tuple[str, ...], args: dict[str, Any], told: str) -> None:
    """Where it is not the model's own; what was asked for is there."""
    found = judge(*caches, args=args)

    assert (Verdict.CONFIRMED, True) == (found.verdict, found.expected)
    assert told in found.message and bool(told) == ("KV cache" in found.message)


@pytest.mark.parametrize(
    ("caches", "args", "words"),
    [
        (("bfloat16",), {"kv_cache_dtype": "fp8"}, "KV cache fp8 requested, executed bfloat16"),
        (("fp8_e4m3",), {"kv_cache_dtype": "fp8_e5m2"}, "KV cache fp8_e5m2 requested, executed fp8_e4m3"),
        (("fp8_e4m3", "bfloat16"), {"kv_cache_dtype": "fp8"}, "KV cache fp8 requested, executed fp8_e4m3; bfloat16"),
        (("bfloat16",), {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]}, "KV cache fp8 requested"),
    ],
)
def test_a_kv_cache_that_is_not_the_requested_one_is_invalid(
    caches: tuple[str, ...], args: dict[str, Any], words: str
) -> None:  # fmt: skip
    """Whatever the kernels are."""
    found = judge(*caches, args=args)

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert words in found.message


def test_what_was_not_used_is_told() -> None:
    """How many tensors, the first by name; and parameters that nothing has to fill, as a figure."""
    unused = Loading(filled=9, tensors=9, unused=tuple(f"layers.0.t{n}" for n in range(4)), unused_count=12)
    found = judge(loading=unused.model_dump())

    assert found.expected
    assert "; 12 tensors of the checkpoint were not used (layers.0.t0, layers.0.t1, layers.0.t2, ...)" in found.message
    assert {"count": 12, "first": "layers.0.t0, layers.0.t1, layers.0.t2"} == found.figures["checkpoint.unused"]
    one = judge(loading=Loading(filled=1, tensors=1, unused=("a.b",), unused_count=1).model_dump())
    assert "; 1 tensor of the checkpoint was not used (a.b)" in one.message
    by_rule = {"tied to the embeddings": ("lm_head.weight",)}
    ruled = judge(loading=Loading(filled=1, tensors=1, by_rule=by_rule, unused_count=0).model_dump())
    assert {"tied to the embeddings": 1} == ruled.figures["checkpoint.by_rule"]
    assert "not used" not in ruled.message and "checkpoint.unused" not in ruled.figures
    assert not any(name.startswith("checkpoint.") for name in judge().figures)


def test_a_loading_that_nobody_saw_is_told() -> None:
    """Layers have names, and what filled them is not known; older recordings have no names."""
    ran = executed("K")
    named = ran.model_copy(update={"layers": tuple(one.model_copy(update={"names": ("a.b",)}) for one in ran.layers)})
    seen, older = (
        kernel.kernel(observation(executed=one.model_dump(), engine="vllm", dtype="bfloat16"), "fast", ("K",), "all")
        for one in (named, ran)
    )

    assert "what filled its parameters was not seen" in seen.message
    assert "not seen" not in older.message
