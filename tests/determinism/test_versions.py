"""Recordings of several vLLM versions: the same raw logits or not (collected with --replay of such recordings)."""

import pytest

from quantdet.matrix.cell import Cell
from quantdet.session.cases.judge import Judge


@pytest.mark.several_versions
@pytest.mark.compares_formats
def test_versions(cell: Cell, judge: Judge) -> None:
    """Where the same kernels ran, another vLLM version gives the same raw logits."""
    judge.versions(cell)
