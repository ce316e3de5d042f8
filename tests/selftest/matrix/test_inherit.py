"""Formats that are like another one, and picks by name: what is taken over, and whose mistakes they are."""

from pathlib import Path

import pytest

from quantdet.matrix import inherit
from quantdet.matrix.load import MatrixError, load
from quantdet.matrix.matrix import Matrix
from selftest.fakes.matrix import MATRIX

NAMED = MATRIX.replace('picks = { "cpu-*" = "fake4" }', 'picks = "int4"') + '\n[picks.int4]\n"cpu-*" = "fake4"\n'


def loaded(folder: Path, more: str, matrix: str = MATRIX) -> Matrix:
    path = folder / "m.toml"
    path.write_text(matrix + more, encoding="utf-8")
    return load(path)


def mistakes(folder: Path, more: str, matrix: str = MATRIX) -> list[str]:
    with pytest.raises(MatrixError) as caught:
        loaded(folder, more, matrix)
    return caught.value.mistakes


def test_a_format_takes_over_what_it_does_not_say(tmp_path: Path) -> None:
    """Every key but the title, of a row that may be like a third one or stand further down; its own keys count."""
    own = (
        '\n[formats.c]\nlike = "b"\ntitle = "C"\nmode = "compiled"\n'
        '[formats.b]\nlike = "int8"\ntitle = "B"\ndtype = "float16"\n'
    )
    inline = "".join(
        f'\n[formats.{name}]\ntitle = "{name.upper()}"\nlayout = "ct"\nweights = "int8-channel"\nactivations = "int8"\n'
        f'kernel = "fake8"\ndtype = "float16"\nmode = "{mode}"\n'
        for name, mode in (("c", "compiled"), ("b", "eager"))
    )

    assert loaded(tmp_path, inline).model_dump() == loaded(tmp_path, own).model_dump()


def test_a_line_in_the_table_of_formats_is_a_format(tmp_path: Path) -> None:
    """As the shipped matrix has them."""
    lines = 'formats.b = { like = "int8", title = "B" }\n'

    matrix = loaded(tmp_path, MATRIX.replace("schema = 1", ""), "schema = 1\n" + lines)

    assert ("B", "fake8") == (matrix.formats["b"].title, matrix.formats["b"].kernel)


def test_picks_go_with_auto() -> None:
    """A row that names a kernel of its own has none; one that does not has those of the other, or its own."""
    base = {"kernel": "auto", "picks": {"cpu-*": "fake4"}}
    rows = {
        "awq": base,
        "pinned": {"like": "awq", "kernel": "fake4"},
        "alike": {"like": "awq"},
        "apart": {"like": "awq", "picks": {"sm90": "fake4"}},
    }

    found = inherit.formats(rows, {}).rows

    assert {
        "awq": base, "pinned": {"kernel": "fake4"}, "alike": base, "apart": {"kernel": "auto", "picks": {"sm90": "fake4"}},
    } == found  # fmt: skip
    assert base == {"kernel": "auto", "picks": {"cpu-*": "fake4"}}


def test_picks_by_name_are_picks(tmp_path: Path) -> None:
    """Written once, for several formats; the matrix says the same."""
    more = '\n[formats.alike]\nlike = "awq"\ntitle = "x"\n'

    assert loaded(tmp_path, more).model_dump() == loaded(tmp_path, more, NAMED).model_dump()


def test_two_formats_do_not_share_a_title(tmp_path: Path) -> None:
    """A title is what tells them apart for people."""
    assert ["formats.b.title: missing"] == mistakes(tmp_path, '\n[formats.b]\nlike = "awq"\n')


def row(name: str, base: str, more: str = "") -> str:
    return f'\n[formats.{name}]\nlike = "{base}"\ntitle = "{name}"\n{more}\n'


def wrong(format_id: str, old: str, new: str) -> str:
    """The small matrix with one key of one format changed."""
    head, mark, rest = MATRIX.partition(f"[formats.{format_id}]")
    return head + mark + rest.replace(old, new, 1)


MISTAKES: dict[str, tuple[str, str, str]] = {
    "unknown": (row("b", "no"), MATRIX, "formats.b.like: no format 'no' in this matrix"),
    "no text": ('[formats.b]\nlike = ["awq"]\ntitle = "B"\n', MATRIX, "formats.b.like: needs the name of a format"),
    "itself": (row("b", "b"), MATRIX, "formats.b.like: leads back to itself: b -> b"),
    "circle": (row("b", "c") + row("c", "d") + row("d", "c"), MATRIX, "formats.c.like: leads back to itself: c -> d -> c"),
    "unknown picks": (row("b", "awq", 'picks = "no"'), MATRIX, "formats.b.picks: no picks 'no' in this matrix"),
    "picks of a pinned kernel": (row("b", "gptq", 'picks = "int4"'), NAMED, "formats.b: 'picks' is for kernel = 'auto' only"),
    "key of its own": (row("b", "awq", 'dtype = "int4"'), MATRIX, "formats.b.dtype: Input should be"),
    "unknown key": (row("b", "awq", 'colour = "red"'), MATRIX, "formats.b.colour: unknown key"),
    "combination": (row("b", "gptq", 'layout = "awq"'), MATRIX, "formats.b: layout 'awq' cannot carry weights 'int4-sym'"),
    "key of the other": (
        row("b", "gptq") + row("c", "b"), wrong("gptq", '"float16"', '"float15"'), "formats.gptq.dtype: Input should be",
    ),
    "unknown key of the other": (row("b", "gptq"), wrong("gptq", "title", "a = 1\ntitle"), "formats.gptq.a: unknown key"),
    "combination of the other": (row("b", "ct"), wrong("ct", "int4-sym", "nf4"), "formats.ct: layout 'ct' cannot carry"),
    "missing in the other": (row("b", "ct"), wrong("ct", 'weights = "int4-sym"\n', ""), "formats.ct.weights: missing"),
    "named picks": (row("b", "awq"), NAMED.replace('-*" = "fake4"\n', '-*" = 4\n'), "picks.int4.cpu-*: Input should be"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_told_where_it_is_written(tmp_path: Path, kind: str) -> None:
    """Once, and not of the rows that take it over."""
    more, matrix, words = MISTAKES[kind]

    found = mistakes(tmp_path, more, matrix)

    assert {words} == {words for line in found if words in line}, found
    assert {words.partition(": ")[0]} == {line.partition(": ")[0] for line in found}


def test_a_chain_as_long_as_a_file_is_followed() -> None:
    """No recursion: thousands of rows, each like the next."""
    rows = {f"f{i}": {"like": f"f{i + 1}"} for i in range(5000)} | {"f5000": {"dtype": "float16"}}

    assert {"dtype": "float16"} == inherit.formats(rows, {}).rows["f0"]


def test_what_is_taken_over_is_bounded() -> None:
    """A file of one megabyte cannot ask for gigabytes, by `like` or by picks."""
    picks = {"many": {f"cpu-{i}": "fake4" for i in range(1000)}}

    with pytest.raises(inherit.TooMuch):
        inherit.formats({f"f{i}": {"picks": "many"} for i in range(101)}, picks)
    with pytest.raises(inherit.TooMuch):
        inherit.formats({"a": {"picks": picks["many"], "kernel": "auto"}, **{f"f{i}": {"like": "a"} for i in range(101)}}, {})
    assert inherit.formats({f"f{i}": {"picks": "many"} for i in range(50)}, picks).rows
