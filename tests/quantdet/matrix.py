"""The matrix file: TOML in, validated `Matrix` and its cells out.

Every mistake in the file is collected and reported at once, each with its TOML path (`MatrixError`).
"""

import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from quantdet import pins, rows
from quantdet.declarations import Expect, Question, Setting
from quantdet.pins import Pin
from quantdet.schema import (
    ID_PATTERN,
    ONLINE,
    Cell,
    Engine,
    EngineCall,
    EngineName,
    Format,
    Hardware,
    Kernel,
    Model,
    Row,
    RunLengths,
    matches_any,
)
from quantdet.shapes import Layers, layers_of, undividable
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


class Matrix(Row):
    """The whole file."""

    schema_: Literal[1] = Field(alias="schema")
    run: RunLengths = RunLengths()
    engine: Engine = Engine()
    transformers: EngineCall = EngineCall()
    hardware: dict[str, Hardware] = Field(min_length=1)
    kernels: dict[str, Kernel]
    formats: dict[str, Format] = Field(min_length=1)
    pin: tuple[Pin, ...] = ()
    models: dict[str, Model] = Field(min_length=1)
    setting: tuple[Setting, ...] = ()
    expect: tuple[Expect, ...] = ()
    questions: dict[str, Question] = Field(default_factory=dict)

    def cells(self) -> Iterator[Cell]:
        """Every cell that can exist, in file order: the model has the format, the kernel can run on the hardware."""
        for model_id, model in self.models.items():
            for format_id, format_ in self.formats.items():
                if not self.has_format(model, format_id):
                    continue
                for hardware_id in self.hardware:
                    where = (model.hardware, format_.hardware, self.kernels[format_.kernel].hardware)
                    if all(matches_any(hardware_id, globs) for globs in where):
                        yield Cell(model_id, format_id, hardware_id)

    def engine_of(self, cell: Cell) -> EngineName:
        """The engine that loads and runs the cell's format (vLLM: one that this matrix does not know)."""
        format_ = self.formats.get(cell.format_id)
        return "vllm" if format_ is None else format_.engine

    def settings(self, cell: Cell) -> Iterator[Setting]:
        """The `[[setting]]` rows about `cell`."""
        return (row for row in self.setting if row.when.matches(cell, engine=self.engine_of(cell)))

    def has_format(self, model: Model, format_id: str) -> bool:
        """Whether `model` names the format and its source can carry it."""
        if not matches_any(format_id, model.formats):
            return False
        layers = self._layers(model)
        if self.of_experts(self.formats[format_id]):  # of models with experts, or where one is named
            if layers is not None and not any(layer.experts for layer in layers):
                return False
            if layers is None and format_id not in model.formats:
                return False
        return model.hub is None or self.formats[format_id].layout in model.hub

    def of_experts(self, format_: Format) -> bool:
        """Whether the format is for models with experts only: its kernel is named for them, or they alone are quantized."""
        return bool(self.kernels[format_.kernel].moe_classes) or format_.quantizes == "experts"

    def run_for(self, cell: Cell) -> RunLengths:
        """The run lengths of the cell's model."""
        return self.run.model_copy(update=self.models[cell.model_id].run.model_dump(exclude_none=True))

    def kernel_classes(self, cell: Cell, vllm_version: str | None = None) -> tuple[str, tuple[str, ...]]:
        """`(kernel, class names)` that `cell` has to show; no class names where `auto` is not judged here.

        What `auto` has to be given may depend on the version; without one, it is what any version has to give.
        """
        names = self._kernels(cell, vllm_version)
        return " or ".join(names), tuple(c for name in names for c in self.kernels[name].classes)

    def expert_classes(self, cell: Cell, vllm_version: str | None = None) -> tuple[str, ...]:
        """Class names that the cell's layers of experts have to show; none: not judged, but for mixing."""
        return tuple(c for name in self._kernels(cell, vllm_version) for c in self.kernels[name].moe_classes)

    def _kernels(self, cell: Cell, vllm_version: str | None) -> tuple[str, ...]:
        format_ = self.formats[cell.format_id]
        picked = pins.picked(format_, cell.hardware_id, vllm_version) if format_.kernel == "auto" else ()
        return picked or (format_.kernel,)

    def verifying_dtype(self, cell: Cell, claimed: str) -> str:
        """The dtype in which `cell` re-executes what was computed in `claimed`: that one, where the format is not bound."""
        bound = self.formats[cell.format_id].dtype
        if isinstance(bound, str):
            return bound
        return next((row.dtype for row in self.settings(cell) if row.dtype is not None), claimed)

    def family(self, executed: str) -> str:
        """The kernel of this matrix that shows the class name `executed`; the class name where none does."""
        return next((name for name, kernel in self.kernels.items() if executed in kernel.classes), executed)

    @property
    def weight_only_classes(self) -> frozenset[str]:
        """Class names of the kernel families that do not quantize activations."""
        return frozenset(
            name for kernel in self.kernels.values() if kernel.weight_only for name in (*kernel.classes, *kernel.moe_classes)
        )

    def multiplies(self, cell: Cell) -> bool:
        """Whether the chip multiplies the number format of the cell's activations."""
        format_ = self.formats[cell.format_id]
        return (format_.native or format_.activations) in self.hardware[cell.hardware_id].native

    def tensor_parallel_size(self, cell: Cell) -> int:
        """Over how many devices the cell's layers are divided."""
        own = self.formats[cell.format_id].tensor_parallel_size
        return self.models[cell.model_id].tensor_parallel_size if own is None else own

    def layers_in(self, cell: Cell) -> Layers | None:
        """The linear layers of the cell's model as they are on one device; None: the matrix does not tell its dimensions."""
        if cell.model_id not in self.models or cell.format_id not in self.formats:  # recorded with another matrix
            return None
        return self._layers(self.models[cell.model_id], self.tensor_parallel_size(cell))

    def _layers(self, model: Model, ranks: int = 1) -> Layers | None:
        spec = (model if model.layers_as is None else self.models[model.layers_as]).synthetic
        return None if spec is None else layers_of(spec, ranks)

    def pin_for(self, format_: Format, vllm_version: str, model: Model | None = None) -> Pin | None:
        """The row about the format's kernel in this vLLM version; None: there is no way that the matrix knows.

        A layout that is published for `model` is told from one that the engine makes of its plain weights.
        """
        online = format_.layout in ONLINE and model is not None and model.hub is None
        source: pins.Source = "online" if online else "checkpoint"
        return next((pin for pin in self.pin if pin.fits(format_, vllm_version, source)), None)


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
        raise MatrixError(path, [rows.told(mistake, raw, text) for mistake in error.mistakes]) from None


