"""One claim against every verifying format: which distances are taken, and what follows from them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from quantdet.judging.reexecution import claim
from quantdet.judging.reexecution.claim import Gap, gap
from quantdet.judging.results import Missing
from quantdet.judging.verdicts import Judgement, Verdict, Violation
from quantdet.matrix.cell import PHASES
from quantdet.observations.claims import Claim, Sequences, sequence
from quantdet.observations.header import PromptHeader
from quantdet.observations.observation import Observation, Output, PromptRecord
from selftest.fakes.engine import block_of, causal_logits
from selftest.fakes.observation import observation

CLAIM = Claim("alpha", "own", "cpu-here", source="elsewhere")
WEIGHTS = {"own": "a", "twin": "a", "x": "b", "y": "c", "z": "d"}

# ------------------------------------------------------------------------------------------------------------ distances


def claims(numerics: str, lengths: tuple[int, ...], steps: int, k: int, content_start: int = 1) -> Observation:
    """A recording whose claims have so many prompt ids, `steps` generated ones and `k` logprobs a row."""
    records = []
    for number, length in enumerate(lengths):
        ids = [7 + 13 * number + i for i in range(length + steps)]
        rows = causal_logits(numerics, ids, 0)[:-1]
        prefill, decode = rows[: length - 1], rows[length - 1 :]
        generated = np.array(ids[length:], np.int32)
        output = Output(generated, block_of(decode, generated, k), block_of(prefill, np.array(ids[1:length]), k))
        header = PromptHeader(id=f"c{number}", length=length, content_start=content_start, runs=(0,))
        records.append(PromptRecord(header, np.array(ids[:length], np.int32), (output,)))
    return replace(observation("own"), claims=tuple(records))


def verified(numerics: str, sequences: Sequences, k: int) -> Observation:
    """What a format of these numerics answers for the sequences."""
    records: list[Any] = []
    for ids in sequences.index:
        prefill = block_of(causal_logits(numerics, list(ids), 0)[:-1], np.array(ids[1:]), k)
        header = PromptHeader(id=f"s{len(records)}", length=len(ids), content_start=1, runs=(0,))
        records.append(PromptRecord(header, np.array(ids, np.int32), (Output(np.zeros(1, np.int32), prefill, prefill),)))
    return replace(observation("own"), prompts=tuple(records))


def test_the_same_numerics_are_at_no_distance() -> None:
    """Row by row the verifier's prefill is set beside the claim's rows of the same context, in either phase."""
    recorded = claims("f", (5, 9), steps=4, k=3)
    sequences = Sequences.of([recorded])

    for phase in PHASES:
        found = gap(recorded, verified("f", sequences, k=3), sequences, phase)
        assert ([0.0, 0.0], [0.0, 0.0]) == (found.own.tolist(), found.published.tolist())


@pytest.mark.parametrize("phase", PHASES)
def test_a_prompt_is_one_distance(phase: Any) -> None:
    """However many positions it has: they share a context and are no independent observations."""
    recorded = claims("f", (5, 9), steps=4, k=3)
    sequences = Sequences.of([recorded])

    found = gap(recorded, verified("g", sequences, k=3), sequences, phase)

    assert (2,) == found.own.shape == found.published.shape
    assert (found.own > 0).all()


def test_a_prompt_counts_from_where_its_content_begins() -> None:
    """What every prompt has in common (a template) tells nothing; generated positions are all content."""
    recorded = claims("f", (8,), steps=4, k=3, content_start=7)
    sequences = Sequences.of([recorded])
    there = verified("g", sequences, k=3)

    content = gap(recorded, there, sequences, "prefill").own
    other = replace(there, prompts=(_from(there.prompts[0], verified("f", sequences, k=3).prompts[0], 6),))

    assert content.tolist() == gap(recorded, other, sequences, "prefill").own.tolist()
    assert gap(recorded, other, sequences, "decode").own > 0


def _from(late: PromptRecord, early: PromptRecord, row: int) -> PromptRecord:
    """`early` before `row`, `late` from there on."""
    a, b = late.outputs[0].prefill, early.outputs[0].prefill
    ids, logprobs = a.topk_ids.copy(), a.topk_logprobs.copy()
    ids[:row], logprobs[:row] = b.topk_ids[:row], b.topk_logprobs[:row]
    return replace(late, outputs=(replace(late.outputs[0], prefill=replace(a, topk_ids=ids, topk_logprobs=logprobs)),))


def test_another_claims_longer_rows_change_nothing() -> None:
    """All claims share one re-execution; each is compared with as many logprobs as it has itself."""
    recorded = claims("f", (5,), steps=4, k=3)
    sequences = Sequences.of([recorded])

    short, long = (gap(recorded, verified("g", sequences, k=k), sequences, "decode") for k in (3, 6))

    assert short.own.tolist() == long.own.tolist()
    assert sequence(recorded, 0) in sequences.index


# -------------------------------------------------------------------------------------------------------------- verdict


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`attribution.judge` on made-up distances: one list per verifying format, a value per prompt."""

    def judged(distances: dict[str, Any], failed: dict[str, Missing] | None = None, apart: float = 100.0) -> Judgement:
        def given(recorded: Observation, one: Observation, sequences: Any, phase: str) -> Gap:
            values = np.asarray(distances[one.header.format], np.float64)
            return Gap(values, values)

        monkeypatch.setattr(claim, "gap", given)
        monkeypatch.setattr(claim, "_apart", lambda *args: apart)
        there = {name: observation(name) for name in distances}
        return claim.judge(CLAIM, observation("own"), there, WEIGHTS, Sequences.of([]), failed or {})

    return judged


