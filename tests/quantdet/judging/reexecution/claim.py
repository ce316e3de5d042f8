"""Which format do re-executed tokens come from: distances of one claim to every verifying format, and what they show.

Rows are claimed, columns verified; nothing is symmetrised before the verdict, since a claim can match another format
better than its own (a noisy kernel's does).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from quantdet.judging.reexecution import detect, hidden_states
from quantdet.judging.results import Missing
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import PHASES, Phase
from quantdet.metrics import bounds, resampling, signal_noise
from quantdet.metrics.distances import decode_distance, published_topk, union_topk
from quantdet.metrics.nearest import Identification, identify
from quantdet.observations.claims import Claim, Sequences, sequence
from quantdet.observations.observation import Observation

ASPECT = "reexecution"
_SEED = 20260101
_SOFTWARE = ("vllm", "torch_package", "transformers_package", "compressed_tensors_package")


@dataclass(frozen=True)
class Gap:
    """Distance of a claim to one verifying format in one phase, float64 (prompts,), nats.

    `own`: mean over the content positions of the L2 over the union of top-k ids, censored (`distances.union_topk`);
    `published`: top-k of the claim, missing ids dropped, every position (`distances.published_topk`).
    """

    own: NDArray[np.float64]
    published: NDArray[np.float64]


Gaps = Mapping[Phase, Mapping[str, Gap]]  # by verifying format


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
        k = block.topk_ids.shape[1]  # the claim's: another claim's longer rows must not change this one's distances
        ids, logprobs = rows.topk_ids[part][:, :k], rows.topk_logprobs[part][:, :k]
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
    failed: Mapping[str, Missing],
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
    others = [name for name in verified if name not in mine]
    if not mine:
        reasons = "; ".join(f"{name}: {one.verdict} {one.reason}" for name, one in failed.items()) or "none runs here"
        text = f"no format with weights {weights[claim.format_id]} re-executed it ({reasons})"
        return Judgement(Verdict.ERROR, claim, ASPECT, text, False)
    if not others:
        text = "no format with other numbers re-executed it, so that nothing could be told"
        return Judgement(Verdict.UNDERPOWERED, claim, ASPECT, text, False)
    gaps = {phase: {name: gap(recorded, one, sequences, phase) for name, one in verified.items()} for phase in PHASES}
    seen = _compared(claim, verified, gaps, mine)
    share = f"nearest to weights {weights[claim.format_id]} in {seen.share}"
    figures = {**_figures(recorded, gaps, seen), "beside": _beside(recorded, verified[seen.base])}
    second = hidden_states.judge(recorded, verified, seen.base, mine, sequences, seen.decode)
    figures |= second.figures
    record = {**_record(claim, recorded, weights, mine, gaps, seen), "hidden_states": second.record}
    end = second.sentence + (f" (beside the hardware: {figures['beside']})" if figures["beside"] else "")
    apart = _apart(verified, recorded, sequences)
    verdict, why, detail = _verdict(seen, mine, others, share, apart)
    if detail is not None:  # the claim's own numbers answer: did all that might run?
        why += f"; did not run: {', '.join(failed)}" if failed else ""
        broken = {name: one for name, one in failed.items() if one.verdict not in (Verdict.UNAVAILABLE, Verdict.UNSUPPORTED)}
        if broken:  # with it the answer might be another one
            first = next(iter(broken.values()))
            text = f"did not run: {', '.join(broken)}, first {first.verdict} {first.first}"
            text += f"; of the others: {verdict}, {why}{end}"
            return Judgement(Verdict.ERROR, claim, ASPECT, text, False, figures, detail or "", reexecution=record)
    expected = detail is not None
    return Judgement(verdict, claim, ASPECT, f"{why}{end}", expected, figures, detail or "", reexecution=record)


@dataclass(frozen=True)
class _Seen:
    """What the distances of a claim say. Arrays are float64 (prompts,), nats, by verifying format.

    base: the claimed format where it runs here, else the nearest of those with its numbers; decode: distances of the
    generated positions; compared, found: every other format against `base`; nearest: which format is nearest, by prompt.
    """

    base: str
    decode: Mapping[str, NDArray[np.float64]]
    compared: Mapping[str, signal_noise.Comparison]
    found: Mapping[str, detect.Detection]
    nearest: Identification

    @property
    def share(self) -> str:
        """In how many prompts a format with the claim's numbers is the nearest, with an interval."""
        assert self.nearest.interval is not None  # formats with the claim's numbers are among the verifiers
        low, high = self.nearest.interval
        return f"{self.nearest.own} of {len(self.nearest.nearest)} prompts [{low:.2g}, {high:.2g}] at 95 %"


