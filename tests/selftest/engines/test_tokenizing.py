"""Texts and messages to token ids by a checkpoint's tokenizer, in a process; its answers kept, checked, and made a workload."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantdet.engines import prompted, tokenizing
from quantdet.engines.child.packages import module_is_here
from quantdet.engines.prompted import to_workload
from quantdet.engines.tokenizing import Tokenized, TokenizedPrompt
from quantdet.matrix import workload
from quantdet.matrix.prompts import PromptLine
from quantdet.matrix.workload import Workload, WorkloadError
from selftest.fakes.matrix import ROOT

PROMPTS = ROOT / "fixtures" / "prompts"
WORDS = ("<unk>", "<s>", "</s>", "a", "b", "c", "user", "assistant", ":")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer(folder: Path, template: str | None = TEMPLATE, adds_bos: bool = True) -> Path:
    """A checkpoint folder with a tokenizer of whole words, which puts BOS before a text."""
    folder.mkdir(parents=True, exist_ok=True)
    special = [{"id": i, "content": WORDS[i], "special": True, "normalized": False} for i in range(3)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    bos, sequence = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing", "single": [bos, sequence], "pair": [bos, sequence],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }  # fmt: skip
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "<unk>"}
    text = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [{**one, **flags} for one in special],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": processor if adds_bos else None, "decoder": None, "model": model,
    }  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {} if template is None else {"chat_template": template}
    for name, content in ("tokenizer.json", text), ("tokenizer_config.json", config), ("config.json", {"model_type": "qwen3"}):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def transformers() -> None:
    """Processes of this interpreter can read a tokenizer."""
    for name in ("transformers", "tokenizers", "jinja2"):
        if not module_is_here(name):
            pytest.skip(f"needs {name} (pip install -e '.[transformers]'), have none")


def user(*contents: str) -> tuple[tuple[str, str], ...]:
    return tuple(("user", one) for one in contents)


# ------------------------------------------------------------------------------------------------------ the real process


def test_text_messages_and_continuations(transformers: None, tmp_path: Path) -> None:
    """A text with its BOS, messages by the template without a second one, a continuation with none; mistakes by prompt."""
    lines = (
        PromptLine(1, "one", text="a b"),
        PromptLine(2, "two", messages=user("a", "c"), continuation="b c"),
        PromptLine(3, "three", ids=(7, 8), continuation="a"),
        PromptLine(4, "four", ids=(3, 3, 3, 3)),
        PromptLine(5, "five", text="<s> a"),
        PromptLine(6, "six", text="a", continuation=" "),
        PromptLine(7, "seven", text="a", continuation=(5,)),
    )

    found = tokenizing.tokenize(tokenizer(tmp_path / "t"), lines)

    assert (1, len(WORDS), (), "") == (found.bos, found.vocabulary, found.warnings, found.error)
    chat = (1, 6, 8, 3, 2, 6, 8, 5, 2, 7, 8)
    one, two, three, four, five, six, seven = found.prompts
    assert TokenizedPrompt((1, 3, 4)) == one
    assert TokenizedPrompt(chat, (4, 5)) == two
    assert TokenizedPrompt((7, 8), (3,)) == three
    assert TokenizedPrompt((3, 3, 3, 3)) == four
    assert five.error.startswith("needs one BOS (token 1) at the beginning, have two: the text has BOS itself")
    assert six.error.startswith("continuation: needs at least one token, have none")
    assert TokenizedPrompt((1, 3), (5,)) == seven


def answers(*requests: tuple[Path, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the program answers to one prompt of each folder; one process for all."""
    code = "import json, sys; from quantdet.engines.transformers.tokenizer import answer\n"
    code += "print(json.dumps([answer(one) for one in json.load(sys.stdin)]))"
    given = json.dumps([{"folder": str(folder), "prompts": [prompt]} for folder, prompt in requests])
    run = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return list(json.loads(run.stdout))


def test_templates_of_others(transformers: None, tmp_path: Path) -> None:
    """None, one that fails, one without BOS, one that adds to the messages' BOS, one that makes nothing: all told."""
    hi, bos = ({"messages": [{"role": "user", "content": text}]} for text in ("a", "<s> a"))

    missing, fails, without, twice, empty = answers(
        (tokenizer(tmp_path / "missing", None), hi),
        (tokenizer(tmp_path / "fails", "{{ raise_exception('no system role') }}"), hi),
        (tokenizer(tmp_path / "without", "{{ messages[0]['content'] }}"), hi),
        (tokenizer(tmp_path / "twice", "{{ bos_token }} {{ messages[0]['content'] }}"), bos),
        (tokenizer(tmp_path / "empty", "{{ '' }}", adds_bos=False), hi),
    )

    needs = "messages: needs a tokenizer with a chat template, have none; give text or ids"
    assert [{"error": needs}] == missing["prompts"]
    assert "no system role" in fails["prompts"][0]["error"]
    assert [{"ids": [3], "continuation": None}] == without["prompts"]
    assert ["the chat template writes no BOS, which the tokenizer puts before a text"] == without["warnings"]
    assert "have two: the chat template writes BOS, and so do the messages" in twice["prompts"][0]["error"]
    assert "needs at least one token, have none: the tokenizer makes nothing of it" == empty["prompts"][0]["error"]
    assert [] == twice["warnings"] == empty["warnings"]


