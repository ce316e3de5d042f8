"""The matrices that vLLM multiplies by, from a model's dimensions, and conditions on them under which a kernel is noisy."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from quantdet.matrix.values import Row

PositiveInt = Annotated[int, Field(gt=0)]
Dimension = Annotated[int, Field(gt=0, le=1 << 20)]


Architecture = Literal["qwen2", "qwen3", "qwen3_moe", "glm4_moe", "deepseek_v2", "deepseek_v3"]

# Dimensions that only some architectures have, and which.
_GQA = ("kv_heads", "head_dim")
_MLA = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_EXPERTS = ("experts", "experts_per_token", "expert_intermediate_size")
_SHARED = ("dense_layers", "shared_experts", "routed_scaling")
_NEEDS: dict[Architecture, tuple[str, ...]] = {
    "qwen2": _GQA,
    "qwen3": _GQA,
    "qwen3_moe": (*_GQA, *_EXPERTS),
    "glm4_moe": (*_GQA, *_EXPERTS, *_SHARED),
    "deepseek_v2": (*_MLA, *_EXPERTS, *_SHARED),
    "deepseek_v3": (*_MLA, *_EXPERTS, *_SHARED),
}
_MAY: dict[Architecture, tuple[str, ...]] = {"deepseek_v2": ("q_lora_rank",), "deepseek_v3": ("q_lora_rank",)}


class Synthetic(Row):
    """Architecture of a model with generated weights; dimensions are in elements.

    Attention is grouped-query (`kv_heads`, `head_dim`) or multi-head latent (MLA: `kv_lora_rank`, `q_lora_rank` where
    queries are compressed too, and the sizes of a head's parts). A mixture of experts has `experts`, `experts_per_token`
    and `expert_intermediate_size`; `intermediate_size` is then that of its `dense_layers`, the first ones. `shared_experts`
    see every token; `routed_scaling` multiplies what the routed ones give.
    """

    architecture: Architecture
    seed: int = Field(0, ge=0)
    vocab_size: Dimension
    hidden_size: Dimension
    intermediate_size: Dimension
    layers: Annotated[int, Field(gt=0, le=1000)]
    heads: Dimension
    kv_heads: Dimension | None = None
    head_dim: Dimension | None = None
    experts: Dimension | None = None
    experts_per_token: Dimension | None = None
    expert_intermediate_size: Dimension | None = None
    dense_layers: Annotated[int, Field(ge=0, le=1000)] | None = None
    shared_experts: Annotated[int, Field(gt=0, le=64)] | None = None
    routed_scaling: Annotated[float, Field(gt=0)] | None = None
    kv_lora_rank: Dimension | None = None
    q_lora_rank: Dimension | None = None
    qk_nope_head_dim: Dimension | None = None
    qk_rope_head_dim: Dimension | None = None
    v_head_dim: Dimension | None = None

    @model_validator(mode="after")
    def _dimensions(self) -> "Synthetic":
        needs = _NEEDS[self.architecture]
        may = _MAY.get(self.architecture, ())
        for name in (*_GQA, *_EXPERTS, *_SHARED, *_MLA, "q_lora_rank"):
            given = getattr(self, name) is not None
            if given != (name in needs) and not (given and name in may):
                raise ValueError(f"architecture {self.architecture!r} {'has no' if given else 'needs'} {name!r}")
        if self.experts is not None and self.experts_per_token is not None and self.experts_per_token > self.experts:
            raise ValueError(f"'experts_per_token' is at most 'experts' ({self.experts})")
        if self.dense_layers is not None and self.dense_layers >= self.layers:
            raise ValueError(f"'dense_layers' is less than 'layers' ({self.layers})")
        return self

    def mixes(self, layer: int) -> bool:
        """Whether decoder layer `layer` has experts."""
        return self.experts is not None and layer >= (self.dense_layers or 0)


@dataclass(frozen=True)
class LinearLayer:
    """A weight [N, K] as vLLM fuses it; with `experts`, each of them has one and a token passes `experts_per_token`."""

    name: str
    n: int
    k: int
    experts: int = 0
    experts_per_token: int = 0

    def __str__(self) -> str:
        return f"{self.name} {self.n}x{self.k}{f' of {self.experts} experts' if self.experts else ''}"


Layers = tuple[LinearLayer, ...]


def undividable(spec: Synthetic, ranks: int) -> str:
    """What of the model cannot be divided among so many ranks; empty if all can."""
    for name in ("heads", "intermediate_size", "expert_intermediate_size"):
        if (getattr(spec, name) or 0) % ranks:
            return f"{name} ({getattr(spec, name)})"
    if spec.kv_heads is not None and spec.kv_heads % ranks and ranks % spec.kv_heads:
        return f"kv_heads ({spec.kv_heads})"
    return ""


def layers_of(spec: Synthetic, ranks: int = 1) -> Layers:
    """The linear layers of a decoder on one of `ranks` devices (tensor parallel size), each shape once.

    Fused and divided as vLLM does it: heads and intermediate sizes are divided, the latent parts of MLA are not, and keys and
    values are there on every rank where they have fewer heads than there are ranks.
    """
    hidden = spec.hidden_size
    found = list(_attention(spec, ranks))
    if not spec.experts or spec.dense_layers:
        found += _projections(spec.intermediate_size // ranks, hidden)
    if spec.experts and spec.experts_per_token and spec.expert_intermediate_size:
        inner, mixture = spec.expert_intermediate_size // ranks, (spec.experts, spec.experts_per_token)
        found += [LinearLayer("w13", 2 * inner, hidden, *mixture), LinearLayer("w2", hidden, inner, *mixture)]
        if spec.shared_experts:
            found += _projections(spec.shared_experts * inner, hidden, "shared_experts.")
    return tuple(found)


def _attention(spec: Synthetic, ranks: int) -> Layers:
    hidden, heads = spec.hidden_size, spec.heads // ranks
    if spec.kv_lora_rank is None:
        assert spec.kv_heads is not None and spec.head_dim is not None
        queries, keys = heads * spec.head_dim, max(1, spec.kv_heads // ranks) * spec.head_dim
        return LinearLayer("qkv_proj", queries + 2 * keys, hidden), LinearLayer("o_proj", hidden, queries)
    assert spec.qk_nope_head_dim is not None and spec.qk_rope_head_dim is not None and spec.v_head_dim is not None
    queries, latent = heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim), spec.kv_lora_rank + spec.qk_rope_head_dim
    compressed = (
        (LinearLayer("q_proj", queries, hidden), LinearLayer("kv_a_proj_with_mqa", latent, hidden))
        if spec.q_lora_rank is None
        else (
            LinearLayer("fused_qkv_a_proj", spec.q_lora_rank + latent, hidden),
            LinearLayer("q_b_proj", queries, spec.q_lora_rank),
        )
    )
    return (
        *compressed,
        LinearLayer("kv_b_proj", heads * (spec.qk_nope_head_dim + spec.v_head_dim), spec.kv_lora_rank),
        LinearLayer("o_proj", hidden, heads * spec.v_head_dim),
    )


def _projections(inner: int, hidden: int, prefix: str = "") -> Layers:
    return LinearLayer(f"{prefix}gate_up_proj", 2 * inner, hidden), LinearLayer(f"{prefix}down_proj", hidden, inner)


class Fires(Row):
    """When a kernel's noise can show in a layer: every key that is given has to hold for [N, K].

    Two keys are about layers of experts; without either the condition is about the other layers. `tokens_per_expert_at_most`:
    only for forward passes of so few rows (tokens) that each expert gets at most this many of them on average.
    `tokens_per_expert_above`: only where one expert may get more rows than this, and in layers of up to
    `experts_sorted` experts only in passes of at least `routes_at_least` routes (rows x experts of a token).
    """

    n_below: PositiveInt | None = None
    k_at_least: PositiveInt | None = None
    tokens_per_expert_at_most: Annotated[float, Field(gt=0)] | None = None
    tokens_per_expert_above: PositiveInt | None = None
    experts_sorted: PositiveInt = 1
    routes_at_least: PositiveInt = 1

    @model_validator(mode="after")
    def _something(self) -> "Fires":
        if not self.model_fields_set:
            raise ValueError("needs one of n_below, k_at_least, tokens_per_expert_at_most, tokens_per_expert_above")
        if self.tokens_per_expert_above is None and {"experts_sorted", "routes_at_least"} & self.model_fields_set:
            raise ValueError("'experts_sorted' and 'routes_at_least' belong to 'tokens_per_expert_above'")
        if self.tokens_per_expert_above is not None and self.tokens_per_expert_at_most is not None:
            raise ValueError("'tokens_per_expert_above' and 'tokens_per_expert_at_most' exclude each other")
        return self

    @property
    def of_experts(self) -> bool:
        """Whether the condition is about layers of experts."""
        return self.tokens_per_expert_at_most is not None or self.tokens_per_expert_above is not None

    def where(self, layers: Layers) -> Layers:
        """The layers that meet the condition for at least one row."""
        return tuple(layer for layer in layers if self._met(layer))

    def rows(self, layer: LinearLayer) -> int | None:
        """The number of rows up to which a layer that meets the condition does; None: any number."""
        if self.tokens_per_expert_at_most is None:
            return None
        return int(self.tokens_per_expert_at_most * layer.experts / layer.experts_per_token)

    def rows_from(self, layer: LinearLayer) -> int | None:
        """The number of rows from which a layer that meets the condition does; None: any number."""
        if self.tokens_per_expert_above is None:
            return None
        least = self.tokens_per_expert_above + 1  # a token passes an expert once
        if layer.experts <= self.experts_sorted:
            least = max(least, -(-self.routes_at_least // layer.experts_per_token))
        return least

    def _met(self, layer: LinearLayer) -> bool:
        of_experts = self.tokens_per_expert_at_most is not None or self.tokens_per_expert_above is not None
        return (
            bool(layer.experts) == of_experts
            and (self.n_below is None or layer.n < self.n_below)
            and (self.k_at_least is None or layer.k >= self.k_at_least)
            and self.rows(layer) != 0
        )
