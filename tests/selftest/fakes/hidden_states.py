"""Hidden states of a model that is not there: layers that are numpy, and observations with digests and fingerprints."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdet.engines.plan import Plan
from quantdet.matrix.cell import PHASES, Phase
from quantdet.metrics import fingerprints as projection
from quantdet.observations.header import HiddenStatesTaken
from quantdet.observations.hidden_states import WIDTH, HiddenStates
from quantdet.observations.observation import Observation

LAYERS = ("model.layers.0", "model.layers.1", "model.norm")


# ------------------------------------------------------------------------------------------------------------- modules


class Module:
    """As much of a torch module as the hooks touch; called, it gives what its hooks are told."""

    def __init__(self, **children: Any) -> None:
        self._children = children
        self._hooks: list[Callable[[Any, Any, Any], None]] = []

    def named_children(self) -> list[tuple[str, "Module"]]:
        return list(self._children.items())

    def children(self) -> list["Module"]:
        return list(self._children.values())

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, "Module"]]:
        yield prefix, self
        for name, child in self._children.items():
            yield from child.named_modules(f"{prefix}.{name}".lstrip("."))

    def register_forward_hook(self, hook: Callable[[Any, Any, Any], None]) -> Any:
        self._hooks.append(hook)
        return SimpleNamespace(remove=lambda: self._hooks.remove(hook))

    def __call__(self, output: Any) -> Any:
        for hook in self._hooks:
            hook(self, (), output)
        return output


class ModuleList(Module):
    def __init__(self, *modules: Module) -> None:
        super().__init__(**{str(number): module for number, module in enumerate(modules)})


class RMSNorm(Module):
    pass


def model(layers: int = 2, experts: int = 0) -> Module:
    """Decoder layers with a norm of their own each and, if asked for, more experts than there are layers."""
    each = [Module(input_norm=RMSNorm(), experts=ModuleList(*(Module() for _ in range(experts)))) for _ in range(layers)]
    return Module(
        model=Module(embed=Module(), layers=ModuleList(*each), rotary=Module(), norm=RMSNorm(), logits=Module()),
        lm_head=Module(),
    )


# --------------------------------------------------------------------------------------------------------- observations


def hidden(whole: Observation, *, repeats: int = 3, fingerprints: str = "") -> HiddenStates:
    """Every repeat of every prompt alike; with claims of these numerics, if named."""
    digests = []
    for p, prompt in enumerate(whole.prompts):
        rows = {"prefill": prompt.header.length, "decode": whole.header.decode_tokens - 1}
        digests.append({phase: (digest(f"{p}{phase}", rows[phase]),) for phase in PHASES})
    header = HiddenStatesTaken(
        layers=LAYERS, stream="hidden", width=64, repeats=repeats, seconds=0.5,
        runs=tuple(dict.fromkeys(PHASES, (0,) * repeats) for _ in whole.prompts),
        **({"projection": projection.NAME, "projected": (0, 1)} if fingerprints else {}),
    )  # fmt: skip
    found = tuple(fingerprint(fingerprints, c, whole.header.claim_tokens) for c in range(len(whole.claims)))
    return HiddenStates(header, tuple(digests), found if fingerprints else ())


def digest(name: str, rows: int) -> NDArray[np.uint8]:
    """(layers + 1, rows, WIDTH), the same for the same name."""
    seed = int.from_bytes(name.encode(), "little") % 2**63
    return np.random.default_rng(seed).integers(0, 256, (len(LAYERS) + 1, rows, WIDTH), dtype=np.uint8)


def fingerprint(numerics: str, prompt: int, rows: int) -> NDArray[np.float16]:
    """(2, rows, DIMS): near to those of other numerics, as formats of one model are."""
    same, own = (np.random.default_rng([prompt, *map(ord, name)]) for name in ("", numerics))
    shape = (2, rows, projection.DIMS)
    return (same.standard_normal(shape) + 0.1 * own.standard_normal(shape)).astype(np.float16) / 4


def differing(whole: Observation, prompt: int, phase: Phase, *places: tuple[int, int]) -> Observation:
    """`whole`, but the last repeat of a prompt has other bits at these (layer, row); layer -1 are the logits."""
    assert whole.hidden is not None
    found = whole.hidden
    changed = found.digests[prompt][phase][0].copy()
    for layer, row in places:
        changed[layer, row, 3] ^= 1
    digests, runs = list(found.digests), list(found.header.runs)
    digests[prompt] = {**digests[prompt], phase: (*digests[prompt][phase], changed)}
    runs[prompt] = {**runs[prompt], phase: (*runs[prompt][phase][:-1], 1)}
    header = found.header.model_copy(update={"runs": tuple(runs)})
    return replace(whole, hidden=HiddenStates(header, tuple(digests), found.fingerprints))


def measured(plan: Plan, whole: Observation, behaviour: str) -> HiddenStates | None:
    """What the fake engine has of hidden states, where the plan asks for them."""
    if not plan.hidden_states:
        return None
    if plan.identity.get("role") == "verify":
        header = HiddenStatesTaken(layers=LAYERS, width=64, projection=projection.NAME, projected=(0, 1))
        numerics = str(plan.args.get("numerics", plan.identity["format"]))
        rows = []
        for prompt in whole.prompts:
            ids = prompt.prompt_ids
            rows.append(np.concatenate([_position(numerics, ids[: n + 1]) for n in range(len(ids))], axis=1))
        return HiddenStates(header, (), tuple(rows))
    if behaviour == "hidden_lost":
        return HiddenStates(HiddenStatesTaken(problem="rows of a layer do not add up"))
    found = hidden(whole, repeats=plan.repeats)
    if whole.claims:
        numerics = str(plan.args.get("numerics", plan.identity["format"]))
        rows = []
        for claim in whole.claims:
            ids = np.concatenate([claim.prompt_ids, claim.outputs[0].output_ids])
            length = claim.header.length
            steps = range(length - 1, length - 1 + whole.header.claim_tokens)
            rows.append(np.concatenate([_position(numerics, ids[: n + 1]) for n in steps], axis=1))
        header = found.header.model_copy(update={"projection": projection.NAME, "projected": (0, 1)})
        found = HiddenStates(header, found.digests, tuple(rows))
    if behaviour == "hidden_noise":
        noisy = differing(replace(whole, hidden=found), 1, "decode", (1, 2), (2, 2), (-1, 2)).hidden
        assert noisy is not None
        return noisy
    return found


def _position(numerics: str, ids: NDArray[np.int32]) -> NDArray[np.float16]:
    """(2, 1, DIMS): of the last of `ids`, which depends on all of them and, a little, on the numerics."""
    return fingerprint(numerics, int(np.dot(ids, np.arange(1, len(ids) + 1)) % 2**31), 1)
