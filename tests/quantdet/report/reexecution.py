"""Claims re-executed elsewhere: directional distances, signal to noise of pairs, identification; rendering only.

The data are the dictionaries that the records of `test_reexecution` carry under "reexecution", one per claimed format.
`claimed` is what the recording says it ran, `verified` a format that the verifier ran on the recorded tokens.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from quantdet.metrics.signal_noise import published_snr, ratio
from quantdet.report.case import Case
from quantdet.report.text_layout import broken, joined, matrix, nats, prose, render, table

PHASES = ("decode", "prefill")
METRICS = {"own_metric": "own L2", "published": "published"}
LIMIT = 100  # cells of a matrix on the screen
_PAIRS = 10  # largest and smallest SNR on the screen
_UNTOLD = 20
NEARER = "NEARER"  # DETECTABLE, the wrong way round
LEGEND = (
    "Rows claimed (recorded elsewhere), columns verified (re-executed here on the recorded tokens); distances in nats. "
    "published: the published metric, top-k of the claimed side, missing ids dropped; own L2: this suite's metric, union of "
    "ids, censored. * marks formats that hold the claimed one's numbers."
)
IDENTIFICATION_LEGEND = (
    "identified: share of prompts nearest to a format that holds the claim's numbers, exact 95 % interval. verdicts: on "
    "formats with other numbers; NEARER: the claim matches it better than its own. Below, * marks formats that hold the "
    "claim's numbers."
)
SNR_LEGEND = (
    "signal: mean of both directions; noise: mean of the two own distances; SNR: their ratio, inf where the noise is 0. "
    "a->b: claimed a verified by b, over claimed a verified by a. n/a: 0 over 0."
)


@dataclass(frozen=True)
class Verification:
    """The claims of one model and source, re-executed at one place: data by claimed format."""

    where: str
    claims: dict[str, dict[str, Any]]
    columns: list[str]

    def distance(self, phase: str, metric: str, claimed: str, verified: str | None) -> float | None:
        value: float | None = self.claims[claimed]["distances"].get(phase, {}).get(metric, {}).get(verified)
        return value

    def own(self, claimed: str) -> str | None:
        """What the claim is verified as: its own format, or the nearest one with its numbers; None if none ran."""
        if plain(claimed) in self.columns:
            return plain(claimed)
        known = {name: self.distance("decode", "own_metric", claimed, name) for name in self.claims[claimed]["own"]}
        there = {name: value for name, value in known.items() if value is not None}
        return min(there, key=lambda name: there[name], default=None)

    def marked(self, claimed: str, verified: str) -> bool:
        return verified == plain(claimed) or verified in self.claims[claimed]["own"]


@dataclass(frozen=True)
class Ratio:
    """One pair of claimed formats; `forth` and `back` are the directional ratios."""

    a: str
    b: str
    signal: float
    noise: float
    snr: float | None
    forth: float | None
    back: float | None


def plain(claimed: str) -> str:
    """The format of a claim, without the recording that it is from."""
    return claimed.partition("@")[0].partition("#")[0]


def verifications(cases: Iterable[Case], order: Sequence[str] = ()) -> list[Verification]:
    """The records' re-executions by model, source and verifier; formats in the matrix's order."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for case in cases:
        data = case.reexecution
        if data:
            found.setdefault(f"{data['model']}: {data['source']} -> {data['by_text']}", {})[data["claimed"]] = data
    rank = {name: index for index, name in enumerate(order)}

    def ordered(names: Iterable[str]) -> list[str]:
        return sorted(dict.fromkeys(names), key=lambda name: rank.get(plain(name), len(rank)))

    made = []
    for where, claims in sorted(found.items()):
        metrics = [metric for data in claims.values() for phase in data["distances"].values() for metric in phase.values()]
        columns = ordered(name for metric in metrics for name in metric)
        made.append(Verification(where, {name: claims[name] for name in ordered(claims)}, columns))
    return made


def whole(cases: Iterable[Case], order: Sequence[str], width: int) -> list[str]:
    """The texts in full of DIRECTIONAL DISTANCES, PAIRWISE SNR SUMMARY and IDENTIFICATION."""
    found = verifications(cases, order)
    texts = [prose(LEGEND, width)] if found else []
    for one in found:
        for phase in PHASES:
            texts += directional(one, phase, width)
    if any(ratios(one, phase, metric) for one in found for phase in PHASES for metric in METRICS):
        texts.append(prose(SNR_LEGEND, width))
    for one in found:
        for phase in PHASES:
            texts += snr_summary(one, phase, width)
    for one in found:
        texts += identification(one, width)
    return texts


