"""Any bytes at all, as recording, matrix, weights and report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quantdet import untrusted
from quantdet.checkpoints import tensors
from quantdet.matrix import load
from quantdet.matrix.cell import Cell
from quantdet.observations.header import Header
from quantdet.observations.observation import HEADER_FILE, TENSORS_FILE, ObservationError, read
from quantdet.observations.published import __main__, checked, layouts
from quantdet.observations.store import Store
from selftest.fakes.matrix import MATRIX
from selftest.fakes.observation import observation
from selftest.observations.test_observation import put
from selftest.whole.test_hostile import ESC, FUZZ, REPORT


@given(st.text())
def test_plain_text_is_printable(text: str) -> None:
    """Whatever is said of a file can be printed; what can be printed already is left as it is."""
    assert untrusted.plain(text).isprintable()
    assert untrusted.plain(text, keep="\n").replace("\n", "").isprintable()
    if text.isprintable():
        assert text == untrusted.plain(text)


def test_colours_of_a_log_are_left_out() -> None:
    """Loggers colour; a report does not."""
    assert "ERROR: no\\x07" == untrusted.plain("\x1b[31;1mERROR\x1b[0m: no\x07")


@FUZZ
@given(where=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_header_is_found_or_changes_nothing(tmp_path: Path, where: int, bit: int) -> None:
    """Whichever bit is turned over: refused, or (a blank between two names) the same header."""
    place = tmp_path / "o"
    put(place, observation())
    whole = read(place).header
    content = bytearray((place / HEADER_FILE).read_bytes())
    content[where % len(content)] ^= 1 << bit
    (place / HEADER_FILE).write_bytes(content)
    try:
        assert whole == read(place).header
    except ObservationError as error:
        assert str(error).isprintable()


@settings(FUZZ, max_examples=20)
@given(data=st.data())
def test_damage_anywhere_in_a_store_costs_a_measurement(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes cut, changed or put in, in either file: the whole observation is found, or none and its place is free."""
    store, cell, key = Store(tmp_path), observation().header.cell, "0" * 64
    with store.writing(cell, "e", key) as folder:
        put(folder, observation())
    place = store.place(cell, "e", key)
    path = place / data.draw(st.sampled_from([HEADER_FILE, TENSORS_FILE]))
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)))
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=20)) + content[end:])

    found = store.find(cell, "e", key)

    if found is None:
        assert not place.exists()
    else:
        assert observation().logits_sha256("decode") == found.logits_sha256("decode")


@settings(FUZZ, max_examples=100)
@given(data=st.data())
def test_any_text_is_a_matrix_or_a_matrix_error(tmp_path: Path, data: st.DataObject) -> None:
    """The file's text with a piece cut out, put in or repeated."""
    start = data.draw(st.integers(0, len(MATRIX)))
    end = data.draw(st.integers(start, min(len(MATRIX), start + 60)))
    pieces = st.text(max_size=10) | st.sampled_from(
        ["[", "{", '"""', "'''", "0x", "1e9999", "-inf", "nan", "\\u001b", "[[", "=", "."]
    )
    piece = data.draw(pieces) * data.draw(st.sampled_from([0, 1, 2, 50, 3000]))
    path = tmp_path / "m.toml"
    path.write_text(MATRIX[:start] + piece + MATRIX[end:], encoding="utf-8", errors="replace")
    try:
        list(load.load(path).cells())
    except load.MatrixError as error:
        assert error.mistakes
        assert str(error).replace("\n", "").isprintable()


@FUZZ
@given(data=st.data())
def test_any_bytes_are_weights_or_a_value_error(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes of a checkpoint's file cut, changed or put in: every tensor can be read, or the file is refused."""
    path = tmp_path / "model.safetensors"
    tensors.save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(5, np.int8)}, path)
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 12)))
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=12)) + content[end:])
    try:
        for array in tensors.load(path).values():
            array.sum()
    except ValueError as error:
        assert str(path) in str(error)


@FUZZ
@given(data=st.data())
def test_any_bytes_are_a_report_or_a_line(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes of a published file cut, changed or put in: it is imported, or refused in one printable line."""
    content = REPORT.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 40)))
    path = tmp_path / "report.json"
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=20)) + content[end:])

    try:
        for one in layouts.read(checked.load(path)):
            __main__.observe(one, Cell("qwen3-8b", one.format_id, "sm80"))
    except checked.ImportRefused as error:
        assert str(error).isprintable()


@settings(max_examples=40)
@given(st.recursive(st.none() | st.integers() | st.floats() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)))
def test_no_document_is_too_much_for_the_check(document: Any) -> None:
    """A flaw is named in printable words, and what has none is printable throughout."""
    found = untrusted.flaw(document)
    if found is None:
        with_names = json.dumps(document, ensure_ascii=False)
        assert with_names.isprintable()
    else:
        assert ": ".join(found).isprintable()


def test_a_header_says_what_its_refusal_said_in_printable_words() -> None:
    """A refusal is the one text that may have lines; nothing in it steers a terminal."""
    header = observation().header
    spoiled = Header.model_validate({**header.model_dump(by_alias=True), "refusal": f"no{ESC}\nreally\x07"})
    assert "no\nreally\\x07" == spoiled.refusal
    with pytest.raises(ValidationError):
        Header.model_validate({**header.model_dump(by_alias=True), "refusal": 7})
