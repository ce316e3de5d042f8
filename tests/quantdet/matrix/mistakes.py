"""What can be wrong with a matrix file, each mistake as `TOML.PATH: what is wrong`."""

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from quantdet.matrix import shapes
from quantdet.matrix.cell import ID_PATTERN, Cell, EngineName, matches_any
from quantdet.matrix.document import rows, table
from quantdet.matrix.expectations import Expect
from quantdet.matrix.selectors import Setting

if TYPE_CHECKING:
    from quantdet.matrix.matrix import Matrix


def ids(raw: dict[str, Any]) -> list[str]:
    """Names of rows that could not be used in node ids, `-k`, and file names."""
    return [
        f"{name}.{key if key.isprintable() else repr(key)}: id must be lower-case letters, digits, '.', '_', '-' "
        "(1 to 64, no mark at either end)"
        for name in ("hardware", "formats", "models", "kernels", "picks", "questions")
        for key in table(raw, name)
        if not ID_PATTERN.fullmatch(key)
    ]


class _Names:
    """Names and globs that lead nowhere, collected."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def unknown(self, path: str, kind: str, name: object, known: dict[str, Any]) -> None:
        if isinstance(name, str) and name not in known:
            self.found.append(f"{path}: no {kind} {name!r} in this matrix")

    def stale(self, path: str, kind: str, globs: object, known: dict[str, Any]) -> None:
        for glob in [globs] if isinstance(globs, str) else globs if isinstance(globs, list) else []:
            if isinstance(glob, str) and not any(fnmatchcase(name, glob) for name in known):
                self.found.append(f"{path}: {glob!r} matches no {kind} in this matrix")

    def picks(self, path: str, picks: object, kernels: dict[str, Any], hardware: dict[str, Any] | None) -> None:
        for glob, kernel in picks.items() if isinstance(picks, dict) else ():
            if hardware is not None:
                self.stale(path, "hardware", glob, hardware)
            for named in kernel.values() if isinstance(kernel, dict) else [kernel]:
                for one in named if isinstance(named, list) else [named]:
                    self.unknown(f"{path}.{glob}", "kernel", one, kernels)


def _of(raw: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of `[name.ROW]` that are tables, by their paths."""
    return ((f"{name}.{key}", row) for key, row in table(raw, name).items() if isinstance(row, dict))


def kernel_references(raw: dict[str, Any], kernels: dict[str, Any], hardware: dict[str, Any] | None) -> list[str]:
    """Names that lead nowhere in the tables that tell of vLLM: kernels, picks, pins.

    Args:
        raw: the file as parsed.
        kernels: every kernel that is known, of this file and of the one beneath it.
        hardware: rows that globs have to match; None: a file beneath matrices, each of which has the hardware that it has.
    """
    names = _Names()
    if "auto" not in kernels:
        names.found.append(
            "kernels.auto: missing; kernel = 'auto' means vLLM's own choice (kernels_from = 'vllm' adds the suite's kernels)"
        )
    for path, row in _of(raw, "kernels"):
        if hardware is not None:
            names.stale(f"{path}.hardware", "hardware", row.get("hardware"), hardware)
        if path != "kernels.auto" and not row.get("classes"):
            names.found.append(f"{path}.classes: missing; a pinned kernel needs the class names it shows")
    for path, row in _of(raw, "picks"):
        names.picks(path, row, kernels, hardware)
    for index, row in enumerate(rows(raw, "pin")):
        if isinstance(row, dict):
            names.unknown(f"pin.{index}.kernel", "kernel", row.get("kernel"), kernels)
    return names.found


def references(raw: dict[str, Any], beneath: dict[str, Any]) -> list[str]:
    """Names that lead nowhere. Works on the raw tables so that it adds to pydantic's list, whatever that found.

    `beneath`: the file of kernels, whose names count too.
    """
    kernels, picks = ({**table(beneath, name), **table(raw, name)} for name in ("kernels", "picks"))
    formats, hardware, models = (table(raw, name) for name in ("formats", "hardware", "models"))
    names = _Names()
    for path, row in _of(raw, "formats"):
        names.unknown(f"{path}.kernel", "kernel", row.get("kernel"), kernels)
        names.stale(f"{path}.hardware", "hardware", row.get("hardware"), hardware)
        names.unknown(f"{path}.picks", "picks", row.get("picks"), picks)
        names.picks(f"{path}.picks", row.get("picks"), kernels, hardware)
        names.stale(f"{path}.models", "model", row.get("models"), models)
    for path, row in _of(raw, "models"):
        names.stale(f"{path}.formats", "format", row.get("formats"), formats)
        claims = row.get("claims")
        if isinstance(claims, dict):
            names.stale(f"{path}.claims.formats", "format", claims.get("formats"), formats)
        names.stale(f"{path}.hardware", "hardware", row.get("hardware"), hardware)
        like = models.get(str(row.get("layers_as")))
        if "layers_as" in row and not (isinstance(like, dict) and "synthetic" in like and "synthetic" not in row):
            names.found.append(f"{path}.layers_as: has to name a synthetic model, in a model that is not synthetic")
    for path, row in _of(raw, "questions"):
        names.stale(f"{path}.formats", "format", row.get("formats"), formats)
        names.stale(f"{path}.model", "model", row.get("model"), models)
    return [
        *kernel_references(raw, kernels, hardware),
        *names.found,
        *(mistake for name in ("expect", "setting") for mistake in row_references(rows(raw, name), name, raw)),
    ]


