"""Bit comparison: what is equal, where the first difference is, how far apart floats are."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from quantdet.metrics import bits as compare

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=30)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
UNSIGNED: dict[str, Any] = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32, "float64": np.uint64}
DTYPES = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]


def from_bits(dtype: np.dtype[Any], *bits: int) -> np.ndarray[Any, Any]:
    return np.array(bits, UNSIGNED[dtype.name]).view(dtype)


def quiet_nan(dtype: np.dtype[Any]) -> int:
    """Bits of the infinity; any larger magnitude is a NaN."""
    return int(np.array([np.inf], dtype).view(UNSIGNED[dtype.name])[0]) + 1


def digests(*values: int) -> compare.Digests:
    return np.repeat(np.array(values, np.uint8)[:, None], 32, axis=1)


class TestFirstDifference:
    @repeatable
    @given(st.lists(st.integers(0, 255), max_size=20))
    def test_equal_digests_have_none(self, values: list[int]) -> None:
        """Equal digests have no first difference, an empty pair included."""
        assert compare.first_difference(digests(*values), digests(*values)) is None

    @repeatable
    @given(st.data())
    def test_the_first_of_several_bytes_is_found(self, data: st.DataObject) -> None:
        """One changed byte is enough, wherever in the digest it is, and the smallest position wins."""
        count = data.draw(st.integers(1, 20))
        a = digests(*range(count))
        changed = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
        b = a.copy()
        for position in changed:
            b[position, data.draw(st.integers(0, 31))] ^= 1
        assert min(changed) == compare.first_difference(a, b) == compare.first_difference(b, a)

    def test_the_first_surplus_position_is_a_difference(self) -> None:
        """A longer run that is equal as far as it goes differs where the other ends; an earlier difference wins."""
        assert 2 == compare.first_difference(digests(1, 2), digests(1, 2, 3, 4))
        assert 0 == compare.first_difference(digests(1), digests())
        assert 1 == compare.first_difference(digests(1, 9), digests(1, 2, 3, 4))

    @pytest.mark.parametrize(
        "other",
        [
            np.zeros((2, 31), np.uint8),
            np.zeros((2, 32), np.int8),
            np.zeros(32, np.uint8),
            np.zeros((2, 32, 1), np.uint8),
        ],
    )
    def test_what_is_no_digest_is_refused(self, other: Any) -> None:
        """Another width, dtype or number of dimensions is a mistake of the caller, not a difference."""
        with pytest.raises(ValueError, match="digests"):
            compare.first_difference(digests(0, 0), other)


class TestBitsEqual:
    @repeatable
    @given(st.sampled_from(DTYPES), st.data())
    def test_equality_is_that_of_the_bits(self, dtype: np.dtype[Any], data: st.DataObject) -> None:
        """Whatever the bits mean (NaN, infinity, subnormal): equal bits are equal, one flipped bit is not."""
        unsigned = UNSIGNED[dtype.name]
        bits = data.draw(npst.arrays(unsigned, npst.array_shapes(max_dims=3, max_side=4)))
        flipped = bits.copy()
        flipped.flat[data.draw(st.integers(0, bits.size - 1))] ^= unsigned(
            1 << data.draw(st.integers(0, 8 * dtype.itemsize - 1))
        )
        assert compare.bits_equal(bits.view(dtype), bits.copy().view(dtype)) is True
        assert compare.bits_equal(bits.view(dtype), flipped.view(dtype)) is False

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_zeros_of_either_sign_differ(self, dtype: np.dtype[Any]) -> None:
        """-0.0 == +0.0 as values, but they are different bits."""
        positive, negative = np.array([0.0], dtype), np.array([-0.0], dtype)
        assert np.array_equal(positive, negative)
        assert not compare.bits_equal(positive, negative)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_nan_is_equal_to_its_own_payload_only(self, dtype: np.dtype[Any]) -> None:
        """NaN of one payload are equal bits, those of different payloads are not; `has_nan` sees both."""
        nan, other = from_bits(dtype, quiet_nan(dtype)), from_bits(dtype, quiet_nan(dtype) + 1)
        assert compare.bits_equal(nan, nan.copy())
        assert not compare.bits_equal(nan, other)
        assert compare.has_nan(nan)
        assert compare.has_nan(other)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_smallest_subnormal_is_not_zero(self, dtype: np.dtype[Any]) -> None:
        """A difference that flushing to zero would hide is seen."""
        assert not compare.bits_equal(from_bits(dtype, 1), from_bits(dtype, 0))

    def test_dtype_and_shape_count(self) -> None:
        """The same bytes under another dtype or shape are not equal; strides do not matter."""
        a = np.arange(6, dtype=np.float32)
        assert not compare.bits_equal(a, a.view(np.int32))
        assert not compare.bits_equal(a, a.reshape(2, 3))
        assert not compare.bits_equal(np.zeros((0, 3)), np.zeros((0, 4)))
        assert compare.bits_equal(a[::2], np.array([0, 2, 4], np.float32))
        assert compare.bits_equal(np.float32(1.5) * np.ones(()), np.array(1.5))

    def test_objects_are_refused(self) -> None:
        """Pointers are not data."""
        with pytest.raises(ValueError, match="objects"):
            compare.bits_equal(np.array([None]), np.array([None]))


def test_has_nan_sees_only_nan() -> None:
    """Infinities and integers are no NaN; one NaN among many is found."""
    assert not compare.has_nan(np.array([np.inf, -np.inf, 0.0]))
    assert not compare.has_nan(np.array([1, 2]))
    assert compare.has_nan(np.array([[1.0, np.nan]]))


def floats(dtype: np.dtype[Any]) -> st.SearchStrategy[np.ndarray[Any, Any]]:
    """One element of any bits but NaN, subnormals, zeros and infinities among them."""
    sign = 1 << (8 * dtype.itemsize - 1)
    magnitude = st.integers(0, quiet_nan(dtype) - 1)
    return st.builds(lambda m, s: from_bits(dtype, m + (sign if s else 0)), magnitude, st.booleans())


def nextafter(a: np.ndarray[Any, Any], towards: float) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore", under="ignore"):
        neighbour: np.ndarray[Any, Any] = np.nextafter(a, np.array(towards, a.dtype))
    return neighbour


class TestUlpDistance:
    @repeatable
    @given(st.sampled_from([d for d in DTYPES if d != BFLOAT16]).flatmap(floats))
    def test_next_float_is_one_apart(self, a: np.ndarray[Any, Any]) -> None:
        """numpy.nextafter in either direction is 1 ULP away, through subnormals, zero and into infinity."""
        for towards in (np.inf, -np.inf):
            neighbour = nextafter(a, towards)
            expected = 0 if a[0] == towards else 1
            assert [expected] == compare.ulp_distance(a, neighbour).tolist()

    @repeatable
    @given(floats(BFLOAT16))
    def test_next_bfloat16_is_one_apart(self, a: np.ndarray[Any, Any]) -> None:
        """The same for bfloat16, against the package that defines it."""
        neighbour = nextafter(a, np.inf)
        assert [0 if a[0] == np.inf else 1] == compare.ulp_distance(a, neighbour).tolist()

    @repeatable
    @given(st.sampled_from(DTYPES).flatmap(lambda d: st.tuples(floats(d), floats(d), floats(d))))
    def test_is_a_metric_on_numbers(self, abc: tuple[np.ndarray[Any, Any], ...]) -> None:
        """Symmetric, never negative, 0 exactly for equal values, and no detour is shorter."""
        a, b, c = abc

        def apart(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> int:
            return int(compare.ulp_distance(x, y)[0])

        assert apart(a, b) == apart(b, a)
        assert apart(a, b) >= 0
        assert (a[0] == b[0]) == (apart(a, b) == 0)
        assert apart(a, c) <= apart(a, b) + apart(b, c)

    @repeatable
    @given(st.sampled_from(DTYPES).flatmap(lambda d: st.tuples(floats(d), floats(d), floats(d))))
    def test_is_monotone(self, abc: tuple[np.ndarray[Any, Any], ...]) -> None:
        """Of three numbers in order, the outer two are as far apart as the two steps together."""
        low, middle, high = sorted(abc, key=lambda x: float(x[0]))
        steps = int(compare.ulp_distance(low, middle)[0]) + int(compare.ulp_distance(middle, high)[0])
        assert min(steps, 2**63 - 1) == int(compare.ulp_distance(low, high)[0])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_across_zero(self, dtype: np.dtype[Any]) -> None:
        """The zeros are one number; the smallest subnormals of either sign are 1 from it, 2 from each other."""
        sign = 1 << (8 * dtype.itemsize - 1)
        a, b = from_bits(dtype, 0, 1, 1), from_bits(dtype, sign, sign, sign + 1)
        assert [0, 1, 2] == compare.ulp_distance(a, b).tolist()

    def test_the_native_dtype_decides(self) -> None:
        """1.0 and the next bfloat16 are 1 apart in bfloat16 and 65536 after a cast to float32."""
        a, b = np.array([1.0], BFLOAT16), np.array([1.0078125], BFLOAT16)
        assert [1] == compare.ulp_distance(a, b).tolist()
        assert [65536] == compare.ulp_distance(a.astype(np.float32), b.astype(np.float32)).tolist()

    def test_the_largest_distance_saturates(self) -> None:
        """float64 of opposite signs can be further apart than int64 counts: the largest int64, never negative."""
        assert [2**63 - 1] == compare.ulp_distance(np.array([-np.inf]), np.array([np.inf])).tolist()

    def test_shape_is_kept(self) -> None:
        """The result is int64 of the input's shape, whatever the strides, also without dimensions or elements."""
        a = np.ones((3, 4), np.float32)
        got = compare.ulp_distance(a.T, a.T)
        assert ((4, 3), "int64") == (got.shape, got.dtype.name)
        assert () == compare.ulp_distance(np.array(1.0), np.array(1.0)).shape
        assert (0, 2) == compare.ulp_distance(np.ones((0, 2)), np.ones((0, 2))).shape

    @pytest.mark.parametrize(
        ("a", "b", "message"),
        [
            (np.array([1.0, np.nan]), np.array([1.0, 2.0]), "NaN"),
            (np.array([1.0, 2.0]), np.array([1.0, np.nan]), "NaN"),
            (np.array([1.0]), np.array([1.0], np.float32), "compare"),
            (np.array([1.0]), np.array([[1.0]]), "compare"),
            (np.array([1]), np.array([1]), "defined"),
            (np.array([1.0], ">f4"), np.array([1.0], ">f4"), "defined"),
        ],
    )
    def test_what_has_no_distance_is_refused(self, a: Any, b: Any, message: str) -> None:
        """NaN on either side, unlike arrays, integers and foreign byte order raise instead of giving a number."""
        with pytest.raises(ValueError, match=message):
            compare.ulp_distance(a, b)


