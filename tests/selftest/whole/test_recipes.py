"""The CI files: artefacts that are kept, versions and hardware that are demanded, and what a GPU runner selects."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from quantdet.matrix import load
from selftest.fakes.matrix import ROOT

# Where a GPU's cells are measured, and where nothing but the two scripts is called.
GPU_RECIPES = [".github/workflows/gpu.yml", ".ci/gitlab-ci.yml", ".ci/Jenkinsfile", ".ci/buildkite.yml"]
RECIPES = [".github/workflows/cpu.yml", *GPU_RECIPES]


def text(place: str) -> str:
    """A file, continued lines joined."""
    return (ROOT / place).read_text(encoding="utf-8").replace("\\\n", " ")


def test_ci_uploads_what_its_run_writes() -> None:
    """JUnit files and pages lie under the folder that every recipe keeps, and git ignores it."""
    for place in (".ci/run", ".ci/run-gpu"):
        written = re.findall(r"--(?:junitxml|report)[ =](\S+)", text(place))
        assert written, place
        assert all(path.startswith("reports/") for path in written), place
    for place in RECIPES:
        assert "reports/*.xml" in text(place), place
    assert "reports/" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


def test_the_job_summary_is_of_runs_that_measure() -> None:
    """Tests start hundreds of runs: none of them may write to the job's page, which GitHub drops above 1 MiB."""
    run = text(".ci/run")
    given = [line for line in run.splitlines() if line.startswith("GITHUB_STEP_SUMMARY=")]

    assert run.index("unset GITHUB_STEP_SUMMARY") < run.index("\npytest ")
    assert len(given) == 2
    assert all("--report" in line and "tests/" not in line for line in given)


def test_actions_are_pinned_by_major_version() -> None:
    """And nothing else than checked out code runs with a token that can write."""
    for place in (".github/workflows/cpu.yml", ".github/workflows/gpu.yml"):
        uses = re.findall(r"uses: (\S+)", text(place))
        assert uses
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", use) for use in uses)
        assert "permissions:\n  contents: read\n" in text(place)
        assert "persist-credentials: false" in text(place)


def test_gpu_jobs_demand_their_hardware_and_versions() -> None:
    """A GPU job must not go green by skipping, and measures the versions that are pinned."""
    table = load.load(ROOT / "quant_matrix.toml")
    for place in (*GPU_RECIPES, ".ci/README.md"):
        called = re.findall(r"^[^#\n]*\.ci/run-gpu (\S+?)(?='?(?:\s|$))", text(place), re.M)
        assert called, place
        assert {row for row in called if row != '"${HARDWARE}"'} <= table.hardware.keys(), place
    assert "--require-hardware" in text(".ci/run-gpu")
    assert "-c .ci/constraints-gpu.txt" in text(".ci/run-gpu")
    assert os.access(ROOT / ".ci/run-gpu", os.X_OK)


# ------------------------------------------------------------------------------------ what a GPU runner selects, by collection

OFFERED = re.search(r"options: \[(.*)\]", text(".github/workflows/gpu.yml"))
ROWS = OFFERED[1].split(", ") if OFFERED else []

# A machine with one GPU of the row, the pinned versions, and no packages but those that the script installs. What stands in
# the way of a collected case is printed: a gate, a kernel that this vLLM cannot be told to use.
MADE_UP = """
from quantdet.observations.claims import Claim
from quantdet.report.record import cell_of
from quantdet.session.cases.collect import REQUIRED
from quantdet.session.machine import gate
from quantdet.session.machine.gpus import Gpu
from quantdet.judging.questions import Asked
from quantdet.session.machine.machine import Machine, Software
from quantdet.session.session import SESSION

ROW, CAPABILITY, INSTALLED, VERSIONS = {facts!r}
gate.version = lambda package: "1.0" if package in INSTALLED else None
gate.module_is_here = lambda name: name.startswith("vllm.")  # of vLLM's own wheel


def pytest_quantdet_machine(config):
    gpu = Gpu("made up", "GPU-0", CAPABILITY, 141.0, "580.1", index=0)
    software = Software(VERSIONS["vllm"], "cuda", VERSIONS["torch"], VERSIONS["transformers"], "0.17.0", "cuda")
    return Machine("made up", frozenset({{"avx2"}}), 256.0, (gpu,)), software


def pytest_collection_finish(session):
    run = session.config.stash[SESSION]
    for item in session.items:
        cell = cell_of(item)
        print("SELECTED", item.name)
        if (reason := item.stash.get(REQUIRED, None)) is not None:
            print("STOPPED", item.name, reason)
        elif not isinstance(cell, (Asked, Claim)) and not run.pinned(cell):
            print("STOPPED", item.name, "no pin")
        elif isinstance(cell, Asked) and any(run.matrix.models[one.model_id].slow for one in cell.of):
            print("STOPPED", item.name, "a full-size model")
"""


