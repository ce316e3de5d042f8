"""Figures of a case as text, for the JUnit file: the only place that makes it. Everybody else reads numbers."""

from collections.abc import Mapping
from typing import Any

from quantdet.report.text_layout import figure


def text(name: str, value: Any) -> str:
    """The property `name`; empty where there is no figure.

    Lists are joined by commas, tables are `part=value`; what is not here has the text that Python gives it.
    """
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if name == "tokens_per_second":
        return figure(value)
    if name in ("tokens_per_second.decode", "tokens_per_second.prefill"):
        return rate(value)
    if name == "seconds":
        return " ".join(f"{part}={figure(one)}" for part, one in value.items())
    if name in ("identified", "hidden_states.identified"):
        return f"{value['own']}/{value['prompts']} [{value['low']:.4f}, {value['high']:.4f}]"
    if name.startswith("distance.") and isinstance(value, float):
        return f"{value:.6g}"
    if name.startswith("distance."):
        return " ".join(f"{metric}={one:.6g}" for metric, one in value.items())
    if isinstance(value, Mapping):
        return " ".join(f"{part}={one}" for part, one in value.items())
    return str(value)


def rate(value: float | None) -> str:
    """Tokens per second with the digits that they are told with; empty if there are none."""
    return "" if value is None else f"{value:.{_digits(value)}f}"


def told_rate(value: float) -> float:
    """The number that `rate` shows: what is made of it (a ratio) is of what people see."""
    return round(value, _digits(value))


def _digits(value: float) -> int:
    return 0 if value >= 1000 else 1
