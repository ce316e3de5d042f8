"""Faults and hostile inputs, and what becomes of each: `cases.toml`, which the tests assert against, as a table.

cd tests && python -m faults.cases > faults/README.md
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ANY = "…"

INTRODUCTION = """\
# Faults and hostile input

Every row was made to happen: the tests that it names do it on the code that users run (an engine in a child process, the store,
a whole pytest run) and assert the verdict and the words that stand here. Generated from `cases.toml`; do not edit.

```sh
pytest tests/selftest -k "faults or hostile or interrupts"   # with the fake engine, which is a process too
pytest tests/faults                                           # on real vLLM, one to two minutes on 2 cores
QUANTDET_INJECT=sigkill:tiny-qwen3/int8_w8a8/* pytest -k tiny-qwen3   # see one: sigkill sigsegv hang oom oom-device
```

After every fault: the other cells of the run are judged, no process and no temporary folder of an engine stays, nothing
half-written is taken for whole, and a rerun measures what is missing and no more. What a run that was killed itself had not
finished in the store stays hidden there for a day. `…` stands for any text.
"""


@dataclass(frozen=True)
class Case:
    """One row. `test`: where it is shown, paths below `tests/`."""

    section: str
    id: str
    what: str
    made: str
    verdict: str
    message: str
    test: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """The message as a regular expression."""
        return ".*".join(re.escape(part) for part in self.message.split(ANY))


def cases() -> dict[str, Case]:
    """Every row by id."""
    raw = tomllib.loads((HERE / "cases.toml").read_text(encoding="utf-8"))
    found = [
        Case(section["title"], **{**row, "test": tuple(row["test"])})
        for section in raw["section"]
        for row in section["case"]
    ]  # fmt: skip
    table = {case.id: case for case in found}
    assert len(table) == len(found), "an id stands twice"
    return table


def rows(test: str) -> list[str]:
    """The ids of the rows that name `test` ("selftest/test_x.py::test_y"), to parametrize it with."""
    found = [case.id for case in cases().values() if test in case.test]
    assert found, f"no row names {test}"
    return found


def shows(id_: str, verdict: str, message: str) -> None:
    """What a test saw is what the row says."""
    case = cases()[id_]
    assert verdict == case.verdict, f"{id_}: {verdict}, the table says {case.verdict}: {message}"
    assert re.search(case.pattern, message, re.DOTALL), f"{id_}: the table says {case.message!r}: {message}"


def table() -> str:
    """The README."""
    lines = [INTRODUCTION]
    section = ""
    for case in cases().values():
        if case.section != section:
            section = case.section
            lines += [f"## {section}\n", "| what | how it is made | verdict | message | shown by |", "|---|---|---|---|---|"]
        tests = "<br>".join(f"`{name}`" for name in case.test)
        cells = (case.what, case.made, f"`{case.verdict}`", _code(case.message), tests)
        lines.append(f"| {' | '.join(cells)} |")
        following = list(cases().values())
        place = following.index(case)
        if place + 1 == len(following) or following[place + 1].section != section:
            lines.append("")
    return "\n".join(lines)


def _code(text: str) -> str:
    """A message as code in a table's cell; nothing where nobody is left to say anything."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}".replace("|", "\\|") if text else ""


if __name__ == "__main__":
    print(table(), end="")
