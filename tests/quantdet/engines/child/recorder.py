"""Collects the outputs of one lifetime: distinct ones only, with the run that gave each, and where repeats differ."""

import statistics
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdet.engines.child.capture import CaptureError
from quantdet.engines.plan import Plan, PlannedPrompt
from quantdet.matrix.cell import PHASES
from quantdet.metrics.bits import distinct, first_difference, ulp_distance
from quantdet.observations.header import Divergence, NonFinite, PromptHeader
from quantdet.observations.observation import Block, Output, PromptRecord

# Logprobs come from logits by a log-softmax in float32; the tolerance only has to tell a wrong row from the right one.
_LOGPROB_TOLERANCE = 0.05


class Recorder:
    """One lifetime's records. `begin` a prompt, `add` each repeat, `end`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.repeats = plan.repeats
        self.records: list[PromptRecord] = []
        self.divergences: list[Divergence] = []
        self.nonfinite: list[NonFinite] = []
        self.generate_s = 0.0
        self.first_call_s = 0.0  # what first calls took longer than the later ones: kernels compiled at their first use
        self.tokens = 0
        self.logits_dtype = ""

    def begin(self, prompt: PlannedPrompt, ids: list[int], forced_from: int) -> None:
        self._prompt = prompt
        self._ids = np.asarray(ids, dtype=np.int32)
        self._outputs: list[Output] = []
        self._noisy = False
        self._first: dict[str, NDArray[Any]] = {}
        self._seconds: list[float] = []

    def seconds(self, call: float) -> None:
        """Wall-clock time of a repeat's call."""
        self.generate_s += call
        self._seconds.append(call)

    def add(
        self,
        output_ids: NDArray[np.int32],
        decode_logits: NDArray[Any],
        prefill_logits: NDArray[Any],
        decode: Block,
        prefill: Block,
    ) -> None:
        """One repeat: ids, native logits of both phases, and what the engine answered."""
        logits = {"decode": decode_logits, "prefill": prefill_logits}
        output = Output(output_ids, decode, prefill)
        repeat = len(self._outputs)
        self.logits_dtype = str(decode_logits.dtype)
        self.tokens += len(output_ids)
        for phase in PHASES:
            for position in np.flatnonzero(~np.isfinite(logits[phase].astype(np.float32)).all(axis=1))[:1]:
                self.nonfinite.append(NonFinite(prompt=self._prompt.id, phase=phase, repeat=repeat, position=int(position)))
        if repeat == 0:
            self._first = logits
            if not self.nonfinite:
                _check_served(self._prompt.id, decode_logits, output_ids, decode)
                _check_served(self._prompt.id, prefill_logits, self._ids[1:], prefill)
        else:
            for phase in PHASES:
                self._diverge(phase, repeat, self._outputs[0].block(phase), output.block(phase), logits[phase])
        self._outputs.append(output)
        self._noisy = self._noisy or output.fingerprint != self._outputs[0].fingerprint

    def _diverge(self, phase: Any, repeat: int, base: Block, other: Block, logits: NDArray[Any]) -> None:
        position = first_difference(base.digests, other.digests)
        if position is None:
            return
        a, b = self._first[phase][position], logits[position]
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
        if not np.isfinite(gap).all():
            return
        # Where values differ in the sign of zero only, every gap is 0: name a token whose bits differ.
        bits = a.view(f"i{a.itemsize}") != b.view(f"i{b.itemsize}")
        token = int(np.argmax(np.where(bits, gap, -1.0)))
        self.divergences.append(
            Divergence(
                prompt=self._prompt.id, phase=phase, repeat=repeat, position=position, token=token,
                differing=int(bits.sum()), max_abs=float(gap.max()),
                ulp=int(ulp_distance(a[token : token + 1], b[token : token + 1])[0]),
            )
        )  # fmt: skip

    def enough(self, repeat: int) -> bool:
        """Whether the prompt at hand needs no repeat of this number.

        Where a bound on the flip rate decides how many there are, the first prompt that is noisy ends them for all. No
        later one shortens them again: what has been seen to differ stays, in whichever phase it was.
        """
        first = self._noisy and all(len(record.outputs) == 1 for record in self.records)
        if first and (self.plan.least_repeats or self.repeats) <= repeat < self.repeats:
            self._truncate(repeat)
        return repeat >= self.repeats

    def _truncate(self, repeats: int) -> None:
        """Forget every later repeat of the prompts that have ended, all of them without a difference."""
        self.repeats = repeats
        for index, record in enumerate(self.records):
            header = record.header.model_copy(update={"runs": record.header.runs[:repeats]})
            self.records[index] = PromptRecord(header, record.prompt_ids, record.outputs)
        self.nonfinite = [seen for seen in self.nonfinite if seen.repeat < repeats]

    def end(self) -> None:
        groups = distinct([output.fingerprint for output in self._outputs])
        unique = [self._outputs[groups.index(group)] for group in range(max(groups) + 1)]
        header = PromptHeader(
            id=self._prompt.id,
            length=len(self._ids),
            content_start=self._prompt.content_start,
            runs=tuple(groups),
        )
        self.records.append(PromptRecord(header, self._ids, tuple(unique)))
        if len(self._seconds) > 1:
            self.first_call_s += max(0.0, self._seconds[0] - statistics.median(self._seconds[1:]))
        self._first = {}


def _check_served(prompt: str, logits: NDArray[Any], chosen: NDArray[Any], block: Block) -> None:
    """The captured rows are those that the answer was made from: their log-softmax gives the answered logprobs."""
    exact = logits.astype(np.float64)
    peak = exact.max(axis=1, keepdims=True)
    normaliser = peak[:, 0] + np.log(np.exp(exact - peak).sum(axis=1))
    expected = exact[np.arange(len(exact)), np.asarray(chosen)] - normaliser
    worst = float(np.abs(expected - block.chosen).max())
    if not worst <= _LOGPROB_TOLERANCE:
        raise CaptureError(
            f"prompt {prompt}: captured logits are not those that were served: logprobs differ by {worst:.3g} nats"
        )
