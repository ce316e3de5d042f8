"""Unquantized weights, wherever they come from, and the checkpoint that is made of them."""

import json
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quantdet.checkpoints.errors import Unavailable
from quantdet.checkpoints.layouts import Writer, writer
from quantdet.checkpoints.quantize import FUSED_SCALE, largest, quantize
from quantdet.checkpoints.tensors import Array, ShardWriter
from quantdet.schema import Format

_LINEAR = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.weight")
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


@dataclass(frozen=True)
class Base:
    """An unquantized model.

    config: the content of `config.json`.
    batches: the tensors by Hugging Face name (bfloat16, float16 or float32); a decoder layer is never split over two.
    extra: other files to copy (tokenizer, generation settings).
    """

    config: dict[str, Any]
    batches: Iterable[dict[str, Array]]
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

    Only the seven projections of each decoder layer are quantized; embeddings, norms, biases and the head are copied.

    Raises:
        Unavailable: a shape that the format cannot carry; no writer; a model without these projections.
        ValueError: a weight that is not finite.
    """
    config = dict(base.config)
    layout = None
    if format_.layout != "plain":
        layout = writer(format_.layout)
        config["quantization_config"] = layout.config(format_.weights, format_.activations, group)
    shards = ShardWriter(directory)
    found = 0
    for batch in base.batches:
        linears = {name: match[1] for name in batch if (match := _LINEAR.fullmatch(name))}
        found += len(linears)
        if layout is None:
            shards.add(batch)
            continue
        strange = [n for n, a in batch.items() if a.ndim != 1 and n.startswith("model.layers.") and n not in linears]
        if strange:
            raise Unavailable(f"quantizing: need a dense decoder of seven projections, have {_module(strange[0])}")
        shards.add({name: array for name, array in batch.items() if name not in linears})
        _add_quantized(shards, {name: batch[name] for name in linears}, linears, layout, format_, group)
    if layout is not None and not found:
        raise Unavailable("quantizing: need a decoder with q, k, v, o, gate, up, down projections, have none of them")
    shards.close()
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for path in base.extra:
        (directory / path.name).write_bytes(path.read_bytes())


def _add_quantized(
    shards: ShardWriter, batch: dict[str, Array], linears: dict[str, str], layout: Writer, format_: Format, group: int
) -> None:
    fused: dict[str, np.float32] = {}
    if format_.weights in FUSED_SCALE:
        for name, array in batch.items():
            key = _FUSED.get(linears[name], linears[name])
            fused[key] = max(fused.get(key, np.float32(0)), largest(array.astype(np.float32)))
    for name, array in batch.items():
        amax = fused.get(_FUSED.get(linears[name], linears[name]))
        try:
            q = quantize(format_.weights, array.astype(np.float32), group=group, amax=amax)
            tensors = layout.encode(q, format_.activations)
        except Unavailable as error:
            raise Unavailable(f"{_module([name][0])}: {error}") from None
        prefix = name.removesuffix("weight")
        shards.add({prefix + local: tensor for local, tensor in tensors.items()})


def _module(name: str) -> str:
    """`name` without its layer number, so that a message is the same for every layer."""
    return re.sub(r"\.\d+\.", ".*.", name).removesuffix(".weight")
