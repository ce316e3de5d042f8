"""What was tested and what was not: every cell of the matrix, with need and have."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reason:
    number: int
    text: str
    cells: int


@dataclass(frozen=True)
class Covered:
    """One model: formats by hardware. A cell is None (not in the matrix), "" (tested), or the number of its reason."""

    model: str
    hardware: list[str]
    rows: list[tuple[str, list[int | str | None]]]
    tested: int
    cells: int


def covered(rows: list[dict[str, Any]]) -> tuple[list[Covered], list[Reason]]:
    """Tables by model and the numbered reasons, most cells first."""
    counts: dict[str, int] = {}
    for row in rows:
        if row["state"] != "tested":
            counts[row["reason"]] = counts.get(row["reason"], 0) + 1
    texts = sorted(counts, key=lambda text: (-counts[text], text))
    numbers = {text: index for index, text in enumerate(texts, 1)}
    made = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        hardware = list(dict.fromkeys(row["hardware"] for row in rows if row["model"] == model))
        hardware = [name for name in dict.fromkeys(row["hardware"] for row in rows) if name in hardware]
        cells: dict[tuple[str, str], int | str] = {
            (row["format"], row["hardware"]): "" if row["state"] == "tested" else numbers[row["reason"]] for row in own
        }
        formats = list(dict.fromkeys(row["format"] for row in own))
        table = [(name, [cells.get((name, where)) for where in hardware]) for name in formats]
        made.append(Covered(model, hardware, table, sum(row["state"] == "tested" for row in own), len(own)))
    return made, [Reason(numbers[text], text, counts[text]) for text in texts]
