"""`--part K/N`: a push judges a part of the configurations, a schedule all."""

import pytest

from layouts.part import chosen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="K/N", default="1/1", help="only the K-th of N equal parts of the configurations")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        known = chosen(metafunc.config)
        metafunc.parametrize("row", known, ids=[row.name for row in known])
