"""The suite's options of pytest, as one table: the parser, the rerun command, the entry point and the documentation read it.

Standard library only: the entry point (`quantdet.rootdir`) is loaded by every pytest of an environment.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Option:
    """One option.

    kind: what its value is; a "flag" has none. many: may be given again. decides: what a verdict says depends on it, so that a
    rerun command has to repeat it; an option that only chooses cases or workers, or only writes, is left out of that command.
    """

    name: str
    kind: Literal["path", "text", "integer", "number", "flag"]
    help: str
    metavar: str = ""
    many: bool = False
    decides: bool = True

    @property
    def attribute(self) -> str:
        """The field of `options.Options`: `--max-flip-rate` is `max_flip_rate`."""
        return self.name.removeprefix("--").replace("-", "_")


OPTIONS = (
    Option("--matrix", "path", "Matrix file (default: quant_matrix.toml of the suite)", "PATH"),
    Option(
        "--expect", "path",
        "[[expect]] rows of your own, which count before the matrix's. May be given again: the first row that fits counts",
        "FILE", many=True,
    ),
    Option("--hardware", "text", "Collect only the cells of this hardware row", "ID"),
    Option("--require-hardware", "text", "Collect only this row; what it lacks is an error, not a skip", "ID"),
    Option(
        "--ignore-native", "flag",
        "Run formats whose number format this chip does not multiply natively, e.g. NVFP4 W4A4 on Hopper; what executes is "
        "reported",
    ),
    Option("--repeats", "integer", "Calls of each request in an engine lifetime", "N"),
    Option(
        "--max-flip-rate", "number",
        "Repeat until no flip bounds the flip rate by P at 95 % (0.05: 59 repeats, 0.01: 299), or until one is found", "P",
    ),
    Option("--lifetimes", "integer", "Engine lifetimes per cell; on CUDA the last one starts with cold caches", "N"),
    Option("--no-controls", "flag", "Seed no defect; the report says that it is uncontrolled"),
    Option("--no-hidden-states", "flag", "Take no hidden states, whatever the matrix says"),
    Option("--store", "path", "Observations; finished cells found here are not measured again", "DIR"),
    # The store holds what a verdict was about: a rerun asks it.
    Option("--fresh", "flag", "Measure again what the store already has", decides=False),
    Option(
        "--replay", "path",
        "Judge the observations in this folder; start no engine. May be given again: the folders are judged together", "DIR",
        many=True,
    ),
    Option("--record", "path", "Copy what was measured into this folder of recordings", "DIR", decides=False),
    Option(
        "--reference", "path",
        "Recordings whose generated tokens are re-executed here (default: fixtures/recordings); may be given again", "DIR",
        many=True,
    ),
    Option("--report", "path", "Write DIR/report.html, and a bug bundle for every NOISY or INVALID cell", "DIR", decides=False),
    Option("--allow-download", "flag", "Fetch weights that are not here"),
)  # fmt: skip

PATHS = tuple(option.name for option in OPTIONS if option.kind == "path")


def markdown() -> str:
    """The table for people: option, what it does."""
    rows = [f"| `{' '.join(filter(None, (one.name, one.metavar)))}` | {one.help} |\n" for one in OPTIONS]
    return "| option | what it does |\n|---|---|\n" + "".join(rows)
