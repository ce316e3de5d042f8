"""The matrix file: TOML in, validated `Matrix` and its cells out.

Every mistake in the file is collected and reported at once, each with its TOML path (`MatrixError`).
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

# Safe in pytest node ids, in `-k` expressions, as a file name and in artefact names.
ID_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")

Kind = Literal["cpu", "cuda", "rocm"]
Native = Literal["fp32", "bf16", "fp16", "int8", "fp8", "fp4"]
Layout = Literal["plain", "awq", "gptq", "ct", "fp8", "bnb", "torchao"]
Weights = Literal[
    "bf16", "int4-sym", "int4-asym", "int8-sym", "int8-asym", "int8-channel", "fp8-tensor", "fp8-channel",
    "fp8-block", "nvfp4", "mxfp4", "mxfp8", "nf4", "bnb-int8", "int4-torchao",
]  # fmt: skip
Activations = Literal["none", "int8", "fp8", "fp4", "mxfp8"]
Dtype = Literal["bfloat16", "float16", "float32"]
Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")

# Which numbers a layout can carry, with which activations: a row outside this table is a mistake in the matrix.
CARRIES: dict[str, set[tuple[str, str]]] = {
    "plain": {("bf16", "none")},
    "awq": {("int4-asym", "none")},
    "gptq": {("int4-sym", "none"), ("int8-sym", "none")},
    "ct": {
        ("int4-sym", "none"), ("int4-asym", "none"), ("int8-sym", "none"), ("int8-asym", "none"),
        ("int8-channel", "int8"), ("fp8-channel", "fp8"), ("fp8-channel", "none"), ("nvfp4", "none"),
        ("nvfp4", "fp4"), ("mxfp4", "none"), ("mxfp8", "mxfp8"),
    },
    "fp8": {("fp8-tensor", "fp8"), ("fp8-block", "fp8")},
    "bnb": {("nf4", "none"), ("bnb-int8", "int8")},
    "torchao": {("int4-torchao", "none")},
}  # fmt: skip


class MatrixError(Exception):
    """The matrix file cannot be used; `str()` lists every mistake, one a line, by TOML path."""

    def __init__(self, path: Path | str, mistakes: list[str]) -> None:
        self.mistakes = mistakes
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__("\n".join([f"{path}: {count}", *(f"  {mistake}" for mistake in mistakes)]))


def _specifier(text: str) -> str:
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        raise ValueError(f"{text!r} is not a version specifier, for example '>=0.26,<0.33'") from None
    return text


Specifier = Annotated[str, AfterValidator(_specifier)]
PositiveInt = Annotated[int, Field(gt=0)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunLengths(_Row):
    """How much is measured in a cell."""

    repeats: int = Field(5, ge=2, le=10_000)
    lifetimes: int = Field(1, ge=1, le=1_000)
    decode_tokens: int = Field(12, ge=2, le=4096)
    top_k: int = Field(20, ge=2, le=1000)
    time_limit_s: float = Field(300, gt=0)


class Engine(_Row):
    """Arguments and environment that every engine lifetime gets; a pin adds to them."""

    args: dict[str, str | int | float | bool] = {}
    env: dict[str, str] = {}
    max_text_tokens: PositiveInt = 1024


class Hardware(_Row):
    """One kind of machine: what identifies it and what it multiplies natively."""

    kind: Kind
    title: str
    native: tuple[Native, ...]
    isa: tuple[str, ...] = ()
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d+$")] | None = None
    gfx: Annotated[str, Field(pattern=r"^gfx[0-9a-f]+$")] | None = None

    @model_validator(mode="after")
    def _identified(self) -> "Hardware":
        key = {"cpu": "isa", "cuda": "compute_capability", "rocm": "gfx"}[self.kind]
        if not getattr(self, key):
            raise ValueError(f"kind {self.kind!r} needs {key!r}")
        for other in {"isa", "compute_capability", "gfx"} - {key}:
            if getattr(self, other):
                raise ValueError(f"kind {self.kind!r} has no {other!r}")
        return self


class Kernel(_Row):
    """A kernel family: the class names vLLM shows for it and the hardware it can exist on (globs)."""

    hardware: tuple[str, ...] = Field(min_length=1)
    classes: tuple[str, ...] = ()


class Format(_Row):
    """A quantization format: checkpoint layout x kernel."""

    title: str
    layout: Layout
    weights: Weights
    kernel: str
    dtype: Dtype | dict[Literal["cpu", "cuda", "rocm", "default"], Dtype]
    activations: Activations = "none"
    picks: dict[str, str] = {}
    native: Literal["fp8", "fp4"] | None = None
    packages: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _carried(self) -> "Format":
        if (self.weights, self.activations) not in CARRIES[self.layout]:
            options = ", ".join(f"{w}/{a}" for w, a in sorted(CARRIES[self.layout]))
            raise ValueError(
                f"layout {self.layout!r} cannot carry weights {self.weights!r} with activations "
                f"{self.activations!r}; it carries {options}"
            )
        if isinstance(self.dtype, dict) and "default" not in self.dtype:
            raise ValueError("a dtype table needs 'default'")
        if self.picks and self.kernel != "auto":
            raise ValueError("'picks' is for kernel = 'auto' only")
        return self

    def dtype_on(self, kind: Kind) -> Dtype:
        """The activation dtype on hardware of `kind`."""
        if isinstance(self.dtype, dict):
            return self.dtype.get(kind, self.dtype["default"])
        return self.dtype

    @property
    def quantized(self) -> bool:
        return self.layout != "plain"


class Pin(_Row):
    """How vLLM versions are told to use `kernel` for a layout: engine arguments and environment."""

    kernel: str
    layout: tuple[Layout, ...] = Field(min_length=1)
    weights: tuple[Weights, ...] = ()
    vllm: Specifier = ""
    args: dict[str, str | int | float | bool] = {}
    env: dict[str, str] = {}


class Synthetic(_Row):
    """Architecture of a model with generated weights; dimensions are in elements."""

    architecture: Literal["qwen3"]
    seed: int = Field(0, ge=0)
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt


class Package(_Row):
    """Weights that a Python distribution carries as a GGUF file (dequantized to bfloat16)."""

    distribution: str
    version: str
    file: str


class Model(_Row):
    """A model: where its weights come from, its workload and the formats it has (globs)."""

    title: str
    workload: str
    formats: tuple[str, ...] = Field(min_length=1)
    hardware: tuple[str, ...] = ("*",)
    group_size: Literal[32, 64, 128] = 128
    memory_gib: Annotated[float, Field(gt=0)] = 4
    slow: bool = False
    synthetic: Synthetic | None = None
    package: Package | None = None
    path: str | None = None
    hub: dict[Layout, str] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Model":
        given = [name for name in ("synthetic", "package", "path", "hub") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of synthetic, package, path, hub; has {', '.join(given) or 'none'}")
        return self


class When(_Row):
    """Selector of an expectation: every key given must match (globs; a list matches any)."""

    model: str | tuple[str, ...] = "*"
    format: str | tuple[str, ...] = "*"
    hardware: str | tuple[str, ...] = "*"
    phase: Phase | None = None
    engine: str = "*"

    def matches(self, cell: "Cell", phase: Phase | None = None, engine: str = "vllm") -> bool:
        """Whether the row speaks of `cell`; a row for one phase does not match a question about the other."""
        return (
            _glob(cell.model_id, self.model)
            and _glob(cell.format_id, self.format)
            and _glob(cell.hardware_id, self.hardware)
            and fnmatchcase(engine, self.engine)
            and (self.phase is None or phase is None or phase == self.phase)
        )


class Expect(_Row):
    """A declared departure from the default (bit-exact, distinct, accepted)."""

    when: When = When()
    outcome: Literal["noisy", "may_be_noisy", "identical_to", "unsupported"]
    reason: Annotated[str, Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)]
    formats: tuple[str, ...] = ()
    vllm: Specifier = ""

    @model_validator(mode="after")
    def _formats_where_needed(self) -> "Expect":
        if (self.outcome == "identical_to") != bool(self.formats):
            raise ValueError("'formats' names the twins of outcome 'identical_to', and belongs to no other outcome")
        if self.when.phase is not None and self.outcome in ("identical_to", "unsupported"):
            raise ValueError(f"outcome {self.outcome!r} cannot depend on a phase")
        return self

    def holds_for(self, vllm_version: str | None) -> bool:
        """Whether the row is about this vLLM version; without a version (nothing installed) every row holds."""
        if not self.vllm or vllm_version is None:
            return True
        return SpecifierSet(self.vllm).contains(Version(vllm_version), prereleases=True)


@dataclass(frozen=True, order=True)
class Cell:
    """One model in one format on one hardware row."""

    model_id: str
    format_id: str
    hardware_id: str

    @property
    def id(self) -> str:
        return f"{self.model_id}/{self.format_id}/{self.hardware_id}"

    def __str__(self) -> str:
        return self.id


class Matrix(_Row):
    """The whole file."""

    schema_: Literal[1] = Field(alias="schema")
    run: RunLengths = RunLengths()
    engine: Engine = Engine()
    hardware: dict[str, Hardware] = Field(min_length=1)
    kernels: dict[str, Kernel]
    formats: dict[str, Format] = Field(min_length=1)
    pin: tuple[Pin, ...] = ()
    models: dict[str, Model] = Field(min_length=1)
    expect: tuple[Expect, ...] = ()

    def cells(self) -> Iterator[Cell]:
        """Every cell that can exist, in file order: the model has the format, the kernel can run on the hardware."""
        for model_id, model in self.models.items():
            for format_id, format_ in self.formats.items():
                if not self.has_format(model, format_id):
                    continue
                for hardware_id in self.hardware:
                    if _glob(hardware_id, model.hardware) and _glob(hardware_id, self.kernels[format_.kernel].hardware):
                        yield Cell(model_id, format_id, hardware_id)

    def has_format(self, model: Model, format_id: str) -> bool:
        """Whether `model` names the format and its source can carry it."""
        if not _glob(format_id, model.formats):
            return False
        if model.hub is not None:
            return self.formats[format_id].layout in model.hub
        return self.formats[format_id].weights not in ("int4-torchao",) or "*" in model.formats

    def kernel_classes(self, cell: Cell) -> tuple[str, tuple[str, ...]]:
        """`(kernel, class names)` that `cell` has to show; no class names where `auto` is not judged here."""
        format_ = self.formats[cell.format_id]
        kernel = format_.kernel
        if kernel == "auto":
            kernel = next((k for glob, k in format_.picks.items() if fnmatchcase(cell.hardware_id, glob)), "auto")
        return kernel, self.kernels[kernel].classes

    def pin_for(self, format_: Format, vllm_version: str) -> Pin | None:
        """The row that tells this vLLM version to use the format's kernel; None: there is no way."""
        for pin in self.pin:
            if (
                pin.kernel == format_.kernel
                and format_.layout in pin.layout
                and (not pin.weights or format_.weights in pin.weights)
                and (not pin.vllm or SpecifierSet(pin.vllm).contains(Version(vllm_version), prereleases=True))
            ):
                return pin
        return None


