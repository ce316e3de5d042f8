"""Questions of the published experiments, and the answer of every model and machine that was asked."""

from collections.abc import Sequence
from dataclasses import dataclass

from quantdet.report.html.data import Case
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
        if case["test"] == "test_question" and known is not None:
            p = case["properties"]
            name, asks = p["case.format"], p.get("asks", "")
            question = found.setdefault((name, asks), Question(name, asks, []))
            question.answers.append((f"{p['case.model']} on {place(case)}", known, answer(case)))
    return list(found.values())


def answer(case: Case) -> str:
    """The message without the verdict and the case, which stand beside it."""
    return str(case["why"])
