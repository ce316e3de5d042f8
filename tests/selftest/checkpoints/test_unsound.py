"""Rows whose words are not the checkpoint's, and checkpoints that contradict themselves."""

import shutil
from pathlib import Path

import pytest

from quantdet import checkpoints
from quantdet.checkpoints.tensors import load, save
from quantdet.checkpoints.unsound import contradiction, told, unsound
from quantdet.matrix.rows import Format
from selftest.fakes.checkpoints import BF16, W4, make_format, make_model

AWQ, GPTQ = make_format("awq", "int4-asym"), make_format("gptq", "int4-sym")
INT8 = make_format("ct", "int8-channel", "int8")
OWN = make_format("own", "own")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    made = {"plain": BF16, "awq": AWQ, "gptq": GPTQ, "ct": W4, "int8": INT8}
    return {name: checkpoints.resolve("m", make_model(), one, cache=root).path for name, one in made.items()}


@pytest.mark.parametrize(
    ("folder", "row", "words"),
    [
        ("awq", GPTQ, "needs layout gptq, the checkpoint has awq"),
        ("ct", AWQ, "needs layout awq, the checkpoint has compressed-tensors"),
        ("gptq", BF16, "needs layout plain, the checkpoint has gptq"),
        ("plain", GPTQ, "needs layout gptq, the checkpoint has no quantization"),
        ("gptq", make_format("gptq", "int8-sym"), "needs weights int8-sym, the checkpoint has int4-sym"),
        ("int8", W4, "needs weights int4-sym, the checkpoint has int8-channel and activations none, the checkpoint has int8"),
    ],
)
def test_false_green_another_layout_or_other_numbers_under_a_row(
    folders: dict[str, Path], folder: str, row: Format, words: str
) -> None:
    assert words in contradiction(folders[folder], row)


@pytest.mark.parametrize(
    ("folder", "row"),
    [("plain", BF16), ("awq", AWQ), ("gptq", GPTQ), ("ct", W4), ("int8", INT8), ("int8", OWN), ("plain", OWN)],
)
def test_a_row_that_says_what_the_checkpoint_says(folders: dict[str, Path], folder: str, row: Format) -> None:
    assert "" == contradiction(folders[folder], row)


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    assert "need config.json" in contradiction(tmp_path, GPTQ)


def test_flaws_come_before_what_the_row_says(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(folders["awq"], folder)
    tensors = dict(load(folder / "model.safetensors"))
    name = next(name for name in tensors if name.endswith("scales"))
    tensors[name] = tensors[name] * 0
    save(tensors, tmp_path / "new")
    (tmp_path / "new").replace(folder / "model.safetensors")
    found = checkpoints.Checkpoint(folder, "0" * 64, "here")

    assert f"the checkpoint contradicts itself: {name}" in unsound(found, GPTQ, tmp_path)


def test_many_reasons_are_one_line() -> None:
    assert "the checkpoint contradicts itself: a; b; c; and 2 more" == told(["a", "b", "c", "d", "e"])
    assert "the checkpoint contradicts itself: a; b; c" == told(["a", "b", "c"])