def _glob(name: str, patterns: str | tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, p) for p in ((patterns,) if isinstance(patterns, str) else patterns))


def load(path: Path) -> Matrix:
    """Read and check a matrix file.

    Raises:
        MatrixError: the file is missing, not TOML, or wrong; all mistakes at once.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MatrixError(path, ["no such file"]) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MatrixError(path, [f"not readable as TOML: {error}"]) from None
    mistakes = _id_mistakes(raw)
    try:
        matrix = Matrix.model_validate(raw)
    except ValidationError as error:
        mistakes += [f"{_toml_path(e['loc'])}: {_message(e)}" for e in error.errors()]
        mistakes += _reference_mistakes(raw)
        raise MatrixError(path, mistakes) from None
    mistakes += _reference_mistakes(raw)
    if not mistakes:
        mistakes += _stale_expectations(matrix)
    if mistakes:
        raise MatrixError(path, mistakes)
    return matrix


def _table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def _rows(raw: dict[str, Any], name: str) -> list[Any]:
    value = raw.get(name)
    return value if isinstance(value, list) else []


def _id_mistakes(raw: dict[str, Any]) -> list[str]:
    return [
        f"{table}.{key}: id must be lower-case letters, digits, '.', '_', '-' (1 to 64, no mark at either end)"
        for table in ("hardware", "formats", "models", "kernels")
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
            picks = row.get("picks")
            for glob, kernel in picks.items() if isinstance(picks, dict) else ():
                stale(f"formats.{name}.picks", "hardware", glob, hardware)
                unknown(f"formats.{name}.picks.{glob}", "kernel", kernel, kernels)
    for name, row in models.items():
        if isinstance(row, dict):
            stale(f"models.{name}.formats", "format", row.get("formats"), formats)
            stale(f"models.{name}.hardware", "hardware", row.get("hardware"), hardware)
    for index, row in enumerate(_rows(raw, "pin")):
        if isinstance(row, dict):
            unknown(f"pin.{index}.kernel", "kernel", row.get("kernel"), kernels)
    for index, row in enumerate(_rows(raw, "expect")):
        if isinstance(row, dict):
            stale(f"expect.{index}.formats", "format", row.get("formats"), formats)
            when = row.get("when")
            for key, table in ("model", models), ("format", formats), ("hardware", hardware):
                if isinstance(when, dict):
                    stale(f"expect.{index}.when.{key}", key, when.get(key), table)
    return found


def _stale_expectations(matrix: Matrix) -> list[str]:
    cells = list(matrix.cells())
    return [
        f"expect.{index}: matches no cell of this matrix"
        for index, row in enumerate(matrix.expect)
        if not any(row.when.matches(cell) for cell in cells)
    ]


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
