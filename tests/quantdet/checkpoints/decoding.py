"""Quantized projections of a checkpoint, decoded from their layout to the one form that `numbers` hashes.

GPTQ (v1 and v2, 2 to 8 bit, rules for single modules), AWQ ("gemm"), auto-round in either packing, compressed-tensors (packed
and plain integers, FP8, NVFP4, MXFP4, MXFP8; several groups), the FP8 of vLLM and transformers, and what of Quark's and
ModelOpt's numbers compressed-tensors has too. Formats as in `layouts`, with their sources.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from quantdet.checkpoints import vendors
from quantdet.checkpoints.layouts.awq import ORDER
from quantdet.checkpoints.layouts.packing import pack, transposed
from quantdet.checkpoints.quantize import BLOCK
from quantdet.checkpoints.rules import Rules, as_plain_gptq_or_awq
from quantdet.checkpoints.shapes import MISFITS, contradictions
from quantdet.checkpoints.tensors import Array

Part = tuple[str, Array | str]  # what of a projection is hashed, by name

# A projection that stores one of these is quantized.
_MARKS = frozenset({"qweight", "weight_packed", "weight_scale", "weight_scale_inv"})
# Buffers that follow from the configuration, which some makers write and engines leave out.
_COMPUTED = frozenset({"inv_freq"})
_INTEGER_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_FORMATS = (*_INTEGER_FORMATS, "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")
_DYNAMIC_FP8 = {"num_bits": 8, "type": "float", "dynamic": True}


class NotDecoded(Exception):
    """The layout, or a setting of it, is not decoded here; the message says which."""


@dataclass(frozen=True)
class Decoder:
    """Reads the projections of one layout. `whole`: what its settings say of more than projections, as text."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    whole: str = ""

    @cached_property
    def rules(self) -> Rules:
        """What the settings say of single modules."""
        return Rules(self.settings)

    def split(self, tensors: Mapping[str, Array]) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
        """Quantized projections by name, each with its tensors by local name; and every other tensor.

        Raises:
            NotDecoded: there are quantized projections, and nothing says how they are to be read.
        """
        marked = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in _MARKS}
        if marked and not self.method:
            raise NotDecoded(f"{min(marked)}: quantized, and no settings say how")
        modules: dict[str, dict[str, Array]] = {name: {} for name in marked}
        rest: dict[str, Array] = {}
        for name, array in tensors.items():
            parent, _, local = name.rpartition(".")
            if parent in modules:
                modules[parent][local] = array
            elif local not in _COMPUTED:
                rest[name] = array
        return modules, rest

    def module(self, name: str, parts: Mapping[str, Array]) -> Iterator[Part]:
        """What is hashed of one projection.

        Raises:
            NotDecoded: tensors that this layout does not have, shapes that do not fit each other or the settings, or a module
                that the settings leave out.
        """
        left = dict(parts)
        read = {"gptq": self._gptq, "awq": self._awq, "compressed-tensors": self._ct, "fp8": self._fp8}
        try:
            if self.rules.left_out(name):
                raise ValueError("the settings leave it out")
            if wrong := contradictions(self.rules, name, parts):
                raise ValueError(wrong[0])
            yield from read.get(self.method, self._as_ct)(name, left)
        except MISFITS as error:
            raise NotDecoded(f"{name}: {type(error).__name__}: {error}") from None
        bias = left.pop("bias", None)
        if bias is not None and np.any(bias):  # makers write zeros where the model has none
            yield "bias", bias.astype("<f4")
        if left:
            raise NotDecoded(f"{name}: tensors {', '.join(sorted(left))}")

    def _gptq(self, name: str, left: dict[str, Array]) -> Iterator[Part]:
        bits = int(self.rules.of(name)["bits"])
        if not 2 <= bits <= 8:
            raise ValueError(f"{bits} bit")
        scales = left.pop("scales")
        codes = transposed(left.pop("qweight"))
        inputs, groups = codes.shape[1] * 32 // bits, len(scales)
        if codes.shape[1] * 32 % bits:
            raise ValueError(f"{bits} bit do not fill {codes.shape[1]} words")
        zeros = unpacked(left.pop("qzeros"), bits)[:, : len(codes)].T
        if self.settings.get("checkpoint_format", "gptq") != "gptq_v2":
            zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)  # version 1 stores z - 1
        yield "activations", activations(None)
        yield from integers(bits, codes, scales.T, zeros)
        index = left.pop("g_idx", None)
        yield from order(index if index is None or index.size else None, inputs, groups)

    def _awq(self, _: str, left: dict[str, Array]) -> Iterator[Part]:
        if int(self.settings.get("bits", self.settings.get("w_bit", 4))) != 4:
            raise ValueError("AWQ with other than 4 bits")
        codes = pack(np.ascontiguousarray(_straight(left.pop("qweight")).T), 4)
        zeros = left.pop("qzeros", None)
        zeros = None if zeros is None else _straight(zeros).T
        yield "activations", activations(None)
        yield from integers(4, codes, left.pop("scales").T, zeros)

    def _ct(self, name: str, left: dict[str, Array]) -> Iterator[Part]:
        yield from self._of_scheme(self.rules.scheme(name), left)

    def _as_ct(self, name: str, left: dict[str, Array]) -> Iterator[Part]:
        scheme, tensors = vendors.as_compressed_tensors(self.rules, left)
        left.clear()
        left |= tensors
        yield from self._of_scheme(scheme, left)

    def _of_scheme(self, scheme: Mapping[str, Any], left: dict[str, Array]) -> Iterator[Part]:
        asked = scheme.get("format") or self.settings.get("format")
        arguments = scheme["weights"]
        if asked not in _FORMATS:
            raise ValueError(f"format {asked!r}")
        left.pop("weight_shape", None)
        yield "activations", activations(scheme.get("input_activations"))
        if asked not in _INTEGER_FORMATS:
            yield "format", str(asked)  # each has one layout
            for local in ("weight_packed", "weight", "weight_scale", "weight_global_scale", "input_global_scale"):
                if local in left:
                    array = left.pop(local)
                    yield local, array if array.dtype.itemsize == 1 else array.astype("<f4")
            return
        scales = left.pop("weight_scale")
        scales = scales.reshape(1, 1) if scales.size == 1 else scales
        if "weight_packed" in left:
            bits = int(arguments["num_bits"])
            codes = np.ascontiguousarray(left.pop("weight_packed"))
            inputs = codes.shape[1] * 32 // bits
            packed = left.pop("weight_zero_point", None)
            zeros = None if packed is None else unpacked(np.ascontiguousarray(packed.T), bits).T
            yield from integers(bits, codes, scales, zeros)
            yield from order(left.pop("weight_g_idx", None), inputs, scales.shape[-1])
        elif (weight := left.pop("weight")).dtype == np.int8:
            bits = 4 if arguments.get("num_bits") == 4 else 8  # 4 bit for kernels that multiply int8: the same integers
            yield from integers(bits, pack(_unsigned(weight, bits), bits), scales, _offset(left, bits))
        else:
            yield from floats(weight, scales)
        if "input_scale" in left:
            yield "input scale", left.pop("input_scale").astype("<f4").reshape(-1)

    def _fp8(self, _: str, left: dict[str, Array]) -> Iterator[Part]:
        blocks = self.settings.get("weight_block_size")
        dynamic = self.settings.get("activation_scheme", "dynamic") == "dynamic"
        if blocks not in (None, [BLOCK, BLOCK]):
            raise ValueError(f"blocks of {blocks}")
        scales = left.pop("weight_scale_inv") if blocks else left.pop("weight_scale")
        how = {"strategy": "group", "group_size": BLOCK} if blocks else {"strategy": "tensor"}
        yield "activations", activations({**_DYNAMIC_FP8, **how, "dynamic": dynamic})
        yield from floats(left.pop("weight"), scales.reshape(1, 1) if scales.size == 1 else scales)
        if "input_scale" in left:
            yield "input scale", left.pop("input_scale").astype("<f4").reshape(-1)


