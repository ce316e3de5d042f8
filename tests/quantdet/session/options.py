"""Command-line options of the suite, and their frozen form."""

import os
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from quantdet.engines.child import faults
from quantdet.matrix.cell import Cell
from quantdet.session.option_table import OPTIONS

# `bitflip` is a defect of the numbers, the others are faults of the engine's process.
INJECTIONS = ("bitflip", "noise", *faults.KINDS)


@dataclass(frozen=True)
class Options:
    """What the command line and the environment ask for."""

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
                f"{option.name}={value}" for value in (given if isinstance(given, list) else [given]) if value is not None
            ]
    return tuple(words)


def parse(config: pytest.Config) -> Options:
    """The options of this run.

    Raises:
        pytest.UsageError: a value makes no sense; exit code 4.
    """

    def path(name: str) -> Path | None:
        value = config.getoption(name)
        return None if value is None else Path(config.invocation_params.dir, value).resolve()

    for name in ("--repeats", "--lifetimes"):
        value = config.getoption(name)
        least = 2 if name == "--repeats" else 1
        if value is not None and value < least:
            raise pytest.UsageError(f"{name}: needs at least {least}, is {value}")
    rate = config.getoption("--max-flip-rate")
    if rate is not None and not 0.001 <= rate < 1:
        raise pytest.UsageError(f"--max-flip-rate: needs 0.001 to 1 (1 excluded), is {rate:g}")
    if rate is not None and config.getoption("--repeats") is not None:
        raise pytest.UsageError("--max-flip-rate decides the number of repeats: --repeats does not go with it")
    given = [Path(config.invocation_params.dir, folder).resolve() for folder in config.getoption("--replay") or ()]
    replay = tuple(dict.fromkeys(given))
    for folder in replay:
        if not folder.is_dir():
            raise pytest.UsageError(f"--replay: no such folder: {folder}")
    for other in ("--record", "--fresh", "--allow-download", "--max-flip-rate", "--lifetimes", "--repeats"):
        if replay and config.getoption(other):
            raise pytest.UsageError(f"--replay starts no engine: {other} does not go with it")
    record, kept_in = path("--record"), path("--store")
    if record is not None and kept_in is not None and (record == kept_in or record in kept_in.parents):
        raise pytest.UsageError(f"--record and --store: {record} cannot be both")
    reference = [Path(config.invocation_params.dir, folder).resolve() for folder in config.getoption("--reference") or ()]
    for folder in reference:
        if not folder.is_dir():
            raise pytest.UsageError(f"--reference: no such folder: {folder}")
    recordings = config.rootpath / "fixtures" / "recordings"
    hardware, required = config.getoption("--hardware"), config.getoption("--require-hardware")
    if hardware and required and hardware != required:
        raise pytest.UsageError(f"--hardware {hardware} and --require-hardware {required} contradict each other")
    if kept_in is not None and kept_in.exists() and not kept_in.is_dir():
        raise pytest.UsageError(f"--store: {kept_in} is not a folder")
    report = path("--report")
    if report is not None and report.exists() and not report.is_dir():
        raise pytest.UsageError(f"--report: {report} is not a folder")
    if report is not None and not config.getoption("collectonly"):
        _writable(report)
    kept = getattr(config, "cache", None)  # None under -p no:cacheprovider
    cache = kept.mkdir("quantdet") if kept is not None else config.rootpath / ".pytest_cache" / "d" / "quantdet"
    return Options(
        matrix=path("--matrix") or config.rootpath / "quant_matrix.toml",
        store=path("--store") or cache / "store",
        checkpoints=cache / "checkpoints",
        hardware=hardware or required,
        require_hardware=required,
        repeats=config.getoption("--repeats"),
        lifetimes=config.getoption("--lifetimes"),
        replay=replay,
        record=path("--record"),
        reference=tuple(reference) or ((recordings,) if recordings.is_dir() else ()),
        allow_download=config.getoption("--allow-download"),
        ignore_native=config.getoption("--ignore-native"),
        fresh=config.getoption("--fresh"),
        inject=os.environ.get("QUANTDET_INJECT", ""),
        no_controls=config.getoption("--no-controls"),
        no_hidden_states=config.getoption("--no-hidden-states"),
        max_flip_rate=rate,
        expect=tuple(
            dict.fromkeys(Path(config.invocation_params.dir, f).resolve() for f in config.getoption("--expect") or ())
        ),
        report=report,
    )


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
