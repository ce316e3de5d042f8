"""Layers against what the checkpoint stores of them: which are quantized, in which scheme, and what has to run for each."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantdet.matrix.kernels import Shape
from quantdet.observations.header import Executed, Layer

# The names of kernels that a layer has to show one of, as the matrix calls them, and their classes; no class: not judged.
Expected = Callable[[Layer], tuple[str, tuple[str, ...]]]
_FLOATS = frozenset({"BF16", "F16", "F32", "F64"})
_OF_QUANTIZATION = ("scale", "zero", "absmax")  # in the names of tensors that no unquantized layer has
_NAMED = 3  # layers that a message names


def tells(executed: Executed) -> bool:
    """Whether the observation says what the checkpoint stores of its layers; older recordings do not."""
    return any(layer.stored for layer in executed.layers)


def quantized(layer: Layer) -> bool | None:
    """Whether the checkpoint stores these layers quantized; None: not known.

    By the tensors' dtypes: experts whose weights are one tensor call it otherwise than `weight`.
    """
    if not layer.stored:
        return None
    stored = (one.rpartition(":") for one in layer.stored)
    return any(dtype not in _FLOATS or any(part in name for part in _OF_QUANTIZATION) for name, _, dtype in stored)


def shape_of(layer: Layer) -> Shape:
    """A layer as the matrix asks of it whether a kernel takes it."""
    return Shape(layer.k, layer.n, layer.bits, layer.group, _dtype(layer))


def _dtype(layer: Layer) -> str:
    """What the weights themselves are stored in: not their scales, zero points and indices."""
    stored = [one.rpartition(":") for one in layer.stored]
    weights = [dtype for name, _, dtype in stored if name.rpartition(".")[2] in ("weight", "qweight", "weight_packed")]
    return next(iter(weights or [dtype for _, _, dtype in stored if dtype not in _FLOATS]), "")


def named(layers: Sequence[Layer]) -> str:
    """The first of some layers by name, and how many they are."""
    names = [name for layer in layers for name in layer.names] or [layer.module for layer in layers]
    count = sum(layer.count for layer in layers)
    return f"{', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''} ({count} layer{'s' if count > 1 else ''})"


def ran(layers: Iterable[Layer]) -> str:
    """What executes some layers and how often, as `Executed.summary` says it."""
    counts: dict[str, int] = {}
    for layer in layers:
        name = layer.executed + (f"[{layer.detail}]" if layer.detail else "")
        counts[name] = counts.get(name, 0) + layer.count
    return " + ".join(f"{name} x{count}" for name, count in counts.items())


@dataclass(frozen=True)
class Scheme:
    """How layers are quantized: the tensors that hold them (without biases), bits, and inputs that share a scale (-1: all).

    part: "linear", "moe", or "embedding", the head: kernels of the one say nothing of the other.
    """

    part: str
    stored: tuple[str, ...]
    bits: int | None
    group: int | None
    loading: bool

    @property
    def text(self) -> str:
        """For a message, for example `4 bits (I32), groups of 32`."""
        if self.loading:
            return "quantized while loading"
        if not self.stored:
            return "not known what is stored"
        dtypes = dict.fromkeys(one.rpartition(":")[2] for one in self.stored)
        dtype = next((one for one in dtypes if one not in _FLOATS), "")
        found = [f"{self.bits} bits ({dtype})" if self.bits else dtype]
        found += [] if self.group is None else ["one scale a channel" if self.group == -1 else f"groups of {self.group}"]
        return ", ".join(found)


def schemes(layers: Sequence[Layer]) -> dict[Scheme, list[Layer]]:
    """Layers by how they are quantized."""
    # A group as long as the inputs is a channel's, unless longer layers have groups of that length too.
    groups = {layer.group for layer in layers if layer.group != layer.k}
    found: dict[Scheme, list[Layer]] = {}
    for layer in layers:
        stored = tuple(one for one in layer.stored if one.rpartition(":")[0] != "bias")
        group = -1 if layer.group is not None and layer.group == layer.k and layer.group not in groups else layer.group
        scheme = Scheme(layer.kind, stored, layer.bits, group, quantized(layer) is False)
        found.setdefault(scheme, []).append(layer)
    return found


def mixed(layers: Sequence[Layer]) -> list[Layer]:
    """Layers that look alike, kind, K, N and stored tensors, and run different kernels; empty: there are none.

    Of layers whose shape is not known, the stored tensors do not count: a bias would make them different ones.
    """
    alike: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        known = layer.k is not None and layer.n is not None
        alike.setdefault((layer.kind, layer.k, layer.n, layer.stored if known else ()), []).append(layer)
    return next((same for same in alike.values() if len({(one.executed, one.detail) for one in same}) > 1), [])


def by_shape(layers: Sequence[Layer]) -> str:
    """Which kernels run in layers of one scheme, and in which shapes; empty where there is one."""
    shapes: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        shapes.setdefault((layer.executed, layer.detail), []).append(layer)
    if len(shapes) < 2:
        return ""
    count = {2: "two", 3: "three"}.get(len(shapes), str(len(shapes)))
    sizes = {
        key: ", ".join(dict.fromkeys(f"{one.n}x{one.k}" for one in found if one.k is not None and one.n is not None))
        for key, found in shapes.items()
    }
    told = [f"{ran(found)}{f' ({sizes[key]})' if sizes[key] else ''}" for key, found in shapes.items()]
    return f"{count} kernels by shape (N x K): {', '.join(told)}"


@dataclass(frozen=True)
class Asked:
    """What was asked for: `requested` in words; `classes`, `moe_classes`, `quantizes` as `kernel.kernel` has them.

    expected: of a layer that is not one of experts; loading: the engine was told to quantize while it loads.
    """

    requested: str
    classes: Sequence[str]
    moe_classes: Sequence[str]
    quantizes: str
    expected: Expected
    loading: bool

    def of(self, layer: Layer) -> tuple[str, tuple[str, ...]]:
        """The kernels that a quantized layer has to show one of: what the matrix calls them, and their classes."""
        if layer.kind == "moe":
            return self.requested.rpartition(_TO)[2], tuple(self.moe_classes)
        return self.expected(layer)

    def names(self, layers: Sequence[Layer]) -> str:
        """What was requested of these layers, in words: of vLLM's own choice the kernels that it has to be for them."""
        found = dict.fromkeys(name for layer in layers for name, classes in [self.of(layer)] if classes)
        first, arrow, _ = self.requested.partition(_TO)
        return f"{first}{_TO}{', '.join(found)}" if found and (arrow or set(found) != {first}) else self.requested

    def known(self, layers: Sequence[Layer]) -> list[str]:
        """The classes that one of these layers may show; empty: not judged."""
        return list(dict.fromkeys(one for layer in layers for one in self.of(layer)[1]))


