"""The matrix file: TOML in, a checked `Matrix` out, or every mistake at once (`MatrixError`)."""

import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantdet.matrix import mistakes, pins
from quantdet.matrix.matrix import Matrix
from quantdet.untrusted import flaw, plain

MAX_BYTES = 1 << 20
_LONGEST = 500  # characters of one mistake
# tomllib's memory grows with the square of a dotted key's parts: 200 KB of them take 40 GiB.
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){32}""")


class MatrixError(Exception):
    """The matrix file cannot be used; `str()` lists every mistake, one a line, by TOML path."""

    def __init__(self, path: Path | str, mistakes: list[str]) -> None:
        self.mistakes = mistakes = [plain(mistake)[:_LONGEST] for mistake in mistakes]
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__("\n".join([f"{path}: {count}", *(f"  {mistake}" for mistake in mistakes)]))


def load(path: Path) -> Matrix:
    """Read and check a matrix file.

    Raises:
        MatrixError: the file is missing, not TOML, or wrong; all mistakes at once.
    """
    try:
        text = _text(path)
        raw = tomllib.loads(text)
    except FileNotFoundError:
        raise MatrixError(path, ["no such file"]) from None
    except (OSError, ValueError, RecursionError) as error:
        raise MatrixError(path, [f"not readable as TOML: {error}"]) from None
    try:
        return _checked(path, raw)
    except MatrixError as error:
        raise MatrixError(path, [mistakes.told(mistake, raw, text) for mistake in error.mistakes]) from None


def _checked(path: Path, raw: dict[str, Any]) -> Matrix:
    found = flaw(raw)
    wrong = mistakes.ids(raw)
    if found is not None:
        raise MatrixError(path, wrong or [f"{found[0]}: {found[1]}"])
    try:
        matrix = Matrix.model_validate(raw)
    except ValidationError as error:
        wrong += mistakes.values(error)
        wrong += mistakes.references(raw)
        raise MatrixError(path, wrong) from None
    wrong += mistakes.references(raw)
    if not wrong:
        wrong += [
            *mistakes.undividable(matrix),
            *mistakes.stale_rows(matrix),
            *pins.conflicts(matrix.pin),
            *pins.pick_conflicts(matrix.formats),
        ]
    if wrong:
        raise MatrixError(path, wrong)
    return matrix


def _text(path: Path) -> str:
    with path.open("rb") as file:
        payload = file.read(MAX_BYTES + 1)
    if len(payload) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    text = payload.decode("utf-8")
    if _LONG_KEY.search(text):
        raise ValueError("a dotted key of more than 32 parts")
    return text
