"""What quantization settings say of single modules: which are left as they are, and how the others are quantized.

Every maker has a way of its own (read off vLLM's `model_executor/layers/quantization/*` and `compressed_tensors`): GPTQModel's
`dynamic`, AutoAWQ's `modules_to_not_convert`, compressed-tensors' `config_groups` and `ignore`, transformers' FP8
`ignored_layers`, Quark's `exclude`, ModelOpt's `exclude_modules`, auto-round's `extra_config`. All of it is somebody else's
text: a pattern that may take long is not tried.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

# The methods whose settings are understood; the words of `quant_method`, in small letters.
_OTHER_WORDS = {
    "intel/auto-round": "auto-round", "auto_round": "auto-round", "autoround": "auto-round", "compressed_tensors":
    "compressed-tensors", "auto_gptq": "gptq", "gptq_marlin": "gptq", "auto_awq": "awq", "awq_marlin": "awq",
    "modelopt_fp4": "modelopt", "modelopt_mxfp8": "modelopt", "modelopt_mixed": "modelopt",
}  # fmt: skip
# Keys by which several makers list what they leave out.
_LISTS = {
    "awq": ("modules_to_not_convert",),
    "fp8": ("ignored_layers", "modules_to_not_convert"),
    "compressed-tensors": ("ignore",),
    "quark": ("exclude",),
    "modelopt": ("exclude_modules", "ignore"),
    "bitsandbytes": ("llm_int8_skip_modules",),
    "mxfp4": ("modules_to_not_convert",),
}
_MOST_NAMES = 100_000
_LONGEST_NAME = 1_000


def method_of(settings: Mapping[str, Any]) -> str:
    """The maker's way of quantizing, as vLLM's `quantization` calls it or close to it; "": the settings do not say."""
    said = settings.get("quant_method")
    if said is not None:
        return _OTHER_WORDS.get(said.lower(), said.lower()) if isinstance(said, str) else "?"
    if "desc_act" in settings:
        return "gptq"  # AutoGPTQ's quantize_config.json
    if "quant_algo" in modelopt(settings):
        return "modelopt"
    if "w_bit" in settings and "q_group_size" in settings:
        return "awq"  # AutoAWQ's quant_config.json
    return ""


def modelopt(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """ModelOpt's settings without the level that its own file has around them."""
    inner = settings.get("quantization")
    return inner if isinstance(inner, dict) else settings


