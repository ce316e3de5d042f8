"""Are two formats the same numerics: the same numbers, on the same executed kernels, in the same way? Derived, not declared.

Where they are, their logits have to be equal bit for bit; where they are not, the logits have to differ. Numbers are the same
by their digests alone, and others only where both were decoded: two layouts that nobody decodes may hold the same.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from quantdet.judging import layers
from quantdet.observations.header import Executed, Header
from quantdet.observations.observation import Observation
from quantdet.untrusted import parse_json, read_bounded

# Numbers of checkpoints that were recorded before observations told them, by the SHA-256 of their tensors and of their other
# files. Made by `python -m quantdet.checkpoints.known_numbers`.
KNOWN = Path(__file__).resolve().parents[3] / "fixtures" / "numbers.json"
_MAX_BYTES = 1 << 20
# Arguments that decide what vLLM makes of plain weights while it loads them.
_MAKING = ("quantization", "quantization_config", "hf_overrides", "torchao", "load_format", "model_loader_extra_config")
_ONLINE = "online:"
_LONGEST = 200  # of one side in a message: the scales of a KV cache may be of every layer
_WRAPPED = re.compile(r"(?:Merged(?=QKV))?(\w+?)(?:VariableSlice)?With(?:Sharded)?LoRA")


@dataclass(frozen=True)
class Sameness:
    """Whether two formats are the same numerics, and why.

    same: True, False, or None where it is not known whether both hold the same numbers and all else is the same.
    why: what they share or differ in, for a message. made: the engine made the numbers of one of them while it loaded it, so
    that what the matrix calls those of a checkpoint says nothing of them.
    """

    same: bool | None
    why: str
    made: bool = False


def numbers(observation: Observation) -> str:
    """Which numbers the checkpoint of an observation holds (`checkpoints.numbers`); empty: not known.

    What this suite knows of a checkpoint by its hashes comes before what a recording says of it.
    """
    header = observation.header
    return _known().get(f"{header.checkpoint_sha256} {header.checkpoint_files_sha256}") or header.numbers


def made_while_loading(header: Header) -> bool:
    """Whether the engine quantized plain weights itself; of older recordings it is known by the numbers that they tell."""
    executed = header.executed
    if header.numbers.startswith(_ONLINE):
        return True
    plain = executed is not None and layers.tells(executed) and not any(map(layers.quantized, executed.layers))
    return plain and _asked(header) and not _nothing_quantized(executed)


def _asked(header: Header) -> bool:
    """Whether the engine was told of a quantization: of the checkpoint's own, or to make one."""
    return bool(header.engine_args.get("quantization")) or header.numbers.startswith(_ONLINE)


def held(observation: Observation) -> str:
    """Which numbers the engine computed with: those of the checkpoint, or what it made of them; empty: not known."""
    told, header = numbers(observation), observation.header
    if told.startswith(_ONLINE) or not made_while_loading(header):
        return told
    made = [told or [header.checkpoint_sha256, header.checkpoint_files_sha256], _making(header)]
    return f"made:{hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()}"


def _making(header: Header) -> dict[str, object]:
    return {name: header.engine_args[name] for name in _MAKING if name in header.engine_args}


def _nothing_quantized(executed: Executed | None) -> bool:
    """Whether every layer multiplied by unquantized weights, whatever was asked for."""
    found = () if executed is None else (*executed.linear, *executed.moe, *executed.heads)
    return bool(found) and all(layer.multiplied_plain for layer in found)


