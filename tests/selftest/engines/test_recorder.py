"""One lifetime's records: which repeats are the same, where they differ, and answers that are not the captured logits'."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from quantdet.engines.child.capture import CaptureError
from quantdet.engines.child.recorder import Recorder
from quantdet.engines.plan import Plan, PlannedPrompt
from quantdet.matrix.cell import PHASES, Phase
from selftest.fakes.engine import block_of, flip, pseudo_logits

IDS = [3, 1, 4, 1, 5]
STEPS = 3
Edit = Callable[[dict[str, Any]], object]


def record(*edits: Edit | None, served: Edit | None = None) -> Recorder:
    """One prompt, one repeat per edit of its logits; `served`: the engine answers from other logits than were captured."""
    plan = Plan({}, "", "float32", {}, {}, (), repeats=len(edits), decode_tokens=STEPS, top_k=4)
    recorder = Recorder(plan)
    recorder.begin(PlannedPrompt("p0", tuple(IDS)), IDS, len(IDS))
    for edit in edits:
        rows: dict[str, Any] = {
            "decode": pseudo_logits("f", IDS, "decode", STEPS), "prefill": pseudo_logits("f", IDS, "prefill", len(IDS) - 1)
        }  # fmt: skip
        tokens = np.argmax(rows["decode"], axis=1).astype(np.int32)
        if edit is not None:
            edit(rows)
        answered = {phase: logits.copy() for phase, logits in rows.items()}
        if served is not None:
            served(answered)
        decode, prefill = block_of(answered["decode"], tokens, 4), block_of(answered["prefill"], np.asarray(IDS[1:]), 4)
        recorder.add(tokens, rows["decode"], rows["prefill"], decode, prefill)
    recorder.end()
    return recorder


@pytest.mark.parametrize("phase", PHASES)
def test_repeats_that_differ_in_one_bit_are_two_outputs(phase: Phase) -> None:
    """In either phase; the commonest is kept once, and what differed is noted where it is."""
    found = record(None, lambda rows: flip(rows[phase], 1, 7), None)

    assert (0, 1, 0) == found.records[0].header.runs
    assert 2 == len(found.records[0].outputs)
    (seen,) = found.divergences
    assert (phase, 1, 1, 7, 1, 1) == (seen.phase, seen.repeat, seen.position, seen.token, seen.ulp, seen.differing)
    assert 0 < seen.max_abs < 1e-6


def test_equal_repeats_are_one_output() -> None:
    found = record(None, None, None)

    assert ((0, 0, 0), 1, []) == (found.records[0].header.runs, len(found.records[0].outputs), found.divergences)


def stopping(
    flips: list[dict[int, Phase]], planned: int = 12, least: int | None = 3, first: Edit = lambda rows: None
) -> Recorder:
    """One prompt per entry: the phase of which one bit is turned over, by repeat; ended as an engine is to end it.

    `first`: edits every repeat of the first prompt.
    """
    extra = {} if least is None else {"least_repeats": least}
    plan = Plan({}, "", "float32", {}, {}, (), repeats=planned, decode_tokens=STEPS, top_k=4, **extra)
    recorder = Recorder(plan)
    for number, phases in enumerate(flips):
        recorder.begin(PlannedPrompt(f"p{number}", tuple(IDS)), IDS, len(IDS))
        for repeat in range(planned):
            if recorder.enough(repeat):
                break
            rows = {
                "decode": pseudo_logits("f", IDS, "decode", STEPS), "prefill": pseudo_logits("f", IDS, "prefill", len(IDS) - 1)
            }  # fmt: skip
            tokens = np.argmax(rows["decode"], axis=1).astype(np.int32)
            if number == 0:
                first(rows)
            if repeat in phases:
                flip(rows[phases[repeat]], 1, 7)
            decode, prefill = block_of(rows["decode"], tokens, 4), block_of(rows["prefill"], np.asarray(IDS[1:]), 4)
            recorder.add(tokens, rows["decode"], rows["prefill"], decode, prefill)
        recorder.end()
    return recorder


def test_without_noise_every_planned_repeat_is_made() -> None:
    """And where no bound decides their number, with noise too."""
    assert [(0,) * 12] * 2 == [record.header.runs for record in stopping([{}, {}]).records]
    assert [(0, 1) + (0,) * 10, (0,) * 12] == [r.header.runs for r in stopping([{1: "decode"}, {}], least=None).records]


@pytest.mark.parametrize(("noisy", "kept"), [(1, 3), (2, 3), (3, 4), (7, 8), (10, 11), (11, 12)])
def test_noise_ends_the_repeats_of_every_prompt(noisy: int, kept: int) -> None:
    """With the repeat that differed, but after no fewer than were asked for; of earlier prompts the later ones are dropped."""
    found = stopping([{}, {noisy: "decode"}, {}])

    assert kept == found.repeats
    quiet, flipped = (0,) * kept, tuple(int(repeat == noisy) for repeat in range(kept))
    assert [quiet, flipped, quiet] == [record.header.runs for record in found.records]
    assert [1, 2, 1] == [len(record.outputs) for record in found.records]
    assert [("p1", noisy)] == [(seen.prompt, seen.repeat) for seen in found.divergences]


@pytest.mark.parametrize("last", [5, 11])
def test_noise_that_was_seen_is_not_dropped_for_earlier_noise_of_another_prompt(last: int) -> None:
    """Prefill noise in a late repeat of one prompt stays, though a later prompt's decode is noisy before that."""
    found = stopping([{}, {last: "prefill"}, {4: "decode"}])

    assert last + 1 == found.repeats
    assert {last + 1} == {len(record.header.runs) for record in found.records}
    assert [("p1", "prefill", last), ("p2", "decode", 4)] == [(s.prompt, s.phase, s.repeat) for s in found.divergences]
    assert [1, 2, 2] == [len(record.outputs) for record in found.records]


