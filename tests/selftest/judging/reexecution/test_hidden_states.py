"""Fingerprints of hidden states: what a projection keeps, and what a second signal says beside the logprobs."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdet.judging.reexecution import hidden_states
from quantdet.judging.reexecution.hidden_states import Corroboration, signal
from quantdet.metrics import fingerprints
from quantdet.observations.claims import Sequences
from quantdet.observations.hidden_states import HiddenStates
from quantdet.observations.observation import Observation, write
from quantdet.observations.store import Store
from quantdet.session.plans import verifying
from selftest.engines.test_hidden_states import plan
from selftest.fakes.hidden_states import fingerprint, hidden
from selftest.fakes.inner import Run, Suite
from selftest.fakes.matrix import MATRIX
from selftest.judging.reexecution.test_claim import claims, verified

pytest_plugins = ["pytester"]

# ----------------------------------------------------------------------------------------------------------- projection


def test_the_matrix_is_the_same_everywhere() -> None:
    """A recording holds what another machine's matrix made: other signs would be another projection, under another name."""
    found = fingerprints.signs(512)

    assert ((512, 16), {-1.0, 1.0}) == (found.shape, set(found.ravel()))
    assert "2e26b48e8522" == hashlib.sha256(found.astype(np.int8).tobytes()).hexdigest()[:12]
    assert abs(fingerprints.signs(8192).mean()) < 4 / np.sqrt(8192 * 16)


@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-6, 1.0, 1e6]))
@settings(deadline=None, max_examples=30)
def test_lengths_are_kept_and_scale_is_not(seed: int, scale: float) -> None:
    """Johnson-Lindenstrauss: the mean over many positions of the squared length is 1, of any scale; nothing overflows."""
    rows = np.random.default_rng(seed).standard_normal((400, 256)).astype(np.float32)
    found = fingerprints.project(rows * np.float32(scale)).astype(np.float64)

    assert np.isfinite(found).all()
    assert 0.9 < np.square(found).sum(axis=1).mean() < 1.1


@given(seed=st.integers(0, 2**32), apart=st.sampled_from([0.003, 0.03, 0.3]))
@settings(deadline=None, max_examples=30)
def test_a_distance_is_the_relative_distance_of_the_hidden_states(seed: int, apart: float) -> None:
    """Within a few percent, over 3 layers of 100 positions."""
    generator = np.random.default_rng(seed)
    a = generator.standard_normal((3, 100, 256)).astype(np.float32)
    b = a + np.float32(apart) * generator.standard_normal(a.shape).astype(np.float32)
    one, other = (np.stack([fingerprints.project(layer) for layer in x]) for x in (a, b))

    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b)]
    exact = float(np.linalg.norm(unit[0] - unit[1], axis=-1).mean())
    assert abs(fingerprints.distance(one, other) / exact - 1) < 0.1
    assert 0 == fingerprints.distance(one, one)


def test_a_position_of_zeros_has_no_direction() -> None:
    """It is at 0, not at no number."""
    assert [0.0] * 16 == fingerprints.project(np.zeros((1, 64), np.float32))[0].tolist()


@pytest.mark.parametrize(("layers", "kept"), [(1, (0,)), (8, (0, 1, 2, 3, 4, 5, 6, 7)), (9, (0, 4, 8)), (36, (0, 18, 35))])
def test_first_middle_and_last_of_deep_models(layers: int, kept: tuple[int, ...]) -> None:
    """All of them where they are few."""
    assert kept == fingerprints.kept(layers)


def test_other_shapes_have_no_distance() -> None:
    """Layers or positions that do not belong together are not cut to fit."""
    with pytest.raises(ValueError, match="cannot be compared"):
        fingerprints.distance(fingerprint("a", 0, 3), fingerprint("a", 0, 4))


# --------------------------------------------------------------------------------------------------------------- signal

OWN = np.linspace(0.9, 1.1, 16)


