"""Controls: what was seeded is found where it is, what is the same is the same, and no BIT_EXACT counts without them."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantdet.judging.results import Measured, Missing, Refusal, Result
from quantdet.judging.verdicts import Verdict
from quantdet.matrix.cell import PHASES, Cell
from quantdet.matrix.expectations import Expectations
from quantdet.matrix.load import load
from quantdet.metrics.bounds import flip_rate_upper
from quantdet.report import confidence
from quantdet.report.case import Case
from quantdet.session import controls
from selftest.fakes import cases as made
from selftest.fakes.inner import Suite
from selftest.fakes.judged import one_flip
from selftest.fakes.matrix import MATRIX, expect, setting
from selftest.fakes.observation import observation
from selftest.judging.test_controls import control

pytest_plugins = ["pytester"]

HERE = "alpha and cpu-here"
BF16, GPTQ, AWQ = (Cell("alpha", name, "cpu-here") for name in ("bf16", "gptq", "awq"))
CASES = {
    f"test_bit_flip[{BF16.id}]": "NOISY",
    f"test_same_weights[{BF16.id}]": "IDENTICAL",
    f"test_one_integer[{GPTQ.id}]": "DISTINCT",
    f"test_known_noise[{AWQ.id}]": "NOISY",
}
NOISE = setting("awq", "noise") + expect("awq", "noisy")
NONE_KNOWN = "no kernel known to be noisy is eligible here (none in the matrix)"


def engine_starts(path: Path) -> str:
    return f'\n[[setting]]\nwhen = {{}}\nargs = {{ starts = "{path}" }}\nreason = "counts"\n'


class Known:
    """As much of a session as `controls` asks; `flip` and `noise`: what comes of them."""

    def __init__(self, folder: Path, flip: Result, noise: Result | None = None, **options: Any) -> None:
        path = folder / "matrix.toml"
        path.write_text(MATRIX + (expect("awq", "noisy") if noise is not None else ""), encoding="utf-8")
        self.matrix = load(path)
        self.options = SimpleNamespace(no_controls=False, **options)
        self.evidence = SimpleNamespace(replayed=False)
        self.calls: list[str] = []
        self._flip, self._noise = flip, noise

    def cells(self) -> list[Cell]:
        return list(self.matrix.cells())

    def gate(self, cell: Cell) -> str | None:
        return None if cell.hardware_id == "cpu-here" else "elsewhere"

    def pinned(self, cell: Cell) -> bool:
        return True

    def expectations(self, cell: Cell) -> Expectations:
        return self.matrix.expectations(None)

    def control(self, cell: Cell, kind: str) -> Result:
        self.calls.append(f"{kind} of {cell}")
        return self._flip

    def result(self, cell: Cell) -> Result:
        assert self._noise is not None
        self.calls.append(str(cell))
        return self._noise


CAUGHT = Measured((control(rows={"decode": [1], "prefill": [1]}),))
MISSED = Measured((control(rows={"decode": [1]}),))
NOISY = Measured((one_flip(observation("awq"), 0, "decode", 1),))
QUIET = Measured((observation("awq"),))
DIED = Missing(Verdict.ERROR, "engine process killed\n  log: here")


@pytest.mark.parametrize(
    ("flip", "noise", "caught", "blind", "text"),
    [
        (CAUGHT, None, True, False, f"bit flip caught in alpha/bf16; {NONE_KNOWN}"),
        (CAUGHT, NOISY, True, False, "bit flip caught in alpha/bf16; known noise caught in alpha/awq"),
        (CAUGHT, QUIET, False, False, "bit flip caught in alpha/bf16; known noise NOT SEEN in alpha/awq"),
        (CAUGHT, DIED, False, False, "bit flip caught in alpha/bf16; known noise not tried: alpha/awq"),
        (DIED, NOISY, False, True, "bit flip not tried: alpha/bf16/cpu-here: engine process killed; known noise caught in"),
        (Refusal("no"), None, False, False, "bit flip not tried: alpha/bf16/cpu-here: no"),
        (MISSED, NOISY, False, True, "INVALID alpha/bf16/cpu-here control: prefill: one bit turned over at prompt p0"),
    ],
)
def test_everything_that_had_to_be_caught_was(
    tmp_path: Path, flip: Result, noise: Result | None, caught: bool, blind: bool, text: str
) -> None:
    """A kernel that is known to be noisy has to show it too, where there is one; neither makes up for the other."""
    session: Any = Known(tmp_path, flip, noise)

    found = controls.Controls(session).status(GPTQ)

    assert (caught, blind) == (found.caught, found.blind)
    assert text in found.text


ABSENT = Missing(Verdict.UNAVAILABLE, "weights: none here")


def test_where_the_weights_of_the_first_cell_are_missing_the_judged_one_is_its_control(tmp_path: Path) -> None:
    """A matrix may begin with a model that is not here; noise that cannot be tried is no noise that was not seen."""
    session: Any = Known(tmp_path, CAUGHT, ABSENT)
    session.control = lambda cell, kind: ABSENT if cell == BF16 else CAUGHT

    found = controls.Controls(session).status(GPTQ)

    assert (True, False) == (found.caught, found.blind)
    assert "bit flip caught in alpha/gptq; known noise not tried, alpha/awq is UNAVAILABLE" == found.text


def test_controls_are_tried_once(tmp_path: Path) -> None:
    """And for their own hardware only."""
    session: Any = Known(tmp_path, CAUGHT, NOISY)

    known = controls.Controls(session)

    first, again = known.status(GPTQ), known.status(AWQ)
    elsewhere = known.status(replace(GPTQ, hardware_id="cpu-elsewhere"))

    assert first is again
    assert [str(AWQ), f"control of {BF16}"] == session.calls
    assert (None, "no cell to turn a bit over in") == (elsewhere.caught, elsewhere.flip)


def test_nothing_is_seeded_where_nobody_wants_it(tmp_path: Path) -> None:
    """--no-controls, which is said."""
    session: Any = Known(tmp_path, CAUGHT, NOISY)
    session.options.no_controls = True

    known = controls.Controls(session)

    assert (None, "uncontrolled: --no-controls") == ((found := known.status(GPTQ)).caught, found.text)
    assert [] == session.calls == known.cells("bit_flip")


@pytest.mark.parametrize(
    ("name", "wanted"), [("bit_flip", BF16), ("same_weights", BF16), ("one_integer", GPTQ), ("known_noise", AWQ)]
)
def test_each_hardware_has_one_cell_of_each_control(tmp_path: Path, name: Any, wanted: Cell) -> None:
    """The first that will do: exact ones for a flip, integers for an integer, known noise for noise."""
    session: Any = Known(tmp_path, CAUGHT, NOISY)

    assert [wanted] == controls.Controls(session).cells(name)


def case(controlled: str, runs: int = 5, verdict: str = "BIT_EXACT", hardware: str = "sm90", vllm: str = "") -> Case:
    figures = {"controlled": controlled, "control": f"caught: {controlled}", "runs": runs}
    return made.case("test_repeat", verdict, hardware=hardware, vllm=vllm, figures=figures)


def test_what_counts_is_counted() -> None:
    """BIT_EXACT repeats whose hardware's controls were caught; none of them is said aloud."""
    some = [case("yes"), case("missed"), case("no"), case("yes", verdict="NOISY"), replace(case("yes"), test="test_restart")]

    assert "1 of 3 BIT_EXACT count" == confidence.counted(some)
    assert "2 of 2 BIT_EXACT count" == confidence.counted([case("yes"), case("yes")])
    assert "UNCONTROLLED: none of 2 BIT_EXACT counts" == confidence.counted([case("missed"), case("no")])


