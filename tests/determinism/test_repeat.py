"""The same request in one engine process gives the same bits."""

from quantdet.judge import Judge
from quantdet.schema import Cell, Phase


def test_repeat(cell: Cell, phase: Phase, judge: Judge) -> None:
    """Repeats have bit-identical full-vocabulary logits, logprobs and, in decode, tokens."""
    judge.repeat(cell, phase)
