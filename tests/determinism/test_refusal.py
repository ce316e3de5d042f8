"""Formats that the matrix declares unsupported on a hardware are refused there, not run as something else."""

import pytest

from quantdet.matrix.cell import Cell
from quantdet.session.cases.judge import Judge


@pytest.mark.declared_unsupported
def test_refusal(cell: Cell, judge: Judge) -> None:
    """The engine refuses the format, with a message."""
    judge.refused(cell)
