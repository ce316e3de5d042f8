"""Hidden states of the decoder layers and of the norm behind them: digests for bit tests, fingerprints for re-execution.

Forward hooks on a loaded model, in eager mode only: compiled models call none. The hooks read what a layer returns, copied to
the host as it is returned (the next layer may write over it), and change nothing. They are set when the requests that the
logits' verdicts and timings come from are over.

A layer returns its hidden state, or (vLLM) hidden state and residual apart, which the next norm adds. Bits are those of all
that is returned; a fingerprint is of the residual stream, the sum of both in float32.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantdet.engines.child.capture import CaptureError, digest_rows, to_numpy
from quantdet.engines.plan import Plan
from quantdet.matrix.cell import PHASES, Phase
from quantdet.metrics import fingerprints as projection
from quantdet.metrics.bits import distinct
from quantdet.observations.header import HiddenStatesTaken
from quantdet.observations.hidden_states import WIDTH, HiddenStates

BUDGET_S = 5.0

Outcome = dict[Phase, NDArray[np.uint8]]


def tapped(model: Any) -> tuple[list[tuple[str, Any]], int]:
    """Decoder layers and, after them, the norm that follows them, by name; and how many of them are decoder layers.

    The layers are the longest list of modules that is in no other list (experts are in one); the norm is the last one among
    the modules beside that list.

    Raises:
        CaptureError: there is no list of modules.
    """
    modules = dict(model.named_modules())
    lists = [name for name, module in modules.items() if _is_list(module)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise CaptureError("the model has no list of layers")
    name = max(outer, key=lambda one: len(list(modules[one].children())))
    layers = [(f"{name}.{number}", layer) for number, layer in enumerate(modules[name].children())]
    parent = name.rpartition(".")[0]
    beside = [(f"{parent}.{one}".lstrip("."), module) for one, module in modules[parent].named_children()]
    norms = [(one, module) for one, module in beside if "Norm" in type(module).__name__]
    return layers + norms[-1:], len(layers)


def _is_list(module: Any) -> bool:
    return any(base.__name__ == "ModuleList" for base in type(module).__mro__)


class HiddenStateTap:
    """Records one request at a time: `start`, the request, `finish`.

    outcomes: of each request, by phase, digests (layers + 1, positions, WIDTH), the last of them those of the logits;
    fingerprints: of each request while `projecting`, (kept layers, positions, DIMS), and the length of its prompt.
    """

    def __init__(self, model: Any) -> None:
        self.modules, self._decoders = tapped(model)
        self.kept = projection.kept(self._decoders)
        self.stream: Literal["", "hidden", "hidden + residual"] = ""
        self.width = 0
        self.projecting = False
        self.outcomes: list[Outcome] = []
        self.fingerprints: list[tuple[NDArray[np.float16], int]] = []
        self._recording = False
        self._hooks = [module.register_forward_hook(self._after(index)) for index, (_, module) in enumerate(self.modules)]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def start(self) -> None:
        self._rows: list[list[NDArray[Any]]] = [[] for _ in self.modules]
        self._bad = ""
        self._recording = True

    def finish(self, prompt_length: int, decode: NDArray[Any], prefill: NDArray[Any]) -> None:
        """The request is over; `decode` and `prefill` are its logits.

        Raises:
            CaptureError: the rows that were seen are not those of the request, or a hidden state is not finite.
        """
        self._recording = False
        if self._bad:
            raise CaptureError(self._bad)
        for (name, _), calls in zip(self.modules, self._rows, strict=True):
            _check_rows(name, [len(call) for call in calls], prompt_length, len(decode))
        if self.projecting:
            rows = np.stack([np.concatenate(self._rows[index]) for index in self.kept])
            self.fingerprints.append((rows, prompt_length))
            return
        # A position's logits come from its hidden state: the prompt's but the last, and those of each generated token.
        logits = np.concatenate([digest_rows(prefill), digest_rows(decode)])[:, :WIDTH]
        whole = np.stack([*(np.concatenate(calls) for calls in self._rows), logits])
        self.outcomes.append({"decode": whole[:, prompt_length:], "prefill": whole[:, :prompt_length]})

    def _after(self, index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if self._recording and not self._bad:
                try:
                    take(output)
                except Exception as error:  # what a layer returns is its own; the request is not to end of it
                    self._bad = f"what {self.modules[index][0]} returns: {type(error).__name__}: {error}"

        def take(output: Any) -> None:
            parts = _parts(output)
            stream = sum((part.astype(np.float32) for part in parts[1:]), parts[0].astype(np.float32))
            if not np.isfinite(stream).all():
                self._bad = f"non-finite hidden states in {self.modules[index][0]}"
            if index < self._decoders:
                self.stream, self.width = "hidden" if len(parts) == 1 else "hidden + residual", stream.shape[1]
            if not self.projecting:
                self._rows[index].append(_digests(parts))
            elif index in self.kept and not self._bad:
                self._rows[index].append(projection.project(stream))
            else:
                self._rows[index].append(np.empty((len(stream), 0)))

        return hook


def _parts(output: Any) -> list[NDArray[Any]]:
    """The hidden state of a layer's result and, where the next tensor is alike, the residual: (positions, width) each."""
    tensors = [one for one in (output if isinstance(output, list | tuple) else (output,)) if hasattr(one, "shape")]
    alike = [one for one in tensors[1:2] if one.shape == tensors[0].shape and one.dtype == tensors[0].dtype]
    return [(array := to_numpy(one)).reshape(-1, array.shape[-1]) for one in (*tensors[:1], *alike)]


