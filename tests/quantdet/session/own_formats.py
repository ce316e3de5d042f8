"""Formats that are made of what checkpoints say of themselves: their names, and the kernels that they can be told to use."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantdet.checkpoints.described import Described
from quantdet.matrix.cell import matches_any
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.pins import holds
from quantdet.matrix.rows import Dtype, Format
from quantdet.matrix.selectors import When

# Arguments that choose kernels: with one of them there is nothing left to pin.
_CHOOSES = frozenset({"linear_backend", "linear_backend_per_quant", "moe_backend", "kernel_config"})
_SHORT: dict[Dtype, str] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_NAMES = {"half": "float16", "float": "float32"}  # vLLM's other words


@dataclass(frozen=True)
class Formats:
    """Makes formats for a run.

    Attributes:
        args: engine arguments of the command line.
        hardware: the rows of its cells (globs).
        vllm: the version whose kernels can be pinned; None: of any version.
    """

    matrix: Matrix
    args: Mapping[str, Any]
    hardware: tuple[str, ...]
    vllm: str | None

    def dtype(self, one: Described) -> Dtype:
        asked = self.args.get("dtype", "auto")
        found = one.dtype if asked in ("auto", None) else _NAMES.get(asked, asked)
        return next((dtype for dtype in _SHORT if dtype == found), "bfloat16")

    def _mode(self) -> dict[str, Any]:
        return {"mode": "eager" if self.args.get("enforce_eager", True) else "compiled"}

    def twin(self, base: Described) -> tuple[str, Format]:
        """The unquantized checkpoint beside the others, in the same mode as they."""
        row = plain(base, self.dtype(base), **self._mode())
        return described_id(base, self.dtype(base)), row

    def of(self, one: Described, label: str = "") -> Iterator[tuple[str, Format]]:
        """What vLLM picks for a checkpoint, then each kernel that it can be told to use.

        `label`: what it is called among several; without one its scheme is its name.
        """
        dtype, method = self.dtype(one), self.args.get("quantization")
        name = label or described_id(one, dtype)
        if not one.method:
            yield name, plain(one, dtype, **self._mode())
            if method is not None:
                title = f"{method}, quantized while loading"
                yield f"{name}-{word(str(method))}", plain(one, dtype, title=title, kernel="auto", **self._mode())
            return
        words: dict[str, Any] = {"layout": one.layout, "weights": one.weights, "activations": one.activations}
        if one.layout is None or one.weights is None:
            words = {"layout": "own", "weights": "own", "activations": "none"}
        words |= {"packages": tuple(self._plugins(one.method))}
        row = Format(title=f"{one.short}, vLLM's own choice", kernel="auto", dtype=dtype, **words, **self._mode())
        picks = next((self.matrix.formats[like].picks for like in alike(self.matrix, row)), {})
        yield name, row.model_copy(update={"picks": picks})
        if method is not None or _CHOOSES & set(self.args):
            return
        for kernel in self._kernels(row, one):
            pinned = row.model_copy(update={"kernel": kernel, "title": f"{one.short}, {kernel}"})
            yield f"{name}-{kernel}", pinned

    def _plugins(self, method: str) -> Iterator[str]:
        """Packages without which this vLLM does not know a method."""
        for versions, package in self.matrix.engine.plugins.get(method, {}).items():
            if self.vllm is not None and holds(versions, self.vllm):
                yield package

    def _kernels(self, row: Format, one: Described) -> Iterator[str]:
        """Kernels that can be pinned for a format in this version, on hardware of the run."""
        for name, kernel in self.matrix.kernels.items():
            rows = [pin for pin in self.matrix.pin if pin.kernel == name and not pin.unsupported]
            asked = row.model_copy(update={"kernel": name})
            if self.vllm is not None:
                found = self.matrix.pin_for(asked, self.vllm)
                fits = found is not None and not found.unsupported
            else:
                fits = any(asked.layout in pin.layout and (not pin.weights or asked.weights in pin.weights) for pin in rows)
            if fits and bool(kernel.moe_classes) == one.experts and self._is_here(kernel.hardware):
                yield name

    def _is_here(self, globs: Iterable[str]) -> bool:
        wanted = self.hardware
        names = self.matrix.hardware if wanted == ("*",) else wanted
        return any(matches_any(name, tuple(globs)) for name in names)


def plain(one: Described, dtype: Dtype, *, title: str = "", kernel: str = "unquantized", **more: Any) -> Format:
    return Format(
        title=title or f"{one.short}, unquantized", layout="plain", weights="bf16", kernel=kernel, dtype=dtype, **more
    )  # fmt: skip


def described_id(one: Described, dtype: Dtype) -> str:
    """A format's id: `gptq-int4-g128`, and the dtype where it is not bfloat16."""
    if not one.method:
        return _SHORT[dtype]
    return one.short if dtype == "bfloat16" else f"{one.short}-{_SHORT[dtype]}"


def word(text: str) -> str:
    """Any text as a part of an id."""
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in text.lower())[:32].strip("-") or "own"


def alike(matrix: Matrix, row: Format) -> list[str]:
    """The first format of the matrix with the same layout, numbers, kernel and mode, in the same engine, if there is one.

    Others that are alike differ in what a setting of theirs says, such as Marlin with atomics.
    """
    return [] if row.layout == "own" else [name for name, other in matrix.formats.items() if like(other, row)][:1]


def like(one: Format, other: Format) -> bool:
    keys = ("engine", "layout", "weights", "activations", "kernel", "mode", "quantizes")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def speaks_of(when: When, formats: Iterable[str]) -> bool:
    return any(matches_any(name, when.format) for name in formats)


def labels(found: Sequence[Described]) -> list[str]:
    """Names for checkpoints that stand beside each other: their ids; of equal ones with their revision, or their folder.

    Two of them may still be equal, which has to be told.
    """
    count = Counter(one.id for one in found)
    return [one.id if count[one.id] == 1 else _apart(one) for one in found]


def _apart(one: Described) -> str:
    revision = one.source.partition("@")[2] if one.source.startswith("hub ") else ""
    return f"{one.id}-{revision[:7]}" if revision else f"{word(one.path.absolute().parent.name)}-{one.id}"
