"""What is unexpected, one entry for each cell and cause: said once, with the cases that it took.

Cases are one entry where their judgements name the same cause; where formats say the same of each other; else where one test
says the same verdict of one cell, in decode and in prefill.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantdet.matrix.cell import PHASES
from quantdet.report.case import Case
from quantdet.report.record import place_of

# What differs from one engine of a cell to the next, though they end for the same: bytes that were free, addresses, processes.
_FIGURES = re.compile(r"0x[0-9a-fA-F]+|\d+(?:\.\d+)?")
_MOST_LINES = 16
_MOST_NAMES = 8
_LONGEST = 600


@dataclass(frozen=True)
class Entry:
    """`first`: verdict, cell and reason in one line; `lines`: what else there is to say; `cases`: in the order of the run."""

    cell: str
    first: str
    lines: tuple[str, ...]
    cases: tuple[Case, ...]

    @property
    def own(self) -> list[Case]:
        """The cases of the entry's cell, or cells; all, if it has none of its own."""
        among = {self.cell, *(name for case in self.cases for name in case.among)}
        return [case for case in self.cases if cell_of(case.nodeid) in among] or list(self.cases)

    @property
    def took(self) -> str:
        """For example `took 4 cases: test_repeat (decode, prefill), test_kernel; of others: test_question[...]`."""
        mine = [case for case in self.cases if cell_of(case.nodeid) == self.cell]
        others = [case.nodeid.rpartition("::")[2] for case in self.cases if case not in mine]
        phases: dict[str, list[str]] = {}
        for case in sorted(mine, key=lambda case: place_of(case.test)):
            ending = case.nodeid.rpartition("[")[2].removesuffix("]").removeprefix(self.cell).removeprefix("-")
            phases.setdefault(case.test, []).extend([ending] if ending else [])
        parts = [name + (f" ({', '.join(some)})" if some else "") for name, some in phases.items()]
        more = f" and {len(others) - _MOST_NAMES} more" if len(others) > _MOST_NAMES else ""
        listed = ", ".join(others[:_MOST_NAMES]) + more
        named = "; of others: ".join(filter(None, (", ".join(parts), listed))) if parts else listed
        return f"took {counted(len(self.cases), 'case')}: {named}"


def counted(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def of(cases: Iterable[Case]) -> list[Entry]:
    """The entries of the unexpected among `cases`, each where its first case stands."""
    groups: dict[tuple[str, ...], list[Case]] = {}
    unexpected = [case for case in cases if not case.expected]
    known = _together([frozenset(case.among) for case in unexpected])
    for case in unexpected:
        cause, among = case.cause, frozenset(case.among)
        if cause is not None:
            key: tuple[str, ...] = ("cause", cause.cell, _FIGURES.sub("#", cause.first))
        elif len(among) > 1:
            key = ("among", case.test, *sorted(next(group for group in known if among <= group)))
        else:
            key = ("own", case.test, cell_of(case.nodeid), case.verdict)
        groups.setdefault(key, []).append(case)
    return [_entry(group) for group in groups.values()]


def said(entries: Sequence[Entry]) -> str:
    """How many cases, and of how many causes."""
    cases = sum(len(entry.cases) for entry in entries)
    return f"{counted(cases, 'case')}, {counted(len(entries), 'cause')}"


def cell_of(nodeid: str) -> str:
    """What a case is about: its cell, claim or question, as it stands in the case's id."""
    name = nodeid.rpartition("[")[2].removesuffix("]")
    for phase in PHASES:
        name = name.removesuffix(f"-{phase}")
    return name


def _entry(cases: list[Case]) -> Entry:
    first, cause = cases[0], cases[0].cause
    if cause is not None:
        return Entry(cause.cell, _title(cause.first), _lines(cause.detail), tuple(cases))
    others = [case.message for case in cases if case.message != first.message]
    lines = _lines("\n".join([*dict.fromkeys(map(_title, others)), first.detail]))
    return Entry(cell_of(first.nodeid), _title(first.message), lines, tuple(cases))


def _title(text: str) -> str:
    """One line of bounded length: what an engine wrote in several (`\\n` by now, see `untrusted.plain`) in a row."""
    text = " ".join(re.sub(r"(?:\\n)+", " ", text).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _lines(text: str) -> tuple[str, ...]:
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], f"and {len(lines) - _MOST_LINES + 1} lines more in the JUnit file"]
    return tuple(lines)


def _together(sets: Iterable[frozenset[str]]) -> list[frozenset[str]]:
    """`sets`, those that have something in common as one."""
    found: list[frozenset[str]] = []
    for some in sets:
        touching = [group for group in found if group & some]
        found = [group for group in found if not group & some] + [some.union(*touching)]
    return found
