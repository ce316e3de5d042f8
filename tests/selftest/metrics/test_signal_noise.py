"""Signal and noise of re-execution: the published figures, paired comparisons, and what few prompts must not say."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdet.judging.reexecution.detect import detect
from quantdet.judging.verdicts import Verdict
from quantdet.metrics import signal_noise
from quantdet.metrics.signal_noise import Comparison, Distances, Snr, directional, published_snr

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=30)
FORMATS = ["awq", "awq_marlin", "gptq_marlin", "gptq"]
# A100 to H100, as published: SNR of each pair of FORMATS, and the mean of the diagonal.
PREFILL = {(0, 2): 105.2, (1, 2): 98.9, (0, 3): 26.7, (1, 3): 26.3, (2, 3): 1.03, (0, 1): 0.99}
DECODE = {(0, 2): 76.8, (1, 2): 82.2, (0, 3): 21.0, (1, 3): 21.3, (2, 3): 1.26, (0, 1): 0.95}


def made_up(published: dict[tuple[int, int], float], diagonal: list[float]) -> Distances:
    """A matrix with these SNRs whose two directions are far apart."""
    means = np.diag(diagonal)
    for (i, j), snr in published.items():
        signal = snr * (diagonal[i] + diagonal[j]) / 2
        means[i, j], means[j, i] = 1.3 * signal, 0.7 * signal
    return means


def pair(means: Distances, i: int, j: int) -> Snr:
    return published_snr((means[i, j], means[j, i]), (means[i, i], means[j, j]))


class TestPublishedSnr:
    @pytest.mark.parametrize(
        ("published", "diagonal", "noise"),
        [
            pytest.param(PREFILL, [0.060, 0.060, 0.049, 0.371], 0.135, id="prefill"),
            pytest.param(DECODE, [0.030, 0.030, 0.0253, 0.1763], 0.0654, id="decode"),
        ],
    )
    def test_published_rows(self, published: dict[tuple[int, int], float], diagonal: list[float], noise: float) -> None:
        """The six SNRs come back from a matrix with the published mean noise."""
        means = made_up(published, diagonal)
        assert noise == pytest.approx(np.diag(means).mean())
        assert {ids: pytest.approx(snr) for ids, snr in published.items()} == {ids: pair(means, *ids).snr for ids in published}
        signal = published[2, 3] * (diagonal[2] + diagonal[3]) / 2
        found = pair(means, 2, 3)
        assert (signal, (diagonal[2] + diagonal[3]) / 2) == pytest.approx((found.signal, found.noise))

    def test_both_directions_and_both_diagonals(self) -> None:
        """Each counts half, and it does not matter which format is named first."""
        assert Snr(3.5, 2.5, 1.4) == published_snr((1.0, 6.0), (3.0, 2.0)) == published_snr((6.0, 1.0), (2.0, 3.0))

    def test_no_noise(self) -> None:
        """Any signal over none is infinite; none over none says nothing, nor does inf over inf."""
        assert Snr(0.1, 0.0, math.inf) == published_snr((0.2, 0.0), (0.0, 0.0))
        assert Snr(0.0, 0.0, None) == published_snr((0.0, 0.0), (0.0, 0.0))
        assert Snr(math.inf, math.inf, None) == published_snr((math.inf, 1.0), (math.inf, 1.0))


distances = st.lists(
    st.tuples(*[st.integers(0, 4096).map(lambda n: n / 1024)] * 2), min_size=1, max_size=24
).map(lambda rows: np.array(rows).T)  # fmt: skip


class TestDirectional:
    def test_figures(self) -> None:
        """Means, ratio of means (not mean of ratios), and the difference of this direction."""
        found = directional(np.array([3.0, 1.0, 5.0]), np.array([1.0, 0.5, 3.0]), seed=1)
        assert (3, 3.0, 1.5, 2.0, 1.5) == (found.prompts, found.signal, found.noise, found.snr, found.difference)
        assert found.low < 1.5 < found.high
        assert (0.25, 0.25) == (found.p, found.smallest_p)

    def test_pairs_prompts(self) -> None:
        """Prompts that differ much more than formats do take nothing from a difference that is the same on each."""
        own = np.geomspace(0.01, 10.0, 16)
        paired = directional(own + np.linspace(0.001, 0.002, 16), own, seed=0)
        assert Verdict.DETECTABLE is detect(paired).verdict
        assert paired.mde < 1e-3 < directional((own + 0.0015)[::-1], own, seed=0).mde

    @pytest.mark.parametrize(("signal", "noise", "snr"), [(0.0, 0.0, None), (0.1, 0.0, math.inf), (0.0, 0.1, 0.0)])
    def test_ratio_without_noise(self, signal: float, noise: float, snr: float | None) -> None:
        """As for the published ratio."""
        assert snr == directional(np.full(4, signal), np.full(4, noise), seed=0).snr

    @repeatable
    @given(distances, st.randoms(use_true_random=False))
    def test_prompts_in_any_order(self, pair: Distances, random: Any) -> None:
        """Permuting the prompts of both sides together changes no bit."""
        order = list(range(pair.shape[1]))
        random.shuffle(order)
        assert directional(*pair, seed=0) == directional(*pair[:, order], seed=0)

    @repeatable
    @given(distances, st.sampled_from([0.25, 2.0, 1024.0]))
    def test_units(self, pair: Distances, factor: float) -> None:
        """Other units scale what is in nats and leave ratio, p and verdict."""
        one, scaled = directional(*pair, seed=0), directional(*(pair * factor), seed=0)
        for name in ("signal", "noise", "difference", "low", "high", "mde"):
            assert getattr(one, name) * factor == pytest.approx(getattr(scaled, name))
        assert (one.snr, one.p, one.smallest_p) == (scaled.snr, scaled.p, scaled.smallest_p)
        assert detect(one).verdict is detect(scaled).verdict

    @repeatable
    @given(distances)
    def test_changing_sides_turns_the_difference(self, pair: Distances) -> None:
        """The other side's difference is the negative one; p does not know sides; nothing is averaged."""
        forth, back = directional(pair[0], pair[1], seed=0), directional(pair[1], pair[0], seed=0)
        assert (-forth.difference, forth.mde) == pytest.approx((back.difference, back.mde))
        assert (forth.signal, forth.noise) == (back.noise, back.signal)
        assert forth.prompts > 20 or forth.p == back.p

    def test_same_seed_same_result(self) -> None:
        """Twice the same, and another seed another interval."""
        pair = np.random.default_rng(5).exponential(size=(2, 40))
        assert directional(*pair, seed=7) == directional(*pair, seed=7)
        assert directional(*pair, seed=7).low != directional(*pair, seed=8).low

    @pytest.mark.parametrize(
        ("other", "own", "match"),
        [([1.0, 2.0], [1.0], "paired"), ([], [], "axes"), ([math.inf], [1.0], "finite"), ([1.0], [-1.0], "negative")],
    )
    def test_what_are_no_distances_is_refused(self, other: list[float], own: list[float], match: str) -> None:
        """Unpaired, none, infinite (tokens that part are no distance), negative; on either side."""
        with pytest.raises(ValueError, match=match):
            directional(np.array(other), np.array(own), seed=0)


