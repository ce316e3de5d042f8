"""Why numbers of a checkpoint would not be those of its row: what it says of itself, and what its tensors are."""

from pathlib import Path

from quantdet.checkpoints import Checkpoint
from quantdet.checkpoints.described import Mistaken, read
from quantdet.checkpoints.flaws import flaws
from quantdet.matrix.rows import Format, Layout

_LAYOUTS: dict[str, Layout] = {
    "": "plain", "gptq": "gptq", "awq": "awq", "compressed-tensors": "ct", "fp8": "fp8", "bitsandbytes": "bnb",
    "torchao": "torchao",
}  # fmt: skip
_MOST_TOLD = 3


def unsound(found: Checkpoint, format_: Format, cache: Path) -> str:
    """What is wrong with a checkpoint that somebody else made, in one line; empty: nothing.

    Args:
        cache: a folder that remembers what was found of which tensors.
    """
    reasons = list(flaws(found.path, found.sha256, cache))
    return told(reasons) if reasons else contradiction(found.path, format_)


def told(reasons: list[str]) -> str:
    """Reasons as one line."""
    more = f"; and {len(reasons) - _MOST_TOLD} more" if len(reasons) > _MOST_TOLD else ""
    return f"the checkpoint contradicts itself: {'; '.join(reasons[:_MOST_TOLD])}{more}"


def contradiction(path: Path, format_: Format) -> str:
    """Where the row's layout, weights or activations are not those that the checkpoint's configuration names; empty: nowhere.

    A scheme that the matrix has no words for is left to the engine.
    """
    if format_.layout == "own":
        return ""
    try:
        own = read(str(path.absolute()), path.parent)
    except Mistaken as error:
        return "; ".join(error.mistakes)
    layout = own.layout or _LAYOUTS.get(own.method)
    if layout != format_.layout:
        return f"the row needs layout {format_.layout}, the checkpoint has {own.method or 'no quantization'}"
    words = ("weights", "activations") if layout != "plain" and own.weights is not None else ()
    other = [
        f"{word} {getattr(format_, word)}, the checkpoint has {getattr(own, word)}"
        for word in words
        if getattr(format_, word) != getattr(own, word)
    ]
    return f"the row needs {' and '.join(other)}" if other else ""