@pytest.mark.parametrize(
    ("others", "word", "closest"),
    [
        ({"x": OWN + 2, "y": OWN + 1}, "supported", "y"),
        ({"x": OWN + 2, "y": OWN}, "undecided", "y"),
        ({"x": OWN - 0.5, "y": OWN - 0.6, "z": OWN + 1}, "contradicted", "y"),
        ({}, "undecided", ""),
    ],
)
def test_a_signal_in_a_word(others: dict[str, Any], word: str, closest: str) -> None:
    """Every other format has to be told apart; one that matches better contradicts; formats with the same numbers do not."""
    found = signal({"own": OWN, "twin": OWN / 2, **others}, "own", ["own", "twin"])

    assert (word, closest) == (found.word, found.closest)


# ------------------------------------------------------------------------------------------------------------- judgement

LENGTHS = tuple(range(5, 21))
STEPS = 4


def recorded(numerics: str = "a") -> Observation:
    """Sixteen claims, with fingerprints."""
    whole = claims("a", LENGTHS, STEPS, 3)
    whole = replace(whole, header=whole.header.model_copy(update={"claim_tokens": STEPS}))
    return replace(whole, hidden=hidden(whole, fingerprints=numerics))


def re_executed(numerics: str, sequences: Sequences, **header: Any) -> Observation:
    """A verifier whose hidden states are those of the claims of the same numerics, at the same positions."""
    whole = verified("a", sequences, 3)
    rows = []
    for c, length in enumerate(LENGTHS):
        before = fingerprint("before", 100 + c, length - 1)
        rows.append(np.concatenate([before, fingerprint(numerics, c, STEPS), before[:, :1]], axis=1))
    found = recorded().hidden
    assert found is not None
    return replace(whole, hidden=HiddenStates(found.header.model_copy(update=header), (), tuple(rows)))


def judged(hidden_of: dict[str, str], logprobs: dict[str, Any], claimed: str = "a") -> Corroboration:
    whole = recorded(claimed)
    sequences = Sequences.of([whole])
    there = {name: re_executed(numerics, sequences) for name, numerics in hidden_of.items()}
    return hidden_states.judge(whole, there, "own", ["own"], sequences, logprobs)


def test_the_same_hidden_states_are_at_no_distance() -> None:
    """Position by position; where the prompt ends is the claim's."""
    whole = recorded()
    sequences = Sequences.of([whole])

    assert [0.0] * 16 == hidden_states.gap(whole, re_executed("a", sequences), sequences).tolist()
    assert (hidden_states.gap(whole, re_executed("b", sequences), sequences) > 0).all()


FAR = {"own": OWN, "x": OWN + 1}
NEAR = {"own": OWN, "x": OWN - 0.5}
SAME = {"own": OWN, "x": OWN}


@pytest.mark.parametrize(
    ("logprobs", "claimed", "word"),
    [
        (FAR, "a", "agree"), (FAR, "x", "DISAGREE"), (NEAR, "a", "DISAGREE"), (NEAR, "x", "agree"), (SAME, "a", "tell more"),
        (SAME, "x", "DISAGREE"),
    ],
)  # fmt: skip
def test_two_signals(logprobs: dict[str, Any], claimed: str, word: str) -> None:
    """What both say is one word; what they do not is said, whichever of them contradicts the claim."""
    found = judged({"own": "a", "x": "x"}, logprobs, claimed)

    assert f"; hidden states {word}: " in found.sentence
    assert str(found.figures["hidden_states"]).startswith(f"{word}: ")
    assert found.record is not None
    assert word == found.record["word"]


def test_hidden_states_that_tell_nothing_tell_less() -> None:
    """Where logprobs decide and they cannot, that is no disagreement."""
    assert "; hidden states tell less: undecided" in judged({"own": "a", "x": "a"}, FAR).sentence


def test_figures_beside_those_of_the_logprobs() -> None:
    """Nearest prompts with interval, and both ratios."""
    found = judged({"own": "b", "x": "x"}, FAR, "a")

    assert {"distance.hidden_states.own", "distance.hidden_states.x", "hidden_states.identified"} <= found.figures.keys()
    assert "(of logprobs 2, x)" in found.sentence


