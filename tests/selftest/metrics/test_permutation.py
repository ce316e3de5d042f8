"""The exact permutation test over repeats, against scipy's, and what it decides between noisy formats."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import permutation_test

from quantdet.judging.pairs import pair
from quantdet.judging.verdicts import Verdict
from quantdet.metrics.permutation import smallest, two_samples
from quantdet.report import confidence
from quantdet.report.case import Case
from selftest.fakes.cases import a_pair, case
from selftest.fakes.observation import observation
from selftest.judging.test_pairs import judge, noisy


def gaps(values: list[float]) -> NDArray[np.float64]:
    """Distances between numbers."""
    found = np.asarray(values, np.float64)
    return np.abs(found[:, None] - found[None, :])


def by_scipy(distances: NDArray[np.float64], first: int) -> float:
    def energy(x: NDArray[np.int64], y: NDArray[np.int64]) -> float:
        between, one, other = distances[np.ix_(x, y)], distances[np.ix_(x, x)], distances[np.ix_(y, y)]
        return float(2 * between.mean() - one.mean() - other.mean())

    indices = np.arange(len(distances))
    found = permutation_test(
        (indices[:first], indices[first:]), energy, permutation_type="independent", alternative="greater", n_resamples=np.inf
    )
    return float(found.pvalue)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=4, max_size=8), st.data())
def test_is_scipys(values: list[int], data: st.DataObject) -> None:
    """Ties included: a partition that is as far apart as the observed one counts."""
    first = data.draw(st.integers(2, len(values) - 2))
    distances = gaps([float(value) for value in values])

    assert by_scipy(distances, first) == pytest.approx(two_samples(distances, first), abs=1e-12)


@pytest.mark.parametrize(("n", "m", "partitions"), [(8, 8, 12870 / 2), (5, 5, 126), (2, 2, 3), (3, 5, 56), (1, 1, 1)])
def test_the_smallest_p_is_reached_by_repeats_that_are_apart(n: int, m: int, partitions: float) -> None:
    """Two clusters: only the observed partition, and its mirror image where both have as many, is as far apart."""
    distances = gaps([0.0 + 0.001 * i for i in range(n)] + [5.0 + 0.001 * i for i in range(m)])

    assert 1 / partitions == pytest.approx(smallest(n, m)) == pytest.approx(two_samples(distances, n))


def test_repeats_of_one_distribution_are_not_told_apart() -> None:
    """Equal repeats: every partition is the observed one. And over many draws p is small no oftener than it says."""
    assert 1.0 == two_samples(np.zeros((6, 6)), 3)
    generator = np.random.default_rng(20261122)
    found = [two_samples(gaps(list(generator.normal(size=10))), 5) for _ in range(200)]

    assert np.mean(np.asarray(found) <= 0.05) < 0.09  # 0.05, and three standard errors of 200 draws


@pytest.mark.parametrize("first", [0, 4])
def test_both_formats_need_a_repeat(first: int) -> None:
    with pytest.raises(ValueError, match="repeats of both formats"):
        two_samples(np.zeros((4, 4)), first)


def test_distances_have_to_be_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        two_samples(np.full((4, 4), math.nan), 2)


def test_few_repeats_cannot_show_that_noisy_formats_are_distinct() -> None:
    """Three repeats of each reach p = 0.1 at the best: INDISTINCT, and the message says what was possible."""
    few = noisy(observation("gptq"), 0.001), observation("bf16")
    found = pair(*few)

    assert (Verdict.INDISTINCT, pytest.approx(0.1)) == (found.verdict, found.p_smallest)
    assert found.p is not None and found.p >= 0.1
    assert f"p = {found.p:.3g} by permuting repeats, smallest possible 0.1" in judge(*few).message


def a_case(verdict: str, *pairs: tuple[float | None, str], p: float | None = None) -> Case:
    """A case of a format with these pairs, or of a claim whose nearest format with other numbers has the p-value `p`."""
    compared = {"same": {"p": 0.9}, "far": {"p": 0.0001}, "near": {"p": p}}  # "same" has the claim's numbers
    return case(
        "test_x", verdict, pairs=tuple(a_pair("x", "y", words, p=value) for value, words in pairs),
        reexecution=None if p is None else {"own": ["base", "same"], "comparisons": compared},
    )  # fmt: skip


def test_multiplicity_is_over_every_case_that_rests_on_a_p_value() -> None:
    """A format's p-value is the largest of its distinct pairs; Holm over formats and claims; none where bits decide."""
    exact = a_case("DISTINCT", (None, "DISTINCT"))
    weak = a_case("DISTINCT", (0.001, "DISTINCT"), (0.03, "DISTINCT"))
    lost = a_case("INDISTINCT", (0.001, "DISTINCT"), (0.5, "INDISTINCT"))
    strong = a_case("IDENTICAL", (0.001, "DISTINCT"), (None, "IDENTICAL"))

    assert "" == confidence.multiplicity([exact])
    assert "1 case rests on a p-value: of 1 that found a difference 1 stay after" in confidence.multiplicity([weak, exact])
    both = confidence.multiplicity([weak, strong, a_case("UNDERPOWERED", p=0.04), exact])
    assert both.startswith("3 cases rest on a p-value: of 2 that found a difference 1 stay after Holm over the run")
    assert confidence.multiplicity([lost, strong]).startswith("2 cases rest on a p-value: of 1 that found a difference 1 stay")
    assert "of 1 that found a difference 0 stay" in confidence.multiplicity([weak, lost, lost])
    assert "of 1 that found a difference 1 stay" in confidence.multiplicity([a_case("DETECTABLE", p=0.04)])
    assert "of 3 that found a difference 1 stay" in confidence.multiplicity([weak, strong, a_case("DETECTABLE", p=0.04)])


def test_a_question_is_no_further_test() -> None:
    """Its pairs are in the cases of its formats; counted again, they would make Holm's correction harder than it is."""
    cases = [a_case("DISTINCT", (0.03, "DISTINCT"))]
    again = [*cases, replace(cases[0], test="test_question")]

    assert confidence.multiplicity(again) == confidence.multiplicity(cases)
    assert "1 case rests on a p-value: of 1 that found a difference 1 stay" in confidence.multiplicity(again)


def test_exact_formats_need_no_test() -> None:
    """Bits decide: no p-value, however few the repeats."""
    found = pair(observation("gptq"), observation("bf16"))

    assert (Verdict.DISTINCT, None, None) == (found.verdict, found.p, found.p_smallest)
