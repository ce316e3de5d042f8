"""Seeded defects by their names: engines make them, judgements look for them."""

from quantdet.matrix.cell import Phase

# Seeded defects in the last repeat of the first prompt, by the plan's `inject`: for each phase the position (decode step or
# prefill position) and the token whose logit's lowest bit is turned over, in the engine.
FLIPS: dict[str, dict[Phase, tuple[int, int]]] = {
    "bitflip": {"decode": (1, 0)},
    "control": {"decode": (1, 0), "prefill": (1, 0)},
}
