"""Tiny checkpoints of every layout, and copies of them in which something is different."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from quantdet.checkpoints import Checkpoint, resolve
from quantdet.checkpoints.tensors import load_folder, save
from selftest.fakes.checkpoints import make_format, make_model

SPEC = {
    "architecture": "qwen3", "seed": 3, "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256,
    "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32,
}  # fmt: skip
# One of every layout and set of numbers that `checkpoints.layouts` writes.
LAYOUTS = [
    ("plain", "bf16", "none"), ("gptq", "int4-sym", "none"), ("gptq", "int8-sym", "none"), ("awq", "int4-asym", "none"),
    ("ct", "int4-sym", "none"), ("ct", "int4-asym", "none"), ("ct", "int8-sym", "none"), ("ct", "int8-asym", "none"),
    ("ct", "int8-channel", "int8"), ("ct", "fp8-channel", "fp8"), ("ct", "fp8-channel", "none"), ("ct", "nvfp4", "none"),
    ("ct", "nvfp4", "fp4"), ("ct", "mxfp4", "none"), ("ct", "mxfp8", "mxfp8"), ("fp8", "fp8-tensor", "fp8"),
    ("fp8", "fp8-block", "fp8"), ("bnb", "nf4", "none"), ("bnb", "bnb-int8", "int8"),
]  # fmt: skip
Q, Q1 = (f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))
Edit = Callable[[dict[str, Any], dict[str, Any]], None]  # of tensors, and of the quantization settings


def made(cache: Path, layout: str, weights: str, activations: str = "none", *, group: int = 64, **spec: Any) -> Checkpoint:
    """A tiny checkpoint with groups of 64."""
    model = make_model(group, synthetic={**SPEC, **spec})
    return resolve("tiny", model, make_format(layout, weights, activations), cache=cache)


def edited(source: Path, target: Path, edit: Edit) -> Path:
    """A copy of a checkpoint whose tensors and quantization settings `edit` has changed."""
    target.mkdir()
    tensors = {name: np.array(array) for name, array in load_folder(source).items()}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    settings = config.get("quantization_config", {})
    edit(tensors, settings)
    if settings:
        config["quantization_config"] = settings
    save(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def sharded(source: Path, target: Path, *, index: bool = True) -> dict[str, str]:
    """A copy in two files, with an index or without; returns the file of each tensor."""
    target.mkdir()
    tensors = load_folder(source)
    names = sorted(tensors)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, some in parts.items():
        save({name: tensors[name] for name in some}, target / file)
    shutil.copyfile(source / "config.json", target / "config.json")
    where = {name: file for file, some in parts.items() for name in some}
    if index:
        write_index(target, where)
    return where


def write_index(folder: Path, where: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")
