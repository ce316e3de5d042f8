"""Which cases are collected, in which order, with which marks: from the matrix, before any engine starts."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from quantdet.judging.questions import Asked
from quantdet.judging.results import Lack
from quantdet.judging.verdicts import Divergence, Verdict
from quantdet.matrix.cell import PHASES, Cell
from quantdet.matrix.expectations import Expectations, describe
from quantdet.observations.claims import Claim, check
from quantdet.observations.observation import ObservationError
from quantdet.report import absent_hardware
from quantdet.report.record import DECLARED_SKIP, cell_of, place_of
from quantdet.session import questions, reexecution
from quantdet.session.controls import Controls
from quantdet.session.session import Session
from quantdet.untrusted import plain

REQUIRED = pytest.StashKey[str]()
AS_DECLARED = "as declared, see test_refusal:"  # how such a skip goes on after its verdict


MARKERS = (
    "cpu: the case needs a CPU backend",
    "cuda: the case needs an NVIDIA GPU",
    "rocm: the case needs an AMD GPU",
    "native_fp8: the format multiplies FP8; skipped on a GPU without native FP8 (below compute capability 8.9)",
    "native_fp4: the format multiplies FP4; skipped on a GPU without native FP4 (below compute capability 10.0)",
    "multi_gpu: layers are divided over several GPUs (tensor parallelism)",
    "slow: a full-size model",
    "compares_formats: judged after every cell of its model has been measured",
    "declared_unsupported: collected for the cells that the matrix declares unsupported",
    "control(name): one case per hardware that is here, and engine: a seeded defect is found, or what is the same is the same",
    "hidden_states: collected for the cells whose hidden states are taken, or were recorded",
    "several_lifetimes: collected when cells have more than one engine lifetime",
    "several_versions: collected when --replay holds recordings of more than one vLLM version",
)


def parametrize(metafunc: pytest.Metafunc, session: Session, controls: Controls) -> None:
    """Give `cell` (and `phase`) their values; `test_refusal` gets the cells that the matrix declares unsupported."""
    if {"claim", "judge"} <= set(metafunc.fixturenames):
        claims = session.references.claims(verifiers(session))
        metafunc.parametrize("claim", claims, ids=[claim.id for claim in claims])
        return
    if {"question", "judge"} <= set(metafunc.fixturenames):
        asked = questions.asked(session)
        metafunc.parametrize("question", asked, ids=[case.id for case in asked])
        return
    if not {"cell", "judge"} <= set(metafunc.fixturenames):
        return
    cells = session.cells()
    if (control := metafunc.definition.get_closest_marker("control")) is not None:
        cells = controls.cells(control.args[0])
    if metafunc.definition.get_closest_marker("declared_unsupported"):
        cells = [cell for cell in cells if session.expectations(cell).unsupported(cell) is not None]
    if metafunc.definition.get_closest_marker("hidden_states"):
        cells = [cell for cell in cells if session.hidden_states(cell)]
    if metafunc.definition.get_closest_marker("several_lifetimes"):
        cells = [cell for cell in cells if session.lifetimes(cell) > 1]
    if metafunc.definition.get_closest_marker("several_versions"):
        known = [cell for cell in cells if cell.vllm and session.matrix.engine_of(cell) == "vllm"]
        cells = list(dict.fromkeys(replace(cell, vllm="") for cell in known))
    if "phase" in metafunc.fixturenames:
        values = [(cell, phase) for cell in cells for phase in PHASES]
        metafunc.parametrize(("cell", "phase"), values, ids=[f"{cell.id}-{phase}" for cell, phase in values])
    else:
        metafunc.parametrize("cell", cells, ids=[cell.id for cell in cells])


def verifiers(session: Session) -> list[str]:
    """Hardware rows on which claims are re-executed: what vLLM runs on here, or what a replay holds."""
    rows = [row for row in session.evidence.verifiers() if row in session.matrix.hardware]
    return [row for row in rows if session.options.hardware in (None, row)]


def prune(items: list[pytest.Item]) -> list[pytest.Item]:
    """Leave out a test without any cell in this run (no second lifetime, nothing declared unsupported).

    pytest would report an empty parameter set as a skip.
    """
    empty = [item for item in items if _empty(item)]
    items[:] = [item for item in items if not _empty(item)]
    return empty


def order(items: list[pytest.Item], session: Session) -> None:
    """Model by model, what is asked first first (`FIRST`); skips last.

    Repeats measure the cells of a model: its pairs, and all that compares, come when everything has been measured. The same
    on every xdist worker. A model's tests stand file by file, since pytest begins a line with each file.
    """
    models, cells = list(session.matrix.models), {cell: index for index, cell in enumerate(session.cells())}

    def rank(item: pytest.Item) -> tuple[int, int, int, int, str, int]:
        cell = cell_of(item)
        if cell is None:
            return (-1, 0, 0, 0, "", 0)
        skipped = item.get_closest_marker("skip") is not None
        late = item.get_closest_marker("compares_formats") is not None
        model = models.index(cell.model_id) if not skipped and cell.model_id in models else 0
        first = place_of(getattr(item, "originalname", item.name))
        return (int(skipped), model, first, int(late), item.nodeid.partition("[")[0], cells.get(cell, 0))

    items.sort(key=rank)


def _empty(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    params = callspec.params if callspec is not None else {}
    given = [params[name] for name in ("cell", "claim", "question") if name in params]
    return bool(given) and not isinstance(given[0], Cell)


def mark(items: Iterable[pytest.Item], session: Session) -> None:
    """Markers for selection (`-m native_fp8`), before deselection."""
    for item in items:
        cell = cell_of(item)
        if cell is None:
            continue
        row, format_ = session.matrix.hardware[cell.hardware_id], session.matrix.formats.get(cell.format_id)
        item.add_marker(row.kind)
        if isinstance(cell, Asked) and session.matrix.models[cell.model_id].slow:
            item.add_marker("slow")
        if isinstance(cell, Claim) or format_ is None:  # what is claimed ran elsewhere
            continue
        if format_.native is not None:
            item.add_marker(f"native_{format_.native}")
        if row.kind != "cpu" and session.matrix.tensor_parallel_size(cell) > 1:
            item.add_marker("multi_gpu")
        if session.matrix.models[cell.model_id].slow:
            item.add_marker("slow")


def settle(items: Iterable[pytest.Item], session: Session) -> None:
    """Skips, strict expectations and case properties; remembers the cells that are going to be measured."""
    selected: set[Cell] = set()
    claimed: list[Claim] = []
    reasons: dict[Cell, str | None] = {}
    for item in items:
        cell = cell_of(item)
        if cell is None:
            continue
        item.user_properties.extend(case_properties(item, cell, session))
        if cell not in reasons:
            reasons[cell] = _reason(cell, session)
        reason = reasons[cell] if item.get_closest_marker("control") is None else None  # `Controls.cells` has asked already
        if reason is not None and session.options.require_hardware == cell.hardware_id:
            item.stash[REQUIRED] = f"{Verdict.UNAVAILABLE} {reason}"
        elif reason is not None:
            if not session.here(cell.hardware_id):
                lacks = f"needs {reason.need}, have {reason.have}" if isinstance(reason, Lack) else str(reason)
                item.stash[absent_hardware.ELSEWHERE] = absent_hardware.Elsewhere(cell.hardware_id, lacks)
            skip(item, Verdict.UNAVAILABLE, reason)
        elif isinstance(cell, Asked):
            selected.update(questions.available(cell, session))
        elif isinstance(cell, Claim):
            try:
                check(session.references.observation(cell), session.matrix.models[cell.model_id])
            except ObservationError as error:  # before any engine starts; nothing of a bad recording is judged
                raise pytest.UsageError(plain(f"--reference: {error}")) from None
            claimed.append(cell)
        elif (row := session.expectations(cell).unsupported(cell)) is not None and not item.get_closest_marker(
            "declared_unsupported"
        ):
            item.stash[DECLARED_SKIP] = True
            skip(item, Verdict.UNSUPPORTED, f"{AS_DECLARED} {row.reason}")
        else:
            selected.add(cell)
            _strict(item, cell, session.expectations(cell))
    session.selected, session.claimed = frozenset(selected), tuple(sorted(claimed))


def _reason(cell: Cell, session: Session) -> str | None:
    """Why a case cannot be judged, by what it is about."""
    match cell:
        case Claim():
            return reexecution.gate(cell, session)
        case Asked():
            return questions.gate(cell, session)
    return session.gate(cell)


def skip(item: pytest.Item, verdict: Verdict, reason: str) -> None:
    """Skip a case, with a verdict of its own and need and have."""
    item.user_properties.append(("verdict", str(verdict)))
    item.add_marker(pytest.mark.skip(reason=f"{verdict} {reason}"))


def _strict(item: pytest.Item, cell: Cell, expectations: Expectations) -> None:
    callspec = getattr(item, "callspec", None)
    phase = callspec.params.get("phase") if callspec is not None else None
    if phase is None:
        return
    row = expectations.noise(cell, phase)
    if row is not None and row.outcome == "noisy":
        # Only this divergence satisfies it; if the known-noisy kernel shows no noise, the test fails.
        item.add_marker(pytest.mark.xfail(raises=Divergence, strict=True, reason=describe(row, "")))


def case_properties(item: pytest.Item, cell: Cell, session: Session) -> list[tuple[str, str]]:
    """The properties that a case has whatever happens to it."""
    properties = [("case.model", cell.model_id), ("case.format", cell.format_id), ("case.hardware", cell.hardware_id)]
    properties.append(("case.engine", session.engine_name(cell)))
    if cell.vllm:
        properties.append(("case.vllm", cell.vllm))
    format_ = session.matrix.formats.get(cell.format_id)
    if format_ is not None:
        properties.append(("kernel.requested", format_.kernel))
    return properties
