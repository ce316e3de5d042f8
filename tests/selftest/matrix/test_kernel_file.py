"""What is read off vLLM's source lies in a file beneath a matrix: which one, whose rows count, and whose mistakes they are."""

import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from quantdet.matrix.kernel_file import SHIPPED
from quantdet.matrix.load import MatrixError, load
from quantdet.matrix.matrix import Matrix
from selftest.fakes.matrix import MATRIX, ROOT

# The small matrix in two files: what `KERNELS` has, `LEAN` has not.
_TABLES = re.compile(r"^\[(?:kernels\.\w+|\[pin\])\]\n(?:[^\[\n].*\n)+\n?", re.MULTILINE)
LEAN = _TABLES.sub("", MATRIX)
KERNELS = "schema = 1\n" + "".join(_TABLES.findall(MATRIX))
FROM = 'kernels_from = "kernels.toml"\n'
PIN = '\n[[pin]]\nkernel = "fake8"\nlayout = ["ct"]\nargs = { executes = "%s" }\n'


def loaded(folder: Path, matrix: str, kernels: str | None = None) -> Matrix:
    """`matrix` in `folder`, and `kernels` beside it."""
    if kernels is not None:
        (folder / "kernels.toml").write_text(kernels, encoding="utf-8")
    path = folder / "m.toml"
    path.write_text(matrix, encoding="utf-8")
    return load(path)


def said(folder: Path, matrix: str, kernels: str | None = None) -> str:
    with pytest.raises(MatrixError) as caught:
        loaded(folder, matrix, kernels)
    return str(caught.value)


def executes(matrix: Matrix, format_id: str = "int8", version: str = "0.32.0") -> object:
    pin = matrix.pin_for(matrix.formats[format_id], version)
    return None if pin is None else pin.args["executes"]


def test_a_matrix_in_two_files_is_the_same_matrix(tmp_path: Path) -> None:
    """Kernels and pins in a file of their own, found from where the matrix lies."""
    assert "[kernels." not in LEAN and "[[pin]]" not in LEAN

    assert loaded(tmp_path, MATRIX) == loaded(tmp_path, FROM + LEAN, KERNELS).model_copy(update={"kernels_from": None})


def test_a_matrix_with_kernels_of_its_own_is_whole(tmp_path: Path) -> None:
    """Exactly its own: nothing of the suite's file is in it."""
    matrix = loaded(tmp_path, MATRIX)

    assert {"auto", "unquantized", "fake4", "fake8"} == set(matrix.kernels)
    assert (2, ()) == (len(matrix.pin), matrix.engine.unseen)


@pytest.mark.parametrize("head", ["", 'kernels_from = "vllm"\n'], ids=["unsaid", "said"])
def test_the_suites_own_kernels_lie_beneath_any_other(tmp_path: Path, head: str) -> None:
    """A matrix without kernels has those of the suite, wherever it lies; what their globs match is not its mistake."""
    gpus = {'"fake4"': '"marlin"', '"fake8"': '"cutlass"', '{ "cpu-*" =': '{ "sm90" =', ', hardware = "cpu-*" }': " }"}
    lean = LEAN
    for old, new in gpus.items():
        lean = lean.replace(old, new)
    shown = tomllib.loads(SHIPPED.read_text(encoding="utf-8"))

    matrix = loaded(tmp_path, head + lean)

    assert set(shown["kernels"]) == set(matrix.kernels)
    assert len(shown["pin"]) == len(matrix.pin)
    assert tuple(shown["engine"]["unseen"]) == matrix.engine.unseen
    assert {"linear_backend": "marlin"} == getattr(matrix.pin_for(matrix.formats["gptq"], "0.33.0"), "args", None)


