"""Formats and models of small checkpoints."""

from typing import Any

from quantdet.matrix.models import Model
from quantdet.matrix.rows import Format

SPEC = {
    "architecture": "qwen3", "seed": 0, "vocab_size": 128, "hidden_size": 256, "intermediate_size": 384,
    "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64,
}  # fmt: skip


def make_format(layout: str, weights: str, activations: str = "none") -> Format:
    row = {
        "title": "x",
        "layout": layout,
        "weights": weights,
        "activations": activations,
        "kernel": "auto",
        "dtype": "bfloat16",
    }
    return Format.model_validate(row)


def make_model(group_size: int = 128, **source: Any) -> Model:
    source = source or {"synthetic": SPEC}
    row = {"title": "x", "workload": "w", "formats": ["*"], "group_size": group_size, **source}
    return Model.model_validate(row)


BF16 = make_format("plain", "bf16")
W4 = make_format("ct", "int4-sym")
