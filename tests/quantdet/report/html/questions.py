"""Questions of the published experiments, and the answer of every model and machine that was asked."""

from collections.abc import Sequence
from dataclasses import dataclass

from quantdet.report.case import Case
from quantdet.report.html.verdicts import Tag, place, tag


@dataclass(frozen=True)
class Question:
    """What was asked, and `(where, verdict, answer)` of each case."""

    name: str
    asks: str
    answers: list[tuple[str, Tag, str]]


def answered(cases: Sequence[Case]) -> list[Question]:
    """One per question, in the order of the cases."""
    found: dict[tuple[str, str], Question] = {}
    for case in cases:
        known = tag(case)
        if case.test == "test_question" and known is not None:
            name, asks = case.format, case.text("asks")
            question = found.setdefault((name, asks), Question(name, asks, []))
            # Verdict and case stand beside it.
            question.answers.append((f"{case.model} on {place(case)}", known, case.why))
    return list(found.values())
