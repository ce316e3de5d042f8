"""Whole runs that take hidden states."""

import dataclasses

import pytest

from quantdet.matrix.cell import PHASES
from quantdet.session import plans
from selftest.engines.test_hidden_states import plan
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import MATRIX, expect, setting

pytest_plugins = ["pytester"]

ASKED = MATRIX.replace(
    '[models.beta]\ntitle = "two formats, one hardware"', '[models.beta]\ntitle = "two"\nhidden_states = true'
)


BF16 = "test_hidden_states[beta/bf16/cpu-here-{}]"


def test_cells_of_models_that_ask_are_judged(suite: Suite, pytester: pytest.Pytester) -> None:
    """Both phases, beside the other tests; other models have no such case."""
    run = suite("-k", "cpu-here and (bf16 or beta)", matrix=ASKED)

    assert 0 == run.code, run.output
    names = {name for name in run.cases if name.startswith("test_hidden_states")}
    assert {f"test_hidden_states[beta/{one}/cpu-here-{phase}]" for one in ("bf16", "ct") for phase in PHASES} == names
    assert {"BIT_EXACT"} == {run.cases[name].verdict for name in names}
    assert "3" == run.cases[BF16.format("decode")].properties["runs"]
    assert "layers" in run.output
    assert 2 == run.output.count(" exact ")


def test_without_them_nothing_is_taken(suite: Suite) -> None:
    """--no-hidden-states."""
    run = suite("-k", "beta", "--no-hidden-states", "--record", "r", matrix=ASKED)

    assert 0 == run.code, run.output
    assert not [name for name in run.cases if name.startswith("test_hidden_states")]


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
    noisy = suite("-k", "beta/bf16 and hidden_states", matrix=declared + setting("bf16", "hidden_noise"))
    silent = suite("-k", "beta/bf16 and hidden_states", matrix=declared)

    assert ("xfail", 0) == (noisy.cases[BF16.format("decode")].outcome, noisy.code)
    assert {BF16.format("decode"): "BIT_EXACT"} == silent.failures()


def test_keys_of_plans_without_them_are_those_of_before() -> None:
    """What the store holds stays valid."""
    without, asked = plan(), plan()
    without = dataclasses.replace(without, hidden_states=False)

    assert plans.key_of(without, 0) == plans.key_of(dataclasses.replace(without, hidden_states=False), 0)
    assert plans.key_of(without, 0) != plans.key_of(asked, 0)
