"""Distances over top-k logprobs: metric properties, censoring, and the published metric beside it."""

import math
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdet.metrics import distances
from quantdet.metrics.distances import Distance, Ids, Logprobs

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=30)
Side = tuple[Ids, Logprobs]
VOCABULARY = 12  # small, so that most rows share some ids and few share all


def side(*rows: dict[int, float]) -> Side:
    return (
        np.array([list(row) for row in rows], np.int32),
        np.array([list(row.values()) for row in rows], np.float32),
    )


@st.composite
def sides(draw: st.DrawFn, positions: int, infinite: bool = True) -> Side:
    """Rows of k different ids; ties are likely; -inf occurs but not in the first column."""
    k = draw(st.integers(1, 6))
    finite = st.sampled_from([0.0, -0.5, -1.0]) | st.floats(-30, 0, width=32)
    any_ = finite | st.just(-math.inf) if infinite else finite
    rows = []
    for _ in range(positions):
        ids = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=k, max_size=k, unique=True))
        rows.append(dict(zip(ids, [draw(finite), *(draw(any_) for _ in ids[1:])], strict=True)))
    return side(*rows)


@st.composite
def pairs(draw: st.DrawFn, infinite: bool = True) -> tuple[Side, Side]:
    positions = draw(st.integers(1, 5))
    return draw(sides(positions, infinite)), draw(sides(positions, infinite))


def by_definition(a: dict[int, float], b: dict[int, float]) -> tuple[float, float, int]:
    """One position of `union_topk` in plain Python, from the definition: L2, largest difference, missing ids."""

    def known(row: dict[int, float], token: int) -> float | None:
        value = row.get(token, -math.inf)
        return None if value == -math.inf else value

    floor_a, floor_b = (min(v for v in row.values() if v != -math.inf) for row in (a, b))
    differences = []
    for token in a.keys() | b.keys():
        x, y = known(a, token), known(b, token)
        if x is not None or y is not None:
            differences.append(abs((floor_a if x is None else x) - (floor_b if y is None else y)))
    return math.hypot(*differences), max(differences), len(a.keys() ^ b.keys())


def rows_of(one: Side) -> list[dict[int, float]]:
    return [dict(zip(i, p, strict=True)) for i, p in zip(one[0].tolist(), one[1].tolist(), strict=True)]


