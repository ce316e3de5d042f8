"""Hidden states: which layers are tapped, which rows count, what repeats that differ are called, and what a reader refuses."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantdet.engines.child.capture import CaptureError, digest_rows
from quantdet.engines.child.hidden_states import ActivationTap, Recorded, tapped
from quantdet.engines.plan import Plan
from quantdet.judging import hidden_states
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import PHASES, Phase
from quantdet.matrix.expectations import Expect, Expectations
from quantdet.metrics.fingerprints import DIMS, project
from quantdet.observations.header import Header
from quantdet.observations.hidden_states import WIDTH
from quantdet.observations.observation import Observation, read, write
from quantdet.session import plans
from selftest.fake_hidden import LAYERS, Module, ModuleList, RMSNorm, differing, hidden, model
from selftest.fakes import MATRIX, ROOT, expect, observation, setting
from selftest.inner import Suite
from selftest.test_capture import Tensor
from selftest.test_observation import FUZZ, edit_header, edit_tensors, only_observation_errors, refused

pytest_plugins = ["pytester"]

VOCABULARY = 8


@pytest.fixture(autouse=True)
def torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks' torch is numpy, which has a bfloat16 of its own."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(int16=np.int16, int32=np.int32, bfloat16=None))


# --------------------------------------------------------------------------------------------------------------- layers


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


# ----------------------------------------------------------------------------------------------------------------- rows


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


def taken(calls: list[int], length: int, steps: int, **kind: Any) -> ActivationTap:
    whole = model()
    tap = ActivationTap(whole)
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


# ------------------------------------------------------------------------------------------------------------- lifetimes


def plan(role: str = "measure", repeats: int = 2, **extra: Any) -> Plan:
    return Plan({"role": role}, "", "", {}, {}, (), repeats, 3, 4, extra={"activations": True, **extra})


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
    recorded = Recorded(whole, plan(activations=False))
    recorded.repeat(lambda again: pytest.fail("asked"))

    assert None is recorded.result(prompts=1)
    assert not any(module._hooks for _, module in whole.named_modules())


def test_a_bound_on_the_flip_rate_does_not_multiply_these_requests() -> None:
    """299 repeats are for logits."""
    whole = model()
    seen: list[int] = []
    Recorded(whole, plan(repeats=299, least_repeats=5)).repeat(lambda again: seen.append(again.repeats))

    assert [5] == seen


# ---------------------------------------------------------------------------------------------------------------- judged


def sample(**fields: Any) -> Observation:
    whole = observation(**fields)
    return dataclasses.replace(whole, hidden=hidden(whole))


def judged(whole: Observation, phase: Phase, **row: Any) -> Judgement:
    fields = {"reason": "because", "source": "here", "when": {"phase": phase}, **row}
    rows = Expectations((Expect.model_validate(fields),) if row else ())
    return hidden_states.repeat([whole], phase, rows)


@pytest.mark.parametrize("phase", PHASES)
def test_equal_repeats_are_bit_exact(phase: Phase) -> None:
    """With n, the bound, and a digest over everything that two machines can compare."""
    found = judged(sample(), phase)

    assert (Verdict.BIT_EXACT, True) == (found.verdict, found.expected)
    assert "0 of 3 repeats differ in any of 3 layers, flip rate < 0.632 per call" in found.message
    names = ("runs", "activations.layers", "activations.logits", "first_divergence")
    assert (3, 3, "equal", "") == tuple(found.figures[name] for name in names)
    assert 64 == len(found.figures["activations.sha256"])


def test_prefill_names_the_earliest_layer_then_the_earliest_position() -> None:
    """All positions of a layer are computed before the next layer."""
    found = judged(differing(sample(), 1, "prefill", (2, 0), (1, 7), (1, 4), (2, 1)), "prefill")

    assert (Verdict.NOISY, False) == (found.verdict, found.expected)
    assert "1 of 3 repeats differ, first prompt p1 position 4 in repeat 2 in layer model.layers.1" in found.message
    assert "model.layers.1" == found.figures["activations.first_layer"]


def test_decode_names_the_earliest_step_then_the_earliest_layer() -> None:
    """A step is computed whole before the next; the first row is step 1."""
    found = judged(differing(sample(), 0, "decode", (0, 2), (2, 1), (1, 1)), "decode")

    assert "first prompt p0 step 2 in repeat 2 in layer model.layers.1" in found.message


def test_the_first_prompt_is_named() -> None:
    """In reading order."""
    found = judged(differing(differing(sample(), 1, "decode", (0, 0)), 0, "decode", (2, 1)), "decode")

    assert "first prompt p0 step 2 in repeat 2 in layer model.norm" in found.message


def test_a_phase_is_judged_by_itself() -> None:
    """Noise in decode is none in prefill."""
    whole = differing(sample(), 1, "decode", (0, 0))

    assert Verdict.BIT_EXACT is judged(whole, "prefill").verdict
    assert judged(whole, "prefill").figures["activations.sha256"] != judged(whole, "decode").figures["activations.sha256"]


def test_noise_that_logits_do_not_show_is_noise() -> None:
    """Rounding may hide it; that is said, and nobody has declared it."""
    hidden_only = judged(differing(sample(), 0, "decode", (1, 1)), "decode")
    both = judged(differing(sample(), 0, "decode", (1, 1), (-1, 1)), "decode")

    assert not hidden_only.expected
    assert "the logits of the same requests are equal" in hidden_only.message
    assert ("equal", "differ") == (hidden_only.figures["activations.logits"], both.figures["activations.logits"])
    assert "are equal" not in both.message


def test_logits_alone_point_behind_the_last_norm() -> None:
    """No layer differs: the LM head, or what is done to logits."""
    found = judged(differing(sample(), 0, "decode", (-1, 1)), "decode")

    assert (Verdict.BIT_EXACT, True) == (found.verdict, found.expected)
    assert (
        "logits of the same requests differ, first prompt p0 step 2 in repeat 2: the difference comes from behind model.norm"
        in found.message
    )
    assert "logits" == found.figures["activations.first_layer"]


@pytest.mark.parametrize(
    ("outcome", "noisy", "expected"),
    [("noisy", True, False), ("noisy", False, False), ("may_be_noisy", True, True), ("may_be_noisy", False, True)],
)
def test_declared_noise(outcome: str, noisy: bool, expected: bool) -> None:
    """`noisy` is satisfied by the divergence that is raised, and by nothing else."""
    found = judged(differing(sample(), 0, "decode", (1, 1)) if noisy else sample(), "decode", outcome=outcome)

    assert (expected, noisy or True) == (found.expected, found.declared)
    assert (Verdict.NOISY if noisy else Verdict.BIT_EXACT) is found.verdict


def test_noise_beyond_the_declared_rows_is_not_excused() -> None:
    """A longer prompt has to be exact."""
    rows = {"outcome": "may_be_noisy", "max_rows": 8}
    short, long = (judged(differing(sample(), p, "prefill", (1, 1)), "prefill", **rows) for p in (0, 1))

    assert (True, False, False) == (short.expected, long.expected, long.declared)
    assert "noise beyond the declared rows (up to 8), in prompt p1" in long.message


def test_lifetimes_add_up() -> None:
    """Each is compared within itself."""
    one, other = sample(), differing(sample(), 0, "decode", (0, 0))
    found = hidden_states.repeat([one, other], "decode", Expectations(()))

    assert (Verdict.NOISY, 6, 2) == (found.verdict, found.figures["runs"], found.figures["lifetimes"])
    assert "1 of 6 repeats differ" in found.message


def test_without_hidden_states_nothing_is_said() -> None:
    """UNAVAILABLE where none were taken, INVALID with the reason where they could not be."""
    none = hidden_states.repeat([observation()], "decode", Expectations(()))
    whole = sample()
    assert whole.hidden is not None
    bad = whole.hidden.header.model_copy(update={"problem": "lost a row"})
    broken = judged(dataclasses.replace(whole, hidden=dataclasses.replace(whole.hidden, header=bad)), "decode")

    assert (Verdict.UNAVAILABLE, Verdict.INVALID) == (none.verdict, broken.verdict)
    assert "lost a row" in broken.message


# --------------------------------------------------------------------------------------------------------------- on disk


def with_claims() -> Observation:
    whole = observation(claim_tokens=4, claim_top_k=4)
    claims = tuple(
        dataclasses.replace(one, header=one.header.model_copy(update={"id": f"c{n}", "runs": (0,)}))
        for n, one in enumerate(observation(lengths=(5, 8)).prompts)
    )
    header = whole.header.model_copy(update={"claims": tuple(one.header for one in claims)})
    whole = dataclasses.replace(whole, header=header, claims=claims)
    return differing(dataclasses.replace(whole, hidden=hidden(whole, fingerprints="a")), 1, "decode", (1, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put(tmp_path / "o", with_claims())


def put(place: Path, whole: Observation) -> Path:
    place.mkdir(exist_ok=True)
    write(place, whole.header, whole.prompts, whole.claims, whole.hidden)
    return place


def test_round_trip(folder: Path) -> None:
    """Every bit of what was taken comes back; of repeats, the distinct ones."""
    whole, found = with_claims().hidden, read(folder).hidden

    assert whole is not None
    assert found is not None
    assert whole.header == found.header
    assert [(0, 0, 0), (0, 0, 1)] == [runs["decode"] for runs in found.header.runs]
    assert {name: one.tobytes() for name, one in whole.arrays().items()} == {n: a.tobytes() for n, a in found.arrays().items()}


def test_an_observation_without_them_is_sealed_as_before() -> None:
    """Older recordings have no such field, and their seals hold."""
    path = next((ROOT / "fixtures" / "lifetimes").rglob("observation.json"))
    raw = json.loads(path.read_text(encoding="utf-8"))

    assert "activations" not in raw
    assert raw["header_sha256"] == Header.model_validate(raw).digest()


MISTAKES: dict[str, tuple[Callable[[Any], object], str]] = {
    "layers": (lambda raw: raw["layers"].append("more"), "activations.0.decode.0"),
    "layers twice": (lambda raw: raw["layers"].__setitem__(1, LAYERS[0]), "activations.layers"),
    "no layers": (lambda raw: raw.update(layers=[]), "activations.layers"),
    "layers without end": (lambda raw: raw.update(layers=[str(n) for n in range(2000)]), "activations.layers"),
    "a layer's name": (lambda raw: raw["layers"].__setitem__(1, "\x1b[2J"), "activations.layers.1"),
    "width": (lambda raw: raw.update(width=-1), "activations.width"),
    "stream": (lambda raw: raw.update(stream="other"), "activations.stream"),
    "runs of a prompt": (lambda raw: raw["runs"].pop(), "activations.runs"),
    "runs of a phase": (lambda raw: raw["runs"][0].pop("decode"), "activations.runs.0.decode"),
    "runs too few": (lambda raw: raw["runs"][0].update(decode=[0, 0]), "activations.runs.0.decode"),
    "runs unordered": (lambda raw: raw["runs"][0].update(decode=[1, 0, 0]), "activations.runs.0.decode"),
    "runs negative": (lambda raw: raw["runs"][0].update(decode=[0, -1, 0]), "activations.runs.0.decode"),
    "runs huge": (lambda raw: raw["runs"][0].update(decode=[0, 10**15, 0]), "activations.runs.0.decode"),
    "repeats": (lambda raw: raw.update(repeats=0), "activations.runs"),
    "projection": (lambda raw: raw.update(projection="mine"), "activations.projection"),
    "projected twice": (lambda raw: raw.update(projected=[1, 1]), "activations.projected"),
    "projected beyond": (lambda raw: raw.update(projected=[0, 3]), "activations.projected"),
    "projected one": (lambda raw: raw.update(projected=[0]), "activations.fingerprint.0"),
    "a problem with runs": (lambda raw: raw.update(problem="x"), "activations.problem"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_header_is_named(folder: Path, mistake: str) -> None:
    """Each wrong field is an ObservationError that names file and field."""
    edit, words = MISTAKES[mistake]
    edit_header(folder, lambda raw: edit(raw["activations"]))

    refused(folder, words)


DECODE, PREFILL, PRINT = "activations.1.decode.0", "activations.0.prefill.0", "activations.fingerprint.0"


def changed(name: str, change: Callable[[Any], Any], new: str = "") -> Callable[[dict[str, Any]], object]:
    """Put what `change` makes of an array in its place, or under a new name."""
    return lambda arrays: arrays.update({new or name: np.ascontiguousarray(change(arrays[name]))})


def spoiled(value: float) -> Callable[[dict[str, Any]], object]:
    return lambda arrays: arrays[PRINT].__setitem__((1, 2, 3), value)


ARRAYS: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, ...]]] = {
    "missing": (lambda arrays: arrays.pop("activations.1.decode.1"), ("activations.1.decode.1", "missing")),
    "a layer missing": (changed(DECODE, lambda a: a[1:]), (DECODE, "(3, 3, 16)")),
    "a position missing": (changed(PREFILL, lambda a: a[:, 1:]), (PREFILL, "(4, 5, 16)")),
    "longer digests": (changed(PREFILL, lambda a: np.repeat(a, 2, axis=2)), (PREFILL, "(4, 6, 32)")),
    "dtype": (changed(PRINT, lambda a: a.astype(np.float32)), (PRINT, "float32")),
    "NaN": (spoiled(np.nan), (PRINT, "not finite")),
    "infinite": (spoiled(-np.inf), (PRINT, "not finite")),
    "fewer dimensions": (changed(PRINT, lambda a: a[..., :8]), (PRINT, "(2, 4, 8)")),
    "surplus": (changed(DECODE, np.copy, "activations.2.decode.0"), ("activations.2.decode.0", "belongs to no prompt")),
}


@pytest.mark.parametrize("mistake", ARRAYS)
def test_bad_arrays_are_named(folder: Path, mistake: str) -> None:
    """With the right SHA-256 and the wrong shape, dtype, name or values."""
    edit, words = ARRAYS[mistake]
    edit_tensors(folder, edit)

    refused(folder, *words)


def test_fingerprints_are_of_claims(tmp_path: Path) -> None:
    """A recording without claims has none; a refusal has no hidden states at all."""
    whole = observation()
    found = hidden(whole, fingerprints="a")
    refused(put(tmp_path / "o", dataclasses.replace(whole, hidden=found)), "activations.projected")

    refusal = whole.header.model_copy(update={"kind": "refusal", "refusal": "no", "prompts": ()})
    refused(put(tmp_path / "r", Observation(refusal, hidden=found)), "no hidden states")


@FUZZ
@given(data=st.data())
def test_what_is_read_can_be_judged(folder: Path, data: st.DataObject) -> None:
    """An array replaced by any numbers of its dtype and shape: refused, or a judgement can be made of it."""
    put(folder, with_claims())
    name = data.draw(st.sampled_from(sorted((with_claims().hidden or hidden(observation())).arrays())))
    seed = data.draw(st.integers(0, 2**16))

    def scramble(tensors: dict[str, Any]) -> None:
        array = tensors[name]
        raw = np.random.default_rng(seed).integers(0, 256, array.nbytes, dtype=np.uint8)
        tensors[name] = raw.view(array.dtype).reshape(array.shape)

    edit_tensors(folder, scramble)
    found = only_observation_errors(folder)
    if found is not None:
        for phase in PHASES:
            hidden_states.repeat([found], phase, Expectations(()))


# ------------------------------------------------------------------------------------------------------------ whole runs

ASKED = MATRIX.replace('[models.beta]\ntitle = "two formats, one hardware"', '[models.beta]\ntitle = "two"\nactivations = true')
BF16 = "test_activations[beta/bf16/cpu-here-{}]"


def test_cells_of_models_that_ask_are_judged(suite: Suite, pytester: pytest.Pytester) -> None:
    """Both phases, beside the other tests; other models have no such case."""
    run = suite("-k", "cpu-here and (bf16 or beta)", matrix=ASKED)

    assert 0 == run.code, run.output
    names = {name for name in run.cases if name.startswith("test_activations")}
    assert {f"test_activations[beta/{one}/cpu-here-{phase}]" for one in ("bf16", "ct") for phase in PHASES} == names
    assert {"BIT_EXACT"} == {run.cases[name].verdict for name in names}
    assert "3" == run.cases[BF16.format("decode")].properties["runs"]
    assert "layers" in run.output
    assert 2 == run.output.count(" exact ")


def test_without_them_nothing_is_taken(suite: Suite) -> None:
    """--no-activations."""
    run = suite("-k", "beta", "--no-activations", "--record", "r", matrix=ASKED)

    assert 0 == run.code, run.output
    assert not [name for name in run.cases if name.startswith("test_activations")]


def test_noise_fails_its_case_and_survives_a_recording(suite: Suite) -> None:
    """The layer is named, live and in a replay of the recording."""
    noisy = ASKED + setting("bf16", "hidden_noise")
    live = suite("-k", "beta/bf16", "--record", "r", matrix=noisy)
    again = suite("-k", "beta/bf16", "--replay", "r", matrix=noisy)

    for run in (live, again):
        assert {BF16.format("decode"): "NOISY"} == run.failures()
        assert "step 3 in repeat 2 in layer model.layers.1" in run.cases[BF16.format("decode")].message
        assert " NOISY ! " in run.output


@pytest.mark.parametrize("behaviour", ["hidden_lost", "hidden_noise"])
def test_figures_of_the_logits_are_not_those_of_hidden_states(suite: Suite, behaviour: str) -> None:
    """INVALID or NOISY without a figure of its own: none, and not that of the repeats' logits."""
    run = suite("-k", "beta/bf16 and decode", matrix=ASKED + setting("bf16", behaviour))

    logits, own = run.cases["test_repeat[beta/bf16/cpu-here-decode]"].properties, run.cases[BF16.format("decode")].properties
    assert {"hidden_lost": "INVALID", "hidden_noise": "NOISY"}[behaviour] == own["verdict"]
    assert logits["flip_rate_upper95.lifetime"] and logits["logits.sha256"]
    assert not own.get("flip_rate_upper95.lifetime") and not own["logits.sha256"]
    if behaviour == "hidden_lost":
        assert ("", "", "") == (own["flip_rate_upper95"], own["distinct_outputs"], own["first_divergence"])


def test_declared_noise_is_a_strict_xfail(suite: Suite) -> None:
    """Satisfied by the divergence; without it the case fails."""
    declared = ASKED + expect("bf16", "noisy", "decode")
    noisy = suite("-k", "beta/bf16 and activations", matrix=declared + setting("bf16", "hidden_noise"))
    silent = suite("-k", "beta/bf16 and activations", matrix=declared)

    assert ("xfail", 0) == (noisy.cases[BF16.format("decode")].outcome, noisy.code)
    assert {BF16.format("decode"): "BIT_EXACT"} == silent.failures()


def test_keys_of_plans_without_them_are_those_of_before() -> None:
    """What the store holds stays valid."""
    without, asked = plan(), plan()
    without = dataclasses.replace(without, extra={})

    assert plans.key_of(without, 0) == plans.key_of(dataclasses.replace(without, extra={}), 0)
    assert plans.key_of(without, 0) != plans.key_of(asked, 0)
