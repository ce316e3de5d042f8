"""Bootstrap intervals, sign-flip p-values and detectable effects: against definitions, and on simulated data."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp  # type: ignore[import-untyped]

from quantdet.metrics.resampling import Values, bootstrap_interval, minimum_detectable, sign_flip

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=30)
# Multiples of 1/1024: sums and scalings by powers of two are exact.
values = st.lists(st.integers(-2048, 2048).map(lambda n: n / 1024), min_size=1, max_size=24).map(np.array)
Draw = Callable[[np.random.Generator, int, int], Values]


def normal(generator: np.random.Generator, samples: int, n: int) -> Values:
    return generator.normal(size=(samples, n))


def difference_of_lognormals(generator: np.random.Generator, samples: int, n: int) -> Values:
    return generator.lognormal(size=(samples, n)) - generator.lognormal(size=(samples, n))


def lognormal(generator: np.random.Generator, samples: int, n: int) -> Values:
    return generator.lognormal(size=(samples, n)) - math.exp(0.5)


def simulated(draw: Draw, samples: int, n: int) -> Values:
    return draw(np.random.Generator(np.random.Philox(20)), samples, n)


class TestBootstrapInterval:
    @pytest.mark.parametrize(
        ("draw", "n", "least", "most"),
        [
            pytest.param(normal, 16, 0.93, 0.975, id="normal-16"),
            pytest.param(normal, 6, 0.91, 0.97, id="normal-6"),
            pytest.param(difference_of_lognormals, 16, 0.92, 0.98, id="heavy-tails-16"),
            pytest.param(lognormal, 16, 0.83, 0.93, id="skewed-16"),
        ],
    )
    def test_coverage(self, draw: Draw, n: int, least: float, most: float) -> None:
        """The interval has the true mean 0 in it as often as it says, and no oftener; where skewed, as documented, less."""
        found = [bootstrap_interval(row, seed) for seed, row in enumerate(simulated(draw, 800, n))]
        covered = sum(low <= 0 <= high for low, high in found) / len(found)
        assert least < covered < most

    @repeatable
    @given(values, st.randoms(use_true_random=False), st.integers(0, 5))
    def test_order_is_without_effect_and_seed_decides(self, sample: Values, random: object, seed: int) -> None:
        """The same values in any order with the same seed give the same bits."""
        shuffled = sample.copy()
        random.shuffle(shuffled)  # type: ignore[attr-defined]
        assert bootstrap_interval(sample, seed, 1000) == bootstrap_interval(shuffled, seed, 1000)

    def test_follows_the_definition(self) -> None:
        """All 6^6 resamples of six values, at the percentiles Phi(-+ sqrt(6/5) t), t = 2.5706 with 5 degrees of freedom."""
        sample = np.array([-1.3, -0.4, 0.1, 0.3, 0.9, 2.2])
        means = np.array(list(itertools.product(sample, repeat=6))).mean(axis=1)
        tail = 0.0024318
        expected = np.quantile(means, [tail, 1 - tail])
        assert expected == pytest.approx(bootstrap_interval(sample, 0, 100_000), abs=0.03)
        assert abs(expected - np.quantile(means, [0.005, 0.995])).min() > 0.06

    def test_seeds_differ(self) -> None:
        """Another seed is another set of resamples."""
        sample = simulated(normal, 1, 16)[0]
        assert bootstrap_interval(sample, 1) != bootstrap_interval(sample, 2)

    @repeatable
    @given(values, st.sampled_from([0.25, 2.0, 1024.0]))
    def test_scales_and_turns_round(self, sample: Values, factor: float) -> None:
        """In other units the interval is the same interval; it lies within the range of the values."""
        low, high = bootstrap_interval(sample, 0, 1000)
        assert (low * factor, high * factor) == pytest.approx(bootstrap_interval(sample * factor, 0, 1000))
        assert low <= high
        if len(sample) > 1:
            assert sample.min() <= low <= high <= sample.max()

    def test_degenerate_samples(self) -> None:
        """One value bounds nothing; equal values leave no room, not even for rounding."""
        assert (-math.inf, math.inf) == bootstrap_interval(np.array([0.3]), 0)
        assert (0.1, 0.1) == bootstrap_interval(np.full(7, 0.1), 0)

    def test_blocks_are_one_stream(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Memory is bounded by blocks, of which every resample is in one."""
        sample = simulated(normal, 1, 40)[0]
        whole = bootstrap_interval(sample, 3)
        monkeypatch.setattr("quantdet.metrics.resampling._BLOCK", 1700)
        assert whole == pytest.approx(bootstrap_interval(sample, 3), abs=0.05)

    @pytest.mark.parametrize("sample", [[], [math.nan, 1.0], [math.inf, 1.0], [[1.0, 2.0]]])
    def test_what_is_no_sample_is_refused(self, sample: list[float]) -> None:
        """By all three: empty, not finite, not one axis."""
        for function in (lambda v: bootstrap_interval(v, 0), lambda v: sign_flip(v, 0), minimum_detectable):
            with pytest.raises(ValueError, match="finite"):
                function(np.array(sample))

    def test_arguments_out_of_range_are_refused(self) -> None:
        """Too few resamples for the percentiles asked for, a confidence in percent, a negative seed."""
        two = np.array([1.0, 2.0])
        for wrong in ({"resamples": 999}, {"confidence": 95.0}):
            with pytest.raises(ValueError, match="must be"):
                bootstrap_interval(two, 0, **wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="negative"):
            bootstrap_interval(two, -1)


