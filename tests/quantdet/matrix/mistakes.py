"""What can be wrong with a matrix file, each mistake as `TOML.PATH: what is wrong`."""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from quantdet.matrix import shapes
from quantdet.matrix.cell import ID_PATTERN, Cell, EngineName
from quantdet.matrix.expectations import Expect
from quantdet.matrix.selectors import Setting

if TYPE_CHECKING:
    from quantdet.matrix.matrix import Matrix


def _table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def _rows(raw: dict[str, Any], name: str) -> list[Any]:
    value = raw.get(name)
    return value if isinstance(value, list) else []


def ids(raw: dict[str, Any]) -> list[str]:
    """Names of rows that could not be used in node ids, `-k`, and file names."""
    return [
        f"{table}.{key if key.isprintable() else repr(key)}: id must be lower-case letters, digits, '.', '_', '-' "
        "(1 to 64, no mark at either end)"
        for table in ("hardware", "formats", "models", "kernels", "questions")
        for key in _table(raw, table)
        if not ID_PATTERN.fullmatch(key)
    ]


def references(raw: dict[str, Any]) -> list[str]:
    """Names that lead nowhere. Works on the raw tables so that it adds to pydantic's list, whatever that found."""
    kernels, formats, hardware = _table(raw, "kernels"), _table(raw, "formats"), _table(raw, "hardware")
    models = _table(raw, "models")
    found: list[str] = []

    def unknown(path: str, kind: str, name: object, table: dict[str, Any]) -> None:
        if isinstance(name, str) and name not in table:
            found.append(f"{path}: no {kind} {name!r} in this matrix")

    def stale(path: str, kind: str, globs: object, table: dict[str, Any]) -> None:
        for glob in [globs] if isinstance(globs, str) else globs if isinstance(globs, list) else []:
            if isinstance(glob, str) and not any(fnmatchcase(name, glob) for name in table):
                found.append(f"{path}: {glob!r} matches no {kind} in this matrix")

    if "auto" not in kernels:
        found.append("kernels.auto: missing; kernel = 'auto' means vLLM's own choice")
    for name, row in kernels.items():
        if isinstance(row, dict):
            stale(f"kernels.{name}.hardware", "hardware", row.get("hardware"), hardware)
            if name != "auto" and not row.get("classes"):
                found.append(f"kernels.{name}.classes: missing; a pinned kernel needs the class names it shows")
    for name, row in formats.items():
        if isinstance(row, dict):
            unknown(f"formats.{name}.kernel", "kernel", row.get("kernel"), kernels)
            stale(f"formats.{name}.hardware", "hardware", row.get("hardware"), hardware)
            picks = row.get("picks")
            for glob, kernel in picks.items() if isinstance(picks, dict) else ():
                stale(f"formats.{name}.picks", "hardware", glob, hardware)
                for named in kernel.values() if isinstance(kernel, dict) else [kernel]:
                    for one in named if isinstance(named, list) else [named]:
                        unknown(f"formats.{name}.picks.{glob}", "kernel", one, kernels)
    for name, row in models.items():
        if isinstance(row, dict):
            stale(f"models.{name}.formats", "format", row.get("formats"), formats)
            claims = row.get("claims")
            if isinstance(claims, dict):
                stale(f"models.{name}.claims.formats", "format", claims.get("formats"), formats)
            stale(f"models.{name}.hardware", "hardware", row.get("hardware"), hardware)
            like = models.get(str(row.get("layers_as", name)))
            if "layers_as" in row and not (isinstance(like, dict) and "synthetic" in like and "synthetic" not in row):
                found.append(f"models.{name}.layers_as: has to name a synthetic model, in a model that is not synthetic")
    for name, row in _table(raw, "questions").items():
        if isinstance(row, dict):
            stale(f"questions.{name}.formats", "format", row.get("formats"), formats)
            stale(f"questions.{name}.model", "model", row.get("model"), models)
    for index, row in enumerate(_rows(raw, "pin")):
        if isinstance(row, dict):
            unknown(f"pin.{index}.kernel", "kernel", row.get("kernel"), kernels)
    for name in ("expect", "setting"):
        for index, row in enumerate(_rows(raw, name)):
            if isinstance(row, dict):
                stale(f"{name}.{index}.formats", "format", row.get("formats"), formats)
                when = row.get("when")
                for key, table in ("model", models), ("format", formats), ("hardware", hardware):
                    if isinstance(when, dict):
                        stale(f"{name}.{index}.when.{key}", key, when.get(key), table)
    return found


