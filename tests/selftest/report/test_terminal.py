"""What a run prints: within 80 columns and plain, the engines counted, the first failure's command, progress."""

import io
import re
import shlex
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantdet.engines.clock import Clock
from quantdet.matrix.cell import Cell
from quantdet.report import progress, terminal
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import MATRIX, W4A4, setting

pytest_plugins = ["pytester"]

LONG = "a_format_with_the_longest_name_that_a_matrix_lets_a_format_have1"
KERNEL = "AKernelOfAnEngineWithAClassNameThatHasNoPlaceToBreakItAtAllLinearKernel"
HERE = "alpha and cpu-here"


def own(output: str) -> list[str]:
    """The lines of the suite's own summary, but the command, which is pasted as one."""
    return [line for line in output.partition("quantdet: verdicts")[2].splitlines() if not line.startswith("  rerun: ")]


@pytest.mark.parametrize("columns", ["80", None])
def test_every_line_fits(suite: Suite, monkeypatch: pytest.MonkeyPatch, columns: str | None) -> None:
    """The longest name of a format and a longer one of a kernel: 80 columns, plain text, nothing of a name lost."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert 64 == len(LONG)
    row = f'[kernels.long]\nhardware = ["*"]\nclasses = ["{KERNEL}"]\n\n[formats.{LONG}]\ntitle = "long"\nlayout = "ct"\n'
    matrix = MATRIX + f'\n{row}weights = "int4-sym"\nkernel = "long"\ndtype = "float16"\n'
    matrix += f'\n[[pin]]\nkernel = "long"\nlayout = ["ct"]\nargs = {{ executes = "{KERNEL}" }}\n'
    matrix += setting("bf16", "honest", pace="2 1") + setting(LONG, "noise", pace="2 2")

    run = suite("-k", f"{HERE} and (bf16 or gptq or {LONG})", "--lifetimes", "2", matrix=matrix)

    lines = own(run.output)
    words = "".join("".join(lines).split())
    assert "\x1b" not in run.output
    assert [] == [line for line in lines if len(line) > 80 and " " in line.strip() and not line.startswith(("FAILED", "put"))]
    assert LONG in words
    assert "tokenspersecond" in words


def test_speeds_stand_beside_the_verdicts(suite: Suite) -> None:
    """Seeded defect: a format that sleeps in decode. Lower in decode alone, as property and as ratio; recorded, replayed."""
    matrix = MATRIX + setting("bf16", "honest", pace="8 4") + setting("awq", "honest", pace="8 40")
    which = f"{HERE} and (bf16 or awq or int8) and test_repeat"

    run = suite("-k", which, "--record", "r", "--report", "html", matrix=matrix)

    quick, slow, none = (run.cases[f"test_repeat[alpha/{name}/cpu-here-decode]"].properties for name in ("bf16", "awq", "int8"))
    assert ("250.0", "25.0") == (quick["tokens_per_second.decode"], slow["tokens_per_second.decode"])
    assert float(quick["tokens_per_second.prefill"]) == float(slow["tokens_per_second.prefill"]) > 0
    assert ("bf16", "bf16") == (quick["tokens_per_second.baseline"], slow["tokens_per_second.baseline"])
    assert "rounds=3 decode_steps=3 prompt_tokens=" in slow["tokens_per_second.n"]
    assert ("", "") == (none["tokens_per_second.decode"], none["tokens_per_second.n"])
    header, first, second = run.output.partition("alpha on cpu-here: tokens per second\n")[2].splitlines()[:3]
    assert "format decode x prefill x n baseline".split() == header.split()  # noqa: SIM905
    assert [["bf16", "250.0", "1.00"], ["awq", "25.0", "0.10"]] == [first.split()[:3], second.split()[:3]]
    assert "no serving benchmark" in run.output
    again = suite("-k", which, "--replay", "r", matrix=matrix)
    assert slow == again.cases["test_repeat[alpha/awq/cpu-here-decode]"].properties | {"observation": slow["observation"]}
    assert "250.0 (\N{MULTIPLICATION SIGN}1.00)" in Path("html/report.html").read_text(encoding="utf-8")


def test_an_older_observation_has_no_figures_and_no_table(suite: Suite) -> None:
    """Stores and recordings from before the figures stay valid."""
    run = suite("-k", f"{HERE} and awq and test_repeat")

    assert 0 == run.code
    assert "tokens per second" not in run.output


# --------------------------------------------------------------------------------------------------------- engines


@pytest.mark.parametrize(
    ("clock", "text"),
    [
        (Clock(), ""),
        (Clock(cells=1, lifetimes=1), "engines: 1 started (1 cell lifetime); 1 cell; 0.0 s"),
        (Clock(cells=2, reused=2), "engines: 0 started; 2 cells, 2 of them from the store (--fresh measures again); 0.0 s"),
        (
            Clock(cells=3, reused=1, lifetimes=4, controls=1, verifications=2, traces=1),
            "engines: 8 started (4 cell lifetimes, 1 control, 2 re-executions, 1 trace); 3 cells, 1 of them from the store",
        ),
    ],
    ids=["nothing", "one", "reused", "all"],
)
def test_engines_are_counted(clock: Clock, text: str) -> None:
    """Every engine process, by what for."""
    assert terminal.engines(clock).startswith(text)
    assert bool(text) == bool(terminal.engines(clock))


def test_controls_are_among_the_engines(suite: Suite) -> None:
    """The engine with the seeded bit is counted, in a run of one cell."""
    run = suite("-k", f"{HERE} and bf16 and (test_repeat or bit_flip)", controls=True)

    assert "engines: 2 started (1 cell lifetime, 1 control); 1 cell; " in " ".join(run.output.split())


# ------------------------------------------------------------------------------------------------------------ rerun


@pytest.mark.parametrize(
    ("args", "extra", "which"),
    [
        (("--hardware", "cpu-here"), setting("awq", "noise"), "awq and decode"),
        (("--require-hardware", "cpu-here", "--no-controls"), setting("awq", "noise"), "awq and decode"),
        (("--require-hardware", "sm90"), "", "alpha/bf16/sm90 and test_kernel"),
        (("--lifetimes", "2", "--repeats", "4"), setting("awq", "restart_noise"), "awq and restart"),
        (("--max-flip-rate", "0.4", "--reference", "."), setting("awq", "noise"), "awq and prefill"),
        (("--store", "else where", "--matrix", "other.toml"), setting("awq", "noise"), "awq and decode"),
        (("--ignore-native", "--allow-download"), W4A4 + setting("w4a4", "noise"), "w4a4 and cpu-here and decode"),
        (("--no-hidden-states",), setting("awq", "noise"), "awq and cpu-here and decode"),
        (("INJECT",), "", "awq and cpu-here and decode"),
    ],
    ids=["hardware", "require", "lacking", "lifetimes", "rate", "store", "native", "layers", "injected"],
)
def test_the_rerun_command_gives_the_same(
    suite: Suite, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], extra: str, which: str
) -> None:
    """As printed, it runs that one case with the same outcome and message."""
    if args == ("INJECT",):
        monkeypatch.setenv("QUANTDET_INJECT", "bitflip:awq")
        args = ()
    matrix = MATRIX + extra
    (pytester.path / "other.toml").write_text(matrix, encoding="utf-8")
    run = suite("-k", which, *args, matrix=matrix)
    assert run.code == 1, run.output

    (line,) = re.findall(r"rerun(?: the first failure without a verdict)?: (.*)", run.output)
    words = shlex.split(line)
    monkeypatch.delenv("QUANTDET_INJECT", raising=False)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    assert "pytest" == words.pop(0)
    again = suite(*words, matrix=matrix)

    assert run.code == again.code, again.output
    (case,) = again.cases
    assert (run.cases[case].outcome, run.cases[case].message) == (again.cases[case].outcome, again.cases[case].message)
    for option in (word for word in args if word.startswith("--")):
        assert any(word.partition("=")[0] == option for word in words), words


def test_the_rerun_command_names_the_file_from_where_the_run_was_started(
    suite: Suite, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pytest's ids begin at the root folder, the command at the folder at hand."""
    suite("-k", "nothing at all")
    inside = pytester.mkdir("inside")
    monkeypatch.chdir(inside)
    matrix = MATRIX + setting("awq", "noise")
    (pytester.path / "quant_matrix.toml").write_text(matrix, encoding="utf-8")

    result = pytester.runpytest_inprocess("..", "-k", "awq and cpu-here and decode", "--no-controls")

    assert "  rerun: pytest '../test_repeat.py::test_repeat[" in result.stdout.str()


