"""What a command line's checkpoints add to a session: cells, and the prompts that they are measured with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quantdet.matrix.matrix import Matrix
from quantdet.matrix.workload import Workload
from quantdet.session import own
from quantdet.session.machine.machine import Machine, Software
from quantdet.session.options import Options
from quantdet.untrusted import plain


def made(
    options: Options, matrix: Matrix, machine: Machine, software: Software, prompts: Path
) -> tuple[Matrix, Mapping[str, Workload]]:
    """The matrix with the cells of every checkpoint that describes itself, and by model the prompts of these.

    Raises:
        pytest.UsageError: every mistake of checkpoints, prompts and arguments at once.
    """
    if not options.model and all(model.checkpoint is None for model in matrix.models.values()):
        return matrix, {}
    mistakes: list[str] = []
    args: dict[str, Any] = {}
    asked = own.Asked(
        options.model, options.base, options.same_base, args,
        _hardware(options, matrix, machine, software), None if options.replay else software.vllm,
    )  # fmt: skip
    try:
        table = own.alone(matrix, asked) if options.model else matrix
        folder = options.folder if options.model else options.matrix.parent
        found = own.expanded(table, asked, folder, allow_download=options.allow_download)
    except own.Mistakes as error:
        raise _usage([*mistakes, *error.mistakes]) from None
    if mistakes:
        raise _usage(mistakes)
    from quantdet.matrix import workload

    return found.matrix, {n: workload.load("synthetic-v1", prompts) for n, m in found.matrix.models.items() if m.checkpoint}


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
