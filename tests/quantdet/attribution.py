"""Which format do re-executed tokens come from: distances of one claim to every verifying format, and what they show.

Rows are claimed, columns verified; nothing is symmetrised before the verdict, since a claim can match another format
better than its own (a noisy kernel's does).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantdet import signal_noise
from quantdet.claims import Claim
from quantdet.distance import published_topk, union_topk
from quantdet.observation import Observation
from quantdet.schema import PHASES, Phase
from quantdet.verdicts import Judgement, Verdict
from quantdet.verification import Sequences, sequence

_SEED = 20260101
_SOFTWARE = ("vllm", "torch_package", "transformers_package", "compressed_tensors_package")


@dataclass(frozen=True)
class Gap:
    """Distance of a claim to one verifying format in one phase, float64 (prompts,), nats.

    `own`: mean over the content positions of the L2 over the union of top-k ids, censored (`distance.union_topk`);
    `published`: top-k of the claim, missing ids dropped, every position (`distance.published_topk`).
    """

    own: NDArray[np.float64]
    published: NDArray[np.float64]


def gap(recorded: Observation, verified: Observation, sequences: Sequences, phase: Phase) -> Gap:
    """The claim's logprobs against those of the verifier's prefill of the same ids, position by position.

    The verifier's row r says what follows the first r + 1 ids: rows of the prompt are prefill, those that predict the
    generated ids are decode. Content of the prompt begins at its `content_start`; every generated position is content.
    """
    own, published = [], []
    for c, claim in enumerate(recorded.claims):
        rows = verified.prompts[sequences.index[sequence(recorded, c)]].outputs[0].prefill
        block, length = claim.outputs[0].block(phase), claim.header.length
        part = slice(0, length - 1) if phase == "prefill" else slice(length - 1, length - 1 + len(block.digests))
        ids, logprobs = rows.topk_ids[part], rows.topk_logprobs[part]
        content = np.arange(len(ids)) + 1 >= claim.header.content_start if phase == "prefill" else np.ones(len(ids), np.bool_)
        own.append(float(union_topk(block.topk_ids, block.topk_logprobs, ids, logprobs, content)[:, 0].mean()))
        published.append(published_topk(block.topk_ids, block.topk_logprobs, ids, logprobs))
    return Gap(np.asarray(own), np.asarray(published))


def judge(
    claim: Claim,
    recorded: Observation,
    verified: Mapping[str, Observation],
    weights: Mapping[str, str],
    sequences: Sequences,
    failed: Mapping[str, str],
) -> Judgement:
    """Is the claim nearest to a format with the claimed numbers, and farther from the others than the hardware explains?

    Args:
        recorded: the claim.
        verified: its re-execution by every format that runs here.
        weights: which quantized numbers each of these formats and the claimed one hold.
        sequences: where the claim's tokens are in the re-execution.
        failed: formats that should have run here and did not, with the reason.
    """
    mine = [name for name in verified if weights[name] == weights[claim.format_id]]
    if not mine:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items()) or "none runs here"
        text = f"no format with weights {weights[claim.format_id]} re-executed it ({reasons})"
        return Judgement(Verdict.ERROR, f"ERROR {claim} reexecution: {text}", False)
    gaps = {phase: {name: gap(recorded, one, sequences, phase) for name, one in verified.items()} for phase in PHASES}
    decode = {name: found.own for name, found in gaps["decode"].items()}
    # The format itself where it runs here; else the nearest of those with its numbers.
    base = claim.format_id if claim.format_id in mine else min(mine, key=lambda name: float(decode[name].mean()))
    others = [name for name in verified if name not in mine]
    comparisons = {
        name: signal_noise.directional(decode[name], decode[base], seed=_SEED) for name in verified if name != base
    }
    found = signal_noise.identify(list(verified), np.stack(list(decode.values())), mine)
    words = {name: comparison.verdict for name, comparison in comparisons.items()}
    contradicted = [name for name in others if comparisons[name].contradicted]
    told = [name for name in others if words[name] is Verdict.DETECTABLE]
    verdict = (
        Verdict.DETECTABLE if len(told) == len(others)
        else Verdict.UNDERPOWERED if any(words[name] is Verdict.UNDERPOWERED for name in others)
        else Verdict.NOT_DETECTABLE
    )  # fmt: skip
    noise = float(decode[base].mean())
    figures = _figures(recorded, gaps, base, found)
    record = _record(claim, recorded, weights, mine, gaps, comparisons, found)
    changed = _software(recorded, next(iter(verified.values())))
    where = f"{claim} reexecution"
    if contradicted:
        worst = min(contradicted, key=lambda name: comparisons[name].difference)
        text = (
            f"not what it claims: {worst} matches it better than {base} by {-comparisons[worst].difference:.3g} nats "
            f"[{-comparisons[worst].high:.3g}, {-comparisons[worst].low:.3g}], nearest to weights "
            f"{weights[claim.format_id]} in {found.own} of {found.prompts} prompts"
        )
        return Judgement(Verdict.DETECTABLE, f"DETECTABLE {where}: {text}{changed}", False, figures, reexecution=record)
    closest = min(others, key=lambda name: comparisons[name].difference, default=None)
    text = (
        f"nearest to weights {weights[claim.format_id]} in {found.own} of {found.prompts} prompts "
        f"[{found.low:.2g}, {found.high:.2g}]; told from {len(told)} of {len(others)} formats with other numbers"
    )
    if closest is not None:
        one = comparisons[closest]
        text += (
            f"; closest {closest} +{one.difference:.3g} nats [{one.low:.3g}, {one.high:.3g}], "
            f"smallest detectable {one.mde:.2g}, over a noise of {noise:.3g}"
        )
    same = [name for name in mine if name != base]
    if same:
        text += "; same numbers: " + ", ".join(f"{name} {words[name]}" for name in same)
    if failed:
        text += f"; did not run: {', '.join(failed)}"
    return Judgement(verdict, f"{verdict} {where}: {text}{changed}", True, figures, reexecution=record)


def _software(recorded: Observation, verified: Observation) -> str:
    """What differs beside the hardware."""
    a, b = recorded.header.environment, verified.header.environment
    names = [name for name in _SOFTWARE if a.get(name) != b.get(name)]
    changes = [f"{name.removesuffix('_package')} {a.get(name) or 'none'} -> {b.get(name) or 'none'}" for name in names]
    return f" (beside the hardware: {', '.join(changes)})" if changes else ""


def _figures(
    recorded: Observation, gaps: Mapping[Phase, Mapping[str, Gap]], base: str, found: signal_noise.Identified
) -> dict[str, object]:
    header = recorded.header
    return {
        "runs": len(recorded.claims),
        "checkpoint.sha256": header.checkpoint_sha256,
        "kernel.executed": header.executed.summary if header.executed is not None else "",
        "source": f"{header.hardware}, vLLM {header.environment.get('vllm')}, {header.environment.get('gpu') or header.environment.get('cpu')}",
        "l2": float(gaps["decode"][base].own.mean()),
        "identified": f"{found.own}/{found.prompts} [{found.low:.4f}, {found.high:.4f}]",
        **{
            f"distance.{phase}.{name}": f"own={float(one.own.mean()):.6g} published={float(one.published.mean()):.6g}"
            for phase, row in gaps.items()
            for name, one in row.items()
        },
    }


def _record(
    claim: Claim, recorded: Observation, weights: Mapping[str, str], mine: list[str],
    gaps: Mapping[Phase, Mapping[str, Gap]], comparisons: Mapping[str, signal_noise.Comparison], found: signal_noise.Identified,
) -> dict[str, object]:  # fmt: skip
    """What the report needs, JSON-able."""
    environment = recorded.header.environment
    return {
        "model": claim.model_id, "claimed": claim.format_id, "by": claim.hardware_id, "by_text": claim.hardware_id,
        "source": f"{claim.source}{claim.origin}, vLLM {environment.get('vllm')}, {environment.get('gpu') or environment.get('cpu')}",
        "weights": weights[claim.format_id], "prompts": found.prompts, "own": mine,
        "distances": {
            phase: {
                "own_metric": {name: float(one.own.mean()) for name, one in row.items()},
                "published": {name: float(one.published.mean()) for name, one in row.items()},
            }
            for phase, row in gaps.items()
        },
        "comparisons": {
            name: {
                "verdict": str(one.verdict), "difference": one.difference, "low": one.low, "high": one.high, "mde": one.mde,
                "snr": one.snr, "p": one.p, "energy": None,
            }
            for name, one in comparisons.items()
        },
        "nearest": found.shares,
        "identified": {"share": found.share, "low": found.low, "high": found.high},
    }  # fmt: skip
