"""What a command line's checkpoints add to a session: cells, and the prompts that they are measured with."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from quantdet.checkpoints.described import Mistaken
from quantdet.engines import arguments
from quantdet.engines.signatures import Type
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.workload import Workload, WorkloadError
from quantdet.session import own, own_prompts
from quantdet.session.machine.machine import Machine, Software
from quantdet.session.options import Options
from quantdet.untrusted import plain


def made(
    options: Options,
    matrix: Matrix,
    machine: Machine,
    software: Software,
    prompts: Path,
    known: Mapping[str, Type] | None,
) -> tuple[Matrix, Mapping[str, Workload]]:
    """The matrix with the cells of every checkpoint that describes itself, and by model the prompts of these.

    Args:
        prompts: the suite's workloads.
        known: the engine's arguments, where they are known.

    Raises:
        pytest.UsageError: every mistake of checkpoints, prompts and arguments at once.
    """
    if not options.model and all(model.checkpoint is None for model in matrix.models.values()):
        return matrix, {}
    args, mistakes = arguments.asked(options.engine_arg, known)
    asked = own.Asked(
        options.model, options.base, options.same_base, {} if mistakes else args,
        _hardware(options, matrix, machine, software), None if options.replay else software.vllm,
    )  # fmt: skip
    reader = own.Reader(options.folder if options.model else options.matrix.parent, options.allow_download)
    try:
        found = own.expanded(own.alone(matrix, asked, reader) if options.model else matrix, asked, reader)
    except Mistaken as error:
        raise _usage([*(f"--engine-arg: {one}" for one in mistakes), *error.mistakes]) from None
    mistakes = [f"--engine-arg: {one}" for one in mistakes]
    workloads: dict[str, Workload] = {}
    for name in found.matrix.models:
        if (mine := found.of(name)) and not options.replay:
            try:
                workloads[name] = own_prompts.of(options, found.matrix, name, mine, prompts)
            except WorkloadError as error:
                mistakes += [f"prompts of {name}: {one}" for one in error.mistakes]
    if mistakes:
        raise _usage(mistakes)
    return found.matrix, workloads


def _usage(mistakes: list[str]) -> pytest.UsageError:
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return pytest.UsageError(plain("\n".join([f"--model: {count}", *(f"  {one}" for one in mistakes)]), keep="\n"))


def _hardware(options: Options, matrix: Matrix, machine: Machine, software: Software) -> tuple[str, ...]:
    """The rows that cells are made for: the one that is asked for, what a replay holds, or what vLLM runs on here."""
    if options.hardware is not None:
        return (options.hardware,)
    if options.replay:
        return ("*",)
    here = machine.rows(matrix)
    return tuple(row for row in here if matrix.hardware[row].kind == software.flavour) or here[:1] or ("*",)
