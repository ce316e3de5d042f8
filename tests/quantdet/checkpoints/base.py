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
from quantdet.schema import Format

_LINEAR = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.(?:experts\.(\d+)\.)?(q|k|v|o|gate|up|down)_proj\.weight")
_ROUTER = re.compile(r"(model\.layers\.\d+\.mlp\.gate)\.weight")
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


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

    Only the seven projections of each decoder layer are quantized, the last three for each expert if there are experts;
    embeddings, routers, norms, biases and the head are copied.
    Threads make the tensors; their order in the files does not depend on them.

    Raises:
        Unavailable: a shape that the format cannot carry; no writer; a model without these projections.
        ValueError: a weight that is not finite.
    """
    config = dict(base.config)
    batches = list(base.batches)
    layout = None
    if format_.layout != "plain":
        layout = writer(format_.layout)
        routers = tuple(match[1] for batch in batches for name in batch if (match := _ROUTER.fullmatch(name)))
        config["quantization_config"] = layout.config(format_.weights, format_.activations, group, routers)
    found = [name for batch in batches for name in batch if _LINEAR.fullmatch(name)]
    plan = [_jobs(batch, layout, format_, group) for batch in batches]
    shards = ShardWriter(directory)
    with closing(in_order(job for jobs in plan for job in jobs)) as results:
        for batch, jobs in zip(batches, plan, strict=True):
            made: _Made = {}
            for _ in range(len(jobs)):
                made |= next(results)
            linears = [name for name in batch if layout is not None and _LINEAR.fullmatch(name)]
            shards.add({name: tensor for key in batch if key not in linears for name, tensor in made[key].items()})
            for linear in linears:
                shards.add(made[linear])
    if layout is not None and not found:
        raise Unavailable("quantizing: need a decoder with q, k, v, o, gate, up, down projections, have none of them")
    shards.close()
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for path in base.extra:
        (directory / path.name).write_bytes(path.read_bytes())


# What is written for each tensor of the unquantized model.
_Made = dict[str, dict[str, Array]]


def _jobs(batch: dict[str, Load], layout: Writer | None, format_: Format, group: int) -> list[Callable[[], _Made]]:
    """What makes the tensors of a batch: a job for each copied one, then one for each set of projections with one scale."""
    copied = {name: load for name, load in batch.items() if layout is None or not _LINEAR.fullmatch(name)}
    jobs: list[Callable[[], _Made]] = [partial(_copy, name, load, layout) for name, load in copied.items()]
    if layout is not None:
        sets: dict[str, dict[str, Load]] = {}
        for name, load in batch.items():
            if match := _LINEAR.fullmatch(name):
                key = _FUSED.get(match[2], match[2]) if format_.weights in FUSED_SCALE else match[2]
                sets.setdefault(f"{match[1]}.{key}", {})[name] = load
        jobs += [partial(_quantized, loads, layout, format_, group) for loads in sets.values()]
    return jobs


def _copy(name: str, load: Load, layout: Writer | None) -> _Made:
    array = load()
    # No matrix of a decoder layer but these: another architecture would be quantized by halves.
    if layout is not None and array.ndim != 1 and name.startswith("model.layers.") and not _ROUTER.fullmatch(name):
        raise Unavailable(f"quantizing: need a decoder of seven projections, or experts of three, have {_module(name)}")
    return {name: {name: array}}


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
        made[name] = {prefix + local: tensor for local, tensor in tensors.items()}
    return made


def _module(name: str) -> str:
    """`name` without its layer number, so that a message is the same for every layer."""
    return re.sub(r"\.\d+\.", ".*.", name).removesuffix(".weight")
