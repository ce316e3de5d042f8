"""One TOML file of the matrix as it was read, and the mistakes of such files as one text."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantdet.untrusted import plain, read_bounded

MAX_BYTES = 1 << 20
_LONGEST = 500  # characters of one mistake
# tomllib's memory grows with the square of a dotted key's parts: 200 KB of them take 40 GiB.
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){32}""")


class MatrixError(Exception):
    """Files of a matrix cannot be used; `str()` lists every mistake, one a line, by file and TOML path.

    `others`: what is wrong with other files of the same matrix.
    """

    def __init__(self, path: Path | str, mistakes: list[str], *others: "MatrixError") -> None:
        self._head = path, [plain(mistake)[:_LONGEST] for mistake in mistakes]
        self._others = others
        own = self._head[1]
        self.mistakes: list[str] = [*own, *(mistake for other in others for mistake in other.mistakes)]
        count = "1 mistake" if len(own) == 1 else f"{len(own)} mistakes"
        super().__init__("\n".join([f"{path}: {count}", *(f"  {mistake}" for mistake in own), *map(str, others)]))

    def beside(self, *others: "MatrixError") -> "MatrixError":
        """This one, with those of more files behind it."""
        return MatrixError(*self._head, *self._others, *others) if others else self


@dataclass(frozen=True)
class Document:
    """A TOML file: where it is, its text (for line numbers) and what it says."""

    path: Path
    text: str
    raw: dict[str, Any]

    def table(self, name: str) -> dict[str, Any]:
        """A table of the file; empty where there is none, or something else in its place."""
        return table(self.raw, name)

    def rows(self, name: str) -> list[Any]:
        """The rows `[[name]]`; empty where there are none, or something else in their place."""
        return rows(self.raw, name)


def table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """`[name]` of a file; empty where there is none, or something else in its place."""
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def rows(raw: dict[str, Any], name: str) -> list[Any]:
    """`[[name]]` of a file; empty where there are none, or something else in their place."""
    value = raw.get(name)
    return value if isinstance(value, list) else []


def read(path: Path, *, regular: bool = False) -> Document:
    """The file at `path`, within its bounds. `regular`: nothing else than a regular file, since a file names it and no person.

    Raises:
        MatrixError: it is missing, too large, or not TOML.
    """
    try:
        text = _text(path, regular)
        return Document(path, text, tomllib.loads(text))
    except FileNotFoundError:
        raise MatrixError(path, ["no such file"]) from None
    except (OSError, ValueError, RecursionError) as error:
        raise MatrixError(path, [f"not readable as TOML: {error}"]) from None


def _text(path: Path, regular: bool) -> str:
    if regular:
        payload = read_bounded(path, MAX_BYTES)
    else:
        with path.open("rb") as file:
            payload = file.read(MAX_BYTES + 1)
    if len(payload) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    text = payload.decode("utf-8")
    if _LONG_KEY.search(text):
        raise ValueError("a dotted key of more than 32 parts")
    return text
