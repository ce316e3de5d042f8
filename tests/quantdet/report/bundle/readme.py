"""The words of a bug bundle: its README in the form of a bug report, and the JSON beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantdet.judging.first_layer import Diagnosis
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import OTHER_ENGINES, Cell
from quantdet.observations.header import Executed
from quantdet.report.bundle.repro import Request, device
from quantdet.report.bundle.weights import Weights
from quantdet.untrusted import in_markdown

_VERSIONS = (
    "vllm", "vllm_flavour", "torch", "torch_package", "cuda", "driver", "device", "gpu", "compute_capability", "cpu",
    "cpu_capability", "torch_threads", "python", "transformers", "compressed-tensors", "flashinfer-python", "triton",
)  # fmt: skip


@dataclass(frozen=True)
class About:
    """All that the words are made from. `identity`: the header's fields, or the plan's where nothing was observed."""

    cell: Cell
    cases: Mapping[str, Judgement]
    environment: Mapping[str, Any]
    identity: Mapping[str, Any]
    inject: str
    executed: Executed | None
    requested: str
    diagnosis: Diagnosis | None
    divergences: Sequence[Mapping[str, Any]]
    replayed: bool
    request: Request | None
    observations: Sequence[str] = ()
    weights: Weights = field(default_factory=lambda: Weights(None, ""))

    @property
    def noisy(self) -> bool:
        return any(case.verdict is Verdict.NOISY for case in self.cases.values())

    @property
    def title(self) -> str:
        """One line, as the title of an issue."""
        engine = "transformers" if self.identity.get("engine") == "transformers" else "vllm"
        version = f"{'vLLM' if engine == 'vllm' else engine} {self.environment.get(engine) or '?'}"
        where = f"({self.cell}; {device(self.environment)}, {version})"
        if self.noisy:
            layer = self.diagnosis.layer if self.diagnosis is not None else None
            what = (layer.kernel or layer.module) if layer is not None and self.diagnosis.status == "found" else self._kernel  # type: ignore[union-attr]
            between = self.request is not None and self.request.lifetimes > 1
            given = "logprobs" if self.identity.get("evidence") == "reported" else "logits"
            if between and self.executed is not None and self.executed.mode == "compiled":
                # The kernel is not what differs: each process compiles, or loads, the code around it.
                return f"another process of a compiled engine gives other {given} for the same request {where}"
            return (
                f"{what}: the same request gives other {given} {'in another process' if between else 'when repeated'} {where}"
            )
        return f"{self._kernel}: {next(iter(self.cases.values())).why or 'invalid result'} {where}"

    @property
    def _kernel(self) -> str:
        if self.executed is None:
            return f"kernel {self.requested}"
        return (
            " + ".join(dict.fromkeys(layer.executed for layer in (*self.executed.linear, *self.executed.moe)))
            or "no linear layer"
        )

    @property
    def note(self) -> str:
        """What the script's reader has to know first; empty if nothing."""
        if self.inject:
            return f"THE DEFECT WAS SEEDED (QUANTDET_INJECT={self.inject}) and is not in this script: it has to exit with 0."
        return "README.md beside it says what was seen."

    @property
    def kernels(self) -> dict[str, Any]:
        """For `kernels.json`: what executed, by kind of layer."""
        found: dict[str, Any] = {"requested": self.requested, "summary": "", "layers": [], "attention": []}
        if self.executed is not None:
            found |= {"summary": self.executed.summary, **self.executed.model_dump(mode="json")}
        return found

    @property
    def divergence(self) -> dict[str, Any]:
        """For `divergence.json`: verdicts with their figures, and where what differs first."""
        cases = {
            name: {
                "verdict": str(case.verdict), "message": case.message, "detail": case.detail,
                "expected": case.expected, "figures": {key: str(value) for key, value in case.figures.items()},
            }
            for name, case in self.cases.items()
        }  # fmt: skip
        nonfinite = self.identity.get("nonfinite", [])
        return {"cases": cases, "divergences": list(self.divergences), "nonfinite": nonfinite, "inject": self.inject}


def text(about: About) -> str:
    """README.md."""
    parts = [f"# [Bug]: {_told(about.title)}", *_warning(about), *_summary(about)]
    parts += ["## Expected", _expected(about), "## Observed", *_observed(about)]
    if about.diagnosis is not None:
        parts += [
            "## First divergent layer",
            *_layer(about.diagnosis, about.executed.tensor_parallel_size if about.executed is not None else 1),
        ]
    parts += ["## Executed kernels", _kernels(about), "## Environment", _environment(about)]
    parts += [
        "## How to run",
        *_run(about),
        "## Weights",
        f"The checkpoint: {about.weights.sentence}",
        "## Files",
        _files(about),
    ]
    return "\n\n".join(parts) + "\n"


def _warning(about: About) -> list[str]:
    if not about.inject:
        return []
    return [f"**The defect was seeded by the suite (`QUANTDET_INJECT={about.inject}:...`). This is no bug of the engine.**"]


def _summary(about: About) -> list[str]:
    origin = "Written from a recording, without an engine." if about.replayed else "Written while it was measured."
    return [f"{origin} Cell `{about.cell}` (model / quantization format / hardware), found by quantdet, `{_case(about)}`."]


def _case(about: About) -> str:
    return ", ".join(about.cases)


