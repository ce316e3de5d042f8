"""Cells of checkpoints that say themselves how they are quantized (`--model`, or `checkpoint` in the matrix).

A checkpoint's own configuration decides: one format is what vLLM picks by itself, one more is made for each kernel that this
version can be told to use for the layout on this hardware, and one is the unquantized twin where it is given. What the matrix
declares of its own format with the same layout, numbers and kernel (expected noise, settings) holds for the made one too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantdet.checkpoints import described
from quantdet.checkpoints.described import Described, Mistaken
from quantdet.matrix.expectations import Expect
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.models import Claims, Model
from quantdet.matrix.rows import Format
from quantdet.matrix.selectors import Setting, When
from quantdet.session import own_formats
from quantdet.session.own_formats import alike, like, speaks_of

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
    whole = {group: found for group, found in read.items() if len(found) == len(group)}
    names = dict(zip(whole, _names(list(whole.values())), strict=True))
    rows: dict[str, Model] = {}
    for group, name in names.items():
        if name in rows:
            reader.mistakes.append(f"{group[0]}: its cells would have the name of {rows[name].title}: {name}; rename one")
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
        formats = own_formats.Formats(self.matrix, self.asked.args, self.asked.hardware, self.asked.vllm)
        rows: dict[str, tuple[Format, Described]] = {}
        for one, label in zip(found, own_formats.labels(found) if len(found) > 1 else [""], strict=True):
            for format_id, row in formats.of(one, label):
                if (key := self._id(format_id, row)) in rows:
                    self.reader.mistakes.append(f"{name}: two checkpoints would be the format {key}; rename a folder")
                rows[key] = (row, one)
        if base is not None:
            format_id, row = formats.twin(base)
            key = self._id(format_id, row)
            rows[f"base-{key}" if key in rows else key] = (row, base)
        self._keep(name, model, rows)

    def _keep(self, name: str, model: Model, rows: Mapping[str, tuple[Format, Described]]) -> None:
        self.checkpoints |= {(name, format_id): one for format_id, (_, one) in rows.items()}
        for format_id, (row, _) in rows.items():
            known = self.formats.get(format_id)
            if format_id in self.matrix.formats and known is not None and like(known, row):
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
            likes = alike(self.matrix, row)
            when = {"model": name, "format": format_id}
            self.expect += [
                one.model_copy(update={"when": When(**when, hardware=one.when.hardware, phase=one.when.phase)})
                for one in self.matrix.expect
                if one.outcome in _COPIED and one.when.model == "*" and speaks_of(one.when, likes)
                if source.experts or one.fires is None or not one.fires.of_experts
            ]
            self.setting += [
                one.model_copy(update={"when": When(**when, hardware=one.when.hardware)})
                for one in self.matrix.setting
                if one.when.model == "*" and one.when.format != "*" and speaks_of(one.when, likes)
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
        return name if known is None or like(known, row) else f"{name}-own"


def _names(groups: Sequence[Sequence[Described]]) -> list[str]:
    """Ids of models: of the checkpoint, or of those that are compared."""
    if len(groups) == 1:
        return ["-vs-".join(own_formats.labels(groups[0]))[:60].strip("-._")]
    return own_formats.labels([one for (one,) in groups])
