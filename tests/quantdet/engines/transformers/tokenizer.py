"""Texts and messages to token ids: a program of its own, since it imports transformers and runs a checkpoint's chat template.

`python -m quantdet.engines.transformers.tokenizer` reads a request from standard input and writes its answer to standard
output, both JSON (`quantdet.engines.tokenizing`, which starts it):

    {"folder": "...", "prompts": [{"text": "..."} | {"messages": [...]} | {}, each with "continuation": "..." or null]}
    {"bos": 1, "vocabulary": 512, "warnings": [], "prompts": [{"ids": [...], "continuation": [...]} | {"error": "..."}]}

or `{"error": "..."}`, with `"passing": true` if that says nothing of the checkpoint. Nothing comes from a hub, and no code of
the checkpoint is run.
"""

import json
import os
import sys
from typing import Any

from quantdet.engines.child import packages

# A template is somebody else's program: what it writes is bounded before it is tokenised.
_MOST_CHARACTERS = 16 * 2**20


class _Wrong(Exception):
    """A prompt cannot be used; the message says why."""


class _Tokenizer:
    """The tokenizer of a checkpoint, as far as it is needed here."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        self.adds_bos = self.bos is not None and self._ids("a", True)[:1] == [self.bos]
        self.warnings: list[str] = []
        if "AutoTokenizer" in (getattr(tokenizer, "init_kwargs", {}).get("auto_map") or ()):
            self.warnings.append("the checkpoint brings code for its tokenizer, which is not run: transformers' own is taken")

    def prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        """Ids of a prompt and of its continuation, or the error that it is."""
        try:
            ids = self._given(row)
            continuation = row.get("continuation")
            forced = None if continuation is None else self._ids(continuation, False)
            if forced == []:
                raise _Wrong("continuation: needs at least one token, have none: the tokenizer makes nothing of the text")
        except _Wrong as error:
            return {"error": str(error)}
        except Exception as error:  # of a template or a tokenizer, whatever these raise
            return {"error": f"{type(error).__name__}: {error}"[:500]}
        return {"ids": ids, "continuation": forced}

    def _given(self, row: dict[str, Any]) -> list[int]:
        if "text" in row:
            ids = self._ids(row["text"], True)
            self._check(ids, "the text has BOS itself, and the tokenizer adds one: give messages, or leave it out")
            return ids
        if "messages" in row:
            ids = self._ids(self._rendered(row["messages"]), False)  # the template writes the special tokens
            self._check(ids, "the chat template writes BOS, and so do the messages: leave it out of them")
            if self.adds_bos and ids[0] != self.bos:
                warning = "the chat template writes no BOS, which the tokenizer puts before a text"
                self.warnings += [] if warning in self.warnings else [warning]
            return ids
        return []

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise _Wrong("messages: needs a tokenizer with a chat template, have none; give text or ids")
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if len(text) > _MOST_CHARACTERS:
            raise _Wrong(f"messages: needs at most {_MOST_CHARACTERS} characters from the chat template, have {len(text)}")
        return str(text)

    def _check(self, ids: list[int], twice: str) -> None:
        if not ids:
            raise _Wrong("needs at least one token, have none: the tokenizer makes nothing of it")
        if self.bos is not None and ids[:2] == [self.bos, self.bos]:
            raise _Wrong(f"needs one BOS (token {self.bos}) at the beginning, have two: {twice}")

    def _ids(self, text: str, special: bool) -> list[int]:
        return [int(one) for one in self._tokenizer.encode(text, add_special_tokens=special)]


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request, see above."""
    # No numbers are computed here: without torch the start takes a fifth of the time, and nothing asks for a device.
    packages.hide(("torch", *packages.COMPANIONS, *packages.NOT_IN_FORKSERVER))
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        have = f"have none ({error})"
        return {"error": f"needs transformers (pip install -e '.[transformers]'), {have}", "passing": True}
    try:
        loaded = AutoTokenizer.from_pretrained(request["folder"], local_files_only=True, trust_remote_code=False)
        tokenizer = _Tokenizer(loaded)
    except MemoryError:
        raise
    except Exception as error:  # whatever a tokenizer's files make transformers raise
        return {"error": f"transformers reads no tokenizer there: {type(error).__name__}: {error}"[:500]}
    prompts = [tokenizer.prompt(row) for row in request["prompts"]]
    return {"bos": tokenizer.bos, "vocabulary": len(loaded), "warnings": tokenizer.warnings, "prompts": prompts}


def main() -> None:
    """Answer the request on standard input; what libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        json.dump(answer(json.load(sys.stdin)), out)


if __name__ == "__main__":
    main()
