"""The matrix: its tables as one value, and what they say of each cell. How files become one: `load`."""

from collections.abc import Collection, Iterator
from typing import Literal

from pydantic import Field

from quantdet.matrix import pins
from quantdet.matrix.cell import Cell, EngineName, matches_any
from quantdet.matrix.expectations import Expect, Expectations
from quantdet.matrix.kernels import Shape, chosen
from quantdet.matrix.models import Model
from quantdet.matrix.pins import Pin
from quantdet.matrix.rows import ONLINE, Engine, EngineCall, Format, Hardware, Kernel, Picks, RunLengths
from quantdet.matrix.selectors import Question, Setting
from quantdet.matrix.shapes import Layers, layers_of
from quantdet.matrix.values import Row


class Matrix(Row):
    """The whole matrix: a file with what is read off vLLM's source beneath it. The keys of a file are those of this class.

    `kernels_from` and `picks` have had their effect on kernels, pins and formats when this is made.
    """

    schema_: Literal[1] = Field(alias="schema")
    kernels_from: str | None = Field(None, exclude=True)
    picks: dict[str, Picks] = Field(default_factory=dict, exclude=True)
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
                if not self.has_format(model_id, format_id):
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

    def has_format(self, model_id: str, format_id: str) -> bool:
        """Whether a model names the format, may have it, and its source can carry it."""
        model = self.models[model_id]
        if not matches_any(format_id, model.formats) or not matches_any(model_id, self.formats[format_id].models):
            return False
        layers = self._layers(model)
        if self.of_experts(self.formats[format_id]):  # of models with experts, or where one is named
            if layers is not None and not any(layer.experts for layer in layers):
                return False
            if layers is None and format_id not in model.formats:
                return False
        return model.hub is None or format_id in model.checkpoints or self.formats[format_id].layout in model.hub

    def of_experts(self, format_: Format) -> bool:
        """Whether the format is for models with experts only: its kernel is named for them, or they alone are quantized."""
        return bool(self.kernels[format_.kernel].moe_classes) or format_.quantizes == "experts"

    def run_for(self, cell: Cell) -> RunLengths:
        """The run lengths of the cell's model."""
        return self.run.model_copy(update=self.models[cell.model_id].run.model_dump(exclude_none=True))

    def kernel_classes(
        self, cell: Cell, vllm_version: str | None = None, packages: Collection[str] | None = None, layer: Shape | None = None
    ) -> tuple[str, tuple[str, ...]]:
        """`(kernel, class names)` that `cell` has to show; no class names where `auto` is not judged here.

        What `auto` has to be given may depend on the version, on the `packages` beside vLLM (distributions), and on the
        `layer`; without these, it is what any version has to give, with any of them, in a layer that every kernel takes.
        """
        names = self._kernels(cell, vllm_version, packages, layer)
        return " or ".join(names), tuple(c for name in names for c in self.kernels[name].classes)

    def expert_classes(
        self, cell: Cell, vllm_version: str | None = None, packages: Collection[str] | None = None
    ) -> tuple[str, ...]:
        """Class names that the cell's layers of experts have to show; none: not judged, but for mixing."""
        return tuple(c for name in self._kernels(cell, vllm_version, packages) for c in self.kernels[name].moe_classes)

    def _kernels(
        self, cell: Cell, vllm_version: str | None, packages: Collection[str] | None, layer: Shape | None = None
    ) -> tuple[str, ...]:
        format_ = self.formats[cell.format_id]
        if format_.kernel != "auto" or not pins.speaks_of(format_, layer):
            return (format_.kernel,)
        lists = pins.picked(format_, cell.hardware_id, vllm_version)
        names = [name for one in lists for name in chosen(one, self.kernels, vllm_version, packages, layer)]
        return tuple(dict.fromkeys(names)) or (format_.kernel,)

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
        asked = [row.args["tensor_parallel_size"] for row in self.settings(cell) if "tensor_parallel_size" in row.args]
        if asked and isinstance(asked[-1], int):
            return asked[-1]
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

    def expectations(self, vllm_version: str | None) -> Expectations:
        """The rows that hold for this vLLM version (all of them where none is installed), and what they depend on."""
        return Expectations(
            rows=tuple(row for row in self.expect if row.holds_for(vllm_version)),
            layers=self.layers_in,
            engines={name: format_.engine for name, format_ in self.formats.items()},
            unseen=self.engine.unseen,
            family=self.family,
            words={name: f"{format_.weights}/{format_.activations}" for name, format_ in self.formats.items()},
        )

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
