"""Which bytes of a tensor came from which tensor of the checkpoint, seen from torch's operators while weights are loaded.

Every storage that something was written into carries a list of `Region`s, as an attribute of torch's own object for the
storage, which lives as long as the memory does. So a parameter, a view of it and what its `.data` was replaced by are told
apart by where they lie, and nothing has to be kept after the model is gone. What kernels outside of torch's dispatcher
write (Triton) is not seen: that is post-processing, which comes later.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass

_REGIONS = "_quantdet_regions"
# They fill all of what they are given to write into; `_foreach_copy_` each of a list.
_FILLS = frozenset({"copy_", "fill_", "zero_", "_foreach_copy_", "set_"})
# They fill what an argument selects: by the number of the argument that holds the values.
_SELECTS = {
    "index_put_": 2, "_index_put_impl_": 2, "index_copy_": 3, "index_fill_": 3, "scatter_": 3, "masked_fill_": 2,
    "masked_scatter_": 2,
}  # fmt: skip
# They take the shape of their argument, and none of its numbers.
_SHAPES = frozenset({
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty", "new_empty_strided",
    "new_zeros", "new_ones", "new_full",
})  # fmt: skip


@dataclass(frozen=True)
class Region:
    """Bytes of a storage that were written at once, between `low` and `high`: all of them, or those of a view.

    names: the tensors of the checkpoint that they came from; constant: nothing came, a loader filled in a number, `names` is
    the tensor that was at hand. view: size, strides, offset and bytes of an element; None: every byte. chosen: bool, of the
    view's size, where not all of its elements were written.
    """

    names: frozenset[str]
    low: int
    high: int
    view: tuple[tuple[int, ...], tuple[int, ...], int, int] | None = None
    chosen: Any = None
    constant: bool = False


class Writes(TorchDispatchMode):  # type: ignore[misc]  # a class of torch
    """Active while a model is loaded. `hand_out` says which tensor of the checkpoint comes next."""

    def __init__(self) -> None:
        super().__init__()
        self._current: frozenset[str] = frozenset()
        self._as_number = False  # whether a loader has read the current tensor as a number of Python's
        self._kinds: dict[Any, tuple[str, tuple[int | str, ...], bool]] = {}

    def hand_out(self, name: str, tensor: Any) -> None:
        """`tensor`, all of it, is the checkpoint's `name`; what lay in its memory before is gone (loaders reuse buffers)."""
        self._current, self._as_number = frozenset({name}), False
        with paused():
            for leaf in _leaves(tensor):
                low, high, _ = _extent(leaf)
                kept = [one for one in regions(leaf) if one.high <= low or one.low >= high]
                _set(leaf, [*kept, _region(leaf, self._current)])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, written, makes = self._kind(func)
        if name == "_local_scalar_dense":
            self._as_number |= bool(names_of(args[0]))
        elif (written or makes) and name not in _SHAPES:
            self._seen(func, name, written, args, kwargs or {}, result)
        return result

    def _kind(self, func: Any) -> tuple[str, tuple[int | str, ...], bool]:
        """Name of an operator, which of its arguments it writes into, and whether it gives memory of its own (no view)."""
        if func not in self._kinds:
            schema = func._schema
            written = tuple(
                argument.name if argument.kwarg_only else number
                for number, argument in enumerate(schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            )
            makes = all(given.alias_info is None for given in schema.returns)
            self._kinds[func] = (schema.name.rpartition("::")[2], written, makes)
        return self._kinds[func]

    def _seen(
        self, func: Any, name: str, written: tuple[int | str, ...], args: Any, kwargs: dict[str, Any], result: Any
    ) -> None:
        every: dict[int | str, Any] = dict(enumerate(args))
        every.update(kwargs)
        targets = [leaf for key in written for leaf in _leaves(every.get(key))]
        sources = [leaf for key, value in every.items() if key not in written for leaf in _leaves(value)]
        names = frozenset[str]().union(*(names_of(leaf) for leaf in sources))
        if names and any(missing(leaf) for leaf in sources if regions(leaf)):  # of a part of it nothing came
            return
        if targets:
            own = func.namespace != "aten" or "out" in written  # operators of others write what they are given to write
            if name in _FILLS or (own and names):
                self._filled(targets, names)
            elif name in _SELECTS and names:
                chosen = _chosen(func, args, _SELECTS[name])
                _add(targets[0], _region(targets[0], names, chosen=chosen))
        elif names:
            for leaf in _leaves(result):
                _add(leaf, _region(leaf, names))

    def _filled(self, targets: list[Any], names: frozenset[str]) -> None:
        if names:
            for leaf in targets:
                _add(leaf, _region(leaf, names))
        elif self._current:
            for leaf in targets:
                _add(leaf, _region(leaf, self._current, constant=not self._as_number))


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """For the time of the block, nothing is seen, and operators run as if nothing ever was."""
    with _disable_current_modes():
        yield


def regions(tensor: Any) -> list[Region]:
    """What was written into the memory that a plain tensor lies in, in order."""
    try:
        return list(getattr(tensor.untyped_storage(), _REGIONS, ()))
    except (RuntimeError, NotImplementedError):  # a tensor without memory
        return []


def names_of(tensor: Any) -> frozenset[str]:
    """The tensors of the checkpoint that a tensor, or a part of it, came from."""
    found: set[str] = set()
    for leaf in _leaves(tensor):
        there = regions(leaf)
        if there:
            low, high, _ = _extent(leaf)
            found |= {name for one in there if not one.constant and one.low < high and low < one.high for name in one.names}
    return frozenset(found)


def missing(tensor: Any) -> int:
    """How many elements of a tensor came from no tensor of the checkpoint.

    A number that a loader filled in counts where the tensor that was at hand went into the same memory: padding.
    """
    return sum(leaf.numel() if (mask := _lacking(leaf)) is True else int(mask.sum()) for leaf in _leaves(tensor))


def is_padding(tensor: Any) -> bool:
    """Whether what is missing of a stack of matrices or vectors is their rims, of zeros: some kernels want larger experts.

    More than half of each side is filled, of every expert alike; what a lost shard leaves is a half, or another one's place.
    """
    if tensor.dim() < 2 or (mask := _lacking(tensor)) is True:
        return False
    sides, filled = range(tensor.dim()), ~mask
    kept = [filled.any(dim=[side for side in sides if side != one]) for one in sides]
    corner = kept[0]
    for side in kept[1:]:
        corner = corner.unsqueeze(-1) & side
    enough = bool(kept[0].all()) and all(2 * int(side.sum()) > side.numel() for side in kept[1:])
    return enough and bool((corner == filled).all()) and not bool(tensor.detach().cpu()[mask].view(torch.uint8).any())


def _lacking(leaf: Any) -> Any:
    """Which elements of a plain tensor are missing: bool, of its size; True: all of them."""
    there = regions(leaf)
    came = frozenset[str]().union(*(one.names for one in there if not one.constant))
    low, high, _ = _extent(leaf)
    counted = [one for one in there if (not one.constant or one.names <= came) and one.low < high and low < one.high]
    if not counted and leaf.numel():
        return True
    reached = low
    for one in sorted((one for one in counted if one.view is None), key=lambda one: one.low):
        if one.low > reached:
            break
        reached = max(reached, one.high)
    if reached >= high:
        return torch.zeros((), dtype=torch.bool, device="cpu")
    mask = _Mask(min(low, *(one.low for one in counted)), max(high, *(one.high for one in counted)), leaf, counted)
    return mask.unset(leaf)


class _Mask:
    """Bytes of a storage from `low` to `high`, in the smallest elements that they were written in."""

    def __init__(self, low: int, high: int, leaf: Any, counted: list[Region]) -> None:
        self._low = low
        self._unit = min([leaf.element_size(), *(one.view[3] for one in counted if one.view)])
        for one in counted:  # a plain region of smaller elements
            while (one.low - low) % self._unit or (one.high - low) % self._unit:
                self._unit //= 2
        self._set = torch.zeros((high - low) // self._unit, dtype=torch.bool, device="cpu")
        for one in counted:
            if one.view is None:
                self._set[(one.low - low) // self._unit : (one.high - low) // self._unit] = True
            else:
                place = self._place(*one.view)
                chosen = True if one.chosen is None else place | one.chosen.to("cpu").unsqueeze(-1)
                place[...] = chosen

    def unset(self, leaf: Any) -> Any:
        place = self._place(tuple(leaf.shape), tuple(leaf.stride()), leaf.storage_offset(), leaf.element_size())
        return (~place).any(-1)

    def _place(self, size: tuple[int, ...], stride: tuple[int, ...], offset: int, width: int) -> Any:
        times = width // self._unit
        start = (offset * width - self._low) // self._unit
        return self._set.as_strided((*size, times), (*(step * times for step in stride), 1), start)


def _leaves(value: Any) -> Iterator[Any]:
    """The plain tensors in an argument: of a list each, of a tensor made of others (torchao) those."""
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from _leaves(getattr(value, name))
        else:
            yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)


def _extent(leaf: Any) -> tuple[int, int, bool]:
    """From which byte of its storage to which a tensor lies, and whether every byte between is its own."""
    width, count = leaf.element_size(), leaf.numel()
    low = leaf.storage_offset() * width
    if count == 0:
        return low, low, True
    reach = 1 + sum((size - 1) * step for size, step in zip(leaf.shape, leaf.stride(), strict=True))
    return low, low + reach * width, reach == count


def _region(leaf: Any, names: Iterable[str], *, chosen: Any = None, constant: bool = False) -> Region:
    low, high, dense = _extent(leaf)
    whole = dense and chosen is None
    view = None if whole else (tuple(leaf.shape), tuple(leaf.stride()), leaf.storage_offset(), leaf.element_size())
    return Region(frozenset(names), low, high, view, chosen, constant)


def _chosen(func: Any, args: Any, values: int) -> Any:
    """Which elements of its first argument an operator writes: it is let do so with truth values."""
    shadow = torch.zeros(args[0].shape, dtype=torch.bool, device=args[0].device)
    given = args[values]
    told = torch.ones_like(given, dtype=torch.bool) if isinstance(given, torch.Tensor) else True
    func(shadow, *args[1:values], told, *args[values + 1 :])
    return shadow


def _add(leaf: Any, region: Region) -> None:
    if not leaf.is_meta and region.low < region.high:
        _set(leaf, [*regions(leaf), region])


def _set(leaf: Any, found: list[Region]) -> None:
    with contextlib.suppress(RuntimeError, NotImplementedError):
        setattr(leaf.untyped_storage(), _REGIONS, found)
