"""How two checkpoints of one base differ, module by module: integers, scales, zero points, activations, and the rest."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quantdet.checkpoints import numbers
from quantdet.checkpoints.decoding import Decoder, NotDecoded, decoder, unpacked
from quantdet.checkpoints.pool import in_order
from quantdet.checkpoints.tensors import Array, load_folder
from quantdet.untrusted import parse_json, plain, read_bounded

_MOST_NAMED = 3
# What `Decoder.module` yields beside codes and scales, and how a message calls it.
_OTHERS = {
    "zero points": "zero points", "activations": "activations' schemes", "group of each input": "inputs' groups",
    "input scale": "activations' scales", "input_global_scale": "activations' scales",
    "weight_global_scale": "tensors' scales", "bias": "biases",
}  # fmt: skip
_CODES, _SCALES = ("codes", "weight_packed", "weight"), ("scales", "weight_scale")


@dataclass(frozen=True)
class ModuleDifference:
    """One module that both have quantized. `kind`: they cannot be compared code by code, and why; "": they can.

    `codes`, `scales`: how many there are, None: not compared; `largest_step`: between two integers, None: not of integers, or
    none differ; `largest_relative`: |a - b| / max(|a|, |b|) of two scales, 0 to 1. `others`: what else differs, in words.
    """

    name: str
    kind: str = ""
    codes: int | None = None
    codes_apart: int | None = None
    largest_step: int | None = None
    scales: int | None = None
    scales_apart: int | None = None
    largest_relative: float | None = None
    others: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        return not (self.kind or self.codes_apart or self.scales_apart or self.others)


@dataclass(frozen=True)
class Difference:
    """Two checkpoints, `a` and `b`. `not_decoded`: why they cannot be compared, and which of them; "": they can.

    `modules`: those that both have quantized. `only_a`, `only_b`: modules that one alone has quantized. `plain`: how many
    other tensors both have, None: not compared; `plain_apart`, `plain_only_a`, `plain_only_b`: their names. `cache`: the KV
    cache's scheme differs.
    """

    not_decoded: str = ""
    modules: tuple[ModuleDifference, ...] = field(default=(), repr=False)
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    plain: int | None = None
    plain_apart: tuple[str, ...] = ()
    plain_only_a: tuple[str, ...] = ()
    plain_only_b: tuple[str, ...] = ()
    cache: bool = False

    @property
    def same(self) -> bool:
        """Whether both hold the same numbers; False where that is not known."""
        parts = (self.only_a, self.only_b, self.plain_apart, self.plain_only_a, self.plain_only_b)
        return not (self.not_decoded or any(parts) or self.cache) and all(one.same for one in self.modules)

    def __str__(self) -> str:
        if self.not_decoded:
            return f"not compared: {self.not_decoded}"
        if self.same:
            return f"the same numbers in {len(self.modules)} quantized modules and {self.plain} other tensors"
        return "; ".join((*self._words(), "the rest is equal"))

    def _words(self) -> Iterator[str]:
        total = len(self.modules)
        if kinds := [one for one in self.modules if one.kind]:
            yield f"other numerics in {len(kinds)} of {total} modules ({kinds[0].kind})"
        if apart := [one for one in self.modules if one.codes_apart]:
            differ, of = (sum(getattr(one, name) or 0 for one in self.modules) for name in ("codes_apart", "codes"))
            steps = [one.largest_step for one in apart if one.largest_step is not None]
            what = "integers" if steps else "codes"
            most = f", at most by {max(steps)}" if steps else ""
            yield f"other {what}: {100 * differ / of:.3g} % of {_count(of)} in {len(apart)} of {total} modules differ{most}"
        if apart := [one for one in self.modules if one.scales_apart]:
            differ, of = (sum(getattr(one, name) or 0 for one in self.modules) for name in ("scales_apart", "scales"))
            most = f"by {max(one.largest_relative or 0 for one in apart):.3g} of the larger one at most"
            yield f"scales differ in {len(apart)} of {total} ({100 * differ / of:.3g} % of {_count(of)}, {most})"
        for what in sorted({other for one in self.modules for other in one.others}):
            yield f"{what} differ in {sum(what in one.others for one in self.modules)} of {total}"
        if self.cache:
            yield "the KV cache is quantized differently"
        for names, words in (
            (self.only_a, "quantized in the first only"), (self.only_b, "quantized in the second only"),
            (self.plain_apart, "unquantized tensors that differ"), (self.plain_only_a, "unquantized tensors of the first only"),
            (self.plain_only_b, "unquantized tensors of the second only"),
        ):  # fmt: skip
            if names:
                yield f"{words}: {_some(names)}"


def difference(a: Path, b: Path) -> Difference:
    """Compare two checkpoints of one base by their decoded numbers, whatever their layouts; some modules at a time.

    Raises:
        OSError, ValueError: one of them cannot be read.
    """
    sides = []
    for which, path in (("the first", a), ("the second", b)):
        try:
            if path.is_file():
                raise NotDecoded("GGUF")
            decode = decoder(numbers.settings(path))
            sides.append((decode, *decode.split(load_folder(path))))
        except NotDecoded as error:
            return Difference(not_decoded=plain(f"{which} is not decoded: {error}")[:300])
    (decode_a, modules_a, rest_a), (decode_b, modules_b, rest_b) = sides
    both = sorted(modules_a.keys() & modules_b.keys())
    jobs = [partial(_module, name, (decode_a, modules_a[name]), (decode_b, modules_b[name])) for name in both]
    try:
        with closing(in_order(iter(jobs))) as results:
            modules = tuple(results)
    except NotDecoded as error:
        return Difference(not_decoded=plain(str(error))[:300])
    shared = sorted(rest_a.keys() & rest_b.keys())
    with closing(in_order(partial(_apart, rest_a[name], rest_b[name]) for name in shared)) as results:
        apart = tuple(name for name, differs in zip(shared, results, strict=True) if differs)
    own_a, own_b = modules_a.keys() - modules_b.keys(), modules_b.keys() - modules_a.keys()
    return Difference(
        modules=modules,
        only_a=tuple(sorted(own_a)),
        only_b=tuple(sorted(own_b)),
        plain=len(shared),
        plain_apart=apart,
        # A weight that is quantized in the other one is told above.
        plain_only_a=tuple(sorted(name for name in rest_a.keys() - rest_b.keys() if name.rpartition(".")[0] not in own_b)),
        plain_only_b=tuple(sorted(name for name in rest_b.keys() - rest_a.keys() if name.rpartition(".")[0] not in own_a)),
        cache=decode_a.whole != decode_b.whole,
    )


_Side = tuple[Decoder, Mapping[str, Array]]


def _module(name: str, a: _Side, b: _Side) -> ModuleDifference:
    decoded = []
    for which, (decode, tensors) in (("the first", a), ("the second", b)):
        try:
            decoded.append(dict(decode.module(name, tensors)))
        except NotDecoded as error:
            raise NotDecoded(f"{which} is not decoded: {error}") from None
    one, other = decoded
    others = tuple(sorted({words for part, words in _OTHERS.items() if not _equal(one.get(part), other.get(part))}))
    kind = _other_kind(one, other)
    if kind:
        return ModuleDifference(name, kind=kind, others=others)
    codes, apart, step = 0, 0, None
    for part in _CODES:
        if part in one:
            codes, apart, step = _codes(one, np.asarray(one[part]), np.asarray(other[part]))
    scales, scales_apart, largest = 0, 0, 0.0
    for part in _SCALES:
        if part in one:
            scales, scales_apart, largest = _scales(np.asarray(one[part]), np.asarray(other[part]))
    return ModuleDifference(name, "", codes, apart, step, scales, scales_apart, largest, others)


def _other_kind(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Why two modules cannot be compared code by code."""
    for part in ("integers", "floats", "format"):
        if one.get(part) != other.get(part):
            return f"{_kind(one)} against {_kind(other)}"
    for part in (*_CODES, *_SCALES):
        left, right = one.get(part), other.get(part)
        shapes = [None if side is None else list(np.shape(side)) for side in (left, right)]
        if shapes[0] != shapes[1]:
            return f"{part} {shapes[0]} against {shapes[1]}"
    return ""