def _compared(claim: Claim, verified: Mapping[str, Observation], gaps: Gaps, mine: Sequence[str]) -> _Seen:
    """The statistics: differences to the claim's own format, adjusted for their number, and the nearest format."""
    decode = {name: found.own for name, found in gaps["decode"].items()}
    base = claim.format_id if claim.format_id in mine else min(mine, key=lambda name: float(decode[name].mean()))
    compared = {name: signal_noise.directional(decode[name], decode[base], _SEED) for name in verified if name != base}
    # What would have been found at the level that is left to each of them (Bonferroni, which Holm is never stricter than).
    compared = {
        name: replace(one, mde=resampling.minimum_detectable(decode[name] - decode[base], alpha=0.05 / len(compared)))
        for name, one in compared.items()
    }
    adjusted = dict(zip(compared, bounds.holm([one.p for one in compared.values()]), strict=True))
    found = {name: detect.detect(one, p_adjusted=adjusted[name]) for name, one in compared.items()}
    return _Seen(base, decode, compared, found, identify(np.stack(list(decode.values())), list(verified), mine))


def _verdict(
    seen: _Seen, mine: Sequence[str], others: Sequence[str], share: str, apart: float
) -> tuple[Verdict, str, str | None]:
    """Verdict, why, and the detail; without a detail (None) the claim is not what it says."""
    base, compared, found = seen.base, seen.compared, seen.found
    distance = float(seen.decode[base].mean())
    if distance > apart:
        text = f"matches no format here: {distance:.3g} nats from {base}, and the formats here are at most {apart:.3g} from "
        return Verdict.DETECTABLE, f"{text}each other on these tokens, {share}", None
    if wrong := [name for name in others if found[name].contradicted]:
        name = min(wrong, key=lambda name: compared[name].difference)
        one = compared[name]
        text = f"not what it claims: {name} matches it better than {base} by {-one.difference:.3g} nats"
        return Verdict.DETECTABLE, f"{text} [{-one.high:.3g}, {-one.low:.3g}], {share}", None
    words = {found[name].verdict for name in others}
    verdict = next((word for word in (Verdict.UNDERPOWERED, Verdict.NOT_DETECTABLE) if word in words), Verdict.DETECTABLE)
    told = [name for name in others if found[name].verdict is Verdict.DETECTABLE]
    closest = min(others, key=lambda name: compared[name].difference)
    one = compared[closest]
    text = f"{share}; told from {len(told)} of {len(others)} formats with other numbers"
    text += (
        f"; closest {closest}: {one.difference:+.3g} nats [{one.low:.3g}, {one.high:.3g}] over a noise of {one.noise:.3g} "
        f"(SNR {'inf' if one.snr == float('inf') else f'{one.snr:.3g}' if one.snr is not None else 'none'}, "
        f"minimum detectable {one.mde:.2g})"
    )
    if same := [name for name in mine if name != base]:
        text += "; same numbers: " + ", ".join(f"{name} {found[name].verdict} (MDE {compared[name].mde:.2g})" for name in same)
    return verdict, text, "\n".join(f"{name}: {one.verdict}: {one.reason}" for name, one in found.items())


def _apart(verified: Mapping[str, Observation], recorded: Observation, sequences: Sequences) -> float:
    """The largest distance between two formats that run here, on the claim's generated positions, mean over prompts, nats.

    A claim that is farther than this from its own format was not made by any hardware difference.
    """
    largest = 0.0
    for one, other in combinations(verified.values(), 2):
        gaps = []
        for c, claim in enumerate(recorded.claims):
            n, k = sequences.index[sequence(recorded, c)], claim.outputs[0].decode.topk_ids.shape[1]
            part = slice(claim.header.length - 1, claim.header.length - 1 + len(claim.outputs[0].output_ids))
            a, b = (o.prompts[n].outputs[0].prefill for o in (one, other))
            rows = [(x.topk_ids[part][:, :k], x.topk_logprobs[part][:, :k]) for x in (a, b)]
            gaps.append(float(union_topk(*rows[0], *rows[1])[:, 0].mean()))
        largest = max(largest, float(np.mean(gaps)))
    return largest