OWN = np.linspace(0.9, 1.1, 16)


def test_a_claim_nearest_to_its_own_numbers(judge: Any) -> None:
    """DETECTABLE from every format with other numbers."""
    found = judge({"own": OWN, "x": OWN + 1, "y": OWN + 2})

    assert (Verdict.DETECTABLE, True) == (found.verdict, found.expected)
    assert "nearest to weights a in 16 of 16 prompts" in found.message
    assert "told from 2 of 2 formats with other numbers; closest x: +1 nats" in found.message


def test_many_formats_need_more_evidence_than_one(judge: Any) -> None:
    """Six prompts reach p 1/32 and no less: enough for one format, not for each of three at once (Holm)."""
    six = OWN[:6]

    assert Verdict.DETECTABLE is judge({"own": six, "x": six + 1}).verdict
    many = judge({"own": six, "x": six + 1, "y": six + 2, "z": six + 3})
    assert Verdict.UNDERPOWERED is many.verdict
    assert "told from 0 of 3" in many.message


def test_the_effect_that_could_be_found_is_that_of_the_adjusted_test(judge: Any) -> None:
    """With more formats the level that is left to each is smaller, and the effect beside a verdict larger."""
    spread = OWN + np.resize([-0.3, 0.3], 16)
    few, many = (judge({"own": OWN, **dict.fromkeys(names, spread)}) for names in (("x",), ("x", "y", "z")))

    small, large = (one.reexecution["comparisons"]["x"]["mde"] for one in (few, many))
    assert 1.15 < large / small < 1.5


def test_one_format_that_cannot_be_told_apart_is_the_verdict(judge: Any) -> None:
    """Not the best of the comparisons speaks for the claim, but the worst."""
    same = judge({"own": OWN, "x": OWN + 1, "y": OWN})
    open_ = judge({"own": OWN, "x": OWN + 1, "y": OWN + np.resize([-0.8, 0.85], 16)})

    assert (Verdict.NOT_DETECTABLE, Verdict.UNDERPOWERED) == (same.verdict, open_.verdict)


def test_a_format_that_matches_better_fails_the_claim(judge: Any) -> None:
    """Whatever the others say."""
    found = judge({"own": OWN, "x": OWN - 0.5, "y": OWN + 1})

    assert (Verdict.DETECTABLE, False) == (found.verdict, found.expected)
    assert "not what it claims: x matches it better than own by 0.5 nats" in found.message
    with pytest.raises(Violation):
        found.enforce()


def test_a_claim_that_is_far_from_everything_fails(judge: Any) -> None:
    """Farther from its own format than any two formats are from each other: no hardware makes that."""
    found = judge({"own": OWN, "x": OWN + 1}, apart=0.5)

    assert not found.expected
    assert "matches no format here: 1 nats from own, and the formats here are at most 0.5 from each other" in found.message
    assert judge({"own": OWN, "x": OWN + 1}, apart=1.5).expected


def test_a_claim_is_held_against_its_own_format(judge: Any) -> None:
    """Where that runs here: another layout of the same numbers that happens to be nearer does not stand in for it."""
    found = judge({"own": OWN, "twin": OWN / 2, "x": OWN * 3 / 4, "y": OWN + 1})

    assert "not what it claims: x matches it better than own" in found.message
    assert "0.250" not in found.message
    without = judge({"twin": OWN / 2, "x": OWN * 3 / 4, "y": OWN + 1})
    assert without.expected


def test_without_its_numbers_here_nothing_is_said(judge: Any) -> None:
    """ERROR with the reason where they should have run; without other numbers there is nothing to tell it from."""
    none = judge({"x": OWN}, failed={"own": Missing(Verdict.ERROR, "died")})
    alone = judge({"own": OWN, "twin": OWN})

    assert (Verdict.ERROR, False) == (none.verdict, none.expected)
    assert "own: ERROR died" in none.message
    assert (Verdict.UNDERPOWERED, False) == (alone.verdict, alone.expected)


@pytest.mark.parametrize(
    ("verdict", "reason", "expected"), [(Verdict.TIMEOUT, "late", False), (Verdict.UNAVAILABLE, "no weights", True)]
)
def test_a_verifier_that_is_missing(judge: Any, verdict: Verdict, reason: str, expected: bool) -> None:
    """One that should have run makes the answer an ERROR; one that is not here is named."""
    found = judge({"own": OWN, "x": OWN + 1}, failed={"y": Missing(verdict, reason)})

    assert (Verdict.DETECTABLE if expected else Verdict.ERROR, expected) == (found.verdict, found.expected)
    assert "did not run: y" in found.message