def test_a_claim_without_fingerprints_says_so_in_a_figure() -> None:
    """And is judged as before."""
    whole = replace(recorded(), hidden=None)
    found = hidden_states.judge(whole, {"own": whole}, "own", ["own"], Sequences.of([whole]), FAR)

    assert ("", {"hidden_states": "claim carries no hidden states"}) == (found.sentence, found.figures)


def test_fingerprints_that_cannot_be_compared_say_nothing() -> None:
    """Another width, or a verifier that took none (a compiled one)."""
    whole = recorded()
    sequences = Sequences.of([whole])
    wide = re_executed("a", sequences, width=128)
    none = replace(re_executed("a", sequences), hidden=None)

    for there in (wide, none):
        found = hidden_states.judge(whole, {"own": there}, "own", ["own"], sequences, FAR)
        assert "hidden states say nothing" in found.sentence
        assert None is found.record


def test_verifiers_are_asked_where_claims_have_them() -> None:
    """Re-executions of older claims keep their keys, and compiled engines have no hooks."""
    assert Sequences.of([recorded()]).hidden_states
    assert not Sequences.of([replace(recorded(), hidden=None)]).hidden_states
    eager, compiled = (replace(plan(), args={"enforce_eager": one}) for one in (True, False))

    assert verifying(eager, "float16", 4, hidden_states=True).hidden_states
    assert not verifying(eager, "float16", 4).hidden_states
    assert not verifying(compiled, "float16", 4, hidden_states=True).hidden_states


# ------------------------------------------------------------------------------------------------------------ whole runs

CLAIMING = MATRIX.replace(
    'memory_gib = 1\nformats = ["*"]\n',
    'memory_gib = 1\nformats = ["gptq", "ct", "awq"]\nhidden_states = true\n'
    'claims = { workload = "claims-v1", decode_tokens = 6, top_k = 4 }\n',
)


@pytest.fixture
def recordings(suite: Suite, pytester: pytest.Pytester) -> Path:
    run = suite("-k", "alpha and cpu-here and test_kernel", "--record", "r", "--store", "s", matrix=CLAIMING)
    assert 0 == run.code, run.output
    return pytester.path / "r"


def said(run: Run) -> dict[str, str]:
    return {name: case.properties.get("hidden_states", "") for name, case in run.ran().items() if "reexecution" in name}


def test_a_claim_and_its_hidden_states_go_together(suite: Suite, recordings: Path) -> None:
    """From a recording to a re-execution; the fake's hidden states differ by format as its logits do."""
    run = suite("-k", "reexecution", "--reference", "r", "--store", "s2", matrix=CLAIMING)

    assert 0 == run.code, run.output
    assert "HIDDEN STATES: alpha: cpu-here, vLLM 0.32.0, fake cpu -> cpu-here, float16" in run.output
    assert ["agree: supported, own nearest in 32 of 32"] * 3 == [text[:41] for text in said(run).values()]


def test_hidden_states_of_another_format_are_said_and_the_verdict_stays(suite: Suite, recordings: Path) -> None:
    """It is the logprobs'."""
    found = {one.header.format: one for one in Store(recordings).all()}
    awq, gptq = found["awq"], found["gptq"]
    assert gptq.path is not None
    assert gptq.hidden is not None
    assert awq.hidden is not None
    forged = replace(gptq.hidden, fingerprints=awq.hidden.fingerprints)

    write(gptq.path, gptq.header, gptq.prompts, gptq.claims, forged)
    shutil.rmtree(awq.path or recordings)
    run = suite("-k", "reexecution and gptq", "--reference", "r", "--store", "s2", matrix=CLAIMING)

    assert 0 == run.code, run.output
    (text,) = said(run).values()
    assert text.startswith("DISAGREE: contradicted, own nearest in 0 of 32")
