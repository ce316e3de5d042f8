"""Hidden states as an engine takes them: layers, rows, lifetimes."""

import hashlib
import sys
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantdet.engines.child.capture import CaptureError, digest_rows
from quantdet.engines.child.hidden_states import HiddenStateTap, Recorded, tapped
from quantdet.engines.plan import Plan
from quantdet.matrix.cell import PHASES
from quantdet.metrics.fingerprints import DIMS, project
from quantdet.observations.hidden_states import WIDTH
from selftest.engines.test_capture import Tensor
from selftest.fakes.hidden_states import LAYERS, Module, ModuleList, RMSNorm, model

VOCABULARY = 8


@pytest.fixture(autouse=True)
def torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks' torch is numpy, which has a bfloat16 of its own."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(int16=np.int16, int32=np.int32, bfloat16=None))


def test_decoder_layers_and_the_norm_behind_them_are_tapped() -> None:
    """By their names in the model, in order; a layer's own norms and the longer list of its experts are not."""
    modules, decoders = tapped(model(layers=2, experts=5))

    assert (["model.layers.0", "model.layers.1", "model.norm"], 2) == ([name for name, _ in modules], decoders)


def test_of_several_lists_the_longest_is_taken() -> None:
    """An encoder of another kind may stand beside the decoder."""
    small, large = ModuleList(Module()), ModuleList(Module(), Module(), Module())
    modules, decoders = tapped(Module(vision=small, h=large, ln=RMSNorm()))

    assert (["h.0", "h.1", "h.2", "ln"], 3) == ([name for name, _ in modules], decoders)


def test_a_model_without_layers_is_said() -> None:
    """Nothing is guessed."""
    with pytest.raises(CaptureError, match="no list of layers"):
        tapped(Module(a=Module()))


