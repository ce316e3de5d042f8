"""What a user's own checkpoint says of itself: a folder, a `.gguf` file, or a repository in the local hub cache.

Headers and configuration alone are read, no tensor's data; all of it is somebody else's. Whether the tensors are what is said
here is asked in `flaws`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantdet.checkpoints import gguf_header, hub, numbers
from quantdet.checkpoints.errors import Unavailable
from quantdet.checkpoints.schemes import Scheme, scheme, vllm_method
from quantdet.checkpoints.tensors import INDEX_NAME, read_header
from quantdet.matrix.cell import ID_PATTERN
from quantdet.matrix.rows import Activations, Layout, Weights
from quantdet.untrusted import flaw, parse_json, plain, read_bounded

_MAX_CONFIG_BYTES = 16 << 20
_MAX_INDEX_BYTES = 64 << 20
_LONGEST_ID = 40
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)*)?")
_SNAPSHOT = re.compile(r"models--.+?--(?P<name>[^/]+)/snapshots/[^/]+$")
_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_STORED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_TOKENIZERS = (
    ("tokenizer.json",), ("tokenizer.model",), ("tokenizer_config.json",), ("vocab.json", "merges.txt"), ("vocab.txt",),
    ("tekken.json",),
)  # fmt: skip
_MOST_NAMED = 3


class Mistaken(Exception):
    """A checkpoint that cannot be described. `mistakes`: all of them, each what is needed and what is there."""

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


@dataclass(frozen=True)
class Described:
    """What a checkpoint says of itself.

    Attributes:
        path: the folder, or the `.gguf` file.
        source: where it is from, "folder NAME", "file NAME" or "hub ORG/NAME@COMMIT".
        id: of its name, as ids of the matrix are written, at most 40 characters.
        settings: how it is quantized, as its maker wrote it; empty: it is not.
        settings_file: which file has that; of GGUF its own.
        method: vLLM's word for that ("gptq"); "": unquantized.
        short: the scheme in a few letters, as a format's id ("gptq-int4-g128", "ct-mixed", "bf16").
        layout, weights, activations: the matrix's words, where all modules have one scheme and it has such; else None.
        group_size: None: a scale for a row, tensor or block, several sizes, or unquantized.
        declared_dtype: "bfloat16" and the like, as its configuration or else its plain tensors have it; None: not told.
        dtype: what vLLM takes without being told: the declared one, of float32 bfloat16; None: not told.
        vocab_size, max_positions: None: not told.
        tokenizer: whether there is one beside the weights; of GGUF, inside.
        experts: whether its feed-forward networks are mixtures.
        size_bytes: of the files with weights.
        architecture: the first class that it names; "": none.
        kv_cache: how its KV cache is quantized, in words; "": it does not say.
    """

    path: Path
    source: str
    id: str
    settings: Mapping[str, Any] = field(repr=False)
    settings_file: str
    method: str
    short: str
    layout: Layout | None
    weights: Weights | None
    activations: Activations | None
    group_size: int | None
    declared_dtype: str | None
    vocab_size: int | None
    max_positions: int | None
    tokenizer: bool
    experts: bool
    size_bytes: int
    architecture: str
    kv_cache: str

    @property
    def dtype(self) -> str | None:
        return "bfloat16" if self.declared_dtype == "float32" else self.declared_dtype


def read(spec: str, relative_to: Path, *, allow_download: bool = False) -> Described:
    """What a checkpoint says of itself.

    Args:
        spec: an existing folder or `.gguf` file (`~` is the home folder), else `ORG/NAME` or `ORG/NAME@REVISION` of the hub.
        relative_to: the folder that relative paths start from.
        allow_download: whether the hub may be asked for what its local cache lacks.

    Raises:
        Mistaken: it is not here, or what is here is no checkpoint; with every mistake that was found.
    """
    path, source = _found(spec, relative_to, allow_download)
    if path.is_dir() and not (path / "config.json").exists() and len(files := list(path.glob("*.gguf"))) == 1:
        path = files[0]
    return _gguf(path, source) if path.is_file() else _folder(path, source)


def _found(spec: str, relative_to: Path, allow_download: bool) -> tuple[Path, str]:
    try:
        path = relative_to / Path(spec).expanduser()
        there, file = path.exists(), path.is_file()
    except (OSError, ValueError, RuntimeError):  # a name that no file has, a home that nobody has
        path, there, file = relative_to, False, False
    if there and spec:
        if file and path.suffix != ".gguf":
            raise Mistaken([f"{plain(spec)}: need a folder or a .gguf file, have another file"])
        return path, f"{'file' if file else 'folder'} {plain(path.resolve().name)}"
    if spec.startswith(("/", ".", "~")) or spec.endswith(".gguf"):
        raise Mistaken([f"{plain(spec)}: need a folder with a checkpoint or a .gguf file, have none of this name"])
    if not _REPOSITORY.fullmatch(spec):
        raise Mistaken([f"{plain(spec)!r}: need an existing folder, a .gguf file or ORG/NAME[@REVISION], have neither"])
    try:
        path, measured = hub.snapshot(spec, allow_download=allow_download)
    except Unavailable as error:
        raise Mistaken([str(error)]) from None
    return path, f"hub {measured}"


def _folder(path: Path, source: str) -> Described:
    mistakes: list[str] = []
    config = _config(path, mistakes)
    weights = _weights(path, mistakes)
    place, settings = "", dict[str, Any]()
    try:
        place, settings = numbers.settings_in(path) if config is not None else (place, settings)
    except (OSError, ValueError) as error:
        mistakes.append(f"need quantization settings in JSON, have {_reason(error)}")
    told = config or {}
    if not isinstance(told.get("quantization_config") or {}, dict) or not isinstance(settings.get("quant_method", ""), str):
        mistakes.append("need quantization settings as an object with a text quant_method, have others")
    figures = {name: _positive(told, name, mistakes) for name in ("vocab_size", "max_position_embeddings")}
    if mistakes:
        raise Mistaken([plain(f"{source}: {mistake}") for mistake in mistakes])
    dtype = _dtype(told) or _stored_dtype(weights)
    one = scheme(settings) if settings else _unquantized(dtype)
    return Described(
        path=path, source=source, id=_id(path, source), settings=settings, settings_file=place,
        method=vllm_method(settings), short=one.short, layout=one.layout, weights=one.weights, activations=one.activations,
        group_size=one.group_size,
        declared_dtype=dtype, vocab_size=figures["vocab_size"], max_positions=figures["max_position_embeddings"],
        tokenizer=any(all((path / name).is_file() for name in names) for names in _TOKENIZERS),
        experts=any(isinstance(count, int) and count > 1 for count in (_either(told, name) for name in _EXPERTS)),
        size_bytes=sum(file.stat().st_size for file in weights),
        architecture=next(_texts(told.get("architectures")), ""), kv_cache=_kv_cache(settings),
    )  # fmt: skip


def _config(path: Path, mistakes: list[str]) -> dict[str, Any] | None:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            mistakes.append("need a whole model, have a LoRA adapter alone (adapter_config.json): merge it into its base")
        else:
            mistakes.append("need config.json, have none")
        return None
    try:
        config = parse_json(read_bounded(path / "config.json", _MAX_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        mistakes.append(f"need JSON in config.json, have {_reason(error)}")
        return None
    if not isinstance(config, dict):
        mistakes.append(f"need an object in config.json, have {type(config).__name__}")
        return None
    wrong = flaw(config)
    if wrong is not None:
        mistakes.append(f"config.json: {wrong[0]} {wrong[1]}")
        return None
    return config


def _weights(path: Path, mistakes: list[str]) -> list[Path]:
    """The files with weights: those that the index names, else all."""
    there = {file.name: file for file in sorted(path.glob("*.safetensors")) if not file.name.startswith("adapter_")}
    if (path / INDEX_NAME).is_file():
        try:
            named = sorted(
                {str(name) for name in parse_json(read_bounded(path / INDEX_NAME, _MAX_INDEX_BYTES))["weight_map"].values()}
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            mistakes.append(f"need a weight_map in {INDEX_NAME}, have {_reason(error)}")
            return []
        gone = [name for name in named if name not in there]
        if gone:
            more = f" and {len(gone) - _MOST_NAMED} more" if len(gone) > _MOST_NAMED else ""
            mistakes.append(f"need the {len(named)} files that {INDEX_NAME} names, have {len(named) - len(gone)}: lacks "
                            f"{', '.join(name[:100] for name in gone[:_MOST_NAMED])}{more}")  # fmt: skip
        return [there[name] for name in named if name in there]
    if not there:
        pickles = any(file for kind in ("*.bin", "*.pt", "*.pth") for file in path.glob(kind))
        have = "pickles, which run code" if pickles else "none"
        have = ".gguf files: name one of them" if not pickles and any(path.glob("*.gguf")) else have
        if have != "none" or not (path / "adapter_config.json").is_file():
            mistakes.append(f"need *.safetensors, have {have}")
    return list(there.values())


def _positive(config: Mapping[str, Any], name: str, mistakes: list[str]) -> int | None:
    found = _either(config, name)
    if found is None or (isinstance(found, int) and not isinstance(found, bool) and found > 0):
        return found
    mistakes.append(f"config.json: {name}: need a positive integer, have {found!r:.40}")
    return None


def _either(config: Mapping[str, Any], name: str) -> Any:
    """A value of the configuration, or of its text part (models with vision)."""
    inner = config.get("text_config")
    return config[name] if config.get(name) is not None else inner.get(name) if isinstance(inner, dict) else None


def _dtype(config: Mapping[str, Any]) -> str | None:
    told = (str(_either(config, name)).removeprefix("torch.") for name in ("dtype", "torch_dtype"))
    return next((dtype for dtype in told if dtype in _DTYPES), None)


def _stored_dtype(weights: list[Path]) -> str | None:
    """What most bytes of the first file's plain tensors are; None: it has none, or cannot be read, which `flaws` tells."""
    sizes: dict[str, int] = {}
    try:
        for entry in read_header(weights[0]).values():
            if entry.dtype in _STORED:
                sizes[_STORED[entry.dtype]] = sizes.get(_STORED[entry.dtype], 0) + entry.end - entry.start
    except (OSError, ValueError, IndexError):
        return None
    return max(sizes, key=lambda name: sizes[name]) if sizes else None


