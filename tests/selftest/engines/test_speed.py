"""Tokens per second of decode and prefill: a fake callable on a fake clock, whose pace is known."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantdet.engines.child import speed
from quantdet.engines.plan import Plan
from quantdet.observations import trace

IDS = tuple(range(100))


class Paced:
    """A callable that takes `prefill_s` for the first token and `decode_s` for each more, by its own clock."""

    def __init__(self, prefill_s: float, decode_s: float, first_s: float = 0.0) -> None:
        self.now, self.prefill_s, self.decode_s, self.first_s = 0.0, prefill_s, decode_s, first_s
        self.asked: list[int] = []

    def __call__(self, ids: Sequence[int], n_tokens: int) -> None:
        assert IDS == tuple(ids)
        self.now += self.prefill_s + (n_tokens - 1) * self.decode_s + (0 if self.asked else self.first_s)
        self.asked.append(n_tokens)

    def measured(self, decode_tokens: int = 8, **more: float) -> dict[str, float]:
        return speed.measure(self, IDS, decode_tokens, clock=lambda: self.now, **more)


def test_decode_and_prefill_are_told_apart() -> None:
    """100 tokens in 10 ms are 10000 a second; a step in 5 ms is 200 a second; three rounds of 7 steps."""
    found = Paced(0.010, 0.005).measured()

    assert pytest.approx(10000) == found["prefill_tokens_per_second"]
    assert pytest.approx(200) == found["decode_tokens_per_second"]
    assert (100, 7, 3) == tuple(found[name] for name in ("speed_prompt_tokens", "speed_decode_steps", "speed_rounds"))


def test_an_engine_that_sleeps_in_decode_is_slower_in_decode_only() -> None:
    """Seeded defect."""
    honest, sleeping = Paced(0.010, 0.005).measured(), Paced(0.010, 0.025).measured()

    assert honest["prefill_tokens_per_second"] == pytest.approx(sleeping["prefill_tokens_per_second"])
    assert honest["decode_tokens_per_second"] == pytest.approx(5 * sleeping["decode_tokens_per_second"])


def test_an_engine_that_sleeps_in_prefill_is_slower_in_prefill_only() -> None:
    """The other way round."""
    honest, sleeping = Paced(0.010, 0.005).measured(), Paced(0.050, 0.005).measured()

    assert honest["prefill_tokens_per_second"] == pytest.approx(5 * sleeping["prefill_tokens_per_second"])
    assert honest["decode_tokens_per_second"] == pytest.approx(sleeping["decode_tokens_per_second"])


def test_what_the_first_call_compiles_is_in_no_figure() -> None:
    """Thirty seconds in the first call, and the same figures."""
    slow, quick = Paced(0.010, 0.005, first_s=30).measured(), Paced(0.010, 0.005).measured()

    assert slow.pop("speed_s") == pytest.approx(quick.pop("speed_s") + 30)
    assert quick == pytest.approx(slow)


@given(
    prefill=st.floats(1e-4, 5), decode=st.floats(1e-4, 5), tokens=st.integers(1, 64), budget=st.floats(0.1, 10)
)  # fmt: skip
def test_the_budget_holds_and_the_figures_are_exact(prefill: float, decode: float, tokens: int, budget: float) -> None:
    """Whatever the pace: the figures of a steady engine, within the budget or one round of one step, never more tokens."""
    engine = Paced(prefill, decode)

    found = engine.measured(tokens, budget_s=budget)

    steps, rounds = found["speed_decode_steps"], found["speed_rounds"]
    assert max(engine.asked) <= tokens
    assert found["prefill_tokens_per_second"] == pytest.approx(100 / prefill)
    if tokens > 1:
        assert 1 <= steps < tokens
        assert found["decode_tokens_per_second"] == pytest.approx(1 / decode, rel=1e-6)
    else:
        assert steps == 0
        assert "decode_tokens_per_second" not in found
    least = 2 * prefill + decode  # the round of one step
    warm = prefill + (decode if tokens > 1 else 0)
    assert found["speed_s"] <= warm + max(budget, least) + 1e-6 or (1, 1) == (steps, rounds)
    assert 1 <= rounds <= speed.ROUNDS


def test_half_a_second_a_step_is_one_round_of_one_step() -> None:
    """As FP8 per channel on a CPU: two and a half seconds, and n says what the figure is worth."""
    found = Paced(0.5, 0.5).measured()

    assert pytest.approx(2) == found["decode_tokens_per_second"]
    assert (1, 1, 2.5) == (found["speed_decode_steps"], found["speed_rounds"], pytest.approx(found["speed_s"]))


def test_a_difference_that_is_not_there_is_no_figure() -> None:
    """Where more tokens took no longer, the clock says nothing of a step."""
    assert "decode_tokens_per_second" not in Paced(0.010, 0.0).measured()


def plan(**identity: object) -> Plan:
    return Plan(
        identity=identity, checkpoint="", dtype="float32", args={}, env={}, prompts=(), repeats=1, decode_tokens=8, top_k=2
    )  # fmt: skip


@pytest.mark.parametrize(("identity", "calls"), [
    ({}, True), ({"role": "measure", "lifetime": 0}, True), ({"lifetime": 1}, False), ({"role": "control"}, False),
    ({"role": "verify"}, False), ({"role": trace.ROLE}, False),
])  # fmt: skip
def test_the_first_lifetime_of_a_cell_alone_is_timed(identity: dict[str, object], calls: bool) -> None:
    """Not those of controls, re-executions, traces, nor later ones."""
    engine = Paced(0.001, 0.001)

    found = speed.timings(plan(**identity), engine, IDS)

    assert (calls, calls) == (bool(found), bool(engine.asked))


def test_an_engine_that_fails_here_has_been_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """No figure, and the log says why."""

    def broken(ids: Sequence[int], n_tokens: int) -> None:
        raise RuntimeError(f"cannot give {n_tokens}")

    assert {} == speed.timings(plan(), broken, IDS)
    assert "cannot give 2" in capsys.readouterr().err
