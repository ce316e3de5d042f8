"""Rows of the matrix file: one frozen pydantic model per TOML table. Unknown keys are mistakes."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from quantdet.matrix.cell import EngineName
from quantdet.matrix.kernels import Kernel as Kernel
from quantdet.matrix.kernels import Picks as Picks
from quantdet.matrix.shapes import PositiveInt
from quantdet.matrix.values import Environment, MeasuredVersion, Row, Specifier

Kind = Literal["cpu", "cuda", "rocm"]
Native = Literal["fp32", "bf16", "fp16", "int8", "fp8", "fp4"]
Layout = Literal["plain", "awq", "gptq", "ct", "fp8", "bnb", "torchao", "own"]
Weights = Literal[
    "bf16", "int4-sym", "int4-asym", "int8-sym", "int8-asym", "int8-channel", "fp8-tensor", "fp8-channel",
    "fp8-block", "nvfp4", "mxfp4", "mxfp8", "nf4", "bnb-int8", "int4-torchao", "int8-torchao", "own",
]  # fmt: skip
Activations = Literal["none", "int8", "fp8", "fp4", "mxfp8"]
Dtype = Literal["bfloat16", "float16", "float32"]
TensorParallelSize = Annotated[int, Field(gt=0, le=64)]

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
    "torchao": {("int4-torchao", "none"), ("int8-torchao", "none")},
    "own": {("own", "none")},  # of a checkpoint that says itself how it is quantized, and that the suite has no words for
}  # fmt: skip

# Layouts that the engine makes itself out of plain weights while it loads them, where no checkpoint is published.
ONLINE: frozenset[Layout] = frozenset({"torchao"})


Scalar = str | int | float | bool


def _safe(args: dict[str, Any]) -> dict[str, Any]:
    if any("trust_remote_code" in table for table in (args, *args.values()) if isinstance(table, dict)):
        raise ValueError("'trust_remote_code' is not given: nothing runs the code of a checkpoint")
    return args


Args = Annotated[dict[str, Scalar | dict[str, Scalar]], AfterValidator(_safe)]  # engine arguments
SettingArgs = Annotated[dict[str, JsonValue], AfterValidator(_safe)]  # of any form that vLLM may have


class RunLengths(Row):
    """How much is measured in a cell."""

    repeats: int = Field(5, ge=2, le=10_000)
    lifetimes: int = Field(1, ge=1, le=1_000)
    decode_tokens: int = Field(12, ge=2, le=4096)
    top_k: int = Field(20, ge=2, le=1000)
    time_limit_s: float = Field(300, gt=0)


class EngineCall(Row):
    """Arguments and environment that every lifetime of an engine gets; a `[[setting]]` adds to them."""

    args: Args = Field(default_factory=dict)
    env: Environment = Field(default_factory=dict)


class EngineFacts(Row):
    """What is so in vLLM, whoever uses it.

    `env_at_start`: variables that vLLM reads when an engine starts, not at import, so that a process forked from the
    preloaded server may still set them; a cell that sets any other one gets a fresh interpreter. `caches`: variables that
    name folders of compiled kernels and of choices among them; a lifetime with cold caches has them all empty.
    `unseen`: variables that change what a kernel computes, but nothing that a loaded layer shows: formats that differ in one
    are not the same numerics. `measured`: by kind of hardware, the vLLM versions whose kernels, pins and expectations were
    measured; a newer one runs, and reports begin with saying so. `unfilled`: globs over parameters of a loaded model that no
    tensor of the checkpoint has to fill, and why; any other one that is not filled makes a cell INVALID. `told`: files with
    quantization settings that vLLM reads only where it is told the method. `plugins`: by method, versions (ranges) that need
    another package for it.
    """

    env_at_start: tuple[str, ...] = ()
    caches: tuple[Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")], ...] = ()
    measured: dict[Kind, tuple[MeasuredVersion, ...]] = Field(default_factory=dict)
    unseen: tuple[Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")], ...] = ()
    unfilled: dict[Annotated[str, Field(min_length=1)], Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    told: tuple[str, ...] = ()
    plugins: dict[str, dict[Specifier, str]] = Field(default_factory=dict)


class Engine(EngineCall, EngineFacts):
    """vLLM's: what every lifetime of it gets (a pin adds to that), and what is so in vLLM."""

    max_text_tokens: PositiveInt = 1024


