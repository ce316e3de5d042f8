"""Is a format recognisable above the hardware difference? The verdict on one comparison of a claim and its verifiers."""

import math
from dataclasses import dataclass

from quantdet.judging.verdicts import Verdict
from quantdet.metrics.signal_noise import Comparison

ALPHA = 0.05
# With fewer, no sign pattern reaches a two-sided sign-flip p of 0.05: 2/32 of five prompts, 2/64 of six.
MIN_PROMPTS_DIFFERENT = 6
# With four references the smallest one-sided sign-test p is 1/16, and their SD is known within a factor of 0.57 to 3.7:
# neither a difference nor the lack of one follows. With sixteen that factor is 0.74 to 1.55.
MIN_PROMPTS = 16


@dataclass(frozen=True)
class Detection:
    """The verdict on a comparison.

    contradicted: format j matches the claim better than the claimed format itself; relevance: the largest difference that
    does not matter, nats; reason: the sentence behind the verdict.
    """

    verdict: Verdict
    contradicted: bool
    relevance: float
    reason: str


def detect(comparison: Comparison, relevance: float | None = None, p_adjusted: float | None = None) -> Detection:
    """The verdict on a comparison.

    DETECTABLE: at least 6 prompts, the interval is above 0, and p (adjusted, where given) is at most 0.05: the other
    format is farther from the claim than the claim's own. Both are asked for, since an interval over few clusters is too
    short and an exact p is not.

    Contradicted (a flag): the same below 0, so the other format would be taken for the claimed one.

    NOT_DETECTABLE: at least 16 prompts, not DETECTABLE, and a difference of `relevance` would have been found: the minimum
    detectable effect and the upper end of the interval are both at most that. A contradicted comparison needs no such
    effect: its interval excludes every positive difference. With an exact own format the default relevance is 0 and only
    distances that are all equal will do.

    UNDERPOWERED: anything else; these prompts cannot say.

    Args:
        comparison: from `directional`.
        relevance: the largest difference that does not matter, nats; default half of the noise.
        p_adjusted: p after `bounds.holm` over all comparisons of a claim.

    Raises:
        ValueError: `relevance` is negative or not finite, or `p_adjusted` is not between p and 1.
    """
    c = comparison
    relevance = c.noise / 2 if relevance is None else relevance
    p = c.p if p_adjusted is None else p_adjusted
    if not (0 <= relevance < math.inf and c.p <= p <= 1):
        raise ValueError(f"relevance must be at least 0 and p from {c.p:g} to 1; they are {relevance!r} and {p!r}")
    significant = c.prompts >= MIN_PROMPTS_DIFFERENT and p <= ALPHA
    contradicted = significant and c.high < 0
    figures = f"difference {c.difference:.3g} [{c.low:.3g}, {c.high:.3g}] nats over {c.prompts} prompts, p {p:.2g}"
    if significant and c.low > 0:
        return Detection(Verdict.DETECTABLE, False, relevance, f"{figures}: farther than the claimed format")
    wanting = _wanting(c, relevance, contradicted)
    verdict = Verdict.UNDERPOWERED if wanting else Verdict.NOT_DETECTABLE
    if contradicted:
        wanting = ["matches the claim better than the claimed format itself", *wanting]
    effect = f"minimum detectable effect {c.mde:.3g}, relevant above {relevance:.3g}"
    return Detection(verdict, contradicted, relevance, "; ".join([f"{figures}, {effect}", *wanting]))


def _wanting(c: Comparison, relevance: float, contradicted: bool) -> list[str]:
    """What keeps a comparison that is not DETECTABLE from being NOT_DETECTABLE."""
    wanting = []
    if c.prompts < MIN_PROMPTS:
        wanting.append(f"needs {MIN_PROMPTS} prompts")
    if c.low > 0:
        wanting.append(f"the interval excludes 0 and p does not follow (smallest possible p {c.smallest_p:.2g})")
    if not contradicted and c.mde > relevance:
        wanting.append("a relevant difference could have been missed")
    if c.high > relevance:
        wanting.append("the interval has relevant differences in it")
    return wanting
