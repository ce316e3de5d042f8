"""The suite's options of pytest, as one table: the parser, the rerun command, the entry point and the documentation read it.

Standard library only: the entry point (`quantdet.rootdir`) is loaded by every pytest of an environment.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Option:
    """One option.

    kind: what its value is; a "flag" has none, a "place" is a path or the name of a repository. many: may be given again.
    decides: what a verdict says depends on it, so that a rerun command has to repeat it; an option that only chooses cases or
    workers, or only writes, is left out of that command.
    """

    name: str
    kind: Literal["path", "place", "text", "integer", "number", "flag"]
    help: str
    metavar: str = ""
    many: bool = False
    decides: bool = True

    @property
    def attribute(self) -> str:
        """The field of `options.Options`: `--max-flip-rate` is `max_flip_rate`."""
        return self.name.removeprefix("--").replace("-", "_")


# `decides=False` of --fresh: the store holds what a verdict was about, and a rerun asks it.
OPTIONS = (
    Option(
        "--model", "place",
        "Judge this checkpoint, as its own configuration describes it: a folder, a .gguf file, or ORG/NAME[@REVISION] in the "
        "local hub cache. The models of the matrix are left out. May be given several times.",
        "PATH|REPO", many=True,
    ),
    Option("--base", "place", "The unquantized checkpoint that --model was made from, as one more format.", "PATH|REPO"),
    Option("--same-base", "flag", "The checkpoints of --model are of one base: compare them with each other."),
    Option(
        "--prompts", "path",
        "Prompts for --model: one JSON object a line, with text, messages or ids.",
        "FILE",
    ),
    Option(
        "--engine-arg", "text",
        "An argument of vLLM for --model, such as kv_cache_dtype=fp8. It is obeyed or refused. May be given several times.",
        "NAME=VALUE", many=True,
    ),
    Option("--repeats", "integer", "Repeats of each request in an engine process.", "N"),
    Option(
        "--max-flip-rate", "number",
        "As many repeats as bound the flip rate by P: 0.05 makes 59, 0.01 makes 299. Fewer where noise is found.",
        "P",
    ),
    Option(
        "--lifetimes", "integer",
        "Engine processes per cell; adds test_restart. On CUDA the last one starts with empty caches.",
        "N",
    ),
    Option("--no-controls", "flag", "Plant no defect. The report says that the run is uncontrolled."),
    Option("--no-hidden-states", "flag", "Take no hidden states, whatever the matrix says."),
    Option("--hardware", "text", "Collect only the cells of this hardware row.", "ID"),
    Option(
        "--require-hardware", "text",
        "The same, and whatever that row lacks is an error instead of a skip. A run that measured nothing fails.",
        "ID",
    ),
    Option(
        "--ignore-native", "flag",
        "Also run formats whose numbers the chip cannot multiply, such as NVFP4 W4A4 on Hopper. The kernel that executes "
        "is reported, also under --require-hardware.",
    ),
    Option("--store", "path", "Where observations are kept. The default is a folder in pytest's cache.", "DIR"),
    Option("--fresh", "flag", "Measure again what the store already has.", decides=False),
    Option("--record", "path", "Copy what was measured into a folder of recordings.", "DIR", decides=False),
    Option(
        "--replay", "path",
        "Judge the observations in a folder and start no engine. Several folders are judged together.",
        "DIR", many=True,
    ),
    Option(
        "--reference", "path",
        "Recordings whose claims are re-executed here (default: fixtures/recordings). May be given several times.",
        "DIR", many=True,
    ),
    Option(
        "--report", "path",
        "Write DIR/report.html, and a bug bundle for every NOISY or INVALID cell.",
        "DIR", decides=False,
    ),
    Option("--matrix", "path", "Another matrix file.", "PATH"),
    Option(
        "--expect", "path",
        "[[expect]] rows of your own, which count before those of the matrix. May be given several times: the first row "
        "that fits counts.",
        "FILE", many=True,
    ),
    Option("--allow-download", "flag", "Fetch weights that are not here."),
)  # fmt: skip

# Whose values pytest would take for test files, where they exist.
PATHS = tuple(option.name for option in OPTIONS if option.kind in ("path", "place"))


def markdown() -> str:
    """The rows of the table for people (tests/determinism/running.md)."""
    names = {one: " ".join(filter(None, (one.name, one.metavar))).replace("|", "\\|") for one in OPTIONS}
    return "".join(f"| `{names[one]}` | {one.help} |\n" for one in OPTIONS)
