"""Traces of a model that is not there: two layers, and a difference where a behaviour of the fake engine puts it."""

import hashlib
from typing import Any

from quantdet.engines.plan import Plan
from quantdet.observations.trace import Trace, TracedModule

MODULES = (
    ("embed", "VocabParallelEmbedding", "embedding", ""),
    ("layers.0.qkv", "QKVParallelLinear", "linear", "Fake4Kernel"),
    ("layers.0.attn", "Attention", "attention", "FAKE_ATTENTION"),
    ("layers.1.down", "RowParallelLinear", "linear", "Fake4Kernel"),
    ("logits", "LogitsProcessor", "logits", ""),
)
NAMES = [name for name, *_ in MODULES]


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def rows(calls: int = 3, defects: tuple[tuple[int, str], ...] = ()) -> list[tuple[int, int, str, str]]:
    """One repeat: every module in every forward call; each (call, module) in `defects` changes all from its outputs on."""
    found, state = [], "start"
    for call in range(calls):
        for number, name in enumerate(NAMES):
            given = digest(state)
            state = digest(state, call, number, (call, name) in defects)
            found.append((call, number, given, digest(state)))
    return found


def trace(*repeats: list[tuple[int, int, str, str]], **more: Any) -> Trace:
    modules = tuple(TracedModule(name=name, module=module, kind=kind, kernel=kernel) for name, module, kind, kernel in MODULES)
    return Trace(schema=1, prompt="p0", modules=modules, repeats=tuple(map(tuple, repeats)), **more)


def traced(plan: Plan, behaviour: str) -> Trace:
    """What the fake engine traces: noise of a behaviour, or of the seeded defect; `flip_prefill` shows in no layer."""
    repeats = []
    for repeat in range(plan.repeats):
        last = repeat == plan.repeats - 1
        defects: tuple[tuple[int, str], ...] = ()
        if plan.inject == "noise" and last:
            defects = ((1, "layers.1.down"),)
        elif behaviour == "flip_decode" and last:
            defects = ((2, "layers.0.qkv"),)
        elif behaviour == "noise" and repeat:
            defects = ((0, "layers.0.qkv"), (1, "layers.1.down")) if repeat % 2 else ((1, "layers.1.down"),)
        elif behaviour == "restart_noise" and plan.identity["lifetime"]:
            defects = ((0, "layers.0.attn"),)
        repeats.append(rows(plan.decode_tokens, defects))
    return trace(*repeats).model_copy(update={"prompt": plan.prompts[0].id})