def states(rows: int, seed: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng([rows, seed]).standard_normal((rows, 6)).astype(dtype)


def request(whole: Module, calls: list[int], residual: bool = True, dtype: Any = np.float32, batch: bool = False) -> None:
    """Forward passes of so many rows each: hidden state and residual apart (vLLM), or one tensor (transformers)."""
    body = dict(whole.named_modules())
    for number, rows in enumerate(calls):
        for index, name in enumerate(LAYERS):
            parts = [states(rows, 10 * number + index, dtype), states(rows, 1000 + 10 * number + index, dtype)]
            tensors = [Tensor(part[None] if batch else part) for part in parts]
            body[name](tuple(tensors) if residual else tensors[0])


def logits(rows: int) -> Any:
    return np.arange(rows * VOCABULARY, dtype=np.float32).reshape(rows, VOCABULARY)


def taken(calls: list[int], length: int, steps: int, **kind: Any) -> HiddenStateTap:
    whole = model()
    tap = HiddenStateTap(whole)
    request(whole, [3])  # before the request: not in it
    tap.start()
    request(whole, calls, **kind)
    tap.finish(length, logits(steps), logits(length - 1))
    return tap


@pytest.mark.parametrize("calls", [[5, 1, 1], [3, 2, 1, 1], [4, 1, 1, 1]], ids=["at once", "in parts", "a part of one row"])
def test_rows_are_digested_at_their_position(calls: list[int]) -> None:
    """Prefill is the prompt's forward pass, in one part or several, decode the generated tokens but the last."""
    (found,) = taken(calls, length=5, steps=3).outcomes

    assert {"prefill": (4, 5, WIDTH), "decode": (4, 2, WIDTH)} == {phase: found[phase].shape for phase in PHASES}
    last = len(calls) - 1
    row = states(1, 10 * last + 1)[0].tobytes() + states(1, 1000 + 10 * last + 1)[0].tobytes()
    assert hashlib.sha256(row).digest()[:WIDTH] == found["decode"][1, 1].tobytes()
    first = states(calls[0], 2)[0].tobytes() + states(calls[0], 1002)[0].tobytes()
    assert hashlib.sha256(first).digest()[:WIDTH] == found["prefill"][2, 0].tobytes()


def test_logits_stand_beside_the_hidden_state_that_they_come_from() -> None:
    """Step 0 at the last position of the prompt, step 1 at the first generated token."""
    (found,) = taken([5, 1, 1], length=5, steps=3).outcomes

    prefill, decode = digest_rows(logits(4))[:, :WIDTH], digest_rows(logits(3))[:, :WIDTH]
    assert [*prefill.tolist(), decode[0].tolist()] == found["prefill"][-1].tolist()
    assert decode[1:].tolist() == found["decode"][-1].tolist()


@pytest.mark.parametrize(
    "calls",
    [[5, 1], [5, 1, 1, 1], [4, 1, 1], [6, 1, 1], [5, 2], [4, 2, 1], []],
    ids=["step lost", "step twice", "row lost", "row too many", "two in one", "shifted", "none"],
)  # fmt: skip
def test_rows_that_do_not_add_up_are_refused(calls: list[int]) -> None:
    """A lost or repeated row would shift all others to wrong positions."""
    with pytest.raises(CaptureError, match=r"model\.layers\.0 saw \d calls of \d rows, the request has 5 and 2 of one row"):
        taken(calls, length=5, steps=3)


def test_one_tensor_or_two() -> None:
    """A layer that returns its residual apart is digested with it, one that returns one tensor (in a batch) without."""
    apart, alone = taken([5, 1, 1], 5, 3), taken([5, 1, 1], 5, 3, residual=False, batch=True)

    assert ("hidden + residual", "hidden") == (apart.stream, alone.stream)
    assert hashlib.sha256(states(5, 0)[4].tobytes()).digest()[:WIDTH] == alone.outcomes[0]["prefill"][0, 4].tobytes()


def test_the_native_bits_are_digested() -> None:
    """A bfloat16 is two bytes, not the float32 that it could be written as."""
    (found,) = taken([5, 1, 1], 5, 3, residual=False, dtype=ml_dtypes.bfloat16).outcomes

    row = states(5, 0, ml_dtypes.bfloat16)[2]
    assert hashlib.sha256(row.tobytes()).digest()[:WIDTH] == found["prefill"][0, 2].tobytes()


def plan(role: str = "measure", repeats: int = 2, **extra: Any) -> Plan:
    return Plan({"role": role}, "", "", {}, {}, (), repeats, 3, 4, **{"hidden_states": True, **extra})


def ask(recorded: Recorded, whole: Module, length: int, steps: int, calls: list[int]) -> None:
    """One request, as `quantdet.engines.child.lifetime.execute` makes it."""
    recorded.start()
    request(whole, calls)
    recorded.finish(length, np.concatenate([logits(step + 1)[-1:] for step in range(steps)]), logits(length - 1))


def test_repeats_come_behind_the_logits_and_claims_behind_them() -> None:
    """Requests before `repeat` meet no hook; the fingerprints of a claim are of the positions that its tokens come from."""
    whole = model()
    recorded = Recorded(whole, plan())
    ask(recorded, whole, 5, 3, [5, 1, 1])
    assert not any(module._hooks for _, module in whole.named_modules())

    recorded.repeat(lambda again: [ask(recorded, whole, 5, 3, [5, 1, 1]) for _ in range(again.repeats)])
    ask(recorded, whole, 7, 4, [7, 1, 1, 1])
    found = recorded.result(prompts=1)

    assert not any(module._hooks for _, module in whole.named_modules())  # speed is timed behind this
    assert found is not None
    assert ((0, 0), 1) == (found.header.runs[0]["prefill"], len(found.digests[0]["prefill"]))
    assert (("model.layers.0", "model.layers.1", "model.norm"), (0, 1), 6) == (
        found.header.layers, found.header.projected, found.header.width,
    )  # fmt: skip
    stream = np.concatenate([states(7, 1)[-1:] + states(7, 1001)[-1:]])  # hidden + residual, layer 1, last of the prompt
    assert project(stream)[0].tolist() == found.fingerprints[0][1, 0].tolist()
    assert (2, 4, DIMS) == found.fingerprints[0].shape


def test_a_re_execution_projects_every_position() -> None:
    """Where its prompt ends is the claim's affair."""
    whole = model()
    recorded = Recorded(whole, plan("verify"))
    ask(recorded, whole, 5, 1, [5])
    found = recorded.result(prompts=1)

    assert found is not None
    assert ((2, 5, DIMS), ()) == (found.fingerprints[0].shape, found.header.runs)


def test_what_goes_wrong_costs_nothing_else() -> None:
    """Rows that do not add up are a sentence in the observation; the logits of the request are there all the same."""
    whole = model()
    recorded = Recorded(whole, plan())
    recorded.repeat(lambda again: ask(recorded, whole, 5, 3, [5, 1]))
    ask(recorded, whole, 5, 3, [5, 1, 1])
    found = recorded.result(prompts=1)

    assert found is not None
    assert "model.layers.0 saw 2 calls of 6 rows" in found.header.problem
    assert ((), ()) == (found.digests, found.fingerprints)


def test_no_numbers_are_not_projected() -> None:
    """They would be a distance to everything."""
    whole = model()
    recorded = Recorded(whole, plan("verify"))
    recorded.start()
    bad = states(5, 0)
    bad[3, 2] = np.inf
    for name in LAYERS:
        dict(whole.named_modules())[name](Tensor(bad if name == LAYERS[1] else states(5, 0)))
    recorded.finish(5, logits(1), logits(4))
    found = recorded.result(prompts=1)

    assert found is not None
    assert "non-finite hidden states in model.layers.1" == found.header.problem


def test_a_layer_that_returns_something_else_costs_nothing_else() -> None:
    """A sentence; the request goes on."""
    whole = model()
    recorded = Recorded(whole, plan("verify"))
    recorded.start()
    dict(whole.named_modules())[LAYERS[0]]({"no": "tensor"})
    recorded.finish(5, logits(1), logits(4))
    found = recorded.result(prompts=1)

    assert found is not None
    assert found.header.problem.startswith(f"what {LAYERS[0]} returns: IndexError")


def test_an_engine_that_fails_there_has_been_measured() -> None:
    """The logits' repeats are over by then."""
    whole = model()
    recorded = Recorded(whole, plan())

    def fails(_: Plan) -> None:
        raise MemoryError("no room")

    recorded.repeat(fails)
    found = recorded.result(prompts=1)

    assert found is not None
    assert "MemoryError: no room" == found.header.problem
    assert not any(module._hooks for _, module in whole.named_modules())


@pytest.mark.parametrize(("seconds", "repeats"), [(0.0, 5), (5.0, 5), (10.0, 2), (100.0, 2), (6.0, 4)])
def test_a_slow_engine_repeats_them_less(seconds: float, repeats: int) -> None:
    """Five seconds, or two repeats."""
    seen: list[int] = []
    Recorded(model(), plan(repeats=5)).repeat(lambda again: seen.append(again.repeats), seconds)

    assert [repeats] == seen


def test_a_plan_that_does_not_ask_gets_nothing() -> None:
    """And meets no hook."""
    whole = model()
    recorded = Recorded(whole, plan(hidden_states=False))
    recorded.repeat(lambda again: pytest.fail("asked"))

    assert None is recorded.result(prompts=1)
    assert not any(module._hooks for _, module in whole.named_modules())


def test_a_bound_on_the_flip_rate_does_not_multiply_these_requests() -> None:
    """299 repeats are for logits."""
    whole = model()
    seen: list[int] = []
    Recorded(whole, plan(repeats=299, least_repeats=5)).repeat(lambda again: seen.append(again.repeats))

    assert [5] == seen
