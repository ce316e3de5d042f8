"""What a run is about: which cells there are, which of them can be measured here, and what with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.version import Version

from quantdet.engines.process import process
from quantdet.judging.results import Lack
from quantdet.matrix.cell import Cell
from quantdet.matrix.expectations import Expectations
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.workload import Workload
from quantdet.observations import store
from quantdet.observations.claims import Claim, References
from quantdet.session.evidence import Evidence
from quantdet.session.machine.environment import environment_of, environment_on
from quantdet.session.machine.machine import Machine, Software
from quantdet.session.options import Options


@dataclass(repr=False)
class Scope:
    """What was asked for, and what the machine and the recordings have; `selected` and `claimed` are what pytest collected.

    `run`: what pytest-xdist's workers call the run that they share; empty without them. `workloads`: by model, of those whose
    checkpoint decides their prompts; `about`: a line about each of these.
    """

    options: Options
    matrix: Matrix
    machine: Machine
    software: Software
    engine: process.EngineSpec
    prompts: Path
    inject: tuple[str, str] | None = None
    run: str = ""
    workloads: Mapping[str, Workload] = field(default_factory=dict)
    about: tuple[str, ...] = ()
    selected: frozenset[Cell] = frozenset()
    claimed: tuple[Claim, ...] = ()
    evidence: Evidence = field(init=False)
    _expectations: dict[str | None, Expectations] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = store.Store(self.options.store)
        self.environment = environment_of(self.machine, self.software)
        self.references = References(self.options.reference)

    def cells(self) -> list[Cell]:
        """Every cell of the run, in file order."""
        wanted = self.options.hardware
        return self.evidence.expand(cell for cell in self.matrix.cells() if wanted in (None, cell.hardware_id))

    def expectations(self, cell: Cell) -> Expectations:
        """The rows that hold for the vLLM of `cell`."""
        version = self.vllm(cell)
        if version not in self._expectations:
            self._expectations[version] = self.matrix.expectations(version)
        return self._expectations[version]

    def vllm(self, cell: Cell) -> str | None:
        """The vLLM version that `cell` is, or was, measured with, which may be none that is installed here."""
        return cell.vllm or self.evidence.vllm(cell) or self.software.vllm

    def gate(self, cell: Cell) -> Lack | None:
        """Why `cell` cannot be measured here (need and have); None if it can be tried."""
        return self.evidence.gate(cell)

    def here(self, hardware_id: str) -> bool:
        """Whether a hardware row is this machine, or can be made of it."""
        return self.evidence.here(hardware_id)

    def lifetimes(self, cell: Cell) -> int:
        """Engine lifetimes that are asked for, or that were recorded if they are more."""
        asked = self.options.lifetimes or self.matrix.run_for(cell).lifetimes
        return self.evidence.lifetimes(cell, asked)

    def hidden_states(self, cell: Cell) -> bool:
        """Whether hidden states of `cell` are taken, or were recorded."""
        return self.evidence.hidden_states(cell)

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
        return self.evidence.pinned(cell)

    def environment_on(self, cell: Cell) -> dict[str, Any]:
        """The environment, with the GPU that `cell` runs on."""
        return environment_on(self.environment, self.machine, self.matrix.hardware[cell.hardware_id])

    def newer(self) -> str:
        """What to say first of a vLLM that is newer than those that the matrix was measured with; empty: nothing."""
        said = []
        for kind, versions in self.evidence.measured_with(self.matrix).items():
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
        return self.evidence.environment(self.options.hardware)


def _release(version: str) -> Version:
    """Without the label of a build (`+cu130`) and of a packaging (`.post1`): the same sources."""
    return Version(Version(version).base_version)
