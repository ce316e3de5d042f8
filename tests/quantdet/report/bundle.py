"""Bug bundles: for every NOISY or INVALID cell one folder that the maintainers of an engine can work with."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from quantdet import tracing
from quantdet.diagnosis import Diagnosis, Trace
from quantdet.observation import Observation
from quantdet.schema import Cell
from quantdet.verdicts import Judgement, Verdict

if TYPE_CHECKING:
    from quantdet.session import Session


def added(session: "Session", item: pytest.Item, judgement: Judgement, observations: Sequence[Observation]) -> Judgement:
    """Put a case's judgement into its cell's bundle, if it belongs there; the judgement with what the diagnosis found."""
    folder = session.options.report
    if folder is None or judgement.verdict not in (Verdict.NOISY, Verdict.INVALID) or not observations:
        return judgement
    cell = observations[0].cell
    prompt = noisy_prompt(observations) if judgement.verdict is Verdict.NOISY else None
    if prompt is not None:
        trace, diagnosis = session_diagnosis(session, cell, prompt)
        place = folder / "bundles" / f"{cell.id.replace('/', '.')}"
        place.mkdir(parents=True, exist_ok=True)
        found = {"diagnosis": diagnosis.model_dump(), "trace": trace.model_dump(by_alias=True) if trace else None}
        (place / "layers.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
        figures = {**judgement.figures, "first_divergent_layer": diagnosis.sentence}
        detail = f"{judgement.detail}\nfirst divergent layer: {diagnosis.sentence}".lstrip()
        judgement = replace(judgement, figures=figures, detail=detail)
    return judgement


def noisy_prompt(observations: Sequence[Observation]) -> str | None:
    """The first prompt of which some repeat differs within its lifetime."""
    for number, record in enumerate(observations[0].prompts):
        if any(len(set(one.prompts[number].header.runs)) > 1 for one in observations):
            return record.header.id
    return None


_known: dict[tuple[int, Cell, str], tuple[Trace | None, Diagnosis]] = {}


def session_diagnosis(session: "Session", cell: Cell, prompt: str) -> tuple[Trace | None, Diagnosis]:
    key = (id(session), cell, prompt)
    if key not in _known:
        _known[key] = tracing.trace(session, cell, prompt)
    return _known[key]