_TO = " -> "


@dataclass(frozen=True)
class Found:
    """What is wrong (empty: nothing), and what there is to say of layers that are right.

    requested, classes: what was requested in words, and the classes for it, as far as they follow from the layers.
    """

    wrong: str = ""
    notes: tuple[str, ...] = ()
    requested: str = ""
    classes: tuple[str, ...] = ()


def against_checkpoint(executed: Executed, asked: Asked) -> Found:
    """Every linear layer, layer of experts and head against what the checkpoint stores of it."""
    judged = [*executed.linear, *executed.moe, *executed.heads]
    quantizing = [layer for layer in judged if not layer.multiplied_plain]
    plain = [layer for layer in judged if layer.multiplied_plain and layer.kind != "embedding"]
    linear = [layer for layer in plain if layer.kind == "linear"]
    loading = asked.loading and not any(map(quantized, executed.layers))
    if ignored := [layer for layer in judged if quantized(layer) and layer.multiplied_plain]:
        return Found(f"stored quantized, executed unquantized: {named(ignored)}: {ran(ignored)}")
    # transformers shows no method of experts, only their class.
    made = [one for one in quantizing if quantized(one) is False and not (one.kind == "moe" and one.method == one.module)]
    if made and not loading:
        return Found(f"stored unquantized, executed quantized: {named(made)}: {ran(made)}, which was not asked for")
    if not quantizing and (asked.quantizes or loading):
        why = NOTHING if loading else "the checkpoint holds no quantized layer"
        return Found(f"requested {asked.requested}, executed {executed.summary}: {why}")
    if not asked.quantizes and (wrong := [one for one in linear if asked.classes and one.executed not in asked.classes]):
        return Found(_another(wrong, asked))
    if same := mixed(plain):
        return Found(_mixed(same))
    found = schemes(quantizing)
    for scheme, layers in found.items():
        if wrong := [layer for layer in layers if (known := asked.of(layer)[1]) and layer.executed not in known]:
            return Found(_another(wrong, asked) + (f" ({scheme.text})" if len(found) > 1 else ""))
        if same := mixed(layers):
            return Found(_mixed(same))
    notes = [*_described(found), *(_left(linear) if quantizing and asked.quantizes == "all" else ())]
    return Found("", tuple(notes), asked.names(quantizing), tuple(asked.known(quantizing)))


NOTHING = "nothing was quantized: no layer differs from the unquantized kernel"
_PARTS = {"moe": "experts, ", "embedding": "head, "}


def _another(wrong: Sequence[Layer], asked: Asked) -> str:
    known = asked.known(wrong) if asked.quantizes or not asked.classes else asked.classes
    return f"requested {asked.names(wrong)} ({' or '.join(known)}), executed {ran(wrong)} in {named(wrong)}"


def _mixed(same: Sequence[Layer]) -> str:
    return f"mixed kernels: {ran(same)} in layers of one shape and scheme: {named(same)}"


def _described(found: Mapping[Scheme, Sequence[Layer]]) -> Iterator[str]:
    """Several schemes, and several kernels in one."""
    for scheme, layers in found.items():
        told = by_shape(layers)
        if len(found) > 1:
            yield f"{_PARTS.get(scheme.part, '')}{scheme.text}: {told or ran(layers)}"
        elif told:
            yield told


def _left(plain: Sequence[Layer]) -> Iterator[str]:
    """Linear layers that are rightly unquantized, and those of which that is not known."""
    if left := [layer for layer in plain if quantized(layer) is False]:
        yield f"left unquantized: {named(left)}"
    if unknown := [layer for layer in plain if quantized(layer) is None]:
        yield f"not known what the checkpoint stores of: {named(unknown)}"


def weight_only(layers: Iterable[Layer], classes: Collection[str]) -> str:
    """The first kernel of `classes`, which quantize no activations, that is in one of the layers; empty: none is."""
    # Whatever the capitals: MarlinMxFp8 of one vLLM is MarlinMxfp8 of another.
    known = {name.casefold() for name in classes}
    return next((layer.executed for layer in layers if layer.executed.casefold() in known), "")
