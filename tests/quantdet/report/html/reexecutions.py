"""Claims that were re-executed: signal to noise with intervals, a forest plot, the confusion matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from quantdet.report import reexecution as tables
from quantdet.report.case import Case
from quantdet.report.html import svg
from quantdet.report.html.verdicts import Tag
from quantdet.report.text_layout import nats


@dataclass(frozen=True)
class Claimed:
    """One claim: what it is nearest to, and the nearest format with other numbers."""

    claimed: str
    own: str
    identified: str
    other: str
    difference: str
    interval: str
    snr: str
    mde: str
    tag: Tag | None


@dataclass(frozen=True)
class Verified:
    """The claims of one model and source, re-executed at one place."""

    where: str
    claims: list[Claimed]
    forest: Markup | None
    columns: list[str]
    confusion: list[tuple[str, list[tuple[str, str, bool]]]]
    snr: list[tuple[str, str, list[tuple[str, ...]], str]]


def verified(cases: Sequence[Case], order: Sequence[str]) -> list[Verified]:
    known = {_key(case.reexecution): case for case in cases if case.reexecution}
    made = []
    for number, one in enumerate(tables.verifications(cases, order)):
        claims, estimates = [], []
        for name, data in one.claims.items():
            row, estimate = _claimed(one, name, data, known.get(_key(data)))
            claims.append(row)
            estimates += [estimate] if estimate is not None else []
        forest = None
        if estimates:
            title = f"How much farther the nearest format with other numbers is, {one.where}"
            forest = svg.forest(f"forest-{number}", title, estimates, "nats, own L2, decode")
        columns = [name for name in one.columns if any(data["nearest"].get(name) for data in one.claims.values())]
        confusion = []
        for name, data in one.claims.items():
            shares = [(data["nearest"].get(column), one.marked(name, column)) for column in columns]
            confusion.append((name, [(*_share(share), own) for share, own in shares]))
        made.append(Verified(one.where, claims, forest, columns, confusion, _snr(one)))
    return made


def _key(data: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(data[name]) for name in ("model", "source", "by_text", "claimed"))


def _share(share: float | None) -> tuple[str, str]:
    """A share of prompts and its class; empty for a format that did not re-execute the claim."""
    if share is None:
        return "", "no"
    return f"{share:.2f}", "zero" if share <= 0 else f"c{min(8, 1 + int(share * 7.999))}"


def _claimed(
    one: tables.Verification, name: str, data: dict[str, Any], case: Case | None
) -> tuple[Claimed, svg.Estimate | None]:
    others = {other: found for other, found in data["comparisons"].items() if not one.marked(name, other)}
    other = min(others, key=lambda key: others[key]["difference"], default="")
    share = data["identified"]
    identified = f"{share['share']:.2f} [{share['low']:.2f}, {share['high']:.2f}]"
    verdict = Tag(case.verdict, case.message, case.expected) if case is not None else None
    if not other:
        return Claimed(name, one.own(name) or "none", identified, "none", "", "", "", "", verdict), None
    found = others[other]
    low, high, value = (found[key] for key in ("low", "high", "difference"))
    row = Claimed(
        name, one.own(name) or "none", identified, other, nats(value), f"[{nats(low)}, {nats(high)}]",
        tables.times(found["snr"]), nats(found["mde"]), verdict,
    )  # fmt: skip
    return row, svg.Estimate(f"{name} vs {other}", value, low, high, "mark" if low > 0 else "mark weak")


def _snr(one: tables.Verification) -> list[tuple[str, str, list[tuple[str, ...]], str]]:
    """`(phase, metric, rows, overall)`; a row is pair, signal, noise, SNR and both directions."""
    made = []
    for phase in tables.PHASES:
        for metric, name in tables.METRICS.items():
            found = tables.ratios(one, phase, metric)
            if not found:
                continue
            rows = [
                (f"{row.a} | {row.b}", nats(row.signal), nats(row.noise), *map(tables.times, (row.snr, row.forth, row.back)))
                for row in found
            ]
            signal, noise, whole, mean, finite = tables.overall(found)
            text = f"mean signal {nats(signal)} over mean noise {nats(noise)}: SNR {tables.times(whole)}; "
            text += f"mean of the {finite} finite SNRs {tables.times(mean)}"
            made.append((phase, name, rows, text))
    return made
