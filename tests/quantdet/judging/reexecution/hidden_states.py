"""A second signal in re-execution: which format do the hidden states behind the claimed tokens come from?

A claim may carry fingerprints of its hidden states (`projection`), of the positions that its generated tokens come from. The
verifier is given the same ids, projects too, and the distances are judged with the statistics of the logprobs: paired by
prompt, with interval, SNR, sign-flip test after Holm, and nearest format.

The verdict stays with the logprobs. They are what a provider serves and what the claim is about, every claim has them, and
how far they may be apart between machines is known from recordings; the residual stream is an engine's inner affair (where a
fused kernel rounds it is no part of a format), and who makes up logprobs can make up fingerprints. So a claim is judged alike
with and without them. Where both signals say the same, that is evidence of two kinds, and is said; where they do not, the
message says DISAGREE, and it is for a person to look at: in an honest recording nothing but a difference in engines makes two
signals of the same forward pass name two formats. Where only one of them can decide, the other tells less.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantdet.judging.reexecution import detect
from quantdet.judging.verdicts import Verdict
from quantdet.metrics import bounds, fingerprints, signal_noise
from quantdet.metrics import nearest as identification
from quantdet.metrics.signal_noise import Distances
from quantdet.observations.claims import Sequences, sequence
from quantdet.observations.observation import Observation

NONE = "claim carries no hidden states"
_SEED = 20260101


@dataclass(frozen=True)
class Signal:
    """What one signal says of a claim, against formats with other numbers.

    supported: every one of them is farther than the claim's own (DETECTABLE); contradicted: one matches it better;
    undecided: neither. snr: of the closest other format; closest: its name.
    """

    word: str
    closest: str
    snr: float | None
    nearest: identification.Identification


@dataclass(frozen=True)
class Corroboration:
    """The second signal: `sentence` for the message (empty where the claim has none), figures, and what reports need."""

    sentence: str = ""
    figures: dict[str, object] = field(default_factory=lambda: {"hidden_states": NONE})
    record: dict[str, object] | None = None


def signal(distances: Mapping[str, Distances], base: str, mine: Sequence[str]) -> Signal:
    """Judge distances float64 (prompts,) by verifying format; `base` answers the claim, `mine` have its numbers."""
    others = [name for name in distances if name not in mine]
    compared = {name: signal_noise.directional(one, distances[base], _SEED) for name, one in distances.items() if name != base}
    adjusted = dict(zip(compared, bounds.holm([one.p for one in compared.values()]), strict=True))
    found = {name: detect.detect(compared[name], p_adjusted=adjusted[name]) for name in others}
    nearest = identification.identify(np.stack(list(distances.values())), list(distances), mine)
    if not others:
        return Signal("undecided", "", None, nearest)
    wrong = [name for name in others if found[name].contradicted]
    told = all(found[name].verdict is Verdict.DETECTABLE for name in others)
    closest = min(wrong or others, key=lambda name: compared[name].difference)
    word = "contradicted" if wrong else "supported" if told else "undecided"
    return Signal(word, closest, compared[closest].snr, nearest)


def gap(recorded: Observation, verified: Observation, sequences: Sequences) -> Distances:
    """Distances of a claim's fingerprints to the verifier's at the same positions, float64 (prompts,), see `projection`.

    Raises:
        ValueError: they are not of the same layers.
    """
    assert recorded.hidden is not None and verified.hidden is not None
    one, other = recorded.hidden.header, verified.hidden.header
    if (len(one.layers), one.projected, one.width) != (len(other.layers), other.projected, other.width):
        raise ValueError("fingerprints of other layers")
    found = []
    for c, claim in enumerate(recorded.claims):
        rows = verified.hidden.fingerprints[sequences.index[sequence(recorded, c)]]
        ours = recorded.hidden.fingerprints[c]
        first = claim.header.length - 1
        found.append(fingerprints.distance(ours, rows[:, first : first + ours.shape[1]]))
    return np.asarray(found)


def judge(
    recorded: Observation, verified: Mapping[str, Observation], base: str, mine: Sequence[str], sequences: Sequences,
    by_logprobs: Mapping[str, Distances],
) -> Corroboration:  # fmt: skip
    """The hidden states of a claim beside what its logprobs say; `base`, `mine` and `by_logprobs` as in `signal`."""
    if recorded.hidden is None or not recorded.hidden.fingerprints:
        return Corroboration()
    with_them = {name: one for name, one in verified.items() if one.hidden is not None and one.hidden.fingerprints}
    if base not in with_them:
        return _silent("the verifier took none")
    try:
        distances = {name: gap(recorded, one, sequences) for name, one in with_them.items()}
    except ValueError as error:
        return _silent(str(error))
    found = signal(distances, base, [name for name in mine if name in with_them])
    logprobs = signal(by_logprobs, base, mine)
    assert found.nearest.interval is not None  # `base` is among its own
    low, high = found.nearest.interval
    prompts = len(found.nearest.nearest)
    how = f"{found.word}, own nearest in {found.nearest.own} of {prompts} prompts [{low:.2g}, {high:.2g}]"
    if found.closest:
        how += f", closest {found.closest}: SNR {_times(found.snr)} (of logprobs {_times(logprobs.snr)}, {logprobs.closest})"
    words = {found.word, logprobs.word}
    if words == {"contradicted"}:
        word = "agree" if found.closest == logprobs.closest else "DISAGREE"
    elif words == {"undecided"}:
        word = "neither tells"
    elif len(words) == 1:
        word = "agree"
    elif "contradicted" in words:
        word = "DISAGREE"
    else:
        word = "tell more" if found.word == "supported" else "tell less"
    figures: dict[str, object] = {
        "hidden_states": f"{word}: {how}",
        "hidden_states.identified": {"own": found.nearest.own, "prompts": prompts, "low": low, "high": high},
        **{f"distance.hidden_states.{name}": float(one.mean()) for name, one in distances.items()},
    }
    record: dict[str, object] = {
        "word": word, "signal": found.word, "closest": found.closest, "snr": found.snr, "snr_logprobs": logprobs.snr,
        "closest_logprobs": logprobs.closest, "own": found.nearest.own, "prompts": prompts, "low": low, "high": high,
        "distances": {name: float(one.mean()) for name, one in distances.items()},
    }  # fmt: skip
    return Corroboration(f"; hidden states {word}: {how}", figures, record)


def _silent(why: str) -> Corroboration:
    return Corroboration(f"; hidden states say nothing: {why}", {"hidden_states": f"nothing: {why}"})


def _times(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
