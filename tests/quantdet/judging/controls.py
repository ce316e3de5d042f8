"""Verdicts about controls: pure functions, no engine, no I/O."""

from quantdet.judging import repeat
from quantdet.judging.differences import first_position_between
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import PHASES, Phase
from quantdet.matrix.expectations import Expectations
from quantdet.observations.comparable import comparable
from quantdet.observations.observation import Observation
from quantdet.observations.seeded_flips import FLIPS

_NOTHING = Expectations(())


def bit_flip(observation: Observation) -> Judgement:
    """Was every bit that the engine turned over found, in the repeat and at the place where it was, and nothing else?"""
    cell, header = observation.cell, observation.header
    words, wrong = [], []
    for phase, (position, token) in FLIPS[header.inject].items():
        found = repeat.repeat((observation,), phase, _NOTHING)
        where = f"prompt {header.prompts[0].id} {'step' if phase == 'decode' else 'position'} {position}"
        place = f"{where} in repeat {header.repeats - 1}"
        others = sum(len(set(p.runs)) - 1 for p in header.prompts)
        seen = [d for d in header.divergences if d.phase == phase]
        exact = len(seen) == 1 and (seen[0].token, seen[0].ulp, seen[0].differing) == (token, 1, 1)
        alone = others == 1 and _differing(observation, phase) == 1
        if found.verdict is Verdict.NOISY and found.figures["first_divergence"] == place and exact and alone:
            words.append(f"{phase} {where}")
        else:
            more = "" if alone else f"; {_differing(observation, phase)} positions differ, in {others} outputs"
            wrong.append(f"{phase}: one bit turned over at {place}, found: {found.message}{more}")
    if wrong:
        return Judgement(Verdict.INVALID, cell, "control", wrong[0], False, {}, "\n".join(wrong[1:]))
    text = f"one bit turned over in repeat {header.repeats - 1} is found in each phase: {', '.join(words)}"
    return Judgement(Verdict.NOISY, cell, "control", text, True, {"expectation": "noisy: seeded in the engine"})


def _differing(observation: Observation, phase: Phase) -> int:
    """Positions at which the logits of any prompt's other outputs differ from those of its first."""
    return sum(
        int((output.block(phase).digests != prompt.outputs[0].block(phase).digests).any(axis=1).sum())
        for prompt in observation.prompts
        for output in prompt.outputs[1:]
    )


def same_weights(own: Observation, renamed: Observation) -> Judgement:
    """Does the same checkpoint under another name, in another process, give the same bits? Repeat 0 of each."""
    cell, figures = own.cell, {"expectation": "identical: the same weights under another name, in another process"}
    if own.header.checkpoint_sha256 != renamed.header.checkpoint_sha256:
        return Judgement(Verdict.INVALID, cell, "control", "the copy has other weights", False, figures)
    if why := _cannot_compare(own, renamed):
        return Judgement(Verdict.INVALID, cell, "control", why, False, figures)
    where = first_position_between(own, renamed)
    if where:
        return Judgement(Verdict.DISTINCT, cell, "control", f"the same weights give other bits at {where}", False, figures)
    rows = sum(len(prompt.run(0).block(phase).digests) for prompt in own.prompts for phase in PHASES)
    text = f"the same weights under another name, in another process: {rows} of {rows} positions equal"
    return Judgement(Verdict.IDENTICAL, cell, "control", text, True, figures)


def one_integer(own: Observation, altered: Observation) -> Judgement:
    """Is a checkpoint with one integer changed by one told apart, and where does it show first?"""
    cell, figures = own.cell, {"expectation": "distinct: one weight integer differs by 1"}
    if own.header.checkpoint_sha256 == altered.header.checkpoint_sha256:
        return Judgement(Verdict.INVALID, cell, "control", "the altered checkpoint has the same weights", False, figures)
    if why := _cannot_compare(own, altered):
        return Judgement(Verdict.INVALID, cell, "control", why, False, figures)
    where = first_position_between(own, altered)
    changed = f"one integer of {altered.header.checkpoint_source} changed by 1"
    if not where:
        return Judgement(Verdict.IDENTICAL, cell, "control", f"{changed}, no bit of any logit differs", False, figures)
    differing = rows = 0
    for one, other in zip(own.prompts, altered.prompts, strict=True):
        a, b = one.run(0).prefill.digests, other.run(0).prefill.digests
        differing, rows = differing + int((a != b).any(axis=1).sum()), rows + len(a)
    text = f"{changed} shows first at {where}, in {differing} of {rows} prefill positions"
    return Judgement(Verdict.DISTINCT, cell, "control", text, True, {**figures, "first_divergence": where})


def _cannot_compare(own: Observation, seeded: Observation) -> str:
    """Why a difference, or none, would say nothing of the weights; empty if it does."""
    if own.header.nonfinite or seeded.header.nonfinite:
        return "non-finite logits"
    why = comparable(own, seeded)
    return "" if why is None else f"cannot be compared with the cell's own measurement: {why}"
