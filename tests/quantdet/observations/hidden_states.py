"""The optional part `activations` of an observation: digests of hidden states and fingerprints, and what a reader checks.

Arrays, next to those of the prompts:

- `activations.P.PHASE.G`, uint8 (layers + 1, rows, 16): digests of prompt P's G-th distinct outcome in a phase. A digest is the
  first half of the SHA-256 over one position of what the layer gave, in its own dtype: hidden state and, where the layer hands
  it on apart, residual. The rows of prefill are the positions of the prompt's forward pass, those of decode the steps from 1
  on: step 0 is the last position of prefill. The last row of layers are the full-vocabulary logits of the same requests.
- `activations.fingerprint.N`, float16 (projected layers, positions, 16), see `projection`: of claim N, the positions that its
  generated tokens come from; in a re-execution, of prompt N, all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdet.matrix.cell import PHASES, Phase
from quantdet.metrics import fingerprints as projection
from quantdet.observations.blocks import ObservationError
from quantdet.observations.header import Header, HiddenStatesTaken

WIDTH = 16  # bytes of a digest
PREFIX = "activations."


@dataclass(frozen=True, repr=False)
class HiddenStates:
    """`digests`: by prompt and phase the distinct outcomes; `fingerprints`: by claim, or by prompt of a re-execution."""

    header: HiddenStatesTaken
    digests: tuple[Mapping[Phase, tuple[NDArray[np.uint8], ...]], ...] = ()
    fingerprints: tuple[NDArray[np.float16], ...] = ()

    def run(self, prompt: int, phase: Phase, repeat: int) -> NDArray[np.uint8]:
        """Digests (layers + 1, rows, 16) of one repeat; the last row of layers are the logits."""
        return self.digests[prompt][phase][self.header.runs[prompt][phase][repeat]]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """By name, as they are written."""
        found: dict[str, NDArray[Any]] = {}
        for p, phases in enumerate(self.digests):
            for phase, outcomes in phases.items():
                found |= {f"{PREFIX}{p}.{phase}.{g}": np.ascontiguousarray(one) for g, one in enumerate(outcomes)}
        return found | {f"{PREFIX}fingerprint.{n}": np.ascontiguousarray(one) for n, one in enumerate(self.fingerprints)}


def rows_of(header: Header, prompt: int) -> dict[Phase, int]:
    """Positions of a prompt's digests by phase."""
    return {"prefill": header.prompts[prompt].length, "decode": header.decode_tokens - 1}


def check(where: str, header: Header) -> None:
    """What a header may say of its hidden states.

    Raises:
        ObservationError: it contradicts itself or the rest of the header.
    """
    part = header.hidden_states
    if part is None:
        return
    at = f"{where}: activations"
    if header.kind == "refusal" or header.evidence == "reported":
        raise ObservationError(f"{at}: a refusal, or reported evidence, has none")
    if part.problem:
        if part.runs or part.projected:
            raise ObservationError(f"{at}.problem: with a problem there are no runs and no fingerprints")
        return
    if not part.layers or len(set(part.layers)) != len(part.layers):
        raise ObservationError(f"{at}.layers: needs names, each once")
    if bool(part.runs) != bool(part.repeats) or len(part.runs) not in (0, len(header.prompts)):
        raise ObservationError(f"{at}.runs: {len(part.runs)} rows for {len(header.prompts)} prompts, {part.repeats} repeats")
    for p, phases in enumerate(part.runs):
        for phase in PHASES:
            runs = phases.get(phase, ())
            if len(runs) != part.repeats:
                raise ObservationError(f"{at}.runs.{p}.{phase}: {len(runs)} runs of {part.repeats} repeats")
            # Bounded before anything is made of it: the number may be anything.
            if not 0 <= min(runs) <= max(runs) < len(runs) or list(dict.fromkeys(runs)) != list(range(max(runs) + 1)):
                raise ObservationError(f"{at}.runs.{p}.{phase}: indices do not number the outcomes in order")
    if part.projected:
        if part.projection != projection.NAME:
            raise ObservationError(f"{at}.projection: is {part.projection!r}, this suite reads {projection.NAME}")
        if any(b <= a for a, b in pairwise((-1, *part.projected, len(part.layers)))):
            raise ObservationError(f"{at}.projected: layers are not ascending below {len(part.layers)}")
        if header.role != "verify" and not header.claims:
            raise ObservationError(f"{at}.projected: fingerprints are of claims, of which there are none")


def take(path: Path, header: Header, tensors: dict[str, NDArray[Any]]) -> HiddenStates | None:
    """Move the arrays of hidden states out of `tensors`, checked.

    Raises:
        ObservationError: one is missing, of another dtype or shape, or not finite.
    """
    part = header.hidden_states
    if part is None:
        return None

    def one(name: str, dtype: str, *shape: int) -> NDArray[Any]:
        array = tensors.pop(PREFIX + name, None)
        if array is None:
            raise ObservationError(f"{path}: {PREFIX}{name}: missing")
        if array.dtype != np.dtype(dtype) or array.shape != shape:
            raise ObservationError(f"{path}: {PREFIX}{name}: {array.dtype} {array.shape}, needs {dtype} {shape}")
        if dtype == "float16" and not np.isfinite(array).all():
            raise ObservationError(f"{path}: {PREFIX}{name}: is not finite")
        return array

    digests = tuple(
        {
            phase: tuple(
                one(f"{p}.{phase}.{g}", "uint8", len(part.layers) + 1, rows_of(header, p)[phase], WIDTH)
                for g in range(max(phases[phase]) + 1)
            )
            for phase in PHASES
        }
        for p, phases in enumerate(part.runs)
    )
    lengths: list[int] = []
    if part.projected:
        verifies = header.role == "verify"
        lengths = [row.length for row in header.prompts] if verifies else [header.claim_tokens] * len(header.claims)
    fingerprints = tuple(
        one(f"fingerprint.{n}", "float16", len(part.projected), length, projection.DIMS) for n, length in enumerate(lengths)
    )
    return HiddenStates(part, digests, fingerprints)
