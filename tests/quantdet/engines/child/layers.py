"""Hooks on the modules of a loaded model: digests of what every layer takes and gives, and a seeded defect in one layer.

Runs in the engine's process only, in eager mode: compiled models call no hooks. The hooks read; they copy to the host what
they hash, byte for byte, and change nothing that the model computes.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from quantdet.engines.child import executed_vllm
from quantdet.observations.trace import Row, RowDifference, Trace, TracedModule

# Outputs of repeat 0 that are kept to say how a later repeat differs: decode and short prefills, not every long prompt.
_KEEP_ONE = 4 << 20
_KEEP_ALL = 512 << 20

# Of modules that no kernel is known of, by a part of their class's name.
_KINDS = {"Norm": "norm", "Rotary": "rotary", "Logits": "logits", "Silu": "activation", "elu": "activation"}


class LayerTap:
    """Traces one request at a time: `start`, the request, `stop`."""

    def __init__(self, model: Any) -> None:
        self.modules: list[TracedModule] = []
        self.repeats: list[tuple[Row, ...]] = []
        self.gaps: list[RowDifference] = []
        self._rows: list[Row] | None = None
        self._open: list[tuple[int, str]] = []
        self._call = -1
        self._times: Counter[int] = Counter()  # how often a module was called in this forward call
        self._first: int | None = None  # the module that begins a forward call
        self._kept: dict[int, Any] = {}
        self._kept_bytes = 0
        self._gap_known = False
        names: dict[Any, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if _traced(module):
                names.setdefault(module, []).append(name)
        for module, own in names.items():
            # One object in several places (vLLM's rotary embedding, one for all layers): called in their order.
            numbers = range(len(self.modules), len(self.modules) + len(own))
            self.modules += [TracedModule(name=name, module=type(module).__name__, **_known(name, module)) for name in own]
            module.register_forward_pre_hook(self._before(numbers), with_kwargs=True)
            module.register_forward_hook(self._after, with_kwargs=True)

    def start(self) -> None:
        self._rows, self._open, self._call, self._gap_known = [], [], -1, False

    def stop(self) -> None:
        assert self._rows is not None
        self.repeats.append(tuple(self._rows))
        self._rows = None

    def trace(self, prompt: str) -> Trace:
        """What was traced; modules that were never called left out."""
        used = sorted({row[1] for rows in self.repeats for row in rows})
        index = {number: place for place, number in enumerate(used)}
        repeats = tuple(tuple((call, index[number], a, b) for call, number, a, b in rows) for rows in self.repeats)
        modules = tuple(self.modules[number] for number in used)
        return Trace(schema=1, prompt=prompt, modules=modules, repeats=repeats, gaps=tuple(self.gaps))

    def _before(self, numbers: range) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            if self._rows is None:
                return
            if self._first is None:
                self._first = numbers[0]
            if numbers[0] == self._first:
                self._call += 1
                self._times.clear()
            number = numbers[min(self._times[numbers[0]], len(numbers) - 1)]
            self._times[numbers[0]] += 1
            # Before the layer: some write their outputs over their inputs.
            self._open.append((number, digest((args, kwargs))))

        return hook

    def _after(self, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        if self._rows is None:
            return
        number, inputs = self._open.pop()
        outputs = digest(output)
        self._measure(len(self._rows), outputs, output)
        self._rows.append((self._call, number, inputs, outputs))

    def _measure(self, row: int, outputs: str, output: Any) -> None:
        """Keep an output of repeat 0; of a later repeat, say how the first unequal one differs."""
        repeat = len(self.repeats)
        if repeat == 0:
            size = sum(tensor.nbytes for tensor in _tensors(output))
            if size <= _KEEP_ONE and self._kept_bytes + size <= _KEEP_ALL:
                self._kept[row] = [tensor.detach().to("cpu", copy=True) for tensor in _tensors(output)]
                self._kept_bytes += size
        elif not self._gap_known and row < len(self.repeats[0]) and outputs != self.repeats[0][row][3]:
            self._gap_known = True
            theirs = list(_tensors(output))
            if row in self._kept and [t.shape for t in theirs] == [t.shape for t in self._kept[row]]:
                self.gaps.append(_gap(repeat, row, self._kept[row], theirs))


def _traced(module: Any) -> bool:
    """Leaves of the model, and vLLM's operators that have parts of their own: a linear layer, attention, experts, rotary."""
    if getattr(module, "quant_method", None) is not None or hasattr(module, "attn_backend"):
        return True
    operator = any(base.__name__ in ("CustomOp", "PluggableLayer") for base in type(module).__mro__)
    return operator or next(module.children(), None) is None


def _known(name: str, module: Any) -> dict[str, str]:
    """Kind and kernel of a module, as far as they can be told."""
    kind, kernel = executed_vllm.of_layer(name, module)
    if not kind:  # what runs the experts of a layer may hold them as a part
        parts = (executed_vllm.of_layer(f"{name}.{path}", part) for path, part in module.named_modules())
        kernel = next((kernel for kind, kernel in parts if kind == "moe"), "")
        word = type(module).__name__
        kind = "moe" if kernel else next((kind for part, kind in _KINDS.items() if part in word), "other")
    return {"kind": kind, "kernel": kernel}


def _tensors(value: Any) -> Iterator[Any]:
    """The tensors in a layer's arguments or result, in order."""
    if hasattr(value, "untyped_storage"):
        yield value
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            yield from _tensors(value[name])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _bytes(tensor: Any) -> Any:
    """The elements' bytes on the host, uint8 (n,)."""
    import torch

    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()


def digest(value: Any) -> str:
    """The beginning of the SHA-256 over every tensor in `value`: dtype, shape and bytes."""
    found = hashlib.sha256()
    for tensor in _tensors(value):
        found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        if tensor.numel():
            found.update(_bytes(tensor).data)
    return found.hexdigest()[:32]


def _gap(repeat: int, row: int, ours: list[Any], theirs: list[Any]) -> RowDifference:
    differing = elements = 0
    largest = 0.0
    for one, other in zip(ours, theirs, strict=True):
        elements += one.numel()
        if one.dtype == other.dtype and one.numel():
            size = one.element_size()
            unequal = (_bytes(one) != _bytes(other)).reshape(-1, size).any(axis=1)
            differing += int(unequal.sum())
            apart = (one.double() - other.detach().to("cpu").double()).abs().max().item()
            largest = max(largest, apart) if math.isfinite(apart) else largest
    return RowDifference(repeat=repeat, row=row, differing=differing, elements=max(elements, 1), max_abs=largest)


class SeededNoise:
    """The seeded defect `noise`: one ulp more in every output of one linear layer, in decode step 1 of an armed request.

    The layer is the last one of the first half, so that other layers inherit what it does. Every output: of a single one,
    layers that quantize their inputs would round it away.
    """

    def __init__(self, model: Any) -> None:
        self._calls: int | None = None
        linear = [module for name, module in model.named_modules() if executed_vllm.of_layer(name, module)[0] == "linear"]
        linear[max(0, len(linear) // 2 - 1)].register_forward_hook(self._after)

    def arm(self, armed: bool) -> None:
        self._calls = 0 if armed else None

    def _after(self, _: Any, args: Any, output: Any) -> None:
        import torch

        if self._calls is None:
            return
        if self._calls == 1:
            tensor = next(_tensors(output))
            tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).add_(1)
        self._calls += 1
