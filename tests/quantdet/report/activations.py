"""Hidden states in the report: a word beside a cell's verdicts, and a row for each claim that carries fingerprints."""

from collections.abc import Mapping, Sequence
from typing import Any

from quantdet.report.reexecution import Verification, times
from quantdet.report.tables import fitted, nats, prose

LEGEND = (
    "hidden states of the generated positions, projected at random, mean relative L2 to the claim; SNR: of the nearest format "
    "with other numbers over the claim's own, by hidden states and by decode logprobs. The verdict is the logprobs'."
)


def word(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """`exact` where no layer differs in either phase; else the verdict, `!` where it is not expected; empty without any."""
    known = [case for name, case in cases.items() if name.startswith("activations")]
    worst = next((case for case in known if case["verdict"] != "BIT_EXACT" or not case["expected"]), None)
    if worst is None:
        return "exact" if known else ""
    return str(worst["verdict"]) + ("" if worst["expected"] else " !")


def sections(found: Sequence[Verification], width: int) -> list[str]:
    """A table of each place where some claim has fingerprints."""
    texts: list[str] = []
    for one in found:
        rows = []
        for claimed, data in one.claims.items():
            second = data.get("activations")
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
            texts.append(fitted(columns, rows, width, fold=fold, title=f"ACTIVATIONS: {one.where}"))
    return [*texts, prose(LEGEND, width)] if texts else []
