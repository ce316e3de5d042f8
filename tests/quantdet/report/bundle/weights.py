"""The weights of a bug bundle: copied if they are small and made up, described otherwise, or named by their id."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantdet.checkpoints import Checkpoint
from quantdet.checkpoints import tensors as files
from quantdet.matrix.models import Model
from quantdet.matrix.rows import Format

COPY_BYTES = 64 << 20
_SAMPLE = 1 << 20
_COPIED_ELEMENTS = 256
# Tensors that say how others are to be read; random ones would point outside of them.
_INDEX = ("g_idx", "weight_shape")


@dataclass(frozen=True)
class Weights:
    """What the repro script loads, and a sentence about it.

    `model`: a folder of the bundle, a path, a hub's `ORG/NAME@COMMIT`, or None.
    """

    model: str | None
    sentence: str


def place(model: Model, format_: Format, checkpoint: Checkpoint, folder: Path, limit: int = COPY_BYTES) -> Weights:
    """Put what a repro needs of `checkpoint` into the bundle `folder`.

    Generated weights of at most `limit` bytes are copied. Larger ones, and those that were quantized here from somebody's
    weights, are described (`describe`), so that no bundle carries off a model. What others can get by its name is named.
    """
    if model.hub is not None:
        name = checkpoint.source.removeprefix("hub ")
        return Weights(name, f"`{name}`, tensors' SHA-256 `{checkpoint.sha256}`.")
    if model.path is not None and format_.layout == "plain":
        return Weights(
            str(model.path), f"the folder `{model.path}` (not in the bundle), tensors' SHA-256 `{checkpoint.sha256}`."
        )
    size = sum(path.stat().st_size for path in files.files(checkpoint.path))
    target = folder / "checkpoint"
    if model.synthetic is not None and size <= limit:
        shutil.copytree(checkpoint.path, target, ignore=shutil.ignore_patterns(".*", "checkpoint.json"))
        return Weights("checkpoint", f"in `checkpoint/`: {checkpoint.source}, tensors' SHA-256 `{checkpoint.sha256}`.")
    target.mkdir()
    shutil.copy(checkpoint.path / "config.json", target)  # no tokenizer: the script gives token ids
    described, copied = describe(checkpoint.path)
    (folder / "weights.json").write_text(json.dumps(described, indent=0) + "\n", encoding="utf-8")
    if copied:
        files.save(copied, folder / "copied.safetensors")
    return Weights(
        "checkpoint",
        f"made by `repro.py` at its first run ({size / 2**20:.0f} MiB): **the same tensor names, shapes and dtypes, random "
        f"numbers**. Kernels depend on shapes; digests will differ from those in this report. The numbers that were measured "
        f"are {checkpoint.source}, tensors' SHA-256 `{checkpoint.sha256}`.",
    )


def describe(folder: Path) -> tuple[dict[str, Any], dict[str, files.Array]]:
    """`weights.json` of a checkpoint, and the tensors that are copied because others are read by them.

    Integers are drawn evenly between the smallest and the largest, floats from a normal distribution of the same mean and
    standard deviation within the same bounds; of a large tensor these are those of about a million evenly spaced elements.
    """
    rows: dict[str, Any] = {}
    copied: dict[str, files.Array] = {}
    for name, array in sorted(files.load_folder(folder).items()):
        word = files.word(array.dtype)
        row: dict[str, Any] = {"dtype": word, "shape": list(array.shape)}
        if array.size <= _COPIED_ELEMENTS or name.endswith(_INDEX):
            copied[name] = array
            rows[name] = {**row, "rule": "copied"}
            continue
        flat = array.reshape(-1)
        sample = flat[:: max(1, array.size // _SAMPLE)]
        if array.dtype.kind in "iub":
            low, high = int(sample.min()), int(sample.max())
            if low == high and bool((flat == flat[0]).all()):
                rows[name] = {**row, "rule": "constant", "value": low}
            else:
                rows[name] = {**row, "rule": "integers", "range": [low, high]}
            continue
        exact = sample.astype(np.float64)
        figures = {"mean": float(exact.mean()), "std": float(exact.std()), "range": [float(exact.min()), float(exact.max())]}
        rows[name] = {**row, "rule": "normal", **figures}
    return {"seed": 0, "tensors": rows}, copied
