"""JSON from somebody else, read field by field: every mistake names the file and the field."""

import json
import math
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20
MAX_ID = 2**31
_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ImportRefused(Exception):
    """A file or an argument cannot be used; the message is one line and names it."""


@dataclass(frozen=True)
class Field:
    """A value and where it stands."""

    file: str
    at: str
    value: Any

    def refuse(self, why: str) -> ImportRefused:
        return ImportRefused(f"{self.file}: {self.at or '(file)'}: {why}")

    def has(self, name: str) -> bool:
        return isinstance(self.value, dict) and self.value.get(name) is not None

    def __getitem__(self, name: str) -> "Field":
        if not isinstance(self.value, dict):
            raise self.refuse(f"needs an object, is {_kind(self.value)}")
        at = f"{self.at}.{name}" if self.at else name
        if name not in self.value:
            raise Field(self.file, at, None).refuse("missing")
        return Field(self.file, at, self.value[name])

    def items(self, most: int) -> Iterator[tuple[str, "Field"]]:
        """Names and values of an object that is not empty and has at most `most`."""
        if not isinstance(self.value, dict):
            raise self.refuse(f"needs an object, is {_kind(self.value)}")
        self._counted(len(self.value), 1, most)
        for name in self.value:
            plain = name if _PLAIN.fullmatch(name) else shown(name)
            yield name, Field(self.file, f"{self.at}.{plain}", self.value[name])

    def each(self, least: int, most: int) -> list["Field"]:
        """The elements of a list of `least` to `most`."""
        return [self._element(index) for index in range(len(self._list(least, most)))]

    def integer(self, least: int, most: int) -> int:
        if type(self.value) is not int:
            raise self.refuse(f"needs an integer, is {_kind(self.value)}")
        if not least <= self.value <= most:
            raise self.refuse(f"needs {least} to {most}, is {shown(self.value)}")
        return self.value

    def ids(self, least: int, most: int) -> tuple[int, ...]:
        """A list of token ids."""
        for index, value in enumerate(self._list(least, most)):
            if type(value) is not int or not 0 <= value < MAX_ID:
                self._element(index).integer(0, MAX_ID - 1)
        return tuple(self.value)

    def number(self) -> float:
        """A finite number that float32 can hold."""
        if type(self.value) not in (int, float):
            raise self.refuse(f"needs a number, is {_kind(self.value)}")
        if not (abs(self.value) <= 3.4e38 and math.isfinite(self.value)):
            raise self.refuse(f"needs a finite number, is {shown(self.value)}")
        return float(self.value)

    def logprobs(self, least: int, most: int) -> tuple[float, ...]:
        """A list of log probabilities: no more than 0, but for rounding."""
        found = []
        for index in range(len(self._list(least, most))):
            one = self._element(index)
            found.append(one.number())
            if found[-1] > 1e-3:
                raise one.refuse(f"is no log probability: {shown(one.value)}")
        return tuple(found)

    def text(self, most: int = 200) -> str:
        """A line of text."""
        if not isinstance(self.value, str):
            raise self.refuse(f"needs text, is {_kind(self.value)}")
        if not self.value or len(self.value) > most or not self.value.isprintable():
            raise self.refuse(f"needs 1 to {most} printable characters, is {shown(self.value)}")
        return self.value

    def _list(self, least: int, most: int) -> Sequence[Any]:
        if not isinstance(self.value, list):
            raise self.refuse(f"needs a list, is {_kind(self.value)}")
        self._counted(len(self.value), least, most)
        return self.value

    def _element(self, index: int) -> "Field":
        return Field(self.file, f"{self.at}[{index}]", self.value[index])

    def _counted(self, count: int, least: int, most: int) -> None:
        if not least <= count <= most:
            raise self.refuse(
                f"needs {least} to {most} elements, has {count}" if least != most else f"needs {most} elements, has {count}"
            )


def load(path: Path) -> Field:
    """One JSON file, its size bounded before it is read.

    Raises:
        ImportRefused: no such file, too large, or not JSON.
    """
    file = shown(str(path)).strip("'\"")
    try:
        with path.open("rb") if stat.S_ISREG(path.stat().st_mode) else _no_file(file) as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ImportRefused(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise ImportRefused(f"{file}: larger than {MAX_BYTES >> 20} MiB")
    try:
        # NaN and Infinity stand in tables that are not read; a field that is read refuses them.
        return Field(file, "", json.loads(raw.decode("utf-8"), object_pairs_hook=_object))
    except (ValueError, RecursionError) as error:
        raise ImportRefused(f"{file}: not JSON: {shown(str(error))}") from None


def _no_file(file: str) -> Any:
    raise ImportRefused(f"{file}: not a regular file")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of a name given twice json keeps the last: two readers could see two files in one.
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is given twice in an object")
    return table


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """A value as it may stand in a message: one line, not long."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