# --------------------------------------------------------------------------------------------------------- progress

CELL = Cell("alpha", "awq", "cpu-here")


def said(monkeypatch: pytest.MonkeyPatch, *, tty: bool = True, verbosity: int = 0, **environment: str) -> str:
    """What is written around an engine that takes 12.5 seconds."""
    for name in ("CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    written = io.StringIO()
    reporter = SimpleNamespace(isatty=tty, write=lambda text, **_: written.write(text), flush=lambda: None)
    plugins = SimpleNamespace(get_plugin=lambda name: reporter)
    config: Any = SimpleNamespace(pluginmanager=plugins, get_verbosity=lambda: verbosity)
    times = iter((100.0, 112.5))
    announce = progress.announcer(config, clock=lambda: next(times))
    with nullcontext() if announce is None else announce(CELL, 1, "control"):
        pass
    return written.getvalue()


def test_progress_says_cell_part_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one line, at a terminal."""
    assert " [alpha/awq/cpu-here control, lifetime 2 ... 12.5 s]" == said(monkeypatch)


@pytest.mark.parametrize("off", [{"tty": False}, {"verbosity": -1}, {"CI": "true"}, {"BUILD_NUMBER": "7"}], ids=str)
def test_progress_is_off_where_nobody_looks(monkeypatch: pytest.MonkeyPatch, off: dict[str, Any]) -> None:
    """In a pipe, with -q, in CI."""
    assert "" == said(monkeypatch, **off)
