"""Files and words of somebody else: sizes before reading, and nothing that steers a terminal or breaks a JUnit file."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # colours and movements, as loggers write them
_DEEPEST = 32
_INT64 = 2**63


def plain(text: object, keep: str = "") -> str:
    """`text` with its colours left out and every character that is not printable as an escape; those of `keep` stay."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in _ANSI.sub("", str(text)))


def in_markdown(text: str, keep: str = "") -> str:
    """`text` in one line, with nothing that Markdown or HTML would obey; those of `keep` stay as they are."""
    entities = {"<": "&lt;", ">": "&gt;"}
    for character in "\\`*_{}[]<>|#":
        if character not in keep:
            text = text.replace(character, entities.get(character, f"\\{character}"))
    return " ".join(text.split())


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: larger, or no regular file: a pipe would block, a device may have no end.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: opening some devices does something
        raise ValueError("not a regular file")
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        payload = file.read(status.st_size + 1) if status.st_size <= most else b""  # it may grow while it is read
    if max(status.st_size, len(payload)) > most:
        raise ValueError(f"larger than {most} bytes")
    return payload


def parse_json(payload: bytes) -> Any:
    """JSON as UTF-8.

    Raises:
        ValueError: not JSON, nested too deep for the parser, or with a name that is given twice in an object.
    """
    try:
        return json.loads(payload.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of a name given twice json keeps the last: two readers could see two files in one.
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is given twice in an object")
    return table


def flaw(document: Any) -> tuple[str, str] | None:
    """What no field of a document may hold, wherever it stands: (path, what is wrong).

    Characters that are not printable in texts and names, integers of more than 64 bits, nesting without end.
    """
    waiting: list[tuple[tuple[str, ...], Any]] = [((), document)]
    while waiting:
        at, value = waiting.pop()
        where = plain(".".join(at)) or "(file)"
        if len(at) > _DEEPEST:
            return ".".join(at[:3]), f"nested deeper than {_DEEPEST}"
        if isinstance(value, str) and not value.isprintable():
            return where, f"has a character that is not printable: {_first(value)}"
        if isinstance(value, int) and not -_INT64 <= value < 2 * _INT64:
            return where, "is an integer of more than 64 bits"
        if isinstance(value, dict):
            for name in value:
                if not str(name).isprintable():
                    return plain(".".join((*at, str(name)))), f"a name with a character that is not printable: {_first(name)}"
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        waiting += [((*at, str(key)), one) for key, one in inner]
    return None


def _first(text: str) -> str:
    return ascii(next(c for c in text if not c.isprintable()))
