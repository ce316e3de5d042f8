"""The same request in one engine process gives the same hidden states (eager cells of models with `hidden_states`)."""

import pytest

from quantdet.matrix.cell import Cell, Phase
from quantdet.session.cases.judge import Judge


@pytest.mark.hidden_states
def test_hidden_states(cell: Cell, phase: Phase, judge: Judge) -> None:
    """Repeats have bit-identical hidden states in every layer, at every position."""
    judge.hidden_states(cell, phase)
