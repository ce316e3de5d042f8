"""Command-line options of the suite, and their frozen form."""

import os
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from quantdet.engines.child import faults
from quantdet.matrix.cell import Cell
from quantdet.session.option_table import OPTIONS

# `bitflip` is a defect of the numbers, the others are faults of the engine's process.
INJECTIONS = ("bitflip", "noise", *faults.KINDS)


@dataclass(frozen=True)
class Options:
    """What the command line and the environment ask for. `folder`: what relative paths on the command line are relative to."""

    matrix: Path
    store: Path
    checkpoints: Path
    hardware: str | None = None
    require_hardware: str | None = None
    repeats: int | None = None
    lifetimes: int | None = None
    replay: tuple[Path, ...] = ()
    record: Path | None = None
    reference: tuple[Path, ...] = ()
    allow_download: bool = False
    ignore_native: bool = False
    fresh: bool = False
    inject: str = ""
    no_controls: bool = False
    no_hidden_states: bool = False
    max_flip_rate: float | None = None
    expect: tuple[Path, ...] = ()
    report: Path | None = None
    model: tuple[str, ...] = ()
    base: str | None = None
    same_base: bool = False
    prompts: Path | None = None
    engine_arg: tuple[str, ...] = ()
    folder: Path = Path()


_TYPES = {"integer": int, "number": float}


