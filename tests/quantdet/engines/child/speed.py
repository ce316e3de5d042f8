"""Tokens per second of decode and of prefill, apart, from calls that nothing is captured of.

Beside determinism, and after everything that a verdict rests on: the same engine, one sequence at a time (batch 1), greedy,
without logprobs. A figure to set formats of one run side by side by; no serving benchmark.
"""

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

from quantdet.engines.plan import Plan

ROUNDS = 3
BUDGET_S = 1.0


class Generate(Protocol):
    """One call of the engine; returns when the last token is there.

    Greedy, exactly `n_tokens` tokens, no logprobs; nothing of an earlier call is reused (no prefix cache).
    """

    def __call__(self, ids: Sequence[int], n_tokens: int, /) -> None: ...


def timings(
    plan: Plan, generate: Generate, ids: Sequence[int], *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """`measure` for `Header.timings`, in the lifetime that a cell's figures are of; empty in every other.

    Those are: controls, re-executions, later lifetimes. An engine that fails here has been measured: the log says why there
    is no figure.
    """
    if plan.identity.get("role", "measure") != "measure" or plan.identity.get("lifetime", 0):
        return {}
    try:
        return measure(generate, ids, plan.decode_tokens, clock=clock)
    except Exception:
        traceback.print_exc()
        return {}


def measure(
    generate: Generate, ids: Sequence[int], decode_tokens: int, *, budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:  # fmt: skip
    """Medians over `ROUNDS` rounds of two calls, one of 1 token and one of 1 + n, after a call to warm up.

    Args:
        generate: see `Generate`.
        ids: the prompt.
        decode_tokens: the most tokens that a call may be asked for.
        budget_s: seconds for all calls but the first; where they take longer, n is smaller, and then rounds are fewer. One
            round of n = 1 is always made.
        clock: seconds.

    Returns:
        prefill_tokens_per_second: prompt tokens / time of a call for 1 token (time to first token), left out where the
            clock did not move;
        decode_tokens_per_second: n / (time of a call for 1 + n tokens - that of a call for 1), left out where n is 0 or the
            difference of the medians is not above 0; speed_prompt_tokens; speed_decode_steps: n; speed_rounds; speed_s: all.
    """

    def seconds(n_tokens: int) -> float:
        began = clock()
        generate(ids, n_tokens)
        return clock() - began

    began = clock()
    most = max(0, decode_tokens - 1)
    generate(ids, min(decode_tokens, 2))  # without logprobs the engine may use kernels that it has not yet compiled
    end = clock() + budget_s
    ones, others = [seconds(1)], [seconds(2)] if most else []
    steps = _steps(ones[0], sum(others), most, budget_s)
    if steps > 1:
        ones, others = [], []
    while len(ones) < ROUNDS and not (ones and clock() + ones[-1] + sum(others[-1:]) > end):
        ones.append(seconds(1))
        others += [seconds(1 + steps)] if steps else []
    first = statistics.median(ones)
    found = {
        **({"prefill_tokens_per_second": len(ids) / first} if first > 0 else {}),
        "speed_prompt_tokens": float(len(ids)), "speed_decode_steps": float(steps), "speed_rounds": float(len(ones)),
        "speed_s": clock() - began,
    }  # fmt: skip
    decoding = statistics.median(others) - first if others else 0.0
    if decoding > 0:
        found["decode_tokens_per_second"] = steps / decoding
    return found


def _steps(one: float, two: float, most: int, budget_s: float) -> int:
    """How many decode steps a call may have so that all rounds fit into what the first one left of the budget."""
    if most == 0:
        return 0
    step = max(two - one, two / 10)  # a single difference may be small, or below 0, by chance
    left = (budget_s - one - two) / ROUNDS - 2 * one
    return max(1, min(most, int(left / step)))