class Hardware(Row):
    """One kind of machine: what identifies it and what it multiplies natively.

    `limits`: environment that makes a CPU work like a lesser one, `hides`: instruction sets that torch then denies
    (torch.cpu._is_NAME_supported). Such a row is never what a machine is; it is used where --hardware names it, on a CPU
    that has `isa`.
    """

    kind: Kind
    title: str
    native: tuple[Native, ...]
    isa: tuple[str, ...] = ()
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d+$")] | None = None
    gfx: Annotated[str, Field(pattern=r"^gfx[0-9a-f]+$")] | None = None
    limits: Environment = Field(default_factory=dict)
    hides: tuple[Literal["amx_tile", "avx512_bf16", "avx512"], ...] = ()

    @model_validator(mode="after")
    def _identified(self) -> "Hardware":
        if self.limits and self.kind != "cpu":
            raise ValueError("'limits' is for kind 'cpu' only")
        if self.hides and not self.limits:
            raise ValueError("'hides' needs 'limits': libraries that do not ask torch see the whole CPU")
        key = {"cpu": "isa", "cuda": "compute_capability", "rocm": "gfx"}[self.kind]
        if not getattr(self, key):
            raise ValueError(f"kind {self.kind!r} needs {key!r}")
        for other in {"isa", "compute_capability", "gfx"} - {key}:
            if getattr(self, other):
                raise ValueError(f"kind {self.kind!r} has no {other!r}")
        return self


class Format(Row):
    """A quantization format: checkpoint layout x kernel, in an execution mode.

    `mode` compiled: torch.compile and CUDA graphs, as production runs. `hardware`: globs that narrow the kernel's.
    `picks`: what `kernel = "auto"` has to be given. `packages`: distributions, all needed. `modules`: one of them has to be
    there. `quantizes`: every projection, or those of the routed experts alone.
    `models`: globs, of models that may have it. `engine`: what loads and runs it; versions in
    `picks` and pins are vLLM's alone. `tensor_parallel_size`: instead of the model's, in vLLM.

    A file may name a table of `[picks]` in place of one, and another format (`like`) whose keys count where it gives none.
    """

    title: str
    engine: EngineName = "vllm"
    layout: Layout
    weights: Weights
    kernel: str
    dtype: Dtype | dict[Literal["cpu", "cuda", "rocm", "default"], Dtype]
    activations: Activations = "none"
    picks: Picks = Field(default_factory=dict)
    native: Literal["fp8", "fp4"] | None = None
    packages: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    mode: Literal["eager", "compiled"] = "eager"
    quantizes: Literal["all", "experts"] = "all"
    tensor_parallel_size: TensorParallelSize | None = None
    hardware: tuple[str, ...] = ("*",)
    models: tuple[str, ...] = ("*",)

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
        if self.quantizes == "experts" and self.layout != "ct":
            raise ValueError("quantizes = 'experts' needs layout 'ct', which names what it leaves out")
        if self.picks and self.kernel != "auto":
            raise ValueError("'picks' is for kernel = 'auto' only")
        if self.engine != "vllm" and (self.kernel == "auto" or self.mode != "eager"):
            raise ValueError(f"engine {self.engine!r} runs eager, with a kernel that the row names")
        if self.engine != "vllm" and self.tensor_parallel_size is not None:
            raise ValueError("'tensor_parallel_size' is for engine = 'vllm' only")
        return self

    def dtype_on(self, kind: Kind) -> Dtype:
        """The activation dtype on hardware of `kind`."""
        if isinstance(self.dtype, dict):
            return self.dtype.get(kind, self.dtype["default"])
        return self.dtype

    @property
    def quantized(self) -> bool:
        return self.layout != "plain"

    @property
    def precision(self) -> str:
        """W4A4 and the like, of a format that quantizes activations; else empty."""
        if self.activations == "none":
            return ""
        return "W{}A{}".format(*("".join(filter(str.isdigit, name)) for name in (self.weights, self.activations)))


def takes(row: Hardware, format_: Format) -> bool:
    """Whether a row takes the format's numbers without a marker's skip: it multiplies them, or vLLM emulates them (CPUs)."""
    return format_.native is None or format_.native in row.native or row.kind == "cpu"