def asked_of_pytest(row: str, tmp_path: Path) -> list[str]:
    """The arguments that `.ci/run-gpu ROW` gives to pytest, from a copy of it whose interpreter only writes them down."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\nfor each; do printf "%s\\0" "$each"; done > {tmp_path}/called\n', encoding="utf-8")
    script = tmp_path / "ci" / "run-gpu"
    script.parent.mkdir()
    script.write_text(text(".ci/run-gpu"), encoding="utf-8")
    for file in (stub, script):
        file.chmod(0o755)
    subprocess.run([script, row], env={**os.environ, "PYTHON": str(stub)}, check=True, timeout=60)
    module, name, *arguments = (tmp_path / "called").read_text(encoding="utf-8").split("\0")[:-1]
    assert [module, name] == ["-m", "pytest"]
    return arguments


def collected(row: str, arguments: list[str], tmp_path: Path) -> tuple[set[str], list[str]]:
    """Names of the cases that pytest collects with these arguments on a made-up GPU; what stands in the way of some of them."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    extras = re.search(r"'\.\[([\w,]+)\]'", text(".ci/run-gpu"))
    assert extras is not None
    installed = {re.split(r"[<>=]", need)[0] for extra in extras[1].split(",") for need in declared[extra]}
    versions = dict(re.findall(r"^([\w-]+)==(\S+)$", text(".ci/constraints-gpu.txt"), re.M))
    capability = load.load(ROOT / "quant_matrix.toml").hardware[row].compute_capability
    plugin = MADE_UP.format(facts=(row, capability, sorted(installed), versions))
    (tmp_path / "made_up.py").write_text(plugin, encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "made_up", "-p", "no:cacheprovider", "--collect-only", "-qq", "-s",
         *arguments[: arguments.index("--store")], f"--store={tmp_path / 'store'}"],
        env={**os.environ, "PYTHONPATH": paths}, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line.partition(" ") for line in run.stdout.splitlines()]
    return {rest for word, _, rest in lines if word == "SELECTED"}, [rest for word, _, rest in lines if word == "STOPPED"]


@pytest.mark.parametrize("row", ROWS)
def test_a_gpu_runner_can_go_green(row: str, tmp_path: Path) -> None:
    """No case that the script selects is gated, lacks a package or has a kernel without a pin: each would be an error there.

    And what can run is kept: AWQ on its kernels, and the numbers that the chip multiplies.
    """
    selected, stopped = collected(row, asked_of_pytest(row, tmp_path), tmp_path)

    assert not stopped
    formats = {name.partition("[")[2].split("/")[1] for name in selected if name.startswith("test_kernel[")}
    native = load.load(ROOT / "quant_matrix.toml").hardware[row].native
    assert {"awq_marlin", "awq_auto", "gptq_marlin", "bnb_nf4", "pytorch_int4", "tf_bnb_nf4", "tf_torchao_int4"} <= formats
    assert ("fp8_tensor" in formats, "nvfp4_w4a4" in formats) == ("fp8" in native, "fp4" in native)
    assert any(name.startswith("test_kernel[smollm2-135m/") for name in selected)


def test_what_would_stop_a_gpu_runner_is_seen(tmp_path: Path) -> None:
    """Without its selection the same check names the gate, the package and the pin."""
    _, stopped = collected("sm90", ["--require-hardware", "sm90", "-k", "test_kernel and tiny-qwen3/", "--store"], tmp_path)

    gated = ("awq", "bf16_tp2", "nvfp4_w4a4", "tf_fp8_block")
    assert {f"tiny-qwen3/{format_id}/sm90" for format_id in gated} == {
        line[len("test_kernel[") :].partition("]")[0] for line in stopped
    }