def _expected(about: About) -> str:
    if not about.noisy:
        return "A measurement that can be judged: finite logits from the requested kernel in every layer."
    known = {str(case.figures.get("expectation", "")) for case in about.cases.values()} - {"", "bit-exact"}
    rest = f" The suite's matrix says of this cell: {'; '.join(sorted(known))}." if known else ""
    return (
        "The same request (one sequence, the same token ids, greedy, prefix caching off) gives the same full-vocabulary "
        f"logits, bit for bit.{rest}"
    )


def _observed(about: About) -> list[str]:
    parts = ["```text\n" + "\n".join(case.text for case in about.cases.values()) + "\n```"]
    if about.divergences:
        lines = ["| prompt | phase | position | repeat | token | ULP | max \\|d\\| | unequal logits | top-1/top-2 margin |"]
        lines.append("|---|---|---|---|---|---|---|---|---|")
        for row in about.divergences:
            repeat = f"{row['repeat']}" + (f" of lifetime {row['lifetime']}" if "lifetime" in row else "")
            ulp = f"{row['ulp']} of {row['dtype']}" if "ulp" in row else ""
            gap = f"{row['max_abs']:.3g}" if "max_abs" in row else ""
            margin = "" if row["margin_nats"] is None else f"{row['margin_nats']:.3g} nats"
            prompt = _told(row["prompt"])
            lines.append(
                f"| {prompt} | {row['phase']} | {row['position']} | {repeat} | {row.get('token', '')} | {ulp} | {gap} | "
                f"{row.get('differing_logits', '')} | {margin} |"
            )
        parts += ["First differing position of each prompt and phase:", "\n".join(lines)]
    return parts


def _layer(diagnosis: Diagnosis, ranks: int) -> list[str]:
    parts = [f"{diagnosis.sentence}."]
    if diagnosis.status == "found":
        parts.append(
            f"In prompt {_told(diagnosis.prompt)}, every layer that ran before it took and gave the same bits as in repeat 0; "
            "its own inputs are the same too, and its outputs differ. Traced with forward hooks in another engine "
            "(`layers.json`)."
        )
        if ranks > 1:
            parts.append(
                f"Traced in rank 0 of {ranks}: what differs there may come from another rank, whose part is added here."
            )
    if diagnosis.first_in:
        counts = ", ".join(f"`{name}` {count}" for name, count in diagnosis.first_in.items())
        parts.append(f"Where each differing repeat first differs: {counts}.")
    return parts


def _kernels(about: About) -> str:
    if about.executed is None:
        return f"Not known (requested: {about.requested}); nothing was measured."
    lines = [f"Requested: `{about.requested}`. Read from the layers of the loaded model:", ""]
    lines += ["| kind | layer | method | scheme | kernel | detail | layers |", "|---|---|---|---|---|---|---|"]
    for layer in about.executed.layers:
        row = (layer.kind, layer.module, layer.method, layer.scheme, layer.kernel, layer.detail, str(layer.count))
        lines.append(f"| {' | '.join(map(_told, row))} |")
    size = about.executed.tensor_parallel_size
    ranks = f"tensor parallel over {size} ranks (the layers are those of rank 0), " if size > 1 else ""
    mode = f"{about.executed.mode}, model runner {about.executed.runner or '?'}, logits {about.executed.logits_dtype or '?'}"
    return "\n".join([*lines, "", f"Attention: {_told(', '.join(about.executed.attention)) or '?'}; {ranks}{_told(mode)}."])


def _environment(about: About) -> str:
    rows = [(name, str(about.environment[name])) for name in _VERSIONS if about.environment.get(name)]
    lines = ["| | |", "|---|---|", *(f"| {name} | {_told(value)} |" for name, value in rows)]
    return "\n".join([*lines, "", "All of it is in `environment.json`."])


def _run(about: About) -> list[str]:
    if about.request is None and about.identity.get("engine") in OTHER_ENGINES:
        return ["There is no script: those are for vLLM. The request is in `observations/`."]
    if about.request is None:
        return ["There is no script: the request is not known (nothing was measured, or only reported logprobs are at hand)."]
    request = about.request
    what = f"prompt {_told(request.prompt)}, {len(request.ids)} token ids, {request.decode_tokens} tokens generated"
    parts = [
        f"```sh\npython repro.py{'' if about.weights.model is not None else ' --model FOLDER'}\n```",
        f"It needs vllm, torch, numpy and safetensors, gives {what}, and prints a digest of all logits per repeat, where one "
        "first differs, and the kernels. Exit code: 0 no repeat differs, 1 some do, 2 it could not run. `--repeats N` repeats "
        "more often; `--lifetimes N` compares engine processes.",
    ]
    if about.inject:
        parts.append("The seeded defect is not in it: it has to exit with 0.")
    elif not about.noisy:
        parts.append("It shows the request and the kernels; whether repeats differ is not what this report is about.")
    return parts


def _traced(diagnosis: Diagnosis | None) -> str:
    if diagnosis is None:
        return ""
    return (
        "why no layer was traced" if diagnosis.status == "not possible" else "digests of what every traced layer took and gave"
    )


def _files(about: About) -> str:
    rows = {
        "repro.py": "the script" if about.request is not None else "",
        "environment.json": "versions, device, variables",
        "kernels.json": "what executed, by kind of layer",
        "divergence.json": "verdicts with all figures; first differing positions",
        "layers.json": _traced(about.diagnosis),
        "observations/": "what was measured: `pytest --replay=observations` in the suite judges it again"
        if about.observations
        else "",
    }
    return "\n".join(f"- `{name}`: {what}" for name, what in rows.items() if what)


def _told(text: str) -> str:
    """What a recording or an engine says. An underscore within a name means nothing to Markdown, and names have many."""
    return in_markdown(text, keep="_{}#")
