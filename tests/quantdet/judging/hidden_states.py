"""Do repeats of a request have the same hidden states, layer by layer? A pure judgement over digests of every position."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantdet.judging.differences import at, beyond, has_to_be_exact
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import Phase
from quantdet.matrix.expectations import Expect, Expectations, describe
from quantdet.metrics import bounds
from quantdet.metrics.bits import distinct
from quantdet.observations.hidden_states import HiddenStates
from quantdet.observations.observation import Observation


@dataclass(frozen=True)
class FirstDifference:
    """Where a repeat differs first from repeat 0: what is computed first stands first.

    In prefill that is the earliest layer and, within it, the earliest position; in decode the earliest step and, within it, the
    earliest layer. `position` is the position of the prompt, or the decode step.
    """

    prompt: str
    layer: str
    position: int
    repeat: int


def repeat(observations: Sequence[Observation], phase: Phase, expectations: Expectations) -> Judgement:
    """Did every repeat of every request give the same bits in every layer in `phase`, within each engine lifetime?

    Prefill is the prompt's forward pass, its last position included; decode are the steps from 1 on (step 0 of the logits
    comes from the last position of the prompt).

    A row of the matrix that declares a cell's logits noisy (or perhaps noisy) in a phase declares its hidden states so: the
    noise of a kernel is in the layers, and logits inherit it. The reverse does not hold. Noise that rounding hides from the
    logits is noise that nobody has declared: NOISY, the message says that the logits are equal, and the case fails.

    Where the logits of these same requests differ and no hidden state does, the difference comes from behind the last norm
    (the LM head, or what is done to logits), and the message of the BIT_EXACT says so.
    """
    cell = observations[0].cell
    row = expectations.noise(cell, phase)
    aspect = f"{phase} hidden states"
    figures: dict[str, object] = {"expectation": describe(row, "bit-exact"), "phase": phase, "max_abs_diff": None, "l2": None}
    parts = [(one, one.hidden) for one in observations if one.hidden is not None]
    if not parts:
        text = "needs hidden states, the observation has none"
        return Judgement(Verdict.UNAVAILABLE, cell, "hidden states", text, False, figures)
    for _, hidden in parts:
        if hidden.header.problem or not hidden.header.runs:
            why = hidden.header.problem or "no request was repeated"
            return Judgement(Verdict.INVALID, cell, aspect, why, False, figures)
    groups = [_groups(hidden, phase) for _, hidden in parts]
    calls = sum(map(len, groups))
    flips = sum(len(one) - max(Counter(one).values()) for one in groups)
    bound = bounds.flip_rate_upper(flips, calls)
    layers = len(parts[0][1].header.layers)
    logits = next(filter(None, (_first(one, hidden, phase, logits=True) for one, hidden in parts)), None)
    figures |= {
        "runs": calls, "lifetimes": len(parts), "distinct_outputs": max(max(one) + 1 for one in groups),
        "flip_rate_upper95": round(bound, 6), "hidden_states.layers": layers,
        "hidden_states.sha256": _sha256(parts[0][1], phase), "hidden_states.logits": "differ" if logits else "equal",
    }  # fmt: skip
    if (seconds := parts[0][1].header.seconds) is not None:
        figures["hidden_states.seconds"] = round(seconds, 3)
    if phase == "prefill":
        figures["hidden_states.last_position.sha256"] = _sha256(parts[0][1], phase, last=True)
    if not flips:
        text = f"0 of {calls} repeats differ in any of {layers} layers, flip rate < {bound:.3g} per call at 95 %"
        if logits is not None:
            text += f"; the logits of the same requests differ, first {_words(phase, logits)}: "
            text += f"the difference comes from behind {parts[0][1].header.layers[-1]} (LM head, logits)"
        figures |= {"first_divergence": "", "hidden_states.first_layer": "logits" if logits is not None else ""}
        expected = row is None or row.outcome == "may_be_noisy"
        detail = "" if row is None else "the matrix says that this phase is noisy; no repeat differed"
        return Judgement(Verdict.BIT_EXACT, cell, aspect, text, expected, figures, detail)
    first = next(filter(None, (_first(one, hidden, phase) for one, hidden in parts)))
    figures |= {"first_divergence": _words(phase, first), "hidden_states.first_layer": first.layer}
    equal = "" if logits is not None else "; the logits of the same requests are equal"
    text = f"{flips} of {calls} repeats differ, first {_words(phase, first)} in layer {first.layer}{equal}"
    long = _noisy_beyond(parts, phase, row)
    if long:
        text = f"noise beyond the declared {beyond(row)}, in prompt {long}: NOISY {cell} {aspect}: {text}"
        return Judgement(Verdict.NOISY, cell, aspect, text, False, figures, declared=False)
    return Judgement(Verdict.NOISY, cell, aspect, text, row is not None and row.outcome == "may_be_noisy", figures)


def _words(phase: Phase, place: FirstDifference) -> str:
    return f"prompt {place.prompt} {at(phase, place.position)} in repeat {place.repeat}"


def _groups(hidden: HiddenStates, phase: Phase) -> list[int]:
    """Group index per repeat: equal index, equal hidden states over all prompts; the logits do not count."""
    outputs = [
        b"".join(hidden.run(p, phase, index)[:-1].tobytes() for p in range(len(hidden.digests)))
        for index in range(hidden.header.repeats)
    ]
    return distinct(outputs)


def _first(observation: Observation, hidden: HiddenStates, phase: Phase, *, logits: bool = False) -> FirstDifference | None:
    """The first place in the order of the prompts; of `logits`, or of the layers before them."""
    for p, prompt in enumerate(observation.prompts):
        found: list[tuple[int, int, int]] = []
        base = hidden.run(p, phase, 0)
        for index in range(1, hidden.header.repeats):
            differs = (base != hidden.run(p, phase, index)).any(axis=2)
            differs = differs[-1:] if logits else differs[:-1]
            if differs.any() and phase == "prefill":
                layer, position = (int(one) for one in np.argwhere(differs)[0])
                found.append((layer, position, index))
            elif differs.any():
                position, layer = (int(one) for one in np.argwhere(differs.T)[0])
                found.append((position, layer, index))
        if found:
            one, other, index = min(found)
            layer, position = (one, other) if phase == "prefill" else (other, one)
            name = "logits" if logits else hidden.header.layers[layer]
            return FirstDifference(prompt.header.id, name, position + (phase == "decode"), index)
    return None


def _noisy_beyond(parts: Sequence[tuple[Observation, HiddenStates]], phase: Phase, row: Expect | None) -> str:
    """A prompt with more rows than the declared noise reaches, whose repeats differ all the same; else empty."""
    if row is None:
        return ""
    for observation, hidden in parts:
        for p, prompt in enumerate(observation.prompts):
            outcomes = {one[:-1].tobytes() for one in hidden.digests[p][phase]}
            if len(outcomes) > 1 and has_to_be_exact(prompt, phase, row):
                return prompt.header.id
    return ""


def _sha256(hidden: HiddenStates, phase: Phase, *, last: bool = False) -> str:
    """SHA-256 over the digests of repeat 0, all prompts and layers: equal on two machines means equal hidden states."""
    digest = hashlib.sha256()
    for p in range(len(hidden.digests)):
        rows = hidden.run(p, phase, 0)[:-1]
        digest.update((rows[:, -1:] if last else rows).tobytes())
    return digest.hexdigest()
