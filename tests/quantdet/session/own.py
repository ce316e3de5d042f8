"""Cells of checkpoints that say themselves how they are quantized (`--model`, or `checkpoint` in the matrix).

A checkpoint's own configuration decides: one format is what vLLM picks by itself, one more is made for each kernel that this
version can be told to use for the layout on this hardware, and one is the unquantized twin where it is given. What the matrix
declares of its own format with the same layout, numbers and kernel (expected noise, settings) holds for the made one too.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantdet.checkpoints import described
from quantdet.checkpoints.described import Described, Mistaken
from quantdet.matrix.cell import matches_any
from quantdet.matrix.expectations import Expect
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.models import Claims, Model
from quantdet.matrix.pins import holds
from quantdet.matrix.rows import Dtype, Format
from quantdet.matrix.selectors import Setting, When

# Arguments that choose kernels: with one of them there is nothing left to pin.
_CHOOSES = frozenset({"linear_backend", "linear_backend_per_quant", "moe_backend", "kernel_config"})
_SHORT: dict[Dtype, str] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_NAMES = {"half": "float16", "float": "float32"}  # vLLM's other words
_COPIED = ("noisy", "may_be_noisy", "may_recompile", "may_drift")
_REASON = "--engine-arg"


@dataclass(frozen=True)
class Asked:
    """What a command line asks for: checkpoints, their unquantized twin, and engine arguments.

    same_base: the checkpoints are of one base, and are compared with each other. hardware: the rows of their cells. vllm: the
    version whose kernels can be pinned; None: of any version.
    """

    models: tuple[str, ...] = ()
    base: str | None = None
    same_base: bool = False
    args: Mapping[str, Any] = field(default_factory=dict)
    hardware: tuple[str, ...] = ("*",)
    vllm: str | None = None


@dataclass(frozen=True)
class Made:
    """The matrix with the formats of its checkpoints, and these as they describe themselves, by model and format."""

    matrix: Matrix
    checkpoints: Mapping[tuple[str, str], Described]

    def of(self, model_id: str) -> list[Described]:
        """The checkpoints of a model."""
        return [one for (model, _), one in self.checkpoints.items() if model == model_id]


@dataclass
class Reader:
    """Reads each checkpoint once. `mistakes`: of those that cannot be read."""

    relative_to: Path
    allow_download: bool
    mistakes: list[str] = field(default_factory=list)
    _known: dict[str, Described | None] = field(default_factory=dict)

    def read(self, spec: str) -> Described | None:
        """What a checkpoint says of itself; None: nothing that can be used."""
        if spec not in self._known:
            try:
                self._known[spec] = described.read(spec, self.relative_to, allow_download=self.allow_download)
            except Mistaken as error:
                self._known[spec] = None
                self.mistakes += error.mistakes
        return self._known[spec]


def alone(matrix: Matrix, asked: Asked, reader: Reader) -> Matrix:
    """`matrix` with the models of a command line in place of its own, and without questions, which are about those."""
    specs = tuple(dict.fromkeys(asked.models))
    groups = [specs] if asked.same_base else [(one,) for one in specs]
    read = {group: [one for spec in group if (one := reader.read(spec)) is not None] for group in groups}
    names = Counter(_name(found) for found in read.values())
    rows: dict[str, Model] = {}
    for group, found in read.items():
        if len(found) < len(group):
            continue
        name = _name(found, apart=names[_name(found)] > 1)
        if name in rows:
            reader.mistakes.append(
                f"{group[0]}: its cells would have the name of {rows[name].title}: {name}; rename one of them"
            )
            continue
        row: dict[str, Any] = {"title": ", ".join(group), "checkpoint": group, "base": asked.base, "hidden_states": True}
        rows[name] = Model(**row, hardware=asked.hardware)
    if asked.base is not None:
        reader.read(asked.base)
    return matrix.model_copy(update={"models": rows, "questions": {}})


def expanded(matrix: Matrix, asked: Asked, reader: Reader) -> Made:
    """`matrix` with formats for every model that has a `checkpoint`.

    Raises:
        Mistaken: of every checkpoint.
    """
    work = _Work(matrix, asked, reader)
    for name, model in matrix.models.items():
        if model.checkpoint is not None:
            work.add(name, model)
    if reader.mistakes:
        raise Mistaken(reader.mistakes)
    update = {"models": work.models, "formats": work.formats, "setting": tuple(work.setting)}
    update |= {"expect": (*work.expect, *matrix.expect)}
    return Made(matrix.model_copy(update=update), work.checkpoints)


class _Work:
    """Models one after the other; mistakes are collected."""

    def __init__(self, matrix: Matrix, asked: Asked, reader: Reader) -> None:
        self.matrix, self.asked, self.reader = matrix, asked, reader
        self.models, self.formats = dict(matrix.models), dict(matrix.formats)
        self.expect: list[Expect] = []
        self.setting = list(matrix.setting)
        self.checkpoints: dict[tuple[str, str], Described] = {}

    def add(self, name: str, model: Model) -> None:
        """The formats of one model."""
        specs = model.checkpoint or ()
        found = [one for spec in specs if (one := self.reader.read(spec)) is not None]
        base = None if model.base is None else self.reader.read(model.base)
        if base is not None and base.method:
            self.reader.mistakes.append(f"base {model.base}: needs unquantized weights, have {base.method}")
        if len(found) < len(specs) or (model.base is not None and base is None):
            return
        several = len(found) > 1
        rows: dict[str, tuple[Format, Described]] = {}
        for one in found:
            made = self._formats(one, f"{one.id}-" if several else "")
            rows |= {self._id(format_id, row): (row, one) for format_id, row in made}
        if base is not None:
            row = _plain(base, self._dtype(base))
            rows.setdefault(self._id(_described(base, row.dtype_on("cpu")), row), (row, base))
        self._keep(name, model, rows)

    def _keep(self, name: str, model: Model, rows: Mapping[str, tuple[Format, Described]]) -> None:
        self.checkpoints |= {(name, format_id): one for format_id, (_, one) in rows.items()}
        for format_id, (row, _) in rows.items():
            known = self.formats.get(format_id)
            if format_id in self.matrix.formats and known is not None and _like(known, row):
                continue  # the matrix's own word for the same, such as bf16
            models = (*known.models, name) if known is not None and format_id not in self.matrix.formats else (name,)
            self.formats[format_id] = row.model_copy(update={"models": models})
        groups = [one.group_size for _, one in rows.values() if one.group_size in (32, 64, 128)]
        more = {
            "formats": tuple(rows),
            "checkpoints": {format_id: str(one.path) for format_id, (_, one) in rows.items()},
            "memory_gib": 2 + 1.25 * max(one.size_bytes for _, one in rows.values()) / 2**30,
            "group_size": groups[0] if groups else model.group_size,
            "claims": model.claims or Claims(workload=name),
        }
        self.models[name] = model.model_copy(update=more)
        for format_id, (row, source) in rows.items():
            alike = _alike(self.matrix, row)
            when = {"model": name, "format": format_id}
            self.expect += [
                one.model_copy(update={"when": When(**when, hardware=one.when.hardware, phase=one.when.phase)})
                for one in self.matrix.expect
                if one.outcome in _COPIED and one.when.model == "*" and _speaks_of(one.when, alike)
                if source.experts or one.fires is None or not one.fires.of_experts
            ]
            self.setting += [
                one.model_copy(update={"when": When(**when, hardware=one.when.hardware)})
                for one in self.matrix.setting
                if one.when.model == "*" and one.when.format != "*" and _speaks_of(one.when, alike)
            ]
        self.setting += self._settings(name, rows)

    def _settings(self, name: str, rows: Mapping[str, tuple[Format, Described]]) -> Iterator[Setting]:
        """The engine arguments of the command line, which come last, so that they count."""
        args = {key: value for key, value in self.asked.args.items() if key not in ("dtype", "enforce_eager")}
        method = args.pop("quantization", None)
        if args:
            yield Setting(when=When(model=name), reason=_REASON, args=args)
        for format_id, (_, one) in rows.items():
            if one.settings_file in self.matrix.engine.told and method is None:
                when = When(model=name, format=format_id)
                yield Setting(when=when, reason=f"vLLM is told of {one.settings_file}", args={"quantization": one.method})
        quantized = [format_id for format_id, (row, _) in rows.items() if row.kernel != "unquantized"]
        if method is not None and quantized:
            yield Setting(when=When(model=name, format=tuple(quantized)), reason=_REASON, args={"quantization": method})

    def _id(self, name: str, row: Format) -> str:
        """`name`, unless it is the matrix's own word for something else, of which its rows say what is not so of this."""
        known = self.matrix.formats.get(name)
        return name if known is None or _like(known, row) else f"{name}-own"

    def _dtype(self, one: Described) -> Dtype:
        asked = self.asked.args.get("dtype", "auto")
        found = one.dtype if asked in ("auto", None) else _NAMES.get(asked, asked)
        return next((dtype for dtype in _SHORT if dtype == found), "bfloat16")

    def _mode(self) -> dict[str, Any]:
        return {"mode": "eager" if self.asked.args.get("enforce_eager", True) else "compiled"}

    def _formats(self, one: Described, prefix: str) -> Iterator[tuple[str, Format]]:
        """What vLLM picks for a checkpoint, then each kernel that it can be told to use."""
        dtype, method = self._dtype(one), self.asked.args.get("quantization")
        name = prefix + _described(one, dtype)
        if not one.method:
            yield name, _plain(one, dtype, **self._mode())
            if method is not None:
                title = f"{method}, quantized while loading"
                yield f"{name}-{_word(str(method))}", _plain(one, dtype, title=title, kernel="auto", **self._mode())
            return
        words: dict[str, Any] = {"layout": one.layout, "weights": one.weights, "activations": one.activations}
        if one.layout is None or one.weights is None:
            words = {"layout": "own", "weights": "own", "activations": "none"}
        words |= {"packages": tuple(self._plugins(one.method))}
        row = Format(title=f"{one.short}, vLLM's own choice", kernel="auto", dtype=dtype, **words, **self._mode())
        picks = next((self.matrix.formats[like].picks for like in _alike(self.matrix, row)), {})
        yield name, row.model_copy(update={"picks": picks})
        if method is not None or _CHOOSES & set(self.asked.args):
            return
        for kernel in self._kernels(row, one):
            pinned = row.model_copy(update={"kernel": kernel, "title": f"{one.short}, {kernel}"})
            yield f"{name}-{kernel}", pinned

    def _plugins(self, method: str) -> Iterator[str]:
        """Packages without which this vLLM does not know a method."""
        for versions, package in self.matrix.engine.plugins.get(method, {}).items():
            if self.asked.vllm is not None and holds(versions, self.asked.vllm):
                yield package

    def _kernels(self, row: Format, one: Described) -> Iterator[str]:
        """Kernels that can be pinned for a format in this version, on hardware of the run."""
        for name, kernel in self.matrix.kernels.items():
            rows = [pin for pin in self.matrix.pin if pin.kernel == name and not pin.unsupported]
            asked = row.model_copy(update={"kernel": name})
            if self.asked.vllm is not None:
                found = self.matrix.pin_for(asked, self.asked.vllm)
                fits = found is not None and not found.unsupported
            else:
                fits = any(asked.layout in pin.layout and (not pin.weights or asked.weights in pin.weights) for pin in rows)
            if fits and bool(kernel.moe_classes) == one.experts and self._is_here(kernel.hardware):
                yield name

    def _is_here(self, globs: Iterable[str]) -> bool:
        wanted = self.asked.hardware
        names = self.matrix.hardware if wanted == ("*",) else wanted
        return any(matches_any(name, tuple(globs)) for name in names)