def row_references(listed: list[Any], name: str, matrix: dict[str, Any]) -> list[str]:
    """Globs of `[[expect]]` or `[[setting]]` rows that match nothing in the tables of `matrix`."""
    names = _Names()
    for index, row in enumerate(listed):
        if isinstance(row, dict):
            names.stale(f"{name}.{index}.formats", "format", row.get("formats"), table(matrix, "formats"))
            when = row.get("when")
            for key, known in ("model", "models"), ("format", "formats"), ("hardware", "hardware"):
                if isinstance(when, dict) and not (key == "format" and _made_later(when.get("model"), matrix)):
                    names.stale(f"{name}.{index}.when.{key}", key, when.get(key), table(matrix, known))
    return names.found


def _made_later(models: object, matrix: dict[str, Any]) -> bool:
    """Whether the formats of a model that is named are made of what its checkpoint says."""
    named = [models] if isinstance(models, str) else models if isinstance(models, list) else []
    known = table(matrix, "models")
    return any(isinstance(row, dict) and "checkpoint" in row for row in (known.get(str(name)) for name in named))


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
    return [
        *(
            f"models.{name}.formats: {format_id!r} is a format of models with experts"
            for name, model in matrix.models.items()
            for format_id in model.formats
            if format_id in matrix.formats and matrix.of_experts(matrix.formats[format_id])
            if not matrix.has_format(name, format_id)
        ),
        *without_cell(matrix, "setting", matrix.setting),
        *without_cell(matrix, "expect", matrix.expect),
    ]


def without_cell(matrix: "Matrix", name: str, listed: Sequence[Setting | Expect]) -> list[str]:
    """Rows `[[name]]` that hold for no cell of `matrix`."""
    found, cells = [], list(matrix.cells())
    later = [model_id for model_id, model in matrix.models.items() if model.checkpoint is not None and not model.formats]
    for index, row in enumerate(listed):
        if any(matches_any(model_id, row.when.model) for model_id in later if row.when.model != "*"):
            continue  # its cells are made when its checkpoint has been read
        mine = [cell for cell in cells if _about(row, cell, matrix.engine_of(cell))]
        if not mine:
            found.append(f"{name}.{index}: matches no cell of this matrix")
        elif isinstance(row, Expect) and not any(row.can_hold(matrix.layers_in(cell)) for cell in mine):
            word = "fires in no layer" if row.fires else "fires in some layer"
            found.append(f"{name}.{index}: {word} of every model that it matches")
    return found


def _about(row: Setting | Expect, cell: Cell, engine: EngineName) -> bool:
    return row.about(cell, None, engine) if isinstance(row, Expect) else row.when.matches(cell, engine=engine)


def values(errors: Iterable[Any]) -> list[str]:
    """What pydantic found (`ValidationError.errors()`): values that do not fit their key, unknown keys, missing ones."""
    return [f"{_toml_path(one['loc'])}: {_message(one)}" for one in errors]


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


def told(mistake: str, raw: dict[str, Any], text: str) -> str:
    """`mistake` with the rows that its paths count from 0 (`expect.0.when`) named after it.

    Args:
        mistake: `PATH: what is wrong`.
        raw: the file as parsed.
        text: the file, for line numbers; where its `[[NAME]]` headers are not as many as the rows there are none.
    """
    found = dict.fromkeys((match[1], int(match[2])) for match in _PATH.finditer(mistake))
    named = [_named_row(name, index, raw, text) for name, index in found]
    return f"{mistake} ({'; '.join(named)})" if named else mistake


def _named_row(name: str, index: int, raw: dict[str, Any], text: str) -> str:
    listed = rows(raw, name)
    lines = [number for number, line in enumerate(text.splitlines(), 1) if re.match(rf"\s*\[\[\s*{name}\s*\]\]", line)]
    where = f", line {lines[index]}" if len(lines) == len(listed) > index else ""
    row = listed[index] if index < len(listed) else None
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
