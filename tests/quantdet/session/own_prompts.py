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


def of(options: Options, matrix: Matrix, model_id: str, checkpoints: Sequence[Described], directory: Path) -> Workload:
    """Ids that all checkpoints of a model can take; texts by the tokenizer of the first that has one.

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
    file = options.prompts or (options.matrix.parent / model.workload if model.workload else None)
    if file is None:
        made, _ = prompted.default(
            directory, **limits, tokenize=None if speaker is None else partial(tokenize, speaker, cache=cache)
        )
        return made
    given = prompts.given(file)
    if isinstance(given, Workload):
        workload.check_vocab(given, min(vocabularies))
        return given
    return prompted.to_workload(given, tokenize(speaker or checkpoints[0].path, given, cache=cache), **limits, where=str(file))
