"""Engines: a plan in, an observation out. Each runs in a child process of its own (`quantdet.engines.process.process`)."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol


class EngineRefused(Exception):
    """The engine does not take this checkpoint or these arguments here; the message is the engine's own."""


class EngineLacks(Exception):
    """Something that the engine needs for this format is not here (a package, a kernel); the message is the engine's own."""


class InvalidMeasurement(Exception):
    """A precondition of the measurement does not hold; nothing can be said about the cell."""


class NeedsSpawn(Exception):
    """This process cannot run the plan because it was forked; a fresh interpreter can."""


@dataclass(frozen=True)
class PlannedPrompt:
    """One request. Ids, or texts for a model whose checkpoint carries its tokenizer."""

    id: str
    token_ids: tuple[int, ...] = ()
    forced_ids: tuple[int, ...] = ()
    content_start: int = 1
    text: str | None = None
    forced_text: str | None = None


@dataclass(frozen=True)
class Plan:
    """All that an engine lifetime has to do; JSON-able, since it crosses a process boundary.

    `identity` are the header fields that are known before the run (`quantdet.observations.header.Header`).
    `claims` are requests whose generated tokens a recording keeps for re-execution: `claim_tokens` each, `claim_top_k`
    logprobs.
    `spawn`: the process is a fresh interpreter, not a fork of the preloaded server. `cold`: environment variables that name
    folders of compiled kernels, each of which is made empty. `hides`: instruction sets that torch then denies.
    `onednn_fp8` False: torch's own CPU code multiplies FP8. `least_repeats`: repeats that are made even if one differs, where
    `repeats` bounds a flip rate. `hidden_states`: they are taken too. `architecture`: compute capability or gfx name that the
    device has to have. `device`, `packages`: of the transformers engine, "cpu" or "cuda", and what the format needs.
    `unfilled`: of vLLM, globs over parameters of its model that no tensor of a checkpoint has to fill, and why.
    """

    identity: dict[str, Any]
    checkpoint: str
    dtype: str
    args: dict[str, Any]
    env: dict[str, str]
    prompts: tuple[PlannedPrompt, ...]
    repeats: int
    decode_tokens: int
    top_k: int
    inject: str = ""
    claims: tuple[PlannedPrompt, ...] = ()
    claim_tokens: int = 0
    claim_top_k: int = 0
    spawn: bool = False
    cold: tuple[str, ...] = ()
    hides: tuple[str, ...] = ()
    onednn_fp8: bool | None = None
    least_repeats: int | None = None
    hidden_states: bool = False
    architecture: str | None = None
    device: str | None = None
    packages: tuple[str, ...] = ()
    unfilled: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        raw = json.loads(text)
        for name in ("prompts", "claims"):
            raw[name] = tuple(
                PlannedPrompt(**{**p, "token_ids": tuple(p["token_ids"]), "forced_ids": tuple(p["forced_ids"])})
                for p in raw[name]
            )
        return cls(**raw | {name: tuple(raw[name]) for name in ("cold", "hides", "packages")})

    @property
    def claiming(self) -> "Plan":
        """The claims as a plan of their own: each generated once, after everything else."""
        return replace(self, prompts=self.claims, repeats=1, decode_tokens=self.claim_tokens, top_k=self.claim_top_k, inject="")


class Engine(Protocol):
    """What `quantdet.engines.process.process` runs in the child."""

    def measure(self, plan: Plan, directory: Path) -> None:
        """Execute `plan` and write one observation into `directory`.

        Raises:
            EngineRefused: the engine does not take this cell.
        """
