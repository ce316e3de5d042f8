"""An engine that refuses a cell, and what the matrix says of it."""

import re

from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import Cell
from quantdet.matrix.expectations import Expectations, describe

# A file of rows, since a checkpoint of somebody's own is in no matrix.
_HINT = "not declared: if this is right, add an [[expect]] row with outcome = 'unsupported' (--expect FILE)"


def refusal(cell: Cell, message: str | None, expectations: Expectations) -> Judgement:
    """The engine refused (`message`) or took (None) a cell; the matrix may have said that it would refuse."""
    row = expectations.unsupported(cell)
    figures: dict[str, object] = {"expectation": describe(row, "accepted")}
    if message is None:
        text = "the engine accepts a format that the matrix says is unsupported here"
        return Judgement(Verdict.INVALID, cell, "", text, False, figures)
    if row is not None and row.match and not re.search(row.match, message):
        text = f"refused for another reason than the declared one ({row.match!r}): {message[:200]}"
        return Judgement(Verdict.INVALID, cell, "", text, False, figures)
    short = message if len(message) <= 300 else message[:297] + "..."
    return Judgement(
        Verdict.UNSUPPORTED, cell, "", f"engine refused: {short}", row is not None, figures,
        "" if row is not None else _HINT,
    )  # fmt: skip
