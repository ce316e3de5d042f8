"""The mutants of `mutants.toml`: defects of the judging code, each with the self-test that has to notice it."""

import ast
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
FILE = HERE / "mutants.toml"


class Moved(Exception):
    """A mutant does not fit the code any more: it has to be written anew, or its test named anew."""


@dataclass(frozen=True)
class Mutant:
    """One defect.

    does: the defect in plain words, as the end of "what if ..."; file: below tests/quantdet; old: text that stands in it
    exactly once; new: what stands there instead; killed_by: node id of a self-test, below tests/selftest.
    """

    id: str
    does: str
    file: str
    old: str
    new: str
    killed_by: str

    @property
    def path(self) -> Path:
        """The module, from the root of the checkout."""
        return Path("tests", "quantdet", self.file)

    @property
    def test(self) -> str:
        """The self-test, from the root of the checkout."""
        return f"tests/selftest/{self.killed_by}"

    def mutated(self, root: Path) -> str:
        """The text of the module with the defect, for the checkout in `root`.

        Raises:
            Moved: the old text is not there exactly once, or what comes out is no other program.
        """
        path = root / self.path
        if not path.is_file():
            raise Moved(f"{self.id}: {self.path} is not there: the code has moved: update the mutant")
        text = path.read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise Moved(f"{self.id}: old text is {found} times in {self.path}: the code has moved: update the mutant")
        changed = text.replace(self.old, self.new)
        try:
            # Unlike the text, the tree does not know comments and line breaks: a mutant that changes nothing else is none.
            same = ast.dump(ast.parse(changed)) == ast.dump(ast.parse(text))
        except SyntaxError as error:
            raise Moved(f"{self.id}: is no Python (line {error.lineno}: {error.msg}): update the mutant") from None
        if same:
            raise Moved(f"{self.id}: changes nothing: update the mutant")
        return changed


def load(path: Path = FILE) -> list[Mutant]:
    """The mutants in file order.

    Raises:
        ValueError: a key is missing, unknown, or no text; or an id is there twice.
    """
    keys = {field.name for field in fields(Mutant)}
    found = []
    for number, row in enumerate(tomllib.loads(path.read_text(encoding="utf-8"))["mutant"], 1):
        name = row.get("id", f"number {number}")
        if wrong := sorted(keys ^ row.keys()) or [key for key, value in row.items() if not isinstance(value, str)]:
            raise ValueError(f"{path.name}: mutant {name}: {', '.join(wrong)}: missing, unknown, or no text")
        found.append(Mutant(**row))
    ids = [mutant.id for mutant in found]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"{path.name}: id used twice: {', '.join(twice)}")
    return found
