"""Where a run's evidence comes from: engines that are started here (`live.Live`), or recordings (`replay.Replay`).

What the two have in common. Where a session has to know which of them it is (a recording seeds no control, and a cell that was
not selected is there all the same), it asks `replayed`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from quantdet.engines.plan import Plan
from quantdet.judging.results import Lack, Result
from quantdet.matrix.cell import Cell
from quantdet.matrix.matrix import Matrix
from quantdet.observations.claims import Sequences


class Evidence(Protocol):
    """Cells, why some of them cannot be judged, and what is known of the others.

    replayed: observations were recorded, and no engine is started. folders: where observations lie.
    """

    @property
    def replayed(self) -> bool: ...

    @property
    def folders(self) -> tuple[Path, ...]: ...

    def expand(self, cells: Iterable[Cell]) -> list[Cell]:
        """The matrix's cells, one for each vLLM version that is judged."""

    def here(self, hardware_id: str) -> bool:
        """Whether a hardware row is this machine, or can be made of it; of a recording no row is."""

    def gate(self, cell: Cell) -> Lack | None:
        """Why `cell` cannot be judged, as need and have; None if it can be tried."""

    def versions(self, hardware_id: str) -> list[str]:
        """The vLLM versions that a hardware row was recorded with, oldest first; none of engines that are started here."""

    def vllm(self, cell: Cell) -> str | None:
        """The vLLM version that `cell` is, or was, measured with."""

    def measured_with(self, matrix: Matrix) -> Mapping[str, list[str]]:
        """By kind of hardware, the vLLM versions of what is judged."""

    def lifetimes(self, cell: Cell, asked: int) -> int:
        """Engine lifetimes of `cell` where `asked` are asked for."""

    def hidden_states(self, cell: Cell) -> bool:
        """Whether hidden states of `cell` are taken, or were recorded."""

    def pinned(self, cell: Cell) -> bool:
        """Whether the cell's kernel can be asked for, or needs not be."""

    def result(self, cell: Cell) -> Result:
        """What repeats of `cell` gave."""

    def peer(self, cell: Cell) -> Result | None:
        """The same of a cell that no selected case is about, if it is known without measuring it: others compare with it."""

    def control(self, cell: Cell, kind: str) -> Result:
        """What `cell` gave with a seeded defect: see `Session.control`."""

    def verifiers(self) -> list[str]:
        """Hardware rows on which claims are re-executed."""

    def verifies(self, cell: Cell) -> bool:
        """Whether claims are, or were, re-executed by `cell`."""

    def verified(self, cell: Cell, dtype: str, sequences: Sequences) -> Result:
        """The re-execution of exactly these sequences by `cell`."""

    def environment(self, hardware_id: str | None = None) -> dict[str, Any]:
        """The environment of what is judged, on this hardware row if one is named; `several` where observations differ."""

    def plan(self, cell: Cell) -> Plan | None:
        """The plan of a cell that was not measured; None where nothing is planned."""