def by_definition(sample: Values) -> tuple[float, float]:
    """Every sign of every value, zeros included; sums of multiples of 1/1024 are exact."""
    sums = [
        abs(sum(s * v for s, v in zip(signs, sample, strict=True))) for signs in itertools.product((1, -1), repeat=len(sample))
    ]
    observed, largest = abs(sum(sample)), sum(abs(sample))
    return sum(s >= observed for s in sums) / len(sums), sum(s >= largest for s in sums) / len(sums)


class TestSignFlip:
    @repeatable
    @given(values.filter(lambda v: len(v) <= 9))
    def test_follows_the_definition(self, sample: Values) -> None:
        """p and the smallest reachable p are those of the plain enumeration, ties and zeros included."""
        assert by_definition(sample) == sign_flip(sample, 0)

    @pytest.mark.parametrize(("n", "smallest"), [(1, 1.0), (4, 1 / 8), (5, 1 / 16), (6, 1 / 32), (20, 2.0**-19)])
    def test_smallest_p(self, n: int, smallest: float) -> None:
        """All of one sign reach it, and it needs six prompts to be below 0.05; zeros do not help."""
        sample = np.linspace(1.0, 2.0, n)
        assert (smallest, smallest) == sign_flip(sample, 0)
        assert (smallest, smallest) == sign_flip(np.append(-sample, np.zeros(30)), 0)

    def test_drawn_patterns_agree_with_enumerated_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Monte Carlo estimates the exact p, and follows its seed."""
        sample = simulated(normal, 1, 14)[0] + 0.3
        exact, _ = sign_flip(sample, 0)
        monkeypatch.setattr("quantdet.metrics.resampling._ENUMERATED", 0)
        monkeypatch.setattr("quantdet.metrics.resampling._BLOCK", 50_000)
        drawn, smallest = sign_flip(sample, 0, 20_000)
        assert exact == pytest.approx(drawn, abs=4 * math.sqrt(exact / 20_000))
        assert 1 / 20_001 == smallest
        assert drawn == sign_flip(sample[::-1], 0, 20_000)[0] != sign_flip(sample, 1, 20_000)[0]

    def test_drawn_p_is_never_zero(self) -> None:
        """Sixty differences of one sign: the observed pattern counts as one of those drawn."""
        assert (1 / 1000, 1 / 1000) == sign_flip(np.linspace(1, 2, 60), 0, 999)

    def test_all_zero(self) -> None:
        """Nothing to flip: no evidence, and none reachable."""
        assert (1.0, 1.0) == sign_flip(np.zeros(16), 0)

    @pytest.mark.parametrize("n", [8, 24])
    def test_level(self, n: int) -> None:
        """Under the null of exchangeable distances p is at most 0.05 in 5 % of samples, heavy tails or not."""
        samples = simulated(difference_of_lognormals, 1000, n)
        rejected = float(np.mean([sign_flip(row, seed, 999)[0] <= 0.05 for seed, row in enumerate(samples)]))
        assert 0.03 < rejected < 0.07

    def test_nothing_drawn_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            sign_flip(np.ones(3), 0, 0)


class TestMinimumDetectable:
    @pytest.mark.parametrize("n", [4, 16, 80])
    def test_a_true_difference_of_that_size_is_found_four_times_in_five(self, n: int) -> None:
        """Simulated with scipy's own t-test, the SD known to be 1."""
        unit = np.resize([-1.0, 1.0], n)
        unit /= unit.std(ddof=1)
        effect = minimum_detectable(unit)
        found = ttest_1samp(simulated(normal, 20_000, n) + effect, 0, axis=1).pvalue <= 0.05
        assert 0.8 == pytest.approx(float(found.mean()), abs=0.012)

    def test_published_differences(self) -> None:
        """awq to awq_marlin, decode, 4 references: SD 0.016; for 0.005 about 80 references would have been needed."""
        published = np.array([-0.022, 0.016, -0.0035, 0.0034])
        assert 0.016 == pytest.approx(published.std(ddof=1), abs=5e-4)
        assert 0.03 < minimum_detectable(published) < 0.04
        eighty = np.resize([-1.0, 1.0], 80)
        assert 0.005 == pytest.approx(minimum_detectable(eighty / eighty.std(ddof=1) * published.std(ddof=1)), rel=0.02)

    @repeatable
    @given(values, st.sampled_from([0.25, 2.0, 1024.0]), st.integers(-8, 8))
    def test_scales_and_does_not_depend_on_the_mean(self, sample: Values, factor: float, shift: int) -> None:
        """Linear in the unit; only the spread counts."""
        assume(len(sample) > 1)
        effect = minimum_detectable(sample)
        assert effect * factor == pytest.approx(minimum_detectable(sample * factor))
        assert effect == pytest.approx(minimum_detectable(sample + shift))
        assert effect == minimum_detectable(sample[::-1])

    def test_degenerate_samples(self) -> None:
        """One value: no SD, so no effect is certain to be found. Equal values: any effect is."""
        assert math.inf == minimum_detectable(np.array([0.3]))
        assert 0.0 == minimum_detectable(np.full(7, 0.1))

    def test_arguments_out_of_range_are_refused(self) -> None:
        """Power in percent; power below alpha."""
        for power in (80.0, 0.04):
            with pytest.raises(ValueError, match="power"):
                minimum_detectable(np.array([1.0, 2.0]), power)
