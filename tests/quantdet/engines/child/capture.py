"""Full-vocabulary logits, taken inside the worker where vLLM computes them.

`LogitsTap` wraps the model's `compute_logits`: what it sees is what the sampler and the logprobs are made from. Runs in
the engine's process only.
"""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantdet.engines.plan import InvalidMeasurement
from quantdet.matrix.cell import Phase


class CaptureError(InvalidMeasurement):
    """The calls seen do not add up to the request, so that the logits cannot be assigned to positions."""


def to_numpy(logits: Any) -> NDArray[Any]:
    """A torch tensor as numpy on its native dtype (bfloat16 as `ml_dtypes.bfloat16`)."""
    import torch

    tensor = logits.detach().to("cpu").contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)  # type: ignore[no-any-return]
    return tensor.numpy().copy()  # type: ignore[no-any-return]


def digest_rows(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """SHA-256 of each row as little-endian float32; uint8 of shape (rows, 32)."""
    exact = rows.astype("<f4", copy=False)
    digests = b"".join(hashlib.sha256(np.ascontiguousarray(row).data).digest() for row in exact)
    return np.frombuffer(digests, dtype=np.uint8).reshape(len(exact), 32)


def turn_over(logits: Any, row: int, token: int) -> None:
    """Seeded defect: the lowest bit of one logit of a torch tensor (rows, V), in place."""
    import torch

    logits.view({2: torch.int16, 4: torch.int32}[logits.element_size()])[row, token] ^= 1


class LogitsTap:
    """Records the logits of one request at a time.

    vLLM computes the logits to sample from one row at a time (one sequence), and prompt logits as blocks of at least
    two rows, so that rows can be told apart without knowing the model runner. `assemble` proves that they add up.
    """

    def __init__(self, model: Any) -> None:
        self._calls: list[NDArray[Any]] = []
        self._recording = False
        self._flips: dict[Phase, tuple[int, int]] = {}
        compute = model.compute_logits

        def tapped(*args: Any, **kwargs: Any) -> Any:
            logits = compute(*args, **kwargs)
            if self._recording and logits is not None:
                self._inject(logits)
                self._calls.append(to_numpy(logits))
            return logits

        model.compute_logits = tapped

    def start(self, flips: Mapping[Phase, tuple[int, int]] = MappingProxyType({})) -> None:
        """Begin a request. `flips`: by phase (decode step or prefill position, token id): turn over the lowest bit of that
        logit, in the engine."""
        self._calls, self._recording, self._flips = [], True, dict(flips)

    def _inject(self, logits: Any) -> None:
        phase: Phase = "decode" if logits.shape[0] == 1 else "prefill"
        if phase not in self._flips:
            return
        position, token = self._flips[phase]
        row = position - sum(call.shape[0] for call in self._calls if (call.shape[0] == 1) == (phase == "decode"))
        if 0 <= row < logits.shape[0]:
            turn_over(logits, row, token)

    def assemble(self, prompt_length: int, decode_tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """`(decode, prefill)` logits on the native dtype, of shape (decode_tokens, V) and (prompt_length - 1, V)."""
        self._recording = False
        decode = [call for call in self._calls if call.shape[0] == 1]
        prefill = [call for call in self._calls if call.shape[0] > 1]
        rows = sum(call.shape[0] for call in prefill)
        # Model runner V2 computes the last prompt position with the others, though nothing is reported of it.
        if len(decode) != decode_tokens or rows not in (prompt_length - 1, prompt_length):
            raise CaptureError(
                f"captured {len(decode)} sampled and {rows} prompt rows of logits, the request has {decode_tokens} "
                f"and {prompt_length - 1}"
            )
        return np.concatenate(decode), np.concatenate(prefill)[: prompt_length - 1]
