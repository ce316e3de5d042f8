"""What a reader checks of the arrays of an observation before anything is judged: each refusal names the file and the field."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdet.matrix.cell import Phase
from quantdet.observations.blocks import Block, ObservationError, Output, PromptRecord
from quantdet.observations.header import Header, PromptHeader, Reported

_MASS = 1.001  # a float32 log-softmax over 200 000 logits is off by less


def check_prompt(where: str, prompt: PromptHeader, repeats: int) -> None:
    if prompt.content_start >= prompt.length:
        raise ObservationError(f"{where}.content_start: {prompt.content_start} of {prompt.length} ids")
    if len(prompt.runs) != repeats:
        raise ObservationError(f"{where}.runs: {len(prompt.runs)} runs of {repeats} repeats")
    # Bounded before anything is made of it: the number may be anything.
    if max(prompt.runs) >= len(prompt.runs) or list(dict.fromkeys(prompt.runs)) != list(range(max(prompt.runs) + 1)):
        raise ObservationError(f"{where}.runs: indices do not number the outputs in order")


def check_reported(where: str, header: Header) -> None:
    """What a header may say of its evidence.

    Raises:
        ObservationError: it claims more than a report can know, or covers what is not there.
    """
    if header.evidence == "logits":
        if header.reported:
            raise ObservationError(f"{where}: reported: belongs to evidence 'reported'")
        return
    for name in ("executed", "claims", "nonfinite", "divergences"):
        if getattr(header, name):
            raise ObservationError(f"{where}: {name}: evidence 'reported' has none")
    if len(header.reported) != len(header.prompts):
        raise ObservationError(f"{where}: reported: {len(header.reported)} rows for {len(header.prompts)} prompts")
    for p, (prompt, row) in enumerate(zip(header.prompts, header.reported, strict=True)):
        at = f"{where}: reported.{p}"
        if row.generated > header.decode_tokens:
            raise ObservationError(f"{at}.generated: {row.generated} of {header.decode_tokens} tokens")
        for phase, end in (("prefill", prompt.length - 1), ("decode", row.generated)):
            rows = getattr(row, phase)
            if any(b <= a for a, b in pairwise((-1, *rows, end))):
                raise ObservationError(f"{at}.{phase}: rows are not ascending below {end}")
        if not row.prefill and not row.decode:
            raise ObservationError(f"{at}: covers nothing")
        if prompt.content_start != 1:
            raise ObservationError(f"{where}: prompts.{p}.content_start: every reported row counts, needs 1")


def prompt_record(
    path: Path, header: Header, prompt: PromptHeader, p: str, lengths: tuple[int, int], tensors: dict[str, NDArray[Any]],
    reported: Reported | None = None,
) -> PromptRecord:  # fmt: skip
    """The arrays of one prompt, whose names begin with `p`; `lengths` are its generated tokens and top-k."""
    generated, k = lengths
    rows = {"decode": generated, "prefill": prompt.length - 1}
    if reported is not None:
        generated, k = reported.generated, reported.width
        rows = {"decode": len(reported.decode), "prefill": len(reported.prefill)}

    def take(name: str, dtype: str, *shape: int) -> NDArray[Any]:
        array = tensors.pop(f"{p}.{name}", None)
        if array is None:
            raise ObservationError(f"{path}: {p}.{name}: missing")
        if array.dtype != np.dtype(dtype) or array.shape != shape:
            raise ObservationError(f"{path}: {p}.{name}: {array.dtype} {array.shape}, needs {dtype} {shape}")
        if dtype == "int32" and array.size and int(array.min()) < 0:
            raise ObservationError(f"{path}: {p}.{name}: has a negative id")
        return array

    def block(o: int, phase: str) -> Block:
        n = rows[phase]
        at = f"{o}.{phase}"
        found = Block(
            take(f"{at}.digests", "uint8", n, 32),
            take(f"{at}.chosen", "float32", n),
            take(f"{at}.topk_ids", "int32", n, k),
            take(f"{at}.topk_logprobs", "float32", n, k),
        )
        ordered = np.sort(found.topk_ids, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ObservationError(f"{path}: {p}.{at}.topk_ids: an id stands twice in one row")
        excused = any((bad.prompt, bad.phase) == (prompt.id, phase) for bad in header.nonfinite)
        for name, values in ("chosen", found.chosen[:, None]), ("topk_logprobs", found.topk_logprobs):
            bad_rows = np.isnan(values).any(axis=1) | np.isposinf(values).any(axis=1)
            if name != "chosen" or reported is None:
                bad_rows |= ~np.isfinite(values).any(axis=1)
            if bad_rows.any() and not excused:
                raise ObservationError(f"{path}: {p}.{at}.{name}: no logprob, and the header reports no non-finite logits")
        if reported is None and not excused:
            _check_rows(f"{path}: {p}.{at}.topk_logprobs", found)
        return found

    ids = take("prompt_ids", "int32", prompt.length if reported is None or reported.ids else 0)
    outputs = tuple(
        Output(
            take(f"{o}.output_ids", "int32", generated),
            block(o, "decode"),
            block(o, "prefill"),
        )
        for o in range(max(prompt.runs) + 1)
    )
    if reported is None:
        _check_chosen(f"{path}: {p}", ids, outputs)
    return PromptRecord(prompt, ids, outputs, reported)


def _check_chosen(where: str, ids: NDArray[np.int32], outputs: tuple[Output, ...]) -> None:
    """The chosen token's logprob is the one that the top-k gives for it."""
    for o, output in enumerate(outputs):
        phases: tuple[tuple[Phase, NDArray[np.int32]], ...] = (("decode", output.output_ids), ("prefill", ids[1:]))
        for phase, chosen in phases:
            row = _inconsistent(output.block(phase), chosen)
            if row is not None:
                why = f"position {row}: not the logprob that the top-k gives for this token"
                raise ObservationError(f"{where}.{o}.{phase}.chosen: {why}")