def undividable(matrix: "Matrix") -> list[str]:
    """Models whose layers cannot be divided among the ranks that they, or a format of theirs, ask for."""
    found: dict[str, None] = {}
    for cell in matrix.cells():
        spec, ranks = matrix.models[cell.model_id].synthetic, matrix.tensor_parallel_size(cell)
        if spec is not None and (what := shapes.undividable(spec, ranks)):
            found[f"models.{cell.model_id}: tensor parallel size {ranks} of {cell.format_id} does not divide {what}"] = None
    return list(found)


def stale_rows(matrix: "Matrix") -> list[str]:
    """Formats that a model cannot have, and rows that hold for no cell."""
    cells = list(matrix.cells())
    found = [
        f"models.{name}.formats: {format_id!r} is a format of models with experts"
        for name, model in matrix.models.items()
        for format_id in model.formats
        if format_id in matrix.formats and matrix.of_experts(matrix.formats[format_id])
        if not matrix.has_format(model, format_id)
    ]
    for name in ("setting", "expect"):
        for index, row in enumerate(getattr(matrix, name)):
            mine = [cell for cell in cells if _about(row, cell, matrix.engine_of(cell))]
            if not mine:
                found.append(f"{name}.{index}: matches no cell of this matrix")
            elif name == "expect" and not any(row.can_hold(matrix.layers_in(cell)) for cell in mine):
                word = "fires in no layer" if row.fires else "fires in some layer"
                found.append(f"{name}.{index}: {word} of every model that it matches")
    return found


def _about(row: Setting | Expect, cell: Cell, engine: EngineName) -> bool:
    return row.about(cell, None, engine) if isinstance(row, Expect) else row.when.matches(cell, engine=engine)


def values(error: ValidationError) -> list[str]:
    """What pydantic found: values that do not fit their key, unknown keys, missing ones."""
    return [f"{_toml_path(one['loc'])}: {_message(one)}" for one in error.errors()]


def _toml_path(loc: tuple[int | str, ...]) -> str:
    # A union adds the name of the branch it tried ("str", "tuple[str, ...]"): not part of the file's path.
    return ".".join(str(part) for part in loc if not re.search(r"[\[(]|^(str|dict|literal)$", str(part))) or "(file)"


def _message(error: Any) -> str:
    text = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return "unknown key"
    if error["type"] == "missing":
        return "missing"
    value = error.get("input")
    return f"{text} (is {value!r})" if isinstance(value, str | int | float | bool) else text


# --------------------------------------------------------------- which row of the file a mistake is about, for people

_PATH = re.compile(r"\b(pin|setting|expect)\.(\d+)(?![\w-])")
_WORDS = {"pin": ("kernel", "layout", "source", "vllm"), "setting": ("when",), "expect": ("when", "outcome")}
_LONGEST_ROW = 120


def told(mistake: str, raw: Mapping[str, Any], text: str) -> str:
    """`mistake` with the rows that its paths count from 0 (`expect.0.when`) named after it.

    Args:
        mistake: `PATH: what is wrong`.
        raw: the file as parsed.
        text: the file, for line numbers; where its `[[NAME]]` headers are not as many as the rows there are none.
    """
    found = dict.fromkeys((match[1], int(match[2])) for match in _PATH.finditer(mistake))
    rows = [_named_row(name, index, raw, text) for name, index in found]
    return f"{mistake} ({'; '.join(rows)})" if rows else mistake


def _named_row(name: str, index: int, raw: Mapping[str, Any], text: str) -> str:
    rows = raw.get(name)
    rows = rows if isinstance(rows, list) else []
    lines = [number for number, line in enumerate(text.splitlines(), 1) if re.match(rf"\s*\[\[\s*{name}\s*\]\]", line)]
    where = f", line {lines[index]}" if len(lines) == len(rows) > index else ""
    row = rows[index] if index < len(rows) else None
    words = [f"{key} = {_as_toml(row[key])}" for key in _WORDS[name] if key in row] if isinstance(row, dict) else []
    said = ", ".join(words)
    said = f": {said[:_LONGEST_ROW]}{'...' if len(said) > _LONGEST_ROW else ''}" if said else ""
    return f"row {index + 1} of [[{name}]]{where}{said}"


def _as_toml(value: Any) -> str:
    """A value as the file would have it on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_as_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
