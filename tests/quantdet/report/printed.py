"""Tables of published reports that are printed reference by reference, or of the generated tokens' logprobs; rendering only.

The figures are those of `verdicts.Reference` and of `Pair.chosen_l2`, `chosen_max`: published metrics that are blind to where
the tokens part, so each table says of which pairs that is so.
"""

import math
from collections.abc import Sequence
from typing import Any

from quantdet.report.compared import Compared
from quantdet.report.text_layout import joined, matrix, nats, one_line, prose, render, table

LIMIT = 8  # formats of a matrix on the screen
_REFERENCES = 4  # matrices on the screen
_TOLD = 100  # references in the JUnit property
STEPS_NOTE = (
    "published metric, decode rows compared by their number, also where the tokens have parted (then of two texts); references "
    "of which every pair has a figure"
)
TOKENS_NOTE = (
    "published metric of the generated tokens' logprobs, first repeats, all steps by their number, also where the tokens have "
    "parted (then of two texts); L2 and largest difference, nats"
)


def reference(one: Compared, id_: str, field: str, a: str, b: str) -> float | None:
    """The figure of one reference from `a` to `b`; `field`: prefill, decode or steps."""
    pair = one.pairs.get((a, b)) or one.pairs.get((b, a))
    found = next((row for row in pair.references if row.id == id_), None) if pair is not None else None
    if pair is None or found is None:
        return None
    value: float | None = getattr(found, field if pair.a == a else f"{field}_back")
    return value


def references(one: Compared) -> list[str]:
    """Ids of the references that some pair has, in their order; none of reports that `tokens` tells whole."""
    if tokens(one):
        return []
    return list(dict.fromkeys(row.id for pair in one.pairs.values() for row in pair.references))


def whole(one: Compared) -> list[str]:
    """References that have a finite figure of every pair step by step, where the matrix over all of them is another one."""
    ids = [(a, b) for a in one.formats for b in one.formats if a != b]
    if not one.complete() or not any(one.value("decode_published", a, b) == math.inf for a, b in ids):
        return []
    found = []
    for id_ in references(one):
        values = [reference(one, id_, "steps", a, b) for a, b in ids]
        if all(value is not None and math.isfinite(value) for value in values):
            found.append(id_)
    return found


def steps(one: Compared, width: int) -> list[str]:
    """A matrix for each of these references."""
    texts: list[str] = []
    chosen = whole(one) if len(one.formats) <= LIMIT else []
    for id_ in chosen[:_REFERENCES]:

        def cell(a: str, b: str, id_: str = id_) -> str:
            return "-" if a == b else nats(reference(one, id_, "steps", a, b))

        texts.append(prose(f"DECODE STEP BY STEP, {id_}: {one.where}", width))
        texts += matrix("published", one.formats, one.formats, cell, width)
        apart = [f"{a} | {b}" for a, b in one.pairs if reference(one, id_, "decode", a, b) == math.inf]
        told = f"tokens part: {', '.join(apart)}" if apart else "no tokens part"
        texts.append(prose(f"{told} ({STEPS_NOTE})" if id_ == chosen[0] else told, width))
    if len(chosen) > _REFERENCES:
        texts.append(prose(f"{len(chosen)} references: the others are in the JUnit property effects.references", width))
    return texts


def tokens(one: Compared) -> list[tuple[str, str, str, str, str]]:
    """(a, b, L2, largest difference, where the tokens part) of every pair that has these figures, with the printed digits."""
    rows = []
    for (a, b), pair in one.pairs.items():
        if pair.chosen_l2 is None or pair.chosen_max is None:
            continue
        apart = "the same"
        if pair.decode_published == math.inf:
            apart = "part" if pair.decode_steps is None else f"part at step {pair.decode_steps - 1}"
        rows.append((a, b, f"{pair.chosen_l2:.6e}", f"{pair.chosen_max:.6e}", apart))
    rank = {name: index for index, name in enumerate(one.formats)}
    ordered = [row if rank[row[0]] < rank[row[1]] else (row[1], row[0], *row[2:]) for row in rows]
    return sorted(ordered, key=lambda row: (rank[row[0]], rank[row[1]]))


def generated(one: Compared, width: int) -> list[str]:
    """GENERATED TOKENS: a row per pair."""
    rows = tokens(one)
    if not rows:
        return []
    made = table("pair", "L2", "max", "tokens", fold=("pair",))
    for a, b, l2, largest, apart in rows:
        made.add_row(joined(a, "|", b, width - 48), l2, largest, apart)
    return [prose(f"GENERATED TOKENS: {one.where}", width), render(made, width), prose(f"({TOKENS_NOTE})", width)]


def properties(places: Sequence[Compared]) -> list[tuple[str, str]]:
    """`effects.references` (matrices by reference) and `effects.tokens` (pairs), one line of JSON each, where there are any."""
    by_reference: dict[str, Any] = {}
    by_pair: dict[str, Any] = {}
    for one in places:
        found = {
            id_: {
                field: [[None if a == b else reference(one, id_, field, a, b) for b in one.formats] for a in one.formats]
                for field in ("prefill", "decode", "steps")
            }
            for id_ in references(one)[:_TOLD]
        }
        if found:
            by_reference[str(one.where)] = {"formats": one.formats, **found}
        if rows := tokens(one):
            by_pair[str(one.where)] = [dict(zip(("a", "b", "l2", "max", "tokens"), row, strict=True)) for row in rows]
    named = (("effects.references", by_reference), ("effects.tokens", by_pair))
    return [(name, one_line(value)) for name, value in named if value]
