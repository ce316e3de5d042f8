"""Re-execution of claims by a format that runs here: the requests, and where each claim's tokens are among them."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from quantdet.engines.plan import Plan
from quantdet.matrix.workload import Prompt, Workload
from quantdet.observations.observation import Observation

ROLE = "verify"


@dataclass(frozen=True)
class Sequences:
    """The distinct token sequences (prompt and generated ids) of some claims, as one workload of single prefills."""

    workload: Workload
    index: dict[tuple[int, ...], int]
    top_k: int
    activations: bool = False  # whether some claim carries fingerprints of its hidden states

    @classmethod
    def of(cls, claims: Iterable[Observation]) -> "Sequences":
        """Sequences in the order in which the claims bring them."""
        index: dict[tuple[int, ...], int] = {}
        starts: dict[tuple[int, ...], int] = {}
        top_k, activations = 2, False
        for claim in claims:
            activations |= claim.hidden is not None and bool(claim.hidden.fingerprints)
            top_k = max(top_k, claim.header.claim_top_k)
            for c in range(len(claim.claims)):
                ids = sequence(claim, c)
                index.setdefault(ids, len(index))
                starts.setdefault(ids, claim.claims[c].header.content_start)
        prompts = tuple(Prompt(f"s{n}", ids[:-1], ids[-1:], starts[ids], None, None) for ids, n in index.items())
        digest = hashlib.sha256()
        for ids in index:
            digest.update(np.asarray([len(ids), *ids], "<i4").tobytes())
        return cls(Workload("reexecution", digest.hexdigest(), prompts), index, top_k, activations)


def sequence(claim: Observation, c: int) -> tuple[int, ...]:
    """Prompt and generated ids of a claim's request `c`, as they are prefilled by the verifier."""
    record = claim.claims[c]
    return (*map(int, record.prompt_ids), *map(int, record.outputs[0].output_ids))


def verifying(plan: Plan, dtype: str, top_k: int, *, activations: bool = False) -> Plan:
    """`plan` in `dtype`, but every request once and for its prefill; the one token that is generated is not looked at.

    `activations`: with fingerprints of the hidden states, in an eager cell.
    """
    changes = {"repeats": 1, "decode_tokens": 1, "top_k": top_k, "role": ROLE, "dtype": dtype}
    args = {**plan.args, "max_logprobs": max(top_k, int(plan.args.get("max_logprobs", 0)))}
    identity = {**plan.identity, **changes, "engine_args": args}
    identity.pop("max_flip_rate", None)  # decides repeats, of which there are none here
    extra = {name: value for name, value in plan.extra.items() if name not in ("least_repeats", "activations")}
    if activations and plan.args.get("enforce_eager"):
        extra["activations"] = True
    return replace(
        plan, identity=identity, args=args, dtype=dtype, repeats=1, decode_tokens=1, top_k=top_k, claims=(), extra=extra
    )
