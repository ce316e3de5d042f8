"""Hidden states in the report: a word beside a cell's verdicts, and a row for each claim that carries fingerprints."""

from collections.abc import Mapping, Sequence

from quantdet.judging.verdicts import Verdict
from quantdet.report.case import Case
from quantdet.report.reexecution import Verification, times
from quantdet.report.text_layout import fitted, nats, prose

LEGEND = (
    "hidden states of the generated positions, projected at random, mean relative L2 to the claim; SNR: of the nearest format "
    "with other numbers over the claim's own, by hidden states and by decode logprobs. The verdict is the logprobs'."
)


def cases_of(cases: Mapping[str, Case]) -> list[Case]:
    """The cases about hidden states among those of a cell, which are named `hidden_states` and the phase."""
    return [case for name, case in cases.items() if name.startswith("hidden_states")]


def others(cases: Mapping[str, Case]) -> list[Case]:
    """The cases about anything else: n and bound of a cell are theirs, since hidden states are of further requests."""
    return [case for name, case in cases.items() if not name.startswith("hidden_states")]


def deciding(cases: Mapping[str, Case]) -> Case | None:
    """Of a cell's cases about hidden states the one that speaks for both phases; None without any.

    What is not expected stands before what is not BIT_EXACT, and that before the rest.
    """
    return min(cases_of(cases), key=lambda case: (case.expected, case.verdict is Verdict.BIT_EXACT), default=None)


def word(cases: Mapping[str, Case]) -> str:
    """`exact` where no layer differs in either phase; else the verdict, `!` where it is not expected; empty without any."""
    found = deciding(cases)
    if found is None:
        return ""
    if not found.expected:
        return f"{found.verdict} !"
    return "exact" if found.verdict is Verdict.BIT_EXACT else str(found.verdict)


def sections(found: Sequence[Verification], width: int) -> list[str]:
    """A table of each place where some claim has fingerprints."""
    texts: list[str] = []
    for one in found:
        rows = []
        for claimed, data in one.claims.items():
            second = data.get("hidden_states")
            if not second:
                continue
            distances = second["distances"]
            rows.append((
                claimed, second["word"], nats(distances.get(one.own(claimed))), second["closest"] or "none",
                nats(distances.get(second["closest"])), times(second["snr"]), times(second["snr_logprobs"]),
                f"{second['own']}/{second['prompts']}",
            ))  # fmt: skip
        if rows:
            columns = ("claimed", "says", ">own", "nearest other", ">its", ">SNR", ">of logprobs", ">own nearest")
            fold = ("claimed", "nearest other", "of logprobs", "own nearest")
            texts.append(fitted(columns, rows, width, fold=fold, title=f"HIDDEN STATES: {one.where}"))
    return [*texts, prose(LEGEND, width)] if texts else []
