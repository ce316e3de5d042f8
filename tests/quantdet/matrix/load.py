"""The files of a matrix: TOML in, a checked `Matrix` out, or every mistake at once (`MatrixError`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from quantdet.matrix import inherit, kernel_file, mistakes, pins
from quantdet.matrix.document import Document, MatrixError, read
from quantdet.matrix.expectations import Expect
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.values import Row

__all__ = ["MatrixError", "load"]


class Expected(Row):
    """A file of somebody's own expectations (`--expect`): nothing but `[[expect]]` rows, as a matrix has them."""

    schema_: Literal[1] = Field(1, alias="schema")
    expect: tuple[Expect, ...]


def load(path: Path, expect: Sequence[Path] = ()) -> Matrix:
    """Read and check a matrix file, with what belongs beneath it.

    Args:
        path: the matrix.
        expect: files with more `[[expect]]` rows; they come before the matrix's, in this order, so that theirs count.

    Raises:
        MatrixError: a file is missing, not TOML, or wrong; all mistakes of all files at once.
    """
    matrix, raw, wrong = None, None, []
    try:
        file = read(path)
        raw = file.raw
        matrix = _checked(file)
    except MatrixError as error:
        wrong.append(error)
    more: list[Expect] = []
    for one in expect:
        try:
            more += _expected(read(one), raw, matrix)
        except MatrixError as error:
            wrong.append(error)
    if wrong:
        raise wrong[0].beside(*wrong[1:])
    assert matrix is not None
    return _before(matrix, more)


def with_expectations(matrix: Matrix, expect: Sequence[Path]) -> Matrix:
    """`matrix` with the rows of more files before its own, whatever its models were made of.

    Raises:
        MatrixError: all mistakes of these files at once.
    """
    names: dict[str, Any] = {name: dict.fromkeys(getattr(matrix, name)) for name in ("formats", "models", "hardware")}
    more: list[Expect] = []
    wrong = []
    for one in expect:
        try:
            more += _expected(read(one), names, matrix)
        except MatrixError as error:
            wrong.append(error)
    if wrong:
        raise wrong[0].beside(*wrong[1:])
    return _before(matrix, more)


def _before(matrix: Matrix, more: Sequence[Expect]) -> Matrix:
    """`matrix` with rows that count before its own."""
    return matrix.model_copy(update={"expect": (*more, *matrix.expect)}) if more else matrix


def _checked(file: Document) -> Matrix:
    kernel_file.without_flaw(file)
    below = kernel_file.read_for(file)
    wrong = []
    try:
        if below is not None:
            kernel_file.check(below)
    except MatrixError as error:
        wrong.append(error)
    matrix, found = _validated(file.raw, {} if below is None else below.raw)
    if found:
        told = [mistakes.told(mistake, file.raw, file.text) for mistake in found]
        raise MatrixError(file.path, told, *wrong)
    if wrong:
        raise wrong[0]
    assert matrix is not None
    return matrix


def _validated(raw: dict[str, Any], below: dict[str, Any]) -> tuple[Matrix | None, list[str]]:
    """The matrix, if it is one, and the mistakes of its own file."""
    wrong, whole, formats = mistakes.ids(raw), kernel_file.merged(raw, below), None
    try:
        if isinstance(raw.get("formats"), dict):
            formats = inherit.formats(raw["formats"], whole["picks"] if isinstance(whole.get("picks"), dict) else {})
            whole["formats"] = formats.rows
            wrong += formats.mistakes
        matrix = Matrix.model_validate(whole)
    except ValidationError as error:
        found = error.errors() if formats is None else formats.own(error.errors())
        wrong += mistakes.values(one for one in found if kernel_file.is_own(raw, one["loc"]))
        return None, [*wrong, *mistakes.references(raw, below)]
    except inherit.TooMuch as error:
        return None, [str(error)]
    wrong += mistakes.references(raw, below)
    if not wrong:
        inline = {
            f"formats.{name}.picks": matrix.formats[name].picks for name in raw["formats"] if _inline(raw["formats"][name])
        }
        own = {f"picks.{name}": matrix.picks[name] for name in raw.get("picks", {})}
        wrong += [
            *mistakes.undividable(matrix),
            *mistakes.stale_rows(matrix),
            *pins.conflicts(matrix.pin[: len(raw.get("pin", []))]),
            *pins.pick_conflicts({**own, **inline}),
        ]
    return matrix, wrong


def _inline(row: dict[str, Any]) -> bool:
    return isinstance(row.get("picks"), dict)


def _expected(file: Document, raw: dict[str, Any] | None, matrix: Matrix | None) -> tuple[Expect, ...]:
    """The rows of a file of expectations. `raw`, `matrix`: what they are about; None where that is no matrix."""
    kernel_file.without_flaw(file)
    wrong = [] if raw is None else mistakes.row_references(file.rows("expect"), "expect", raw)
    found: tuple[Expect, ...] = ()
    try:
        found = Expected.model_validate(file.raw).expect
    except ValidationError as error:
        wrong = [*mistakes.values(error.errors()), *wrong]
    if matrix is not None and not wrong:
        wrong += mistakes.without_cell(matrix, "expect", found)
    if wrong:
        raise MatrixError(file.path, [mistakes.told(mistake, file.raw, file.text) for mistake in wrong])
    return found
