"""The kernel that ran is the kernel that the row asks for."""

from quantdet.matrix.cell import Cell
from quantdet.session.cases.judge import Judge


def test_kernel(cell: Cell, judge: Judge) -> None:
    """Every linear layer executes the requested kernel: none substituted, none mixed in."""
    judge.kernel(cell)