def test_what_is_no_number_is_noted_of_the_repeats_that_are_kept() -> None:
    def spoil(rows: dict[str, Any]) -> None:
        rows["decode"][2, 9] = np.nan

    with np.errstate(invalid="ignore"):
        found = stopping([{}, {4: "decode"}], first=spoil)

    assert [("p0", repeat) for repeat in range(5)] == [(one.prompt, one.repeat) for one in found.nonfinite]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("phase", PHASES)
def test_a_logit_that_is_no_number_is_noted(phase: Phase, bad: float) -> None:
    """Phase, repeat and first position; -inf too, which leaves every reported logprob finite."""

    def spoil(rows: dict[str, Any]) -> None:
        rows[phase][2, 9] = rows[phase][1, 900] = bad

    with np.errstate(invalid="ignore"):
        found = record(None, spoil)

    assert [("p0", phase, 1, 1)] == [(one.prompt, one.phase, one.repeat, one.position) for one in found.nonfinite]


def test_a_zero_that_changes_its_sign_is_named() -> None:
    """No gap is larger than 0 there, and the token is found by its bits."""

    def zero(sign: float) -> Edit:
        return lambda rows: rows["decode"].__setitem__((2, 11), sign * 0.0)

    (seen,) = record(zero(1.0), zero(-1.0)).divergences

    assert (2, 11, 1, 0, 0.0) == (seen.position, seen.token, seen.differing, seen.ulp, seen.max_abs)


@pytest.mark.parametrize("phase", PHASES)
def test_an_answer_from_other_logits_is_refused(phase: Phase) -> None:
    """The tap saw another request's rows, or the next row: nothing that is recorded would be what was served."""
    with pytest.raises(CaptureError, match="prompt p0: captured logits are not those that were served: logprobs differ by"):
        record(None, served=lambda rows: rows[phase].__setitem__(slice(None), np.roll(rows[phase], 1, axis=0)))


def test_an_answer_that_is_no_number_is_refused() -> None:
    """Finite logits do not have NaN for a logprob."""

    def spoil(rows: dict[str, Any]) -> None:
        rows["decode"][1, 0] = np.nan

    with np.errstate(invalid="ignore"), pytest.raises(CaptureError, match="logprobs differ by nan"):
        record(None, served=spoil)