def _kind(parts: Mapping[str, Any]) -> str:
    return str(parts.get("integers") or parts.get("floats") or parts.get("format") or "unknown")


def _codes(parts: Mapping[str, Any], a: Array, b: Array) -> tuple[int, int, int | None]:
    """How many codes there are, how many differ, and the largest step between two integers."""
    if "integers" not in parts:  # codes of narrow floats; two of FP4 in a byte
        halves = str(parts.get("format", "")).startswith(("nvfp4", "mxfp4"))
        x, y = a.view(np.uint8), b.view(np.uint8)
        if halves:
            differ = x ^ y
            return 2 * x.size, int(np.count_nonzero(differ & 15) + np.count_nonzero(differ >> 4)), None
        return x.size, int(np.count_nonzero(x != y)), None
    bits = int(str(parts["integers"]).partition(" ")[0])
    count = a.size * 32 // bits
    rows = np.flatnonzero((a != b).any(axis=1))
    apart, step = 0, 0
    for start in range(0, len(rows), 256):  # rows that differ, some at a time
        chosen = rows[start : start + 256]
        steps = np.abs(unpacked(a[chosen], bits).astype(np.int16) - unpacked(b[chosen], bits).astype(np.int16))
        apart += int(np.count_nonzero(steps))
        step = max(step, int(steps.max()))
    return count, apart, step if apart else None


