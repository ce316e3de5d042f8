"""Bug bundles: for every NOISY or INVALID cell one folder that the maintainers of an engine can work with.

`DIR/bundles/MODEL.FORMAT.HARDWARE/` is written whole, aside, and renamed: a folder of an earlier run is replaced when its
cell is judged again, whatever the verdict, and never mixed with a new one.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quantdet import __version__, checkpoints
from quantdet.engines.plan import Plan
from quantdet.judging.first_layer import Diagnosis
from quantdet.judging.questions import Asked
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import Cell
from quantdet.matrix.shapes import Synthetic, layers_of
from quantdet.observations import store
from quantdet.observations.claims import Claim
from quantdet.observations.observation import Observation
from quantdet.observations.trace import Trace
from quantdet.report import record
from quantdet.report.bundle import differences, readme, repro, weights
from quantdet.session import tracing
from quantdet.session.machine.environment import git_revision
from quantdet.session.plans import known_arguments
from quantdet.untrusted import in_markdown

if TYPE_CHECKING:
    from quantdet.session.session import Session

BUNDLES = "bundles"
# A replay builds weights for a bundle only where that is quick.
_QUICK_BYTES = 256 << 20


@dataclass
class Bundle:
    """What is known of one cell so far."""

    cases: dict[str, Judgement] = field(default_factory=dict)
    observations: tuple[Observation, ...] = ()
    prompt: str | None = None
    lifetimes: int = 1
    trace: Trace | None = None
    diagnosis: Diagnosis | None = None


_KNOWN = pytest.StashKey[dict[Cell, Bundle]]()


def added(session: "Session", item: pytest.Item, judgement: Judgement, observations: Sequence[Observation]) -> Judgement:
    """Put a case's judgement into its cell's bundle if it belongs there; the judgement, with what the bundle adds to it."""
    folder, cell = session.options.report, record.cell_of(item)
    name = getattr(item, "originalname", item.name)
    seeded = item.get_closest_marker("control") is not None  # what is found there was put there
    apart = isinstance(cell, Claim | Asked) or name in ("test_versions", "test_hidden_states")
    if folder is None or cell is None or apart or seeded:
        return judgement
    known = item.config.stash.setdefault(_KNOWN, {})
    place = folder / BUNDLES / cell.id.replace("/", ".")
    if cell not in known:
        known[cell] = Bundle()
        shutil.rmtree(place, ignore_errors=True)
    if judgement.verdict not in (Verdict.NOISY, Verdict.INVALID):
        return judgement
    bundle = known[cell]
    measured = tuple(one for one in observations if one.header.kind == "observation")
    bundle.observations = bundle.observations or measured
    figures: dict[str, Any] = {"bundle": f"{BUNDLES}/{place.name}"}
    if judgement.verdict is Verdict.NOISY and measured:
        _diagnose(session, cell, bundle)
        assert bundle.diagnosis is not None
        figures["first_divergent_layer"] = bundle.diagnosis.sentence
        detail = f"{judgement.detail}\nfirst divergent layer: {bundle.diagnosis.sentence}".lstrip()
        judgement = replace(judgement, detail=detail)
    judgement = replace(judgement, figures={**judgement.figures, **figures})
    bundle.cases[item.name] = judgement
    write(session, cell, bundle, place, git_revision(item.config.rootpath))
    return judgement


def _diagnose(session: "Session", cell: Cell, bundle: Bundle) -> None:
    if bundle.diagnosis is not None:
        return
    bundle.prompt, bundle.lifetimes = differences.where(bundle.observations)
    if bundle.prompt is not None:
        bundle.trace, bundle.diagnosis = tracing.trace(session, cell, bundle.prompt, bundle.lifetimes)


def write(session: "Session", cell: Cell, bundle: Bundle, place: Path, revision: str) -> None:
    """Write the whole folder and put it into its place."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        temporary.chmod(0o755)
        _fill(session, cell, bundle, temporary, revision)
        shutil.rmtree(place, ignore_errors=True)
        temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(session: "Session", cell: Cell, bundle: Bundle, folder: Path, revision: str) -> None:
    evidence = differences.involved(bundle.observations, bundle.lifetimes)
    plan: Plan | None = None
    if not evidence:
        plan = session.evidence.plan(cell)
    request = None
    vllm = session.matrix.engine_of(cell) == "vllm"  # the script drives it
    if evidence:
        header = evidence[0].header
        prompt = bundle.prompt or differences.nonfinite(evidence) or header.prompts[0].id
        environment, identity = dict(header.environment), header.model_dump(mode="json")
        if vllm and not evidence[0].reported:
            request = repro.Request.observed(evidence, prompt, bundle.lifetimes)
    else:
        environment = session.evidence.environment(cell.hardware_id)
        identity = dict(plan.identity) if plan is not None else {}
        request = repro.Request.planned(plan) if vllm and plan is not None else None
    about = readme.About(
        cell=cell, cases=bundle.cases, environment=environment, identity=identity, inject=str(identity.get("inject") or ""),
        executed=evidence[0].header.executed if evidence else None,
        requested=session.matrix.formats[cell.format_id].kernel, diagnosis=bundle.diagnosis,
        divergences=differences.found(evidence, bundle.lifetimes) if bundle.diagnosis is not None else (),
        replayed=session.evidence.replayed, request=request,
        observations=tuple(f"observations/{'/'.join(one.path.parts[-5:])}" for one in evidence if one.path is not None),
    )  # fmt: skip
    for one in evidence:
        if one.path is not None:
            store.copy_into(one, folder / "observations")
    about = replace(about, weights=_weights(session, cell, identity, folder))
    if request is not None:
        text = repro.script(
            request, title=about.title, note=about.note, model=about.weights.model, made=(folder / "weights.json").exists(),
            hides=session.matrix.hardware[cell.hardware_id].hides, known=known_arguments(session.matrix),
        )  # fmt: skip
        (folder / "repro.py").write_text(text, encoding="utf-8")
    suite = {"suite": __version__, "suite_revision": revision, "created": identity.get("created", "")}
    _json(folder / "environment.json", {**environment, **suite})
    _json(folder / "kernels.json", about.kernels)
    _json(folder / "divergence.json", about.divergence)
    if bundle.diagnosis is not None:
        trace = bundle.trace.model_dump(mode="json", by_alias=True) if bundle.trace is not None else None
        layers = {"first_divergent_layer": bundle.diagnosis.sentence, "diagnosis": bundle.diagnosis.model_dump(mode="json")}
        (folder / "layers.json").write_text(json.dumps({**layers, "trace": trace}) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme.text(about), encoding="utf-8")


