"""The first divergent layer of made-up traces: each defect is found where it was put, and no other layer is blamed."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantdet.judging import first_layer
from quantdet.judging.first_layer import compare
from quantdet.observations import trace as traces
from quantdet.observations.trace import RowDifference
from selftest.fakes.layers import NAMES, digest, rows, trace
from selftest.fakes.matrix import ROOT

CLEAN = rows()


def found(result: first_layer.Diagnosis) -> tuple[Any, ...]:
    assert result.layer is not None
    return result.status, result.layer.step, result.layer.name, result.layer.repeat


def test_equal_repeats_are_not_reproduced() -> None:
    """Nothing differs: no layer is named, and the number of repeats is."""
    result = compare(trace(CLEAN, CLEAN, CLEAN))

    assert ("not reproduced", None, 0) == (result.status, result.layer, result.differ)
    assert "not reproduced in 3 repeats of prompt p0 with hooks on every layer" == result.sentence


@given(call=st.integers(0, 2), module=st.sampled_from(NAMES), repeat=st.integers(1, 3))
def test_a_defect_is_found_in_its_layer(call: int, module: str, repeat: int) -> None:
    """Whatever follows differs too, and is not named."""
    repeats = [rows(defects=((call, module),)) if index == repeat else CLEAN for index in range(4)]

    result = compare(trace(*repeats))

    step = f"decode step {call}" if call else "prefill"
    assert ("found", step, module, repeat) == found(result)
    assert (1, {module: 1}) == (result.differ, result.first_in)


@given(defects=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(NAMES)), min_size=1, max_size=4))
def test_of_several_defects_the_earliest_is_found(defects: list[tuple[int, str]]) -> None:
    """In the order of execution, whichever repeat has it; equally early ones: the lowest repeat."""
    repeats = [rows(defects=(defect,)) for defect in defects]

    result = compare(trace(CLEAN, *repeats))

    first = min(defects, key=lambda defect: (defect[0], NAMES.index(defect[1])))
    step = f"decode step {first[0]}" if first[0] else "prefill"
    assert ("found", step, first[1], defects.index(first) + 1) == found(result)
    assert len(defects) == result.differ == sum(result.first_in.values())


def test_repeat_0_is_the_one_that_differs() -> None:
    """A defect in the repeat that all are compared with is found all the same."""
    result = compare(trace(rows(defects=((1, "layers.1.down"),)), CLEAN, CLEAN))

    assert ("found", "decode step 1", "layers.1.down", 1) == found(result)
    assert 2 == result.differ


def test_inputs_that_differ_blame_no_layer() -> None:
    """Equal outputs before, other inputs here: the difference arose between the layers."""
    changed = list(CLEAN)
    call, number, _, output = changed[7]
    changed[7] = (call, number, digest("other"), output)

    result = compare(trace(CLEAN, changed))

    assert ("between", "decode step 1", "layers.0.attn", 1) == found(result)
    assert result.sentence.startswith("outside of the traced layers, before layers.0.attn (Attention, FAKE_ATTENTION) in")


@pytest.mark.parametrize(
    ("edit", "name", "step"),
    [
        (lambda r: r[:6] + r[7:], "layers.0.attn", "decode step 1"),  # a layer was left out
        (lambda r: r[:-1], "logits", "decode step 2"),  # the last call is missing
        (lambda r: r[:-5], "embed", "decode step 2"),  # a whole forward call is missing
        (lambda r: [*r, r[-1]], "logits", "decode step 2"),  # one call more than in repeat 0
        (lambda r: [], "embed", "prefill"),  # nothing was traced
    ],
    ids=["a layer", "the last", "a forward call", "one more", "all"],
)
def test_missing_calls_are_said(edit: Any, name: str, step: str) -> None:
    """Repeats that call other layers cannot be compared from there on."""
    result = compare(trace(CLEAN, edit(CLEAN)))

    assert ("other calls", step, name, 1) == found(result)
    assert f"repeats call different layers from {name}" in result.sentence


def test_a_trace_of_one_repeat_or_none_shows_nothing() -> None:
    """There is nothing to compare with."""
    assert ["not reproduced", "not reproduced"] == [compare(trace(CLEAN)).status, compare(trace()).status]


def test_the_sentence_has_the_figures() -> None:
    """Layer, class, kernel, step, repeats, size; and which layers others begin with."""
    early, late = rows(defects=((1, "layers.0.qkv"),)), rows(defects=((2, "layers.1.down"),))
    gap = RowDifference(repeat=2, row=6, differing=3, elements=512, max_abs=0.001953125)

    result = compare(trace(CLEAN, late, early, late, gaps=(gap,)))

    assert (
        "layers.0.qkv (QKVParallelLinear, Fake4Kernel) in decode step 1; 3 of 4 traced repeats differ "
        "(3 of 512 outputs, |d| up to 0.00195); others differ first in layers.1.down"
    ) == result.sentence
    assert {"layers.1.down": 2, "layers.0.qkv": 1} == result.first_in


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    """Written and read again it is the same; a damaged one is none."""
    whole, path = trace(CLEAN, rows(defects=((0, "embed"),))), tmp_path / "trace.json"

    traces.write(whole, path)
    assert whole == traces.read(path)

    text = path.read_text()
    for damaged in (text[:-20], text.replace('"schema":1', '"schema":2'), text.replace("[0,0,", "[0,9,", 1), "[]"):
        path.write_text(damaged)
        assert traces.read(path) is None
    assert traces.read(tmp_path / "none.json") is None


def test_exllama_on_an_h200_diverges_first_in_a_quantized_layer() -> None:
    """A trace that was made on real hardware: the first quantized layer of the model, in nine of ten repeats."""
    kept = json.loads((ROOT / "fixtures" / "h200" / "layers-0.26.0-tiny-qwen3-gptq.json").read_text(encoding="utf-8"))

    found = first_layer.compare(traces.Trace.model_validate(kept["trace"]))

    assert found.layer is not None
    assert ("model.layers.0.self_attn.qkv_proj", "ExllamaLinearKernel", 9) == (
        found.layer.name,
        found.layer.kernel,
        found.differ,
    )
    assert kept["first_divergent_layer"] == found.sentence
