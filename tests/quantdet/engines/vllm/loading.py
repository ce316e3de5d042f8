"""What vLLM loads, watched: that every element of every parameter comes from a tensor of the checkpoint.

vLLM makes a model, hands tensors to its `load_weights`, and repacks what it has for the kernels. Where weights are quantized
while they are loaded, their parameters are on the device "meta" at first, and each layer is filled and repacked as soon as
its last tensor has come, or when all have. So a layer is looked at between the two: at the end of `load_weights`, or right
before its own method repacks it.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from quantdet.engines.child import stored
from quantdet.engines.plan import EngineRefused, InvalidMeasurement
from quantdet.engines.vllm import writes
from quantdet.observations.header import Loading

_LOADERS = "vllm.model_executor.model_loader"
_TOLD = 5  # parameters that a message names
_LISTED = 100  # tensors that a header lists
_WORDS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


class Watch:
    """One engine's loading. `rules`: globs over parameters that nothing has to fill, and why.

    at_once: whether an unfilled parameter ends the loading, or is told by `found` afterwards: where other ranks would wait.
    """

    def __init__(self, checkpoint: str, rules: Mapping[str, str], *, at_once: bool = True) -> None:
        self.layers: dict[int, stored.Stored] = {}  # by `id` of the module, which `_modules` keeps alive
        self._checkpoint, self._rules, self._at_once = Path(checkpoint), rules, at_once
        self._writes = writes.Writes()
        self._modules: list[Any] = []
        self._models: list[Any] = []
        self._loaded = False
        self._dtypes: dict[str, str] = {}  # of every tensor that was handed out
        self._handing = "the first tensor"
        self._used: set[str] = set()
        self._filled = 0
        self._by_rule: dict[str, list[str]] = {}
        self._kinds: set[str] = set()  # names, in their layers, of parameters that were filled
        self._wrong: list[str] = []
        self._waiting: dict[int, str] = {}  # layers that are filled later, by `id`: their names

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While vLLM is started.

        Raises:
            InvalidMeasurement: a parameter that nothing filled, or a scale that is no number, by name.
        """
        with contextlib.ExitStack() as stack:
            for name, module in list(sys.modules.items()):
                if name.startswith(_LOADERS):
                    self._patch(stack, module, "initialize_model", self._making)
                    self._patch(stack, module, "finalize_layerwise_processing", self._finishing)
            yield

    def found(self) -> Loading | None:
        """What was loaded; None: this vLLM makes its models where nobody looks.

        Raises:
            InvalidMeasurement: as `watching`.
        """
        if not self._models:
            return None
        if not self._loaded:
            raise InvalidMeasurement("what filled the model's parameters is not known: vLLM handed its model no tensors")
        self._wrong += [f"{name} (nothing was seen to fill this layer)" for name in self._waiting.values()]
        self._hold_rules()
        self._tell()
        unread = {name: reason for name in set(self._dtypes) - self._used if (reason := self._rule(name))}
        for name, reason in sorted(unread.items()):  # no kernel reads it, so that it fills nothing
            self._by_rule.setdefault(reason, []).append(name)
        unused = sorted(set(self._dtypes) - self._used - unread.keys())
        return Loading(
            filled=self._filled,
            tensors=len(self._used),
            by_rule={reason: tuple(names) for reason, names in self._by_rule.items()},
            unused=tuple(unused[:_LISTED]),
            unused_count=len(unused),
        )

    @staticmethod
    def _patch(stack: contextlib.ExitStack, owner: Any, name: str, around: Callable[[Any], Any]) -> None:
        function = vars(owner).get(name)
        if callable(function):
            setattr(owner, name, around(function))
            stack.callback(setattr, owner, name, function)

    def _making(self, function: Any) -> Any:
        @functools.wraps(function)
        def make(*args: Any, **kwargs: Any) -> Any:
            model = function(*args, **kwargs)
            if not any(model is one for one in self._models):  # a loader may call another one's function
                self._models.append(model)
                self._prepare(model)
            return model

        return make

    def _finishing(self, function: Any) -> Any:
        @functools.wraps(function)
        def finish(*args: Any, **kwargs: Any) -> Any:
            with self._writes:
                return function(*args, **kwargs)

        return finish

    def _prepare(self, model: Any) -> None:
        """Watch the tensors that `model` is handed, and the methods of layers that are repacked before it has them all."""
        load = model.load_weights

        @functools.wraps(load)
        def loading(weights: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
            self._loaded = True
            try:
                with self._writes:
                    answer = load(self._handed(weights), *args, **kwargs)
            except AssertionError as error:  # loaders compare shapes, and say nothing
                raise EngineRefused(f"AssertionError: {error or 'no message'} (while it loaded {self._handing})") from error
            with writes.paused():
                self._look_at_all(model)
            return answer

        model.load_weights = loading
        names = {id(module): name for name, module in model.named_modules()}
        methods = {}
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if method is not None and any(one.is_meta for one in module.parameters(recurse=False)):
                methods[id(method)] = method
        for method in methods.values():
            method.process_weights_after_loading = self._repacking(model, names, method.process_weights_after_loading)

    def _repacking(self, model: Any, names: Mapping[int, str], function: Any) -> Any:
        @functools.wraps(function)
        def repack(layer: Any, *args: Any, **kwargs: Any) -> Any:
            with writes.paused():
                name = names.get(id(layer))
                if name is not None and id(layer) not in self.layers:
                    self._waiting.pop(id(layer), None)
                    self._look(model, name, layer)
                    self._tell_at_once()
                return function(layer, *args, **kwargs)

        return repack

    def _handed(self, weights: Iterable[Any]) -> Iterator[Any]:
        dtypes = _dtypes_in(self._checkpoint)
        for item in weights:
            name, tensor = item[0], item[1]
            self._dtypes[name] = dtypes.get(name) or _word(tensor)
            self._handing = f"{name}, {self._dtypes[name]} {list(tensor.shape)}"
            self._writes.hand_out(name, tensor)
            yield item

    def _look_at_all(self, model: Any) -> None:
        for name, module in model.named_modules():
            if id(module) in self.layers:
                continue
            if any(one.is_meta for one in module.parameters(recurse=False)):
                self._waiting[id(module)] = name
            else:
                self._look(model, name, module)
        self._hold_rules()
        self._tell_at_once()

    def _hold_rules(self) -> None:
        """A rule is for scales that a checkpoint does not have: of some layers alone, they were lost."""
        for reason, names in self._by_rule.items():
            lost = [name for name in names if "scale" in name and name.rpartition(".")[2] in self._kinds]
            self._wrong += [f"{name} (nothing filled it, and other layers' were)" for name in lost]
            self._by_rule[reason] = [name for name in names if name not in lost]

    def _look(self, model: Any, path: str, module: Any) -> None:
        """Whether everything in a layer came from the checkpoint, and what did."""
        filling: set[str] = set()
        parameters = dict(module.named_parameters(recurse=False))
        for name, parameter in parameters.items():
            full = f"{path}.{name}".lstrip(".")
            lacking, came = _coverage(module, name, parameter)
            filling |= came
            rule = self._rule(full)
            if name.endswith("g_idx") and _ordered(module):
                rule = None
            if not lacking:
                self._filled += 1
                self._kinds.add(name)
                self._wrong += [f"{full} {wrong}" for wrong in _flaws(name, parameter)]
            elif rule is not None:
                self._by_rule.setdefault(rule, []).append(full)
            else:
                self._wrong.append(f"{full} ({lacking}{_whose(model, path, came)})")
        buffers = (writes.names_of(one) for _, one in module.named_buffers(recurse=False))
        self._used |= filling.union(*buffers)
        self._modules.append(module)
        plain = {name: one for name, one in parameters.items() if not _made_later(one)}
        self.layers[id(module)] = stored.described(module, plain, filling, self._dtypes)

    def _rule(self, name: str) -> str | None:
        """Why a parameter, or a tensor of the checkpoint, may be left; None: it may not."""
        return next((reason for glob, reason in self._rules.items() if fnmatchcase(name, glob)), None)

    def _tell_at_once(self) -> None:
        if self._at_once:
            self._tell()

    def _tell(self) -> None:
        if self._wrong:
            more = f", and {len(self._wrong) - _TOLD} more" if len(self._wrong) > _TOLD else ""
            raise InvalidMeasurement(f"the model holds what the checkpoint does not: {', '.join(self._wrong[:_TOLD])}{more}")


def _coverage(module: Any, name: str, parameter: Any) -> tuple[str, frozenset[str]]:
    """What of a parameter nothing filled, in words ("": nothing is missing), and the tensors that filled the rest."""
    parts = getattr(parameter, "partitions", None)
    if isinstance(parts, dict):  # several parameters that share memory with those of other layers
        each = [_coverage(module, name, part) for part in parts.values()]
        return next((lacking for lacking, _ in each if lacking), ""), frozenset[str]().union(*(came for _, came in each))
    if _made_later(parameter):  # GGUF, up to vLLM 0.26: a list of what came, which is put together when it is repacked
        came = list(getattr(parameter, "data_container", ()))
        names = frozenset[str]().union(*(writes.names_of(one) for one in came))
        wanted = len(getattr(module, "output_partition_sizes", None) or [0])
        if not came or (len(came) > 1 and len(came) < wanted):
            return f"nothing filled {wanted - len(came)} of {wanted} parts", names
        return "", names
    count, lacking = parameter.numel(), writes.missing(parameter)
    if 0 < lacking < count and parameter.dim() + ("bias" in name) > 2 and writes.is_padding(parameter):
        lacking = 0
    words = f"nothing filled {'any' if lacking == count else lacking} of {count} element{'s' * (count > 1)}" if lacking else ""
    return words, writes.names_of(parameter)


def _ordered(module: Any) -> bool:
    """Whether a layer's weights are in the order of activations (GPTQ's `desc_act`), which its g_idx tells."""
    method = getattr(module, "quant_method", None)
    owners = (method, getattr(method, "quant_config", None), getattr(module, "scheme", None))
    return any(getattr(one, name, None) not in (None, False, "") for one in owners for name in ("desc_act", "actorder"))


def _made_later(parameter: Any) -> bool:
    return bool(torch.nn.parameter.is_lazy(parameter))


def _whose(model: Any, path: str, came: Iterable[str]) -> str:
    """Which projections of a fused layer nothing came of, as the model says what it is fused of."""
    mapping = getattr(model, "packed_modules_mapping", None) or {}
    fused = mapping.get(path.rpartition(".")[2], ())
    gone = [part for part in fused if not any(f".{part}." in f".{name}" for name in came)]
    return f": {', '.join(gone)}" if gone and len(fused) > 1 else ""


def _flaws(name: str, parameter: Any) -> Iterator[str]:
    """What a scale holds that no checkpoint means: no number, or what vLLM puts into a scale before it loads it."""
    if "scale" not in name or _made_later(parameter) or isinstance(getattr(parameter, "partitions", None), dict):
        return
    if not parameter.is_floating_point():
        return
    values = parameter.detach().float()
    if bool(torch.isnan(values).any()):
        yield "(holds NaN)"
    elif bool((values == torch.finfo(torch.float32).min).any()):
        yield "(holds the smallest float32, which vLLM puts there before it loads)"


def _dtypes_in(checkpoint: Path) -> dict[str, str]:
    """Of every tensor in a folder's safetensors files, the dtype in their words: a loader may hand out something else."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for path in sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else ():
        with contextlib.suppress(Exception), safe_open(path, framework="pt") as file:  # vLLM says what is wrong with it
            names = file.keys()
            found |= {name: file.get_slice(name).get_dtype() for name in names}
    return found


def _word(tensor: Any) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return _WORDS.get(name, name)