def as_plain_gptq_or_awq(settings: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Method and settings, those of auto-round in the words of the maker whose packing it uses.

    Its `auto_round:auto_gptq` stores what AutoGPTQ stores (z - 1), its `auto_round:auto_awq` what AutoAWQ does.
    """
    method = method_of(settings)
    if method != "auto-round" or settings.get("data_type", "int") != "int":
        return method, settings
    inner = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}.get(str(settings.get("packing_format")), "")
    return inner or method, {**settings, "auto-round": True}


class Rules:
    """The settings of a checkpoint, asked by the names of its modules.

    Raises:
        ValueError: lists that are too long to be a model's. Later, of a pattern that is not tried.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.method, self.settings = as_plain_gptq_or_awq(settings)
        if self.method == "modelopt":
            self.settings = modelopt(settings)
        self._named = list(self._lists())
        self._exact = frozenset(self._named)
        self._patterns = [name for name in self._named if name.startswith("re:") or "*" in name]

    def left_out(self, module: str) -> bool:
        """Whether the settings say, without doubt, that this module is not quantized."""
        if self.settings.get("auto-round"):
            own = self._extra(module)
            return bool(own) and int(own.get("bits", 0)) >= 16
        if self.method == "gptq":
            return self._gptq_leaves(module)
        if self.method == "awq":  # a part of the name is enough, in AutoAWQ, transformers and vLLM
            return any(name in module for name in self._named) or (_is_head(module) and not self.settings.get("lm_head"))
        if module in self._exact:
            return True
        return any(self._fits(pattern, module) for pattern in self._patterns)

    def may_leave_out(self, module: str) -> bool:
        """Whether some reader of the settings may take this module for one that is not quantized.

        Of GPTQ and AWQ (and auto-round, which packs as they do) any module may be: vLLM looks at what is stored.
        """
        if self.method in ("gptq", "awq", "auto-round") or self.left_out(module) or _is_head(module):
            return True
        if self.method == "compressed-tensors":
            return not self._targeted(module)
        return any(name and (name in module or name.strip("*").strip(".") in module) for name in self._named)

    def of(self, module: str) -> Mapping[str, Any]:
        """The settings that count for a module: its own over those of all, where its maker has such.

        Raises:
            ValueError: a pattern that is not tried.
        """
        if self.settings.get("auto-round"):
            return {**self.settings, **self._extra(module)}
        if self.method != "gptq":
            return self.settings
        for pattern, own in self._dynamic():
            if not pattern.startswith("-:") and matches(pattern.removeprefix("+:"), module):
                return {**self.settings, **own}  # the first that fits, as vLLM and GPTQModel have it
        return self.settings

    def overrides(self) -> bool:
        """Whether modules that are quantized may be quantized differently."""
        if self.settings.get("auto-round"):
            return any(isinstance(own, dict) and int(own.get("bits", 0)) < 16 for own in self._extras().values())
        return any(not pattern.startswith("-:") and own for pattern, own in self._dynamic())

    def scheme(self, module: str) -> Mapping[str, Any]:
        """The group of compressed-tensors' configuration that speaks of a module: by its name, a pattern, or its class.

        Raises:
            LookupError, TypeError, AttributeError, ValueError: none, or several, or what is no configuration.
        """
        groups = [group for group in self.settings["config_groups"].values() if isinstance(group, dict)]
        by_class = [group for group in groups if "Linear" in group["targets"]]
        for group in groups:
            for target in group["targets"]:
                if module == target or (target.startswith("re:") and matches(target.removeprefix("re:"), module)):
                    return dict(group)
        if len(by_class) != 1:
            raise ValueError("no group, or several, for this module")
        return dict(by_class[0])

    def _targeted(self, module: str) -> bool:
        try:
            self.scheme(module)
        except (LookupError, TypeError, AttributeError, ValueError):
            return False
        return True

    def _lists(self) -> Iterator[str]:
        for key in _LISTS.get(self.method, ()):
            found = self.settings.get(key)
            if isinstance(found, list):
                if len(found) > _MOST_NAMES:
                    raise ValueError(f"{key}: {len(found)} names, at most {_MOST_NAMES}")
                yield from (name for name in found if isinstance(name, str) and name)

    def _fits(self, pattern: str, module: str) -> bool:
        if pattern.startswith("re:"):
            return self.method != "fp8" and matches(pattern.removeprefix("re:"), module)
        # ModelOpt and Quark write shell patterns; in the others a star is no more than a star.
        return self.method in ("modelopt", "quark") and pattern.count("*") <= 4 and fnmatchcase(module, pattern)

    def _dynamic(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        dynamic = self.settings.get("dynamic") if self.method == "gptq" else None
        for pattern, own in dynamic.items() if isinstance(dynamic, dict) else ():
            yield str(pattern), own if isinstance(own, dict) else {}

    def _gptq_leaves(self, module: str) -> bool:
        for pattern, _ in self._dynamic():
            if pattern.startswith("-:") and matches(pattern.removeprefix("-:"), module):
                return True
            if not pattern.startswith("-:") and matches(pattern.removeprefix("+:"), module):
                return False
        if _is_head(module):
            return not self.settings.get("lm_head")
        listed = list(_flat(self.settings.get("modules_in_block_to_quantize")))
        return bool(listed) and not any(part in module for part in listed)

    def _extras(self) -> Mapping[str, Any]:
        extra = self.settings.get("extra_config")
        return extra if isinstance(extra, dict) else {}

    def _extra(self, module: str) -> Mapping[str, Any]:
        """auto-round's own settings of a module: under its name, else under a pattern that is found in it."""
        for name, own in self._extras().items():
            if isinstance(own, dict) and (name == module or module.endswith(f".{name}")):
                return own
        for name, own in self._extras().items():
            if isinstance(own, dict) and set(name) & set("*+?^$()[]{}|\\") and matches(name, module, anywhere=True):
                return own
        return {}


def matches(pattern: str, text: str, *, anywhere: bool = False) -> bool:
    """Whether a pattern that somebody else wrote fits, from the start or anywhere.

    Raises:
        ValueError: it may take long (many repetitions, or one of a group), or is no pattern.
    """
    repetitions = len(re.findall(r"[*+{]", pattern))
    if len(pattern) > 500 or len(text) > _LONGEST_NAME or repetitions > 4 or re.search(r"\)[*+?{]", pattern):
        raise ValueError(f"pattern {pattern[:80]!r}")
    try:
        return (re.search if anywhere else re.match)(pattern, text) is not None
    except re.error as error:
        raise ValueError(f"pattern {pattern[:80]!r}: {error}") from None


def _is_head(module: str) -> bool:
    return module.rpartition(".")[2] == "lm_head"


def _flat(names: object, depth: int = 0) -> Iterable[str]:
    if isinstance(names, str):
        yield names
    elif isinstance(names, list) and depth < 3:
        for name in names:
            yield from _flat(name, depth + 1)