def decoder(settings: Mapping[str, Any]) -> Decoder:
    """What reads checkpoints with these quantization settings; without any, nothing is quantized.

    Raises:
        NotDecoded: the method is not decoded here, or the settings of single modules cannot be understood.
    """
    if not settings:
        return Decoder("")
    method, settings = as_plain_gptq_or_awq(settings)
    if method not in ("gptq", "awq", "compressed-tensors", "fp8", "quark", "modelopt"):
        raise NotDecoded(f"method {method or settings.get('quant_method')!r}")
    if settings.get("sparsity_config") or settings.get("transform_config"):
        raise NotDecoded(f"{method} with sparsity or transforms")
    if method == "awq" and str(settings.get("version", "gemm")).lower() != "gemm":
        raise NotDecoded(f"AWQ version {settings.get('version')!r}")
    try:
        Rules(settings)
        cache = vendors.kv_cache(method, settings)
    except MISFITS as error:
        raise NotDecoded(f"{method}: {error}") from None
    return Decoder(method, settings, f"KV cache {activations(cache)}" if cache is not None else "")


def integers(bits: int, codes: Array, scales: Array, zeros: Array | None) -> Iterator[Part]:
    """Integers int32 [N, K * bits / 32] packed along K, scales [N, groups], zero points uint8 [N, groups] or None.

    Zero points that are all in the middle are those of a symmetric set, which most layouts do not write.
    """
    yield "integers", f"{bits} bit"
    yield "codes", codes
    yield "scales", scales.astype("<f4")
    if zeros is None or (zeros == 2 ** (bits - 1)).all():
        yield "zero points", "none: symmetric"
    else:
        yield "zero points", zeros


