"""The one scheme of a checkpoint, if it has one: in the words of the matrix's rows, and in a few letters for a format's id."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantdet.checkpoints.rules import Rules, method_of, modelopt
from quantdet.checkpoints.shapes import MISFITS
from quantdet.matrix.rows import CARRIES, Activations, Layout, Weights


@dataclass(frozen=True)
class Scheme:
    """How all quantized modules of a checkpoint are quantized.

    `layout`, `weights`, `activations`: words of `matrix.rows`, all three or none: no such words, or several schemes.
    `short`: of letters, digits, dashes and dots. `group_size`: None: a whole row or tensor, blocks, or several.
    """

    short: str
    group_size: int | None = None
    layout: Layout | None = None
    weights: Weights | None = None
    activations: Activations | None = None


def scheme(settings: Mapping[str, Any]) -> Scheme:
    """What quantization settings say of all modules; of settings that cannot be understood, the method's name alone."""
    method = method_of(settings)
    try:
        rules = Rules(settings)
        read = {
            "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors, "fp8": _fp8, "bitsandbytes": _bitsandbytes,
            "modelopt": _modelopt, "quark": _quark,
        }.get(rules.method)  # fmt: skip
        if read is not None:
            return read(rules)
    except MISFITS:
        pass
    return Scheme(_plain(method) or "quantized")


def _words(short: str, group: int | None, layout: Layout, weights: str, activations: str = "none") -> Scheme:
    """With the matrix's words, if its rows may have them together."""
    if (weights, activations) in CARRIES[layout]:
        return Scheme(short, group, layout, weights, activations)  # type: ignore[arg-type]  # the table has words alone
    return Scheme(short, group)


def _size(size: object) -> int | None:
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def _suffix(group: int | None) -> str:
    return f"-g{group}" if group else "-channel"


def _gptq(rules: Rules) -> Scheme:
    own = rules.settings
    bits, group, symmetric = int(own["bits"]), _size(own.get("group_size")), own.get("sym") is not False
    maker = "autoround" if own.get("auto-round") else "gptq"
    if rules.overrides():
        return Scheme(f"{maker}-mixed")
    order = "-actorder" if own.get("desc_act") is True and group else ""
    short = f"{maker}-int{bits}{'' if symmetric else '-asym'}{_suffix(group)}{order}"
    return _words(short, group, "gptq", f"int{bits}-sym" if symmetric else f"int{bits}-asym")


def _awq(rules: Rules) -> Scheme:
    own = rules.settings
    bits, group = int(own.get("bits", own.get("w_bit", 4))), _size(own.get("group_size", own.get("q_group_size")))
    symmetric = own.get("zero_point") is False or own.get("sym") is True
    maker = "autoround-awq" if own.get("auto-round") else "awq"
    if rules.overrides():
        return Scheme(f"{maker}-mixed")
    short = f"{maker}-int{bits}{'-sym' if symmetric else ''}{_suffix(group)}"
    return _words(short, group, "awq", f"int{bits}-{'sym' if symmetric else 'asym'}")


def _fp8(rules: Rules) -> Scheme:
    own = rules.settings
    blocks = own.get("weight_block_size")
    static = "-static" if own.get("activation_scheme") == "static" else ""
    if not blocks:
        return _words(f"fp8-tensor{static}", None, "fp8", "fp8-tensor", "fp8")
    if list(blocks) == [128, 128]:
        return _words(f"fp8-block{static}", None, "fp8", "fp8-block", "fp8")
    return Scheme(f"fp8-block-{int(blocks[0])}x{int(blocks[1])}{static}")


def _bitsandbytes(rules: Rules) -> Scheme:
    own = rules.settings
    if own.get("load_in_8bit"):
        return _words("bnb-int8", None, "bnb", "bnb-int8", "int8")
    kind = _plain(own.get("bnb_4bit_quant_type", "fp4"))
    if own.get("bnb_4bit_use_double_quant"):  # its scales are quantized too: the matrix has no word for that
        return Scheme(f"bnb-{kind}-nested")
    return _words(f"bnb-{kind}", None, "bnb", kind)


def _modelopt(rules: Rules) -> Scheme:
    return Scheme(f"modelopt-{_plain(rules.settings['quant_algo'])}", _size(rules.settings.get("group_size")))


