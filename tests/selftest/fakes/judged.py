"""Expectations and observations with one defect, for judgements."""

from collections.abc import Callable
from typing import Any

from quantdet.matrix.cell import Cell, Phase
from quantdet.matrix.expectations import Expect, Expectations
from quantdet.observations.observation import Observation
from selftest.fakes.observation import changed_output, last_repeat

NOTHING = Expectations(())


CELL = Cell("alpha", "bf16", "cpu-here")


def expecting(outcome: str, **when: str) -> Expectations:
    return row({"when": when, "outcome": outcome})


def row(fields: dict[str, Any]) -> Expectations:
    return Expectations((Expect.model_validate({"reason": "because", "source": "here", **fields}),))


def flipped(position: int, byte: int = 0, bit: int = 0) -> Callable[[Any], None]:
    """One bit of one position's digest: what one flipped bit of one logit does to it, at the least."""

    def edit(array: Any) -> None:
        array[position, byte] ^= 1 << bit

    return edit


def one_flip(whole: Observation, prompt: int, phase: Phase, position: int, byte: int = 0, bit: int = 0) -> Observation:
    output = changed_output(whole.prompts[prompt].outputs[0], phase, digests=flipped(position, byte, bit))
    return last_repeat(whole, prompt, output)