class TestUnionTopk:
    @repeatable
    @given(pairs())
    def test_follows_the_definition(self, ab: tuple[Side, Side]) -> None:
        """L2, largest difference and missing ids are those of a plain transcription of the definition."""
        a, b = ab
        expected = [by_definition(x, y) for x, y in zip(rows_of(a), rows_of(b), strict=True)]
        got = distances.union_topk(*a, *b)
        assert ("float64", (len(expected), 2)) == (got.dtype.name, got.shape)
        np.testing.assert_allclose([row[:2] for row in expected], got, rtol=1e-12, atol=0)
        assert sum(row[2] for row in expected) == distances.missing_ids(a[0], b[0])

    @repeatable
    @given(sides(3))
    def test_identical_sides_are_exactly_zero(self, a: Side) -> None:
        """A run against itself is 0, not merely small; -inf and ties included."""
        assert np.zeros((3, 2)).tolist() == distances.union_topk(*a, *a).tolist()
        assert Distance(l2=0.0, max_abs=0.0, positions=3, missing=0) == distances.distance(*a, *a)

    @repeatable
    @given(pairs())
    def test_symmetric_finite_and_not_negative(self, ab: tuple[Side, Side]) -> None:
        """Turning the sides round changes no bit; every value is finite and at least 0; max_abs is at most L2."""
        a, b = ab
        got = distances.union_topk(*a, *b)
        assert got.tolist() == distances.union_topk(*b, *a).tolist()
        assert distances.distance(*a, *b) == distances.distance(*b, *a)
        assert np.isfinite(got).all()
        assert (got >= 0).all()
        assert (got[:, 1] <= got[:, 0] * (1 + 1e-12)).all()

    @repeatable
    @given(pairs(), st.data())
    def test_order_of_ids_does_not_matter(self, ab: tuple[Side, Side], data: st.DataObject) -> None:
        """Any order of the columns of either side, ties among them, gives the same bits."""
        (ids, logprobs), b = ab
        columns = np.array(data.draw(st.permutations(range(ids.shape[1]))))
        shuffled = ids[:, columns], logprobs[:, columns]
        assert distances.union_topk(ids, logprobs, *b).tolist() == distances.union_topk(*shuffled, *b).tolist()
        assert distances.union_topk(*b, ids, logprobs).tolist() == distances.union_topk(*b, *shuffled).tolist()

    @repeatable
    @given(pairs(), st.data())
    def test_positions_are_independent_and_masked(self, ab: tuple[Side, Side], data: st.DataObject) -> None:
        """A mask gives the selected rows of the unmasked result, and counts only their missing ids."""
        a, b = ab
        mask = np.array([data.draw(st.booleans()) for _ in a[0]])
        assert distances.union_topk(*a, *b)[mask].tolist() == distances.union_topk(*a, *b, mask).tolist()
        selected = distances.missing_ids(a[0][mask], b[0][mask]) if mask.any() else 0
        assert selected == distances.missing_ids(a[0], b[0], mask)

    @repeatable
    @given(st.integers(1, 5).flatmap(lambda n: st.tuples(*[sides(n, infinite=False)] * 3)))
    def test_triangle_over_the_same_ids(self, abc: tuple[Side, Side, Side]) -> None:
        """Where nothing is censored, a detour over a third run is never shorter."""
        k = min(one[0].shape[1] for one in abc)
        ids = abc[0][0][:, :k]
        a, b, c = (one[1][:, :k] for one in abc)
        direct, first, second = (distances.union_topk(ids, x, ids, y) for x, y in ((a, c), (a, b), (b, c)))
        assert (direct <= (first + second) * (1 + 1e-12) + 1e-300).all()

    def test_a_missing_id_is_censored_at_the_smallest_reported_logprob(self) -> None:
        """Id 3 (only first) meets the second's floor -4, id 9 (only second) the first's floor -3."""
        a, b = side({1: -1.0, 3: -3.0}), side({1: -1.0, 9: -4.0})
        assert [[math.hypot(1, 1), 1.0]] == distances.union_topk(*a, *b).tolist()
        assert Distance(math.hypot(1, 1), 1.0, positions=1, missing=2) == distances.distance(*a, *b)

    def test_minus_infinity_is_no_number(self) -> None:
        """Reported on both sides it is no difference; on one side it counts as the floor of that side, as missing does."""
        inf = math.inf
        assert [[0.0, 0.0]] == distances.union_topk(*side({1: -1, 2: -inf}), *side({1: -1, 2: -inf})).tolist()
        assert [[3.0, 3.0]] == distances.union_topk(*side({1: -1, 2: -inf}), *side({1: -1, 2: -4})).tolist()
        assert [[0.0, 0.0]] == distances.union_topk(*side({1: -1, 2: -inf}), *side({1: -1})).tolist()

    def test_the_difference_is_taken_in_float64(self) -> None:
        """One ULP of float32 at -20 is seen in full, not rounded or squared away."""
        low = np.nextafter(np.float32(-20), np.float32(-21))
        assert [[2.0**-19, 2.0**-19]] == distances.union_topk(*side({1: -20.0}), *side({1: float(low)})).tolist()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"lp_a": [[-1.0, math.nan]]}, "first side: a logprob is NaN"),
            ({"lp_b": [[math.nan, -2.0]]}, "second side: a logprob is NaN"),
            ({"lp_a": [[math.inf, -2.0]]}, "first side: a logprob is [+]inf"),
            ({"lp_b": [[-math.inf, -math.inf]]}, "second side: a position has no finite logprob"),
            ({"ids_a": [[1, 1]]}, "first side: a token id is twice"),
            ({"ids_b": [[-1, 2]]}, "second side: a token id is negative"),
            ({"ids_a": [[1, 2], [1, 2]]}, "first side: ids and logprobs are"),
            ({"ids_b": [[]], "lp_b": [[]]}, "second side: ids and logprobs are"),
            ({"ids_a": [[1, 2]] * 2, "lp_a": [[-1.0, -2.0]] * 2}, "2 and 1 positions"),
        ],
    )
    @pytest.mark.parametrize("metric", [distances.distance, distances.published_topk])
    def test_bad_data_raises(self, metric: Any, change: dict[str, list[Any]], message: str) -> None:
        """NaN, infinities, ids given twice and arrays that do not fit raise and name the side; no number comes out."""
        good = {"ids_a": [[1, 2]], "lp_a": [[-1.0, -2.0]], "ids_b": [[1, 2]], "lp_b": [[-1.0, -2.0]]}
        arrays = {k: np.array(v, np.int32 if k[0] == "i" else np.float32) for k, v in (good | change).items()}
        with pytest.raises(ValueError, match=message):
            metric(**arrays)

    def test_a_mask_must_fit(self) -> None:
        """Indices in place of booleans, or a mask of another length, are refused."""
        a = side({1: -1.0}, {1: -1.0})
        for mask in (np.array([0, 1]), np.array([True])):
            with pytest.raises(ValueError, match="mask is bool"):
                distances.union_topk(*a, *a, mask)

    def test_nan_outside_the_mask_is_not_looked_at(self) -> None:
        """What the mask leaves out cannot change or spoil the result."""
        a = side({1: -1.0}, {1: math.nan})
        assert [[0.0, 0.0]] == distances.union_topk(*a, *a, np.array([True, False])).tolist()


