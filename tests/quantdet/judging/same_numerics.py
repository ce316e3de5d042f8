"""Are two formats the same numerics: the same numbers, on the same executed kernels, in the same way? Derived, not declared.

Where they are, their logits have to be equal bit for bit; where they are not, the logits have to differ.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from quantdet.observations.header import Executed
from quantdet.observations.observation import Observation
from quantdet.untrusted import parse_json, read_bounded

# Numbers of checkpoints that were recorded before observations told them, by the SHA-256 of their tensors and of their other
# files. Made by `python -m quantdet.checkpoints.known_numbers`.
KNOWN = Path(__file__).resolve().parents[3] / "fixtures" / "numbers.json"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Sameness:
    """Whether two formats are the same numerics, and why.

    same: True, False, or None where it is not known which numbers one of them holds and all else is the same.
    why: what they share or differ in, for a message.
    """

    same: bool | None
    why: str


def numbers(observation: Observation) -> str:
    """Which numbers the checkpoint of an observation holds (`checkpoints.numbers`); empty: not known.

    What this suite knows of a checkpoint by its hashes comes before what a recording says of it.
    """
    header = observation.header
    return _known().get(f"{header.checkpoint_sha256} {header.checkpoint_files_sha256}") or header.numbers


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
    ways = (
        ("dtype", one.dtype, other.dtype),
        ("mode", one.executed.mode, other.executed.mode),
        ("attention", ", ".join(one.executed.attention), ", ".join(other.executed.attention)),
        ("KV cache", *(str(header.engine_args.get("kv_cache_dtype", "auto")) for header in (one, other))),
        ("FP8 outside oneDNN", *(str(header.environment.get("onednn_fp8", True)) for header in (one, other))),
        *((name, *(header.engine_env.get(name, "not set") for header in (one, other))) for name in unseen),
    )
    for name, mine, its in ways:
        if mine != its:
            return Sameness(False, f"{name} {mine} against {its}")
    shared = f"{one.executed.summary} in both, {one.dtype or 'one dtype'}, {one.executed.mode}"
    mine, its = numbers(a), numbers(b)
    copies = (one.checkpoint_sha256, one.checkpoint_files_sha256) == (other.checkpoint_sha256, other.checkpoint_files_sha256)
    if (mine and mine == its) or (copies and not (mine and its)):
        return Sameness(True, f"the same numbers{f' ({short(mine)})' if mine else ', one checkpoint'}; {shared}")
    if not mine or not its:
        unknown = " and ".join(observation.header.format for observation in (a, b) if not numbers(observation))
        return Sameness(None, f"{shared}; it is not known which numbers {unknown} holds")
    return Sameness(False, f"other numbers ({short(mine)} against {short(its)}); {shared}")


def same_kernels(a: Observation, b: Observation, family: Callable[[str], str]) -> bool:
    """Whether both ran kernels of the same `family` (by class name) in the same kinds of layers."""
    one, other = a.header.executed, b.header.executed
    return one is not None and other is not None and kernels(one, family) == kernels(other, family)


def kernels(executed: Executed, family: Callable[[str], str] = str) -> Counter[tuple[str, str, str, str, int]]:
    """What multiplies in which kind of layer, and how often; the layout's own class is left out."""
    found: Counter[tuple[str, str, str, str, int]] = Counter()
    for layer in executed.layers:
        if layer.kind == "other":  # attention, where a layout has a class for an unquantized KV cache
            continue
        found[layer.kind, layer.module, family(layer.executed), layer.detail, executed.tensor_parallel_size] += layer.count
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