def test_a_copy_of_the_shipped_matrix_may_add_to_it_anywhere(tmp_path: Path) -> None:
    """Kernels, pins and formats at its end come on top of the suite's own."""
    path = tmp_path / "mine.toml"
    shutil.copy(ROOT / "quant_matrix.toml", path)
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text + '\n[kernels.mine]\nhardware = ["sm*"]\nclasses = ["MineKernel"]\n'
        '\n[formats.gptq_mine]\nlike = "gptq"\ntitle = "mine"\nkernel = "mine"\n'
        '\n[[pin]]\nkernel = "mine"\nlayout = ["gptq"]\nargs = { linear_backend = "mine" }\n',
        encoding="utf-8",
    )

    matrix, shipped = load(path), load(ROOT / "quant_matrix.toml")

    assert {"mine"} == set(matrix.kernels) - set(shipped.kernels)
    assert "tiny-qwen3/gptq_mine/sm90" in {cell.id for cell in matrix.cells()}
    pin = matrix.pin_for(matrix.formats["gptq_mine"], "0.33.0")
    assert pin is not None and {"linear_backend": "mine"} == pin.args
    assert shipped.pin == matrix.pin[1:]


def test_rows_of_the_matrix_come_first(tmp_path: Path) -> None:
    """Its kernels, picks and engine facts replace those of the same name, its pins are looked up first; the rest stays."""
    picks = '[picks.{}]\n"cpu-*" = "{}"\n'
    engine = '\n[engine]\nunseen = ["A"]\ncaches = ["B"]\n'
    below = KERNELS + engine + picks.format("one", "fake8") + picks.format("two", "fake8")
    kernel = '\n[kernels.fake8]\nhardware = ["cpu-*"]\nclasses = ["Other"]\n'
    own = kernel + '[engine]\nunseen = ["C"]\n' + picks.format("one", "fake4")

    matrix = loaded(tmp_path, FROM + LEAN + own + PIN % "Other", below)

    assert (("Other",), ("Fake4Kernel",)) == (matrix.kernels["fake8"].classes, matrix.kernels["fake4"].classes)
    assert ("Other", "Fake4Kernel") == (executes(matrix), executes(matrix, "gptq"))
    assert (("C",), ("B",)) == (matrix.engine.unseen, matrix.engine.caches)
    assert {"one": {"cpu-*": "fake4"}, "two": {"cpu-*": "fake8"}} == matrix.picks


def test_a_pin_of_the_matrix_for_one_version_leaves_the_others(tmp_path: Path) -> None:
    """A new vLLM that is told otherwise is one row."""
    matrix = loaded(tmp_path, FROM + LEAN + PIN % "New" + 'vllm = ">=0.40"\n', KERNELS)

    assert ["Fake8Kernel", "New"] == [executes(matrix, version=version) for version in ("0.33.0", "0.40.1")]


def test_two_pins_of_one_file_that_differ_are_a_mistake_of_that_file(tmp_path: Path) -> None:
    """In either file."""
    assert f"{tmp_path / 'kernels.toml'}: 1 mistake\n  pin.2: differs from pin.1" in said(
        tmp_path, FROM + LEAN, KERNELS + PIN % "Other"
    )
    assert f"{tmp_path / 'm.toml'}: 1 mistake\n  pin.1: differs from pin.0" in said(
        tmp_path, FROM + LEAN + PIN % "One" + PIN % "Other", KERNELS
    )


