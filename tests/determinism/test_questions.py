"""Questions that published experiments asked, each answered for the models and the hardware that are here."""

import pytest

from quantdet.judging.questions import Asked
from quantdet.session.cases.judge import Judge


@pytest.mark.compares_formats
def test_question(question: Asked, judge: Judge) -> None:
    """The answer is what the matrix expects of the formats that the question is about."""
    judge.question(question)
