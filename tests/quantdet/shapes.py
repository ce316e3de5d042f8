"""The matrices that vLLM multiplies by, from a model's dimensions, and conditions on them under which a kernel is noisy."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Dimension = Annotated[int, Field(gt=0, le=1 << 20)]


class _Row(BaseModel):  # as schema.Row, which is made of these
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Synthetic(_Row):
    """Architecture of a model with generated weights; dimensions are in elements.

    `experts`, `experts_per_token` and `expert_intermediate_size` belong to a mixture of experts; `intermediate_size` is
    then that of a dense layer, of which these models have none.
    """

    architecture: Literal["qwen3", "qwen3_moe"]
    seed: int = Field(0, ge=0)
    vocab_size: Dimension
    hidden_size: Dimension
    intermediate_size: Dimension
    layers: Annotated[int, Field(gt=0, le=1000)]
    heads: Dimension
    kv_heads: Dimension
    head_dim: Dimension
    experts: Dimension | None = None
    experts_per_token: Dimension | None = None
    expert_intermediate_size: Dimension | None = None

    @model_validator(mode="after")
    def _experts(self) -> "Synthetic":
        mixture = self.architecture == "qwen3_moe"
        for name in ("experts", "experts_per_token", "expert_intermediate_size"):
            if mixture != (getattr(self, name) is not None):
                raise ValueError(f"architecture {self.architecture!r} {'needs' if mixture else 'has no'} {name!r}")
        if self.experts is not None and self.experts_per_token is not None and self.experts_per_token > self.experts:
            raise ValueError(f"'experts_per_token' is at most 'experts' ({self.experts})")
        return self


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


def layers_of(spec: Synthetic) -> Layers:
    """The quantized layers of one decoder layer on one device (tensor parallel size 1), fused as vLLM fuses them."""
    hidden, queries, keys = spec.hidden_size, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = (LinearLayer("qkv_proj", queries + 2 * keys, hidden), LinearLayer("o_proj", hidden, queries))
    if spec.experts and spec.experts_per_token and spec.expert_intermediate_size:
        inner, mixture = spec.expert_intermediate_size, (spec.experts, spec.experts_per_token)
        return (*attention, LinearLayer("w13", 2 * inner, hidden, *mixture), LinearLayer("w2", hidden, inner, *mixture))
    inner = spec.intermediate_size
    return (*attention, LinearLayer("gate_up_proj", 2 * inner, hidden), LinearLayer("down_proj", hidden, inner))


class Fires(_Row):
    """When a kernel's noise can show in a layer: every key that is given has to hold for [N, K].

    `tokens_per_expert_at_most`: of a layer of experts, and only for forward passes of so few rows (tokens) that each
    expert gets at most this many of them on average; without it the condition is about the other layers.
    """

    n_below: PositiveInt | None = None
    k_at_least: PositiveInt | None = None
    tokens_per_expert_at_most: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _something(self) -> "Fires":
        if not self.model_fields_set:
            raise ValueError("needs one of n_below, k_at_least, tokens_per_expert_at_most")
        return self

    def where(self, layers: Layers) -> Layers:
        """The layers that meet the condition for at least one row."""
        return tuple(layer for layer in layers if self._met(layer))

    def rows(self, layer: LinearLayer) -> int | None:
        """The number of rows up to which a layer that meets the condition does; None: any number."""
        if self.tokens_per_expert_at_most is None:
            return None
        return int(self.tokens_per_expert_at_most * layer.experts / layer.experts_per_token)

    def _met(self, layer: LinearLayer) -> bool:
        return (
            bool(layer.experts) == (self.tokens_per_expert_at_most is not None)
            and (self.n_below is None or layer.n < self.n_below)
            and (self.k_at_least is None or layer.k >= self.k_at_least)
            and self.rows(layer) != 0
        )