def compared(n: int, difference: float, spread: float, noise: float = 1.0) -> Comparison:
    """A comparison whose differences lie evenly around their mean."""
    own = np.full(n, noise)
    return directional(own + difference + spread * np.linspace(-1.0, 1.0, n), own, seed=0)


class TestDetect:
    @pytest.mark.parametrize(
        ("n", "difference", "spread", "verdict", "contradicted"),
        [
            pytest.param(16, 0.5, 0.4, Verdict.DETECTABLE, False, id="farther"),
            pytest.param(6, 0.5, 0.4, Verdict.DETECTABLE, False, id="farther-6"),
            pytest.param(5, 0.5, 0.4, Verdict.UNDERPOWERED, False, id="farther-5"),
            pytest.param(4, 50.0, 0.0, Verdict.UNDERPOWERED, False, id="much-farther-4"),
            pytest.param(1, 50.0, 0.0, Verdict.UNDERPOWERED, False, id="much-farther-1"),
            pytest.param(16, -0.5, 0.4, Verdict.NOT_DETECTABLE, True, id="nearer"),
            pytest.param(15, -0.5, 0.4, Verdict.UNDERPOWERED, True, id="nearer-15"),
            pytest.param(4, -0.5, 0.4, Verdict.UNDERPOWERED, False, id="nearer-4"),
            pytest.param(16, 0.0, 0.4, Verdict.NOT_DETECTABLE, False, id="same"),
            pytest.param(15, 0.0, 0.4, Verdict.UNDERPOWERED, False, id="same-15"),
            pytest.param(4, 0.0, 0.01, Verdict.UNDERPOWERED, False, id="same-4"),
            pytest.param(16, 0.0, 1.5, Verdict.UNDERPOWERED, False, id="same-too-noisy"),
            pytest.param(16, 0.0, 0.0, Verdict.NOT_DETECTABLE, False, id="identical"),
            pytest.param(15, 0.0, 0.0, Verdict.UNDERPOWERED, False, id="identical-15"),
        ],
    )
    def test_words(self, n: int, difference: float, spread: float, verdict: Verdict, contradicted: bool) -> None:
        """Differences above 0.5 matter."""
        found = detect(compared(n, difference, spread, noise=10.0), relevance=0.5)
        assert (verdict, contradicted) == (found.verdict, found.contradicted), found.reason

    @repeatable
    @given(distances.filter(lambda pair: pair.shape[1] < 6), st.floats(0, 100))
    def test_five_prompts_never_decide(self, pair: Distances, relevance: float) -> None:
        """Whatever they are, and however little matters."""
        found = detect(directional(*pair, seed=0), relevance)
        assert (Verdict.UNDERPOWERED, False) == (found.verdict, found.contradicted)

    @repeatable
    @given(distances, st.floats(0, 2))
    def test_not_detectable_excludes_what_matters(self, pair: Distances, relevance: float) -> None:
        """It comes with enough prompts, no interval above 0, and nothing relevant in the interval."""
        c = directional(*pair, seed=0)
        found = detect(c, relevance)
        if found.verdict is Verdict.NOT_DETECTABLE:
            assert c.prompts >= 16
            assert c.low <= 0
            assert c.high <= relevance
            assert found.contradicted or c.mde <= relevance
        if found.verdict is Verdict.DETECTABLE:
            assert c.low > 0
            assert c.p <= 0.05

    @pytest.mark.parametrize("n", [16, 40])
    def test_exact_formats(self, n: int) -> None:
        """Own distances all 0: equal ones are not separable, any that are not equal decide or remain open."""
        zero = np.zeros(n)
        same = directional(zero, zero, seed=0)
        assert (Verdict.NOT_DETECTABLE, 0.0) == (detect(same).verdict, same.mde)
        assert Verdict.DETECTABLE is detect(directional(zero + 1e-6, zero, seed=0)).verdict
        one = zero.copy()
        one[3] = 1e-6
        assert Verdict.UNDERPOWERED is detect(directional(one, zero, seed=0)).verdict

    def test_published_four_references_are_underpowered(self) -> None:
        """awq to awq_marlin, decode: published as "not detectable" with these paired differences."""
        own = np.full(4, 0.0654)
        found = detect(directional(own + np.array([-0.022, 0.016, -0.0035, 0.0034]), own, seed=0))
        assert Verdict.UNDERPOWERED is found.verdict
        assert "needs 16 prompts" in found.reason
        assert "a relevant difference could have been missed" in found.reason

    def test_multiplicity_can_take_a_difference_away(self) -> None:
        """Six prompts reach p 0.03, which many comparisons adjust beyond 0.05; that is no lack of a difference."""
        six, many = compared(6, 0.5, 0.4), compared(16, 0.5, 0.4)
        assert Verdict.DETECTABLE is detect(six).verdict
        for c in (six, many):
            found = detect(c, relevance=5.0, p_adjusted=0.06)
            assert Verdict.UNDERPOWERED is found.verdict
            assert "the interval excludes 0 and p does not follow" in found.reason
        assert Verdict.DETECTABLE is detect(many, p_adjusted=0.05).verdict

    def test_upper_end_counts(self) -> None:
        """A shift that the effect size allows for but whose interval reaches what matters is left open."""
        c = replace(compared(16, 0.0, 0.1), low=-0.01, high=0.6, mde=0.4)
        assert Verdict.UNDERPOWERED is detect(c).verdict
        assert Verdict.NOT_DETECTABLE is detect(replace(c, high=0.5)).verdict
        assert Verdict.UNDERPOWERED is detect(replace(c, high=0.5, mde=0.51)).verdict

    def test_interval_and_p_and_prompts_are_all_needed(self) -> None:
        """Any one of the three that does not say so keeps a difference from being called one, in either direction."""
        up, down = compared(16, 0.5, 0.4), compared(16, -0.5, 0.4)
        for c in (up, down):
            for wanting in ({"low": -0.01, "high": 0.01}, {"p": 0.051}, {"prompts": 5}):
                found = detect(replace(c, **wanting), relevance=0.001)
                assert (Verdict.UNDERPOWERED, False) == (found.verdict, found.contradicted)

    def test_contradicted_needs_no_effect_size(self) -> None:
        """Every positive difference is outside the interval, so none was missed; the effect is in the reason all the same."""
        c = compared(16, -0.5, 0.4)
        found = detect(c, relevance=c.mde / 2)
        assert (Verdict.NOT_DETECTABLE, True) == (found.verdict, found.contradicted)
        assert f"minimum detectable effect {c.mde:.3g}" in found.reason
        assert "matches the claim better" in found.reason

    def test_null_is_rarely_detectable(self) -> None:
        """Two formats whose distances are exchangeable: at most 2.5 % of comparisons say farther, as many nearer."""
        pairs = np.random.Generator(np.random.Philox(3)).lognormal(size=(500, 2, 12))
        found = [detect(directional(other, own, seed, 1000)) for seed, (other, own) in enumerate(pairs)]
        assert sum(f.verdict is Verdict.DETECTABLE for f in found) / len(found) < 0.045
        assert sum(f.contradicted for f in found) / len(found) < 0.045
        assert not any(f.verdict is Verdict.NOT_DETECTABLE for f in found)

    def test_seeded_defect_averages_directions(self) -> None:
        """gptq -> gptq_marlin below its own diagonal is contradicted; averaged with the way back it would not be."""
        spread = np.linspace(-0.004, 0.004, 16)
        gptq_own, gptq_as_marlin, marlin_as_gptq = (np.full(16, v) for v in (0.135, 0.118, 0.160))
        assert detect(directional(gptq_as_marlin + spread, gptq_own, seed=0)).contradicted
        averaged = (gptq_as_marlin + marlin_as_gptq) / 2
        assert Verdict.DETECTABLE is detect(directional(averaged + spread, gptq_own, seed=0)).verdict

    @pytest.mark.parametrize("wrong", [{"relevance": -1.0}, {"relevance": math.nan}, {"p_adjusted": 0.0}, {"p_adjusted": 1.1}])
    def test_arguments_out_of_range_are_refused(self, wrong: dict[str, float]) -> None:
        """A negative bound, and an adjusted p below the one it was made from."""
        with pytest.raises(ValueError, match="must be"):
            detect(compared(16, 0.5, 0.4), **wrong)


class TestCorrections:
    def test_energy(self) -> None:
        """Two samples of one distribution come out at 0 on average, shifted ones do not; repeat noise is taken out."""
        generator = np.random.Generator(np.random.Philox(9))
        x, other_x, y, other_y = generator.normal(size=(4, 4000, 3)) + np.array([0, 0, 1, 1])[:, None, None]

        def mean(a: Distances, b: Distances) -> float:
            return float(np.linalg.norm(a - b, axis=1).mean())

        within = mean(x, other_x)
        assert signal_noise.energy(mean(x, generator.permutation(other_x)), within, within) == pytest.approx(0, abs=0.08)
        assert signal_noise.energy(mean(x, y), within, mean(y, other_y)) > 0.5
        assert 1.0 == signal_noise.energy(2.0, 1.0, 2.0)
