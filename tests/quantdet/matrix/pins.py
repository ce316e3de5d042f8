"""How vLLM versions are told to use a kernel, and what they use when told nothing: rows of the matrix, looked up by version."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Annotated, Any, Literal

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import Field, model_validator

from quantdet.matrix.kernels import PACKED, Shape
from quantdet.matrix.kernels import holds as holds
from quantdet.matrix.rows import Args, Format, Layout, Picks, Weights
from quantdet.matrix.shapes import Layers
from quantdet.matrix.values import Environment, Row, Specifier

# Where a cell's quantized numbers come from: a checkpoint, or the engine itself, out of plain weights.
Source = Literal["any", "checkpoint", "online"]


class Pin(Row):
    """How vLLM versions are told to use `kernel` for a layout: engine arguments and environment.

    In texts, `$group_size` stands for the model's. `unsupported`: why these versions cannot; then there is nothing to give.
    `k_not_multiple_of`: only for models with a layer outside the experts whose K (inputs) is no multiple of this; of two rows
    that fit, the one that says so counts.
    """

    kernel: str
    layout: tuple[Layout, ...] = Field(min_length=1)
    weights: tuple[Weights, ...] = ()
    source: Source = "any"
    vllm: Specifier = ""
    args: Args = Field(default_factory=dict)
    env: Environment = Field(default_factory=dict)
    unsupported: str = ""
    k_not_multiple_of: Annotated[int, Field(gt=1)] | None = None

    @model_validator(mode="after")
    def _one_answer(self) -> "Pin":
        if self.unsupported and (self.args or self.env):
            raise ValueError("'unsupported' says that there is no way: it has neither 'args' nor 'env'")
        return self

    def fits(self, format_: Format, version: str, source: Source, layers: Layers | None = None) -> bool:
        """Whether the row is about this format, in this vLLM version, of a model with these layers (None: not known)."""
        return (
            self.kernel == format_.kernel
            and format_.layout in self.layout
            and (not self.weights or format_.weights in self.weights)
            and self.source in ("any", source)
            and holds(self.vllm, version)
            and (self.k_not_multiple_of is None or self._odd(layers or (), self.k_not_multiple_of))
        )

    @staticmethod
    def _odd(layers: Layers, multiple: int) -> bool:
        return any(layer.k % multiple and not layer.experts for layer in layers)

    def result(self) -> tuple[Args, dict[str, str], str]:
        """What the row answers."""
        return self.args, self.env, self.unsupported


def filled(args: Mapping[str, Any], group_size: int) -> dict[str, Any]:
    """`args` with the model's group size in the place of `$group_size`."""

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(inner) for key, inner in value.items()}
        return value.replace("$group_size", str(group_size)) if isinstance(value, str) else value

    return {key: fill(value) for key, value in args.items()}


# What the weights of a format are stored in: its picks speak of such layers.
_STORED_IN = {
    "int4-sym": PACKED, "int4-asym": PACKED, "int8-sym": PACKED, "int8-asym": PACKED, "int8-channel": "I8",
    "fp8-tensor": "F8_E4M3", "fp8-channel": "F8_E4M3", "fp8-block": "F8_E4M3", "nvfp4": "U8", "mxfp4": "U8", "mxfp8": "F8_E4M3",
}  # fmt: skip


def picked(format_: Format, hardware_id: str, version: str | None) -> tuple[tuple[str, ...], ...]:
    """The kernels of which an `auto` format has to be given one on this hardware, in vLLM's order; none: not judged.

    One list for the version; without one, that of every range of versions.
    """
    pick = next((pick for glob, pick in format_.picks.items() if fnmatchcase(hardware_id, glob)), None)
    if pick is None or isinstance(pick, str):
        return () if pick is None else ((pick,),)
    named = [kernels for spec, kernels in pick.items() if version is None or holds(spec, version)]
    return tuple((kernels,) if isinstance(kernels, str) else kernels for kernels in named)


def speaks_of(format_: Format, shape: Shape | None) -> bool:
    """Whether a format's picks are about a layer: one whose weights are stored as the format's are, as far as is known."""
    stored = _STORED_IN.get(format_.weights, "")
    return shape is None or not stored or shape.dtype in ("", stored)


def probes(specifiers: Iterable[str]) -> list[str]:
    """Versions among which two ranges have one in common if they have any: 0, each bound, and just above each."""
    bounds = {Version("0")}
    for part in (part for text in specifiers for part in SpecifierSet(text)):
        with suppress(InvalidVersion):  # '===' takes any text
            bounds.add(Version(part.version.removesuffix(".*")))
    return [text for bound in sorted(bounds) for text in (str(bound), f"{bound.base_version}.0.0.1")]


def conflicts(pins: tuple[Pin, ...]) -> Iterator[str]:
    """Two rows about the same kernel, layout, weights and version that answer differently: mistakes of the matrix."""
    versions = probes(pin.vllm for pin in pins)
    for (i, one), (j, other) in combinations(enumerate(pins), 2):
        if (
            one.kernel != other.kernel
            or not set(one.layout) & set(other.layout)
            or (one.weights and other.weights and not set(one.weights) & set(other.weights))
            or ("any" not in (one.source, other.source) and one.source != other.source)
            or one.result() == other.result()
            or (one.k_not_multiple_of is None) != (other.k_not_multiple_of is None)
        ):
            continue
        both = [version for version in versions if holds(one.vllm, version) and holds(other.vllm, version)]
        if both:
            yield f"pin.{j}: differs from pin.{i} about the same kernel, layout and weights in vLLM {both[-1]}"


def pick_conflicts(tables: Mapping[str, Picks]) -> Iterator[str]:
    """Version ranges of one pick that overlap: mistakes of the matrix. `tables`: picks by their TOML path."""
    for path, picks in tables.items():
        for glob, pick in picks.items():
            for one, other in combinations([] if isinstance(pick, str) else pick, 2):
                both = [v for v in probes([one, other]) if holds(one, v) and holds(other, v)]
                if both:
                    yield f"{path}.{glob}: {one!r} and {other!r} both hold for vLLM {both[-1]}"
