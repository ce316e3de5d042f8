"""The README of the matrix: its examples are taken as they stand, and no key is left out."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from quantdet.matrix.expectations import Expect
from quantdet.matrix.load import load
from quantdet.matrix.models import Model
from quantdet.matrix.pins import Pin
from quantdet.matrix.rows import Engine, Format, Hardware, Kernel
from quantdet.matrix.selectors import Question, Setting, When
from quantdet.matrix.shapes import Fires
from selftest.fakes.matrix import ROOT, TESTS

README = (TESTS / "quantdet" / "matrix" / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_an_example_works(tmp_path: Path, index: int) -> None:
    """At the end of a copy of the shipped matrix, or as a file of expectations beside it."""
    matrix, more, example = tmp_path / "m.toml", tmp_path / "mine.toml", EXAMPLES[index]
    own = example.startswith("# mine.toml")
    shipped = (ROOT / "quant_matrix.toml").read_text(encoding="utf-8")
    matrix.write_text(shipped if own else f"{shipped}\n{example}", encoding="utf-8")
    more.write_text(example, encoding="utf-8")

    assert load(matrix, [more] if own else []) != load(ROOT / "quant_matrix.toml")


@pytest.mark.parametrize("row", [Model, Format, Hardware, Kernel, Pin, Engine, Expect, When, Fires, Question, Setting])
def test_every_key_is_explained(row: type[BaseModel]) -> None:
    """In code marks, or in an example."""
    known = set(re.findall(r"[a-z_0-9]+", " ".join([*re.findall(r"`([^`\n]+)`", README), *EXAMPLES])))

    assert set() == set(row.model_fields) - known
