"""Why a checkpoint cannot be what it says that it is: every reason, each in a sentence; none for a whole one.

Three kinds, in this order. Of its files: an index that disagrees with them, a tensor in two of them, files that are cut off. Of
what its settings say: layouts, groups, bit widths and modules that the tensors contradict. Of values: NaN, scales of zero.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from quantdet.checkpoints import numbers, values
from quantdet.checkpoints.pool import in_order
from quantdet.checkpoints.rules import Rules
from quantdet.checkpoints.shapes import MISFITS, contradictions, quantized
from quantdet.checkpoints.tensors import INDEX_NAME, Array, Entry, load, read_header, word
from quantdet.untrusted import parse_json, plain, read_bounded

# Part of every key of the cache: raise it when another flaw is looked for.
VERSION = 3

_MAX_INDEX_BYTES = 64 << 20
_MOST_NAMED = 3
_MOST_FLAWS = 50
_KV_SCALE = re.compile(r"(?:^|[._])(?:k|v|kv)(?:_cache)?_scale$|[kv]_proj\.output_scale$")

_NARROW = ("F8_E4M3", "F8_E5M2", "I8", "U8", "I32")

_Found = tuple[str, str]  # what is wrong, and of which tensor or module


def flaws(folder: Path, tensors_sha256: str = "", cache: Path | None = None) -> tuple[str, ...]:
    """Every reason why a checkpoint folder cannot be what it says, in plain words; none for a whole one.

    One reason of many tensors is told once, with three of their names. Weights are read in pieces, by threads.

    Args:
        folder: a checkpoint folder. A file (.gguf) has no flaw that is known here.
        tensors_sha256: `tensors.tensors_sha256` of it, if it is known; with it, `cache` remembers what was found.
        cache: a folder that remembers flaws of tensors, by their hash and the settings.
    """
    if not folder.is_dir():
        return ()
    of_files, tensors = _of_files(folder)
    known = _remembered_at(folder, tensors_sha256, cache) if not of_files else None
    if known is not None and (found := _recalled(known)) is not None:
        return found
    found = tuple(plain(text) for text in (*of_files, *_of_tensors(folder, tensors)))
    if len(found) > _MOST_FLAWS:
        found = (*found[:_MOST_FLAWS], f"{len(found) - _MOST_FLAWS} more")
    if known is not None:
        _remember(known, found)
    return found


def _of_files(folder: Path) -> tuple[list[str], dict[str, Array]]:
    """Flaws of the files, and the tensors of those that can be read: those of the index, where there is one."""
    found: list[str] = []
    headers: dict[str, dict[str, Entry]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            headers[path.name] = read_header(path)
        except (OSError, ValueError) as error:
            reason = str(error).partition("not a valid safetensors file: ")[2] or type(error).__name__
            found.append(f"{path.name} is no whole safetensors file: {reason}")
    used = set(headers)
    if (folder / INDEX_NAME).is_file():
        named = _index(folder, found)
        used &= set(named.values())
        found += _against_index(folder, named, headers)
    places: dict[str, list[str]] = {}
    for name, header in ((name, header) for name, header in headers.items() if name in used):
        for tensor in header:
            places.setdefault(tensor, []).append(name)
    twice = [(f"stands in {' and '.join(where[:2])}", tensor) for tensor, where in places.items() if len(where) > 1]
    found += _told(twice)
    tensors: dict[str, Array] = {}
    for name in sorted(used):
        with contextlib.suppress(OSError, ValueError):
            tensors.update(load(folder / name))
    return found, tensors


def _index(folder: Path, found: list[str]) -> dict[str, str]:
    """The index's file of each tensor; what it does not say goes to `found`."""
    try:
        named = parse_json(read_bounded(folder / INDEX_NAME, _MAX_INDEX_BYTES))["weight_map"]
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            raise ValueError("weight_map gives no file for each tensor")
    except (OSError, ValueError, KeyError, TypeError) as error:
        found.append(f"{INDEX_NAME} is no index ({type(error).__name__}: {error})")
        return {}
    return named


def _against_index(folder: Path, named: Mapping[str, str], headers: Mapping[str, Mapping[str, Entry]]) -> Iterator[str]:
    gone = sorted({file for file in named.values() if Path(file).name != file or not (folder / file).is_file()})
    if gone:
        yield f"{INDEX_NAME} names files that are not here: {_some(gone)}"
    where = {tensor: file for file, header in headers.items() if file in set(named.values()) for tensor in header}
    rows: list[_Found] = []
    for tensor, file in named.items():
        if file not in headers or tensor in headers[file]:
            continue
        other = where.get(tensor)
        rows.append((f"stands in {other}, and {INDEX_NAME} says {file}" if other else f"is not in {file}, where the index "
                     "says that it is", tensor))  # fmt: skip
    for file in set(named.values()) & set(headers):
        rows += [
            (f"stands in {file}, and {INDEX_NAME} does not name it", tensor) for tensor in headers[file].keys() - named.keys()
        ]
    yield from _told(rows)


def _of_tensors(folder: Path, tensors: Mapping[str, Array]) -> Iterator[str]:
    """Flaws of what the settings say, then of values."""
    if not tensors:
        return
    try:
        settings = numbers.settings(folder)
        rules = Rules(settings)
    except (OSError, ValueError) as error:
        yield f"the quantization settings cannot be read ({type(error).__name__}: {error})"
        return
    modules = quantized(tensors)
    rows: list[_Found] = []
    misread: set[str] = set()  # their values would be read with settings that they do not have
    for module, parts in modules.items():
        wrong = contradictions(rules, module, parts)
        misread |= {module} if wrong else set()
        rows += [(text, module) for text in wrong]
        rows += [(text, module) for text in (_guarded(_left_out, rules, module),) if text]
    rows += _stored_plain(rules, tensors, modules)
    yield from _told(rows)
    yield from _of_the_whole(rules, settings, tensors, modules)
    yield from _told(_of_values(rules, tensors, modules, misread))


