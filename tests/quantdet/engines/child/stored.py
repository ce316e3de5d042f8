"""What a layer of vLLM holds of its checkpoint, read from its parameters before they are repacked for a kernel.

By attribute names alone, as `executed_vllm`, so that it can be tested on plain objects.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Parameters beside the weights, by a part of their names.
_BESIDE = ("scale", "zero", "bias", "g_idx", "shape", "meta", "indices")
# Scales of something else than groups or channels of weights.
_NOT_OF_GROUPS = ("input", "global", "output", "scale_2", "_k_", "_v_")


@dataclass(frozen=True)
class Stored:
    """See the fields of `quantdet.observations.header.Layer`."""

    stored: tuple[str, ...] = ()
    k: int | None = None
    n: int | None = None
    bits: int | None = None
    group: int | None = None


def described(module: Any, parameters: Mapping[str, Any], filling: Iterable[str], dtypes: Mapping[str, str]) -> Stored:
    """One layer. `parameters`: its own, as its tensors were loaded into them; `filling`: names of tensors of the checkpoint.

    dtypes: of these, safetensors' words.
    """
    local = {f"{name.rpartition('.')[2]}:{dtypes[name]}" for name in filling if name in dtypes}
    stored = tuple(sorted(local))
    k, n = _inputs(module), _outputs(module)
    if not stored or k is None or n is None:
        return Stored(stored)
    return Stored(stored, k, n, _bits(parameters, k * n), _group(module, parameters, k, n))


def _inputs(module: Any) -> int | None:
    return _first(module, "input_size_per_partition", "input_size", "embedding_dim")


def _outputs(module: Any) -> int | None:
    return _first(module, "output_size_per_partition", "num_embeddings_per_partition", "output_size")


def _first(module: Any, *names: str) -> int | None:
    found = (getattr(module, name, None) for name in names)
    return next((int(one) for one in found if isinstance(one, int) and one > 0), None)


def _bits(parameters: Mapping[str, Any], weights: int) -> int | None:
    """Of one weight: of the largest parameter, which weights are; None where it is no whole number of bits a weight."""
    sizes = [
        math.prod(one.shape) * one.element_size() * 8
        for name, one in parameters.items()
        if not any(part in name for part in _BESIDE)
    ]
    size = max(sizes, default=0)
    return size // weights if size and size % weights == 0 and size // weights <= 64 else None


def _group(module: Any, parameters: Mapping[str, Any], k: int, n: int) -> int | None:
    """How many inputs share a scale; None where there is none, one of a whole projection, or one of a block of both sides."""
    scales = [
        one
        for name, one in parameters.items()
        if "scale" in name and not any(part in name for part in _NOT_OF_GROUPS) and n in tuple(one.shape)
    ]
    scale = max(scales, key=lambda one: math.prod(one.shape), default=None)
    if scale is None:
        return None
    count = math.prod(scale.shape)
    if count == n:
        return k
    # Act-order, divided over ranks: each has the scales of all inputs, and its parameter is not divided on that side.
    whole = _first(module, "input_size") or k
    inputs = k if getattr(scale, "input_dim", None) is not None else whole
    return inputs * n // count if count % n == 0 and inputs * n % count == 0 else None
