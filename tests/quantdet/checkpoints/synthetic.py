"""Generated weights: the same bits on every machine, from a counter-based generator and exact integer arithmetic.

Each tensor has a Philox4x64 stream of its own, keyed with SHA-256 of `quantdet-v1/SEED/TENSOR NAME`. A weight is the sum of
the four 16-bit pieces of one raw 64-bit word (Irwin-Hall, close to normal, cut off at 3.5 standard deviations) minus its
mean: an integer that float32 holds exactly. One float32 multiplication scales it, one rounding makes it bfloat16. NumPy's
distributions are not used: their algorithms may change between versions, raw Philox words may not.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial

import ml_dtypes
import numpy as np

from quantdet.checkpoints.architectures import Drawn, decoder_layer, outside
from quantdet.checkpoints.tensors import Array, Load
from quantdet.matrix.shapes import Synthetic

VERSION = 1

_CHUNK = 2**16  # words at a time: the temporaries stay inside the processor's cache
_MEAN = 2 * 65535
# Standard deviation of the sum of four uniform integers 0..65535: sqrt(4 * (65536^2 - 1) / 12).
_SIGMA = 37837.227
_LOW = np.uint64(0x0000FFFF0000FFFF)


def tensor(seed: int, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Array:
    """One tensor of near-normal values, bfloat16 of `shape`."""
    key = int.from_bytes(hashlib.sha256(f"quantdet-v1/{seed}/{name}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key)
    table = _weights(std, mean)
    out = np.empty(math.prod(shape), np.uint16)
    upper = np.empty(min(_CHUNK, out.size), np.uint64)
    for start in range(0, out.size, _CHUNK):
        raw = words.random_raw(min(_CHUNK, out.size - start))
        other = upper[: raw.size]
        np.right_shift(raw, np.uint64(16), out=other)
        other &= _LOW
        raw &= _LOW
        raw += other  # two sums of two pieces
        raw *= np.uint64(2**32 + 1)  # their sum in the upper half
        raw >>= np.uint64(32)
        table.take(raw.view(np.int64), mode="clip", out=out[start : start + raw.size])
    return np.asarray(out.view(ml_dtypes.bfloat16).reshape(shape))


@lru_cache(maxsize=8)
def _weights(std: float, mean: float) -> Array:
    """The bits of the weight for every sum of four pieces: looking one up is faster than making it from the sum."""
    values = (np.arange(2**18, dtype=np.int32) - np.int32(_MEAN)).astype(np.float32)
    values *= np.float32(std / _SIGMA)
    values += np.float32(mean)
    return np.asarray(values.astype(ml_dtypes.bfloat16).view(np.uint16))


def batches(spec: Synthetic, plain: Mapping[str, Array] | None = None) -> Iterator[dict[str, Load]]:
    """The tensors of the model, one decoder layer at a time, then embeddings, head and last norm (all bfloat16).

    With `plain`, the tensors of this model's plain checkpoint, they are taken from there.
    """

    def load(name: str, drawn: Drawn) -> Load:
        if plain is not None:
            return partial(plain.__getitem__, name)
        return partial(tensor, spec.seed, name, drawn.shape, drawn.std, drawn.mean)

    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        yield {prefix + name: load(prefix + name, drawn) for name, drawn in decoder_layer(spec, layer).items()}
    yield {name: load(name, drawn) for name, drawn in outside(spec).items()}
