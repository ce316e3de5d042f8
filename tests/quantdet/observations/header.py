"""The JSON part of an observation: which run it was, where, what executed, and where repeats differ."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from quantdet.matrix.cell import ID_PATTERN, Cell, Phase
from quantdet.untrusted import plain

SCHEMA = 1

Id = Annotated[str, Field(pattern=f"^(?:{ID_PATTERN.pattern})$")]
Words = Annotated[str, AfterValidator(lambda text: plain(text, keep="\n"))]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# See `checkpoints.numbers`; empty: not known.
Numbers = Annotated[str, Field(pattern=r"^(?:(?:decoded|bytes|online):[0-9a-f]{64})?$")]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Layer(Part):
    """Layers of the model that look alike: module class, vLLM's method, scheme and kernel classes, and how many.

    names: of the modules, in the engine's words; stored: the tensors of the checkpoint that filled each of them, as
    `LOCAL NAME:DTYPE` in order ("qweight:I32", "scales:F16"), fused projections once; k, n: inputs and outputs on one rank;
    bits: of a stored weight; group: how many inputs share a scale (k: all of a channel's). Empty or None: not known, as in
    older recordings.
    """

    kind: Literal["linear", "moe", "router", "embedding", "other"]
    module: str
    method: str
    scheme: str = ""
    kernel: str = ""
    detail: str = ""
    count: int = Field(gt=0)
    names: tuple[Annotated[str, Field(min_length=1, max_length=300)], ...] = Field((), max_length=100_000)
    stored: tuple[Annotated[str, Field(min_length=1, max_length=300)], ...] = Field((), max_length=100)
    k: int | None = Field(None, gt=0)
    n: int | None = Field(None, gt=0)
    bits: int | None = Field(None, gt=0, le=64)
    group: int | None = Field(None, gt=0)

    @property
    def executed(self) -> str:
        """The class that multiplies: the kernel, else the scheme, else the method."""
        return self.kernel or self.scheme or self.method

    @property
    def multiplied_plain(self) -> bool:
        """Whether these layers multiply by unquantized weights."""
        return self.method.startswith("Unquantized")


class Executed(Part):
    """What really ran, read from the loaded model.

    kv_cache: what the attention layers keep keys and values in, each kind once: the dtype, and the scales where they are not 1
    ("fp8_e4m3, k_scale 0.05, v_scale 0.04").
    """

    layers: tuple[Layer, ...]
    attention: tuple[str, ...] = ()
    mode: Literal["eager", "compiled"] = "eager"
    runner: str = ""
    logits_dtype: str = ""
    tensor_parallel_size: int = Field(1, gt=0)  # rank 0's layers are told; the others execute the same
    kv_cache: tuple[Annotated[str, Field(min_length=1, max_length=300)], ...] = Field((), max_length=10_000)

    @property
    def linear(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.kind == "linear")

    @property
    def moe(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.kind == "moe")

    @property
    def heads(self) -> tuple[Layer, ...]:
        """What gives the logits, one or none, of vLLM's models."""
        return tuple(layer for layer in self.layers if layer.kind == "embedding" and "LMHead" in layer.module)

    @property
    def summary(self) -> str:
        """For example `CPUWNA16LinearKernel[vec] x8`; experts, a layer of them counted once, and a quantized head come last."""
        counts: dict[str, int] = {}
        # Of heads the first recordings do not tell what is stored, and their summaries stay as they were.
        heads = (layer for layer in self.heads if layer.stored and not layer.multiplied_plain)
        for layer in (*self.linear, *self.moe, *heads):
            name = ("head " if layer.kind == "embedding" else "") + layer.executed
            name += f"[{layer.detail}]" if layer.detail else ""
            counts[name] = counts.get(name, 0) + layer.count
        divided = f", each on {self.tensor_parallel_size} ranks" if self.tensor_parallel_size > 1 else ""
        return (" + ".join(f"{name} x{count}" for name, count in counts.items()) or "no linear layer") + divided


class Loading(Part):
    """What filled the parameters of the engine's model.

    filled: parameters that tensors of the checkpoint filled, to the last element; tensors: how many tensors did; by_rule: the
    other parameters, by the reason why nothing has to fill them; unused: tensors of the checkpoint that filled nothing (the
    first ones), and how many there are.
    """

    filled: int = Field(ge=0)
    tensors: int = Field(ge=0)
    by_rule: dict[Words, tuple[Annotated[str, Field(min_length=1, max_length=300)], ...]] = {}
    unused: tuple[Words, ...] = Field((), max_length=100)
    unused_count: int = Field(ge=0)


class Divergence(Part):
    """First position at which a repeat's full-vocabulary logits differ from repeat 0's, for one prompt and phase.

    `ulp` counts representable numbers of the logits' native dtype between the two values of the token `token`, at
    which |difference| is largest (`max_abs`, in nats); `differing` is the number of unequal logits at the position.
    """

    prompt: str
    phase: Phase
    repeat: int = Field(gt=0)
    position: int = Field(ge=0)
    differing: int = Field(ge=0)
    token: int = Field(ge=0)
    max_abs: float = Field(ge=0)
    ulp: int = Field(ge=0)


class NonFinite(Part):
    """A position with NaN or infinite logits."""

    prompt: str
    phase: Phase
    repeat: int
    position: int


class PromptHeader(Part):
    """`length` forced token ids; `runs[r]` is the index of the output that repeat r gave."""

    id: str
    length: int = Field(ge=2)
    content_start: int = Field(ge=1)
    runs: tuple[int, ...] = Field(min_length=1)


class Reported(Part):
    """What of one prompt somebody else's report covers, where nothing else of the run is at hand.

    `prefill`, `decode`: rows that are there, numbered as in a whole block (prefill row r is about token r + 1); `width`:
    ids a row at most; `generated`: number of generated tokens; `ids`: whether the prompt's token ids were reported.
    """

    prefill: tuple[int, ...] = ()
    decode: tuple[int, ...] = ()
    width: int = Field(ge=1, le=1001)
    generated: int = Field(ge=1)
    ids: bool = True

    def rows(self, phase: Phase) -> tuple[int, ...]:
        return self.decode if phase == "decode" else self.prefill


class HiddenStatesTaken(Part):
    """What was taken of the hidden states, see `observations.hidden_states`.

    layers: names of the modules, in their order: decoder layers and the norm behind them; stream: what a decoder layer gives,
    "hidden" or "hidden + residual"; width: elements of a hidden state; runs: by prompt and phase, the outcome that each of
    `repeats` gave, in requests of their own behind those that the logits are from; projected: layers with fingerprints, by
    index; problem: why nothing was taken; seconds: of these requests, None where there were none.
    """

    layers: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field((), max_length=1025)
    stream: Literal["", "hidden", "hidden + residual"] = ""
    width: int = Field(0, ge=0, le=1 << 20)
    repeats: int = Field(0, ge=0)
    runs: tuple[dict[Phase, tuple[int, ...]], ...] = ()
    projection: str = ""
    projected: tuple[int, ...] = ()
    problem: Words = ""
    seconds: float | None = Field(None, ge=0)


class Header(Part):
    """Everything of an observation but its arrays.

    `caches`: whether kernels that an earlier process compiled or chose were at hand ("cold": none).
    `numbers`: which quantized numbers the checkpoint holds, whatever its layout (`checkpoints.numbers`).
    `max_flip_rate`: the bound that decided the number of repeats; 0 where it was given.
    `evidence`: "logits", taken from the engine in full; or "reported", logprobs that somebody published, of the rows that
    `reported` names for each prompt. Then no executed kernel is known, and digests are over a row's ids and logprobs.
    """

    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["observation", "refusal"]
    role: Literal["measure", "verify", "control"] = "measure"
    key: Sha256
    created: str
    model: Id
    format: Id
    hardware: Id
    lifetime: int = Field(ge=0)
    caches: Literal["warm", "cold"] = "warm"
    checkpoint_sha256: Sha256
    checkpoint_source: str = ""
    checkpoint_files_sha256: str = ""
    numbers: Numbers = ""
    engine: str
    engine_args: dict[str, Any] = {}
    engine_env: dict[str, str] = {}
    dtype: str = ""
    workload: str = ""
    workload_sha256: Sha256
    repeats: int = Field(ge=1)
    max_flip_rate: float = Field(0.0, ge=0, lt=1)
    decode_tokens: int = Field(ge=1)
    top_k: int = Field(ge=1)
    inject: str = ""
    environment: dict[str, Any] = {}
    refusal: Words = ""
    executed: Executed | None = None
    loading: Loading | None = None
    nonfinite: tuple[NonFinite, ...] = ()
    divergences: tuple[Divergence, ...] = ()
    prompts: tuple[PromptHeader, ...] = ()
    claims_workload: str = ""
    claims_workload_sha256: str = ""
    claim_tokens: int = Field(0, ge=0)
    claim_top_k: int = Field(0, ge=0)
    claims: tuple[PromptHeader, ...] = ()
    evidence: Literal["logits", "reported"] = "logits"
    reported: tuple[Reported, ...] = ()
    hidden_states: HiddenStatesTaken | None = Field(None, alias="activations")  # the name of the first recordings
    timings: dict[str, float] = {}
    tensors_sha256: str = ""
    header_sha256: str = ""

    @field_validator("environment")
    @classmethod
    def _texts(cls, facts: dict[str, Any]) -> dict[str, Any]:
        variables = facts.get("variables", {})
        if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
            raise ValueError("variables: not a table of texts")
        return facts

    def digest(self) -> str:
        """SHA-256 over every other field, as canonical JSON: an edited header does not pass for what was measured."""
        younger = {name for name in _YOUNGER if getattr(self, name) == type(self).model_fields[name].default}
        rest = self.model_dump(mode="json", by_alias=True, exclude={"header_sha256", *younger})
        if rest["executed"] is not None:
            _without_younger(rest["executed"], {"tensor_parallel_size": 1, "kv_cache": []})
            for layer in rest["executed"]["layers"]:
                _without_younger(layer, {"names": [], "stored": [], "k": None, "n": None, "bits": None, "group": None})
        return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def cell(self) -> Cell:
        return Cell(self.model, self.format, self.hardware)


# Younger than the first recordings, which were sealed without them: left out while they are at their default.
_YOUNGER = {
    "claims_workload", "claims_workload_sha256", "claim_tokens", "claim_top_k", "claims", "role", "evidence", "reported",
    "caches", "max_flip_rate", "hidden_states", "numbers", "loading",
}  # fmt: skip


def _without_younger(part: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Leave out of `part` what the first recordings did not have, where it is at its default."""
    for name, default in defaults.items():
        if part[name] == default:
            del part[name]