def test_nothing_of_a_checkpoint_is_run(transformers: None, tmp_path: Path) -> None:
    """Code of a tokenizer does not run, and that is told; a file that cannot be read is no tokenizer."""
    code, broken = tokenizer(tmp_path / "code"), tokenizer(tmp_path / "broken")
    (code / "tok.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Fast: pass\n", encoding="utf-8")
    config = {"auto_map": {"AutoTokenizer": [None, "tok.Fast"]}, "tokenizer_class": "Unheard"}
    (code / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (broken / "tokenizer.json").write_text("{", encoding="utf-8")

    own, none = answers((code, {"text": "a"}), (broken, {"text": "a"}))

    assert not (tmp_path / "ran").exists()
    told = "the checkpoint brings code for its tokenizer, which is not run"
    assert [told] == [one.partition(":")[0] for one in own["warnings"]]
    assert none["error"].startswith("transformers reads no tokenizer there: ")
    assert "passing" not in none


# ---------------------------------------------------------------------------------------- the process, and what is kept


class Process:
    """In the place of the real program: `code` of Python, with the request as `request`; counts its starts."""

    def __init__(self, folder: Path, code: str) -> None:
        self._starts = folder / "starts"
        text = f"import json, sys\nopen({str(self._starts)!r}, 'a').write('x')\nrequest = json.load(sys.stdin)\n{code}\n"
        (folder / "standing_in.py").write_text(text, encoding="utf-8")

    @property
    def starts(self) -> int:
        return len(self._starts.read_text(encoding="utf-8")) if self._starts.exists() else 0


ANSWERS = (
    "rows = [{'ids': [len(one['text'])], 'continuation': None} for one in request['prompts']]\n"
    "print(json.dumps({'bos': None, 'vocabulary': 9, 'warnings': [], 'prompts': rows}))"
)


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a `Process`, which then answers."""

    def make(code: str = ANSWERS) -> Process:
        (tmp_path / "module").mkdir(exist_ok=True)
        monkeypatch.setattr(tokenizing, "_MODULE", "standing_in")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "module"))
        return Process(tmp_path / "module", code)

    return make


ONE = (PromptLine(1, "x", text="abc"),)


def test_no_process_without_need(process: Any, tmp_path: Path) -> None:
    """Token ids need none, nor does a folder without a vocabulary, of which transformers would make an empty one."""
    counted = process()
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer_config.json").write_text("{}", encoding="utf-8")

    ids = tokenizing.tokenize(tmp_path / "t", (PromptLine(1, "x", ids=(1, 2), continuation=(3,)),))
    none = tokenizing.tokenize(tmp_path / "t", ONE)

    assert Tokenized((TokenizedPrompt((1, 2), (3,)),)) == ids
    assert Tokenized((TokenizedPrompt(),), error="no file with a vocabulary in t") == none
    assert (False, 0) == (tokenizing.has_tokenizer(tmp_path / "t"), counted.starts)


def test_an_answer_is_kept(process: Any, tmp_path: Path) -> None:
    """For the same files and prompts; weights say nothing, another file or prompt asks again, so does a spoiled answer."""
    counted, folder, cache = process(), tokenizer(tmp_path / "t"), tmp_path / "cache"

    def ask(lines: Sequence[PromptLine] = ONE) -> int:
        assert (len(lines[0].text or ""),) == tokenizing.tokenize(folder, lines, cache=cache).prompts[0].ids
        return counted.starts

    assert [1, 1] == [ask(), ask()]
    (folder / "model.safetensors").write_bytes(b"x")
    assert 1 == ask()
    assert 2 == ask((PromptLine(1, "x", text="abcd"),))
    (folder / "chat_template.jinja").write_text("x", encoding="utf-8")
    assert [3, 3] == [ask(), ask()]
    for path in cache.glob("*.json"):
        path.write_text(
            json.dumps({"bos": None, "vocabulary": 9, "warnings": [], "prompts": [{"ids": [-1]}]}), encoding="utf-8"
        )
    assert [4, 4] == [ask(), ask()]


def test_workers_start_one_process(process: Any, tmp_path: Path) -> None:
    """Those that come meanwhile wait for it and take its answer."""
    counted, folder = process("import time; time.sleep(0.5)\n" + ANSWERS), tokenizer(tmp_path / "t")
    found: list[Tokenized] = []
    workers = [
        threading.Thread(target=lambda: found.append(tokenizing.tokenize(folder, ONE, cache=tmp_path / "cache")))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert ([((3,),)] * 3, 1) == ([tuple(one.ids for one in each.prompts) for each in found], counted.starts)


@pytest.mark.parametrize(
    ("code", "expected", "starts"),
    [
        ("import time; time.sleep(60)", "the tokenizer gave no answer within 1 s", 2),
        ("sys.exit(3)", "the tokenizer's process ended with exit code 3 and no answer: it said nothing", 2),
        ("raise ValueError('so')", "the tokenizer's process ended with exit code 1 and no answer: ValueError: so", 2),
        ("import os; os.kill(os.getpid(), 9)", "the tokenizer's process ended with signal 9 and no answer: it said nothing", 2),
        ("print('not JSON')", "the tokenizer's process ended with exit code 0 and no answer: it said nothing", 2),
        ("print(json.dumps({'error': 'no transformers', 'passing': True}))", "no transformers", 2),
        ("print(json.dumps({'error': 'no \\x1b[31mtokenizer'}))", "no tokenizer", 1),  # of the checkpoint: kept
    ],
)  # fmt: skip
def test_a_process_without_an_answer_is_an_error(process: Any, tmp_path: Path, code: str, expected: str, starts: int) -> None:
    """Told, and asked again the next time, unless it was about the checkpoint."""
    counted, folder = process(code), tokenizer(tmp_path / "t")

    for _ in range(2):
        found = tokenizing.tokenize(folder, ONE, cache=tmp_path / "cache", time_limit_s=1 if "sleep" in code else 60)
        assert Tokenized((TokenizedPrompt(),), error=expected) == found
    assert starts == counted.starts


def test_nothing_comes_from_a_hub(process: Any, tmp_path: Path) -> None:
    """The process is offline, of the same Python, and imports nothing from the folder that the run was started in."""
    code = (
        "import os\nraise SystemExit(' '.join((os.environ['HF_HUB_OFFLINE'], os.environ['TRANSFORMERS_OFFLINE'], sys.executable"
    )
    process(code + ", str(os.getcwd() in sys.path or '' in sys.path))))")

    found = tokenizing.tokenize(tokenizer(tmp_path / "t"), ONE)

    assert found.error.endswith(f": 1 1 {sys.executable} False"), os.getcwd()


# ----------------------------------------------------------------------------------------------------------- a workload


def given(*ids: Sequence[int], continuation: tuple[int, ...] | None = None, **more: Any) -> Workload:
    lines = tuple(PromptLine(i, f"line{i}", ids=tuple(one), continuation=continuation) for i, one in enumerate(ids, 1))
    tokenized = Tokenized(tuple(TokenizedPrompt(tuple(one), continuation) for one in ids))
    return to_workload(lines, tokenized, **{"vocab_size": 100, "max_positions": 64, "decode_tokens": 4, **more})


@pytest.mark.parametrize(
    ("length", "forced", "start"), [(4, 2, 2), (5, 2, 2), (7, 2, 3), (8, 2, 4), (12, 3, 4), (40, 10, 4), (60, 15, 4)]
)
def test_the_last_quarter_is_forced(length: int, forced: int, start: int) -> None:
    """At least two ids; what counts begins at 4, or half-way in a shorter prompt, and never at its end."""
    (prompt,) = given(range(length)).prompts

    assert tuple(range(length)) == prompt.joined
    assert (forced, start) == (len(prompt.forced_ids), prompt.content_start)
    assert 0 < prompt.content_start < length


def test_a_continuation_is_what_is_forced(tmp_path: Path) -> None:
    """And the workload is the same as one of a file with these ids."""
    made = given([1, 2, 3], continuation=(4, 5, 6, 7, 8))
    row = {"id": "line1", "token_ids": [1, 2, 3], "forced_ids": [4, 5, 6, 7, 8], "content_start": 4}
    (tmp_path / "prompts.json").write_text(json.dumps({"schema": 1, "id": "prompts", "title": "x", "prompts": [row]}))

    assert workload.load("prompts", tmp_path) == made
    assert made.sha256 != given([1, 2, 3], continuation=(4, 5, 6, 7, 9)).sha256


def test_every_mistake_at_once() -> None:
    """Need and have, by line; a missing tokenizer is told once."""
    lines = (
        PromptLine(1, "line1", text="a"),
        PromptLine(2, "two", ids=(1, 2, 3)),
        PromptLine(3, "line3", ids=(9, 9, 100, 300, 5)),
        PromptLine(4, "line4", text="b"),
        PromptLine(5, "line5", ids=tuple(range(61))),
        PromptLine(6, "line6", ids=(1, 2, 3, 4)),
    )
    prompts = tuple(TokenizedPrompt(line.ids or ()) for line in lines)
    prompts = (*prompts[:5], replace(prompts[5], ids=(), error="needs something, have nothing"))

    with pytest.raises(WorkloadError) as caught:
        to_workload(lines, Tokenized(prompts, error="none there"), vocab_size=100, max_positions=64, decode_tokens=4)

    assert [
        'line 1 and 1 more need a tokenizer, have none: none there; token ids ("ids") need none',
        "line 2 (two): needs at least 4 tokens of prompt and continuation together, have 3",
        "line 3: needs token ids below the model's vocabulary of 100, have 300 (2 outside)",
        "line 5: needs at most 60 tokens (64 positions less 4 generated tokens), have 61",
        "line 6: needs something, have nothing",
    ] == caught.value.mistakes


def test_what_just_fits_is_no_mistake() -> None:
    """The last id of the vocabulary, the last position; without known positions any length."""
    assert given([99, 1, 2, 3], range(60))
    assert given(range(99), max_positions=None)


# --------------------------------------------------------------------------------------------------- without prompts


def default(tokenize: Any = None, **more: Any) -> tuple[Workload, tuple[str, ...]]:
    return prompted.default(
        PROMPTS, tokenize=tokenize, **{"vocab_size": 1000, "max_positions": 4096, "decode_tokens": 4, **more}
    )


def test_synthetic_ids_as_they_are() -> None:
    """A vocabulary of 1000 has them; it is the released workload, not a copy with another hash."""
    assert (workload.load("synthetic-v1", PROMPTS), ()) == default(max_positions=292)


def test_a_smaller_vocabulary_has_ids_of_its_own() -> None:
    """Modulo its size, and the name says so."""
    released, (made, _) = workload.load("synthetic-v1", PROMPTS), default(vocab_size=999)

    assert "synthetic-v1-mod999" == made.id
    assert [tuple(token % 999 for token in one.joined) for one in released.prompts] == [one.joined for one in made.prompts]
    workload.check_vocab(made, 999)
    assert made.sha256 != released.sha256


def test_a_short_context_cuts_what_is_longer() -> None:
    """To what is left beside the generated tokens; shorter sequences stay, divided as they were."""
    released, (made, _) = workload.load("synthetic-v1", PROMPTS), default(max_positions=100, vocab_size=512)

    assert "synthetic-v1-mod512-max96" == made.id
    assert [20, 44, 96, 96] == [len(one.joined) for one in made.prompts]
    assert [len(one.forced_ids) for one in released.prompts[:3]] + [24] == [len(one.forced_ids) for one in made.prompts]
    with pytest.raises(WorkloadError, match="needs at least 8 positions for 4 generated tokens, have 7"):
        default(max_positions=7)
    assert 4 == workload.max_tokens(default(max_positions=8)[0])


def test_texts_where_there_is_a_tokenizer() -> None:
    """The suite's, prompt and continuation apart; warnings are handed on."""
    asked: list[PromptLine] = []

    def tokenize(lines: tuple[PromptLine, ...]) -> Tokenized:
        asked.extend(lines)
        both = [(tuple(one.encode()) for one in (line.text or "", str(line.continuation))) for line in lines]
        return Tokenized(tuple(TokenizedPrompt(*one) for one in both), 1, 256, ("a word",))

    made, notes = default(tokenize)
    released = workload.load("text-v1", PROMPTS)

    assert ("text-v1-ids", ("a word",)) == (made.id, notes)
    assert [(one.text, one.forced_text) for one in released.prompts] == [(one.text, one.continuation) for one in asked]
    assert [(one.id, one.content_start) for one in released.prompts] == [(one.id, one.content_start) for one in made.prompts]
    assert [one.text for one in released.prompts] == [bytes(one.token_ids).decode() for one in made.prompts]
    assert "text-v1-ids-max60" == default(tokenize, max_positions=64)[0].id


@pytest.mark.parametrize(
    ("made", "note"),
    [
        (Tokenized((TokenizedPrompt(),) * 4, error="a broken one"), "need a tokenizer, have none: a broken one"),
        (Tokenized((TokenizedPrompt((5, 6, 7, 5000)),) * 4), "have 5000"),
    ],
)
def test_ids_where_the_tokenizer_does_not_fit(made: Tokenized, note: str) -> None:
    """Nobody asked for text: that it cannot be had is a note, no mistake."""
    count = len(workload.load("text-v1", PROMPTS).prompts)

    found, (told,) = default(lambda lines: replace(made, prompts=made.prompts[:1] * count))

    assert "synthetic-v1" == found.id
    assert told.startswith("token ids instead of text: ")
    assert note in told
