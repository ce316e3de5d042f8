"""What a command line's checkpoints add to a session: cells, and the prompts that they are measured with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from quantdet.checkpoints.described import Described, Mistaken
from quantdet.engines import arguments
from quantdet.engines.signatures import Type
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.workload import Workload, WorkloadError
from quantdet.session import own, own_prompts, plans, usable
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
) -> tuple[Matrix, Mapping[str, Workload], tuple[str, ...]]:
    """The matrix with the cells of every checkpoint that describes itself, by model the prompts of these, and lines about them.

    Args:
        prompts: the suite's workloads.
        known: the engine's arguments, where they are known.

    Raises:
        pytest.UsageError: every mistake of checkpoints, prompts and arguments at once.
    """
    if not options.model and all(model.checkpoint is None for model in matrix.models.values()):
        return matrix, {}, ()
    args, mistakes = arguments.asked(options.engine_arg, known)
    asked = own.Asked(
        options.model, options.base, options.same_base, {} if mistakes else args,
        _hardware(options, matrix, machine, software), None if options.replay else software.vllm,
    )  # fmt: skip
    reader = own.Reader(options.folder if options.model else options.matrix.parent, options.allow_download)
    mistakes = [f"--engine-arg: {one}" for one in mistakes]
    if options.prompts is not None and not options.prompts.is_file():
        mistakes.append(f"--prompts: needs a file, have none at {options.prompts}")
    try:
        found = own.expanded(own.alone(matrix, asked, reader) if options.model else matrix, asked, reader)
    except Mistaken as error:
        raise _usage(options, [*mistakes, *error.mistakes]) from None
    workloads: dict[str, Workload] = {}
    told: list[str] = []
    for name in found.matrix.models:
        if (mine := found.of(name)) and not options.replay:
            try:
                workloads[name], notes = own_prompts.of(options, found.matrix, name, mine, prompts)
                mistakes += _too_small(found.matrix, name, workloads[name])
                told.append(_line(found.matrix, name, mine, workloads[name], notes, args))
            except WorkloadError as error:
                mistakes += [f"prompts of {name}: {one}" for one in error.mistakes]
    if mistakes:
        raise _usage(options, mistakes)
    return found.matrix, workloads, tuple(told)


def _too_small(matrix: Matrix, model_id: str, work: Workload) -> list[str]:
    """Arguments that are less than what the prompts need, each once."""
    found: dict[str, None] = {}
    for cell in (cell for cell in matrix.cells() if cell.model_id == model_id):
        computed = plans.lengths(cell, matrix, work, None)
        args = {**computed, **{name: value for row in matrix.settings(cell) for name, value in row.args.items()}}
        found |= dict.fromkeys(usable.too_small(args, computed))
    return [f"engine arguments of {model_id}: {one}" for one in found]


def _line(
    matrix: Matrix,
    model_id: str,
    checkpoints: Sequence[Described],
    work: Workload,
    notes: Sequence[str],
    args: Mapping[str, Any],
) -> str:
    """What is measured of a model, for the head of a run."""
    words = (f"{one.short}{f', KV cache {one.kv_cache}' if one.kv_cache else ''}" for one in checkpoints)
    sources = ", ".join(dict.fromkeys(f"{one.source} ({said})" for one, said in zip(checkpoints, words, strict=True)))
    given = f"; engine arguments {' '.join(f'{name}={value}' for name, value in args.items())}" if args else ""
    asked = f"{len(work.prompts)} prompts {work.id}{''.join(f' ({note})' for note in notes)}"
    return plain(f"{model_id}: {sources}; formats {', '.join(matrix.models[model_id].formats)}; {asked}{given}")


def _usage(options: Options, mistakes: list[str]) -> pytest.UsageError:
    where = "--model" if options.model else f"{options.matrix}: models with a checkpoint"
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return pytest.UsageError(plain("\n".join([f"{where}: {count}", *(f"  {one}" for one in mistakes)]), keep="\n"))


def _hardware(options: Options, matrix: Matrix, machine: Machine, software: Software) -> tuple[str, ...]:
    """The rows that cells are made for: the one that is asked for, what a replay holds, or what vLLM runs on here."""
    if options.hardware is not None:
        return (options.hardware,)
    if options.replay:
        return ("*",)
    here = machine.rows(matrix)
    return tuple(row for row in here if matrix.hardware[row].kind == software.flavour) or here[:1] or ("*",)
