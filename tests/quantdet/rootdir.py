"""Lets `--store DIR` work where DIR exists (entry point `pytest11`; active in this suite's own folder only).

pytest settles its root folder and configuration before it knows the options of a conftest: in `pytest --store DIR` it takes
an existing DIR for a test path, looks for its configuration there, and ends with "unrecognized arguments: --store". Written
`--store=DIR` it works. This plugin, which is loaded earlier, starts pytest again with the options written that way.
"""

import os
import sys
import tomllib
from pathlib import Path

import pytest

# Options with a path as their value (`quantdet.session.options`).
PATH_OPTIONS = ("--matrix", "--expect", "--store", "--replay", "--record", "--reference", "--report")


def joined(args: list[str]) -> list[str]:
    """`args` with `--option VALUE` written `--option=VALUE` for the path options."""
    result: list[str] = []
    rest = iter(args)
    for arg in rest:
        value = next(rest, None) if arg in PATH_OPTIONS else None
        result.append(arg if value is None else f"{arg}={value}")
    return result


def in_suite(folder: Path) -> bool:
    """Whether `folder` is in a checkout of this suite."""
    for candidate in (folder, *folder.parents):
        file = candidate / "pyproject.toml"
        if file.is_file():
            try:
                project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
            except (OSError, ValueError):
                return False
            return isinstance(project, dict) and project.get("name") == "quantdet"
    return False


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """The first hook that is called; nothing is captured, collected or imported yet."""
    config = pluginmanager.get_plugin("pytestconfig")
    if config is None:
        return
    given = [str(arg) for arg in config.invocation_params.args]
    wanted = joined(given)
    if wanted == given or not in_suite(Path(config.invocation_params.dir)):
        return
    if given != sys.argv[1:]:  # pytest.main() in somebody's process, which must not be replaced
        return
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *wanted])
