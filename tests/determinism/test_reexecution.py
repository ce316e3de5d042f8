"""What another machine says that a format generated is re-executed here by every format that runs here."""

import pytest

from quantdet.observations.claims import Claim
from quantdet.session.cases.judge import Judge


@pytest.mark.compares_formats
def test_reexecution(claim: Claim, judge: Judge) -> None:
    """The claimed format matches its claim better than formats with other numbers do, above the hardware difference."""
    judge.reexecution(claim)
