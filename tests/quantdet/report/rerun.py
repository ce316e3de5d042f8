"""The command that runs cases of this run again: which, and every option and variable that their outcome depends on."""

import os
import re
import shlex

import pytest

from quantdet.report.entries import Entry, cell_of
from quantdet.session.session import SESSION

_SELECTS = re.compile(r"[\w:+\-.\[\]\\/]+")  # what `-k` takes for a name
_FEW = 2
# Not among them: what only chooses cases or workers, what only writes (--record, --report), and --fresh, since the store
# holds what the verdict was about.
VALUES = (
    "--matrix", "--expect", "--store", "--replay", "--reference", "--hardware", "--require-hardware", "--repeats",
    "--max-flip-rate", "--lifetimes",
)  # fmt: skip
FLAGS = ("--ignore-native", "--no-controls", "--no-activations", "--allow-download")


def command(config: pytest.Config, nodeid: str) -> str:
    """What to paste where this run was started."""
    path, *rest = nodeid.split("::", 1)
    return _command(config, ["::".join([_relative(config, path), *rest])])


def entry(config: pytest.Config, found: Entry) -> str:
    """The same for the cases of an entry: of its cell, if it has any, since all others failed for them."""
    own = found.own
    names = list(dict.fromkeys(cell_of(case["nodeid"]) for case in own))
    if len(own) == 1 or names[0] != found.cell or not all(map(_SELECTS.fullmatch, names)):
        return command(config, own[0]["nodeid"])
    files = sorted({case["nodeid"].partition("::")[0] for case in own})
    paths = files if len(files) <= _FEW else [os.path.commonpath(files) or "."]
    return _command(config, [*(_relative(config, path) for path in paths), "-k", " or ".join(names)])


def _relative(config: pytest.Config, path: str) -> str:
    return os.path.relpath(config.rootpath / path, config.invocation_params.dir)


def _command(config: pytest.Config, which: list[str]) -> str:
    session = config.stash[SESSION]
    words = ["pytest", *which]
    for name in VALUES:
        given = config.getoption(name)
        words += [f"{name}={value}" for value in (given if isinstance(given, list) else [given]) if value is not None]
    words += [name for name in FLAGS if config.getoption(name)]
    prefix = f"QUANTDET_INJECT={shlex.quote(':'.join(session.inject))} " if session.inject else ""
    return prefix + shlex.join(words)  # an id may hold shell characters
