"""Where the time of a run went."""

from dataclasses import dataclass


@dataclass
class Clock:
    """Where the time of a run went, seconds; engine processes that it started, by what for; cells, and those not started.

    Sums and counts over the run, 0 before the first. `untimed`: engines that did not say how long they measured, which
    `measuring` is without.
    """

    engines: float = 0.0
    measuring: float = 0.0
    checkpoints: float = 0.0
    cells: int = 0
    reused: int = 0
    lifetimes: int = 0
    controls: int = 0
    verifications: int = 0
    traces: int = 0
    untimed: int = 0

    def measured(self, seconds: float | None) -> None:
        """Add what an engine says that it measured for."""
        if seconds is None:
            self.untimed += 1
        else:
            self.measuring += seconds

    def started(self, role: str) -> None:
        """Count an engine process by the role of its observation."""
        name = {"control": "controls", "verify": "verifications", "diagnosis": "traces"}.get(role, "lifetimes")
        setattr(self, name, getattr(self, name) + 1)