def _digests(parts: list[NDArray[Any]]) -> NDArray[np.uint8]:
    """The first half of the SHA-256 of each position's bytes, uint8 (positions, WIDTH)."""
    rows = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=1)
    found = b"".join(hashlib.sha256(row.data).digest()[:WIDTH] for row in rows)
    return np.frombuffer(found, np.uint8).reshape(len(rows), WIDTH)


def _check_rows(name: str, counts: list[int], prompt_length: int, steps: int) -> None:
    """The prompt in one call or several, and then each generated token but the last in a call of its own."""
    prompt, generated = counts[: len(counts) - steps + 1], counts[len(counts) - steps + 1 :]
    if len(counts) < steps or sum(prompt) != prompt_length or generated != [1] * (steps - 1):
        raise CaptureError(
            f"{name} saw {len(counts)} calls of {sum(counts)} rows, the request has {prompt_length} and {steps - 1} of one row"
        )


class Recorded:
    """The hidden states of an engine lifetime. What goes wrong with them is written down, and costs nothing else.

    A plan to re-execute claims projects the requests that it is made of; another one repeats its prompts for digests
    (`repeat`) and projects its claims. A plan that does not ask for hidden states sets no hook.
    """

    def __init__(self, model: Any, plan: Plan) -> None:
        self._model, self._plan = model, plan
        self._wanted = plan.hidden_states
        self._verifies = plan.identity.get("role") == "verify"
        self._tap: HiddenStateTap | None = None
        self._problem = ""
        self._seconds = 0.0
        if self._wanted and self._verifies:
            self._watch(projecting=True)

    def repeat(self, run: Callable[[Plan], object], seconds: float = 0.0) -> None:
        """`run` every prompt once more, each repeat of one before the next; what comes then are claims.

        `seconds`: what the repeats of the logits took. Where that is more than `BUDGET_S`, fewer repeats, at least two.
        """
        if not self._wanted or self._verifies:
            return
        began = time.monotonic()
        self._watch(projecting=False)
        if self._tap is not None:
            # Logprobs are only asked for so that the engine computes every logit: one is enough, and quicker.
            repeats = self._plan.least_repeats or self._plan.repeats
            repeats = max(2, min(repeats, int(repeats * BUDGET_S / seconds))) if seconds > BUDGET_S else repeats
            try:
                run(replace(self._plan, repeats=repeats, top_k=1))
            except Exception as error:  # the logits have been measured
                self._drop(f"{type(error).__name__}: {error}")
        self._seconds = time.monotonic() - began
        if self._tap is not None:
            self._tap.projecting = True

    def result(self, prompts: int) -> HiddenStates | None:
        """What goes into the observation of so many prompts, None where nothing was asked for; the hooks are gone then."""
        if not self._wanted:
            return None
        tap = self._tap
        if tap is None:
            return HiddenStates(HiddenStatesTaken(problem=self._problem))
        tap.remove()
        repeats = len(tap.outcomes) // prompts
        found = [_collapsed(tap.outcomes[p * repeats : (p + 1) * repeats]) for p in range(prompts if repeats else 0)]
        projected = {"projection": projection.NAME, "projected": tap.kept} if tap.fingerprints else {}
        header = HiddenStatesTaken(
            layers=tuple(name for name, _ in tap.modules), stream=tap.stream, width=tap.width, repeats=repeats,
            runs=tuple(runs for runs, _ in found), seconds=self._seconds, **projected,
        )  # fmt: skip
        fingerprints = tuple(rows if self._verifies else rows[:, length - 1 :] for rows, length in tap.fingerprints)
        return HiddenStates(header, tuple(outcomes for _, outcomes in found), fingerprints)

    def start(self) -> None:
        """A request begins."""
        if self._tap is not None:
            self._tap.start()

    def finish(self, prompt_length: int, decode: NDArray[Any], prefill: NDArray[Any]) -> None:
        """The request is over; see `HiddenStateTap.finish`."""
        if self._tap is None:
            return
        try:
            self._tap.finish(prompt_length, decode, prefill)
        except CaptureError as error:
            self._drop(str(error))

    def _drop(self, problem: str) -> None:
        """Hidden states cannot be had; nothing else is to suffer from it."""
        if self._tap is not None:
            self._tap.remove()
        self._tap, self._problem = None, problem

    def _watch(self, *, projecting: bool) -> None:
        try:
            self._tap = HiddenStateTap(self._model)
        except CaptureError as error:
            self._problem = str(error)
            return
        self._tap.projecting = projecting


def _collapsed(outcomes: list[Outcome]) -> tuple[dict[Phase, tuple[int, ...]], dict[Phase, tuple[NDArray[np.uint8], ...]]]:
    """The repeats of one prompt: which outcome each gave in either phase, and the distinct outcomes."""
    runs = {phase: distinct([one[phase].tobytes() for one in outcomes]) for phase in PHASES}
    unique = {phase: tuple(outcomes[groups.index(g)][phase] for g in range(max(groups) + 1)) for phase, groups in runs.items()}
    return {phase: tuple(groups) for phase, groups in runs.items()}, unique