def _scales(a: Array, b: Array) -> tuple[int, int, float]:
    if a.dtype == np.uint8 and b.dtype == np.uint8:  # E8M0: powers of two
        x, y = np.exp2(a.astype(np.float64) - 127), np.exp2(b.astype(np.float64) - 127)
    else:
        x, y = a.astype(np.float64), b.astype(np.float64)
    differ = x != y
    if not differ.any():
        return a.size, 0, 0.0
    larger = np.maximum(np.abs(x[differ]), np.abs(y[differ]))
    return a.size, int(np.count_nonzero(differ)), float(np.max(np.abs(x[differ] - y[differ]) / larger))


def _equal(a: Array | str | None, b: Array | str | None) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return a is b is None or (isinstance(a, str) and isinstance(b, str) and a == b)


def _apart(a: Array, b: Array) -> bool:
    """Whether two tensors are not the same numbers: the digest of each is what counts as its numbers."""
    return numbers.plain_digest(a) != numbers.plain_digest(b)


def _count(number: int) -> str:
    for size, word in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return str(number)


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return plain(", ".join(name[:120] for name in names[:_MOST_NAMED]) + more)


# How a checkpoint is quantized, and who wrote it with what: none of it is the model's.
_NOT_THE_MODELS = {"quantization_config", "compression_config", "_name_or_path", "transformers_version", "torch_dtype", "dtype"}


def configured_apart(a: Path, b: Path) -> list[str]:
    """Keys of `config.json` that differ, but for quantization and dtype; of files that are no folders, none.

    Raises:
        OSError, ValueError: one cannot be read.
    """
    if a.is_file() or b.is_file():
        return []
    found: list[dict[str, Any]] = []
    for path in (a, b):
        read = parse_json(read_bounded(path / "config.json", 16 << 20))
        told = read.items() if isinstance(read, dict) else ()
        found.append({key: value for key, value in told if key not in _NOT_THE_MODELS})
    return sorted(plain(key) for key in found[0].keys() | found[1].keys() if found[0].get(key) != found[1].get(key))
