"""GPTQ, AWQ and auto-round: integers packed into int32 words, with scales by group."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from layouts.checkpoint import Checkpoint, Encode, Tensors, as_json, body, plain, quantized, where
from quantdet.checkpoints.layouts import awq, gptq
from quantdet.checkpoints.layouts.packing import transposed, unsigned
from quantdet.checkpoints.quantize import quantize, round_to_scale
from quantdet.checkpoints.tensors import Array

MLP_OF_0 = tuple(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))


def in_mlp(module: str) -> bool:
    return ".mlp." in module


def group_of(group: int, weight: Array) -> int:
    """The group in inputs; -1 is all of them, as in these formats' configurations."""
    return int(weight.shape[1]) if group == -1 else group


def gptq_tensors(group: int, bits: int, module: str, weight: Array) -> Tensors:
    """GPTQ v1, symmetric, 4 or 8 bits."""
    return gptq.encode(quantize("int4-sym" if bits == 4 else "int8-sym", weight, group=group_of(group, weight)), "none")


def awq_tensors(group: int, module: str, weight: Array) -> Tensors:
    """AWQ, 4 bits with zero points."""
    return awq.encode(quantize("int4-asym", weight, group=group_of(group, weight)), "none")


def gptq_config(group: int, bits: int = 4, **more: Any) -> dict[str, Any]:
    """The `quantization_config` of GPTQ, with `more` in it."""
    return {**gptq.config("int4-sym", "none", group), "bits": bits, **more}


def gptq_of(group: int, bits: int = 4, **more: Any) -> Checkpoint:
    """All projections as GPTQ v1."""
    return quantized(gptq_config(group, bits, **more), body(partial(gptq_tensors, group, bits)))


def awq_of(group: int, skipped: tuple[str, ...] = ()) -> Checkpoint:
    """Projections as AWQ, but for those that are named."""
    encode = where(lambda module: module not in skipped, partial(awq_tensors, group))
    return quantized(awq.config("int4-asym", "none", group, skipped), encode)


def _v2(group: int) -> Checkpoint:
    """GPTQ v2 (GPTQModel): zero points are stored as they are, not less one."""

    def encode(module: str, weight: Array) -> Tensors:
        made = gptq_tensors(group, 4, module, weight)
        return {**made, "qzeros": np.full_like(made["qzeros"], np.uint32(0x88888888).astype(np.int32))}

    return quantized(gptq_config(group, checkpoint_format="gptq_v2"), body(encode))


