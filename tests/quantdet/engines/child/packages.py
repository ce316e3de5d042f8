"""Packages that are hidden from the engine's process, because they break or block it and text models need none of them."""

import contextlib
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path


def version(distribution: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def module_is_here(name: str) -> bool:
    """Whether a module is installed; the parents of a submodule are not imported, its file is looked for."""
    top, *rest = name.split(".")
    with contextlib.suppress(ValueError):  # a module without a spec
        spec = find_spec(top)
        if spec is not None and rest:
            places = [Path(root, *rest) for root in spec.submodule_search_locations or ()]
            return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)
        return spec is not None
    return False


# A package index serves CUDA builds of these; beside a CPU build of torch they break `import vllm`. Beside a CUDA build
# they stay: vLLM 0.26 imports torchvision while it warms up.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
# transformers imports an installed torchao, whose import initialises CUDA: not in a server whose children are forked.
NOT_IN_FORKSERVER = ("torchao",)


def broken() -> tuple[str, ...]:
    """The companions of torch that are not built for the torch that is installed."""
    return COMPANIONS if "+cpu" in _version("torch") and not all("+cpu" in _version(name) for name in COMPANIONS) else ()


def in_forkserver() -> tuple[str, ...]:
    """What is hidden from a server and its children."""
    return (*broken(), *NOT_IN_FORKSERVER)


def hide(names: tuple[str, ...]) -> None:
    """Make `import NAME` fail, and `find_spec(NAME)` find nothing, for what is not imported yet."""
    for name in names:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def hidden() -> tuple[str, ...]:
    """What is hidden from this process."""
    return tuple(name for name in (*COMPANIONS, *NOT_IN_FORKSERVER) if sys.modules.get(name, 0) is None)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
