"""The session of a pytest run, made of its options, its matrix and this machine."""

from pathlib import Path

import pytest

from quantdet.engines import signatures
from quantdet.engines.process import process
from quantdet.matrix import load
from quantdet.matrix.matrix import Matrix
from quantdet.observations.observation import ObservationError
from quantdet.session import options, own_session, usable
from quantdet.session.machine import machine
from quantdet.session.replay import Replay
from quantdet.session.session import Session
from quantdet.untrusted import plain


def session_of(config: pytest.Config, prompts: Path) -> Session:
    """The session; `prompts` is the folder of workloads.

    Raises:
        pytest.UsageError: options, matrix or recordings that cannot be used; exit code 4.
    """
    chosen = options.parse(config)
    try:
        table = load.load(chosen.matrix, () if chosen.model else chosen.expect)
    except load.MatrixError as error:
        raise pytest.UsageError(str(error)) from None
    engine = config.hook.pytest_quantdet_engine(config=config) or process.VLLM
    known = signatures.known_arguments() if engine == process.VLLM and not chosen.replay else None
    if unusable := [
        *usable.unusable(table, prompts, chosen.matrix.parent),
        *(usable.unobeyed(table, known) if known is not None else ()),
    ]:
        raise pytest.UsageError(str(load.MatrixError(chosen.matrix, unusable)))
    _check_hardware(chosen, table)
    here, installed = config.hook.pytest_quantdet_machine(config=config) or (machine.detect(), machine.software())
    table, workloads, about = own_session.made(chosen, table, here, installed, prompts, known)
    try:
        table = load.with_expectations(table, chosen.expect if chosen.model else ())
    except load.MatrixError as error:
        raise pytest.UsageError(str(error)) from None
    try:
        session = Session(
            chosen, table, machine=here, software=installed,
            engine=engine,
            prompts=prompts, inject=options.injection(chosen.inject, list(table.cells())), workloads=workloads, about=about,
            run=str(getattr(config, "workerinput", {}).get("testrunuid", "")),
        )  # fmt: skip
    except ObservationError as error:
        raise pytest.UsageError(plain(f"--replay or --reference: {error}")) from None
    if isinstance(session.evidence, Replay) and chosen.hardware not in (None, *session.evidence.hardware()):
        have = ", ".join(session.evidence.hardware())
        raise pytest.UsageError(f"--replay: nothing recorded on {chosen.hardware}; have {have}")
    return session


def _check_hardware(chosen: options.Options, table: Matrix) -> None:
    for name in ("require_hardware", "hardware"):
        value = getattr(chosen, name)
        if value is not None and value not in table.hardware:
            raise pytest.UsageError(f"--{name.replace('_', '-')}: no hardware {value!r}; have {', '.join(table.hardware)}")
