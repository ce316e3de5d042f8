"""The rows of `configurations.toml`, checked."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "configurations.toml"

BARE_RUNS = "runs"  # what `bare` says where vLLM loads a folder and generates
AT_THE_START = "exit 4"  # beside the words of verdicts: refused before there is a cell
VERDICTS = ("BIT_EXACT", "INVALID", "UNSUPPORTED", "UNAVAILABLE", AT_THE_START)
SM90 = ("0.26.0", "0.33.0")  # versions of vLLM
_OF_THE_CHECKPOINT = ("INVALID", AT_THE_START)  # wherever it is judged, with whatever kernels


@dataclass(frozen=True)
class Expected:
    """A verdict; kernel: the class that has to multiply, "" where none is expected or known; measured: whether it was run."""

    verdict: str
    kernel: str = ""
    measured: bool = False


@dataclass(frozen=True)
class Row:
    """One checkpoint configuration.

    what: what it is, or what is wrong with it. cpu: the verdict of `--model` on a CPU without AMX; amx: on one with AMX, where
    that is another. message: a fragment of what the run has to say about it: of the kernels of a good one, the name of the
    fault, or the engine's words. bare: what vLLM 0.32.0 by itself did on a CPU without AMX: `runs`, or the end of its
    exception. kernels: what the linear layers and experts then executed. sm90: by version of vLLM; no entry: not known.
    """

    section: str
    name: str
    title: str
    what: str
    cpu: str
    message: str
    bare: str
    kernels: str = ""
    amx: str = ""
    sm90: Mapping[str, Expected] = field(default_factory=dict)

    @property
    def silent(self) -> bool:
        """Whether vLLM by itself runs a checkpoint that is no good, without a word."""
        return self.cpu == "INVALID" and self.bare == BARE_RUNS

    def on_sm90(self, version: str) -> Expected | None:
        """What is expected on a Hopper GPU; None: not known."""
        if self.cpu in _OF_THE_CHECKPOINT:
            return self.sm90.get(version, Expected(self.cpu))
        return self.sm90.get(version)


def rows(path: Path = FILE) -> dict[str, Row]:
    """Every row by name, in file order.

    Raises:
        ValueError: a name that stands twice, an unknown key, verdict or version, or a row that contradicts itself.
    """
    found: dict[str, Row] = {}
    for section in tomllib.loads(path.read_text(encoding="utf-8"))["section"]:
        for raw in section["configuration"]:
            row = _row(section["title"], raw)
            if row.name in found:
                raise ValueError(f"{path.name}: {row.name} stands twice")
            found[row.name] = row
    return found


def _row(section: str, raw: Mapping[str, Any]) -> Row:
    name = raw.get("name", "a row without name")
    try:
        sm90 = {version: _expected(said) for version, said in raw.get("sm90", {}).items()}
        row = Row(section, **{**raw, "sm90": sm90})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    wrong = [word for word in (row.cpu, row.amx or row.cpu) if word not in VERDICTS]
    wrong += [version for version in row.sm90 if version not in SM90]
    if wrong:
        raise ValueError(f"{name}: unknown: {', '.join(wrong)}")
    if not all((row.title, row.what, row.message, row.bare)) or (row.bare == BARE_RUNS) != bool(row.kernels):
        raise ValueError(f"{name}: title, what, message or bare is empty, or kernels are told of what did not run")
    if row.cpu == "UNSUPPORTED" and row.bare == BARE_RUNS:
        raise ValueError(f"{name}: UNSUPPORTED, and yet vLLM ran it")
    return row


def _expected(said: str) -> Expected:
    """`VERDICT`, `VERDICT Kernel`, with `, measured` behind it where it was."""
    words, _, measured = said.partition(", ")
    verdict, _, kernel = words.partition(" ") if not words.startswith(AT_THE_START) else (words, "", "")
    if verdict not in VERDICTS or measured not in ("", "measured") or " " in kernel:
        raise ValueError(f"not VERDICT, VERDICT KERNEL, or that and ', measured': {said!r}")
    return Expected(verdict, kernel, bool(measured))