def test_controls_are_reported_by_hardware_and_version() -> None:
    cases = [case("yes"), case("missed", hardware="cpu"), case("no", vllm="0.26.0")]

    assert {
        "sm90": "1 of 1 BIT_EXACT count: caught: yes",
        "cpu": "UNCONTROLLED: none of 1 BIT_EXACT counts: caught: missed",
        "sm90 0.26.0": "UNCONTROLLED: none of 1 BIT_EXACT counts: caught: no",
    } == confidence.controls(cases)


def test_the_bound_for_all_at_once_is_that_of_the_fewest_runs_with_its_share_of_the_doubt() -> None:
    """Bonferroni: each of three gets a third of 5 %; those that do not count are not among them."""
    cases = [case("yes", 59), case("yes", 20), case("yes", 300), case("no", 2), case("yes", 2, verdict="NOISY")]

    bound = flip_rate_upper(0, 20, 1 - 0.05 / 3)
    assert f"all 3 BIT_EXACT at once: flip rate < {bound:.3g} per call at 95%" == confidence.at_once(cases)
    assert bound > flip_rate_upper(0, 20)
    assert "" == confidence.at_once([case("yes", verdict="NOISY")])


def test_controls_are_caught_reported_recorded_and_replayed(suite: Suite, tmp_path: Path) -> None:
    """Four cases that pass; every BIT_EXACT counts and says why; a recording says the same again, without an engine."""
    starts = tmp_path / "starts"
    select = ("-k", f"{HERE} and (test_controls or test_repeat)")
    matrix = MATRIX + NOISE + engine_starts(starts)

    measured = suite(*select, "--record", "kept", matrix=matrix, controls=True)
    engines = starts.read_text()
    replayed = suite(*select, "--replay", "kept", matrix=matrix, controls=True)

    assert 0 == measured.code, measured.output
    assert CASES == {name: one.verdict for name, one in measured.ran().items() if "test_repeat" not in name}
    exact = [one for name, one in measured.ran().items() if "test_repeat" in name and one.verdict == "BIT_EXACT"]
    assert {("yes", "bit flip caught in alpha/bf16; known noise caught in alpha/awq")} == {
        (one.properties["controlled"], one.properties["control"]) for one in exact
    }
    assert 8 == len(exact)
    text = "8 of 8 BIT_EXACT count: bit flip caught in alpha/bf16; known noise caught in alpha/awq"
    assert text == measured.suite["controls.cpu-here"]
    assert f"controls on cpu-here: {text}" in " ".join(measured.output.split())
    assert "; 8 of 8 BIT_EXACT count; 0 unexpected;" in measured.suite["summary"]
    assert measured.suite["bounds.at_once"].startswith("all 8 BIT_EXACT at once: flip rate < 0.816 per call")
    assert measured.suite["bounds.at_once"] in " ".join(measured.output.split())
    assert sorted([*(f"alpha/{name}" for name in ("bf16", "gptq", "ct", "awq", "int8")), "alpha/bf16", "alpha/gptq"]) == sorted(
        engines.splitlines()
    )  # every cell once, and two controls
    assert engines == starts.read_text()
    assert measured.ran() == replayed.ran()
    assert replayed.suite["controls.cpu-here"] == text


