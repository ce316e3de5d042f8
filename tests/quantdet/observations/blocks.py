"""The arrays of an observation, one block a phase. What a reader checks of them: `observations/checks.py`."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdet.matrix.cell import Phase
from quantdet.observations.header import PromptHeader, Reported


class ObservationError(Exception):
    """An observation cannot be used; the message names the file and the field."""


@dataclass(frozen=True, repr=False)
class Block:
    """One phase of one output; n positions, k = top_k.

    digests: uint8 (n, 32), SHA-256 of the position's full-vocabulary float32 logits (little-endian bytes);
    chosen: float32 (n,), logprob in nats of the generated (decode) or given (prefill) token;
    topk_ids: int32 (n, k); topk_logprobs: float32 (n, k), each row sorted by (-logprob, id).

    Of reported evidence: n rows that are covered; digests of a row's ids (int32) and logprobs (float64), as reported; `chosen`
    -inf where it was not reported; k = `Reported.width`, rows in the order of the report, padded with logprobs of -inf.
    """

    digests: NDArray[np.uint8]
    chosen: NDArray[np.float32]
    topk_ids: NDArray[np.int32]
    topk_logprobs: NDArray[np.float32]

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "digests": self.digests,
            "chosen": self.chosen,
            "topk_ids": self.topk_ids,
            "topk_logprobs": self.topk_logprobs,
        }

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 over all bits of the block."""
        digest = hashlib.sha256()
        for array in self.arrays().values():
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.digest()


@dataclass(frozen=True, repr=False)
class Output:
    """One distinct answer to a request: `output_ids` int32 (decode_tokens,) and its two phases."""

    output_ids: NDArray[np.int32]
    decode: Block
    prefill: Block

    def block(self, phase: Phase) -> Block:
        return self.decode if phase == "decode" else self.prefill

    @cached_property
    def fingerprint(self) -> bytes:
        return hashlib.sha256(self.output_ids.tobytes() + self.decode.fingerprint + self.prefill.fingerprint).digest()


@dataclass(frozen=True, repr=False)
class PromptRecord:
    """A prompt's forced ids (int32, (length,)) and its distinct outputs in order of first appearance.

    `reported`: what is covered, where the evidence is no more than that; the ids may then be missing (length 0).
    """

    header: PromptHeader
    prompt_ids: NDArray[np.int32]
    outputs: tuple[Output, ...]
    reported: Reported | None = None

    def rows(self, phase: Phase) -> NDArray[np.int64]:
        """The positions that the rows of a block are about."""
        if self.reported is not None:
            return np.array(self.reported.rows(phase), np.int64)
        return np.arange(len(self.outputs[0].block(phase).digests))

    def run(self, repeat: int) -> Output:
        return self.outputs[self.header.runs[repeat]]
