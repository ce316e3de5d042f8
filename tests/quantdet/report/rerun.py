"""The command that runs cases of this run again: which, and every option and variable that their outcome depends on."""

import os
import re
import shlex

from quantdet.report.entries import Entry, cell_of
from quantdet.report.run import Run

_SELECTS = re.compile(r"[\w:+\-.\[\]\\/]+")  # what `-k` takes for a name
_FEW = 2


def command(run: Run, nodeid: str) -> str:
    """What to paste where this run was started."""
    path, *rest = nodeid.split("::", 1)
    return _command(run, ["::".join([_relative(run, path), *rest])])


def entry(run: Run, found: Entry) -> str:
    """The same for the cases of an entry: of its cell, if it has any, since all others failed for them."""
    own = found.own
    names = list(dict.fromkeys(cell_of(case.nodeid) for case in own))
    if len(own) == 1 or names[0] != found.cell or not all(map(_SELECTS.fullmatch, names)):
        return command(run, own[0].nodeid)
    files = sorted({case.nodeid.partition("::")[0] for case in own})
    paths = files if len(files) <= _FEW else [os.path.commonpath(files) or "."]
    return _command(run, [*(_relative(run, path) for path in paths), "-k", " or ".join(names)])


def _relative(run: Run, path: str) -> str:
    return os.path.relpath(run.root / path, run.started_in)


def _command(run: Run, which: list[str]) -> str:
    prefix = f"QUANTDET_INJECT={shlex.quote(run.injected)} " if run.injected else ""
    return prefix + shlex.join(["pytest", *which, *run.options])  # an id may hold shell characters
