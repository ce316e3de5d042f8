"""The requests of a plan as token ids, and whether this engine can be measured with them: all of them, before the first."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from quantdet.engines.plan import InvalidMeasurement, Plan, PlannedPrompt

_TOLD = 5  # mistakes that a message names


@dataclass(frozen=True)
class Limits:
    """What a request may be: ids below `vocabulary`, prompt and generated tokens together at most `length`; None: any."""

    vocabulary: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Request:
    """Forced ids of a request, and where its continuation begins."""

    ids: list[int]
    forced_from: int


Encoded = Mapping[PlannedPrompt, Request]


class Reads(Protocol):
    """The part of `quantdet.engines.child.lifetime.Loaded` that is asked here."""

    def tokenizer(self) -> Any: ...

    def limits(self) -> Limits: ...


def encoded(loaded: Reads, plan: Plan) -> Encoded:
    """Every prompt and claim of the plan.

    Raises:
        InvalidMeasurement: some cannot be measured; names them, what they need and what there is.
    """
    limits = loaded.limits()
    found: dict[PlannedPrompt, Request] = {}
    wrong: list[str] = []
    for prompts, tokens in ((plan.prompts, plan.decode_tokens), (plan.claims, plan.claim_tokens)):
        for prompt in prompts:
            found[prompt], starts = _request(loaded, prompt)
            wrong += [f"{prompt.id}: {mistake}" for mistake in _mistakes(prompt, found[prompt].ids, tokens, limits, starts)]
    wrong = list(dict.fromkeys(wrong))  # a prompt may be a claim too
    if wrong:
        more = f"; and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        raise InvalidMeasurement(f"prompts that cannot be measured: {'; '.join(wrong[:_TOLD])}{more}")
    return found


def _request(loaded: Reads, prompt: PlannedPrompt) -> tuple[Request, int | None]:
    """The request, and the token that begins a text (None: ids were given, or the tokenizer has none)."""
    if prompt.text is None:
        return Request([*prompt.token_ids, *prompt.forced_ids], len(prompt.token_ids)), None
    tokenizer = loaded.tokenizer()
    ids = tokenizer.encode(prompt.text)
    forced = tokenizer.encode(prompt.forced_text or "", add_special_tokens=False)
    return Request([*ids, *forced], len(ids)), getattr(tokenizer, "bos_token_id", None)


def _mistakes(prompt: PlannedPrompt, ids: list[int], tokens: int, limits: Limits, starts: int | None) -> Iterator[str]:
    outside = [one for one in ids if one < 0 or (limits.vocabulary is not None and one >= limits.vocabulary)]
    if outside:
        yield f"needs ids from 0 to {'…' if limits.vocabulary is None else limits.vocabulary - 1}, has {outside[0]}"
    if limits.length is not None and len(ids) + tokens > limits.length:
        needed = f"{len(ids) + tokens} tokens ({len(ids)} of the prompt, {tokens} generated)"
        yield f"needs {needed}, the engine has room for {limits.length} (max_model_len)"
    if len(ids) < 2:
        yield f"needs at least 2 tokens, has {len(ids)}"
    elif prompt.content_start >= len(ids):
        yield f"needs its content to begin before its end, content_start {prompt.content_start} of {len(ids)} tokens"
    if starts is not None and ids[:2] == [starts, starts]:
        yield f"needs one token {starts} at its beginning (BOS), has two: the text has one, and the tokenizer adds one"
