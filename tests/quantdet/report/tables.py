"""What the report's tables share: where a case was measured, pairs once, plain text of rich tables, matrices in blocks."""

import io
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Case = dict[str, Any]
_CELL = 9


def place(properties: dict[str, str]) -> str:
    """Model and hardware of a case, with the vLLM version where a run has several."""
    version = properties.get("case.vllm", "")
    return f"{properties['case.model']} on {properties['case.hardware']}{f', vLLM {version}' if version else ''}"


def unique_pairs(cases: Iterable[Case]) -> list[tuple[str, dict[str, Any]]]:
    """Every pair once, closest first: (place, pair)."""
    seen: dict[tuple[str, frozenset[str]], tuple[str, dict[str, Any]]] = {}
    for case in cases:
        for pair in case["pairs"]:
            where = place(case["properties"])
            seen.setdefault((where, frozenset((pair["a"], pair["b"]))), (where, pair))
    return sorted(seen.values(), key=lambda row: (row[1]["l2"], row[0], row[1]["a"], row[1]["b"]))


def table(*columns: str, fold: Sequence[str] = (), right: Sequence[str] = ()) -> Table:
    """A table without lines; only the columns of `fold` may be broken, the last way out before cutting."""
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        justify = "right" if column in right else "left"
        made.add_column(column, overflow="fold", no_wrap=column not in fold, justify=justify)  # type: ignore[arg-type]
    return made


def render(made: Table, width: int) -> str:
    """A rich table as plain text, without spaces at the ends of lines."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(made)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())


def prose(text: str, width: int) -> str:
    """One line, broken at blanks only, what follows indented."""
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)


def matrix(corner: str, rows: Sequence[str], columns: Sequence[str], cell: Callable[[str, str], str], width: int) -> list[str]:
    """A matrix as text: as many blocks of columns as the width asks for, each with the names of the rows."""
    names = max(len(corner), *(len(row) for row in rows))
    names = min(names, width // 3)
    each = max((len(part) for column in columns for part in broken(column).split("\n")), default=0)
    each = max(each, *(len(cell(row, column)) for row in rows for column in columns))
    count = max(1, (width - names) // (each + 2))
    blocks = []
    for first in range(0, len(columns), count):
        some = columns[first : first + count]
        made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        made.add_column(escape(corner), overflow="fold", width=names)
        for column in some:
            made.add_column(escape(broken(column)), no_wrap=True, min_width=each)
        for row in rows:
            made.add_row(escape(row), *(escape(cell(row, column)) for column in some))
        blocks.append(render(made, width))
    return blocks


def broken(name: str, width: int = _CELL) -> str:
    """A format's name in lines of about `width`, broken after underscores."""
    lines = [""]
    for part in name.replace("_", "_\n").split("\n"):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def joined(a: str, sign: str, b: str, room: int) -> str:
    """Two formats on one line where there is room for it, else on a line each, broken after underscores."""
    one = f"{a} {sign} {b}"
    return one if len(one) <= room else f"{broken(a, room - 1 - len(sign))} {sign}\n{broken(b, room)}"


def nats(value: float | None) -> str:
    """A distance as the published tables print it: 3.88e-02, `inf`; empty if there is none."""
    return "" if value is None else f"{value:.2e}" if math.isfinite(value) else f"{value}"


def one_line(value: Any) -> str:
    """Compact JSON; six digits; what JSON has no number for becomes a word ("inf")."""
    return json.dumps(_plain(value), separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
