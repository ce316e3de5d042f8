"""Why an engine gave nothing to judge: the first line has its own words, wherever they stand, and one cause is one cause."""

from pathlib import Path

import pytest

from quantdet.judging import causes, restart
from quantdet.judging.results import Measured, Missing, Refusal
from quantdet.judging.verdicts import Cause, Verdict
from quantdet.matrix.cell import Cell
from quantdet.matrix.expectations import Expectations
from selftest.fakes.observation import observation

CELL = Cell("alpha", "awq", "cpu-here")
OTHER = Cell("alpha", "ct", "cpu-here")
NOTHING = Expectations(())
ENDED = "engine process ended with exit code 1, no completion record"


def crashed(first: str, *log: str, path: str = "/store/logs/awq.0.17.log") -> Missing:
    """What `measuring` says of a crash, with the log's end."""
    return Missing(Verdict.ERROR, first, path, log)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (("INFO loading", "torch.AcceleratorError: CUDA error: device-side assert triggered", "done"),
         "torch.AcceleratorError: CUDA error: device-side assert triggered"),
        (("(EngineCore pid=7) ERROR 07-01 12:00:00 [core.py:1100] ValueError: no kernel takes 96 columns",),
         "ValueError: no kernel takes 96 columns"),
        (("terminate called after throwing an instance of 'c10::Error'", "  what():  CUDA driver error: out of memory"),
         "what():  CUDA driver error: out of memory"),
        (("Fatal Python error: Segmentation fault", "Current thread 0x01 (most recent call first):"),
         "Fatal Python error: Segmentation fault"),
        (("worker: machete.cu:41: void run(): Assertion `k % 64 == 0' failed.",),
         "worker: machete.cu:41: void run(): Assertion `k % 64 == 0' failed."),
        (("KeyError: 'old'", "ValueError: the last one", "RuntimeError: Engine core failed. See root cause above."),
         "ValueError: the last one"),
    ],
    ids=["torch", "logger", "c++", "python", "assert", "wrapped"],
)  # fmt: skip
def test_a_process_without_a_word_is_told_by_its_log(log: tuple[str, ...], words: str) -> None:
    """The last line that is a reason; how the process ended stands behind it."""
    assert f"ERROR {CELL}: {words} ({ENDED})" == causes.missing(CELL, crashed(ENDED, *log)).first


@pytest.mark.parametrize("log", [("INFO all is well", "done: no error"), ()], ids=["chatter", "silence"])
def test_a_log_without_a_reason_gives_none(log: tuple[str, ...]) -> None:
    """No line is taken for what it is not."""
    assert f"ERROR {CELL}: {ENDED}" == causes.missing(CELL, crashed(ENDED, *log)).first


def test_a_reason_above_the_excerpt_is_found(tmp_path: Path) -> None:
    """An engine that points at a cause above may have written it long before the last lines."""
    path = tmp_path / "log"
    path.write_text("ValueError: the cause \x1b[31m\x07\n" + "chatter\n" * 50, encoding="utf-8")
    first = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"

    found = causes.missing(CELL, crashed(first, "chatter", path=str(path)))

    assert f"ERROR {CELL}: ValueError: the cause \\x07 ({first})" == found.first


def test_words_of_its_own_are_kept(tmp_path: Path) -> None:
    """An engine that has said why is not overruled by an older line of its log."""
    found = causes.missing(CELL, crashed("MemoryError: cannot allocate", "ValueError: caught and forgotten"))

    assert f"ERROR {CELL}: MemoryError: cannot allocate" == found.first


def test_a_process_that_was_killed_from_outside_is_not_explained_by_its_log(tmp_path: Path) -> None:
    """What it had last said was not why: no line of the log is quoted, and none is looked for."""
    path = tmp_path / "log"
    path.write_text("ValueError: caught and forgotten\n", encoding="utf-8")
    first = "engine process killed by SIGKILL, no completion record"

    assert f"ERROR {CELL}: {first}" == causes.missing(CELL, crashed(first, path=str(path))).first


def test_where_the_log_is_makes_no_other_cause() -> None:
    """The same words from two engines of a cell are one cause; the path follows in the detail."""
    one, other = (
        causes.missing(CELL, Missing(Verdict.TIMEOUT, "no answer within 60 s", f"/logs/{name}")) for name in ("a", "b")
    )

    assert (f"TIMEOUT {CELL}: no answer within 60 s", "  log: /logs/a") == (one.first, one.detail)
    assert one == other
    assert one != Cause(one.verdict, OTHER, one.aspect, one.why)


@pytest.mark.parametrize(
    ("result", "first"),
    [
        (Missing(Verdict.UNAVAILABLE, "weights: needs a file"), None),
        (Missing(Verdict.INVALID, "the checkpoint changed"), f"INVALID {CELL}: the checkpoint changed"),
        (Refusal("ValueError: not here"), f"UNSUPPORTED {CELL}: engine refused: ValueError: not here"),
        (Measured((observation("awq"),)), None),
    ],
    ids=["unavailable", "invalid", "refused", "measured"],
)
def test_what_keeps_a_cell_from_being_judged(result: Missing | Refusal | Measured, first: str | None) -> None:
    """What cannot be here is no cause, nor is what was measured."""
    found = causes.of(CELL, result, NOTHING)

    assert first == (None if found is None else found.first)


def test_the_verifier_that_broke_is_the_cause_and_a_refusal_only_of_the_claimed_numbers() -> None:
    """Formats that are refused are lacking, as long as one with the claim's numbers ran."""
    died, refused = crashed("RuntimeError: broke"), Refusal("ValueError: not here")

    def of(results: dict[Cell, Missing | Refusal], *own: Cell) -> str | None:
        found = causes.of_reexecution(results, own, lambda cell: NOTHING)
        return None if found is None else found.first

    assert f"ERROR {OTHER}: RuntimeError: broke" == of({CELL: refused, OTHER: died}, CELL)
    assert f"UNSUPPORTED {CELL}: engine refused: ValueError: not here" == of({OTHER: refused, CELL: refused}, CELL)
    assert of({OTHER: refused}, CELL) is None


def test_restarts_have_no_cause_of_their_own() -> None:
    """A judgement of what was measured names none."""
    assert restart.restart([observation(), observation(lifetime=1)], NOTHING).cause is None