# ------------------------------------------------------------------------------------------------------------ distances


def directional(one: Verification, phase: str, width: int) -> list[str]:
    """Claimed against verified, both metrics; of a large matrix each claim's own distance and the nearest other."""
    claims = list(one.claims)
    texts = [prose(f"DIRECTIONAL DISTANCES ({phase.upper()}): {one.where}", width)]
    if len(claims) * len(one.columns) > LIMIT:
        made = table(
            "claimed", "as", "own L2", "publ.", "nearest other", "own L2 ", "publ. ", fold=("claimed", "as", "nearest other")
        )
        for claimed in claims:
            own = one.own(claimed)
            others = {name: one.distance(phase, "own_metric", claimed, name) for name in one.columns}
            known = {name: d for name, d in others.items() if d is not None and not one.marked(claimed, name)}
            nearest = min(known, key=lambda name: known[name], default=None)
            figures = [[nats(one.distance(phase, metric, claimed, name)) for metric in METRICS] for name in (own, nearest)]
            names = (
                broken(claimed, 14),
                "same" if own == plain(claimed) else broken(own or "none", 14),
                broken(nearest or "none", 14),
            )
            made.add_row(names[0], names[1], *figures[0], names[2], *figures[1])
        note = (
            f"{len(claims)} claimed x {len(one.columns)} verified: the full matrix is in the JUnit property snr.{phase}; "
            "-k narrows to some formats"
        )
        return [*texts, render(made, width), prose(note, width)]

    for metric, name in METRICS.items():

        def cell(claimed: str, verified: str, metric: str = metric) -> str:
            value = nats(one.distance(phase, metric, claimed, verified))
            return value + ("*" if value and one.marked(claimed, verified) else "")

        texts += matrix(name, claims, one.columns, cell, width)
    return texts


# ------------------------------------------------------------------------------------------------------------------ SNR


def ratios(one: Verification, phase: str, metric: str) -> list[Ratio]:
    """Every pair of claimed formats that are verified as different ones; largest SNR first, undefined ones last."""
    found = []
    claims = [name for name in one.claims if one.own(name) is not None]
    for index, a in enumerate(claims):
        for b in claims[index + 1 :]:
            as_a, as_b = one.own(a), one.own(b)
            forth, back = one.distance(phase, metric, a, as_b), one.distance(phase, metric, b, as_a)
            own_a, own_b = one.distance(phase, metric, a, as_a), one.distance(phase, metric, b, as_b)
            if as_a == as_b or forth is None or back is None or own_a is None or own_b is None:
                continue
            both = published_snr((forth, back), (own_a, own_b))
            found.append(Ratio(a, b, both.signal, both.noise, both.snr, ratio(forth, own_a), ratio(back, own_b)))
    return sorted(found, key=lambda row: (row.snr is None, -(row.snr or 0.0), row.a, row.b))


def overall(found: Sequence[Ratio]) -> tuple[float, float, float | None, float | None, int]:
    """Mean signal, mean noise, their ratio as published, the mean of the finite SNRs, and their number."""
    signal = math.fsum(row.signal for row in found) / len(found)
    noise = math.fsum(row.noise for row in found) / len(found)
    finite = [row.snr for row in found if row.snr is not None and math.isfinite(row.snr)]
    return signal, noise, ratio(signal, noise), math.fsum(finite) / len(finite) if finite else None, len(finite)


def snr_summary(one: Verification, phase: str, width: int) -> list[str]:
    """PAIRWISE SNR SUMMARY of a phase, for both metrics."""
    texts: list[str] = []
    for metric, name in METRICS.items():
        found = ratios(one, phase, metric)
        if not found:
            continue
        texts.append(prose(f"PAIRWISE SNR SUMMARY ({phase.upper()}, {name}): {one.where}", width))
        made = table("pair a | b", "signal", "noise", "SNR", "a->b", "b->a", fold=("pair a | b",))
        left_out = max(0, len(found) - 2 * _PAIRS)
        for index, row in enumerate(found):
            if left_out and _PAIRS <= index < len(found) - _PAIRS:
                if index == _PAIRS:
                    made.add_row(f"... {left_out} pairs between (JUnit property snr.{phase})")
                continue
            ratios_ = (times(value) for value in (row.snr, row.forth, row.back))
            made.add_row(joined(row.a, "|", row.b, width - 50), nats(row.signal), nats(row.noise), *ratios_)
        signal, noise, whole, mean, finite = overall(found)
        text = f"overall: mean signal {nats(signal)} over mean noise {nats(noise)}: SNR {times(whole)}"
        text += f"; mean of the {'' if finite == len(found) else f'{finite} finite of '}{len(found)} SNRs {times(mean)}"
        texts += [render(made, width), prose(text, width)]
    same = {name: one.own(name) for name in one.claims if one.own(name) != plain(name)}
    if texts and same:
        told = ", ".join(f"{name} as {other}" if other else f"{name} by none" for name, other in same.items())
        texts.append(prose(f"verified by another format with the same numbers: {told}", width))
    return texts