def _checked(path: Path, raw: dict[str, Any]) -> Matrix:
    found = flaw(raw)
    mistakes = _id_mistakes(raw)
    if found is not None:
        raise MatrixError(path, mistakes or [f"{found[0]}: {found[1]}"])
    try:
        matrix = Matrix.model_validate(raw)
    except ValidationError as error:
        mistakes += [f"{_toml_path(e['loc'])}: {_message(e)}" for e in error.errors()]
        mistakes += _reference_mistakes(raw)
        raise MatrixError(path, mistakes) from None
    mistakes += _reference_mistakes(raw)
    if not mistakes:
        mistakes += [
            *_undividable(matrix),
            *_stale_rows(matrix),
            *pins.conflicts(matrix.pin),
            *pins.pick_conflicts(matrix.formats),
        ]
    if mistakes:
        raise MatrixError(path, mistakes)
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


def _table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def _rows(raw: dict[str, Any], name: str) -> list[Any]:
    value = raw.get(name)
    return value if isinstance(value, list) else []


def _id_mistakes(raw: dict[str, Any]) -> list[str]:
    return [
        f"{table}.{key if key.isprintable() else repr(key)}: id must be lower-case letters, digits, '.', '_', '-' "
        "(1 to 64, no mark at either end)"
        for table in ("hardware", "formats", "models", "kernels", "questions")
        for key in _table(raw, table)
        if not ID_PATTERN.fullmatch(key)
    ]


def _reference_mistakes(raw: dict[str, Any]) -> list[str]:
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
                for one in kernel.values() if isinstance(kernel, dict) else [kernel]:
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


def _undividable(matrix: Matrix) -> list[str]:
    """Models whose layers cannot be divided among the ranks that they, or a format of theirs, ask for."""
    found: dict[str, None] = {}
    for cell in matrix.cells():
        spec, ranks = matrix.models[cell.model_id].synthetic, matrix.tensor_parallel_size(cell)
        if spec is not None and (what := undividable(spec, ranks)):
            found[f"models.{cell.model_id}: tensor parallel size {ranks} of {cell.format_id} does not divide {what}"] = None
    return list(found)


def _stale_rows(matrix: Matrix) -> list[str]:
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
