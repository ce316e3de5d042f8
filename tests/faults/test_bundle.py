"""A seeded defect on real vLLM: the diagnosis names the layer that has it, and the bundle's script runs without this suite."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from quantdet import checkpoints
from quantdet.matrix.models import Model
from quantdet.matrix.rows import Format
from quantdet.observations.observation import read
from quantdet.report.bundle import repro, weights

pytest.importorskip("vllm")

ROOT = Path(__file__).resolve().parents[2]
SPEC = {
    "architecture": "qwen3", "seed": 5, "vocab_size": 256, "hidden_size": 256, "intermediate_size": 384,
    "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 64,
}  # fmt: skip
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
    assert {"linear", "attention", "norm", "activation", "embedding", "rotary", "logits"} <= traced
    output = (bundle.parents[2] / "output").read_text()
    assert re.search(rf"^ *first divergent layer: {re.escape(LAYER)} \(", output, re.MULTILINE), output
    assert f'name="first_divergent_layer" value="{LAYER} (' in (bundle.parents[2] / "report.xml").read_text()
    assert f"## First divergent layer\n\n{LAYER} (" in (bundle / "README.md").read_text()


def test_the_script_gives_the_bits_that_were_measured(bundle: Path, tmp_path: Path) -> None:
    """As a plain script, elsewhere, without the suite and without the defect: no repeat differs; the digest is repeat 0's."""
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


# --------------------------------------------------------------------------------- the script itself, with a made-up engine

REQUEST = repro.Request(
    args={}, env={}, environment={}, dtype="bfloat16", prompt="p", ids=tuple(range(1, 12)), repeats=3, decode_tokens=4, top_k=2
)


def load(text: str, folder: Path) -> Any:
    """A script as a module."""
    path = folder / "repro.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("a_repro", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Engine:
    """Calls `compute_logits` as vLLM does: a block for the prompt, one row per token. `defect` edits the rows of a call."""

    def __init__(self, defect: Any = None) -> None:
        self.model = types.SimpleNamespace(compute_logits=lambda rows: rows, named_modules=list)
        self.defect = defect
        self.calls = 0

    def apply_model(self, function: Any) -> list[Any]:
        return [function(self.model)]

    def generate(self, requests: Any, parameters: Any, use_tqdm: bool) -> list[Any]:
        import torch

        generator = torch.Generator().manual_seed(0)
        for step, count in enumerate((len(REQUEST.ids), 1, 1, 1, 1)):  # one row more than asked, as model runner V2
            rows = torch.randn(count, 32, generator=generator).to(torch.bfloat16)
            if self.defect is not None:
                self.defect(self.calls, step, rows)
            self.model.compute_logits(rows)
        self.calls += 1
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[1, 2, 3, 4])])]


def flipped(call: int, step: int, rows: Any) -> None:
    import torch

    if (call, step) == (2, 3):  # step 0 is the prompt
        rows.view(torch.int16)[0, 7] ^= 1


def infinite(call: int, step: int, rows: Any) -> None:
    if step == 4:
        rows[0, 3] = float("nan")


@pytest.mark.parametrize(
    ("defect", "code", "words"),
    [
        (None, 0, r"0 of 3 repeats differ from repeat 0\n"),
        (
            flipped,
            1,
            r"repeat 2: DIFFERS, first at decode 2: token 7: 1 ulp of bfloat16, .*; 1 logits differ; top-1/top-2 margin",
        ),
        (infinite, 1, r"repeat 0: decode logits are not finite"),
    ],
)
def test_the_script_says_whether_repeats_differ(
    defect: Any, code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code, place and size of a flipped bit, in the repeat that has it."""
    import torch

    text = repro.script(REQUEST, title='a "title" \\ """', note="", model="checkpoint", hides=(), made=False, known=())
    module = load(text, tmp_path)
    vllm = types.SimpleNamespace(SamplingParams=lambda **given: given)
    module.engine = lambda model: (Engine(defect), vllm, torch)

    assert code == module.repeats(types.SimpleNamespace(model="checkpoint", repeats=3))
    assert re.search(words, capsys.readouterr().out)


@pytest.mark.parametrize("layout", ["gptq", "fp8"])
def test_weights_of_the_same_names_shapes_and_dtypes_are_made(layout: str, tmp_path: Path) -> None:
    """A checkpoint that is too large for a bundle: random numbers in its shapes; indices and the configuration are copied."""
    from safetensors.torch import load_file

    numbers = {"gptq": "int4-sym", "fp8": "fp8-block"}[layout]
    model = Model.model_validate({"title": "x", "workload": "w", "formats": ["*"], "group_size": 64, "synthetic": SPEC})
    format_ = Format.model_validate(
        {"title": "x", "layout": layout, "weights": numbers, "activations": "fp8" if layout == "fp8" else "none",
         "kernel": "auto", "dtype": "bfloat16"}
    )  # fmt: skip
    checkpoint = checkpoints.resolve("m", model, format_, cache=tmp_path / "cache")
    folder = tmp_path / "bundle"
    folder.mkdir()

    placed = weights.place(model, format_, checkpoint, folder, limit=1000)
    load(repro.script(REQUEST, title="t", note="", model=placed.model, hides=(), made=True, known=()), folder).make_weights()

    assert "the same tensor names, shapes and dtypes, random numbers" in placed.sentence
    assert (checkpoint.path / "config.json").read_bytes() == (folder / "checkpoint" / "config.json").read_bytes()
    ours, made = load_file(checkpoint.path / "model.safetensors"), load_file(folder / "checkpoint" / "model.safetensors")
    assert ours.keys() == made.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (made[name].dtype, made[name].shape), name
        if name.endswith("g_idx"):
            assert tensor.equal(made[name])
        elif tensor.is_floating_point() and tensor.numel() > 10_000:
            a, b = tensor.double(), made[name].double()
            assert not a.equal(b)
            assert b.std().item() == pytest.approx(a.std().item(), rel=0.1)
            assert a.min() <= b.min() and b.max() <= a.max()