class TestDistinct:
    def test_groups_in_order_of_first_appearance(self) -> None:
        """The first output is group 0, and each new one takes the next number."""
        assert [0, 0, 1, 0, 2, 1] == compare.distinct([b"x", b"x", b"", b"x", b"a", b""])
        assert [] == compare.distinct([])

    @repeatable
    @given(st.lists(st.binary(max_size=2), min_size=1, max_size=20))
    def test_same_group_means_same_output(self, outputs: list[bytes]) -> None:
        """Two outputs share a group exactly when they are equal, and the numbers have no gaps."""
        groups = compare.distinct(outputs)
        assert len(set(outputs)) == max(groups) + 1
        for x, group_x in zip(outputs, groups, strict=True):
            for y, group_y in zip(outputs, groups, strict=True):
                assert (x == y) == (group_x == group_y)


def nan_last(pair: tuple[Any, Any]) -> tuple[bool, float, int]:
    negated, token = pair
    return bool(np.isnan(negated)), 0.0 if np.isnan(negated) else float(negated), int(token)


class TestStableTopk:
    @repeatable
    @given(st.data())
    def test_order_of_the_engine_does_not_matter(self, data: st.DataObject) -> None:
        """Any order of the columns, ties among them, sorts to the same bytes: logprobs down, ids up among equals."""
        k = data.draw(st.integers(1, 8))
        ids = np.array([data.draw(st.permutations(range(k))) for _ in range(3)], np.int32)
        values = st.sampled_from([0.0, -1.0, -1.5, -np.inf, np.nan])
        logprobs = np.array([[data.draw(values) for _ in range(k)] for _ in range(3)], np.float32)
        shuffle = np.array(data.draw(st.permutations(range(k))))
        expected = [sorted(zip(-p, i, strict=True), key=nan_last) for i, p in zip(ids, logprobs, strict=True)]

        for columns in (slice(None), shuffle):
            got_ids, got = compare.stable_topk(ids[:, columns], logprobs[:, columns])
            assert ("int32", "float32") == (got_ids.dtype.name, got.dtype.name)
            assert [[i for _, i in row] for row in expected] == got_ids.tolist()
            np.testing.assert_array_equal(np.array([[-p for p, _ in row] for row in expected]), got)

    def test_rows_are_sorted_apart_and_the_input_is_kept(self) -> None:
        """A row's order says nothing about the next row, and the caller's arrays stay as they were."""
        ids, logprobs = np.array([[5, 3], [3, 5]], np.int32), np.array([[-1, -1], [-2, -1]], np.float32)
        got_ids, got = compare.stable_topk(ids, logprobs)
        assert [[3, 5], [5, 3]] == got_ids.tolist()
        assert [[-1, -1], [-1, -2]] == got.tolist()
        assert [[5, 3], [3, 5]] == ids.tolist()

    def test_shapes_must_fit(self) -> None:
        """A row of ids without its logprobs is a mistake of the caller."""
        with pytest.raises(ValueError, match="positions, k"):
            compare.stable_topk(np.zeros((2, 3), np.int32), np.zeros((2, 2), np.float32))
