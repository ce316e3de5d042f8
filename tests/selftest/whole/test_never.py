"""What the suite never does: unpickle, or run the code of a checkpoint."""

import ast
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantdet.checkpoints import hub
from selftest.fakes.matrix import TESTS

# Modules that run code which data asks for, and calls that unpickle.
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml", "jsonpickle"}


FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "recv", "send", "read_pickle", "to_pickle"}


def offences(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_CALLS - {"eval", "exec", "torch.load"}:
                found.append(name)
            found += [word.arg for word in node.keywords if word.arg == "allow_pickle" and ast.unparse(word.value) != "False"]
        if "trust_remote_code" in (getattr(node, "value", None), getattr(node, "arg", None)):
            found.append("trust_remote_code")
    return found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load(path)", "connection.recv()", "eval(text)",
        "np.load(path, allow_pickle=True)", "vllm.LLM(model, trust_remote_code=True)", 'args["trust_remote_code"] = True',
    ],
)  # fmt: skip
def test_offences_are_seen(text: str) -> None:
    """The next test would see each of them."""
    assert offences(text)


def test_nothing_unpickles_and_nothing_trusts_code() -> None:
    """In no module of the suite: data is JSON, TOML, safetensors and GGUF; pipes between processes carry bytes."""
    modules = sorted((TESTS / "quantdet").rglob("*.py"))

    found = {path.name: names for path in modules if (names := offences(path.read_text(encoding="utf-8")))}
    assert {  # where it is refused, or False
        "rows.py": ["trust_remote_code"], "arguments.py": ["trust_remote_code"], "tokenizer.py": ["trust_remote_code"]
    } == found  # fmt: skip
    tokenizer = (TESTS / "quantdet/engines/transformers/tokenizer.py").read_text(encoding="utf-8")
    assert tokenizer.count("trust_remote_code") == tokenizer.count("trust_remote_code=False") == 1
    assert len(modules) > 50


def test_no_code_and_no_pickle_is_fetched_from_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a hub is asked for by name."""
    asked: dict[str, Any] = {}

    def snapshot_download(repository: str, **given: Any) -> str:
        asked.update(given)
        (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    errors = SimpleNamespace(HfHubHTTPError=OSError, LocalEntryNotFoundError=OSError)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub.errors", errors)
    hub.snapshot("o/r", allow_download=True)

    def fetched(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in asked["allow_patterns"])

    code = [
        "modeling_x.py",
        "tokenizer.py",
        "tokenization_x.py",
        "pytorch_model.bin",
        "model.pt",
        "x.pkl",
        "x.so",
        "tokenizer.bin",
    ]
    assert [] == [name for name in code if fetched(name)]
    wanted = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "vocab.txt"]
    assert wanted == [name for name in wanted if fetched(name)]
