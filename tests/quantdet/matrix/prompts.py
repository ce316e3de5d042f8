"""Prompts that somebody gives with a checkpoint: a file of JSON lines, each a prompt as text, as messages or as token ids.

    {"text": "Water boils at"}
    {"id": "chat", "messages": [{"role": "user", "content": "Who are you?"}], "continuation": "I am"}
    {"ids": [9, 8, 7, 6], "continuation": [5, 4]}

`messages` go through the chat template of the checkpoint's tokenizer. `continuation` is forced after the prompt: what every
format of the model is given. A workload of the suite (`quantdet.matrix.workload`) may stand in the file's place. Every mistake
in a file is reported at once, with its line (`WorkloadError`).
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantdet.matrix import workload
from quantdet.matrix.cell import ID_PATTERN
from quantdet.matrix.workload import MAX_BYTES, Workload, WorkloadError
from quantdet.untrusted import parse_json, plain, read_bounded

MAX_LINES = 10_000
# A file that is not of this kind at all would have a mistake in every line.
_MOST_MISTAKES = 100
_KEYS = ("text", "messages", "ids", "id", "continuation")
_PROMPT = _KEYS[:3]
_MESSAGE = ("role", "content")


@dataclass(frozen=True)
class PromptLine:
    """One prompt of a file. Exactly one of `text`, `messages` and `ids` is given.

    Attributes:
        line: its number in the file, from 1.
        id: as given, else `line<number>`.
        messages: role and content of each.
        continuation: text or token ids that are forced after the prompt; None: none is given.
        content_start: first index that counts for distances; None: not said. No key of a line.
    """

    line: int
    id: str
    text: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    ids: tuple[int, ...] | None = None
    continuation: tuple[int, ...] | str | None = None
    content_start: int | None = None

    @property
    def needs_tokenizer(self) -> bool:
        """Whether a part of it is not token ids yet."""
        return self.ids is None or isinstance(self.continuation, str)

    @property
    def where(self) -> str:
        """The place in the file, for messages."""
        return f"line {self.line}" + ("" if self.id == f"line{self.line}" else f" ({self.id})")


def given(path: Path) -> tuple[PromptLine, ...] | Workload:
    """What the file at `path` is: prompts, or a workload (a JSON object with "schema").

    Raises:
        WorkloadError: it cannot be read, or is wrong; all mistakes at once.
    """
    payload = _payload(path)
    try:
        document = parse_json(payload)
    except ValueError:  # several lines
        document = None
    if isinstance(document, dict) and "schema" in document:
        return workload.load_file(path)
    return _lines(path, payload)


def read(path: Path) -> tuple[PromptLine, ...]:
    """The prompts of a file of JSON lines; blank lines do not count.

    Raises:
        WorkloadError: it cannot be read, is larger than 16 MiB, has more than 10 000 lines, or is wrong; all mistakes at once.
    """
    return _lines(path, _payload(path))


def _payload(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_BYTES)
    except FileNotFoundError:
        raise WorkloadError(path, ["no such file"]) from None
    except (OSError, ValueError) as error:
        raise WorkloadError(path, [f"not readable: {getattr(error, 'strerror', None) or error}"]) from None


def _lines(path: Path, payload: bytes) -> tuple[PromptLine, ...]:
    lines = payload.removeprefix(b"\xef\xbb\xbf").split(b"\n")  # not splitlines: text may have other characters that end lines
    if len(lines) - (lines[-1] == b"") > MAX_LINES:
        raise WorkloadError(path, [f"needs at most {MAX_LINES} lines, have {len(lines) - (lines[-1] == b'')}"])
    found: list[PromptLine] = []
    mistakes: list[str] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            row, wrong = _line(number, line)
            mistakes += [f"line {number}: {one}" for one in wrong]
            found += [row] if row is not None else []
    mistakes += _twice(found)
    if not found and not mistakes:
        mistakes.append("needs at least one prompt, have none")
    if len(mistakes) > _MOST_MISTAKES:
        mistakes = [*mistakes[:_MOST_MISTAKES], f"and {len(mistakes) - _MOST_MISTAKES} more"]
    if mistakes:
        raise WorkloadError(path, mistakes)
    return tuple(found)


def _twice(rows: list[PromptLine]) -> list[str]:
    first: dict[str, int] = {}
    return [
        f"line {row.line}: id {row.id!r} is that of line {first[row.id]} too"
        for row in rows
        if first.setdefault(row.id, row.line) != row.line
    ]


def _line(number: int, line: bytes) -> tuple[PromptLine | None, list[str]]:
    """The prompt of a line, or None, and what is wrong with it."""
    try:
        row = parse_json(line)
    except ValueError as error:
        return None, [f"not JSON: {plain(error)[:120]}"]
    if not isinstance(row, dict):
        return None, [f"needs an object, have {_what(row)}"]
    mistakes = list(_unknown(row, _KEYS))
    kinds = [key for key in _PROMPT if key in row]
    if len(kinds) != 1:
        mistakes.append(f"needs one of 'text', 'messages' and 'ids', have {' and '.join(map(repr, kinds)) or 'none'}")
    for key in kinds:
        mistakes += {"text": _text, "messages": _messages, "ids": _ids}[key](key, row[key])
    if "continuation" in row:
        of_text = isinstance(row["continuation"], str)
        mistakes += (_text if of_text else _ids)("continuation", row["continuation"])
    name = row.get("id", f"line{number}")
    if not isinstance(name, str) or not ID_PATTERN.fullmatch(name):
        mistakes.append(
            "id: needs lower-case letters, digits, '.', '_', '-' (1 to 64, no mark at either end), have " + _what(name)
        )
    if mistakes:
        return None, mistakes
    return _made(number, name, row), []


def _made(number: int, name: str, row: dict[str, Any]) -> PromptLine:
    messages = row.get("messages")
    return PromptLine(
        number,
        name,
        row.get("text"),
        None if messages is None else tuple((message["role"], message["content"]) for message in messages),
        None if row.get("ids") is None else tuple(row["ids"]),
        tuple(row["continuation"]) if isinstance(row.get("continuation"), list) else row.get("continuation"),
    )


def _unknown(row: dict[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    for key in row:
        if key not in keys:
            nearest = difflib.get_close_matches(key, keys, 1, 0.5)
            hint = f"; the nearest is {nearest[0]!r}" if nearest else f"; there are {', '.join(map(repr, keys))}"
            yield f"unknown key {_what(key)}{hint}"


def _text(where: str, value: Any) -> list[str]:
    if not isinstance(value, str) or not value:
        return [f"{where}: needs text, not empty, have {_what(value)}"]
    try:
        value.encode()
    except UnicodeEncodeError:
        return [f"{where}: needs Unicode text, have half of a surrogate pair"]
    return []


def _ids(where: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        wanted = "text or a list of token ids" if where == "continuation" else "a list of token ids"
        return [f"{where}: needs {wanted}, not empty, have {_what(value)}"]
    bad = [(index, one) for index, one in enumerate(value) if type(one) is not int or not 0 <= one < 2**31]
    if not bad:
        return []
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return [f"{where}.{bad[0][0]}: needs a token id from 0, have {_what(bad[0][1])}{more}"]


def _messages(where: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        return [f"{where}: needs a list of messages, not empty, have {_what(value)}"]
    mistakes = []
    for index, message in enumerate(value):
        at = f"{where}.{index}"
        if not isinstance(message, dict):
            mistakes.append(f"{at}: needs an object with 'role' and 'content', have {_what(message)}")
            continue
        mistakes += [f"{at}: {one}" for one in _unknown(message, _MESSAGE)]
        for key in _MESSAGE:
            mistakes += _text(f"{at}.{key}", message[key]) if key in message else [f"{at}.{key}: missing"]
    return mistakes


def _what(value: Any) -> str:
    """A value of somebody else, short, for a message."""
    if isinstance(value, str):
        return repr(plain(value[:40])) + ("..." if len(value) > 40 else "") if value else "an empty text"
    if isinstance(value, list | dict):
        return ("an empty " if not value else "a ") + ("list" if isinstance(value, list) else "object")
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else str(value)[:40]
    )
