"""Files of prompts that somebody gives: what is accepted, and every mistake with its line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from quantdet.matrix import prompts, workload
from quantdet.matrix.prompts import PromptLine
from quantdet.matrix.workload import Workload, WorkloadError
from selftest.matrix.test_workload import content


def file(folder: Path, *rows: Any) -> Path:
    """One line for each of `rows`: text as it is, else as JSON."""
    path = folder / "p.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def mistakes(folder: Path, *rows: Any) -> list[str]:
    path = file(folder, *rows)
    with pytest.raises(WorkloadError) as caught:
        prompts.read(path)
    assert str(path) in str(caught.value)
    return caught.value.mistakes


def test_three_kinds_of_prompts(tmp_path: Path) -> None:
    """Text, messages, ids, each with a continuation or without; a line that is blank counts for its number only."""
    path = file(
        tmp_path,
        {"text": "Ein Wort\u2028zwei"},
        "  ",
        {"id": "chat", "messages": [{"role": "user", "content": "Hi"}], "continuation": "Yes"},
        {"ids": [1, 2, 0], "continuation": [3]},
    )

    one, two, three = prompts.read(path)

    assert PromptLine(1, "line1", text="Ein Wort\u2028zwei") == one
    assert PromptLine(3, "chat", messages=(("user", "Hi"),), continuation="Yes") == two
    assert PromptLine(4, "line4", ids=(1, 2, 0), continuation=(3,)) == three
    assert [True, True, False] == [line.needs_tokenizer for line in (one, two, three)]
    assert PromptLine(1, "x", ids=(1,), continuation="a").needs_tokenizer
    assert ["line 1", "line 3 (chat)"] == [one.where, two.where]


def test_a_byte_order_mark_and_other_ends_of_lines(tmp_path: Path) -> None:
    """As editors of other systems write them; a last line without an end is one."""
    path = tmp_path / "p"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}')

    assert ["a", "b"] == [line.text for line in prompts.read(path)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("{", "not JSON: "),
        ("[" * 100_000, "not JSON: nested too deep"),
        ('{"text": "a", "text": "b"}', "not JSON: a name is given twice"),
        ('{"ids": [' + "9" * 5000 + "]}", "not JSON: "),
        ('{"text": "\\ud800"}', "text: needs Unicode text, have half of a surrogate pair"),
        ('{"ids": [NaN]}', "ids.0: needs a token id from 0, have nan"),
        ([1, 2], "needs an object, have a list"),
        ("null", "needs an object, have null"),
        ({}, "needs one of 'text', 'messages' and 'ids', have none"),
        ({"text": "a", "ids": [1]}, "needs one of 'text', 'messages' and 'ids', have 'text' and 'ids'"),
        ({"text": "a", "continuatoin": "b"}, "unknown key 'continuatoin'; the nearest is 'continuation'"),
        ({"text": "a", "zz": 1}, "unknown key 'zz'; there are 'text', 'messages', 'ids', 'id', 'continuation'"),
        ({"text": "a", "\x1b[2J": 1}, "unknown key "),
        ({"text": "a", "content_start": 2}, "unknown key 'content_start'"),
        ({"text": ""}, "text: needs text, not empty, have an empty text"),
        ({"text": None}, "text: needs text, not empty, have null"),
        ({"text": "a", "continuation": ""}, "continuation: needs text, not empty"),
        ({"text": "a", "continuation": []}, "continuation: needs text or a list of token ids, not empty, have an empty list"),
        ({"text": "a", "continuation": None}, "continuation: needs text or a list of token ids, not empty, have null"),
        ({"text": "a", "continuation": [-1]}, "continuation.0: needs a token id from 0, have -1"),
        ({"ids": []}, "ids: needs a list of token ids, not empty, have an empty list"),
        ({"ids": "1 2"}, "ids: needs a list of token ids, not empty, have '1 2'"),
        ({"ids": [1, True]}, "ids.1: needs a token id from 0, have true"),
        ({"ids": [1, 2.0, "3", None]}, "ids.1: needs a token id from 0, have 2.0 (and 2 more)"),
        ({"ids": [2**31]}, "ids.0: needs a token id from 0, have 2147483648"),
        ({"messages": []}, "messages: needs a list of messages, not empty, have an empty list"),
        ({"messages": "Hi"}, "messages: needs a list of messages, not empty, have 'Hi'"),
        ({"messages": ["Hi"]}, "messages.0: needs an object with 'role' and 'content', have 'Hi'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content: needs text, not empty, have a list",
        ),
        (
            {"messages": [{"role": "u", "content": "a", "nmae": 1}]},
            "messages.0: unknown key 'nmae'; there are 'role', 'content'",
        ),
        ({"text": "a", "id": "A B"}, "id: needs lower-case letters"),
        ({"text": "a", "id": 7}, "id: needs lower-case letters"),
        ({"text": "a", "id": "x" * 65}, "id: needs lower-case letters"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, row: Any, expected: str) -> None:
    """And with nothing that a terminal would obey."""
    (found,) = mistakes(tmp_path, {"text": "fine"}, row)

    assert found.startswith(f"line 2: {expected}")
    assert found.isprintable()


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    """Of every line, and several of one."""
    found = mistakes(tmp_path, "{", {"text": "a", "id": 1, "x": 1}, {"ids": [-1]}, {"text": "fine"})

    assert ["1", "2", "2", "3"] == [one.removeprefix("line ")[0] for one in found]


def test_an_id_given_twice(tmp_path: Path) -> None:
    """That of a line without one too."""
    rows = {"text": "a", "id": "line3"}, {"text": "b", "id": "x"}, {"text": "c"}, {"text": "d", "id": "x"}

    assert ["line 3: id 'line3' is that of line 1 too", "line 4: id 'x' is that of line 2 too"] == mistakes(tmp_path, *rows)


def test_a_file_of_something_else_is_told_shortly(tmp_path: Path) -> None:
    """A hundred mistakes, and how many more."""
    found = mistakes(tmp_path, *["prose"] * 150)

    assert (101, "and 50 more") == (len(found), found[-1])


def test_sizes_are_bounded(tmp_path: Path) -> None:
    """Lines and bytes; ten thousand lines are read."""
    assert len(prompts.read(file(tmp_path, *['{"ids":[1]}'] * prompts.MAX_LINES))) == prompts.MAX_LINES
    assert ["needs at most 10000 lines, have 10001"] == mistakes(tmp_path, *['{"ids":[1]}'] * (prompts.MAX_LINES + 1))
    assert [f"not readable: larger than {2**24} bytes"] == mistakes(tmp_path, " " * 2**24)


def test_no_file(tmp_path: Path) -> None:
    """None, a folder, a pipe that would block, and one without a prompt."""
    os.mkfifo(tmp_path / "pipe")
    for path, expected in (
        (tmp_path / "absent", "no such file"),
        (tmp_path, "not readable: not a regular file"),
        (tmp_path / "pipe", "not readable: not a regular file"),
        (file(tmp_path, "", " "), "needs at least one prompt, have none"),
    ):
        with pytest.raises(WorkloadError) as caught:
            prompts.given(path)
        assert [expected] == caught.value.mistakes


def test_a_workload_may_stand_in_its_place(tmp_path: Path) -> None:
    """A JSON object with a schema, in one line or many; its mistakes are a workload's. Another object is a line."""
    path = tmp_path / "mine.json"
    for indent in (None, 1):
        path.write_text(json.dumps(content(), indent=indent), encoding="utf-8")
        found = prompts.given(path)
        assert isinstance(found, Workload)
        assert workload.load_file(path) == found
    path.write_text(json.dumps(content(prompts=[])), encoding="utf-8")
    with pytest.raises(WorkloadError, match="prompts: "):
        prompts.given(path)
    assert (PromptLine(1, "line1", ids=(5,)),) == prompts.given(file(tmp_path, {"ids": [5]}))
    two = (PromptLine(1, "line1", ids=(5,)), PromptLine(2, "line2", ids=(6,)))
    assert two == prompts.given(file(tmp_path, {"ids": [5]}, {"ids": [6]}))
