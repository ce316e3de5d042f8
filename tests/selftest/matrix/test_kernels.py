"""Which layers a kernel takes, and which of an ordered list is chosen for one."""

from typing import Any

import pytest

from quantdet.matrix.cell import Cell
from quantdet.matrix.kernels import Kernel, Shape, chosen, takes
from quantdet.matrix.load import load
from quantdet.matrix.matrix import Matrix
from selftest.fakes.matrix import ROOT


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return load(ROOT / "quant_matrix.toml")


def shape(**changes: Any) -> Shape:
    return Shape(**({"k": 4096, "n": 4096, "bits": 4, "group": 128, "dtype": "I32"} | changes))


# What vLLM's classes say of themselves (`can_implement`), read off its source.
@pytest.mark.parametrize(
    ("kernel", "version", "changes", "answer"),
    [
        ("machete", "0.33.0", {}, True),
        ("machete", "0.33.0", {"group": 64}, True),
        ("machete", "0.33.0", {"group": 4096}, True),  # a channel's
        ("machete", "0.33.0", {"group": 32}, False),
        ("machete", "0.33.0", {"bits": 8}, True),
        ("machete", "0.33.0", {"bits": 3}, False),
        ("machete", "0.33.0", {"k": 96, "group": 96}, False),
        ("machete", "0.33.0", {"n": 192}, False),
        ("machete", "0.33.0", {"dtype": "F8_E4M3", "group": 32}, True),  # its requirements are those of packed integers
        ("marlin", "0.33.0", {"group": 32}, True),
        ("marlin", "0.33.0", {"group": 16}, False),
        ("marlin", "0.33.0", {"k": 10944, "group": 32}, True),
        ("marlin", "0.23.0", {"k": 10944, "group": 32}, False),
        ("marlin", "0.23.0", {"n": 96}, False),
        ("marlin", None, {"n": 96}, None),
        ("marlin", None, {}, True),
        ("humming", "0.33.0", {"group": 7, "bits": 3, "k": 5, "n": 3}, True),
        ("cpu_wna16", "0.32.0", {"group": 62, "k": 992}, True),
        ("cpu_wna16", "0.32.0", {"group": 31, "k": 992}, False),
        ("cpu_wna16", "0.32.0", {"k": 48, "group": 48}, False),
        ("cpu_wna16", "0.32.0", {"n": 48}, False),
        ("cpu_wna16", "0.32.0", {"bits": 8}, False),
        ("machete", "0.33.0", {"group": None}, None),
        ("machete", "0.33.0", {"n": None}, None),
        ("machete", "0.33.0", {"bits": None}, None),
        ("machete", "0.33.0", {"group": None, "n": 192}, False),
    ],
)
def test_layers_that_a_kernel_takes(
    matrix: Matrix, kernel: str, version: str | None, changes: dict[str, Any], answer: bool | None
) -> None:
    """By bits, groups, K and N; None where one of them is not known and would decide."""
    assert answer is takes(matrix.kernels[kernel], shape(**changes), version)


@pytest.mark.parametrize("format_id", ["gptq_auto", "awq_auto", "ct_w4a16", "int8_w8a16"])
@pytest.mark.parametrize(
    ("version", "packages", "group", "wanted"),
    [
        ("0.20.2", (), 128, "machete"), ("0.20.2", (), 32, "marlin"), ("0.31.0", ("humming-kernels",), 32, "marlin"),
        ("0.33.0", ("humming-kernels",), 128, "machete"), ("0.33.0", ("humming-kernels",), 32, "humming"),
        ("0.33.0", (), 32, "marlin"), ("0.33.0", None, 32, "humming or marlin"),
    ],
)  # fmt: skip
def test_groups_of_32_on_hopper(
    matrix: Matrix, format_id: str, version: str, packages: tuple[str, ...] | None, group: int, wanted: str
) -> None:
    """Machete does not take them: Marlin before 0.32, then Humming where it is installed."""
    bits = 8 if matrix.formats[format_id].weights.startswith("int8") else 4
    cell = Cell("tiny-qwen3", format_id, "sm90")

    assert wanted == matrix.kernel_classes(cell, version, packages, shape(group=group, bits=bits))[0]


@pytest.mark.parametrize("version", [None, "0.20.2", "0.33.0"])
@pytest.mark.parametrize("packages", [None, (), ("humming-kernels",)])
def test_without_a_layer_the_first_kernel_is_meant(
    matrix: Matrix, version: str | None, packages: tuple[str, ...] | None
) -> None:  # fmt: skip
    """As for recordings that tell no shapes."""
    for format_id in ("gptq_auto", "int8_w8a16", "int8_w8a16_asym"):
        assert "machete" == matrix.kernel_classes(Cell("tiny-qwen3", format_id, "sm90"), version, packages)[0], format_id


def test_a_layer_that_no_kernel_of_the_list_takes_is_not_judged(matrix: Matrix) -> None:
    """Nor one whose weights are stored in other numbers than the format's."""
    cell = Cell("tiny-qwen3", "gptq_auto", "sm90")

    assert ("auto", ()) == matrix.kernel_classes(cell, "0.26.0", (), shape(group=16))
    assert ("auto", ()) == matrix.kernel_classes(cell, "0.26.0", (), shape(dtype="F8_E4M3"))
    assert "machete" == matrix.kernel_classes(cell, "0.26.0", (), shape(dtype=""))[0]
    assert "marlin" == matrix.kernel_classes(Cell("tiny-qwen3", "gptq_marlin", "sm90"), "0.26.0", (), shape(group=16))[0]
    assert "marlin" == matrix.kernel_classes(Cell("tiny-qwen3", "mxfp4", "sm90"), "0.26.0", (), shape(dtype="U8", group=32))[0]


def test_what_is_not_known_leaves_several() -> None:
    """Kernels that may take a layer, up to the first that does and is installed."""
    rows = {
        "choosy": Kernel(hardware=("*",), groups=(64,)), "extra": Kernel(hardware=("*",), package="p"),
        "any": Kernel(hardware=("*",)), "last": Kernel(hardware=("*",)),
    }  # fmt: skip
    names = list(rows)

    assert ("choosy", "extra", "any") == chosen(names, rows, None, None, Shape())
    assert ("choosy", "any") == chosen(names, rows, None, (), Shape())
    assert ("extra",) == chosen(names, rows, None, ("p",), Shape(group=32))
    assert () == chosen(["choosy"], rows, None, None, Shape(group=32))
