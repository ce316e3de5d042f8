"""The key of an observation: whatever it depends on changes it, so that a rerun takes nothing for what it is not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantdet.checkpoints import Checkpoint
from quantdet.engines.plan import Plan
from quantdet.matrix import workload
from quantdet.matrix.cell import Cell
from quantdet.matrix.load import load
from quantdet.matrix.matrix import Matrix
from quantdet.session.plans import cold, controlling, key_of, plan_for, verifying
from selftest.fakes.matrix import MATRIX, ROOT

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
    "flip rate": lambda v: v.update(max_flip_rate=0.7),  # with which the three repeats of the matrix are enough
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


def test_where_the_same_bytes_are_from_is_not_in_the_key(tmp_path: Path) -> None:
    """A later commit of a hub's repository may hold the same files."""
    values = given(tmp_path)
    other = {**values, "checkpoint": replace(values["checkpoint"], source="elsewhere")}

    assert key(values) == key(other)


def test_lifetimes_have_keys_of_their_own(tmp_path: Path) -> None:
    """A second engine process is not spared because the first has answered."""
    values = given(tmp_path)

    assert 3 == len({key(values, lifetime) for lifetime in range(3)})


def test_a_new_way_of_measuring_is_a_new_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`MEASUREMENT` is raised when what is measured changes, and no older observation is found any more."""
    values = given(tmp_path)
    before = key(values)
    monkeypatch.setattr("quantdet.session.plans.MEASUREMENT", 0)

    assert before != key(values)


@pytest.mark.parametrize(("rate", "repeats"), [(0.05, 59), (0.01, 299), (0.7, 3)])
def test_a_flip_rate_decides_the_repeats(tmp_path: Path, rate: float, repeats: int) -> None:
    """As many as bound it with no flip, and never fewer than the matrix asks for; these are made even if one is noisy."""
    made = plan_for(**given(tmp_path), max_flip_rate=rate)

    assert isinstance(made, Plan)
    assert (repeats, repeats, rate) == (made.repeats, made.identity["repeats"], made.identity["max_flip_rate"])
    assert 3 == made.least_repeats


def test_the_engine_is_told_over_how_many_devices(tmp_path: Path) -> None:
    """One, what the model says, or what the format says instead; each is another observation."""
    sizes, keys = [], []
    for old, new in (
        ("", ""), ("[models.alpha]\n", "[models.alpha]\ntensor_parallel_size = 2\n"),
        ("[formats.gptq]\n", "[formats.gptq]\ntensor_parallel_size = 2\n"),
    ):  # fmt: skip
        made = plan_for(**{**given(tmp_path), "matrix": matrix(tmp_path, MATRIX.replace(old, new) if old else MATRIX)})
        assert isinstance(made, Plan)
        sizes.append(made.args["tensor_parallel_size"])
        keys.append(key_of(made, 0))

    assert [1, 2, 2] == sizes
    assert keys[0] != keys[1] == keys[2]


def test_rates_have_keys_of_their_own_and_re_executions_have_none(tmp_path: Path) -> None:
    """What was stopped at one rate is not what another asks for; what is asked once is the same at every rate."""
    plans = [plan_for(**given(tmp_path), max_flip_rate=rate) for rate in (None, 0.05, 0.0500001)]

    assert 3 == len({key_of(plan, 0) for plan in plans if isinstance(plan, Plan)})
    assert 1 == len({key_of(verifying(plan, "float16", 4), 0) for plan in plans if isinstance(plan, Plan)})


def test_a_lifetime_with_cold_caches(tmp_path: Path) -> None:
    """Says so, has a key of its own, starts from nothing and is told which folders have to be empty."""
    values = given(tmp_path)
    values["matrix"] = matrix(tmp_path, MATRIX + '\n[engine]\ncaches = ["A_CACHE", "B_CACHE"]\n')
    plan = plan_for(**values)
    assert isinstance(plan, Plan)

    found = cold(plan, values["matrix"])

    assert key_of(plan, 1) != key_of(found, 1)
    assert "cold" == found.identity["caches"]
    assert (("A_CACHE", "B_CACHE"), True) == (found.cold, found.spawn)
    assert plan.args == found.args and plan.env == found.env


@pytest.mark.parametrize("kind", ["control", "integer"])
def test_a_control_is_its_cells_plan_with_a_defect(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its role and defect are in the header, it has a key of its own, other weights' name, no claims, and no early end."""
    monkeypatch.setattr("quantdet.checkpoints.altered.renamed", lambda folder, cache: (cache, "1" * 64))
    monkeypatch.setattr("quantdet.checkpoints.altered.one_integer", lambda folder, cache: (cache, "2" * 64, "x.qweight"))
    plans = [plan_for(**given(tmp_path), max_flip_rate=rate) for rate in (0.05, None)]

    found, same = (controlling(plan, kind, tmp_path / "cache") for plan in plans if isinstance(plan, Plan))

    assert ("control", kind, kind) == (found.identity["role"], found.identity["inject"], found.inject)
    assert ({"control": "1", "integer": "2"}[kind] * 64, str(tmp_path / "cache")) == (
        found.identity["checkpoint_sha256"], found.checkpoint
    )  # fmt: skip
    assert ("here: x.qweight" if kind == "integer" else "here") == found.identity["checkpoint_source"]
    assert (3, 3, ()) == (found.repeats, found.identity["repeats"], found.claims)
    assert found.least_repeats is None
    assert key_of(found, 0) == key_of(same, 0)
    assert not {key_of(found, 0)} & {key_of(plan, 0) for plan in plans if isinstance(plan, Plan)}
