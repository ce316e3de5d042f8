"""The workload of a model that brought its own prompts, or none: token ids within its vocabulary and its positions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from quantdet.engines.tokenizing import Tokenized, TokenizedPrompt
from quantdet.matrix import workload
from quantdet.matrix.prompts import PromptLine
from quantdet.matrix.workload import MIN_JOINED, Prompt, Workload, WorkloadError

NAME = "prompts"
TEXT, IDS = "text-v1", "synthetic-v1"

# The first tokens are BOS, a template's header or have too little before them to say anything about the weights.
_CONTENT_START = 4


def to_workload(
    lines: Sequence[PromptLine], tokenized: Tokenized, *, vocab_size: int, max_positions: int | None, decode_tokens: int,
    where: str = "--prompts", name: str = NAME,
) -> Workload:  # fmt: skip
    """The prompts of a file as token ids.

    A prompt and its continuation are prefilled as one sequence, and every position from `content_start` on counts: without a
    continuation the last quarter of the ids (at least 2) takes its place, which changes nothing of what is computed.
    `content_start` is 4, or half of a shorter sequence.

    Args:
        tokenized: of the same `lines`.
        vocab_size: tokens that the model has; ids are below it.
        max_positions: tokens that the model or the engine takes of a sequence; None: not known, and not checked.
        decode_tokens: tokens generated after each prompt.

    Raises:
        WorkloadError: with every mistake: a prompt without ids, ids outside the vocabulary, too many tokens or too few.
    """
    mistakes = _without_tokenizer(lines, tokenized)
    room = None if max_positions is None else max_positions - decode_tokens
    prompts = []
    for line, found in zip(lines, tokenized.prompts, strict=True):
        wrong = [found.error] if found.error else []
        if found.ids:
            prompt = _prompt(line, found)
            wrong = _wrong(prompt, vocab_size, room, decode_tokens)
            prompts.append(prompt)
        mistakes += [f"{line.where}: {one}" for one in wrong]
    if mistakes:
        raise WorkloadError(where, mistakes)
    return workload.of_prompts(name, tuple(prompts))


def _without_tokenizer(lines: Sequence[PromptLine], tokenized: Tokenized) -> list[str]:
    """Once, not in each line."""
    if not tokenized.error:
        return []
    needing = [line.line for line in lines if line.needs_tokenizer]
    which = f"line {needing[0]} needs" if len(needing) == 1 else f"line {needing[0]} and {len(needing) - 1} more need"
    return [f'{which} a tokenizer, have none: {tokenized.error}; token ids ("ids") need none']


def _prompt(line: PromptLine, found: TokenizedPrompt) -> Prompt:
    joined = (*found.ids, *(found.continuation or ()))
    forced = len(found.continuation) if found.continuation else max(2, len(joined) // 4)
    start = min(_CONTENT_START if line.content_start is None else line.content_start, max(1, len(joined) // 2))
    return Prompt(line.id, joined[: len(joined) - forced], joined[len(joined) - forced :], start, None, None)


def _wrong(prompt: Prompt, vocab_size: int, room: int | None, decode_tokens: int) -> list[str]:
    joined, mistakes = prompt.joined, []
    if len(joined) < MIN_JOINED:
        mistakes.append(f"needs at least {MIN_JOINED} tokens of prompt and continuation together, have {len(joined)}")
    if room is not None and len(joined) > room:
        of = f"{room + decode_tokens} positions less {decode_tokens} generated tokens"
        mistakes.append(f"needs at most {room} tokens ({of}), have {len(joined)}")
    if max(joined) >= vocab_size:
        count = sum(token >= vocab_size for token in joined)
        mistakes.append(f"needs token ids below the model's vocabulary of {vocab_size}, have {max(joined)} ({count} outside)")
    return mistakes


def default(
    directory: Path, *, vocab_size: int, max_positions: int | None, decode_tokens: int,
    tokenize: Callable[[tuple[PromptLine, ...]], Tokenized] | None,
) -> tuple[Workload, tuple[str, ...]]:  # fmt: skip
    """The workload of a model without prompts of its own, and notes: why it is not the text where there is a tokenizer.

    The suite's texts by the model's tokenizer (`text-v1-ids`). Without one, `synthetic-v1`: as it is where the vocabulary has
    its ids, else modulo the vocabulary (`synthetic-v1-mod512`). Sequences that the model has no positions for are cut
    (`synthetic-v1-max96`): other ids are another workload, and its name says so.

    Args:
        directory: the suite's workloads.
        tokenize: lines to ids (`quantdet.engines.tokenizing.tokenize`); None: the checkpoint has no tokenizer.

    Raises:
        WorkloadError: the model has no room for 4 tokens beside those that are generated.
    """
    room = None if max_positions is None else max_positions - decode_tokens
    if room is not None and room < MIN_JOINED:
        needs = f"needs at least {MIN_JOINED + decode_tokens} positions for {decode_tokens} generated tokens"
        raise WorkloadError(IDS, [f"{needs}, have {max_positions}"])
    made = partial(to_workload, vocab_size=vocab_size, max_positions=max_positions, decode_tokens=decode_tokens)
    notes = []
    if tokenize is not None:
        lines = tuple(
            PromptLine(number, one.id, text=one.text, continuation=one.forced_text, content_start=one.content_start)
            for number, one in enumerate(workload.load(TEXT, directory).prompts, 1)
        )
        tokenized, name = _cut(tokenize(lines), room, f"{TEXT}-ids")
        try:
            return made(lines, tokenized, where=name, name=name), tokenized.warnings
        except WorkloadError as error:
            notes.append(f"token ids instead of text: {error.mistakes[0]}")
    shipped = workload.load(IDS, directory)
    name = IDS
    if max(max(one.joined) for one in shipped.prompts) >= vocab_size:
        name += f"-mod{vocab_size}"
    rows = tuple(_modulo(one, vocab_size) for one in shipped.prompts)
    if room is None or workload.max_tokens(shipped) <= room:
        return workload.of_prompts(name, rows), tuple(notes)
    lines = tuple(PromptLine(i, one.id, ids=one.token_ids, content_start=one.content_start) for i, one in enumerate(rows, 1))
    tokenized, name = _cut(Tokenized(tuple(TokenizedPrompt(one.token_ids, one.forced_ids) for one in rows)), room, name)
    return made(lines, tokenized, where=name, name=name), tuple(notes)


def _modulo(prompt: Prompt, vocab_size: int) -> Prompt:
    given, forced = (tuple(one % vocab_size for one in ids) for ids in (prompt.token_ids, prompt.forced_ids))
    return replace(prompt, token_ids=given, forced_ids=forced)


def _cut(tokenized: Tokenized, room: int | None, name: str) -> tuple[Tokenized, str]:
    """Sequences of at most `room` tokens, the whole of a cut one to be divided anew; the name says if one was cut."""
    if room is None or all(len(one.ids) + len(one.continuation or ()) <= room for one in tokenized.prompts):
        return tokenized, name
    cut = tuple(
        one
        if len(one.ids) + len(one.continuation or ()) <= room
        else TokenizedPrompt((*one.ids, *(one.continuation or ()))[:room], None, one.error)
        for one in tokenized.prompts
    )
    return replace(tokenized, prompts=cut), f"{name}-max{room}"
