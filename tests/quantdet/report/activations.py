"""Hidden states in the report of re-executions: a second signal beside the logprobs, a row for each claim that carries some."""

from collections.abc import Sequence

from quantdet.report.reexecution import Verification, times
from quantdet.report.tables import broken, nats, prose, render, table

LEGEND = (
    "hidden states of the generated positions, projected at random, mean relative L2 to the claim; SNR: of the nearest format "
    "with other numbers over the claim's own, by hidden states and by decode logprobs. The verdict is the logprobs'."
)


def sections(found: Sequence[Verification], width: int) -> list[str]:
    """ACTIVATIONS of each place, where some claim has them."""
    texts: list[str] = []
    for one in found:
        rows = {claimed: data["activations"] for claimed, data in one.claims.items() if data.get("activations")}
        if not rows:
            continue
        texts.append(prose(f"ACTIVATIONS: {one.where}", width))
        names = ("claimed", "says", "own", "nearest other", "its", "SNR", "logprobs", "identified [95 %]")
        made = table(*names, fold=("claimed", "nearest other"))
        for claimed, data in rows.items():
            distances, own = data["distances"], one.own(claimed)
            made.add_row(
                broken(claimed, 14), data["word"], nats(distances.get(own)), broken(data["closest"] or "none", 14),
                nats(distances.get(data["closest"])), times(data["snr"]), times(data["snr_logprobs"]),
                f"{data['own'] / data['prompts']:.2f} \\[{data['low']:.2f}, {data['high']:.2f}]",
            )  # fmt: skip
        texts += [render(made, width), prose(LEGEND, width)]
    return texts
