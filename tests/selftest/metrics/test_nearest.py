"""Nearest formats: ties, own formats, and directions that must not be averaged."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdet.metrics.nearest import confusion, identify
from quantdet.metrics.signal_noise import Distances

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=40)

# Shaped like published results of four references: a claim made with plain gptq is nearer to gptq_marlin than to gptq in all
# of them, the other way round it is not, and the averages of both directions are above both diagonals.
GPTQ = np.array(
    [  # verified: gptq, gptq_marlin
        [[0.135, 0.141, 0.129, 0.135], [0.118, 0.121, 0.117, 0.116]],  # claimed gptq
        [[0.160, 0.163, 0.158, 0.159], [0.135, 0.133, 0.137, 0.135]],  # claimed gptq_marlin
    ]
)


def symmetrised(distances: Distances) -> Distances:
    """The seeded defect: average the two directions before looking for the nearest."""
    return (distances + distances.transpose(1, 0, 2)) / 2


def check_directions(confuse: Callable[[Distances], Distances]) -> None:
    assert [[0.0, 4.0], [0.0, 4.0]] == confuse(GPTQ).tolist()


class TestConfusion:
    def test_directions_are_kept(self) -> None:
        """The claim made with gptq is taken for gptq_marlin, 4 of 4."""
        check_directions(confusion)

    def test_seeded_defect_averages_directions(self) -> None:
        """With averaged directions the wrong identifications disappear, and the check above says so."""
        assert [[4.0, 0.0], [0.0, 4.0]] == confusion(symmetrised(GPTQ)).tolist()
        with pytest.raises(AssertionError):
            check_directions(lambda distances: confusion(symmetrised(distances)))

    def test_ties_are_split(self) -> None:
        """Two identical formats share their prompts; the claim that neither made keeps its own."""
        distances = np.array([[[1.0, 1.0], [1.0, 2.0], [2.0, 3.0]], [[2.0, 2.0], [2.0, 2.0], [0.0, 0.0]]])
        assert [[1.5, 0.5, 0.0], [0.0, 0.0, 2.0]] == confusion(distances).tolist()

    @repeatable
    @given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
    def test_rows_sum_to_the_prompts(self, seed: int, claimed: int, verified: int, prompts: int) -> None:
        """Whatever ties; the order of the prompts does not matter, that of the formats moves columns only."""
        generator = np.random.default_rng(seed)
        distances = generator.integers(0, 3, (claimed, verified, prompts)).astype(np.float64)
        counts = confusion(distances)
        assert ("float64", (claimed, verified)) == (counts.dtype.name, counts.shape)
        assert [prompts] * claimed == pytest.approx(counts.sum(axis=1).tolist())
        assert counts == pytest.approx(confusion(distances[:, :, ::-1]))
        assert counts[:, ::-1] == pytest.approx(confusion(distances[:, ::-1]))

    @pytest.mark.parametrize("wrong", [np.zeros((2, 2)), np.zeros((2, 0, 3)), np.full((1, 1, 1), math.nan), -GPTQ])
    def test_what_are_no_distances_is_refused(self, wrong: Distances) -> None:
        """Axes missing or empty, NaN, negative."""
        with pytest.raises(ValueError, match="distance"):
            confusion(wrong)


class TestIdentify:
    def test_gptq_is_taken_for_gptq_marlin(self) -> None:
        """The published example, by name."""
        found = identify(GPTQ[0], ["gptq", "gptq_marlin"], {"gptq"})
        assert ({"gptq": 0, "gptq_marlin": 4}, ("gptq_marlin",)) == (found.counts, found.overall)
        assert (0, 0, 4, 0.0) == (found.own, found.mixed, found.other, found.share)
        assert (0.0, 0.602) == pytest.approx(found.interval, abs=5e-4)

    def test_ties_are_sets(self) -> None:
        """A tie among own formats answers the claim, one with a stranger does not, and neither counts for one format."""
        distances = np.array([[1.0, 1.0, 1.0, 4.0], [1.0, 1.0, 2.0, 4.0], [2.0, 1.0, 1.0, 0.0]])
        found = identify(distances, ["a", "b", "c"], {"a", "b"})
        assert (("a", "b"), ("a", "b", "c"), ("a", "c"), ("c",)) == found.nearest
        assert {"a": 0, "b": 0, "c": 1} == found.counts
        assert {("a", "b"): 1, ("a", "b", "c"): 1, ("a", "c"): 1} == found.tied
        assert (1, 2, 1, 0.25) == (found.own, found.mixed, found.other, found.share)
        assert ("c",) == found.overall

    def test_identical_formats_tie_overall(self) -> None:
        """Equal rows have equal means, whatever the order of the prompts."""
        row = np.array([1.0, 1.0, 1e16])
        assert ("a", "b") == identify(np.stack([row, row[::-1]]), ["a", "b"], {"a"}).overall

    def test_overall_is_by_mean_and_not_by_count(self) -> None:
        """One prompt may outweigh three."""
        found = identify(np.array([[1.0, 1.0, 1.0, 9.0], [2.0, 2.0, 2.0, 2.0]]), ["a", "b"], {"a"})
        assert ({"a": 3, "b": 1}, ("b",), 0.75) == (found.counts, found.overall, found.share)

    def test_no_own_format_here(self) -> None:
        """A claim whose format cannot run here has no share: 0 of n would say that it was looked for."""
        found = identify(np.ones((1, 3)), ["a"], set())
        assert (None, None, 0, 3) == (found.share, found.interval, found.own, found.other)

    @pytest.mark.parametrize(
        ("verified", "own", "match"),
        [(["a"], {"a"}, "2 different names"), (["a", "a"], {"a"}, "2 different names"), (["a", "b"], {"c"}, "not verified: c")],
    )
    def test_names_that_do_not_fit_are_refused(self, verified: list[str], own: set[str], match: str) -> None:
        """Too few, one twice, a stranger."""
        with pytest.raises(ValueError, match=match):
            identify(np.zeros((2, 3)), verified, own)
