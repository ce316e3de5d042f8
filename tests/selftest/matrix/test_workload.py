"""Workload files: what is accepted, what is refused and how, and the workloads that the suite ships."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdet.matrix import workload
from quantdet.matrix.workload import Prompt, Workload, WorkloadError

PROMPTS = Path(__file__).resolve().parents[3] / "fixtures" / "prompts"
# What runs under a released id never changes: a changed prompt is a new id, or recordings of both would be compared.
RELEASED = {
    "synthetic-v1": "8620f18a6b8fdbe0634dece13a5a56d750f09cfbac86f9914bfc03519c9072e2",
    "claims-v1": "ef86591df5d33f1e0a5e0c74cf3bdce966c8edcbbea4e93d6337a0f31e3034af",
    "smollm2-v1": "f153815f6f11fa9b0117c92b3a30bf54d5bb08b128b1a776abecb929f8b1a838",
    "text-v1": "17d35f0131458714f195a2af35df97d9ff757b90510a5eae314a7cd5d956201a",
}
ids = st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=10)


def prompt(**changes: Any) -> dict[str, Any]:
    row = {"id": "p0", "token_ids": [9, 8, 7], "forced_ids": [6, 5], "content_start": 1} | changes
    return {key: value for key, value in row.items() if value is not ...}


def content(*prompts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"schema": 1, "id": "w", "title": "A workload", "prompts": list(prompts or [prompt()])} | changes


def load(directory: Path, data: Any) -> Workload:
    text = data if isinstance(data, str) else json.dumps(data)
    (directory / "w.json").write_text(text, encoding="utf-8")
    return workload.load("w", directory)


def mistakes(directory: Path, data: Any) -> list[str]:
    with pytest.raises(WorkloadError) as caught:
        load(directory, data)
    assert str(directory / "w.json") in str(caught.value)
    return caught.value.mistakes


class TestLoad:
    def test_ids_and_text(self, tmp_path: Path) -> None:
        """Both kinds of prompt are read; text beside ids is kept as documentation."""
        text = prompt(id="p1", token_ids=..., forced_ids=..., text="Who", forced_text=" am I?")
        loaded = load(tmp_path, content(prompt(text="note"), text))
        assert "w" == loaded.id
        assert (
            Prompt("p0", (9, 8, 7), (6, 5), 1, "note", None),
            Prompt("p1", (), (), 1, "Who", " am I?"),
        ) == loaded.prompts
        assert [(9, 8, 7, 6, 5), ()] == [p.joined for p in loaded.prompts]
        assert 5 == workload.max_tokens(loaded)

    @settings(deadline=None, derandomize=True, database=None, max_examples=40)
    @given(st.lists(st.tuples(ids, ids), min_size=1, max_size=4))
    def test_what_is_written_is_loaded(
        self, tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[list[int], list[int]]]
    ) -> None:
        """Any valid ids come back unchanged and in order, and the longest sequence is known."""
        rows = [prompt(id=f"p{i}", token_ids=a, forced_ids=b) for i, (a, b) in enumerate(pairs)]
        loaded = load(tmp_path_factory.mktemp("w"), content(*rows))
        assert [(tuple(a), tuple(b)) for a, b in pairs] == [(p.token_ids, p.forced_ids) for p in loaded.prompts]
        assert max(len(a) + len(b) for a, b in pairs) == workload.max_tokens(loaded)

    def test_the_hash_is_that_of_the_prompts(self, tmp_path: Path) -> None:
        """Layout, key order and title leave the hash alone; any change of a prompt, or of their order, changes it."""
        a, b = prompt(), prompt(id="p1")
        reference = load(tmp_path, content(a, b)).sha256
        turned = content(dict(reversed(a.items())), b, title="Another")
        assert reference == load(tmp_path, json.dumps(turned, indent=3)).sha256
        others = [
            content(b, a), content(a), content(a, b | {"content_start": 2}), content(a, b | {"forced_ids": [6, 4]}),
            content(a, b | {"token_ids": [9, 8], "forced_ids": [7, 6, 5]}), content(a, b | {"id": "p2"}),
            content(a, b | {"text": "note"}),
        ]  # fmt: skip
        hashes = {load(tmp_path, other).sha256 for other in others}
        assert len(others) == len(hashes - {reference})

    @pytest.mark.parametrize("name", ["../w", "a/w", "", ".", "..", "W", "w\n", "w\0", ".w", "w w", "wä"])
    def test_a_name_cannot_leave_the_directory(self, tmp_path: Path, name: str) -> None:
        """A name with anything but a-z 0-9 . _ - is refused before a file is looked for."""
        (tmp_path / "w.json").write_text(json.dumps(content()), encoding="utf-8")
        (tmp_path / "a").mkdir()
        with pytest.raises(WorkloadError, match="a workload's name is"):
            workload.load(name, tmp_path / "a")

    def test_missing_file(self, tmp_path: Path) -> None:
        """No file, and a directory in its place, are one clear message."""
        (tmp_path / "d.json").mkdir()
        for name in ("w", "d"):
            with pytest.raises(WorkloadError, match="no such workload"):
                workload.load(name, tmp_path)

    def test_the_size_is_bounded(self, tmp_path: Path) -> None:
        """A file above 16 MiB is not parsed."""
        text = json.dumps(content())
        assert load(tmp_path, text + " " * (workload.MAX_BYTES - len(text)))
        assert ["larger than 16 MiB"] == mistakes(tmp_path, text + " " * (workload.MAX_BYTES - len(text) + 1))

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "\ud800",
            "[" * 100_000,
            '{"schema": 1, "schema": 1}',
            '{"schema": NaN}',
            '{"schema": ' + "9" * 5000 + "}",
        ],
        ids=["empty", "cut", "no-utf8", "deep", "key-twice", "nan", "huge-number"],
    )
    def test_what_is_no_json_is_refused(self, tmp_path: Path, text: str) -> None:
        """Cut off, not UTF-8, nested without end, ambiguous: a message, never another exception."""
        (tmp_path / "w.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(WorkloadError, match="not readable as JSON"):
            workload.load("w", tmp_path)

    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            ([], "valid dictionary"),
            (content(schema=2), "schema: "),
            (content(id="other"), "id: is 'other', the file's name says 'w'"),
            (content(prompts=[]), "prompts: "),
            (content(extra=1), "extra: unknown key"),
            (content(prompt(extra=1)), "prompts.0.extra: unknown key"),
            (content(prompt(content_start=...)), "prompts.0.content_start: missing"),
            (content(prompt(content_start=0)), "prompts.0.content_start: "),
            (content(prompt(content_start=5)), "prompts.0: 'content_start' 5 leaves no content in a sequence of 5"),
            (content(prompt(token_ids=[1, -1])), "prompts.0.token_ids.1: "),
            (content(prompt(token_ids=[1, True])), "prompts.0.token_ids.1: "),
            (content(prompt(token_ids=[1, "2"])), "prompts.0.token_ids.1: "),
            (content(prompt(token_ids=[1, 2.0])), "prompts.0.token_ids.1: "),
            (content(prompt(forced_ids=[2**31])), "prompts.0.forced_ids.0: "),
            (content(prompt(token_ids=[1, 2], forced_ids=[3])), "prompts.0: prompt and forced ids together must be"),
            (content(prompt(forced_ids=[])), "prompts.0: 'token_ids' and 'forced_ids' belong together"),
            (content(prompt(token_ids=..., text="a")), "prompts.0: 'token_ids' and 'forced_ids' belong together"),
            (content(prompt(token_ids=..., forced_ids=..., text="a")), "prompts.0: needs "),
            (content(prompt(id="P 0")), "prompts.0.id: "),
            (content(prompt(), prompt(id="p1"), prompt()), "prompts: id used twice: p0"),
        ],
    )
    def test_a_mistake_is_named_by_its_place(self, tmp_path: Path, data: Any, expected: str) -> None:
        """Each kind of mistake is refused with the JSON path of the field."""
        found = mistakes(tmp_path, data)
        assert 1 == len(found)
        assert expected in found[0]

    def test_all_mistakes_at_once(self, tmp_path: Path) -> None:
        """Mistakes in different prompts come together, one a line."""
        found = mistakes(tmp_path, content(prompt(token_ids=[-1, 2]), prompt(id=7), extra=1))
        assert ["extra", "prompts.0.token_ids.0", "prompts.1.id"] == sorted(m.split(":")[0] for m in found)


class TestLoadFile:
    def test_at_any_path(self, tmp_path: Path) -> None:
        """Under any file name, with the id that stands in it, and the same hash as by its name."""
        (tmp_path / "My prompts.txt").write_text(json.dumps(content()), encoding="utf-8")

        assert load(tmp_path, content()) == workload.load_file(tmp_path / "My prompts.txt")

    def test_mistakes_are_those_of_any_workload(self, tmp_path: Path) -> None:
        """And an id that could be no name is one."""
        path = tmp_path / "x"
        for data, expected in (
            (content(prompt(content_start=9)), "prompts.0: 'content_start' 9"),
            (content(id="My Prompts"), "id: a workload's id is lower-case letters"),
        ):
            path.write_text(json.dumps(data), encoding="utf-8")
            with pytest.raises(WorkloadError, match=expected):
                workload.load_file(path)
        with pytest.raises(WorkloadError, match="no such workload"):
            workload.load_file(tmp_path / "absent")

    def test_prompts_alone_are_the_same_workload(self, tmp_path: Path) -> None:
        """The hash is over the prompts, whether they come from a file or not."""
        text = prompt(id="p1", token_ids=..., forced_ids=..., text="Who", forced_text=" am I?")
        loaded = load(tmp_path, content(prompt(text="note"), text))

        assert loaded == workload.of_prompts("w", loaded.prompts)
        assert loaded.sha256 != workload.of_prompts("w", loaded.prompts[::-1]).sha256


def test_check_vocab() -> None:
    """A vocabulary must have every id of prompt and continuation; text is not judged; all prompts are reported."""
    prompts = (
        Prompt("a", (1, 99), (2, 3), 1, None, None),
        Prompt("b", (1, 2), (3, 100), 1, None, None),
        Prompt("t", (), (), 1, "text", "more"),
    )
    loaded = Workload("w", "0" * 64, prompts)
    workload.check_vocab(loaded, 101)
    with pytest.raises(WorkloadError) as caught:
        workload.check_vocab(loaded, 100)
    assert ["prompts.b: token id 100 is outside a vocabulary of 100"] == caught.value.mistakes
    with pytest.raises(WorkloadError, match="2 mistakes"):
        workload.check_vocab(loaded, 99)


class TestShipped:
    @pytest.mark.parametrize("name", sorted(RELEASED))
    def test_a_released_workload_does_not_change(self, name: str) -> None:
        """The prompts of a released id are those recordings were made with."""
        assert RELEASED[name] == workload.load(name, PROMPTS).sha256

    def test_every_file_is_released(self) -> None:
        """No workload file without its hash here."""
        assert sorted(RELEASED) == sorted(path.stem for path in PROMPTS.glob("*.json"))

    @pytest.mark.parametrize("name", ["synthetic-v1", "smollm2-v1"])
    def test_a_third_is_forced_and_no_length_is_ambiguous(self, name: str) -> None:
        """The last third is forced; no prefill is one token, or one chunk and one token, beyond a cached prefix."""
        for p in workload.load(name, PROMPTS).prompts:
            assert len(p.joined) // 3 == len(p.forced_ids)
            assert len(p.joined) - 1 not in (1, 1025)

    def test_synthetic_is_made_as_its_title_says(self) -> None:
        """The ids are 8 + raw % 992 over a Philox stream, and the lengths lie on both sides of 32, 50 and 256."""
        loaded = workload.load("synthetic-v1", PROMPTS)
        lengths = [len(p.joined) for p in loaded.prompts]
        assert [20, 44, 96, 288] == lengths
        raw = np.random.Philox(key=20260101).random_raw(sum(lengths)).tolist()
        assert [8 + value % 992 for value in raw] == [token for p in loaded.prompts for token in p.joined]
        workload.check_vocab(loaded, 1000)

    def test_smollm2_fits_its_vocabulary_and_template(self) -> None:
        """Ids fit SmolLM2's vocabulary; the content of the ChatML question starts at the answer, after its header."""
        loaded = workload.load("smollm2-v1", PROMPTS)
        workload.check_vocab(loaded, 49152)
        chat = next(p for p in loaded.prompts if p.id == "chat")
        start, end = 1, 2  # <|im_start|>, <|im_end|>
        assert [3, 2] == [chat.token_ids.count(start), chat.token_ids.count(end)]
        assert len(chat.token_ids) == chat.content_start
        assert not {start, end} & set(chat.forced_ids)