def gptq_asymmetric(group: int, module: str, weight: Array) -> Tensors:
    """GPTQ v1 with zero points of its own in each group, stored less one as v1 has it (modulo 16)."""
    made = quantize("int4-asym", weight, group=group)
    assert made.zero_points is not None
    zeros = np.ascontiguousarray(made.zero_points.T) - np.uint8(1) & np.uint8(15)
    return {
        "qweight": transposed(bit_stream(made.codes, 4)),
        "qzeros": bit_stream(zeros, 4),
        "scales": transposed(made.scales).astype(np.float16),
        "g_idx": (np.arange(weight.shape[1]) // group).astype(np.int32),
    }


def _ordered_by_activation(group: int, module: str, weight: Array) -> Tensors:
    """GPTQ with act-order: groups of columns that do not lie side by side, as `g_idx` says for each input."""
    columns = weight.shape[1]
    order = np.argsort(np.random.Philox(key=columns).random_raw(columns), kind="stable")
    made = quantize("int4-sym", np.ascontiguousarray(weight[:, order]), group=group)
    place = np.argsort(order, kind="stable")
    back = replace(made, codes=np.ascontiguousarray(made.codes[:, place]))
    return {**gptq.encode(back, "none"), "g_idx": (place // group).astype(np.int32)}


def bit_stream(values: Array, bits: int) -> Array:
    """uint8 values below 2^bits as one stream of bits along the last axis, the first lowest: int32 [..., n * bits / 32].

    Three bits run over the ends of the words, as in GPTQ.
    """
    stream = np.unpackbits(values[..., None], axis=-1, bitorder="little")[..., :bits].reshape(*values.shape[:-1], -1)
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4")


def few_bits(bits: int, group: int, module: str, weight: Array) -> Tensors:
    """GPTQ v1 of two or three bits, for which the suite has no quantizer: as its symmetric ones."""
    top = 2 ** (bits - 1) - 1
    w = weight.astype(np.float32).reshape(len(weight), -1, group)
    scales = round_to_scale(np.abs(w).max(axis=2) / np.float32(top))
    codes = np.clip(np.rint(w / scales[..., None]), -top - 1, top).astype(np.int8).reshape(weight.shape)
    zeros = np.full((scales.shape[1], len(weight)), 2 ** (bits - 1) - 1, np.uint8)
    return {
        "qweight": transposed(bit_stream(unsigned(codes, bits), bits)),
        "qzeros": bit_stream(zeros, bits),
        "scales": transposed(scales).astype(np.float16),
        "g_idx": (np.arange(weight.shape[1]) // group).astype(np.int32),
    }


def _dynamic(rules: Mapping[str, Any], choose: Callable[[str], bool], then: Encode | None) -> Checkpoint:
    """GPTQ in groups of 128 with the rules of `dynamic`: what they are about is encoded by `then`, or stays."""
    body_of = partial(gptq_tensors, 128, 4)
    encode = where(lambda module: not choose(module), body_of, then)
    return quantized(gptq_config(128, dynamic=dict(rules)), encode)


def _gptq_head() -> Checkpoint:
    return quantized(gptq_config(128, lm_head=True), partial(gptq_tensors, 128, 4))


def apart(checkpoint: Checkpoint, name: str, settings: Mapping[str, Any]) -> Checkpoint:
    """The same with `config.json` silent about quantization and `settings` in a file of their own."""
    assert checkpoint.config is not None
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return Checkpoint(config, checkpoint.tensors, files={name: as_json(settings)})


def _gptq_experts() -> Checkpoint:
    config = gptq_config(128, modules_in_block_to_quantize=["self_attn", "mlp.experts"])
    return quantized(config, body(partial(gptq_tensors, 128, 4)), experts=True)


def _awq_experts() -> Checkpoint:
    config = awq.config("int4-asym", "none", 128, tuple(f"model.layers.{layer}.mlp.gate" for layer in range(2)))
    return quantized(config, body(partial(awq_tensors, 128)), experts=True)


def _auto_round(packing: str, encode: Encode, sym: bool, **more: Any) -> Checkpoint:
    config = {
        "quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": sym, "data_type": "int", "iters": 200,
        "autoround_version": "0.9.0", "block_name_to_quantize": "model.layers", "packing_format": packing, **more,
    }  # fmt: skip
    return quantized(config, encode)


def _auto_round_mixed() -> Checkpoint:
    """One layer's feed-forward network left as it is, which auto-round writes as 16 bits in `extra_config`."""
    encode = where(lambda module: module not in MLP_OF_0, partial(gptq_tensors, 128, 4))
    extra = {name: {"bits": 16, "data_type": "fp"} for name in MLP_OF_0}
    return _auto_round("auto_round:auto_gptq", encode, True, extra_config=extra)


MADE: dict[str, Callable[[], Checkpoint]] = {
    "gptq-g32": partial(gptq_of, 32),
    "gptq-g64": partial(gptq_of, 64),
    "gptq-g128": partial(gptq_of, 128),
    "gptq-channel": partial(gptq_of, -1),
    "gptq-v2": partial(_v2, 128),
    "gptq-asym": lambda: quantized(gptq_config(128, sym=False), body(partial(gptq_asymmetric, 128))),
    "gptq-act-order": lambda: quantized(gptq_config(128, desc_act=True), body(partial(_ordered_by_activation, 128))),
    "gptq-act-order-channel": partial(gptq_of, -1, desc_act=True),
    "gptq-act-order-static": partial(gptq_of, 128, desc_act=True, static_groups=True),
    "gptq-static-ordered": partial(gptq_of, 128, static_groups=True),
    "gptq-8bit": partial(gptq_of, 128, 8),
    "gptq-3bit": lambda: quantized(gptq_config(128, 3), body(partial(few_bits, 3, 128))),
    "gptq-2bit": lambda: quantized(gptq_config(128, 2), body(partial(few_bits, 2, 128))),
    "gptq-dynamic-excluded": lambda: _dynamic(
        {r"-:.*layers\.0\.mlp\..*": {}}, lambda module: module.startswith("model.layers.0.mlp."), None
    ),
    "gptq-dynamic-groups": lambda: _dynamic({r"+:.*\.mlp\..*": {"group_size": 32}}, in_mlp, partial(gptq_tensors, 32, 4)),
    "gptq-dynamic-bits": lambda: _dynamic(
        {r"+:.*\.down_proj.*": {"bits": 8, "group_size": 64}},
        lambda module: module.endswith("down_proj"),
        partial(gptq_tensors, 64, 8),
    ),
    "gptq-dynamic-shards": lambda: _dynamic(
        {r"+:.*\.(gate|up)_proj": {"group_size": 32}},
        lambda module: module.endswith(("gate_proj", "up_proj")),
        partial(gptq_tensors, 32, 4),
    ),
    "gptq-lm-head": _gptq_head,
    "gptq-quantize-config": lambda: apart(gptq_of(128), "quantize_config.json", _quantize_config()),
    "gptq-experts": _gptq_experts,
    "awq-g32": partial(awq_of, 32),
    "awq-g128": partial(awq_of, 128),
    "awq-skipped": partial(awq_of, 128, MLP_OF_0),
    "awq-quant-config": lambda: apart(
        awq_of(128), "quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    ),
    "awq-experts": _awq_experts,
    "autoround-gptq": lambda: _auto_round("auto_round:auto_gptq", body(partial(gptq_tensors, 128, 4)), True),
    "autoround-awq": lambda: _auto_round("auto_round:auto_awq", body(partial(awq_tensors, 128)), False),
    "autoround-mixed": _auto_round_mixed,
}


def _quantize_config() -> dict[str, Any]:
    """AutoGPTQ's own file: without `quant_method`."""
    return {key: value for key, value in gptq_config(128).items() if key not in ("quant_method", "lm_head")}


def permuted_groups(group: int) -> Checkpoint:
    """Act-order that the configuration does not declare."""
    return quantized(gptq_config(group), body(partial(_ordered_by_activation, group)))


def configured_alone() -> Checkpoint:
    """A configuration of GPTQ beside the unquantized tensors."""
    return plain().configured(quantization_config=gptq_config(128))
