"""Re-executions in short, for the terminal: each claim, how near its own numbers and the next ones are, and the SNRs.

The whole tables (`reexecution.whole`) grow with the square of the formats; they are printed while they are small.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from quantdet.report import reexecution
from quantdet.report.case import Case
from quantdet.report.reexecution import METRICS, NEARER, PHASES, Verification
from quantdet.report.text_layout import fitted, nats, prose

LIMIT = 16  # claims times verifying formats, up to which the whole is printed
_UNTOLD = 5
LEGEND = (
    "Claims recorded elsewhere, re-executed here on the recorded tokens; decode, own L2, nats. identified: share of prompts "
    "nearest to a format with the claim's numbers [95 %]. own: distance to those. next: the nearest format with other numbers; "
    "farther by: mean difference of the two distances over the prompts [95 %, bootstrap]: above 0 told apart, around 0 "
    "not. told: formats with other numbers that are DETECTABLE, of all."
)


def sections(cases: Iterable[Case], order: Sequence[str], width: int) -> list[str]:
    """The texts of re-executions: whole where they are small, else in short; where the whole is, then."""
    cases = list(cases)
    found = reexecution.verifications(cases, order)
    if max((len(one.claims) * len(one.columns) for one in found), default=0) <= LIMIT:
        return reexecution.whole(cases, order, width)
    texts = [prose(LEGEND, width)]
    for one in found:
        texts += [claims(one, width), *ratios(one, width), *untold(one, width)]
    texts.append(
        prose(
            "whole: JUnit properties snr.decode, snr.prefill, identification (--junitxml=FILE); drawn in report.html "
            f"(--report=DIR); tables in full are printed for up to {LIMIT} claims x formats (-k narrows)",
            width,
        )
    )
    return texts


def claims(one: Verification, width: int) -> str:
    """A row per claim."""
    rows = []
    for claimed, data in one.claims.items():
        share = data["identified"]
        others = {name: found for name, found in data["comparisons"].items() if not one.marked(claimed, name)}
        told = [name for name, found in others.items() if found["verdict"] == "DETECTABLE" and not reexecution.nearer(found)]
        name = min(others, key=lambda key: others[key]["difference"], default="")
        row = [claimed, f"{share['share']:.2f}\n[{share['low']:.2f}, {share['high']:.2f}]"]
        row += [nats(one.distance("decode", "own_metric", claimed, one.own(claimed))) or "none", name or "none"]
        if name:
            found = others[name]
            row += [f"{found['difference']:.2g}\n[{found['low']:.2g}, {found['high']:.2g}]", reexecution.times(found["snr"])]
        else:
            row += ["", ""]
        wrong = sum(map(reexecution.nearer, others.values()))
        rows.append([*row, f"{len(told)} of {len(others)}" + (f"\n{wrong} {NEARER}" if wrong else "")])
    columns = ("claimed", "identified", "own", "next", "farther by", "SNR", "told")
    return fitted(columns, rows, width, fold=("claimed", "next"), title=f"RE-EXECUTION: {one.where}")


def ratios(one: Verification, width: int) -> list[str]:
    """A line per phase and metric: SNR over all pairs of claims, and the range of the pairs."""
    texts = []
    for phase in PHASES:
        for metric, name in METRICS.items():
            found = reexecution.ratios(one, phase, metric)
            if not found:
                continue
            signal, noise, whole, _, _ = reexecution.overall(found)
            known = [row for row in found if row.snr is not None]
            text = f"SNR {phase}, {name}: {reexecution.times(whole)} over {len(found)} pair{'s' if len(found) > 1 else ''}"
            text += f" (mean signal {nats(signal)}, mean noise {nats(noise)})"
            if len(known) > 1:
                least = known[-1]
                text += f", from {reexecution.times(least.snr)} ({least.a} | {least.b}) to {reexecution.times(known[0].snr)}"
            texts.append(prose(text, width))
    return texts


def untold(one: Verification, width: int) -> list[str]:
    """Formats with other numbers that are not told apart, or nearer; of those with the same numbers only how many."""
    lines, same = [], Counter[str]()
    for claimed, data in one.claims.items():
        for verified, found in data["comparisons"].items():
            word = NEARER if reexecution.nearer(found) else str(found["verdict"])
            if one.marked(claimed, verified):
                same[word] += 1
            elif word != "DETECTABLE":
                interval = f"{found['difference']:.2g} [{found['low']:.2g}, {found['high']:.2g}]"
                lines.append(f"{claimed} -> {verified}: {word}, {interval}, detectable from {found['mde']:.2g} nats")
    texts = [prose(line, width) for line in lines[:_UNTOLD]]
    if texts:
        more = f" ({len(lines)} in all)" if len(lines) > _UNTOLD else ""
        texts.insert(0, prose(f"Not told from the claimed format, though its numbers are others{more}:", width))
    if same:
        words = ", ".join(f"{count} {word}" for word, count in sorted(same.items()))
        texts.append(prose(f"compared with other formats that hold the claim's own numbers: {words}", width))
    return texts