def _left_out(rules: Rules, module: str) -> str:
    return "is stored quantized, and the configuration leaves it out" if rules.method and rules.left_out(module) else ""


def _guarded(check: Callable[..., str], *given: Any) -> str:
    """What a check says; nothing where the settings do not fit it, which `contradictions` says."""
    try:
        return check(*given)
    except MISFITS:
        return ""


def _stored_plain(rules: Rules, tensors: Mapping[str, Array], modules: Mapping[str, Any]) -> Iterator[_Found]:
    """Modules with a plain weight whose namesakes in other layers are quantized, where no rule makes a difference."""
    patterns = {_any_layer(module) for module in modules}
    for name, array in tensors.items():
        module, _, local = name.rpartition(".")
        if local != "weight" or module in modules or array.ndim != 2 or _any_layer(module) not in patterns:
            continue
        try:
            free = rules.may_leave_out(module)
        except MISFITS:
            free = True
        if not free:
            narrow = word(array.dtype) in _NARROW
            how = f"as {word(array.dtype)} without scales" if narrow else "unquantized"
            yield f"is stored {how}, and the configuration quantizes it as in other layers", module


def _of_the_whole(
    rules: Rules, settings: Mapping[str, Any], tensors: Mapping[str, Array], modules: Mapping[str, Any]
) -> Iterator[str]:
    if settings and not rules.method:
        yield "the quantization settings have no quant_method"
    if rules.method in ("gptq", "awq", "compressed-tensors", "fp8") and not modules and _asks_for_weights(rules):
        yield f"the configuration says {rules.method}, and no tensor is stored quantized"
    cache = settings.get("kv_cache_scheme")
    static = isinstance(cache, dict) and cache.get("dynamic", False) is False
    if rules.method == "compressed-tensors" and static and not any(map(_KV_SCALE.search, tensors)):
        yield "kv_cache_scheme is static, and there is no k_scale or v_scale"


def _asks_for_weights(rules: Rules) -> bool:
    """Whether the settings quantize weights at all: compressed-tensors may speak of the KV cache alone."""
    if rules.method == "compressed-tensors":
        groups = rules.settings.get("config_groups")
        return isinstance(groups, dict) and any(isinstance(one, dict) and one.get("weights") for one in groups.values())
    return True


def _of_values(
    rules: Rules, tensors: Mapping[str, Array], modules: Mapping[str, Mapping[str, Array]], misread: set[str]
) -> list[_Found]:
    def of_module(module: str, parts: Mapping[str, Array]) -> list[_Found]:
        found = [(values.zero_scales(local, array, parts), f"{module}.{local}") for local, array in parts.items()]
        found.append((values.e8m0_nan(parts), f"{module}.weight_scale"))
        if module not in misread:
            found += [
                (_guarded(check, rules, module, parts), module) for check in (values.ignored_zero_points, values.out_of_range)
            ]
        return found

    def of_tensor(name: str, array: Array) -> list[_Found]:
        parent, _, local = name.rpartition(".")
        # Scales that belong to no quantized module: those of the KV cache.
        zero = values.zero_scales(local, array, {}) if parent not in modules else ""
        return [(values.not_finite(array), name), (zero, name)]

    jobs: list[Callable[[], list[_Found]]] = [partial(of_module, module, parts) for module, parts in modules.items()]
    jobs += [partial(of_tensor, name, array) for name, array in tensors.items()]
    with closing(in_order(iter(jobs))) as results:
        return [row for rows in results for row in rows if row[0]]


def _any_layer(module: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", module)


def _told(rows: Iterable[_Found]) -> Iterator[str]:
    """One sentence for each reason: those that differ in figures alone are one, told by its first.

    A pattern of the settings that was not tried, since it may take long, says nothing of the checkpoint.
    """
    grouped: dict[str, list[_Found]] = {}
    for text, name in ((text, name) for text, name in rows if "(ValueError: pattern " not in text):
        grouped.setdefault(re.sub(r"\d+", "#", text), []).append((text, name))
    for found in grouped.values():
        found.sort(key=lambda row: row[1])
        yield f"{_some([name for _, name in found])}: {found[0][0]}"


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:200] for name in names[:_MOST_NAMED])
    return f"{shown} and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else shown


def _remembered_at(folder: Path, tensors_sha256: str, cache: Path | None) -> Path | None:
    if cache is None or not tensors_sha256:
        return None
    try:
        canonical = json.dumps(numbers.settings(folder), sort_keys=True)
    except (OSError, ValueError):
        return None
    key = hashlib.sha256(f"flaws {VERSION}\0{tensors_sha256}\0{canonical}".encode()).hexdigest()
    return cache / ".flaws" / f"{key[:32]}.json"


def _recalled(path: Path) -> tuple[str, ...] | None:
    with contextlib.suppress(OSError, ValueError):
        found = parse_json(read_bounded(path, 1 << 20))
        if isinstance(found, list) and all(isinstance(text, str) for text in found):
            return tuple(found)
    return None


def _remember(path: Path, found: tuple[str, ...]) -> None:
    """A cache that cannot be written costs time, and no cell."""
    numbers.write_whole(path, json.dumps(found))
