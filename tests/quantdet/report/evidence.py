"""What the report shows of the observations behind a case: environment, layers, and where repeats differ; pure functions.

It rides on the case's record, so that whoever writes the report needs no observation.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import PHASES, Phase
from quantdet.observations.observation import Observation, Output, PromptRecord

MOST_PROMPTS = 4
MOST_POSITIONS = 256
MOST_RUNS = 64
SAME, LOGITS, TOKEN = ".x#"  # of a position: nothing differs, logits do, the generated token does


def of(judgement: Judgement, observations: Sequence[Observation], test: str) -> dict[str, Any] | None:
    """JSON-able evidence of a case; None without an observation.

    environment: that of the first lifetime; layers (of `test_kernel`, and of the lifetime that it is about): `[kind, module,
    executed, count]`, attention backends and mode; noise (where repeats or lifetimes differ): see `noise`.
    """
    if not observations:
        return None
    header = observations[0].header
    found: dict[str, Any] = {"vllm": str(header.environment.get("vllm") or ""), "environment": dict(header.environment)}
    if test == "test_kernel":
        known = [one.header.executed for one in observations if one.header.executed is not None]
        about = [one for one in known if one.summary == judgement.figures.get("kernel.executed")]
        for executed in (about or known)[:1]:
            found["layers"] = [
                [one.kind, one.module, one.executed + (f"[{one.detail}]" if one.detail else ""), one.count]
                for one in executed.layers
            ]
            found["attention"], found["mode"] = list(executed.attention), executed.mode
    if judgement.verdict is Verdict.NOISY and test in ("test_repeat", "test_restart"):
        found["noise"] = noise(observations, restarts=test == "test_restart", phase=judgement.figures.get("phase"))
    return found


def noise(observations: Sequence[Observation], *, restarts: bool, phase: Phase | None = None) -> list[dict[str, Any]]:
    """Prompts whose runs differ, at most `MOST_PROMPTS`: a row per run that differs from the one it is compared with.

    Runs are compared with repeat 0 of their lifetime; with `restarts`, repeat 0 of each lifetime with that of the first. A
    row's text has a character per position: `SAME`, `LOGITS` or `TOKEN`. `span` is how many positions one character stands
    for, where there are more than `MOST_POSITIONS`.
    """
    found: list[dict[str, Any]] = []
    for number, prompt in enumerate(observations[0].prompts):
        for one in PHASES if phase is None else (phase,):
            rows = [row for row in _rows(observations, number, one, restarts) if row[1].strip(SAME)]
            if rows and len(found) < MOST_PROMPTS:
                length = len(rows[0][1])
                span = -(-length // MOST_POSITIONS)
                first = min(len(text) - len(text.lstrip(SAME)) for _, text in rows)
                found.append(
                    {
                        "prompt": prompt.header.id,
                        "phase": one,
                        "positions": length,
                        "first": int(prompt.rows(one)[first]),
                        "span": span,
                        "runs": _runs(observations, restarts),
                        "differing": len(rows),
                        "rows": [[label, _squeezed(text, span)] for label, text in rows[:MOST_RUNS]],
                    }
                )
    return found


def _runs(observations: Sequence[Observation], restarts: bool) -> int:
    return len(observations) if restarts else sum(one.header.repeats for one in observations)


def _rows(observations: Sequence[Observation], number: int, phase: Phase, restarts: bool) -> list[tuple[str, str]]:
    """`(which run, a character per position)` of every run but those that the others are compared with."""
    if restarts:
        base = observations[0].prompts[number].run(0)
        return [(f"lifetime {one.header.lifetime}", _text(base, one.prompts[number].run(0), phase)) for one in observations[1:]]
    several = len(observations) > 1
    found = []
    for one in observations:
        prompt: PromptRecord = one.prompts[number]
        texts = [_text(prompt.run(0), output, phase) for output in prompt.outputs]
        for repeat in range(1, one.header.repeats):
            label = f"lifetime {one.header.lifetime} repeat {repeat}" if several else f"repeat {repeat}"
            found.append((label, texts[prompt.header.runs[repeat]]))
    return found


def _text(base: Output, other: Output, phase: Phase) -> str:
    a, b = base.block(phase), other.block(phase)
    differs: NDArray[np.bool_] = (a.digests != b.digests).any(axis=1)
    differs |= (a.topk_ids != b.topk_ids).any(axis=1) | (a.topk_logprobs.view(np.int32) != b.topk_logprobs.view(np.int32)).any(
        1
    )
    words = np.where(differs, LOGITS, SAME)
    if phase == "decode" and len(words) == len(base.output_ids):
        words = np.where(base.output_ids != other.output_ids, TOKEN, words)
    return "".join(words)


def _squeezed(text: str, span: int) -> str:
    """The worst of every `span` characters."""
    parts = (text[at : at + span] for at in range(0, len(text), span))
    return "".join(max(part, key=(SAME, LOGITS, TOKEN).index) for part in parts)
