"""Another engine process gives the same bits (collected with --lifetimes 2 or more)."""

import pytest

from quantdet.matrix.cell import Cell
from quantdet.session.cases.judge import Judge


@pytest.mark.several_lifetimes
def test_restart(cell: Cell, judge: Judge) -> None:
    """Lifetimes have bit-identical logits for the same requests."""
    judge.restart(cell)
