"""Which configurations a run is about: `--part K/N`, every N-th from the K-th."""

import re

import pytest

from layouts.rows import AT_THE_START, Row, rows


def chosen(config: pytest.Config) -> list[Row]:
    """The rows of this part that a run can judge; the others end it at its start.

    Raises:
        pytest.UsageError: no such part.
    """
    asked = config.getoption("--part")
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", asked)
    if match is None or int(match[1]) > int(match[2]):
        raise pytest.UsageError(f"--part: needs K/N with K from 1 to N, have {asked!r}")
    return [row for row in rows().values() if row.cpu != AT_THE_START][int(match[1]) - 1 :: int(match[2])]
