"""From a session to what its reports read (`report.run.Run`), when the last case has been judged."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from quantdet import __version__
from quantdet.report.record import RECORDS
from quantdet.report.run import Run
from quantdet.session import coverage, options
from quantdet.session.machine.environment import git_revision
from quantdet.session.session import SESSION, Session


def run_of(config: pytest.Config) -> Run:
    """The run of `config`, on the controller."""
    session = config.stash[SESSION]
    matrix, asked = session.matrix, session.options
    return Run(
        version=__version__,
        revision=git_revision(config.rootpath),
        models={name: row.title for name, row in matrix.models.items()},
        formats={name: row.title for name, row in matrix.formats.items()},
        hardware={name: row.title for name, row in matrix.hardware.items()},
        here=session.machine.rows(matrix),
        asked=asked.hardware or "",
        replay=asked.replay,
        evidence=session.evidence.folders,
        machine=_machine(session),
        environment=session.measured_environment(),
        newer=session.newer(),
        injected=":".join(session.inject) if session.inject else "",
        set_aside=tuple(map(str, session.store.set_aside)),
        clock=replace(session.clock),
        coverage=tuple(coverage.coverage(matrix, session, config.stash[RECORDS])) if asked.report is not None else (),
        root=config.rootpath,
        started_in=config.invocation_params.dir,
        options=options.again(config),
        report=asked.report,
        junit=_junit(config),
    )


def _machine(session: Session) -> dict[str, str]:
    machine = session.machine
    gpus = ", ".join(f"{gpu.name} ({gpu.memory_gib:.0f} GiB)" for gpu in machine.gpus)
    return {
        "hardware": ", ".join(machine.rows(session.matrix)), "cpu": machine.cpu_name, "gpu": gpus,
        "memory": f"{machine.memory_gib:.0f} GiB", "vllm": session.software.vllm or "", "torch": session.software.torch or "",
    }  # fmt: skip


def _junit(config: pytest.Config) -> Path | None:
    given = config.getoption("xmlpath", None)
    if not given:
        return None
    return Path(config.invocation_params.dir, os.path.expanduser(os.path.expandvars(given))).resolve()
