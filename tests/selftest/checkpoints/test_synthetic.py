"""TODO"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantdet import checkpoints
from quantdet.checkpoints import resolve, synthetic
from selftest.fakes.checkpoints import make_format, make_model

# SHA-256 over the tensors of SPEC. They hold on every machine; who changes one has changed every synthetic checkpoint,
# and with it every recording made of one: raise the generator's or the writers' version.
GOLDEN = {
    ("plain", "bf16", "none"): "78ccee300d442d13128624e38c52d6e2154ed2f28f0a0ef0cdbc38528fb4a3b6",
    ("awq", "int4-asym", "none"): "48946c9b74bc54075e209e24217feb1ef86018beaed4cf6774afa95c2db687bb",
    ("gptq", "int4-sym", "none"): "173c8493c76badcd29e0365625cdfa4c186f036ab2d23f308e919348bc5ffa8a",
    ("gptq", "int8-sym", "none"): "699dab58ad29f53c4b91d1cfa3bf6cafc98953f8eae83ebd85839ba04f62f82a",
    ("ct", "int4-sym", "none"): "52eaebb7aa1905c35866bbcbf259ab383fb065d34cad7a08151e325214d87305",
    ("ct", "int4-asym", "none"): "35c9921026ebbbe29d5f3fe2a3c3592ebfdaa6925cc4cb4eddec0926dbe23ce4",
    ("ct", "int8-sym", "none"): "f410fac31966a42f88a86b1d7d872975b98581a836589821401785416b9f5f7f",
    ("ct", "int8-asym", "none"): "fc9f5faf749041afbcf2c848832af0d1e02af4abea99d5da6be1fe2ae30d6c62",
    ("ct", "int8-channel", "int8"): "a2d91e4f353916afb6704c9c45862a8fa3bb1520eda605ef7b5da838cf7f0ffd",
    ("ct", "fp8-channel", "fp8"): "13a6f8673e80fba1753f279644cc07a8151173ccbcc0a0bf6266d092bd510dd1",
    ("ct", "nvfp4", "none"): "ca287a683dfe66c191aaa55a31a471277b869b6924593cf51e023274f9a20ff4",
    ("ct", "nvfp4", "fp4"): "8f8c31222da364b96339da293f150b99fd900a533e03f2b8bfa8edb22b2228a1",
    ("ct", "mxfp4", "none"): "6dc3944be07826d427a348d52f00b3727983c6d047ee60e369600afb2b166658",
    ("ct", "mxfp8", "mxfp8"): "cf348c7163aa476e9281306e46f799e4e17e195dbfce8cbb2e3b972e2e1d5285",
    ("fp8", "fp8-tensor", "fp8"): "22c19b6261fbf3a840ae961cd7fd0b3ee7924d72849cc292bbbb241b672abcad",
    ("fp8", "fp8-block", "fp8"): "66759bb075fd9e07706a58d0babacb5bbdf34e5b98cd2a9ffd72fdd1c9edff25",
    ("bnb", "nf4", "none"): "8b0a67738f650e749d25bcd8d8983c29637bbd5dddaedeafd0bd1064d5c56dc5",
    ("bnb", "bnb-int8", "int8"): "d15d3008c73ff7b4713ba00fac7a6d1c63189b338c00887770d4add8a5d85c6c",
}


@pytest.mark.parametrize("words", GOLDEN, ids="-".join)
def test_bits_of_a_synthetic_checkpoint(words: tuple[str, str, str], tmp_path: Path) -> None:
    assert resolve("m", make_model(), make_format(*words), cache=tmp_path).sha256 == GOLDEN[words]


def test_generated_values_have_the_scale_they_claim() -> None:
    w = synthetic.tensor(0, "some.weight", (512, 512), 0.02).astype(np.float64)
    assert abs(w.std() - 0.02) < 2e-4
    assert abs(w.mean()) < 2e-4
    assert np.abs(w).max() <= 0.02 * 3.47
    norm = synthetic.tensor(0, "some.norm", (512,), 0.05, mean=1.0).astype(np.float64)
    assert abs(norm.mean() - 1) < 0.01


def test_generation_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = synthetic.tensor(1, "t", (999,), 1.0)
    monkeypatch.setattr(synthetic, "_CHUNK", 64)
    assert synthetic.tensor(1, "t", (999,), 1.0).tobytes() == whole.tobytes()


@pytest.mark.parametrize(("seed", "name"), [(1, "t"), (0, "u")])
def test_seed_and_name_change_every_tensor(seed: int, name: str) -> None:
    a, b = synthetic.tensor(0, "t", (1000,), 1.0), synthetic.tensor(seed, name, (1000,), 1.0)
    assert (a.view(np.uint16) == b.view(np.uint16)).mean() < 0.05


def test_no_torch_and_no_engine_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from quantdet.checkpoints import package, resolve\n"
        "assert not {'torch', 'vllm', 'transformers', 'gguf', 'huggingface_hub'} & set(sys.modules), sys.modules.keys()"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(checkpoints.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=tmp_path)
