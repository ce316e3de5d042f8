"""Before any BIT_EXACT counts, something has to be caught, on this hardware and in this engine (left out by --no-controls)."""

import pytest

from quantdet.matrix.cell import Cell
from quantdet.session.cases.judge import Judge


@pytest.mark.control("bit_flip")
def test_bit_flip(cell: Cell, judge: Judge) -> None:
    """One bit of one logit, turned over in the engine in one repeat, is found at its place, in decode and in prefill."""
    judge.control(cell, "bit_flip")


@pytest.mark.control("same_weights")
def test_same_weights(cell: Cell, judge: Judge) -> None:
    """The same weights under another name, in another process, are identical."""
    judge.control(cell, "same_weights")


@pytest.mark.control("one_integer")
def test_one_integer(cell: Cell, judge: Judge) -> None:
    """Weights of which one integer is another by 1 are distinct."""
    judge.control(cell, "one_integer")


@pytest.mark.control("known_noise")
def test_known_noise(cell: Cell, judge: Judge) -> None:
    """A kernel that is known to be noisy shows its noise."""
    judge.control(cell, "known_noise")
