"""Checkpoints with one fault each, made of good ones. `DOWN` and `QUERY` are what most faults are in."""

import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from layouts import compressed, floats, integers
from layouts.checkpoint import WEIGHTS, Checkpoint, Tensors, as_json, body, plain, quantized, sharded
from quantdet.checkpoints import tensors
from quantdet.checkpoints.quantize import quantize
from quantdet.checkpoints.tensors import Array

DOWN = "model.layers.0.mlp.down_proj"
QUERY = "model.layers.0.self_attn.q_proj"
NORM = "model.layers.1.input_layernorm"
ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"

_gptq = partial(integers.gptq_of, 128)
_awq = partial(integers.awq_of, 128)
_ct = partial(compressed.of, "int4-sym")
_ct_asym = partial(compressed.of, "int4-asym")
_int8 = partial(compressed.of, "int8-channel", "int8", -1)


def changed(checkpoint: Checkpoint, name: str, change: Callable[[Array], Array]) -> Checkpoint:
    """The same with one tensor changed; `change` gets a copy that it may write to."""
    return checkpoint.with_tensors({name: change(checkpoint.tensors[name].copy())})


def _first(value: float) -> Callable[[Array], Array]:
    """The first element set to `value`."""

    def change(array: Array) -> Array:
        array.reshape(-1)[0] = value
        return array

    return change


def _zeros(array: Array) -> Array:
    return np.zeros_like(array)


def _layer_two(checkpoint: Checkpoint) -> Checkpoint:
    """A third decoder layer's tensors, of which the configuration has none."""
    more = {name.replace("layers.1.", "layers.2."): array for name, array in checkpoint.tensors.items() if "layers.1." in name}
    return checkpoint.with_tensors(more)


def _off_middle(module: str, weight: Array) -> Tensors:
    """GPTQ with zero points of its own, to be declared symmetric."""
    return integers.gptq_asymmetric(128, module, weight)


def _twice() -> Checkpoint:
    """The last shard holds the first layer's `down_proj` again, with other numbers."""
    made = sharded(plain())
    name = f"{DOWN}.weight"
    first, last = list(made.shards)
    extra = plain().tensors[name.replace("layers.0", "layers.1")]
    assert name in made.shards[first]
    content = {one: made.tensors[one] for one in made.shards[last]}
    return replace(made, files={last: _bytes({**content, name: extra})})


def _bytes(content: Tensors) -> bytes:
    """A safetensors file with this content."""

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, WEIGHTS)
        tensors.save(content, path)
        return path.read_bytes()


def _indexed(change: Callable[[dict[str, str], list[str]], None]) -> Checkpoint:
    """Two shards with an index that says something else; `change` gets the index and the names of the files."""
    made = sharded(plain())
    place = {one: name for name, names in made.shards.items() for one in names}
    change(place, list(made.shards))
    return replace(made, index=place)


def _other_file(place: dict[str, str], files: list[str]) -> None:
    place[f"{DOWN}.weight"] = files[1]


def _no_file(place: dict[str, str], files: list[str]) -> None:
    place[f"{DOWN}.weight"] = "model-00003-of-00003.safetensors"


def _without_last(place: dict[str, str], files: list[str]) -> None:
    for name in [name for name, file in place.items() if file == files[1]]:
        del place[name]


def _shard_lost() -> Checkpoint:
    """The index names the last shard, which is not there."""
    made = sharded(plain())
    place = {one: name for name, names in made.shards.items() for one in names}
    first, _ = made.shards
    return replace(made, shards={first: made.shards[first]}, index=place)


