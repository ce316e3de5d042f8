"""One run of the suite: which cells there are, what was measured, each cell at most once.

Tests ask for results and judge them; this module starts engines, fills the store and remembers.
"""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantdet import checkpoints, planning, restarts, store, verification, workload
from quantdet.checkpoints.unchanged import changed
from quantdet.claims import Claim, References
from quantdet.engines import Plan, process, scratch
from quantdet.environment import environment_of, environment_on, slug
from quantdet.expectations import Expectations
from quantdet.hardware import Machine, Software, gate, variables_for
from quantdet.interrupts import held
from quantdet.matrix import Matrix
from quantdet.observation import HEADER_FILE, Observation, write
from quantdet.observation_header import SCHEMA, Header
from quantdet.options import Options
from quantdet.pairs import pair
from quantdet.replay import Replay
from quantdet.results import Measured, Missing, Refusal, Result
from quantdet.schema import Cell, matches_any
from quantdet.verdicts import Pair, Verdict

if TYPE_CHECKING:
    from quantdet.controls import Place, Status


@dataclass
class Clock:
    """Where the time of a run went, seconds; engine processes that it started, by what for; cells, and those not started."""

    engines: float = 0.0
    measuring: float = 0.0
    checkpoints: float = 0.0
    cells: int = 0
    reused: int = 0
    lifetimes: int = 0
    controls: int = 0
    verifications: int = 0
    traces: int = 0

    def started(self, role: str) -> None:
        """Count an engine process by the role of its observation."""
        name = {"control": "controls", "verify": "verifications", "diagnosis": "traces"}.get(role, "lifetimes")
        setattr(self, name, getattr(self, name) + 1)