def _weights(session: "Session", cell: Cell, identity: Mapping[str, Any], folder: Path) -> weights.Weights:
    model, sha256 = session.matrix.models[cell.model_id], str(identity.get("checkpoint_sha256", ""))
    why = "not in the bundle"
    if session.evidence.replayed and (model.synthetic is None or _bytes(model.synthetic) > _QUICK_BYTES):
        why = "not in the bundle, which was written from a recording"
    else:
        try:
            checkpoint = session.measuring.weights(cell.model_id, cell.format_id)
        except (checkpoints.Unavailable, OSError, ValueError) as error:
            why = f"not in the bundle: {error}"
        else:
            if not sha256 or checkpoint.sha256 == sha256:
                return weights.place(model, session.matrix.formats[cell.format_id], checkpoint, folder)
            why = "not in the bundle: this suite makes other ones under this name now"
    source = f"{in_markdown(str(identity.get('checkpoint_source') or '?'), keep='_')}, tensors' SHA-256 `{sha256}`"
    return weights.Weights(None, f"{why} ({source}). The suite makes or fetches it.")


def _bytes(spec: Synthetic) -> int:
    """About the size of a generated model in 16 bits."""
    layer = sum(one.n * one.k * max(1, one.experts) for one in layers_of(spec))
    return 2 * (spec.layers * layer + 2 * spec.vocab_size * spec.hidden_size)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
