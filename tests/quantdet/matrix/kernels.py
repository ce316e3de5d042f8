"""Kernel families, and which layers each takes: of several that vLLM may pick, the first that does."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import Field

from quantdet.matrix.shapes import PositiveInt
from quantdet.matrix.values import Row, Specifier

PACKED = "I32"  # the dtype of integers that are packed in words of 32 bits

# A number, or one for each range of vLLM versions.
ByVersion = PositiveInt | dict[Specifier, PositiveInt]


class Kernel(Row):
    """A kernel family: the class names vLLM shows for it and the hardware it can exist on (globs).

    `weight_only`: it multiplies activations in the model's dtype, whatever the checkpoint asks for.
    `moe_classes`: those of the layers of experts, in a family that says how these are multiplied. `package`: the distribution
    that it is in, where that is not vLLM's own: of several kernels of a pick the first counts whose package was installed.

    Which layers of packed integers (in words of 32 bits) it takes; what is not given, it takes all of: `bits` of a weight;
    `groups`, inputs that share a scale (-1: all of a channel's); `group_multiple_of`; and of the matrix W [N, K] on one rank
    `k_multiple_of` and `n_multiple_of`.
    """

    hardware: tuple[str, ...] = Field(min_length=1)
    classes: tuple[str, ...] = ()
    weight_only: bool = False
    package: str = ""
    moe_classes: tuple[str, ...] = ()
    bits: tuple[PositiveInt, ...] = ()
    groups: tuple[PositiveInt | Literal[-1], ...] = ()
    group_multiple_of: PositiveInt | None = None
    k_multiple_of: ByVersion | None = None
    n_multiple_of: ByVersion | None = None


# By hardware glob (the first that matches), a kernel, or a kernel for each range of vLLM versions; several, in vLLM's order,
# where it depends on what is installed beside vLLM or on the layer.
Picks = dict[str, str | dict[Specifier, str | tuple[str, ...]]]


@dataclass(frozen=True)
class Shape:
    """A quantized layer as a kernel has to take it; None or empty: not known.

    k, n: inputs and outputs on one rank; bits: of a weight; group: inputs that share a scale (k: all of a channel's); dtype:
    what the checkpoint stores the weights in ("I32": integers packed in words of 32 bits).
    """

    k: int | None = None
    n: int | None = None
    bits: int | None = None
    group: int | None = None
    dtype: str = ""


def takes(kernel: Kernel, shape: Shape, version: str | None) -> bool | None:
    """Whether a kernel takes a layer; None where something of the layer, or the version, would have to be known."""
    if shape.dtype not in ("", PACKED):
        return True  # requirements are those of packed integers
    found = [
        not kernel.bits or (None if shape.bits is None else shape.bits in kernel.bits),
        _grouped(kernel, shape),
        *(_multiple(size, *_needed(of, version)) for size, of in _sizes(kernel, shape)),
    ]
    return False if False in found else None if None in found else True


def _grouped(kernel: Kernel, shape: Shape) -> bool | None:
    if not kernel.groups:
        return True
    if shape.group is None:
        return None
    return shape.group in kernel.groups or (-1 in kernel.groups and shape.group == shape.k)


def _sizes(kernel: Kernel, shape: Shape) -> tuple[tuple[int | None, ByVersion | None], ...]:
    return (
        (shape.group, kernel.group_multiple_of), (shape.k, kernel.k_multiple_of), (shape.n, kernel.n_multiple_of),
    )  # fmt: skip


def _needed(of: ByVersion | None, version: str | None) -> tuple[int, bool]:
    """What a size has to be a multiple of, and whether it is certain that it has to be."""
    if not isinstance(of, dict):
        return of or 1, True
    if version is None:
        return math.lcm(*of.values()), False
    return next((number for spec, number in of.items() if holds(spec, version)), 1), True


def _multiple(size: int | None, of: int, certain: bool) -> bool | None:
    if of == 1:
        return True
    if size is None:
        return None
    return True if size % of == 0 else False if certain else None


def holds(specifier: str, version: str) -> bool:
    """Whether `version` is in `specifier`; pre-releases count as their version, no specifier holds always."""
    return not specifier or SpecifierSet(specifier).contains(Version(version), prereleases=True)


def chosen(
    ordered: Sequence[str], kernels: Mapping[str, Kernel], version: str | None, packages: Collection[str] | None,
    shape: Shape | None,
) -> tuple[str, ...]:  # fmt: skip
    """The first of `ordered` that is installed and takes the layer; several where it is not known which that is.

    packages: distributions beside vLLM; None: not known. shape: of the layer; None: any that all of them take.
    """
    found: list[str] = []
    for name in ordered:
        row = kernels[name]
        installed = not row.package or (None if packages is None else row.package in packages)
        fits = True if shape is None else takes(row, shape, version)
        if installed is False or fits is False:
            continue
        found.append(name)
        if installed and fits:
            break
    return tuple(found)
