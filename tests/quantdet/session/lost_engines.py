"""Cells whose engine refused or died in this run: their engine is not started again, for whatever case, control or question.

Workers of pytest-xdist share what they know through a folder beside the store: a re-execution may be another worker's than
the measurement of the same cell.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from quantdet.judging.results import Missing, Refusal
from quantdet.judging.verdicts import Verdict
from quantdet.matrix.cell import Cell
from quantdet.observations.store import LOST

Loss = Missing | Refusal


@dataclass(repr=False)
class Lost:
    """What became of engines that gave no observation, by cell.

    `root`: the store's folder; `run`: what the workers of one run call it, empty where there are none.
    """

    root: Path
    run: str = ""
    _known: dict[str, Loss] = field(default_factory=dict)

    @contextlib.contextmanager
    def turn(self, cell: Cell, dtype: str) -> Iterator[Loss | None]:
        """How the engine of `cell` was lost, if it was; nobody else of this run starts it inside the `with`."""
        folder = self._shared()
        with contextlib.nullcontext() if folder is None else FileLock(folder / f"{_name(cell)}.lock"):
            names = (_name(cell), _name(cell, dtype))
            for name in names:
                if name not in self._known and folder is not None:
                    self._read(name, folder / f"{name}.json")
            yield next((self._known[name] for name in names if name in self._known), None)

    def remember(self, cell: Cell, dtype: str, role: str, loss: Loss) -> None:
        """`cell` is not started again: of a measurement for nothing, of anything else in the same dtype.

        A re-execution has other requests than the measurement: that it ran out of time says nothing of the cell.
        """
        if role != "measure" and isinstance(loss, Missing) and loss.verdict is Verdict.TIMEOUT:
            return
        name = _name(cell, "" if role == "measure" else dtype)
        self._known[name] = loss
        folder = self._shared()
        if folder is not None:
            match loss:
                case Refusal():
                    told: dict[str, object] = {"refused": loss.message}
                case Missing():
                    told = {"verdict": str(loss.verdict), "reason": loss.reason, "log": loss.log, "excerpt": loss.excerpt}
            (folder / f"{name}.json").write_text(json.dumps(told), encoding="utf-8")

    def _read(self, name: str, path: Path) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            told = json.loads(path.read_text(encoding="utf-8"))
            if "refused" in told:
                self._known[name] = Refusal(told["refused"])
            else:
                self._known[name] = Missing(Verdict(told["verdict"]), told["reason"], told["log"], tuple(told["excerpt"]))

    def _shared(self) -> Path | None:
        if not self.run.isalnum():
            return None
        folder = self.root / LOST / self.run
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _name(cell: Cell, dtype: str = "") -> str:
    return ".".join(filter(None, (cell.id.replace("/", "."), dtype)))
