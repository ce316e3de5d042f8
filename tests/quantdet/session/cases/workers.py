"""pytest-xdist: tests of one model stay together, one worker per GPU, pinned; and what the suite forbids or demands."""

import os
import re
from dataclasses import asdict
from typing import Any

import pytest

from quantdet.report.record import RECORDS
from quantdet.session.machine import gpus as devices
from quantdet.session.machine.gpus import Gpu
from quantdet.session.session import SESSION, Session

_CELL = re.compile(r"\[([^/\]]+)/[^/\]]+/([^/\]]+?)(?:-(?:decode|prefill))?\]$")


def scope_of(nodeid: str) -> str:
    """The group that a test belongs to: model and hardware for measured tests; a self-test is on its own."""
    match = _CELL.search(nodeid)
    if match is None:
        return nodeid
    # A claim's case ("SOURCE-by-HARDWARE") starts engines that verify, on that hardware, and needs none that measures.
    _, claim, verifier = match[2].rpartition("-by-")
    return f"{match[1]}/{verifier}/claims" if claim else f"{match[1]}/{match[2]}"


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Group by model and hardware. Not `--dist loadgroup`: it rewrites node ids or, on pytest 9.2, does nothing."""
    from xdist.scheduler import LoadScopeScheduling

    if config.getoption("dist") not in ("load", "loadscope"):
        return None

    class ByModel(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return ByModel(config, log)


def count(config: pytest.Config) -> int | None:
    """`-n auto`: one worker per visible GPU (of the wanted hardware row); without GPUs xdist decides."""
    return len(_gpus(config.stash[SESSION])) or None


def pin(config: pytest.Config, specs: list[Any]) -> None:
    """Give each worker its own GPU, from what the caller left visible; a replacement keeps its predecessor's.

    Raises:
        pytest.UsageError: more workers than GPUs, or GPUs of several kinds: any worker may get any cell.
    """
    session: Session = config.stash[SESSION]
    gpus = _gpus(session)
    if not gpus:
        return
    if len(specs) > len(gpus):
        raise pytest.UsageError(f"-n {len(specs)}: one worker per GPU, and {len(gpus)} are visible")
    kinds = sorted({gpu.architecture for gpu in gpus})
    if len(kinds) > 1:
        words = f"-n {len(specs)}: GPUs of several kinds are visible ({', '.join(kinds)})"
        raise pytest.UsageError(f"{words}: choose one with --hardware or CUDA_VISIBLE_DEVICES, or run without -n")
    for spec, gpu in zip(specs, gpus, strict=False):
        spec.env.update(devices.variables([gpu], session.software.vllm))


def _gpus(session: Session) -> tuple[Gpu, ...]:
    """The visible GPUs, or those of the one hardware row that the run is about."""
    wanted = session.options.hardware
    row = session.matrix.hardware[wanted] if wanted is not None else None
    return session.machine.gpus if row is None or row.kind == "cpu" else session.machine.gpus_of(row)


def report_clock(config: pytest.Config) -> None:
    """On a worker: hand the session's clock to the controller."""
    output = getattr(config, "workeroutput", None)
    if output is not None:
        output["quantdet_clock"] = asdict(config.stash[SESSION].clock)


def add_clock(config: pytest.Config, node: Any) -> None:
    """On the controller: add a worker's clock to its own."""
    clock = config.stash[SESSION].clock
    for name, value in getattr(node, "workeroutput", {}).get("quantdet_clock", {}).items():
        setattr(clock, name, getattr(clock, name) + value)


def refuse_reruns(config: pytest.Config) -> None:
    """A retry would turn "it differs" into a pass."""
    for name in ("rerunfailures", "flaky"):
        if config.pluginmanager.has_plugin(name):
            raise pytest.UsageError(f"the suite never retries: disable the plugin (-p no:{name})")
    if os.environ.get("PYTEST_ADDOPTS", "").find("--reruns") >= 0:
        raise pytest.UsageError("the suite never retries: --reruns is set in PYTEST_ADDOPTS")


def require_models(session: pytest.Session) -> None:
    """--model: a run that measured nothing of one of them has failed, whatever its cases say."""
    config = session.config
    if hasattr(config, "workerinput") or config.getoption("collectonly") or not config.stash[SESSION].options.model:
        return
    records, matrix = config.stash[RECORDS], config.stash[SESSION].matrix
    chosen = bool(config.option.keyword or config.option.markexpr or any("::" in argument for argument in config.args))
    for name, model in matrix.models.items():
        twin = {one for one in model.checkpoints if model.base is not None and matrix.formats[one].layout == "plain"}
        for place in dict.fromkeys(place for one, place in model.checkpoints.items() if one not in twin):
            formats = {one for one, other in model.checkpoints.items() if other == place}
            mine = [case for case in records.cases if case.model == name and case.format in formats]
            if any(case.number("runs") for case in mine):
                continue
            if chosen and not mine and not any(f"[{name}/{one}/" in nodeid for nodeid, _ in records.skipped for one in formats):
                continue  # whoever chose other cases did not ask for it
            skipped = [why for nodeid, why in records.skipped if any(f"[{name}/{one}/" in nodeid for one in formats)]
            reason = next(filter(None, [*(case.message for case in mine), *skipped]), "no case of it ran")
            if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
            config.get_terminal_writer().line(f"\n--model {place}: nothing was measured: {reason}", red=True)


def require(session: pytest.Session) -> None:
    """--require-hardware: a run that measured nothing there has failed."""
    config = session.config
    wanted = config.stash[SESSION].options.require_hardware
    if wanted is None or hasattr(config, "workerinput") or config.getoption("collectonly"):
        return
    missed = [c for c in config.stash[RECORDS].cases if c.text("controlled") == "missed"]
    if missed and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        config.get_terminal_writer().line(f"--require-hardware: controls missed: {missed[0].text('control')}", red=True)
    measured = any(case.hardware == wanted for case in config.stash[RECORDS].cases)
    if not measured and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
