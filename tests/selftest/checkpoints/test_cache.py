"""The cache of checkpoints: built once, whole or not at all."""

import multiprocessing
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantdet import checkpoints
from quantdet.checkpoints import Unavailable, cache, pool, resolve, synthetic, tensors
from selftest.fakes.checkpoints import BF16, SPEC, W4, make_format, make_model


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
