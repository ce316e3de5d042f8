"""The prompts that somebody's own checkpoint is measured with: given ones, or the suite's, as ids of its own vocabulary."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from quantdet.checkpoints.described import Described
from quantdet.engines import prompted
from quantdet.engines.tokenizing import tokenize
from quantdet.matrix import prompts, workload
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.workload import Workload, WorkloadError
from quantdet.session.options import Options


def of(
    options: Options, matrix: Matrix, model_id: str, checkpoints: Sequence[Described], directory: Path
) -> tuple[Workload, tuple[str, ...]]:
    """Ids that all checkpoints of a model can take, and what is worth a word of them.

    Texts become ids by the tokenizer of the first checkpoint that has one.

    Args:
        directory: the suite's workloads.

    Raises:
        WorkloadError: every prompt that the model cannot take, and why.
    """
    model = matrix.models[model_id]
    run = model.run.decode_tokens or matrix.run.decode_tokens
    generated = max(run, model.claims.decode_tokens) if model.claims is not None and options.record is not None else run
    vocabularies = [one.vocab_size for one in checkpoints if one.vocab_size is not None]
    if not vocabularies:
        raise WorkloadError(model_id, ["needs 'vocab_size' in the checkpoint's configuration, have none"])
    positions = [one.max_positions for one in checkpoints if one.max_positions is not None]
    asked = [row.args["max_model_len"] for row in matrix.setting if row.when.model == model_id and "max_model_len" in row.args]
    room = min((*positions, *(one for one in asked if isinstance(one, int) and one > 0)), default=None)
    limits: dict[str, Any] = {"vocab_size": min(vocabularies), "max_positions": room, "decode_tokens": generated}
    speaker = next((one.path for one in checkpoints if one.tokenizer and one.path.is_dir()), None)
    cache = options.checkpoints / ".tokens"
    named = model.workload if model.workload and options.prompts is None else ""
    if options.prompts is None and not named:
        return prompted.default(
            directory, **limits, tokenize=None if speaker is None else partial(tokenize, speaker, cache=cache)
        )
    file = options.prompts or options.matrix.parent / named
    given = workload.load(named, directory) if named and not workload.is_path(named) else prompts.given(file)
    if isinstance(given, Workload):
        return _fitting(given, min(vocabularies), room, generated), ()
    found = tokenize(speaker or checkpoints[0].path, given, cache=cache)
    return prompted.to_workload(given, found, **limits, where=str(file)), found.warnings


def _fitting(given: Workload, vocabulary: int, room: int | None, generated: int) -> Workload:
    """A workload as it is, if the model can take it.

    Raises:
        WorkloadError: it is text, has ids that the vocabulary does not have, or is too long.
    """
    workload.check_vocab(given, vocabulary)
    wrong = ["is text: give its texts as lines of --prompts, or ids"] if given.has_text else []
    wrong += [
        f"prompts.{one.id}: needs {len(one.joined) + generated} positions with {generated} generated tokens, have {room}"
        for one in given.prompts
        if room is not None and len(one.joined) + generated > room
    ]
    if wrong:
        raise WorkloadError(given.id, wrong)
    return given