def floats(codes: Array, scales: Array) -> Iterator[Part]:
    """Narrow floats [N, K] as their bytes, scales [N or blocks, 1 or blocks]."""
    yield "floats", codes.dtype.name
    yield "codes", codes.view(np.uint8)
    yield "scales", scales.astype("<f4")


def order(index: Array | None, inputs: int, groups: int) -> Iterator[Part]:
    """Which group each input belongs to, unless it is the group of its place."""
    if index is not None and groups and not np.array_equal(index, np.arange(inputs) // max(inputs // groups, 1)):
        yield "group of each input", index.astype("<i4")


def activations(arguments: Mapping[str, Any] | None) -> str:
    """How activations are quantized, in the words of compressed-tensors' arguments; "none": they are not."""
    if not arguments:
        return "none"
    words = {name: arguments.get(name) for name in ("type", "num_bits", "strategy", "dynamic", "group_size")}
    words["symmetric"] = arguments.get("symmetric") is not False
    words |= {name: word.lower() for name, word in words.items() if isinstance(word, str)}
    words["group_size"] = None if words["group_size"] == -1 else words["group_size"]
    return ", ".join(f"{name} {value}" for name, value in words.items() if value is not None)


def unpacked(words: Array, bits: int) -> Array:
    """int32 [R, n] -> uint8 [R, n * 32 // bits], the first integer in the lowest bits; of 3 bits and the like some lie in two.

    Integers that do not fill the last words are dropped by the caller, who knows how many there are.
    """
    words = np.ascontiguousarray(words)
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        spread = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
        return np.asarray(spread.astype(np.uint8).reshape(len(words), -1))
    count = words.shape[1] * 32 // bits
    single = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    return np.asarray(np.packbits(single.reshape(len(words), count, bits), axis=2, bitorder="little")[..., 0])


def _straight(words: Array) -> Array:
    """AWQ's int32 [R, N / 8] -> uint8 [R, N], in the order of the outputs."""
    mixed = unpacked(words, 4).reshape(len(words), -1, 8)
    straight = np.empty_like(mixed)
    straight[:, :, list(ORDER)] = mixed
    return np.asarray(straight.reshape(len(words), -1))


def _unsigned(values: Array, bits: int) -> Array:
    """int8 of `bits` bits -> uint8, 2^(bits - 1) higher.

    Raises:
        ValueError: a value that has more bits.
    """
    half = 2 ** (bits - 1)
    if bits < 8 and values.size and not -half <= int(values.min()) <= int(values.max()) < half:
        raise ValueError(f"{bits}-bit integers from {values.min()} to {values.max()}")
    return (values.view(np.uint8) + np.uint8(half)).astype(np.uint8)


def _offset(left: dict[str, Array], bits: int) -> Array | None:
    zeros = left.pop("weight_zero_point", None)
    return None if zeros is None else _unsigned(zeros, bits)
