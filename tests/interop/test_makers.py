"""Checkpoints that makers' own tools wrote: each projection is decoded to near the unquantized weights, and vLLM runs them.

auto-round can be installed beside vLLM without another version of anything: `pip install auto-round==0.16.1`.
"""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantdet.checkpoints import Unavailable, numbers, resolve, tensors
from quantdet.checkpoints.decoding import decoder, unpacked
from quantdet.matrix.load import load

pytest.importorskip("vllm")

HERE = Path(__file__).parent
TESTS = HERE.parent


@dataclass(frozen=True)
class Made:
    """A folder that a tool wrote, the unquantized one that it was given, and a prompt with the token that must follow."""

    folder: Path
    base: Path
    prompt: tuple[int, ...]
    answer: int | None


# "The capital of France is" and "Paris" by their ids. Tokens of generated weights mean nothing.
TOOLS: dict[str, tuple[str, tuple[int, ...], int | None]] = {
    "compressed-tensors": ("smollm2-135m", (504, 3575, 282, 4649, 314), 7042),
    "auto-round": ("tiny-qwen3", (5, 6, 7, 8, 9), None),
}


@pytest.fixture(scope="module", params=TOOLS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """What one tool makes of its model; skipped where the tool or the weights are not here."""
    tool: str = request.param
    model, prompt, answer = TOOLS[tool]
    try:
        metadata.version(tool)
    except metadata.PackageNotFoundError:
        pytest.skip(f"need the package {tool}, have none")
    folder = tmp_path_factory.mktemp(tool)
    matrix = load(TESTS.parent / "quant_matrix.toml")
    try:
        base = resolve(model, matrix.models[model], matrix.formats["bf16"], cache=folder / "cache").path
    except Unavailable as error:
        pytest.skip(str(error))
    run(tool, str(base), str(folder / "made"))
    (config,) = (folder / "made").rglob("config.json")  # auto-round makes a folder of its own in the one that it is given
    return Made(config.parent, base, prompt, answer)


def run(*arguments: str) -> str:
    """What `maker.py` prints, in a process of its own, where packages that break `import vllm` are hidden."""
    paths = [str(TESTS / "quantdet/engines/process/shim"), str(TESTS)]
    variables = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    command = [sys.executable, str(HERE / "maker.py"), *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_numbers_are_near_the_unquantized_weights(made: Made) -> None:
    """Decoded, and no zero point or nibble is off by one: that alone would be an error of 0.3, rounding is one of 0.1."""
    assert numbers.of(made.folder, tensors.tensors_sha256(made.folder)).startswith("decoded:")
    decode = decoder(numbers.settings(made.folder))
    projections, _ = decode.split(tensors.load_folder(made.folder))
    base = tensors.load_folder(made.base)
    layers = json.loads((made.base / "config.json").read_text())["num_hidden_layers"]

    assert len(projections) == 7 * layers
    for name, stored in projections.items():
        parts: dict[str, Any] = dict(decode.module(name, stored))
        assert parts["integers"] == "4 bit" and parts["zero points"] == "none: symmetric"
        weights = base[f"{name}.weight"].astype(np.float64)
        codes = unpacked(parts["codes"], 4).astype(np.float64) - 8
        decoded = codes * np.repeat(parts["scales"], codes.shape[1] // parts["scales"].shape[1], axis=1)
        assert np.linalg.norm(decoded - weights) < 0.2 * np.linalg.norm(weights), name


def test_vllm_runs_it(made: Made) -> None:
    """Every projection in one kernel, which is none of plain weights, and what real weights say is still said."""
    seen = json.loads(run("generate", str(made.folder), *map(str, made.prompt)).splitlines()[-1])
    config = json.loads((made.folder / "config.json").read_text())

    ((kernel, layers),) = seen["kernels"].items()  # which one is the machine's matter
    assert kernel.endswith("Kernel") and layers == 4 * config["num_hidden_layers"]
    assert all(0 <= token < config["vocab_size"] for token in seen["tokens"])
    if made.answer is not None:
        assert made.answer in seen["tokens"]


def test_model_judges_it_alone(made: Made, tmp_path: Path) -> None:
    """One command, nothing edited: repeatable, and the kernel that ran is the one for what the checkpoint stores."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "QUANTDET_", "GITHUB_"))}
    report = tmp_path / "report.xml"
    options = ["--no-controls", "--no-hidden-states", f"--store={tmp_path / 'store'}", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", f"--model={made.folder}", "-k", "test_repeat or test_kernel", *options]
    done = subprocess.run(command, cwd=TESTS.parent, env=clean, capture_output=True, text=True, check=False, timeout=600)

    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = [str(one.get("value")) for one in ET.parse(report).getroot().iter("property") if one.get("name") == "verdict"]
    assert sorted(verdicts) == ["BIT_EXACT", "BIT_EXACT", "CONFIRMED"]
