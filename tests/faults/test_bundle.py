"""A seeded defect on real vLLM: the diagnosis names the layer that has it, and the bundle's script runs without this suite."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantdet.observation import read
from quantdet.report import repro

pytest.importorskip("vllm")

ROOT = Path(__file__).resolve().parents[2]
LAYER = "model.layers.0.mlp.down_proj"  # the last linear layer of the first half of tiny-qwen3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of tiny-qwen3/bf16 with noise in one layer, and the output of the run beside it."""
    folder = tmp_path_factory.mktemp("bundle")
    variables = {**os.environ, "QUANTDET_INJECT": "noise:bf16", "CI": "1"}
    variables.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "tiny-qwen3/bf16/ and test_repeat and decode",
         f"--store={folder / 'store'}", f"--report={folder / 'report'}", f"--junitxml={folder / 'report.xml'}"],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    (folder / "output").write_text(done.stdout + done.stderr)
    found = list((folder / "report" / "bundles").glob("tiny-qwen3.bf16.*"))
    assert 1 == done.returncode and 1 == len(found), done.stdout + done.stderr
    return found[0]


def test_the_diagnosis_names_the_layer_with_the_defect(bundle: Path) -> None:
    """NOISY, and of all layers that then differ the first one is named: in the bundle, the message and the JUnit file."""
    layers = json.loads((bundle / "layers.json").read_text())

    found = layers["diagnosis"]
    assert ("found", LAYER, "decode step 1") == (found["status"], found["layer"]["name"], found["layer"]["step"])
    assert ("linear", "UnquantizedLinearMethod") == (found["layer"]["kind"], found["layer"]["kernel"])
    assert (1, {LAYER: 1}) == (found["differ"], found["first_in"])
    traced = {module["kind"] for module in layers["trace"]["modules"]}
    assert {"linear", "attention", "norm", "activation", "embedding", "logits"} <= traced
    output = (bundle.parents[2] / "output").read_text()
    assert re.search(rf"^first divergent layer: {re.escape(LAYER)} \(", output, re.MULTILINE), output
    assert f'name="first_divergent_layer" value="{LAYER} (' in (bundle.parents[2] / "report.xml").read_text()
    assert f"## First divergent layer\n\n{LAYER} (" in (bundle / "README.md").read_text()


def test_the_script_gives_the_bits_that_were_measured(bundle: Path, tmp_path: Path) -> None:
    """As a plain script, elsewhere, without the suite and without the defect: no repeat differs, and the digest is repeat 0's."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "QUANTDET_INJECT")}
    done = subprocess.run(
        [sys.executable, str(bundle / "repro.py"), "--repeats", "2"],
        cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert 0 == done.returncode, done.stdout + done.stderr
    (folder,) = [path.parent for path in (bundle / "observations").rglob("observation.json")]
    observation = read(folder)
    digest = {phase: repro.digest(observation, 0, 0, phase) for phase in ("decode", "prefill")}
    for repeat in (0, 1):
        assert f"repeat {repeat}: decode {digest['decode']}, prefill {digest['prefill']}" in done.stdout, done.stdout
    assert "0 of 2 repeats differ" in done.stdout
