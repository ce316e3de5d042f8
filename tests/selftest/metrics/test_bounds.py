"""Bounds on rates against closed forms and scipy's own test; Holm's adjustment against its definition."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest  # type: ignore[import-untyped]

from quantdet.metrics import bounds

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=40)
confidences = st.sampled_from([0.8, 0.9, 0.95, 0.99])


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    n = draw(st.integers(1, 400))
    return draw(st.integers(0, n)), n


class TestFlipRateUpper:
    @pytest.mark.parametrize(("n", "bound"), [(5, 0.451), (10, 0.259), (32, 0.089), (59, 0.0495), (100, 0.030)])
    def test_no_flips_at_95_percent(self, n: int, bound: float) -> None:
        """0 of n gives the figures known for all-equal runs."""
        assert bound == pytest.approx(bounds.flip_rate_upper(0, n), abs=5e-4)

    def test_299_equal_runs_bound_one_percent(self) -> None:
        """0 of 299 is at most 1 %, 0 of 298 is not."""
        assert bounds.flip_rate_upper(0, 299) <= 0.01 < bounds.flip_rate_upper(0, 298)

    @repeatable
    @given(st.integers(1, 10_000), confidences)
    def test_no_flips_is_the_closed_form(self, n: int, confidence: float) -> None:
        """0 of n is 1 - (1 - confidence)^(1/n)."""
        assert 1 - (1 - confidence) ** (1 / n) == pytest.approx(bounds.flip_rate_upper(0, n, confidence), rel=1e-9)

    @repeatable
    @given(counts(), confidences)
    @example((1, 2), 0.95)
    def test_agrees_with_binomtest(self, flips_n: tuple[int, int], confidence: float) -> None:
        """The bound is the upper end of scipy's one-sided exact interval."""
        flips, n = flips_n
        interval = binomtest(flips, n, alternative="less").proportion_ci(confidence, method="exact")
        assert interval.high == pytest.approx(bounds.flip_rate_upper(flips, n, confidence), rel=1e-7)

    @repeatable
    @given(counts(), confidences)
    def test_is_the_rate_that_would_hardly_flip_so_rarely(self, flips_n: tuple[int, int], confidence: float) -> None:
        """At the bound, `flips` or fewer of n have exactly the probability 1 - confidence: the definition."""
        flips, n = flips_n
        bound = bounds.flip_rate_upper(flips, n, confidence)
        if flips == n:
            assert 1.0 == bound
        else:
            assert 1 - confidence == pytest.approx(float(binom.cdf(flips, n, bound)), rel=1e-6)

    @repeatable
    @given(counts())
    def test_is_above_the_observed_rate_and_grows_with_flips(self, flips_n: tuple[int, int]) -> None:
        """More flips of as many runs bound less; the bound never lies below what was seen."""
        flips, n = flips_n
        bound = bounds.flip_rate_upper(flips, n)
        assert bound >= flips / n
        if flips:
            assert bounds.flip_rate_upper(flips - 1, n) < bound

    @pytest.mark.parametrize(
        ("flips", "n", "confidence"),
        [(-1, 5, 0.95), (6, 5, 0.95), (0, 0, 0.95), (0, 5, 0.0), (0, 5, 1.0), (2, 5, 95.0)],
    )
    def test_impossible_counts_are_refused(self, flips: int, n: int, confidence: float) -> None:
        """Counts out of range, no runs, and a confidence given in percent raise ValueError."""
        with pytest.raises(ValueError, match="must be"):
            bounds.flip_rate_upper(flips, n, confidence)

    def test_whole_numbers_only(self) -> None:
        """A rate in place of a count is refused."""
        with pytest.raises(TypeError):
            bounds.flip_rate_upper(0.5, 5)  # type: ignore[arg-type]


class TestRunsNeeded:
    @pytest.mark.parametrize(("rate", "runs"), [(0.05, 59), (0.01, 299), (0.001, 2995), (0.95, 1), (0.999, 1)])
    def test_known_values(self, rate: float, runs: int) -> None:
        """The numbers of runs that plans quote at 95 %."""
        assert runs == bounds.runs_needed(rate)

    @repeatable
    @given(st.floats(1e-6, 0.999), confidences)
    def test_is_the_smallest_number(self, rate: float, confidence: float) -> None:
        """The bound holds with this many runs and not with one fewer."""
        runs = bounds.runs_needed(rate, confidence)
        assert bounds.flip_rate_upper(0, runs, confidence) <= rate
        assert runs == 1 or bounds.flip_rate_upper(0, runs - 1, confidence) > rate

    @repeatable
    @given(st.integers(1, 5000), confidences)
    def test_undoes_the_bound(self, runs: int, confidence: float) -> None:
        """A rate that is exactly the bound of n runs needs n runs, however the division rounds."""
        assert runs == bounds.runs_needed(bounds.flip_rate_upper(0, runs, confidence), confidence)

    @pytest.mark.parametrize(("rate", "confidence"), [(0.0, 0.95), (1.0, 0.95), (1e-12, 0.95), (5.0, 0.95), (0.05, 1.0)])
    def test_impossible_rates_are_refused(self, rate: float, confidence: float) -> None:
        """No number of runs bounds the rate by 0; a rate in percent is a mistake."""
        with pytest.raises(ValueError, match="must be"):
            bounds.runs_needed(rate, confidence)


class TestRateInterval:
    @repeatable
    @given(counts(), confidences)
    @example((0, 4), 0.95)
    @example((4, 4), 0.95)
    def test_agrees_with_binomtest(self, hits_n: tuple[int, int], confidence: float) -> None:
        """Both ends are those of scipy's exact interval."""
        hits, n = hits_n
        interval = binomtest(hits, n).proportion_ci(confidence, method="exact")
        assert (interval.low, interval.high) == pytest.approx(bounds.rate_interval(hits, n, confidence), rel=1e-7, abs=1e-12)

    def test_impossible_arguments_are_refused(self) -> None:
        """More hits than trials, and a confidence in percent."""
        with pytest.raises(ValueError, match="must be"):
            bounds.rate_interval(5, 4)
        with pytest.raises(ValueError, match="must be"):
            bounds.rate_interval(2, 4, 95)


class TestHolm:
    def test_worked_example(self) -> None:
        """Smallest times 4, next times 3, and so on; never below one before; at most 1; in the order given."""
        assert [0.03, 0.06, 0.06, 0.02] == pytest.approx(bounds.holm([0.01, 0.04, 0.03, 0.005]))
        assert [1.0, 1.0] == bounds.holm([0.7, 0.6])
        assert [] == bounds.holm([])

    @repeatable
    @given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.001, 0.2))
    def test_rejects_what_the_step_down_rejects(self, p_values: list[float], alpha: float) -> None:
        """Adjusted values at most alpha are those that Holm's sequence of tests rejects."""
        rejected = set()
        for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if p_values[at] * (len(p_values) - rank) > alpha:
                break
            rejected.add(at)
        adjusted = bounds.holm(p_values)
        assert rejected == {at for at, p in enumerate(adjusted) if p <= alpha}
        assert all(before <= after <= 1 for before, after in zip(p_values, adjusted, strict=True))

    @pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
    def test_impossible_values_are_refused(self, p: float) -> None:
        """What is no probability is named."""
        with pytest.raises(ValueError, match="p-values must be"):
            bounds.holm([0.5, p])
