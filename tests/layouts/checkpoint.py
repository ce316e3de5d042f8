"""A checkpoint before it is written, and the tiny models that all of them are made of. NumPy only: no torch, no engine."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from quantdet.checkpoints import architectures, synthetic, tensors
from quantdet.checkpoints.quantize import largest
from quantdet.checkpoints.tensors import Array
from quantdet.matrix.shapes import Synthetic

# Every matrix has multiples of 128 inputs and outputs, also where an engine fuses projections: legal for every kernel.
_DENSE = Synthetic(
    architecture="qwen3", vocab_size=1024, hidden_size=256, intermediate_size=512, layers=2, heads=2, kv_heads=1, head_dim=128
)
_EXPERTS = _DENSE.model_copy(
    update={
        "architecture": "qwen3_moe", "intermediate_size": 256, "experts": 4, "experts_per_token": 2,
        "expert_intermediate_size": 256,
    }
)  # fmt: skip
_SETS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what engines fuse into one matrix

WEIGHTS = "model.safetensors"
Tensors = Mapping[str, Array]
# Tensors of one projection by local name, from its name without ".weight" and its weight [N, K]; None: it stays as it is.
Encode = Callable[[str, Array], Tensors | None]


@dataclass(frozen=True)
class Checkpoint:
    """What a folder will hold.

    config: of `config.json`; None: no such file. tensors: by name, in `model.safetensors`, or in `shards`, the names of each
    file's tensors. index: the file of each tensor in the index of the shards, where it is not what the shards say. files: other
    files, as bytes; they are written last and may replace any.
    """

    config: dict[str, Any] | None
    tensors: Tensors
    shards: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    index: Mapping[str, str] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the files into `folder`, which is there and empty. The same bytes on every machine."""
        if self.config is not None:
            (folder / "config.json").write_bytes(as_json(self.config))
        for name, names in self.shards.items():
            tensors.save({one: self.tensors[one] for one in names}, folder / name)
        if self.shards:
            place = self.index
            if place is None:
                place = {one: name for name, names in self.shards.items() for one in names}
            total = sum(array.nbytes for array in self.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
            (folder / tensors.INDEX_NAME).write_bytes(as_json(index))
        elif self.tensors:
            tensors.save(self.tensors, folder / WEIGHTS)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def without(self, *names: str) -> "Checkpoint":
        """The same without these tensors. Raises KeyError for one that is not there: a fault that is none."""
        for name in names:
            self.tensors[name]
        return replace(self, tensors={name: array for name, array in self.tensors.items() if name not in names})

    def with_tensors(self, changed: Tensors) -> "Checkpoint":
        """The same with these tensors, new or in place of others."""
        return replace(self, tensors={**self.tensors, **changed})

    def configured(self, **changed: Any) -> "Checkpoint":
        """The same with these entries of `config.json`."""
        assert self.config is not None
        return replace(self, config={**self.config, **changed})

    def requantized(self, **changed: Any) -> "Checkpoint":
        """The same with these entries of `quantization_config`; the tensors stay."""
        assert self.config is not None
        return self.configured(quantization_config={**self.config["quantization_config"], **changed})


def as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


@cache
def plain(experts: bool = False) -> Checkpoint:
    """The model before anything is quantized: bfloat16, two decoder layers, dense or with four experts."""
    spec = _EXPERTS if experts else _DENSE
    loads = {name: load for batch in synthetic.batches(spec) for name, load in batch.items()}
    made = {name: load() for name, load in loads.items()}
    for array in made.values():
        array.flags.writeable = False  # shared by all configurations
    return Checkpoint(architectures.config(spec), made)


def is_projection(name: str) -> bool:
    """Whether a tensor is the weight of a projection of a decoder layer."""
    return name.endswith("_proj.weight")


def quantized(config: Mapping[str, Any] | None, encode: Encode, experts: bool = False) -> Checkpoint:
    """The model with its projections encoded, and `config` as its `quantization_config` (None: none)."""
    model = plain(experts)
    made: dict[str, Array] = {}
    for name, array in model.tensors.items():
        module = name.removesuffix(".weight")
        local = encode(module, array) if is_projection(name) or module == "lm_head" else None
        made |= {name: array} if local is None else {f"{module}.{one}": tensor for one, tensor in local.items()}
    checkpoint = Checkpoint(model.config, made)
    return checkpoint if config is None else checkpoint.configured(quantization_config=dict(config))


def body(encode: Encode) -> Encode:
    """The same for everything but the head."""
    return lambda module, weight: None if module == "lm_head" else encode(module, weight)


def where(choose: Callable[[str], bool], then: Encode, otherwise: Encode | None = None) -> Encode:
    """`then` for the projections that `choose` picks by name, `otherwise` for the rest (None: they stay as they are)."""

    def encode(module: str, weight: Array) -> Tensors | None:
        if choose(module):
            return then(module, weight)
        return otherwise(module, weight) if otherwise else None

    return body(encode)


def shared_amax(module: str) -> np.float32:
    """The largest magnitude of a projection of the dense model and of those that engines fuse with it."""
    parent, _, local = module.rpartition(".")
    together = next((names for names in _SETS if local in names), (local,))
    return max(largest(plain().tensors[f"{parent}.{name}.weight"]) for name in together)


def sharded(checkpoint: Checkpoint, parts: int = 2) -> Checkpoint:
    """The same in several files with an index, in the order of the names."""
    names = sorted(checkpoint.tensors)
    cut = [names[len(names) * part // parts : len(names) * (part + 1) // parts] for part in range(parts)]
    shards = {f"model-{number:05d}-of-{parts:05d}.safetensors": tuple(part) for number, part in enumerate(cut, 1)}
    return replace(checkpoint, shards=shards)