def _cut() -> Checkpoint:
    whole = _bytes(plain().tensors)
    return replace(plain(), files={WEIGHTS: whole[: len(whole) * 3 // 4]})


def _pickles() -> Checkpoint:
    content = pickle.dumps({"model.norm.weight": [1.0]}, protocol=2)
    return Checkpoint(plain().config, {}, files={"pytorch_model.bin": content})


def _without_config(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, config=None)


def _shorter(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """One tensor with half of its rows."""
    return checkpoint.with_tensors({name: np.ascontiguousarray(checkpoint.tensors[name][: len(checkpoint.tensors[name]) // 2])})


def _unconfigured(checkpoint: Checkpoint) -> Checkpoint:
    """Quantized tensors whose configuration was lost."""
    assert checkpoint.config is not None
    return replace(checkpoint, config={key: value for key, value in checkpoint.config.items() if key != "quantization_config"})


def _declared_group(checkpoint: Checkpoint, group: int) -> Checkpoint:
    """compressed-tensors that declares another group than its scales have."""
    one = compressed.scheme("int4-sym", "none", group)
    return checkpoint.requantized(config_groups={"group_0": one})


def _declared_bits() -> Checkpoint:
    one = compressed.altered(compressed.scheme("int4-sym", "none", 128), {"num_bits": 8})
    return _ct().requantized(config_groups={"group_0": one})


def _declared_symmetric() -> Checkpoint:
    """Zero points in the checkpoint, and a configuration that says there are none."""
    return _ct_asym().requantized(config_groups={"group_0": compressed.scheme("int4-sym", "none", 128)})


def _out_of_range() -> Checkpoint:
    """INT8 codes where W4A8 promises four bits."""

    def encode(module: str, weight: Array) -> Tensors:
        made = quantize("int8-sym", weight, group=128)
        return {"weight": made.codes, "weight_scale": made.scales.astype(ml_dtypes.bfloat16)}

    settings: Any = compressed.MADE["ct-w4a8"]().config
    return quantized(settings["quantization_config"], body(encode))


def _written_over(content: bytes) -> Checkpoint:
    return replace(plain(), files={"config.json": content})


def _no_groups() -> Checkpoint:
    made = _gptq(desc_act=True)
    return made.without(*(name for name in made.tensors if name.endswith(".g_idx")))


MADE: dict[str, Callable[[], Checkpoint]] = {
    "missing-weight": lambda: plain().without(f"{DOWN}.weight"),
    "missing-norm": lambda: plain().without(f"{NORM}.weight"),
    "missing-head": lambda: plain().without("lm_head.weight"),
    "missing-expert": lambda: plain(True).without("model.layers.0.mlp.experts.2.up_proj.weight"),
    "ct-missing-weight": lambda: _ct().without(f"{DOWN}.weight_packed"),
    "ct-missing-scale": lambda: _ct().without(f"{DOWN}.weight_scale"),
    "ct-missing-shard-scale": lambda: _ct().without(f"{QUERY}.weight_scale"),
    "ct-missing-zero-point": lambda: _ct_asym().without(f"{DOWN}.weight_zero_point"),
    "ct-missing-norm": lambda: _ct().without(f"{NORM}.weight"),
    "ct-missing-input-scale": compressed.unscaled_inputs,
    "ct-int8-missing-scale": lambda: _int8().without(f"{DOWN}.weight_scale"),
    "gptq-missing-qweight": lambda: _gptq().without(f"{DOWN}.qweight"),
    "gptq-missing-scales": lambda: _gptq().without(f"{QUERY}.scales"),
    "awq-missing-qzeros": lambda: _awq().without(f"{DOWN}.qzeros"),
    "surplus-buffer": lambda: plain().with_tensors({ROTARY: np.ones(64, np.float32)}),
    "surplus-tensor": lambda: _ct().with_tensors({f"{DOWN}.weight_extra": np.ones(4, np.float32)}),
    "surplus-layer": lambda: _layer_two(_ct()),
    "nan-weight": lambda: changed(plain(), f"{DOWN}.weight", _first(float("nan"))),
    "ct-nan-scale": lambda: changed(_ct(), f"{DOWN}.weight_scale", _first(float("nan"))),
    "ct-zero-scale": lambda: changed(_ct(), f"{DOWN}.weight_scale", _first(0.0)),
    "gptq-infinite-scale": lambda: changed(_gptq(), f"{DOWN}.scales", _first(float("inf"))),
    "gptq-zero-scales": lambda: changed(_gptq(), f"{DOWN}.scales", _zeros),
    "shape-short": lambda: _shorter(plain(), f"{DOWN}.weight"),
    "shards-duplicate": _twice,
    "index-other-file": partial(_indexed, _other_file),
    "index-no-file": partial(_indexed, _no_file),
    "index-without-shard": partial(_indexed, _without_last),
    "shard-lost": _shard_lost,
    "file-cut": _cut,
    "gptq-group-declared": lambda: _gptq().requantized(group_size=64),
    "gptq-channel-declared": lambda: _gptq().requantized(group_size=-1),
    "gptq-bits-declared": lambda: _gptq().requantized(bits=8),
    "ct-group-declared": lambda: _declared_group(_ct(), 64),
    "ct-bits-declared": _declared_bits,
    "ct-symmetric-declared": _declared_symmetric,
    "ct-w4a8-range": _out_of_range,
    "gptq-under-awq": lambda: _gptq().configured(quantization_config=_quantization(_awq())),
    "awq-under-gptq": lambda: _awq().configured(quantization_config=_quantization(_gptq())),
    "ct-under-awq": lambda: _ct().configured(quantization_config=_quantization(_awq())),
    "gptq-v2-undeclared": lambda: integers.MADE["gptq-v2"]().requantized(checkpoint_format="gptq"),
    "gptq-desc-act-no-g-idx": _no_groups,
    "gptq-g-idx-undeclared": partial(integers.permuted_groups, 128),
    "gptq-sym-off-middle": lambda: quantized(integers.gptq_config(128, sym=True), body(_off_middle)),
    "gptq-config-plain-tensors": integers.configured_alone,
    "ct-config-plain-tensors": lambda: compressed.plain_under(_quantization(_ct())),
    "fp8-config-plain-tensors": floats.plain_under_fp8,
    "ct-config-lost": lambda: _unconfigured(_ct()),
    "config-unknown-method": lambda: plain().configured(
        quantization_config={"quant_method": "five_and_a_half_bits", "bits": 5}
    ),
    "config-no-architecture": lambda: plain().configured(architectures=["NoSuchModelForCausalLM"], model_type="no_such_model"),
    "config-not-json": lambda: _written_over(b'{"architectures": ["Qwen3ForCausalLM"],\n'),
    "config-a-list": lambda: _written_over(as_json([1, 2])),
    "config-missing": lambda: _without_config(plain()),
    "folder-empty": lambda: Checkpoint(None, {}),
    "weights-missing": lambda: Checkpoint(plain().config, {}),
    "pickles-only": _pickles,
}


def _quantization(checkpoint: Checkpoint) -> dict[str, Any]:
    assert checkpoint.config is not None
    settings: dict[str, Any] = checkpoint.config["quantization_config"]
    return settings
