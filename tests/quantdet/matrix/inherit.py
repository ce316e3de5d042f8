"""What a format takes over: the keys of another one (`like`), and a table of `[picks]` by its name.

Both are resolved before a file is checked, so that everything else sees formats whose every key is given inline.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# A file of one megabyte could ask for terabytes: one long row, and thousands that are like it.
MOST = 100_000


class TooMuch(ValueError):
    """More would be taken over than any matrix needs; `str()` begins with the TOML path."""


@dataclass(frozen=True)
class Formats:
    """`[formats]` with every key inline.

    Attributes:
        written: the rows as the file has them.
        rows: the rows as they count.
        mistakes: names in `like` that lead nowhere or in a circle.
    """

    written: dict[str, Any]
    rows: dict[str, Any]
    mistakes: list[str]
    _lost: frozenset[str] = field(default_factory=frozenset)  # rows of which it is not known what they take over

    def own(self, errors: Iterable[Any]) -> list[Any]:
        """Pydantic's errors about `rows` without those that are about what a row takes over: told where it is written."""
        found = list(errors)
        told = {(tuple(one["loc"]), one["msg"]) for one in found}
        return [one for one in found if not self._taken_over(one, told)]

    def _taken_over(self, error: Any, told: set[tuple[tuple[Any, ...], str]]) -> bool:
        table, name, key = (*error["loc"], None, None, None)[:3]
        row = self.written.get(name) if table == "formats" else None
        if not isinstance(row, dict):
            return False
        if key == "picks" and isinstance(row.get("picks"), str):
            return True
        if key == "title" or (key is not None and key in row):
            return False
        if name in self._lost:
            return True
        return (("formats", row.get("like"), *error["loc"][2:]), error["msg"]) in told


def formats(written: dict[str, Any], picks: dict[str, Any]) -> Formats:
    """Resolve `like` and named picks of the table `[formats]`.

    A format takes over every key that it does not give itself but the title; `picks` belong to `kernel = "auto"` and are not
    taken over by a row that names another kernel.

    Args:
        written: the table as parsed; anything may stand in it.
        picks: the tables `[picks.NAME]` by name.

    Raises:
        TooMuch: more than `MOST` values would be taken over.
    """
    work = _Resolving(written, picks)
    for name in written:
        work.resolve(name)
    return Formats(written, {name: work.rows[name] for name in written}, work.mistakes, frozenset(work.lost))


class _Resolving:
    """Rows one after the other, each once; a loop and no recursion, since a chain may be as long as a file."""

    def __init__(self, written: dict[str, Any], picks: dict[str, Any]) -> None:
        self.written, self.picks = written, picks
        self.rows: dict[str, Any] = {}
        self.mistakes: list[str] = []
        self.lost: set[str] = set()
        self._taken = 0

    def resolve(self, name: str) -> None:
        for one in reversed(self._along(name)):
            self.rows[one] = self._whole(one)

    def _along(self, start: str) -> list[str]:
        """The rows from `start` along `like` that are not resolved yet, the last of them like none of these."""
        path: dict[str, None] = {}
        at = start
        while at not in self.rows:
            if at in path:
                circle = list(path)[list(path).index(at) :]
                self.mistakes.append(f"formats.{at}.like: leads back to itself: {' -> '.join([*circle, at])}")
                self.lost.update(circle)
                break
            path[at] = None
            base = _base(self.written[at])
            if base is None:
                break
            if not isinstance(base, str) or base not in self.written:
                need = f"no format {base!r} in this matrix" if isinstance(base, str) else "needs the name of a format"
                self.mistakes.append(f"formats.{at}.like: {need}")
                self.lost.add(at)
                break
            at = base
        return list(path)

    def _whole(self, name: str) -> Any:
        written, base = self.written[name], _base(self.written[name])
        if not isinstance(written, dict):
            return written
        if isinstance(base, str) and base in self.lost:
            self.lost.add(name)
        row = _joined(written, None if base is None or name in self.lost else self.rows[base])
        named = row.get("picks")
        if isinstance(named, str):
            del row["picks"]  # an unknown name is a mistake that `mistakes.references` tells
            if named in self.picks:
                row["picks"] = self.picks[named]
        if base is not None or isinstance(named, str):
            self._taken += _values(row)
        if self._taken > MOST:
            raise TooMuch(f"formats: 'like' and 'picks' take over more than {MOST} values")
        return row


def _base(row: Any) -> Any:
    return row.get("like") if isinstance(row, dict) else None


def _joined(written: dict[str, Any], base: Any) -> dict[str, Any]:
    """A new row: what is written, and what it takes over of `base`, another one that is whole."""
    own = {key: value for key, value in written.items() if key != "like"}
    if not isinstance(base, dict):
        return own
    row = {**{key: value for key, value in base.items() if key != "title"}, **own}
    if row.get("kernel") != "auto" and "picks" not in own:
        row.pop("picks", None)
    return row


def _values(value: Any) -> int:
    """How many values there are in a value; nesting has been bounded."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_values, inner))
