"""Made-up files of the two published layouts, and what a replay's outputs print of them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHECKPOINTS = {"awq": "q/awq", "awq_marlin": "q/awq", "gptq": "q/gptq", "gptq_marlin": "q/gptq", "torchao": "q/torchao"}
Row = Mapping[int, float]  # id -> logprob, in the order of the file


def reference(
    index: int, length: int, generated: Sequence[int], prefill: Mapping[int, Row], decode: Mapping[int, Row]
) -> dict[str, Any]:  # fmt: skip
    """One reference of one format; rows by position, counted from the end (-1: the last)."""

    def signals(rows: Mapping[int, Row]) -> dict[str, Any]:
        return {
            f"pos_{at}": {"logprobs": {"token_ids": list(row), "log_probs": list(row.values())}} for at, row in rows.items()
        }

    return {
        "ref_idx": index, "prompt_length": length, "generated_ids": list(generated), "prefill_signals": signals(prefill),
        "decode_signals": signals(decode),
    }  # fmt: skip


def generation(folder: Path, formats: Mapping[str, Sequence[dict[str, Any]]], top_k: int = 2) -> Path:
    """A file of the generation layout, on an H100."""
    configs = {name: {"model_name": CHECKPOINTS[name], "quantization": name, "dtype": "float16"} for name in formats}
    environment = {"gpu_name": "NVIDIA H100 80GB HBM3", "vllm_version": "0.11.2"}
    metadata = {"environment": environment, "model_configs": configs, "top_k_logprobs": top_k}
    path = folder / "made_generation.json"
    path.write_text(json.dumps({"metadata": metadata, "generations": dict(formats)}), encoding="utf-8")
    return path


def investigation(folder: Path, name: str, runs: Sequence[tuple[Sequence[int], Sequence[float]]]) -> Path:
    """A file of the investigation layout: ids and logprobs of each repeat."""
    baseline = {"tokens": [list(ids) for ids, _ in runs], "logprobs": [list(values) for _, values in runs]}
    written = {
        "variant": name, "quantization": name, "model": CHECKPOINTS[name], "prompt_length": 12,
        "config": {"repetitions": len(runs)}, "baseline": baseline,
    }  # fmt: skip
    path = folder / f"{name}_investigation.json"
    path.write_text(json.dumps(written), encoding="utf-8")
    return path


def matrix(output: str, heading: str, metric: str) -> dict[tuple[str, str], str]:
    """The cells of a matrix on the terminal, by row and column; a blank one is empty. Nothing where it is not printed."""
    lines = output.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith(heading)), None)
    if start is None:
        return {}
    end = next((n for n, line in enumerate(lines[start + 1 :], start + 1) if re.match(r"[A-Z]{4}|kernel|==", line)), len(lines))
    head = next((n for n, line in enumerate(lines[start:end], start) if line.startswith(f"{metric} ")), None)
    if head is None:
        return {}
    starts = [len(metric) + found.start() for found in re.finditer(r"\S+", lines[head][len(metric) :])]
    ends = [*starts[1:], None]
    rows = []
    for line in lines[head + 1 : end]:
        if not re.match(r"[a-z_0-9]+\s", line) or ":" in line:
            break
        rows.append(line)
    names = [line.split()[0] for line in rows]
    assert len(names) == len(starts), rows
    return {
        (name, names[n]): line[at:end].strip()
        for name, line in zip(names, rows, strict=True)
        for n, (at, end) in enumerate(zip(starts, ends, strict=True))
    }


def tokens(output: str) -> dict[tuple[str, str], tuple[str, str, str]]:
    """The rows of GENERATED TOKENS by pair: L2, largest difference, where the tokens part."""
    found = re.findall(r"^(\w+) \| (\w+) +([\d.e+-]+) ([\d.e+-]+) (the same|part at step \d+)$", output, re.MULTILINE)
    return {(a, b): (l2, largest, apart) for a, b, l2, largest, apart in found}


def figures(text: str) -> dict[str, str]:
    """The `name=value` of a property."""
    return dict(part.split("=", 1) for part in text.split() if "=" in part)
