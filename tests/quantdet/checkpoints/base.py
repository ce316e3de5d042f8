"""Unquantized weights, wherever they come from, and the checkpoint that is made of them."""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from quantdet.checkpoints.errors import Unavailable
from quantdet.checkpoints.layouts import Writer, writer
from quantdet.checkpoints.pool import in_order
from quantdet.checkpoints.quantize import FUSED_SCALE, largest, quantize
from quantdet.checkpoints.tensors import Array, Load, ShardWriter
from quantdet.matrix.rows import Format

# Projections by name: of attention, of multi-head latent attention, of feed-forward networks and experts.
_LINEAR = re.compile(
    r"(?P<parent>model\.layers\.\d+\.(?:self_attn|mlp)(?:\.(?P<experts>experts\.\d+)|\.shared_experts)?)"
    r"\.(?P<name>[qkvo]_proj|[qk]v?_[ab]_proj(?:_with_mqa)?|gate_proj|up_proj|down_proj)\.weight"
)
_ROUTER = re.compile(r"(model\.layers\.\d+\.mlp\.gate)\.weight")
# What an engine fuses into one matrix.
_FUSED = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "q_a_proj": "qkv_a", "kv_a_proj_with_mqa": "qkv_a",
    "gate_proj": "gate_up", "up_proj": "gate_up",
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """An unquantized model.

    config: the content of `config.json`.
    batches: what makes each tensor (bfloat16, float16 or float32), by Hugging Face name; each is called once, in any thread;
        a decoder layer is never split over two batches.
    extra: other files to copy (tokenizer, generation settings).
    """

    config: dict[str, Any]
    batches: Iterable[dict[str, Load]]
    extra: tuple[Path, ...] = ()


class Source(Protocol):
    """Where unquantized weights come from."""

    def identity(self) -> dict[str, Any]:
        """What decides the weights, as JSON: it goes into the cache key. Cheap."""

    def open(self) -> AbstractContextManager[Base]:
        """The weights; valid inside the `with`.

        Raises:
            Unavailable: they are not here.
        """


def write(base: Base, format_: Format, group: int, directory: Path) -> None:
    """Quantize `base` as `format_` asks and write a checkpoint folder: safetensors, config.json and the extra files.

    The projections of each decoder layer are quantized, of attention and feed-forward networks, or of the routed experts
    alone; embeddings, routers, norms, biases and the head are copied.
    Threads make the tensors; their order in the files does not depend on them.

    Raises:
        Unavailable: a shape that the format cannot carry; no writer; a model without these projections.
        ValueError: a weight that is not finite.
    """
    config = dict(base.config)
    batches = list(base.batches)
    layout = None if format_.layout == "plain" else writer(format_.layout)
    if layout is not None:
        names = [name for batch in batches for name in batch]
        if not any(_quantizes(format_, name) for name in names):
            needs = "routed experts" if format_.quantizes == "experts" else "q, k, v, o, gate, up, down projections"
            raise Unavailable(f"quantizing: need a decoder with {needs}, have none of them")
        if format_.layout == "gptq" and any(map(_ROUTER.fullmatch, names)) and not all(map(_only_experts, names)):
            raise Unavailable("GPTQ of a mixture: need experts in every layer and none that are shared, have others")
        skipped = [name.removesuffix(".weight") for name in names if _ROUTER.fullmatch(name) or _passed_over(format_, name)]
        config["quantization_config"] = layout.config(format_.weights, format_.activations, group, tuple(skipped))
    shards = ShardWriter(directory)
    with closing(in_order(job for batch in batches for job in _jobs(batch, layout, format_, group))) as results:
        for made in results:
            shards.add(made)
    shards.close()
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for path in base.extra:
        (directory / path.name).write_bytes(path.read_bytes())


def _quantizes(format_: Format, name: str) -> bool:
    """Whether the format quantizes this tensor."""
    match = _LINEAR.fullmatch(name)
    return match is not None and (format_.quantizes == "all" or match["experts"] is not None)


def _passed_over(format_: Format, name: str) -> bool:
    """Whether the tensor is a projection that the format leaves as it is."""
    return _LINEAR.fullmatch(name) is not None and not _quantizes(format_, name)


def _only_experts(name: str) -> bool:
    """Whether the tensor is not a projection of a feed-forward network beside the routed experts."""
    match = _LINEAR.fullmatch(name)
    return match is None or match["experts"] is not None or match["parent"].endswith(".self_attn")


_Made = dict[str, Array]  # what is written, by name


def _jobs(batch: dict[str, Load], layout: Writer | None, format_: Format, group: int) -> list[Callable[[], _Made]]:
    """What makes the tensors of a batch: a job for each copied one, then one for each set of projections with one scale."""
    copied = {name: load for name, load in batch.items() if layout is None or not _quantizes(format_, name)}
    jobs: list[Callable[[], _Made]] = [partial(_copy, name, load, layout) for name, load in copied.items()]
    if layout is not None:
        sets: dict[str, dict[str, Load]] = {}
        for name, load in batch.items():
            if _quantizes(format_, name) and (match := _LINEAR.fullmatch(name)):
                key = _FUSED.get(match["name"], match["name"]) if format_.weights in FUSED_SCALE else match["name"]
                sets.setdefault(f"{match['parent']}.{key}", {})[name] = load
        jobs += [partial(_quantized, loads, layout, format_, group) for loads in sets.values()]
    return jobs


def _copy(name: str, load: Load, layout: Writer | None) -> _Made:
    array = load()
    # No matrix of a decoder layer but these: another architecture would be quantized by halves.
    known = _ROUTER.fullmatch(name) or _LINEAR.fullmatch(name)
    if layout is not None and array.ndim != 1 and name.startswith("model.layers.") and not known:
        raise Unavailable(f"quantizing: need a decoder of known projections, have {_module(name)}")
    return {name: array}


def _quantized(loads: dict[str, Load], layout: Writer, format_: Format, group: int) -> _Made:
    arrays = {name: load() for name, load in loads.items()}
    amax = max(largest(array) for array in arrays.values()) if format_.weights in FUSED_SCALE else None
    made: _Made = {}
    for name, array in arrays.items():
        try:
            tensors = layout.encode(quantize(format_.weights, array, group=group, amax=amax), format_.activations)
        except Unavailable as error:
            raise Unavailable(f"{_module(name)}: {error}") from None
        prefix = name.removesuffix("weight")
        made |= {prefix + local: tensor for local, tensor in tensors.items()}
    return made


def _module(name: str) -> str:
    """`name` without its layer number, so that a message is the same for every layer."""
    return re.sub(r"\.\d+\.", ".*.", name).removesuffix(".weight")