BELOW: dict[str, tuple[str, str]] = {
    "unknown table": ("[models.x]\n", "models: unknown key"),
    "a choice of the user": ("[engine]\nmax_text_tokens = 9\n", "engine.max_text_tokens: unknown key"),
    "unknown key": ('[kernels.x]\nhardware = ["*"]\nclasses = ["X"]\ncolour = 1\n', "kernels.x.colour: unknown key"),
    "no classes": ('[kernels.x]\nhardware = ["*"]\n', "kernels.x.classes: missing"),
    "unsafe name": ('[kernels."../x"]\nhardware = ["*"]\nclasses = ["X"]\n', "kernels.../x: id must be"),
    "unsafe picks": ('[picks."X y"]\n"*" = "fake4"\n', "picks.X y: id must be"),
    "unknown kernel": ('[[pin]]\nkernel = "warp"\nlayout = ["ct"]\n', "pin.2.kernel: no kernel 'warp'"),
    "unknown layout": ('[[pin]]\nkernel = "fake4"\nlayout = ["zip"]\n', "pin.2.layout.0: Input should be"),
    "unknown picked kernel": ('[picks.one]\n"cpu-*" = "warp"\n', "picks.one.cpu-*: no kernel 'warp'"),
    "bad specifier of a pick": ('[picks.one]\n"cpu-*" = { "old" = "fake4" }\n', "picks.one.cpu-*.old: 'old' is not a version"),
    "ranges of a pick": (
        '[picks.one]\n"cpu-*" = { "<0.3" = "fake4", ">=0.2" = "fake8" }\n', "picks.one.cpu-*: '<0.3' and '>=0.2' both",
    ),
    "not printable": ('[kernels.x]\nhardware = ["*"]\nclasses = ["\\u001b"]\n', "kernels.x.classes.0: has a character"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BELOW)
def test_a_mistake_below_is_told_by_its_file(tmp_path: Path, kind: str) -> None:
    """And once: what a matrix takes over of a wrong file is not wrong in the matrix."""
    text, words = BELOW[kind]

    found = said(tmp_path, FROM + LEAN, KERNELS + text)

    assert found.startswith(f"{tmp_path / 'kernels.toml'}: ")
    assert f"\n  {words}" in found
    assert "m.toml" not in found


def test_mistakes_of_both_files_are_told_at_once(tmp_path: Path) -> None:
    """Each under its own file's name, rows by their number in that file."""
    wrong = '[[pin]]\nkernel = "warp"\nlayout = ["ct"]\n'

    found = said(tmp_path, (FROM + LEAN).replace('title = "AWQ"', 'titel = "AWQ"') + wrong, KERNELS + wrong)

    own, _, below = found.partition(str(tmp_path / "kernels.toml"))
    assert own.startswith(f"{tmp_path / 'm.toml'}: 3 mistakes\n")
    assert "pin.0.kernel: no kernel 'warp' in this matrix (row 1 of [[pin]]" in own
    assert "formats.awq.titel: unknown key" in own and "formats.awq.title: missing" in own
    assert below.startswith(": 1 mistake\n  pin.2.kernel: no kernel 'warp' in this matrix (row 3 of [[pin]]")


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ('"nothing.toml"', "1 mistake\n  kernels_from: no such file: "),
        ("3", "1 mistake\n  kernels_from: needs 'vllm'"),
        ('""', "1 mistake\n  kernels_from: needs 'vllm'"),
        ('"."', "not a regular file"),
        ('"' + "x" * 5000 + '"', "1 mistake\n  kernels_from: no such file: "),
    ],
)
def test_a_file_that_is_not_there(tmp_path: Path, named: str, words: str) -> None:
    """The key is named, and the file where there is something."""
    found = said(tmp_path, f"kernels_from = {named}\n{LEAN}")

    assert found.startswith(f"{tmp_path / 'm.toml' if 'kernels_from' in words else tmp_path}: ")
    assert words in found


def test_a_matrix_with_some_kernels_is_told_how_to_add_to_the_suites(tmp_path: Path) -> None:
    """Kernels of its own make it whole, so that `auto` is missing; the mistake says what was meant."""
    found = said(tmp_path, LEAN + '\n[kernels.mine]\nhardware = ["*"]\nclasses = ["X"]\n')

    assert (
        "kernels.auto: missing; kernel = 'auto' means vLLM's own choice (kernels_from = 'vllm' adds the suite's kernels)"
        in found
    )


def test_the_shipped_files_fit_each_other() -> None:
    """Every glob of the suite's file matches hardware of the shipped matrix, and every table of picks has a format."""
    raw: dict[str, Any] = tomllib.loads((ROOT / "quant_matrix.toml").read_text(encoding="utf-8"))
    below = tomllib.loads(SHIPPED.read_text(encoding="utf-8"))
    hardware = load(ROOT / "quant_matrix.toml").hardware
    globs = {glob for row in below["kernels"].values() for glob in row["hardware"]} | {
        g for row in below["picks"].values() for g in row
    }

    assert [] == [glob for glob in sorted(globs) if not any(Path(name).match(glob) for name in hardware)]
    assert set(below["picks"]) == {row["picks"] for row in raw["formats"].values() if "picks" in row}
    assert not {"kernels", "pin", "picks"} & set(raw)
