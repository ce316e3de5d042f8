"""What of a matrix or a command line cannot be used: arguments that would be lost, workloads that are not there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantdet.engines import arguments
from quantdet.engines.signatures import Type
from quantdet.matrix import workload
from quantdet.matrix.cell import matches_any
from quantdet.matrix.matrix import Matrix

# What a cell is has its own keys for these, so that an argument cannot say something else.
ELSEWHERE = {
    "model": "the model's source says it",
    "dtype": "a format's 'dtype', or a setting's, says it",
    "enforce_eager": "a format's 'mode' says it",
    "skip_tokenizer_init": "it follows from the workload",
}
# Follow from the requests, unless a setting of the cell says something else.
COMPUTED = ("max_model_len", "max_num_batched_tokens", "max_logprobs", "tensor_parallel_size")
RESERVED = (*ELSEWHERE, *COMPUTED)


def unusable(matrix: Matrix, prompts: Path, relative_to: Path) -> list[str]:
    """Mistakes that the matrix file alone does not show: workloads that are not there, arguments that would be lost."""
    mistakes = [f"engine.args.{name}: is set per cell" for name in RESERVED if name in matrix.engine.args]
    for index, setting in enumerate(matrix.setting):
        mistakes += [f"setting.{index}.args.{name}: {why}" for name, why in ELSEWHERE.items() if name in setting.args]
    for name, model in matrix.models.items():
        if model.checkpoint is not None:  # its own is checked where it is made
            continue
        used = {"workload": model.workload, **({"claims.workload": model.claims.workload} if model.claims else {})}
        for key, wanted in used.items():
            try:
                work = workload.find(wanted, prompts, relative_to)
                if model.synthetic is not None:
                    workload.check_vocab(work, model.synthetic.vocab_size)
            except workload.WorkloadError as error:
                mistakes.append(f"models.{name}.{key}: {' '.join(str(error).split())}")
    return mistakes


def unobeyed(matrix: Matrix, known: Mapping[str, Type]) -> list[str]:
    """Arguments of the matrix that the installed vLLM does not have, or that the suite cannot obey: `engine` and settings.

    Args:
        known: vLLM's arguments.
    """
    engines = {name: format_.engine for name, format_ in matrix.formats.items()}
    rows: list[tuple[str, Mapping[str, Any]]] = [("engine.args", matrix.engine.args)]
    for index, setting in enumerate(matrix.setting):
        if any(engines[name] == "vllm" and matches_any(name, setting.when.format) for name in engines):
            rows.append((f"setting.{index}.args", setting.args))
    return [
        f"{path}.{one}"
        for path, args in rows
        for one in (*arguments.mistakes(args, known), *arguments.refused(args))
        if one.partition(":")[0] not in ELSEWHERE
    ]


def too_small(args: Mapping[str, Any], computed: Mapping[str, Any]) -> list[str]:
    """Arguments that are less than what the requests need, each as need and have.

    A prompt longer than a chunk of the prefill would be computed in several, and its logits taken apart.
    """
    longest = {"max_num_batched_tokens": "max_model_len"}
    return [
        f"{name}: needs at least {need}, have {args[name]}"
        for name in ("max_model_len", "max_num_batched_tokens", "max_logprobs")
        if name in computed
        and isinstance(args[name], int)
        and args[name] != -1
        and args[name] < (need := computed[longest.get(name, name)])
    ]
