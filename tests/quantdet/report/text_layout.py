"""What the report's tables share: pairs once, plain text of rich tables, matrices in blocks."""

import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from quantdet.judging.verdicts import Pair
from quantdet.report.case import Case, Place

_CELL = 9


def unique_pairs(cases: Iterable[Case]) -> list[tuple[Place, Pair]]:
    """Every pair once, closest first: (place, pair)."""
    seen: dict[tuple[Place, frozenset[str]], tuple[Place, Pair]] = {}
    for case in cases:
        for pair in case.pairs:
            seen.setdefault((case.place, frozenset((pair.a, pair.b))), (case.place, pair))
    return sorted(seen.values(), key=lambda row: (row[1].l2, row[0], row[1].a, row[1].b))


def table(*columns: str, fold: Sequence[str] = (), right: Sequence[str] = ()) -> Table:
    """A table without lines; only the columns of `fold` may be broken, the last way out before cutting."""
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        justify = "right" if column in right else "left"
        made.add_column(column, overflow="fold", no_wrap=column not in fold, justify=justify)  # type: ignore[arg-type]
    return made


def fitted(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, fold: Sequence[str] = (), title: str = ""
) -> str:
    """A table without lines that is at most `width` wide and loses no character of a cell.

    Args:
        columns: headers; one that begins with `>` is of numbers, on the right.
        rows: a text for each column, which may have several lines.
        width: columns of the screen, at least 6 for each column of the table.
        fold: headers whose cells are broken first, in this order, after blanks and marks such as `_`; then all others are.
        title: a line (or more) above it.
    """
    names = [column.removeprefix(">") for column in columns]
    known = [[name, *(str(row[at]) for row in rows)] for at, name in enumerate(names)]
    widths = [max(len(line) for text in texts for line in text.split("\n")) for texts in known]
    order = [names.index(name) for name in fold if name in names]
    order += [at for at in range(len(names)) if at not in order]
    gap, first = 2, order[: len(fold)]
    for least, some, gap in ((11, first, 2), (11, first, 1), (6, first, 1), (5, order, 1)):
        over = sum(widths) + gap * (len(names) - 1) - width
        for at in some:
            less = max(0, min(over, widths[at] - least))
            widths[at] -= less
            over -= less
        if over <= 0:
            break
    made = Table(box=None, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for column, name, wide in zip(columns, names, widths, strict=True):
        made.add_column(Text(folded(name, wide)), width=wide, justify="right" if column.startswith(">") else "left")
    for row in rows:
        made.add_row(*(Text(folded(str(text), wide)) for text, wide in zip(row, widths, strict=True)))
    # rich counts the padding after the last column too
    return "\n".join(filter(None, (prose(title, width) if title else "", render(made, width + gap))))


def folded(text: str, width: int) -> str:
    """A text in lines of at most `width`, broken after blanks and marks where it can be, else anywhere."""
    lines = []
    for given in text.split("\n"):
        parts = [part for part in re.split(r"(?<=[\s_\-\[=/.,:|])", given) if part]
        line = ""
        for part in parts:
            if line and len((line + part).rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            while len(part.rstrip()) > width:
                lines.append(part[:width])
                part = part[width:]
            line += part
        lines.append(line.rstrip())
    return "\n".join(lines)


def render(made: Table, width: int) -> str:
    """A rich table as plain text, without spaces at the ends of lines."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(made)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())


def prose(text: str, width: int) -> str:
    """One line, broken at blanks only, what follows indented; a longer word (a path, say) stays whole."""
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


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


def broken(name: str, width: int = _CELL, most: int | None = None) -> str:
    """A format's name in lines of about `width`, broken after underscores; parts longer than `most` anywhere."""
    lines, most = [""], most or 2 * width
    for part in re.findall(f".{{1,{most}}}", name.replace("_", "_\n")):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def joined(a: str, sign: str, b: str, room: int) -> str:
    """Two formats on one line where there is room for it, else on a line each, broken after underscores."""
    one = f"{a} {sign} {b}"
    first = room - 1 - len(sign)
    return one if len(one) <= room else f"{broken(a, first, first)} {sign}\n{broken(b, room, room)}"


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


def figure(value: float) -> str:
    """`value` with one digit behind the point; what would read 0.0 with one significant digit, unless it is 0."""
    return f"{value:.1f}" if abs(value) >= 0.05 or value == 0 else f"{value:.1g}"


def told(value: float) -> float:
    """The number that `figure` shows: what is added up of it is the sum of what people see."""
    small = abs(value) < 0.05 and value != 0
    return round(value, -math.floor(math.log10(abs(value))) if small else 1)