def _check_rows(where: str, block: Block) -> None:
    """Rows are in their order, and no more than one probability: what an engine cannot have answered was made up."""
    logprobs, ids = block.topk_logprobs, block.topk_ids
    falling = (logprobs[:, 1:] < logprobs[:, :-1]) | ((logprobs[:, 1:] == logprobs[:, :-1]) & (ids[:, 1:] > ids[:, :-1]))
    if not falling.all():
        raise ObservationError(f"{where}: position {int(np.flatnonzero(~falling.all(axis=1))[0])}: not in order")
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    if (mass > _MASS).any():
        raise ObservationError(f"{where}: position {int(np.argmax(mass))}: probabilities add up to {mass.max():.3g}")


def check_claims(where: str, claims: tuple[PromptRecord, ...]) -> None:
    """Claims are greedy generations from different prompts: each counts as evidence of its own.

    Raises:
        ObservationError: a generated token is not the most likely one, or two claims have the same prompt.
    """
    seen: dict[bytes, int] = {}
    for c, claim in enumerate(claims):
        first = seen.setdefault(claim.prompt_ids.tobytes(), c)
        if first != c:
            raise ObservationError(f"{where}: claim{c}.prompt_ids: the same as claim{first}'s")
        decode = claim.outputs[0].decode
        below = np.flatnonzero(decode.chosen < decode.topk_logprobs[:, 0])
        if below.size:
            raise ObservationError(f"{where}: claim{c}.0.output_ids: step {int(below[0])} is not the most likely token")


def _inconsistent(block: Block, chosen_ids: NDArray[np.int32]) -> int | None:
    """First row whose chosen logprob is not its top-k's, bit for bit, or is above a top-k that does not have the token."""
    hit = block.topk_ids == chosen_ids[:, None]
    inside = hit.any(axis=1)
    wrong = np.zeros(len(inside), np.bool_)
    wrong[inside] = block.topk_logprobs[hit].view(np.int32) != block.chosen[inside].view(np.int32)
    wrong[~inside] = block.chosen[~inside] > block.topk_logprobs[~inside].min(axis=1)
    return int(np.flatnonzero(wrong)[0]) if wrong.any() else None
