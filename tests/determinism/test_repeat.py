"""The same request in one engine process gives the same bits."""

from quantdet.matrix.cell import Cell, Phase
from quantdet.session.cases.judge import Judge


def test_repeat(cell: Cell, phase: Phase, judge: Judge) -> None:
    """Repeats have bit-identical full-vocabulary logits, logprobs and, in decode, tokens."""
    judge.repeat(cell, phase)
