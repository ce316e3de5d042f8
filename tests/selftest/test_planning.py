"""The key of an observation: whatever it depends on changes it, so that a rerun takes nothing for what it is not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantdet import workload
from quantdet.checkpoints import Checkpoint
from quantdet.engines import Plan
from quantdet.matrix import Matrix, load
from quantdet.planning import key_of, plan_for
from quantdet.schema import Cell
from selftest.fakes import MATRIX, ROOT

Edit = Callable[[dict[str, Any]], object]


def given(tmp_path: Path) -> dict[str, Any]:
    """What a plan is made from."""
    (tmp_path / "config.json").write_text('{"a": 0}')
    return {
        "cell": Cell("alpha", "gptq", "cpu-here"), "matrix": matrix(tmp_path, MATRIX),
        "work": workload.load("synthetic-v1", ROOT / "fixtures" / "prompts"),
        "checkpoint": Checkpoint(tmp_path, "0" * 64, "here"), "environment": {"vllm": "0.32.0", "cpus": 2},
        "vllm_version": "0.32.0", "engine": "vllm", "repeats": None, "inject": None, "device": {},
    }  # fmt: skip


def matrix(folder: Path, text: str) -> Matrix:
    path = folder / "matrix.toml"
    path.write_text(text, encoding="utf-8")
    found = load(path)
    path.unlink()
    return found


def key(values: dict[str, Any], lifetime: int = 0) -> str:
    made = plan_for(**values)
    assert isinstance(made, Plan)
    return key_of(made, lifetime)


def edited(text: str, replacement: str) -> Edit:
    return lambda v: v.update(matrix=matrix(v["checkpoint"].path, MATRIX.replace(text, replacement)))


CHANGES: dict[str, Edit] = {
    "weights": lambda v: v.update(checkpoint=replace(v["checkpoint"], sha256="1" * 64)),
    "configuration": lambda v: (v["checkpoint"].path / "config.json").write_text('{"a": 1}'),
    "workload": lambda v: v.update(work=replace(v["work"], sha256="1" * 64)),
    "repeats": lambda v: v.update(repeats=7),
    "decode tokens": edited("decode_tokens = 4", "decode_tokens = 5"),
    "top k": edited("top_k = 4", "top_k = 5"),
    "arguments": edited('args = { executes = "Fake4Kernel", numerics', 'args = { more = 1, executes = "Fake4Kernel", numerics'),
    "variables": edited('layout = ["gptq", "ct"]\n', 'layout = ["gptq", "ct"]\nenv = { VLLM_X = "1" }\n'),
    "dtype": edited('kernel = "fake4"\ndtype = "float16"', 'kernel = "fake4"\ndtype = "bfloat16"'),
    "environment": lambda v: v.update(environment={**v["environment"], "cpus": 3}),
    "device": lambda v: v.update(device={"CUDA_VISIBLE_DEVICES": "1"}),
    "engine": lambda v: v.update(engine="another"),
    "defect": lambda v: v.update(inject=("bitflip", "gptq")),
    "format": lambda v: v.update(cell=Cell("alpha", "ct", "cpu-here")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_an_observation_depends_on_is_in_its_key(tmp_path: Path, what: str) -> None:
    """A finished cell is measured again when it changes."""
    values = given(tmp_path)
    before = key(values)
    assert before == key(values)

    CHANGES[what](values)

    assert before != key(values)


def test_lifetimes_have_keys_of_their_own(tmp_path: Path) -> None:
    """A second engine process is not spared because the first has answered."""
    values = given(tmp_path)

    assert 3 == len({key(values, lifetime) for lifetime in range(3)})


def test_a_new_way_of_measuring_is_a_new_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`MEASUREMENT` is raised when what is measured changes, and no older observation is found any more."""
    values = given(tmp_path)
    before = key(values)
    monkeypatch.setattr("quantdet.planning.MEASUREMENT", 0)

    assert before != key(values)