@dataclass(repr=False)
class Session:
    """State of a run; one per process (each pytest-xdist worker has its own)."""

    options: Options
    matrix: Matrix
    machine: Machine
    software: Software
    engine: process.EngineSpec
    prompts: Path
    inject: tuple[str, str] | None = None
    selected: frozenset[Cell] = frozenset()
    claimed: tuple[Claim, ...] = ()
    clock: Clock = field(default_factory=Clock)
    on_start: Any = None
    _results: dict[Cell, Result] = field(default_factory=dict)
    _workloads: dict[str, workload.Workload] = field(default_factory=dict)
    _expectations: dict[str | None, Expectations] = field(default_factory=dict)
    _pairs: dict[tuple[Cell, ...], Pair] = field(default_factory=dict)
    _verified: dict[tuple[Cell, str], Result] = field(default_factory=dict)
    _controls: dict[tuple[Cell, str], Result] = field(default_factory=dict)
    controls: "dict[Place, Status]" = field(default_factory=dict)
    _sequences: dict[tuple[str, str], verification.Sequences] = field(default_factory=dict)
    _builder: ThreadPoolExecutor | None = None
    _checkpoints: dict[Cell, "Future[checkpoints.Checkpoint]"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = store.Store(self.options.store)
        self.environment = environment_of(self.machine, self.software)
        self.replay = Replay(*self.options.replay) if self.options.replay else None
        self.references = References(self.options.reference)

    # ------------------------------------------------------------------------------------------------ what there is

    def cells(self) -> list[Cell]:
        """Every cell of the run, in file order."""
        wanted = self.options.hardware
        rows = {name for name, row in self.matrix.hardware.items() if name == wanted or (wanted is None and not row.limits)}
        if self.replay is not None and wanted is None:
            rows = set(self.matrix.hardware)
        cells = [cell for cell in self.matrix.cells() if cell.hardware_id in rows]
        return cells if self.replay is None else self.replay.expand(cells)

    def expectations(self, cell: Cell) -> Expectations:
        """The rows that hold for the vLLM of `cell`."""
        version = self.vllm(cell)
        if version not in self._expectations:
            self._expectations[version] = Expectations.of(self.matrix, version)
        return self._expectations[version]

    def vllm(self, cell: Cell) -> str | None:
        """The vLLM version that `cell` is, or was, measured with, which may be none that is installed here."""
        recorded = self.replay.versions(cell.hardware_id)[:1] if self.replay is not None else []
        return cell.vllm or next(iter(recorded), None) or self.software.vllm

    def gate(self, cell: Cell) -> str | None:
        """Why `cell` cannot be measured here (need and have); None if it can be tried."""
        if self.replay is not None:
            return self.replay.gate(cell)
        return gate(self.matrix, cell, self.machine, self.software, ignore_native=self.options.ignore_native)

    def lifetimes(self, cell: Cell) -> int:
        """Engine lifetimes that are asked for, or that were recorded if they are more."""
        asked = self.options.lifetimes or self.matrix.run_for(cell).lifetimes
        return asked if self.replay is None else max(asked, self.replay.lifetimes(cell))

    def activations(self, cell: Cell) -> bool:
        """Whether hidden states of `cell` are taken, or were recorded."""
        if self.replay is not None:
            return self.replay.activations(cell)
        eager = self.matrix.formats[cell.format_id].mode == "eager"
        return eager and self.matrix.models[cell.model_id].activations and not self.options.no_activations

    def engine_for(self, cell: Cell) -> process.EngineSpec:
        """Where the engine of the cell's format is."""
        own = self.engine == process.VLLM and self.matrix.engine_of(cell) == "transformers"
        return process.TRANSFORMERS if own else self.engine

    def engine_name(self, cell: Cell) -> str:
        """`vllm`, `transformers`, or where an engine is that stands in for vLLM."""
        name = self.matrix.engine_of(cell)
        return self.engine.target if name == "vllm" and self.engine != process.VLLM else name

    def pinned(self, cell: Cell) -> bool:
        """Whether the installed vLLM can be told to use the cell's kernel, or needs not be told."""
        if self.replay is not None or self.matrix.engine_of(cell) != "vllm":
            return True
        if self.matrix.formats[cell.format_id].kernel in ("auto", "unquantized"):
            return True
        pin = self.matrix.pin_for(
            self.matrix.formats[cell.format_id], self.software.vllm or "0", self.matrix.models[cell.model_id]
        )
        return pin is not None and not pin.unsupported

    def environment_on(self, cell: Cell) -> dict[str, Any]:
        """The environment, with the GPU that `cell` runs on."""
        return environment_on(self.environment, self.machine, self.matrix.hardware[cell.hardware_id])

    def measured_environment(self) -> dict[str, Any]:
        """The environment that this run's figures come from: this machine's, or that of the replayed observations."""
        if self.replay is not None:
            return self.replay.environment()
        row = self.matrix.hardware.get(self.options.hardware or "")
        return dict(self.environment if row is None else environment_on(self.environment, self.machine, row))

    def peers(self, cell: Cell) -> dict[Cell, Observation]:
        """Every other format of the model on the same hardware that this run measures, or the store already holds."""
        found: dict[Cell, Observation] = {}
        for other in self.cells():
            if replace(other, format_id=cell.format_id) != cell or other == cell:
                continue
            if self.gate(other) is not None or self.expectations(other).unsupported(other) is not None:
                continue
            if other in self.selected or self.replay is not None:
                result = self.result(other)
                if isinstance(result, Measured):
                    found[other] = result.observations[0]
            elif (known := self._stored(other)) is not None:
                self._record([known])  # what a verdict rests on belongs to the recording
                found[other] = known
        return found

    def spread(self, cell: Cell) -> float:
        """How far the engine lifetimes of a cell that this run has measured are apart: largest mean L2 to the first, nats."""
        result = self._results.get(cell)
        if not isinstance(result, Measured):
            return 0.0
        first, *others = result.observations
        return max((restarts.gap(first, other).l2 for other in others), default=0.0)

    def compare(self, a: Observation, b: Observation) -> Pair:
        """The pair of two observations of this run, computed once for both directions."""
        ids = (a.cell, b.cell)
        if ids not in self._pairs:
            found = pair(a, b)
            self._pairs[ids], self._pairs[ids[::-1]] = found, found.swapped
        return self._pairs[ids]

    # ---------------------------------------------------------------------------------------------------- measuring

    def result(self, cell: Cell) -> Result:
        """The cell's result; measured on the first call."""
        if cell not in self._results:
            self._results[cell] = _safely(self._measure, cell) if self.replay is None else self.replay.result(cell)
        return self._results[cell]

    def _measure(self, cell: Cell) -> Result:
        reason = self.gate(cell)
        if reason is not None:
            return Missing(Verdict.UNAVAILABLE, reason)
        plan = self._prepare(cell)
        if isinstance(plan, Missing):
            return plan
        lifetimes = self.lifetimes(cell)
        observations: list[Observation] = []
        reused = True
        for lifetime in range(lifetimes):
            if lifetime and lifetime == lifetimes - 1 and self.matrix.hardware[cell.hardware_id].kind == "cuda":
                plan = planning.cold(plan, self.matrix)
            outcome, was_there = self._lifetime(cell, plan, lifetime)
            if not isinstance(outcome, Observation):
                return outcome
            if outcome.header.kind == "refusal":
                self._record([outcome])
                return Refusal(outcome.header.refusal, outcome)
            observations.append(outcome)
            reused = reused and was_there
        self.clock.cells += 1
        self.clock.reused += reused
        self._record(observations)
        return Measured(tuple(observations), reused)

    def sequences(self, model_id: str, dtype: str) -> verification.Sequences:
        """What the selected claims of a model that were computed in `dtype` ask to be re-executed."""
        if (model_id, dtype) not in self._sequences:
            claims = [claim for claim in self.claimed if claim.model_id == model_id]
            claims = [claim for claim in claims if self.references.header(claim).dtype == dtype]
            self._sequences[model_id, dtype] = verification.Sequences.of(map(self.references.observation, claims))
        return self._sequences[model_id, dtype]

    def verified(self, cell: Cell, dtype: str) -> Result:
        """The re-execution of these claims by the cell's format, measured on the first call.

        In the claims' dtype, where the format leaves it to the hardware.
        """
        if (cell, dtype) not in self._verified:
            sequences = self.sequences(cell.model_id, dtype)
            if self.replay is not None:
                self._verified[cell, dtype] = self.replay.verified(cell, sequences.workload.sha256)
            else:
                self._verified[cell, dtype] = _safely(self._verify, cell, dtype, sequences)
        return self._verified[cell, dtype]

    def _verify(self, cell: Cell, dtype: str, sequences: verification.Sequences) -> Result:
        plan = self._prepare(cell, sequences.workload)
        if isinstance(plan, Missing):
            return plan
        dtype = self.matrix.verifying_dtype(cell, dtype)
        plan = verification.verifying(plan, dtype, sequences.top_k, activations=sequences.activations)
        outcome, was_there = self._lifetime(cell, plan, 0)
        if not isinstance(outcome, Observation):
            return outcome
        if outcome.header.kind == "refusal":
            return Refusal(outcome.header.refusal, outcome)
        self._record([outcome])
        return Measured((outcome,), was_there)

    def control(self, cell: Cell, kind: str) -> Result:
        """A lifetime of `cell` with a seeded defect, measured on the first call.

        `kind`: "control", the same weights under another name, with bits turned over in the last repeat; "integer", weights
        of which one integer is another by 1.
        """
        if (cell, kind) not in self._controls:
            replay = self.replay
            self._controls[cell, kind] = _safely(self._control, cell, kind) if replay is None else replay.control(cell, kind)
        return self._controls[cell, kind]

    def _control(self, cell: Cell, kind: str) -> Result:
        plan = self._prepare(cell)
        if isinstance(plan, Missing):
            return plan
        try:
            plan = planning.controlling(plan, kind, self.options.checkpoints)
        except (checkpoints.Unavailable, OSError, ValueError) as error:
            return Missing(Verdict.UNAVAILABLE, f"control: {error}")
        outcome, was_there = self._lifetime(cell, plan, 0)
        if not isinstance(outcome, Observation):
            return outcome
        if outcome.header.kind == "refusal":
            return Refusal(outcome.header.refusal, outcome)
        self._record([outcome])
        return Measured((outcome,), was_there)

    def plan_of(self, cell: Cell) -> Plan | Missing:
        """What an engine would be asked of `cell`; starts none."""
        return self._prepare(cell)

    def weights(self, model_id: str, format_id: str) -> checkpoints.Checkpoint:
        """The weights of a format, whether or not it can run here.

        Raises:
            checkpoints.Unavailable, OSError, ValueError: see `checkpoints.resolve`.
        """
        return self._resolve(Cell(model_id, format_id, ""))

    def _record(self, observations: list[Observation]) -> None:
        if self.options.record is not None:
            for observation in observations:
                store.copy_into(observation, self.options.record)

    def _prepare(self, cell: Cell, given: workload.Workload | None = None) -> Plan | Missing:
        """Workload, weights and arguments of a cell; `given` instead of its model's workload."""
        model = self.matrix.models[cell.model_id]
        began = time.monotonic()
        try:
            work = self._workload(model.workload) if given is None else given
            if model.synthetic is not None:
                workload.check_vocab(work, model.synthetic.vocab_size)
            checkpoint = self._checkpoint(cell)
            if work.has_text and not any(checkpoint.path.glob("tokenizer*")):
                need = f"workload {work.id} is text: needs a tokenizer in the checkpoint"
                return Missing(Verdict.INVALID, f"{need}, have none in {checkpoint.path.name}; a workload of ids needs none")
        except checkpoints.Unavailable as error:
            return Missing(Verdict.UNAVAILABLE, f"weights: {error}")
        except workload.WorkloadError as error:
            return Missing(Verdict.INVALID, str(error))
        except (OSError, ValueError, MemoryError) as error:
            return Missing(Verdict.ERROR, f"checkpoint: {error}")
        finally:
            self.clock.checkpoints += time.monotonic() - began
        ranks = self.matrix.tensor_parallel_size(cell)
        planned = planning.plan_for(
            cell, self.matrix, work, checkpoint, self.environment_on(cell),
            device=variables_for(self.machine, self.matrix.hardware[cell.hardware_id], self.software, ranks),
            vllm_version=self.software.vllm or "0", engine=self.engine_name(cell),
            repeats=self.options.repeats, max_flip_rate=self.options.max_flip_rate, inject=self.inject,
            claimed=self._claims(cell) if given is None else None, activations=given is None and self.activations(cell),
        )  # fmt: skip
        return planned if isinstance(planned, Plan) else Missing(Verdict.UNSUPPORTED, planned)

    def _stored(self, cell: Cell) -> Observation | None:
        """What the store holds of a cell that this run does not measure, if it is still valid; starts no engine."""
        place = self.store.root / cell.hardware_id / slug(self.environment_on(cell)) / cell.model_id / cell.format_id
        if self.options.fresh or not any(place.glob(f"[!.]*/{HEADER_FILE}")):
            return None
        plan = self._prepare(cell)
        if isinstance(plan, Missing):
            return None
        found = self.store.find(cell, slug(self.environment_on(cell)), planning.key_of(plan, 0))
        return found if found is not None and found.header.kind == "observation" else None

    def _checkpoint(self, cell: Cell) -> checkpoints.Checkpoint:
        """The cell's weights; those of the cells to come are built beside the engine that runs meanwhile."""
        if self._builder is None:
            self._builder = ThreadPoolExecutor(1, "quantdet-checkpoints")
            for other in self.cells():
                if other in self.selected and other != cell and self.gate(other) is None:
                    self._checkpoints[other] = self._builder.submit(self._resolve, other)
        future = self._checkpoints.pop(cell, None)
        return self._resolve(cell) if future is None or future.cancel() else future.result()

    def _resolve(self, cell: Cell) -> checkpoints.Checkpoint:
        return checkpoints.resolve(
            cell.model_id, self.matrix.models[cell.model_id], self.matrix.formats[cell.format_id],
            cache=self.options.checkpoints, allow_download=self.options.allow_download,
        )  # fmt: skip

    def _lifetime(self, cell: Cell, plan: Plan, lifetime: int) -> tuple[Observation | Missing | Refusal, bool]:
        identity = {**plan.identity, "lifetime": lifetime}
        key = planning.key_of(plan, lifetime)
        place = slug(self.environment_on(cell))
        if self.options.fresh:
            self.store.forget(cell, place, key)
        found = self.store.find(cell, place, key)
        if found is not None:
            return found, True
        role = str(plan.identity.get("role", "measure"))
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        plan = Plan(**{**vars(plan), "identity": {**identity, "key": key, "created": created}})
        log = self.store.log(cell, f"{plan.identity.get('role', '')}{lifetime}")
        limit = self.matrix.run_for(cell).time_limit_s
        with held(), self.announced(cell, lifetime, role), self.store.writing(cell, place, key) as folder:
            began = time.monotonic()
            outcome = process.run(self.engine_for(cell), plan, folder, log, limit)
            self.clock.engines += time.monotonic() - began
            identity = plan.identity
            what = changed(Path(plan.checkpoint), identity["checkpoint_sha256"], identity["checkpoint_files_sha256"])
            if what is not None:
                outcome = process.Invalid(f"the checkpoint changed while it was measured: {what}", log, 0.0)
            if not isinstance(outcome, process.Completed):  # what a failed engine left is not taken for measured
                (folder / HEADER_FILE).unlink(missing_ok=True)
            if isinstance(outcome, process.Refused) and self.expectations(cell).unsupported(cell) is not None:
                # Kept only where the matrix expects it: another refusal may be gone the next time.
                header = {**plan.identity, "schema": SCHEMA, "kind": "refusal", "refusal": outcome.message}
                write(folder, Header.model_validate(header), ())
        match outcome:
            case process.Refused() if self.expectations(cell).unsupported(cell) is None:
                return Refusal(outcome.message), False
            case process.Lacking():
                return Missing(Verdict.UNAVAILABLE, f"engine: {outcome.message}", str(log)), False
            case process.TimedOut():
                return Missing(Verdict.TIMEOUT, f"no answer within {limit:g} s, log: {log}", str(log)), False
            case process.Invalid():
                return Missing(Verdict.INVALID, outcome.message, str(log)), False
            case process.Crashed():
                return Missing(Verdict.ERROR, outcome.message, str(log)), False
        found = self.store.find(cell, place, key)
        if found is None:
            return Missing(Verdict.ERROR, f"the engine completed but left no whole observation, log: {log}"), False
        self.clock.measuring += found.header.timings.get("measure_s", 0.0)
        return found, False

    @contextlib.contextmanager
    def announced(self, cell: Cell, lifetime: int, role: str) -> Iterator[None]:
        """Around an engine process: count it, and let `on_start` say so."""
        self.clock.started(role)
        with contextlib.nullcontext() if self.on_start is None else self.on_start(cell, lifetime, role):
            yield

    # ------------------------------------------------------------------------------------------------------ planning

    def _claims(self, cell: Cell) -> workload.Workload | None:
        """The workload of the tokens that a recording of `cell` keeps for re-execution."""
        claims = self.matrix.models[cell.model_id].claims
        if claims is None or self.options.record is None or not matches_any(cell.format_id, claims.formats):
            return None
        return self._workload(claims.workload)

    def _workload(self, name: str) -> workload.Workload:
        if name not in self._workloads:
            self._workloads[name] = workload.load(name, self.prompts)
        return self._workloads[name]

    def close(self) -> None:
        """Stop building ahead; remove what a cut-off run left in the store (half-written folders begin with a dot)."""
        if self._builder is not None:
            self._builder.shutdown(wait=False, cancel_futures=True)
        self.store.sweep()
        scratch.sweep()


def _safely(measure: Callable[..., Result], *args: Any) -> Result:
    """A full disk, or a store that cannot be written, costs the cell and is said."""
    try:
        return measure(*args)
    except OSError as error:
        return Missing(Verdict.ERROR, f"{type(error).__name__}: {error}")
