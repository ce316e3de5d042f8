"""`--store DIR` with an existing DIR outside the checkout is an option and its value, not a test path."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantdet import rootdir
from quantdet.session import option_table, options

ROOT = Path(__file__).resolve().parents[3]


def test_joined_binds_values_to_path_options() -> None:
    """Only the path options change, and only where their value is a word of its own."""
    given = ["-k", "tiny", "--store", "/a", "--repeats", "5", "--replay=/b", "--matrix"]

    assert ["-k", "tiny", "--store=/a", "--repeats", "5", "--replay=/b", "--matrix"] == rootdir.joined(given)


def test_every_path_option_is_known() -> None:
    """An option that takes a path and is not joined would be misread: parser and entry point read one table."""
    found: dict[str, object] = {}

    class Parser:
        def getgroup(self, *args: object) -> "Parser":
            return self

        def addoption(self, name: str, **kwargs: object) -> None:
            found[name] = kwargs.get("metavar")

    options.add(Parser())  # type: ignore[arg-type]

    paths = {name for name, metavar in found.items() if metavar in ("DIR", "PATH", "FILE", "PATH|REPO")}
    assert {"--matrix", "--expect", "--store"} <= paths == set(option_table.PATHS)
    assert {option.attribute for option in option_table.OPTIONS} <= {
        field.name for field in dataclasses.fields(options.Options)
    }


def test_other_projects_are_left_alone(tmp_path: Path) -> None:
    """The plugin acts in this suite's checkout only."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')

    assert rootdir.in_suite(ROOT / "tests")
    assert not rootdir.in_suite(tmp_path)


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests"], ids=["root", "subfolder"])
def test_existing_store_outside(folder: Path, tmp_path: Path) -> None:
    """The suite's configuration is found, and the option too."""
    command = [sys.executable, "-m", "pytest", "-p", "quantdet.rootdir", "--store", str(tmp_path), "--collect-only", "-q"]
    # Given by name, as its entry point may be installed or not.
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)

    answer = subprocess.run(
        [*command, str(ROOT / "tests" / "selftest" / "whole" / "test_rootdir.py")],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert (0, "") == (answer.returncode, answer.stderr)
    assert "test_rootdir.py::test_joined_binds_values_to_path_options" in answer.stdout


def test_the_entry_point_loads_next_to_nothing() -> None:
    """Every pytest of an environment loads it: no matrix, no engine, no report of the suite."""
    code = "import sys, quantdet.rootdir; print(sorted(name for name in sys.modules if name.startswith('quantdet')))"
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
                         capture_output=True, text=True, check=True)  # fmt: skip

    assert str(["quantdet", "quantdet.rootdir", "quantdet.session", "quantdet.session.option_table"]) == run.stdout.strip()
