"""Packages that are hidden from the engine's process, because they break or block it and text models need none of them."""

import sys

# Builds of these that do not match torch break `import vllm`.
ALWAYS = ("torchvision", "torchaudio", "torchcodec")
# transformers imports an installed torchao, whose import initialises CUDA: not in a server whose children are forked.
IN_FORKSERVER = (*ALWAYS, "torchao")


def hide(names: tuple[str, ...]) -> None:
    """Make `import NAME` fail, and `find_spec(NAME)` find nothing, for what is not imported yet."""
    for name in names:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
