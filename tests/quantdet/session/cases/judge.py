"""The `judge` fixture: gets a cell's result from the session, asks the pure judgements, and lets the verdict stand."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from quantdet.engines.child.stopwatch import PARTS
from quantdet.judging import causes, distinct, hidden_states, kernel, layers, refusal, repeat, reported, restart, versions
from quantdet.judging import controls as control_judgements
from quantdet.judging.questions import Asked, answer
from quantdet.judging.results import Measured, Missing, Refusal
from quantdet.judging.verdicts import Cause, Judgement, Verdict
from quantdet.matrix.cell import Cell, Phase
from quantdet.matrix.rows import ONLINE
from quantdet.observations.claims import Claim
from quantdet.observations.observation import Observation
from quantdet.report import evidence, speed
from quantdet.report.junit_text import text
from quantdet.report.record import DECLARED_SKIP, EVIDENCE, FIGURES, JUDGEMENT
from quantdet.session import bundles, questions, reexecution
from quantdet.session.cases import own_cells
from quantdet.session.controls import Controls, Name, cause_of
from quantdet.session.session import Session

# Every case that ran has these properties, in this order; empty where a figure does not apply.
PROPERTIES = (
    "verdict", "expectation", "runs", "lifetimes", "distinct_outputs", "flip_rate_upper95", "first_divergence",
    "max_abs_diff", "l2", "kernel.executed", "checkpoint.source", "checkpoint.sha256", "workload", "logits.sha256",
    "tokens_per_second", "tokens_per_second.decode", "tokens_per_second.prefill", "tokens_per_second.n",
    "tokens_per_second.baseline", "seconds", "observation",
)  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """Judges one test's cell. Every method raises unless the verdict is what the matrix expects."""

    session: Session
    controls: Controls
    item: pytest.Item

    def repeat(self, cell: Cell, phase: Phase) -> None:
        """Same request, same bits, within one engine lifetime."""
        observations = self._measured(cell)
        judgement = repeat.repeat(observations, phase, self.session.expectations(cell))
        self._available(cell, judgement)
        if judgement.verdict is Verdict.INVALID:
            judgement = replace(judgement, cause=self._cause(cell))
        self._say(self._controlled(cell, judgement), observations)

    def hidden_states(self, cell: Cell, phase: Phase) -> None:
        """Same request, same hidden states in every layer, within one engine lifetime."""
        observations = self._measured(cell)
        judgement = hidden_states.repeat(observations, phase, self.session.expectations(cell))
        self._available(cell, judgement)
        self._say(self._controlled(cell, judgement), observations)

    def _controlled(self, cell: Cell, judgement: Judgement) -> Judgement:
        """BIT_EXACT with what is known of its hardware's controls; INVALID where a turned-over bit was not seen."""
        if judgement.verdict is not Verdict.BIT_EXACT:
            return judgement
        status = self.controls.status(cell)
        words = {True: "yes", False: "missed", None: "no"}
        figures = {**judgement.figures, "control": status.text, "controlled": words[status.caught]}
        if status.blind:
            text = f"no repeat differs, but no seeded difference was seen either: {status.flip}"
            phase = str(judgement.figures.get("phase", ""))
            return Judgement(Verdict.INVALID, cell, phase, text, False, figures, judgement.text, cause=status.cause)
        return replace(judgement, figures=figures)

    def control(self, cell: Cell, name: Name) -> None:
        """A control of the cell's hardware: what was seeded is found, what is the same is the same."""
        if name == "known_noise":
            observations = self._measured(cell)
            found = repeat.repeat(observations, "decode", self.session.expectations(cell))
            self._available(cell, found)
            self._say(replace(found, expected=found.verdict is Verdict.NOISY), observations)
            return
        result = self.session.control(cell, "integer" if name == "one_integer" else "control")
        match result:
            case Measured():
                (seeded,) = result.observations
            case Refusal():
                if own_cells.told_by_another(self.session, self.item.name, cell):
                    self._refused(cell, result)
                cause = causes.of(cell, result, self.session.expectations(cell))
                self._say(Judgement(Verdict.ERROR, cell, "", f"control: refused: {result.message}", False, cause=cause), ())
            case Missing():
                self._missing(cell, result)
        if name == "bit_flip":
            found = control_judgements.bit_flip(seeded)
            self._say(replace(found, cause=cause_of(found, cell)), (seeded,))
        else:
            (own, *_) = self._measured(cell)
            compare = control_judgements.same_weights if name == "same_weights" else control_judgements.one_integer
            self._say(compare(own, seeded), (seeded,))

    def distinct(self, cell: Cell) -> None:
        """Distinct from every other format measured here, or declared to be the same."""
        observations = self._measured(cell)
        peers = self.session.peers(cell)
        if not peers:
            reason = f"distinct: needs another format of {cell.model_id} on {cell.hardware_id}, have none in this run"
            self._skip(Verdict.UNAVAILABLE, reason)
        spreads = self._spreads((cell, *peers))
        asked = own_cells.asked(self.session, observations[0], peers)
        judgement = distinct.distinctness(observations[0], peers, asked, self.session.compare, spreads)
        if judgement.verdict is Verdict.INVALID:
            judgement = replace(judgement, cause=self._cause(cell))
        figures = {**judgement.figures, **own_cells.apart(self.session, observations[0], peers)}
        self._say(replace(judgement, figures=figures), observations)

    def kernel(self, cell: Cell) -> None:
        """The executed kernel is the requested one in every layer that the checkpoint has quantized."""
        observations = self._measured(cell)
        matrix, version = self.session.matrix, self.session.vllm(cell)
        format_, packages = matrix.formats[cell.format_id], observations[0].header.environment
        name, classes = matrix.kernel_classes(cell, version, packages)
        verdicts = [
            kernel.kernel(
                one, name if name == format_.kernel else f"{format_.kernel} -> {name}", classes,
                format_.quantizes if format_.quantized else "", matrix.expert_classes(cell, version, packages),
                precision=format_.precision, weight_only=matrix.weight_only_classes, native=matrix.multiplies(cell),
                expected=lambda layer: matrix.kernel_classes(cell, version, packages, layers.shape_of(layer)),
                online=format_.layout in ONLINE,
            )
            for one in observations
        ]  # fmt: skip
        judgement = next((v for v in verdicts if not v.expected), verdicts[0])
        self._available(cell, judgement)
        self._say(judgement, observations)

    def restart(self, cell: Cell) -> None:
        """Same request, same bits, in another engine lifetime."""
        observations = self._measured(cell)
        self._say(restart.restart(observations, self.session.expectations(cell)), observations)

    def versions(self, cell: Cell) -> None:
        """The same logits from every vLLM version that was recorded, where the same kernels ran."""
        known: list[Observation] = []
        for version in self.session.evidence.versions(cell.hardware_id):
            result = self.session.result(replace(cell, vllm=version))
            known += result.observations[:1] if isinstance(result, Measured) else ()
        if len(known) < 2:
            have = ", ".join(one.vllm for one in known) or "none"
            self._skip(Verdict.UNAVAILABLE, f"versions: needs recordings of two vLLM versions, have {have}")
        if any(one.reported for one in known):
            self._skip(Verdict.UNAVAILABLE, f"versions: needs raw logits, have {reported.NOTE}")
        rows = [self.session.expectations(one.cell).drifts(one.cell) for one in known[1:]]
        self._say(versions.across(known, rows, self.session.matrix.family), tuple(known[:1]))

    def reexecution(self, claim: Claim) -> None:
        """Tokens generated elsewhere, re-executed here by every format: which format do they come from?"""
        verdict = reexecution.judge(claim, self.session)
        if isinstance(verdict, str):
            self._skip(Verdict.UNAVAILABLE, verdict)
        else:
            self._say(verdict, ())

    def question(self, case: Asked) -> None:
        """A question of a published experiment, answered from the verdicts of its cells."""
        row = self.session.matrix.questions[case.format_id]
        results = {cell: self.session.result(cell) for cell in questions.available(case, self.session)}
        spreads = self._spreads(results)
        judgement = answer(case, row, results, self.session.expectations, self.session.compare, spreads)
        self._available(case, judgement)
        cause = next(filter(None, map(self._cause, results)), None)
        known = [self.controls.status(cell) for cell, found in results.items() if isinstance(found, Measured)]
        if blind := [status for status in known if status.blind]:
            text = f"no seeded difference was seen on this hardware: {judgement.message}"
            judgement = Judgement(Verdict.INVALID, case, "", text, False, judgement.figures)
            cause = cause or blind[0].cause
        self._say(replace(judgement, cause=cause), ())

    def refused(self, cell: Cell) -> None:
        """The engine refuses the cell, as the matrix says."""
        result = self.session.result(cell)
        row = self.session.expectations(cell).unsupported(cell)
        match result:
            case Refusal():
                self._refused(cell, result)
            case Measured():
                self._say(refusal.refusal(cell, None, self.session.expectations(cell)), result.observations)
            case Missing(verdict=Verdict.UNSUPPORTED) if row is not None:
                self._say(refusal.refusal(cell, result.reason, self.session.expectations(cell)), ())
            case Missing():
                self._missing(cell, result)

    # ------------------------------------------------------------------------------------------------------- helpers

    def _measured(self, cell: Cell) -> tuple[Observation, ...]:
        result = self.session.result(cell)
        match result:
            case Measured():
                return result.observations
            case Refusal():
                self._refused(cell, result)
            case Missing():
                self._missing(cell, result)
        raise AssertionError("unreachable: both calls above raise")

    def _spreads(self, cells: Iterable[Cell]) -> dict[Cell, float]:
        """How far engine lifetimes are apart, of the cells that have several."""
        known = {cell: self.session.spread(cell) for cell in cells}
        return {cell: spread for cell, spread in known.items() if spread is not None}

    def _cause(self, cell: Cell) -> Cause | None:
        """Why there is nothing to judge of a cell that was measured, or tried, already."""
        return causes.of(cell, self.session.result(cell), self.session.expectations(cell))

    def _refused(self, cell: Cell, result: Refusal) -> None:
        if other := own_cells.told_by_another(self.session, self.item.name, cell, tried=True):
            self._skip(Verdict.UNSUPPORTED, f"engine refused: {result.first}{other}")
        known = (result.observation,) if result.observation is not None else ()
        judgement = refusal.refusal(cell, result.message, self.session.expectations(cell))
        self._say(replace(judgement, cause=self._cause(cell)), known)

    def _missing(self, cell: Cell, result: Missing) -> None:
        if result.verdict in (Verdict.UNAVAILABLE, Verdict.UNSUPPORTED):
            required = self.session.options.require_hardware == cell.hardware_id
            if not required:
                self._skip(result.verdict, result.reason)
        if other := own_cells.told_by_another(self.session, self.item.name, cell):
            self._skip(result.verdict, result.first + other)
        cause = causes.missing(cell, result)
        self._say(Judgement(cause.verdict, cause.cell, cause.aspect, cause.why, False, {}, cause.detail, cause=cause), ())

    def _available(self, cell: Cell, judgement: Judgement) -> None:
        """Skip what the evidence cannot answer, unless the row is required."""
        if judgement.verdict is Verdict.UNAVAILABLE:
            self._missing(cell, Missing(judgement.verdict, judgement.reason))

    def _skip(self, verdict: Verdict, reason: str) -> None:
        self.item.stash[DECLARED_SKIP] = own_cells.TOLD in reason
        self.item.user_properties.append(("verdict", str(verdict)))
        pytest.skip(f"{verdict} {reason}")

    def _say(self, judgement: Judgement, observations: tuple[Observation, ...]) -> None:
        __tracebackhide__ = True
        judgement = bundles.added(self.session, self.item, judgement, observations)
        figures: dict[str, Any] = dict.fromkeys(PROPERTIES)
        # What repeats say is the figures of these tests too; of lifetimes, of hidden states and of seeded defects it would be
        # another's.
        own = any(map(self.item.get_closest_marker, ("control", "several_lifetimes", "hidden_states")))
        if observations and observations[0].header.kind == "observation" and not own:
            known = self.session.expectations(observations[0].cell)
            figures |= repeat.repeat(observations, self._phase(), known).figures
            if self.item.get_closest_marker("compares_formats"):  # how far repeats are apart is not how far formats are
                figures |= dict.fromkeys(("first_divergence", "max_abs_diff", "l2"))
        if observations:
            header = observations[0].header
            figures |= {
                "runs": sum(o.header.repeats for o in observations if o.header.kind == "observation") or None,
                "lifetimes": len(observations),
                "kernel.executed": header.executed.summary if header.executed is not None else None,
                "checkpoint.source": header.checkpoint_source or None,
                "checkpoint.sha256": header.checkpoint_sha256,
                "workload": header.workload or None,
                **own_cells.arguments(self.session, header),
                "tokens_per_second": _rate(header.timings),
                **speed.figures(header, self.session.matrix),
                "seconds": _seconds(header.timings),
                "observation": self._relative(observations[0]),
            }
        figures |= judgement.figures
        figures["verdict"] = str(judgement.verdict)
        # Pairs of a question are of any two of its formats; other pairs have the case's own format as their first side.
        asked = getattr(self.item, "originalname", "") == "test_question"
        for pair in judgement.pairs:
            figures[f"pair.{pair.a}.{pair.b}" if asked else f"pair.{pair.b}"] = pair.figures
        figures["case.phase"] = figures.pop("phase", "") or self._phase()
        figures.pop("kernel.requested", None)  # already there
        self.item.user_properties.extend((name, text(name, value)) for name, value in figures.items())
        self.item.stash[FIGURES] = figures
        if self.session.options.report is not None:
            self.item.stash[EVIDENCE] = evidence.of(judgement, observations, getattr(self.item, "originalname", "")) or {}
        self.item.stash[JUDGEMENT] = judgement
        judgement.enforce()

    def _phase(self) -> Phase:
        """The phase that the test's figures are about: formats are compared on prefill, a kernel is known by decode."""
        callspec = getattr(self.item, "callspec", None)
        given: Phase | None = callspec.params.get("phase") if callspec is not None else None
        return given or ("prefill" if self.item.get_closest_marker("compares_formats") else "decode")

    @staticmethod
    def _relative(observation: Observation) -> str:
        return "/".join(observation.path.parts[-5:]) if observation.path is not None else ""


def _rate(timings: dict[str, float]) -> float | None:
    """Tokens per second of the capturing calls; None where nothing was timed (a rate of 0 was no measurement either)."""
    return timings.get("tokens_per_second") or None


def _seconds(timings: dict[str, float]) -> dict[str, float]:
    """The first lifetime's time by part, for example `import`, `start`, `load`, `measure`; of those that were timed."""
    return {part.removesuffix("_s"): timings[part] for part in PARTS if part in timings}