def within(recorded: Observation) -> float | None:
    """How far the claimed format's own repeats are apart in decode, mean over its prompts, nats.

    0 if they are bit-exact, None where nothing was repeated.
    """
    if recorded.header.repeats < 2:
        return None
    gaps = []
    for prompt in recorded.prompts:
        base = prompt.run(0)
        for other in prompt.outputs[1:]:
            _, found, _ = decode_distance(
                base.output_ids, base.decode.topk_ids, base.decode.topk_logprobs,
                other.output_ids, other.decode.topk_ids, other.decode.topk_logprobs,
            )  # fmt: skip
            gaps.append(found.l2)
    return float(np.mean(gaps)) if gaps else 0.0


def _beside(recorded: Observation, verified: Observation) -> str:
    """What differs beside the hardware."""
    a, b = recorded.header.environment, verified.header.environment
    names = [name for name in _SOFTWARE if a.get(name) != b.get(name)]
    changes = [f"{name.removesuffix('_package')} {a.get(name) or 'none'} -> {b.get(name) or 'none'}" for name in names]
    one, other = recorded.header.executed, verified.header.executed
    if one is not None and other is not None and one.mode != other.mode:
        changes.insert(0, f"mode {one.mode} -> {other.mode}")
    if one is not None and other is not None and one.tensor_parallel_size != other.tensor_parallel_size:
        changes.insert(0, f"tensor parallel size {one.tensor_parallel_size} -> {other.tensor_parallel_size}")
    if recorded.header.checkpoint_files_sha256 != verified.header.checkpoint_files_sha256 and (
        recorded.header.format == verified.header.format
    ):
        changes.insert(0, "the checkpoint's configuration files")
    if recorded.header.dtype != verified.header.dtype:
        changes.insert(0, f"dtype {recorded.header.dtype} -> {verified.header.dtype}")
    return ", ".join(changes)


def _source(recorded: Observation) -> str:
    environment = recorded.header.environment
    device = environment.get("gpu") or environment.get("cpu") or "device unknown"
    return f"{recorded.header.hardware}, vLLM {environment.get('vllm') or 'unknown'}, {device}"


def _figures(recorded: Observation, gaps: Gaps, seen: _Seen) -> dict[str, object]:
    header, nearest = recorded.header, seen.nearest
    assert nearest.interval is not None
    low, high = nearest.interval
    return {
        "phase": "decode",
        "runs": len(recorded.claims),
        "checkpoint.sha256": header.checkpoint_sha256,
        "kernel.executed": header.executed.summary if header.executed is not None else "",
        "source": _source(recorded),
        "l2": float(gaps["decode"][seen.base].own.mean()),
        "identified": {"own": nearest.own, "prompts": len(nearest.nearest), "low": low, "high": high},
        **{
            f"distance.{phase}.{name}": {"own": float(one.own.mean()), "published": float(one.published.mean())}
            for phase, row in gaps.items()
            for name, one in row.items()
        },
    }


def _record(
    claim: Claim, recorded: Observation, weights: Mapping[str, str], mine: list[str], gaps: Gaps, seen: _Seen
) -> dict[str, object]:
    """What the report needs, JSON-able."""
    nearest = seen.nearest
    assert nearest.interval is not None
    low, high = nearest.interval
    shares = {name: count / len(nearest.nearest) for name, count in nearest.counts.items()}
    for names, count in nearest.tied.items():
        for name in names:
            shares[name] += count / len(nearest.nearest) / len(names)
    own = within(recorded)
    return {
        "model": claim.model_id, "claimed": f"{claim.format_id}{claim.origin}", "by": claim.hardware_id,
        "by_text": f"{claim.hardware_id}, {recorded.header.dtype}", "source": _source(recorded),
        "weights": weights[claim.format_id], "prompts": len(nearest.nearest), "own": mine,
        "distances": {
            phase: {
                "own_metric": {name: float(one.own.mean()) for name, one in row.items()},
                "published": {name: float(one.published.mean()) for name, one in row.items()},
            }
            for phase, row in gaps.items()
        },
        "comparisons": {
            name: {
                "verdict": str(seen.found[name].verdict), "difference": one.difference, "low": one.low, "high": one.high,
                "mde": one.mde, "snr": one.snr, "p": one.p,
                # The verifier re-executes once: its own repeats, which would be taken off too, are not known.
                "energy_at_most": None if own is None else signal_noise.energy(one.signal, own, 0.0),
            }
            for name, one in seen.compared.items()
        },
        "nearest": shares,
        "identified": {"share": nearest.share, "low": low, "high": high},
    }  # fmt: skip
