"""Engine lifetimes of one cell against each other: a pure judgement."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from quantdet.judging.differences import first_position_between, has_to_be_exact
from quantdet.judging.reported import qualified
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import PHASES, Phase
from quantdet.matrix.expectations import Expect, Expectations, describe
from quantdet.metrics import bounds
from quantdet.metrics.bits import distinct
from quantdet.metrics.distances import Distance, distance
from quantdet.observations.observation import Observation, PromptRecord


@qualified
def restart(observations: Sequence[Observation], expectations: Expectations) -> Judgement:
    """Do separate engine lifetimes give the same bits? Compared is repeat 0 of each, both phases.

    Declared noise excuses a difference in its own phase only, and in prefill up to its rows; `may_recompile` any, as far as its
    `max_l2` goes.
    """
    cell = observations[0].cell
    if any(observation.header.nonfinite for observation in observations):
        return Judgement(Verdict.INVALID, cell, "restart", "non-finite logits", False)
    if len(observations) < 2:
        return Judgement(Verdict.INVALID, cell, "restart", f"needs 2 lifetimes, have {len(observations)}", False)
    seen = distinct([(o.logits_sha256("decode") + o.logits_sha256("prefill")).encode() for o in observations])
    noise: dict[Phase, Expect | None] = {phase: expectations.noise(cell, phase) for phase in PHASES}
    recompiles = expectations.recompiles(cell)
    wrong: list[Phase] = []
    for phase, row in noise.items():
        if recompiles is None and max(distinct([_exact_rows(o, phase, row) for o in observations])):
            wrong.append(phase)
    flips = len(seen) - max(Counter(seen).values())
    bound = bounds.flip_rate_upper(flips, len(seen))
    rows = dict.fromkeys(describe(row, "") for row in (*noise.values(), recompiles) if row is not None)
    distances = [apart(observations[0], other) for other in observations[1:]]
    l2 = max(one.l2 for one in distances)
    max_abs = max(one.max_abs for one in distances)
    far = recompiles is not None and recompiles.max_l2 is not None and l2 > recompiles.max_l2
    figures: dict[str, object] = {
        "expectation": "; ".join(rows) or "bit-exact across lifetimes",
        "distinct_outputs": max(seen) + 1,
        "flip_rate_upper95": round(bound, 6),
        "l2": l2,
        "max_abs_diff": max_abs,
        "caches": ["cold" if o.header.caches == "cold" else "as found" for o in observations],
    }
    share = f"{flips} of {len(seen)} lifetimes differ, flip rate < {bound:.3g} per lifetime at 95 %"
    if any(o.header.caches == "cold" for o in observations):
        share += "; the last one with cold caches"
    if flips:

        def named(prompt: PromptRecord, phase: Phase) -> bool:  # what no row excuses, if there is any
            return not wrong or (phase in wrong and has_to_be_exact(prompt, phase, noise[phase]))

        places = ((o, first_position_between(observations[0], o, named)) for o in observations[1:])
        other, where = next((o, place) for o, place in places if place)
        figures |= {"first_divergence": where, "phase": "prefill" if " prefill position " in where else "decode"}
        share += f"; lifetime {other.header.lifetime} differs from the first at {where}; L2 {l2:.3g} nats"
    if far:
        assert recompiles is not None
        share += f", declared are at most {recompiles.max_l2:g}"
    verdict = Verdict.NOISY if flips else Verdict.BIT_EXACT
    return Judgement(verdict, cell, "restart", share, not wrong and not far, figures)


def _exact_rows(observation: Observation, phase: Phase, row: Expect | None) -> bytes:
    """Digests of repeat 0 of every prompt that the declared noise leaves to be exact."""
    exact = (prompt for prompt in observation.prompts if has_to_be_exact(prompt, phase, row))
    return b"".join(prompt.run(0).block(phase).digests.tobytes() for prompt in exact)


def apart(a: Observation, b: Observation) -> Distance:
    """Distance of repeat 0 of two lifetimes over the forced positions: mean L2 and largest difference, nats."""
    found = []
    for one, other in zip(a.prompts, b.prompts, strict=True):
        x, y = one.run(0).prefill, other.run(0).prefill
        content = one.rows("prefill") + 1 >= one.header.content_start
        found.append(distance(x.topk_ids, x.topk_logprobs, y.topk_ids, y.topk_logprobs, content))
    weights = [one.positions for one in found]
    l2 = float(np.average([one.l2 for one in found], weights=weights))
    return Distance(l2, max(one.max_abs for one in found), sum(weights), sum(one.missing for one in found))