class TestSummarise:
    def test_mean_and_maximum(self) -> None:
        """l2 is the mean over positions, max_abs the maximum."""
        assert (2.0, 4.0, 2, 7) == astuple(distances.summarise(np.array([[1.0, 4.0], [3.0, 2.0]]), 7))

    @repeatable
    @given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.randoms(use_true_random=False))
    def test_order_of_positions_does_not_matter(self, values: list[float], random: Any) -> None:
        """The mean is rounded once, so shuffled positions give the same bits."""
        shuffled = random.sample(values, len(values))
        a, b = (distances.summarise(np.array([v, v]).T, 0) for v in (values, shuffled))
        assert a == b

    def test_nothing_compared_is_no_distance(self) -> None:
        """No positions raises instead of reporting 0, by itself and through a mask that selects none."""
        with pytest.raises(ValueError, match="no positions"):
            distances.summarise(np.zeros((0, 2)), 0)
        a = side({1: -1.0})
        with pytest.raises(ValueError, match="no positions"):
            distances.distance(*a, *a, np.array([False]))
        with pytest.raises(ValueError, match="positions, 2"):
            distances.summarise(np.zeros((3, 1)), 0)


class TestPublishedTopk:
    def test_missing_ids_are_dropped(self) -> None:
        """Only ids that both report count, so the largest departure of all leaves no trace: the known bias."""
        a, b = side({1: -1.0, 2: -2.0, 3: -3.0}), side({1: -1.0, 2: -2.5, 9: -0.1})
        assert 0.5 == distances.published_topk(*a, *b)
        assert distances.distance(*a, *b).l2 > 2

    @repeatable
    @given(pairs(infinite=False))
    def test_follows_the_definition(self, ab: tuple[Side, Side]) -> None:
        """Mean over positions with a common id of the L2 over the common ids; inf when there is no such position."""
        a, b = ab
        per_position = [
            math.hypot(*(x[token] - y[token] for token in x.keys() & y.keys()))
            for x, y in zip(rows_of(a), rows_of(b), strict=True)
            if x.keys() & y.keys()
        ]
        expected = math.fsum(per_position) / len(per_position) if per_position else math.inf
        assert expected == pytest.approx(distances.published_topk(*a, *b), rel=1e-12)

    @repeatable
    @given(pairs(infinite=False))
    def test_censoring_never_lowers_a_position(self, ab: tuple[Side, Side]) -> None:
        """At each position with a common id the union distance is at least the published one."""
        a, b = ab
        union = distances.union_topk(*a, *b)[:, 0]
        for position, value in enumerate(union):
            one = slice(position, position + 1)
            published = distances.published_topk(a[0][one], a[1][one], b[0][one], b[1][one])
            assert math.isinf(published) or value >= published * (1 - 1e-12)

    @repeatable
    @given(sides(3, infinite=False), st.randoms(use_true_random=False))
    def test_agrees_with_union_where_nothing_is_missing(self, a: Side, random: Any) -> None:
        """With the same ids on both sides the two metrics are one."""
        same = a[0], np.array([[random.uniform(-30, 0) for _ in row] for row in a[0]], np.float32)
        assert distances.distance(*a, *same).l2 == pytest.approx(distances.published_topk(*a, *same), rel=1e-12)

    def test_positions_that_say_nothing_are_skipped(self) -> None:
        """No common id, or -inf among the common ones: not in the mean; nothing left: inf."""
        a = side({1: -1.0, 2: -2.0}, {1: -1.0, 2: -2.0}, {1: -1.0, 2: -2.0})
        b = side({1: -1.0, 2: -6.0}, {8: -1.0, 9: -2.0}, {1: -1.0, 2: -math.inf})
        assert 4.0 == distances.published_topk(*a, *b)
        assert math.inf == distances.published_topk(a[0][1:], a[1][1:], b[0][1:], b[1][1:])

    def test_a_dropped_minus_infinity_is_harmless(self) -> None:
        """-inf of an id that the other side does not report is dropped like any other."""
        a, b = side({1: -1.0, 2: -math.inf}), side({3: -math.inf, 1: -2.0})
        with np.errstate(invalid="raise"):
            assert 1.0 == distances.published_topk(*a, *b)


