"""What a run is about: which cells there are, which of them can be measured here, and what with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.version import Version

from quantdet.engines.process import process
from quantdet.judging.results import Lack
from quantdet.matrix.cell import Cell
from quantdet.matrix.expectations import Expectations
from quantdet.matrix.matrix import Matrix
from quantdet.observations import store
from quantdet.observations.claims import Claim, References
from quantdet.session.machine.environment import environment_of, environment_on
from quantdet.session.machine.gate import gate
from quantdet.session.machine.machine import Machine, Software
from quantdet.session.options import Options
from quantdet.session.replay import Replay


@dataclass(repr=False)
class Scope:
    """What was asked for, and what the machine and the recordings have; `selected` and `claimed` are what pytest collected.

    `run`: what pytest-xdist's workers call the run that they share; empty without them.
    """

    options: Options
    matrix: Matrix
    machine: Machine
    software: Software
    engine: process.EngineSpec
    prompts: Path
    inject: tuple[str, str] | None = None
    run: str = ""
    selected: frozenset[Cell] = frozenset()
    claimed: tuple[Claim, ...] = ()
    _expectations: dict[str | None, Expectations] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = store.Store(self.options.store)
        self.environment = environment_of(self.machine, self.software)
        self.replay = Replay(*self.options.replay) if self.options.replay else None
        self.references = References(self.options.reference)

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
            self._expectations[version] = self.matrix.expectations(version)
        return self._expectations[version]

    def vllm(self, cell: Cell) -> str | None:
        """The vLLM version that `cell` is, or was, measured with, which may be none that is installed here."""
        recorded = self.replay.versions(cell.hardware_id)[:1] if self.replay is not None else []
        return cell.vllm or next(iter(recorded), None) or self.software.vllm

    def gate(self, cell: Cell) -> Lack | None:
        """Why `cell` cannot be measured here (need and have); None if it can be tried."""
        if self.replay is not None:
            return self.replay.gate(cell)
        return gate(self.matrix, cell, self.machine, self.software, ignore_native=self.options.ignore_native)

    def here(self, hardware_id: str) -> bool:
        """Whether a hardware row is this machine, or can be made of it."""
        row = self.matrix.hardware[hardware_id]
        return self.machine.has(row) if row.limits else hardware_id in self.machine.rows(self.matrix)

    def lifetimes(self, cell: Cell) -> int:
        """Engine lifetimes that are asked for, or that were recorded if they are more."""
        asked = self.options.lifetimes or self.matrix.run_for(cell).lifetimes
        return asked if self.replay is None else max(asked, self.replay.lifetimes(cell))

    def hidden_states(self, cell: Cell) -> bool:
        """Whether hidden states of `cell` are taken, or were recorded."""
        if self.replay is not None:
            return self.replay.hidden_states(cell)
        eager = self.matrix.formats[cell.format_id].mode == "eager"
        return eager and self.matrix.models[cell.model_id].activations and not self.options.no_hidden_states

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

    def newer(self) -> str:
        """What to say first of a vLLM that is newer than those that the matrix was measured with; empty: nothing."""
        found: dict[str, list[str]] = {}
        if self.replay is None and self.software.vllm is not None and self.software.flavour is not None:
            found[self.software.flavour] = [self.software.vllm]
        for row in self.replay.hardware() if self.replay is not None else ():
            if row in self.matrix.hardware:
                found.setdefault(self.matrix.hardware[row].kind, []).extend(self.replay.versions(row) if self.replay else ())
        said = []
        for kind, versions in found.items():
            known = self.matrix.engine.measured.get(kind, ())  # type: ignore[call-overload]
            newest = max(map(_release, known), default=None)
            later = [text for text in dict.fromkeys(versions) if newest is not None and text and _release(text) > newest]
            if later:
                said.append(
                    f"vLLM {', '.join(later)} is newer than what was measured ({kind.upper()}: {', '.join(known)}): kernels' "
                    "names, pins and expectations of this matrix may not hold for it"
                )
        return "; ".join(said)

    def measured_environment(self) -> dict[str, Any]:
        """The environment that this run's figures come from: this machine's, or that of the replayed observations."""
        if self.replay is not None:
            return self.replay.environment()
        row = self.matrix.hardware.get(self.options.hardware or "")
        return dict(self.environment if row is None else environment_on(self.environment, self.machine, row))


def _release(version: str) -> Version:
    """Without the label of a build (`+cu130`) and of a packaging (`.post1`): the same sources."""
    return Version(Version(version).base_version)
