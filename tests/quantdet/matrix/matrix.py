"""The matrix file: TOML in, validated `Matrix` and its cells out.

Every mistake in the file is collected and reported at once, each with its TOML path (`MatrixError`).
"""

import re
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from quantdet.matrix import mistakes as matrix_mistakes
from quantdet.matrix import pins, places
from quantdet.matrix.pins import Pin
from quantdet.matrix.rows import (
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
from quantdet.matrix.selectors import Expect, Question, Setting
from quantdet.matrix.shapes import Layers, layers_of
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

    def kernel_classes(
        self, cell: Cell, vllm_version: str | None = None, packages: Collection[str] | None = None
    ) -> tuple[str, tuple[str, ...]]:
        """`(kernel, class names)` that `cell` has to show; no class names where `auto` is not judged here.

        What `auto` has to be given may depend on the version, and on the `packages` beside vLLM (distributions); without these,
        it is what any version has to give, with any of them.
        """
        names = self._kernels(cell, vllm_version, packages)
        return " or ".join(names), tuple(c for name in names for c in self.kernels[name].classes)

    def expert_classes(
        self, cell: Cell, vllm_version: str | None = None, packages: Collection[str] | None = None
    ) -> tuple[str, ...]:
        """Class names that the cell's layers of experts have to show; none: not judged, but for mixing."""
        return tuple(c for name in self._kernels(cell, vllm_version, packages) for c in self.kernels[name].moe_classes)

    def _kernels(self, cell: Cell, vllm_version: str | None, packages: Collection[str] | None) -> tuple[str, ...]:
        format_ = self.formats[cell.format_id]

        def here(name: str) -> bool:
            package = self.kernels[name].package
            return not package or packages is None or package in packages

        auto = format_.kernel == "auto"
        picked = pins.picked(format_, cell.hardware_id, vllm_version, None if packages is None else here) if auto else ()
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
        ranks = format_.tensor_parallel_size or (model.tensor_parallel_size if model else 1)
        layers = None if model is None else self._layers(model, ranks)
        fitting = [pin for pin in self.pin if pin.fits(format_, vllm_version, source, layers)]
        return min(fitting, key=lambda pin: pin.k_not_multiple_of is None, default=None)


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
        raise MatrixError(path, [places.told(mistake, raw, text) for mistake in error.mistakes]) from None


def _checked(path: Path, raw: dict[str, Any]) -> Matrix:
    found = flaw(raw)
    mistakes = matrix_mistakes.ids(raw)
    if found is not None:
        raise MatrixError(path, mistakes or [f"{found[0]}: {found[1]}"])
    try:
        matrix = Matrix.model_validate(raw)
    except ValidationError as error:
        mistakes += matrix_mistakes.values(error)
        mistakes += matrix_mistakes.references(raw)
        raise MatrixError(path, mistakes) from None
    mistakes += matrix_mistakes.references(raw)
    if not mistakes:
        mistakes += [
            *matrix_mistakes.undividable(matrix),
            *matrix_mistakes.stale_rows(matrix),
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
