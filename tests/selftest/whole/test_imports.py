"""What may be imported where: no engine in the controller, none at collection."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selftest.fakes.inner import Suite, read_junit
from selftest.fakes.matrix import ROOT, TESTS, make_suite
from selftest.whole.test_run import HERE

pytest_plugins = ["pytester"]

HEAVY = ("torch", "vllm", "transformers")


def test_the_controller_imports_no_engine() -> None:
    """The plugin and all of its modules but the engine's own leave torch, vllm and transformers alone."""
    code = f"""
import importlib, pkgutil, sys
import quantdet
ENGINE = ("quantdet.engines.vllm", "quantdet.engines.transformers")
for module in pkgutil.walk_packages(quantdet.__path__, "quantdet."):
    if not module.name.startswith((*ENGINE, "quantdet.engines.process.shim")):
        importlib.import_module(module.name)
import selftest.fakes.engine
assert "quantdet.plugin" in sys.modules and "quantdet.report.terminal" in sys.modules
print([name for name in {HEAVY} if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}

    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)

    assert ("[]", 0) == (found.stdout.strip(), found.returncode), found.stderr


def test_collection_works_without_an_engine(tmp_path: Path) -> None:
    """On a machine where torch, vllm and transformers cannot be imported, the shipped suite collects its cases."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CI": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    quick = ["-p", "no:hypothesispytest", "-p", "no:cacheprovider", "--assert=plain"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *quick, "tests/determinism"]

    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert 0 == found.returncode, found.stdout + found.stderr
    assert "test_repeat.py::test_repeat[tiny-qwen3/gptq_marlin/sm90-decode]" in found.stdout


def test_an_empty_machine_skips_with_the_install_command(suite: Suite, pytester: pytest.Pytester) -> None:
    """Without vLLM every cell is UNAVAILABLE and says how to get it."""
    make_suite(pytester.path)
    conftest = pytester.path / "conftest.py"
    conftest.write_text(conftest.read_text().replace('Software("0.32.0", "cpu", "2.0")', "Software()"))

    result = pytester.runpytest_inprocess("-k", HERE, f"--junitxml={pytester.path / 'r.xml'}")

    cases, _ = read_junit(pytester.path / "r.xml")
    assert 0 == result.ret
    assert {"UNAVAILABLE vllm: needs vLLM (pip install -e '.[cpu]'), have none"} == {
        case.message for name, case in cases.items() if "/" in name
    }