def sameness(a: Observation, b: Observation, unseen: Collection[str] = ()) -> Sameness:
    """Compare what decides the bits of two formats of one model on one hardware.

    Args:
        unseen: environment variables that change what a kernel computes and that no layer shows.
    """
    one, other = a.header, b.header
    if one.executed is None or other.executed is None:
        return Sameness(False, "it is not known which kernels ran")
    if kernels(one.executed) != kernels(other.executed):
        if one.executed.summary != other.executed.summary:
            return Sameness(False, f"{one.executed.summary} against {other.executed.summary}")
        return Sameness(False, f"both ran {one.executed.summary}, but not in the same layers")
    for name, mine, its in (*_ways(one, other), *((name, *_variable(name, one, other)) for name in unseen)):
        if mine != its:
            return Sameness(False, f"{name} {mine[:_LONGEST]} against {its[:_LONGEST]}")
    shared = f"{one.executed.summary} in both, {one.dtype or 'one dtype'}, {one.executed.mode}"
    if one.checkpoint_sha256 == other.checkpoint_sha256 and any(map(_asked, (one, other))) and _nothing_quantized(one.executed):
        return Sameness(True, f"the same numbers, one checkpoint, of which nothing was quantized; {shared}")
    mine, its = held(a), held(b)
    made = any(map(made_while_loading, (one, other)))
    copies = (one.checkpoint_sha256, one.checkpoint_files_sha256) == (other.checkpoint_sha256, other.checkpoint_files_sha256)
    if (mine and mine == its) or (copies and not made and not (mine and its)):
        return Sameness(True, f"the same numbers{f' ({short(mine)})' if mine else ', one checkpoint'}; {shared}", made)
    if not mine or not its:
        unknown = " and ".join(observation.header.format for observation in (a, b) if not held(observation))
        return Sameness(None, f"{shared}; it is not known which numbers {unknown} holds", made)
    if all(decoded(numbers) for numbers in (mine, its)):
        return Sameness(False, f"other numbers ({short(mine)} against {short(its)}); {shared}")
    why = f"it is not known whether {short(mine)} and {short(its)} are the same numbers"
    return Sameness(None, f"{shared}; {why}{', which the engine made while loading' if made else ''}", made)


def _ways(one: Header, other: Header) -> tuple[tuple[str, str, str], ...]:
    """By name, in which way two observations computed; both have layers."""
    assert one.executed is not None and other.executed is not None
    caches = ["; ".join(sorted(header.executed.kv_cache)) for header in (one, other) if header.executed is not None]
    if not all(caches):  # an older recording: by what was asked for
        caches = [str(header.engine_args.get("kv_cache_dtype", "auto")) for header in (one, other)]
    onednn = [str(header.environment.get("onednn_fp8", True)) for header in (one, other)]
    return (
        ("dtype", one.dtype, other.dtype),
        ("mode", one.executed.mode, other.executed.mode),
        ("attention", ", ".join(one.executed.attention), ", ".join(other.executed.attention)),
        ("KV cache", caches[0], caches[1]),
        ("FP8 outside oneDNN", onednn[0], onednn[1]),
    )


def _variable(name: str, one: Header, other: Header) -> tuple[str, str]:
    return one.engine_env.get(name, "not set"), other.engine_env.get(name, "not set")


def decoded(numbers: str) -> bool:
    """Whether a digest is over decoded numbers, so that another one means others."""
    return numbers.startswith("decoded:")


def same_kernels(a: Observation, b: Observation, family: Callable[[str], str]) -> bool:
    """Whether both ran kernels of the same `family` (by class name) in the same kinds of layers."""
    one, other = a.header.executed, b.header.executed
    return one is not None and other is not None and kernels(one, family) == kernels(other, family)


def kernels(executed: Executed, family: Callable[[str], str] = str) -> Counter[tuple[str, str, str, str, int]]:
    """What multiplies in which kind of layer, and how often; the layout's own class is left out, and so is LoRA's wrapper."""
    found: Counter[tuple[str, str, str, str, int]] = Counter()
    for layer in executed.layers:
        if layer.kind == "other":  # attention, where a layout has a class for an unquantized KV cache
            continue
        module = _WRAPPED.sub(r"\1", layer.module)
        found[layer.kind, module, family(layer.executed), layer.detail, executed.tensor_parallel_size] += layer.count
    return found


def short(numbers: str) -> str:
    """The beginning of a digest of numbers, for a message."""
    kind, _, digest = numbers.partition(":")
    return digest[:8] if kind == "decoded" else f"{kind} {digest[:8]}"


@cache
def _known() -> dict[str, str]:
    if not KNOWN.is_file():
        return {}
    table = parse_json(read_bounded(KNOWN, _MAX_BYTES))
    return {f"{row['tensors']} {row['files']}": row["numbers"] for row in table["checkpoints"]}
