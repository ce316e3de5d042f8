"""What is read off vLLM's source, in a file of its own beneath a matrix: kernels, what `auto` has to be given, pins.

The suite has one, `vllm_kernels.toml`. A matrix says which it wants:

- nothing, and no `[kernels]`: the suite's own;
- `kernels_from = "vllm"`: the suite's own; any other text is a path relative to the matrix;
- `[kernels]` of its own without `kernels_from`: none, the matrix is whole.

Rows of the matrix come first: its kernels and picks replace those of the same name, its pins are looked up before the file's,
and a key of its `[engine]` replaces the file's.
"""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from quantdet.matrix import mistakes, pins
from quantdet.matrix.document import Document, MatrixError, read, rows, table
from quantdet.matrix.pins import Pin
from quantdet.matrix.rows import EngineFacts, Kernel, Picks
from quantdet.matrix.values import Row
from quantdet.untrusted import flaw

SHIPPED = Path(__file__).with_name("vllm_kernels.toml")
_OWN = "vllm"  # as kernels_from says it


class Beneath(Row):
    """The whole file."""

    schema_: Literal[1] = Field(alias="schema")
    engine: EngineFacts = EngineFacts()
    kernels: dict[str, Kernel] = Field(min_length=1)
    picks: dict[str, Picks] = Field(default_factory=dict)
    pin: tuple[Pin, ...] = ()


def read_for(matrix: Document) -> Document | None:
    """The file that belongs beneath a matrix; None: the matrix is whole.

    Raises:
        MatrixError: it cannot be read.
    """
    named = matrix.raw.get("kernels_from")
    if named is None and "kernels" in matrix.raw:
        return None
    if named is None or named == _OWN:
        return read(SHIPPED)
    if not isinstance(named, str) or not named:
        raise MatrixError(matrix.path, [f"kernels_from: needs {_OWN!r}, the suite's own kernels, or the path of a file"])
    path = matrix.path.parent / named
    if not os.path.exists(path):  # False for a name that no file can have, too
        raise MatrixError(matrix.path, [f"kernels_from: no such file: {path} ({_OWN!r} are the suite's own kernels)"])
    return read(path, regular=True)


def without_flaw(file: Document) -> None:
    """Refuse what no file may hold.

    Raises:
        MatrixError: the file has unprintable characters, endless nesting or numbers without end.
    """
    found = flaw(file.raw)
    if found is not None:
        raise MatrixError(file.path, mistakes.ids(file.raw) or [f"{found[0]}: {found[1]}"])


def check(file: Document) -> None:
    """Check the file by itself. Whether its globs match hardware depends on the matrix, and is none of its mistakes.

    Raises:
        MatrixError: with all of its mistakes.
    """
    without_flaw(file)
    wrong = mistakes.ids(file.raw)
    try:
        known = Beneath.model_validate(file.raw)
    except ValidationError as error:
        known = None
        wrong += mistakes.values(error.errors())
    wrong += mistakes.kernel_references(file.raw, file.table("kernels"), None)
    if known is not None and not wrong:
        named = {f"picks.{name}": picks for name, picks in known.picks.items()}
        wrong += [*pins.conflicts(known.pin), *pins.pick_conflicts(named)]
    if wrong:
        raise MatrixError(file.path, [mistakes.told(mistake, file.raw, file.text) for mistake in wrong])


def merged(matrix: dict[str, Any], beneath: dict[str, Any]) -> dict[str, Any]:
    """The tables of a matrix with a file beneath it. What is no table stays, for the check of the matrix to name."""
    whole = dict(matrix)
    for name in ("engine", "kernels", "picks"):
        if isinstance(matrix.get(name, {}), dict):
            whole[name] = {**table(beneath, name), **table(matrix, name)}
    if isinstance(matrix.get("pin", []), list):
        whole["pin"] = [*rows(matrix, "pin"), *rows(beneath, "pin")]
    return whole


def is_own(matrix: dict[str, Any], place: tuple[int | str, ...]) -> bool:
    """Whether a place in the merged tables is one of the matrix, and not of the file beneath it."""
    name, key = (*place, None, None)[:2]
    if name == "pin" and isinstance(key, int):
        return key < len(rows(matrix, "pin"))
    return name not in ("engine", "kernels", "picks") or key is None or key in table(matrix, str(name))
