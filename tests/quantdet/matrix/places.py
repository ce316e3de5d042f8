"""Which row of a matrix file a mistake is about, for people: its number from 1, its line, and its own words."""

import re
from collections.abc import Mapping
from typing import Any

_PATH = re.compile(r"\b(pin|setting|expect)\.(\d+)(?![\w-])")
_WORDS = {"pin": ("kernel", "layout", "source", "vllm"), "setting": ("when",), "expect": ("when", "outcome")}
_LONGEST = 120


def told(mistake: str, raw: Mapping[str, Any], text: str) -> str:
    """`mistake` with the rows that its paths count from 0 (`expect.0.when`) named after it.

    Args:
        mistake: `PATH: what is wrong`.
        raw: the file as parsed.
        text: the file, for line numbers; where its `[[NAME]]` headers are not as many as the rows there are none.
    """
    found = dict.fromkeys((match[1], int(match[2])) for match in _PATH.finditer(mistake))
    rows = [_row(name, index, raw, text) for name, index in found]
    return f"{mistake} ({'; '.join(rows)})" if rows else mistake


def _row(name: str, index: int, raw: Mapping[str, Any], text: str) -> str:
    rows = raw.get(name)
    rows = rows if isinstance(rows, list) else []
    lines = [number for number, line in enumerate(text.splitlines(), 1) if re.match(rf"\s*\[\[\s*{name}\s*\]\]", line)]
    where = f", line {lines[index]}" if len(lines) == len(rows) > index else ""
    row = rows[index] if index < len(rows) else None
    words = [f"{key} = {_toml(row[key])}" for key in _WORDS[name] if key in row] if isinstance(row, dict) else []
    said = ", ".join(words)
    said = f": {said[:_LONGEST]}{'...' if len(said) > _LONGEST else ''}" if said else ""
    return f"row {index + 1} of [[{name}]]{where}{said}"


def _toml(value: Any) -> str:
    """A value as the file would have it on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
