"""The checkpoint configurations of `tests/layouts`: rows and makers agree, and the folders are the same bytes everywhere."""

import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from layouts import make, rows, table
from quantdet.checkpoints import numbers, tensors

# Over the files of all of them. It holds on every machine; who changes one has changed what its row was measured with.
GOLDEN = "6f2760217d7a3b60285745ab0b0731da07d2e1e7665c9f910b5cbbd578ad645b"
MOST_CPU_SECONDS = 20.0

ROWS = rows.rows()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Path], float]]:
    """All folders by name, and the CPU time that making them took, seconds."""
    began = time.process_time()
    found = make.make(None, tmp_path_factory.mktemp("configurations"))
    yield found, time.process_time() - began


def digest(folder: Path) -> str:
    """SHA-256 over the files of a folder, with their names."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        found.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return found.hexdigest()


def test_every_row_has_its_maker() -> None:
    """And no maker is without a row; there are more than fifty."""
    assert sorted(make.MADE) == sorted(ROWS)
    assert len(ROWS) > 50


def test_the_readme_is_the_table() -> None:
    """Committed as it is generated: cd tests && python -m layouts.table > layouts/README.md"""
    assert table.text(ROWS) == (rows.FILE.parent / "README.md").read_text(encoding="utf-8")


def test_the_same_bytes_on_every_machine(made: tuple[dict[str, Path], float]) -> None:
    folders, _ = made
    whole = hashlib.sha256("".join(f"{name} {digest(path)}\n" for name, path in sorted(folders.items())).encode())

    assert whole.hexdigest() == GOLDEN


def test_made_quickly(made: tuple[dict[str, Path], float]) -> None:
    """A run over all of them has something else to wait for."""
    assert made[1] < MOST_CPU_SECONDS


def test_no_two_are_the_same(made: tuple[dict[str, Path], float]) -> None:
    """A fault that changes nothing would be one."""
    folders, _ = made

    assert len({digest(path) for path in folders.values()}) == len(folders)


def same_numbers() -> list[tuple[str, str]]:
    """Rows that say of whom they have the numbers, and this other one."""
    found = [(name, re.search(r"the numbers of `([\w-]+)`", row.what)) for name, row in ROWS.items()]
    return [(name, match[1]) for name, match in found if match]


@pytest.mark.parametrize(("name", "other"), same_numbers(), ids=lambda one: one)
def test_the_numbers_of_another(made: tuple[dict[str, Path], float], name: str, other: str) -> None:
    """Where the suite decodes both, the digests of their numbers are equal; else it says that it did not."""
    one, two = (numbers.of(made[0][this], tensors.tensors_sha256(made[0][this])) for this in (name, other))

    assert two.startswith("decoded:")
    assert one == two or one.startswith("bytes:")


def test_most_of_these_numbers_are_decoded(made: tuple[dict[str, Path], float]) -> None:
    decoded = {
        name for name, _ in same_numbers() if numbers.of(made[0][name], tensors.tensors_sha256(made[0][name]))[:8] == "decoded:"
    }

    assert {"gptq-static-ordered", "ct-w4a16-g32", "ct-w4a16-g128", "ct-w4a16-channel", "ct-w4a16-asym-g128"} <= decoded


def test_what_is_good_can_be_read(made: tuple[dict[str, Path], float]) -> None:
    """Every tensor of every file, by the suite's own reader."""
    good = [name for name, row in ROWS.items() if row.cpu == "BIT_EXACT"]

    assert all(tensors.load_folder(made[0][name]) for name in good)


def test_an_unknown_name_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no-such"):
        make.make(["gptq-g32", "no-such"], tmp_path)

    assert not list(tmp_path.iterdir())


ROW = """
[[section]]
title = "One"
[[section.configuration]]
name = "a"
title = "t"
what = "w"
cpu = "BIT_EXACT"
message = "m"
bare = "runs"
kernels = "K x8"
sm90 = { "0.26.0" = "BIT_EXACT K, measured" }
"""


def test_a_row_is_read(tmp_path: Path) -> None:
    """A fault of the checkpoint is the same everywhere; what is not said is not known."""
    path = tmp_path / "rows.toml"
    path.write_text(ROW + ROW.replace('"a"', '"b"').replace('cpu = "BIT_EXACT"', 'cpu = "INVALID"'), encoding="utf-8")
    found = rows.rows(path)

    assert rows.Expected("BIT_EXACT", "K", True) == found["a"].on_sm90("0.26.0")
    assert found["a"].on_sm90("0.33.0") is None and not found["a"].silent
    assert rows.Expected("INVALID") == found["b"].on_sm90("0.33.0") and found["b"].silent


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('cpu = "BIT_EXACT"', 'cpu = "FINE"', "a: unknown: FINE"),
        ('cpu = "BIT_EXACT"', 'cpu = "UNSUPPORTED"', "a: UNSUPPORTED, and yet vLLM ran it"),
        ('"0.26.0"', '"0.26"', "a: unknown: 0.26"),
        ("EXACT K, measured", "EXACT K, seen", "a: not VERDICT"),
        ('kernels = "K x8"', "", "a: title, what"),
        ('message = "m"', 'message = ""', "a: title, what"),
        ('message = "m"', 'mesage = "m"', "a: .*mesage"),
        ("", ROW, "a stands twice"),
    ],
)
def test_a_row_that_is_none(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "rows.toml"
    path.write_text(ROW.replace(old, new) if old else ROW + new, encoding="utf-8")

    with pytest.raises(ValueError, match=words):
        rows.rows(path)
