"""Recorded observations in place of an engine: which cells they are of, and what each cell's result is.

Where a hardware row was recorded with several vLLM versions, each version is a cell of its own (`Cell.vllm`), since
kernels, expectations and twins are a version's. What another engine gave stands beside the version that it was recorded
with, or the newest.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from quantdet.judging.results import Lack, Measured, Missing, Refusal, Result
from quantdet.judging.verdicts import Verdict
from quantdet.matrix.cell import OTHER_ENGINES, Cell
from quantdet.matrix.matrix import Matrix
from quantdet.observations import store
from quantdet.observations.claims import ROLE, Sequences
from quantdet.observations.comparable import different
from quantdet.observations.observation import Observation, ObservationError, vllm_of


class Replay:
    """The observations below folders (see `evidence.Evidence`); one that lies in several of them is one observation.

    Raises:
        ObservationError: a damaged observation, one of a vLLM whose version is none, or none at all.
    """

    replayed = True

    def __init__(self, *folders: Path) -> None:
        self.folders = folders
        self.where = ", ".join(map(str, folders))
        found: list[Observation] = []
        for folder in folders:
            here = store.Store(folder).all()
            if not here:
                raise ObservationError(f"{folder}: no observation in this folder")
            there = {observation.header.header_sha256 for observation in found}
            found += [observation for observation in here if observation.header.header_sha256 not in there]
        for observation in found:
            _check_version(observation)
        self._verified = [one for one in found if one.header.role == ROLE and not one.header.inject]
        self._controls = [one for one in found if one.header.role == "control"]
        found = [observation for observation in found if observation.header.role == "measure"]
        self._versions: dict[str, list[str]] = {}
        for observation in found:
            if observation.header.engine in OTHER_ENGINES:
                continue
            known = self._versions.setdefault(observation.header.hardware, [])
            if vllm_of(observation) not in known:
                known.append(vllm_of(observation))
        for known in self._versions.values():
            known.sort(key=_order)
        self._cells: dict[Cell, list[Observation]] = {}
        for observation in found:
            if len(self.versions(observation.header.hardware)) > 1:
                observation = replace(observation, vllm=self._version(observation))
            self._cells.setdefault(observation.cell, []).append(observation)

    def expand(self, cells: Iterable[Cell]) -> list[Cell]:
        """The matrix's cells, one for each version that its hardware was recorded with."""
        return [
            replace(cell, vllm=version)
            for cell in cells
            for version in (self.versions(cell.hardware_id) if len(self.versions(cell.hardware_id)) > 1 else [""])
        ]

    def versions(self, hardware_id: str) -> list[str]:
        """The vLLM versions that a hardware row was recorded with, oldest first."""
        return self._versions.get(hardware_id, [])

    def here(self, hardware_id: str) -> bool:
        return False

    def vllm(self, cell: Cell) -> str | None:
        return next(iter(self.versions(cell.hardware_id)), None)

    def measured_with(self, matrix: Matrix) -> Mapping[str, list[str]]:
        """Of the hardware rows that the matrix has."""
        found: dict[str, list[str]] = {}
        for row in self.hardware():
            if row in matrix.hardware:
                found.setdefault(matrix.hardware[row].kind, []).extend(self.versions(row))
        return found

    def pinned(self, cell: Cell) -> bool:
        return True

    def peer(self, cell: Cell) -> Result | None:
        return self.result(cell)

    def plan(self, cell: Cell) -> None:
        """Nothing is planned."""

    def _version(self, observation: Observation) -> str:
        """The recorded vLLM version that an observation stands beside."""
        version, known = vllm_of(observation), self.versions(observation.header.hardware)
        if version in known or observation.header.engine not in OTHER_ENGINES:
            return version
        return known[-1] if known else ""

    def gate(self, cell: Cell) -> Lack | None:
        """Why `cell` cannot be judged; None if there are observations of it (for all versions together: of two)."""
        versions = self.versions(cell.hardware_id)
        if len(versions) > 1 and not cell.vllm:
            have = [version for version in versions if replace(cell, vllm=version) in self._cells]
            return None if len(have) > 1 else Lack("replay", "recordings of two vLLM versions", ", ".join(have) or "none")
        return None if cell in self._cells else Lack("replay", "a recording", f"none in {self.where}")

    def result(self, cell: Cell) -> Result:
        """What was recorded of `cell`."""
        # A seeded defect is evidence about the suite, never about the cell.
        observations = [o for o in self._cells.get(cell, []) if not o.header.inject]
        if not observations:
            return Missing(Verdict.UNAVAILABLE, self.gate(cell) or "replay: needs a recording without a seeded defect")
        refusals = [o for o in observations if o.header.kind == "refusal"]
        if refusals:
            return Refusal(refusals[0].header.refusal, refusals[0])
        first = observations[0].header
        for other in observations[1:]:
            names = different(first, other.header)
            if names:
                text = f"replay: several runs of this cell in the folder, which differ in {', '.join(names)}"
                return Missing(Verdict.INVALID, text)
        # A copy of an observation is not another one; a second run of the same lifetime is, and none is left out.
        once = {o.header.header_sha256: o for o in observations}
        return Measured(tuple(sorted(once.values(), key=lambda o: o.header.lifetime)), reused=True)

    def hardware(self) -> list[str]:
        """Hardware rows that something was recorded on."""
        return list(
            dict.fromkeys(one.header.hardware for one in (*self._verified, *(o for v in self._cells.values() for o in v)))
        )

    def lifetimes(self, cell: Cell, asked: int) -> int:
        """Those that were recorded, if they are more."""
        return max(asked, len({one.header.lifetime for one in self._cells.get(cell, ()) if not one.header.inject}))

    def hidden_states(self, cell: Cell) -> bool:
        """Whether hidden states of `cell` were recorded."""
        return any(one.header.hidden_states is not None and not one.header.inject for one in self._cells.get(cell, ()))

    def control(self, cell: Cell, kind: str) -> Result:
        """The recorded control of `cell` with this seeded defect."""
        for one in self._controls:
            if one.header.inject != kind or one.header.cell != replace(cell, vllm=""):
                continue
            version = self._version(one) if cell.vllm else ""
            if version == cell.vllm:
                return Measured((replace(one, vllm=version),), reused=True)
        return Missing(Verdict.UNAVAILABLE, Lack("replay", f"a recorded control ({kind})", f"none in {self.where}"))

    def verifiers(self) -> list[str]:
        """Hardware rows on which claims were re-executed."""
        return list(dict.fromkeys(observation.header.hardware for observation in self._verified))

    def verifies(self, cell: Cell) -> bool:
        """Whether claims were re-executed by `cell`."""
        return any(observation.header.cell == cell for observation in self._verified)

    def verified(self, cell: Cell, dtype: str, sequences: Sequences) -> Result:
        """The re-execution of exactly these sequences by `cell`."""
        for observation in self._verified:
            if observation.header.cell == cell and observation.header.workload_sha256 == sequences.workload.sha256:
                return Measured((observation,), reused=True)
        return Missing(Verdict.UNAVAILABLE, Lack("replay", "a re-execution of these claims", f"none in {self.where}"))

    def environment(self, hardware_id: str | None = None) -> dict[str, Any]:
        """What the observations' environments have in common; `several` where they differ."""
        environments = [one.header.environment for observations in self._cells.values() for one in observations]
        variables = [facts.get("variables", {}) for facts in environments]
        merged = _common([{name: fact for name, fact in facts.items() if name != "variables"} for facts in environments])
        # A variable that some were measured without differs too; a fact that some do not tell may be the same.
        names = {name for told in variables for name in told}
        return {**merged, "variables": _common([{name: told.get(name, "") for name in sorted(names)} for told in variables])}


def _common(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The values that all of `tables` with this key have; `several` where they differ."""
    merged: dict[str, Any] = {}
    for table in tables:
        for name, value in table.items():
            if merged.setdefault(name, value) != value:
                merged[name] = "several"
    return merged


def _check_version(observation: Observation) -> None:
    version = vllm_of(observation)
    try:
        Version(version or "0")
    except InvalidVersion:
        raise ObservationError(f"{observation.path}: environment.vllm: {version[:80]!r} is no version") from None


def _order(version: str) -> tuple[Version, str]:
    return Version(version or "0"), version