class TestDecodeDistance:
    a = side({1: -1.0}, {1: -2.0}, {1: -3.0})

    def tokens(self, *values: int) -> Ids:
        return np.array(values, np.int32)

    def test_equal_tokens_compare_every_step(self) -> None:
        """No parting: all steps are common and the published value is the published metric."""
        b = side({1: -1.0}, {1: -2.0}, {1: -6.0})
        steps, common, published = distances.decode_distance(self.tokens(5, 6, 7), *self.a, self.tokens(5, 6, 7), *b)
        assert (3, Distance(1.0, 3.0, 3, 0), 1.0) == (steps, common, published)

    @pytest.mark.parametrize(("other", "steps", "l2"), [((5, 6, 8), 3, 1.0), ((5, 8, 7), 2, 0.5), ((8, 6, 7), 1, 0.0)])
    def test_the_step_of_the_parting_is_the_last(self, other: tuple[int, ...], steps: int, l2: float) -> None:
        """The parting step has a common context and counts; later ones do not, though tokens may agree again."""
        b = side({1: -1.0}, {1: -3.0}, {1: -5.0})
        got = distances.decode_distance(self.tokens(5, 6, 7), *self.a, self.tokens(*other), *b)
        assert (steps, l2, math.inf) == (got[0], got[1].l2, got[2])
        assert steps == got[1].positions

    def test_one_side_stops_earlier(self) -> None:
        """Equal as far as it goes: the shared steps are compared, and the published value says that they part."""
        short = self.a[0][:2], self.a[1][:2]
        expected = (2, Distance(0.0, 0.0, 2, 0), math.inf)
        assert expected == distances.decode_distance(self.tokens(5, 6, 7), *self.a, self.tokens(5, 6), *short)
        assert expected == distances.decode_distance(self.tokens(5, 6), *short, self.tokens(5, 6, 7), *self.a)

    def test_what_cannot_be_compared_raises(self) -> None:
        """Tokens without their top-k, and generations without a step, are refused."""
        with pytest.raises(ValueError, match="do not fit"):
            distances.decode_distance(self.tokens(5), *self.a, self.tokens(5, 6, 7), *self.a)
        none = np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32)
        with pytest.raises(ValueError, match="no positions"):
            distances.decode_distance(self.tokens(), *none, self.tokens(), *none)