def add(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("quantdet", "determinism of quantized LLM inference")
    for option in OPTIONS:
        text = option.help.replace("%", "%%")
        if option.kind == "flag":
            group.addoption(option.name, action="store_true", help=text)
        else:
            more = {"type": _TYPES[option.kind]} if option.kind in _TYPES else {}
            action = "append" if option.many else "store"
            group.addoption(option.name, action=action, metavar=option.metavar, help=text, **more)


def again(config: pytest.Config) -> tuple[str, ...]:
    """The options of this run that its verdicts depend on, as they are written on a command line."""
    words: list[str] = []
    for option in sorted(OPTIONS, key=lambda one: one.kind == "flag"):  # values first
        given = config.getoption(option.name) if option.decides else None
        if option.kind == "flag":
            words += [option.name] if given else []
        else:
            words += [
                f"{option.name}={value}"
                for value in (dict.fromkeys(given) if isinstance(given, list) else [given])
                if value is not None
            ]
    return tuple(words)


def parse(config: pytest.Config) -> Options:
    """The options of this run.

    Raises:
        pytest.UsageError: a value makes no sense; exit code 4.
    """

    _check_numbers(config)
    _check_together(config)
    replay, reference = _folders(config, "--replay"), _folders(config, "--reference")
    expect = tuple(dict.fromkeys(_path(config, file) for file in config.getoption("--expect") or ()))
    matrix, store, record, report, prompts = (
        None if (value := config.getoption(name)) is None else _path(config, value)
        for name in ("--matrix", "--store", "--record", "--report", "--prompts")
    )
    if record is not None and store is not None and (record == store or record in store.parents):
        raise pytest.UsageError(f"--record and --store: {record} cannot be both")
    for name, folder in ("--store", store), ("--report", report):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise pytest.UsageError(f"{name}: {folder} is not a folder")
    if report is not None and not config.getoption("collectonly"):
        _writable(report)
    kept = getattr(config, "cache", None)  # None under -p no:cacheprovider
    cache = kept.mkdir("quantdet") if kept is not None else config.rootpath / ".pytest_cache" / "d" / "quantdet"
    taken: dict[str, Any] = {
        option.attribute: tuple(dict.fromkeys(config.getoption(option.name) or ()))
        if option.many
        else config.getoption(option.name)
        for option in OPTIONS
        if option.kind != "path" and option.name != "--hardware"
    }
    return Options(
        matrix=matrix or config.rootpath / "quant_matrix.toml", store=store or cache / "store",
        checkpoints=cache / "checkpoints", hardware=config.getoption("--hardware") or config.getoption("--require-hardware"),
        replay=replay, record=record, reference=reference or _kept(config, taken), expect=expect, report=report,
        prompts=prompts, inject=os.environ.get("QUANTDET_INJECT", ""), folder=Path(config.invocation_params.dir), **taken,
    )  # fmt: skip


def _kept(config: pytest.Config, taken: dict[str, Any]) -> tuple[Path, ...]:
    """The repository's recordings, which are of the matrix's own models."""
    recordings = config.rootpath / "fixtures" / "recordings"
    return (recordings,) if recordings.is_dir() and not taken["model"] else ()


def _path(config: pytest.Config, value: str) -> Path:
    return Path(config.invocation_params.dir, value).resolve()


def _folders(config: pytest.Config, name: str) -> tuple[Path, ...]:
    """The folders of an option that may be given again, each once."""
    found = tuple(dict.fromkeys(_path(config, value) for value in config.getoption(name) or ()))
    for folder in found:
        if not folder.is_dir():
            raise pytest.UsageError(f"{name}: no such folder: {folder}")
    return found


def _check_numbers(config: pytest.Config) -> None:
    """Values that make no sense by themselves."""
    for name in ("--repeats", "--lifetimes"):
        value = config.getoption(name)
        least = 2 if name == "--repeats" else 1
        if value is not None and value < least:
            raise pytest.UsageError(f"{name}: needs at least {least}, is {value}")
    rate = config.getoption("--max-flip-rate")
    if rate is not None and not 0.001 <= rate < 1:
        raise pytest.UsageError(f"--max-flip-rate: needs 0.001 to 1 (1 excluded), is {rate:g}")


def _check_together(config: pytest.Config) -> None:
    """Options that exclude each other."""
    if config.getoption("--max-flip-rate") is not None and config.getoption("--repeats") is not None:
        raise pytest.UsageError("--max-flip-rate decides the number of repeats: --repeats does not go with it")
    measuring = ("--record", "--fresh", "--allow-download", "--max-flip-rate", "--lifetimes", "--repeats")
    for other in (*measuring, "--prompts", "--engine-arg"):
        if config.getoption("--replay") and config.getoption(other):
            raise pytest.UsageError(f"--replay starts no engine: {other} does not go with it")
    for other in ("--base", "--same-base", "--prompts", "--engine-arg"):
        if config.getoption(other) and not config.getoption("--model"):
            raise pytest.UsageError(f"{other} is about the checkpoints of --model: it needs one")
    if config.getoption("--same-base") and len(dict.fromkeys(config.getoption("--model"))) < 2:
        raise pytest.UsageError("--same-base compares checkpoints with each other: it needs --model twice or more")
    hardware, required = config.getoption("--hardware"), config.getoption("--require-hardware")
    if hardware and required and hardware != required:
        raise pytest.UsageError(f"--hardware {hardware} and --require-hardware {required} contradict each other")


def _writable(report: Path) -> None:
    """Found out before engines run for an hour, and not after them."""
    try:
        report.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=report):
            pass
    except OSError as error:
        raise pytest.UsageError(f"--report: {report} cannot be written: {error.strerror}") from None


def injection(text: str, cells: list[Cell]) -> tuple[str, str] | None:
    """`KIND:GLOB` as (kind, glob over formats or cell ids); None if empty.

    Raises:
        pytest.UsageError: an unknown kind of defect, or a format that is not in the matrix.
    """
    if not text:
        return None
    kind, _, target = text.partition(":")
    if kind not in INJECTIONS or not target:
        need = "KIND:FORMAT or KIND:MODEL/FORMAT/HARDWARE"
        raise pytest.UsageError(f"QUANTDET_INJECT: needs {need} with KIND one of {', '.join(INJECTIONS)}, is {text!r}")
    if not any(fnmatchcase(name, target) for cell in cells for name in (cell.format_id, cell.id)):
        raise pytest.UsageError(f"QUANTDET_INJECT: {target!r} is no format and no cell of this matrix")
    return kind, target