def test_an_engine_in_which_no_flip_is_seen_has_no_bit_exact(suite: Suite, tmp_path: Path) -> None:
    """INVALID where nothing else was wrong: the control is tried, once, though its own case is not selected."""
    starts = tmp_path / "starts"
    matrix = MATRIX + setting("bf16", "blind") + setting("gptq", "blind") + engine_starts(starts)

    run = suite("-k", f"{HERE} and (awq and test_repeat or test_one_integer)", matrix=matrix, controls=True)

    repeats = {f"test_repeat[{AWQ.id}-{phase}]": "INVALID" for phase in PHASES}
    assert {**repeats, f"test_one_integer[{GPTQ.id}]": "IDENTICAL"} == run.failures(), run.output
    for phase in PHASES:
        failed = run.cases[f"test_repeat[{AWQ.id}-{phase}]"]
        words = f"INVALID {AWQ} {phase}: no repeat differs, but no seeded difference was seen either: INVALID {BF16} control"
        assert failed.message.startswith(words)
        assert "missed" == failed.properties["controlled"]
    assert ["alpha/awq", "alpha/bf16", "alpha/gptq", "alpha/gptq"] == sorted(starts.read_text().splitlines())


def test_known_noise_that_is_not_seen_counts_against_every_bit_exact(suite: Suite) -> None:
    """They stand, and do not count; the known-noisy kernel's own case fails, and the same weights from elsewhere differ."""
    matrix = MATRIX + setting("bf16", "path") + expect("awq", "noisy")

    run = suite("-k", f"{HERE} and (int8 and test_repeat or test_controls)", matrix=matrix, controls=True)

    assert {f"test_known_noise[{AWQ.id}]": "BIT_EXACT", f"test_same_weights[{BF16.id}]": "DISTINCT"} == run.failures()
    text = "bit flip caught in alpha/bf16; known noise NOT SEEN in alpha/awq"
    for phase in PHASES:
        passed = run.cases[f"test_repeat[alpha/int8/cpu-here-{phase}]"]
        assert ("passed", "BIT_EXACT", "missed", text) == (
            passed.outcome, passed.verdict, passed.properties["controlled"], passed.properties["control"]
        )  # fmt: skip
    assert "UNCONTROLLED: none of 2 BIT_EXACT counts; 2 unexpected" in run.suite["summary"]
    assert f"controls on cpu-here: UNCONTROLLED: none of 2 BIT_EXACT counts: {text}" in " ".join(run.output.split())


def test_a_control_is_no_measurement_of_its_cell(suite: Suite) -> None:
    """Recorded for another cell's sake, it is judged again as a control and never as the cell that it was seeded in."""
    measured = suite("-k", "beta and test_repeat", "--record", "kept", controls=True)

    replayed = suite("--replay", "kept", controls=True)

    repeats = {name: one for name, one in measured.ran().items() if "test_repeat" in name}
    assert {"yes"} == {one.properties["controlled"] for one in repeats.values()}
    again = {name: one for name, one in replayed.ran().items() if not name.startswith(("test_kernel", "test_distinct"))}
    assert {*repeats, f"test_bit_flip[{BF16.id}]"} == set(again), replayed.output
    assert repeats == {name: again[name] for name in repeats}
    assert "skipped" == replayed.cases[f"test_repeat[{BF16.id}-decode]"].outcome
    assert "UNAVAILABLE replay: needs a recording" in replayed.cases[f"test_distinct[{BF16.id}]"].message
