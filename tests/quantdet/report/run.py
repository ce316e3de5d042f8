"""What a run is, for its reports: one frozen value, which `session/make_run.py` makes when the last case has been judged.

Reports read this and the records of the cases, and no session: the same page can be made of a run that is over.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quantdet.engines.clock import Clock


@dataclass(frozen=True)
class Run:
    """One run of the suite.

    models, formats, hardware: titles by id, in the order of the matrix, which tables follow.
    here: the hardware rows that this machine is; asked: the one of --hardware, or empty.
    replay: the folders of --replay; empty for a run that measures. evidence: where observations lie: these, or the store.
    machine: facts of this machine for people; environment: that of the observations, `several` where they differ.
    newer: what to say first of a vLLM that is newer than what the matrix was measured with; injected: a seeded defect, as
    it was asked for; set_aside: observations of the store that were damaged.
    coverage: a row for each cell of the matrix, or none where no page was asked for.
    root: the checkout; started_in: where pytest was called; options: what a rerun has to repeat, as on a command line.
    report: the folder of --report; junit: the JUnit file.
    """

    version: str
    revision: str
    models: Mapping[str, str]
    formats: Mapping[str, str]
    hardware: Mapping[str, str]
    here: tuple[str, ...]
    asked: str
    replay: tuple[Path, ...]
    evidence: tuple[Path, ...]
    machine: Mapping[str, str]
    environment: Mapping[str, Any]
    newer: str
    injected: str
    set_aside: tuple[str, ...]
    clock: Clock
    coverage: tuple[Mapping[str, str], ...]
    root: Path
    started_in: Path
    options: tuple[str, ...]
    report: Path | None = None
    junit: Path | None = None


RUN = pytest.StashKey[Run]()
