"""One cell under several vLLM versions: the same raw logits or not, and whether the same kernels ran.

Logits are compared, not logprobs: vLLM's log-softmax changed with the model runner while the logits stayed.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from quantdet.judging.pairs import pair
from quantdet.judging.verdicts import Judgement, Pair, Verdict
from quantdet.matrix.expectations import Expect
from quantdet.observations.comparable import comparable_requests
from quantdet.observations.observation import Observation


def across(known: Sequence[Observation], rows: Sequence[Expect | None], family: Callable[[str], str]) -> Judgement:
    """Compare one cell's observations, oldest vLLM first, each with the one before it.

    Where the same kernels ran (kernel families, attention, execution mode, torch) the logits have to be the same, unless
    a row (`may_drift`) about the newer of the two says otherwise. Where other kernels ran, either answer is one, and it is
    reported.

    Args:
        known: at least two, of one cell.
        rows: of each but the oldest, the expectation that excuses a difference to the one before it.
        family: the matrix's kernel name of an executed class.
    """
    cell = known[0].header.cell
    figures: dict[str, object] = {
        "expectation": _expectation(known, rows),
        "versions": [one.vllm for one in known],
    }
    for one in known:
        figures[f"logits.sha256@{one.vllm}"] = one.logits_sha256("decode") + ":" + one.logits_sha256("prefill")
        figures[f"kernel.executed@{one.vllm}"] = one.header.executed.summary if one.header.executed else ""
    steps: list[str] = []
    told: list[str] = []
    results: list[Pair] = []
    wrong = False
    for (older, newer), row in zip(pairwise(known), rows, strict=True):
        step = f"{older.vllm} -> {newer.vllm}"
        why = comparable_requests(older, newer)
        if older.header.checkpoint_sha256 != newer.header.checkpoint_sha256:
            why = "checkpoints differ"
        if any(one.header.nonfinite for one in (older, newer)):
            why = "non-finite logits"
        if why is not None:
            return Judgement(Verdict.INVALID, cell, "versions", f"{step} cannot be compared: {why}", False, figures)
        result = pair(older, newer)
        results.append(result)
        changed = _changes(older, newer, family)
        wrong = wrong or (result.verdict is Verdict.DISTINCT and not changed and row is None)
        told.append("; ".join(changed) or "the same kernels")
        steps.append(f"{step} {_said(result)} ({told[-1]})")
    words = {result.verdict for result in results}
    verdict = next(word for word in (Verdict.DISTINCT, Verdict.INDISTINCT, Verdict.IDENTICAL) if word in words)
    figures |= {"l2": max(r.l2 for r in results), "max_abs_diff": max(r.max_abs for r in results), "changes": " | ".join(told)}
    return Judgement(verdict, cell, "versions", ", ".join(steps), not wrong, figures)


def _expectation(known: Sequence[Observation], rows: Sequence[Expect | None]) -> str:
    """What is declared, by the version that it is about; the same words once."""
    about: dict[str, list[str]] = {}
    for newer, row in zip(known[1:], rows, strict=True):
        if row is not None:
            about.setdefault(row.reason, []).append(newer.vllm)
    said = "; ".join(f"may_drift ({', '.join(versions)}): {reason}" for reason, versions in about.items())
    return said or "same logits where the same kernels run"


def _said(result: Pair) -> str:
    match result.verdict:
        case Verdict.IDENTICAL:
            return f"same raw logits at {result.positions} forced positions and {result.decode_steps} decode steps"
        case Verdict.INDISTINCT:
            return f"within repeat noise, {result.differing}/{result.positions} forced positions differ"
        case _:
            return f"other raw logits: {result.differing}/{result.positions} forced positions differ, L2 {result.l2:.3g} nats"


def _changes(older: Observation, newer: Observation, family: Callable[[str], str]) -> list[str]:
    """What ran differently; the class names of one kernel may change between versions, its family does not."""
    a, b = older.header.executed, newer.header.executed
    assert a is not None
    assert b is not None
    found = []
    kernels = [sorted({family(layer.executed) for layer in one.linear}) for one in (a, b)]
    if kernels[0] != kernels[1]:
        found.append(f"kernel {'+'.join(kernels[0])} -> {'+'.join(kernels[1])}")
    if a.attention != b.attention:
        found.append(f"attention {'+'.join(a.attention)} -> {'+'.join(b.attention)}")
    if a.mode != b.mode:
        found.append(f"mode {a.mode} -> {b.mode}")
    if a.tensor_parallel_size != b.tensor_parallel_size:
        found.append(f"tensor parallel size {a.tensor_parallel_size} -> {b.tensor_parallel_size}")
    torch = [str(one.header.environment.get("torch_package", "")) for one in (older, newer)]
    if torch[0] != torch[1]:
        found.append(f"torch {torch[0]} -> {torch[1]}")
    return found