def _quark(rules: Rules) -> Scheme:
    asked = rules.settings.get("global_quant_config")
    weight = asked.get("weight") if isinstance(asked, dict) else None
    if isinstance(weight, dict) and not rules.settings.get("layer_quant_config"):
        return Scheme(f"quark-{_plain(weight.get('dtype'))}", _size(weight.get("group_size")))
    return Scheme("quark-mixed" if rules.settings.get("layer_quant_config") else "quark")


def _compressed_tensors(rules: Rules) -> Scheme:
    groups = [one for one in rules.settings["config_groups"].values() if isinstance(one, dict) and one.get("weights")]
    found = {_ct_group(one, one.get("format") or rules.settings.get("format")) for one in groups}
    if not groups:
        return Scheme("ct-kv" if rules.settings.get("kv_cache_scheme") else "ct")
    return found.pop() if len(found) == 1 else Scheme("ct-mixed")


def _ct_group(one: Mapping[str, Any], form: object) -> Scheme:
    weights, inputs = one["weights"], one.get("input_activations")
    bits, kind, strategy = int(weights["num_bits"]), str(weights.get("type", "int")).lower(), weights.get("strategy")
    group = _size(weights.get("group_size"))
    strategy = strategy or ("group" if group else "channel" if weights.get("group_size") == -1 else "tensor")
    narrow = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4", "mxfp8-quantized": "mxfp8"}.get(str(form))
    if narrow:
        activations = "none" if not inputs else {"nvfp4": "fp4"}.get(narrow, "mxfp8" if int(inputs["num_bits"]) == 8 else "fp4")
        return _words(f"ct-{narrow}{'' if inputs else '-a16'}", group, "ct", narrow, activations)
    order = str(weights.get("actorder")).lower()
    short = f"ct-{'fp' if kind == 'float' else 'int'}{bits}{'' if weights.get('symmetric', True) is not False else '-asym'}"
    ordered = "-actorder" if order in ("true", "group", "dynamic") else ""
    how = _suffix(group) if strategy == "group" else "" if inputs and strategy == "channel" else f"-{_plain(strategy)}"
    acts = f"-w{bits}a{int(inputs['num_bits'])}{'' if inputs.get('dynamic') else '-static'}" if inputs else ""
    if kind == "float":
        how, acts = f"-{_plain(strategy)}", acts if not inputs or not inputs.get("dynamic") else ""
        if not inputs:
            acts = "-a16"
    word = _ct_word(kind, bits, strategy, weights, inputs, form)
    return _words(f"{short}{how}{ordered}{acts}", group, "ct", *word) if word else Scheme(f"{short}{how}{ordered}{acts}", group)


def _ct_word(
    kind: str, bits: int, strategy: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, form: object
) -> tuple[str, str] | None:
    """Weights and activations in the matrix's words, where these mean the same."""
    symmetric = weights.get("symmetric", True) is not False
    per_token = inputs is not None and inputs.get("dynamic") is True and str(inputs.get("strategy")).lower() == "token"
    if kind == "int" and form == "pack-quantized" and not inputs and strategy in ("group", "channel"):
        return f"int{bits}-{'sym' if symmetric else 'asym'}", "none"
    if bits == 8 and strategy == "channel" and kind == "int" and symmetric and per_token and form == "int-quantized":
        return "int8-channel", "int8"
    if bits == 8 and strategy == "channel" and kind == "float" and form == "float-quantized" and (per_token or not inputs):
        return "fp8-channel", "fp8" if inputs else "none"
    return None


def vllm_method(settings: Mapping[str, Any]) -> str:
    """vLLM's `quantization` for these settings; "" without any."""
    method = method_of(settings)
    if method == "modelopt":
        algorithm = str(modelopt(settings).get("quant_algo")).upper()
        if "NVFP4" in algorithm:
            return "modelopt_fp4"
        return {"MXFP8": "modelopt_mxfp8", "MIXED_PRECISION": "modelopt_mixed"}.get(algorithm, "modelopt")
    return {"auto-round": "inc"}.get(method, method)


def _plain(word: object) -> str:
    """What of a word an id may hold."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in str(word).lower())[:24].strip("-")
