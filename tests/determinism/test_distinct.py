"""Formats of one model can be told apart by their logits, except where the matrix says that they are the same."""

import pytest

from quantdet.matrix.cell import Cell
from quantdet.session.cases.judge import Judge


@pytest.mark.compares_formats
def test_distinct(cell: Cell, judge: Judge) -> None:
    """On the same forced token ids the format differs from every other one measured on this hardware."""
    judge.distinct(cell)
