"""On-disk formats. Each module turns a `Quantized` weight into the tensors of its module, and names its configuration.

A layout module has
    encode(q, activations) -> tensors of one linear module by local name ("qweight", "weight_scale", ...);
    config(weights, activations, group, skipped) -> the `quantization_config` of `config.json`; `skipped` are the names of
        the linear modules of decoder layers that are not quantized (routers, or all but the routed experts).
The stored values are those of the quantizer: no layout rounds anything again.
"""

from typing import Any, Protocol

from quantdet.checkpoints.errors import Unavailable
from quantdet.checkpoints.layouts import awq, bitsandbytes, compressed_tensors, fp8, gptq
from quantdet.checkpoints.quantize import Quantized
from quantdet.checkpoints.tensors import Array
from quantdet.matrix.rows import Activations, Layout, Weights


class Writer(Protocol):
    """What a layout module provides."""

    def encode(self, q: Quantized, activations: Activations) -> dict[str, Array]: ...

    def config(
        self, weights: Weights, activations: Activations, group: int, skipped: tuple[str, ...] = ()
    ) -> dict[str, Any]: ...


_WRITERS: dict[Layout, Writer] = {
    "awq": awq,
    "gptq": gptq,
    "ct": compressed_tensors,
    "fp8": fp8,
    "bnb": bitsandbytes,
}


def writer(layout: Layout) -> Writer:
    """The writer of a quantized layout.

    Raises:
        Unavailable: nothing here writes this layout.
    """
    if layout not in _WRITERS:
        raise Unavailable(f"layout {layout!r}: need a published checkpoint (hub), have no writer for {layout} here")
    return _WRITERS[layout]