def times(value: float | None) -> str:
    """A ratio."""
    if value is None:
        return "n/a"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.3g}"


# ------------------------------------------------------------------------------------------------------- identification


def identification(one: Verification, width: int) -> list[str]:
    """Which format each claim's prompts are nearest to, the confusion matrix, and what could not be told apart."""
    texts = [prose(f"IDENTIFICATION (decode, own L2; share of prompts): {one.where}", width)]
    made = table("claimed", "identified [95 %]", "nearest", "verdicts", "prompts", fold=("claimed", "nearest"))
    for claimed, data in one.claims.items():
        shares = sorted(data["nearest"].items(), key=lambda row: -row[1])
        near = ", ".join(f"{name} {share:.2f}" for name, share in shares[:3]) + (", ..." if len(shares) > 3 else "")
        share = data["identified"]
        counts = Counter(
            NEARER if nearer(found) else str(found["verdict"])
            for name, found in data["comparisons"].items()
            if not one.marked(claimed, name)
        )
        made.add_row(
            claimed, f"{share['share']:.2f} \\[{share['low']:.2f}, {share['high']:.2f}]", near,
            "\n".join(f"{counts[word]} {word}" for word in sorted(counts)), str(data["prompts"]),
        )  # fmt: skip
    texts.append(render(made, width))
    texts.append(prose(IDENTIFICATION_LEGEND, width))
    chosen = [name for name in one.columns if any(data["nearest"].get(name) for data in one.claims.values())]
    if chosen and len(one.claims) * len(chosen) <= LIMIT:

        def cell(claimed: str, verified: str) -> str:
            share = one.claims[claimed]["nearest"].get(verified)  # None: this one did not re-execute the claim
            return ("-" if share is None else f"{share:.2f}") + ("*" if one.marked(claimed, verified) else "")

        texts.append(
            prose("Confusion matrix (rows claimed, columns nearest; formats that are nearest to none left out)", width)
        )
        texts += matrix("claimed", list(one.claims), chosen, cell, width)
    return [*texts, *_untold(one, width)]


def nearer(found: dict[str, Any]) -> bool:
    """Whether the claim matches this format detectably better than its own."""
    return bool(found["verdict"] == "DETECTABLE" and found["difference"] < 0)


def _untold(one: Verification, width: int) -> list[str]:
    """Comparisons that are not DETECTABLE, or the wrong way round, each with its minimum detectable effect."""
    rows = [
        (one.marked(claimed, verified), claimed, verified, found)
        for claimed, data in one.claims.items()
        for verified, found in data["comparisons"].items()
        if found["verdict"] != "DETECTABLE" or nearer(found)
    ]
    rows.sort(key=lambda row: row[0])  # those with the same numbers are expected here: last
    if not rows:
        return []
    made = table("claimed -> verified", "verdict", "difference", "MDE", "SNR", fold=("claimed -> verified",))
    for own, claimed, verified, found in rows[:_UNTOLD]:
        made.add_row(
            joined(claimed, "->", verified + "*" * own, width - 58), NEARER if nearer(found) else found["verdict"],
            f"{nats(found['difference'])}\n\\[{nats(found['low'])}, {nats(found['high'])}]",
            nats(found["mde"]), times(found["snr"]),
        )  # fmt: skip
    more = f"; {_UNTOLD} of {len(rows)}, the others in the JUnit properties" if len(rows) > _UNTOLD else ""
    title = "Not told from the claimed format, or nearer than it"
    title += (
        " (* same numbers: no difference is expected; difference: how much farther the verified format is than the claim's "
        "own, mean over prompts, nats, [95 % bootstrap interval]; NOT_DETECTABLE: the interval reaches down to 0 and not above "
        f"half the noise; MDE: minimum detectable effect{more})"
    )
    return [prose(title, width), render(made, width)]


# ----------------------------------------------------------------------------------------------------- suite properties