def _unquantized(dtype: str | None) -> Scheme:
    return Scheme(_DTYPES[dtype] if dtype else "unquantized", None, "plain", "bf16", "none")


def _kv_cache(settings: Mapping[str, Any]) -> str:
    own = settings.get("quantization")
    for name, place in (("kv_cache_scheme", settings), ("kv_cache_quant_algo", own if isinstance(own, dict) else settings)):
        found = place.get(name)
        if isinstance(found, dict):
            static = "" if found.get("dynamic") else ", static"
            return plain(f"{found.get('num_bits')}-bit {found.get('type')}, {found.get('strategy')}{static}")[:80]
        if isinstance(found, str) and found:
            return plain(found)[:80]
    return ""


def _gguf(path: Path, source: str) -> Described:
    try:
        header = gguf_header.read(path)
    except (OSError, ValueError) as error:
        raise Mistaken([f"{source}: need a GGUF file, have {_reason(error)}"]) from None
    family = str(header.values.get("general.architecture", ""))
    types = sorted({kind for kind, _ in header.tensors.values()})
    word = gguf_header.file_type(header)
    short = _slug(f"gguf-{word.replace('_', '-')}" if word else "gguf")

    def figure(name: str) -> int | None:
        found = header.values.get(f"{family}.{name}")
        return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None

    tokens = header.values.get("tokenizer.ggml.tokens")
    return Described(
        path=path, source=source, id=_id(path, source), settings={"quant_method": "gguf", "file_type": word, "types": types},
        settings_file=path.name, method="gguf", short=short, layout=None, weights=None, activations=None, group_size=None,
        declared_dtype=None,
        vocab_size=figure("vocab_size") or (tokens if isinstance(tokens, int) and tokens > 0 else None),
        max_positions=figure("context_length"), tokenizer=bool(tokens), experts=(figure("expert_count") or 0) > 1,
        size_bytes=path.stat().st_size, architecture=plain(family)[:80], kv_cache="",
    )  # fmt: skip


def _id(path: Path, source: str) -> str:
    """An id of the matrix, of the folder's, the file's or the repository's name."""
    if source.startswith("hub "):
        return _slug(source.partition("@")[0].rpartition("/")[2])
    whole = path.absolute()
    snapshot = _SNAPSHOT.search(whole.as_posix())  # a folder of the hub cache is named by its commit
    return _slug(snapshot["name"] if snapshot else whole.resolve().name.removesuffix(".gguf"))


def _slug(name: str) -> str:
    text = re.sub(r"[^a-z0-9._-]+", "-", name.lower())[:_LONGEST_ID].strip("-._")
    return text if ID_PATTERN.fullmatch(text) else "checkpoint"


def _texts(found: object) -> Iterator[str]:
    yield from (text for text in (found if isinstance(found, list) else ()) if isinstance(text, str))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