def _name(found: Sequence[Described], *, apart: bool = False) -> str:
    """The id of a model. `apart`: with the folders that its checkpoints lie in, where another one has the same name."""
    folders = [f"{_word(one.path.absolute().parent.name)}-" if apart else "" for one in found]
    names = [f"{folder}{one.id}" for folder, one in zip(folders, found, strict=True)]
    return "-vs-".join(dict.fromkeys(names))[:60].strip("-._")


def _plain(one: Described, dtype: Dtype, *, title: str = "", kernel: str = "unquantized", **more: Any) -> Format:
    return Format(
        title=title or f"{one.short}, unquantized", layout="plain", weights="bf16", kernel=kernel, dtype=dtype, **more
    )  # fmt: skip


def _described(one: Described, dtype: Dtype) -> str:
    """A format's id: `gptq-int4-g128`, and the dtype where it is not bfloat16."""
    if not one.method:
        return _SHORT[dtype]
    return one.short if dtype == "bfloat16" else f"{one.short}-{_SHORT[dtype]}"


def _word(text: str) -> str:
    """Any text as a part of an id."""
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in text.lower()).strip("-")[:24] or "own"


def _alike(matrix: Matrix, row: Format) -> list[str]:
    """The first format of the matrix with the same layout, numbers, kernel and mode, in the same engine, if there is one.

    Others that are alike differ in what a setting of theirs says, such as Marlin with atomics.
    """
    return [] if row.layout == "own" else [name for name, other in matrix.formats.items() if _like(other, row)][:1]


def _like(one: Format, other: Format) -> bool:
    keys = ("engine", "layout", "weights", "activations", "kernel", "mode", "quantizes")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def _speaks_of(when: When, formats: Iterable[str]) -> bool:
    return any(matches_any(name, when.format) for name in formats)
