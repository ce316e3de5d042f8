"""`--part K/N`: every N-th mutant, from the K-th; a push runs a part of them, a schedule all."""

import re

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="K/N", help="only the K-th of N equal parts of the mutants, for example 2/3")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--part")
    if chosen is None:
        return
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", chosen)
    if match is None or int(match[1]) > int(match[2]):
        raise pytest.UsageError(f"--part: needs K/N with K from 1 to N, have {chosen!r}")
    mutants = [item for item in items if "mutant" in getattr(getattr(item, "callspec", None), "params", {})]
    kept = set(mutants[int(match[1]) - 1 :: int(match[2])])
    left_out = [item for item in mutants if item not in kept]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
