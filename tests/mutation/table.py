"""The table of the mutants for people: `(cd tests && python -m mutation.table)` writes README.md."""

from collections.abc import Sequence

from mutation.mutants import HERE, Mutant, load

README = HERE / "README.md"
_HEAD = """\
# Mutation score

A mutant is the judging code with one defect: one that a suite for determinism could have and stay green. Each has to be noticed
by the self-test that is named beside it.

```sh
pytest tests/mutation -n 2               # all of them: four to six minutes on 2 cores
pytest tests/mutation -k holm            # those whose name has "holm"
(cd tests && python -m mutation.table)   # writes this file from mutants.toml
```

**Score: {killed} of {killed}** ({modules} modules, {tests} self-tests).

A kill is a failed assertion of that self-test, in a copy of the checkout with the mutant; without it, the same test has passed.
A mutant that does not import or breaks down with another exception is no kill, nor is one whose test is missing or skipped. A
mutant that survives fails the run, and so does one whose old text is no longer in its module exactly once ("the code has moved:
update the mutant").

To add one, append a table to `mutants.toml`: what it does, the module, the shortest text that stands there once, in one line
where that is possible, what stands there instead, and the quickest self-test that has to fail. Where there is none, that is
what was missing: write it.

| mutant | what it does | module | killed by |
|---|---|---|---|
"""


def text(mutants: Sequence[Mutant]) -> str:
    """The whole README: what is written by hand, and one row per mutant, in file order."""
    head = _HEAD.format(
        killed=len(mutants), modules=len({one.file for one in mutants}), tests=len({one.killed_by for one in mutants})
    )
    rows = [f"| `{one.id}` | {_cell(one.does)} | `{one.file}` | `{_cell(one.killed_by)}` |\n" for one in mutants]
    return head + "".join(rows)


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


if __name__ == "__main__":
    README.write_text(text(load()), encoding="utf-8")
