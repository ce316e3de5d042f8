"""Prompts that cannot be measured are INVALID, all at once, with what they need and what there is; what is no refusal."""

from dataclasses import dataclass
from typing import Any

import pytest

from quantdet.engines.child.lifetime import refusing
from quantdet.engines.child.requests import Limits, Request, encoded
from quantdet.engines.plan import EngineRefused, InvalidMeasurement, Plan, PlannedPrompt

BOS = 1


@dataclass(frozen=True)
class Tokenizer:
    """A letter is a token; `<` is the token of the beginning, which `encode` adds."""

    bos_token_id: int | None = BOS

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + [BOS if letter == "<" else ord(letter) - 90 for letter in text]


@dataclass(frozen=True)
class Loaded:
    vocabulary: int | None = 64
    length: int | None = 16
    words: Tokenizer = Tokenizer()

    def tokenizer(self) -> Any:
        return self.words

    def limits(self) -> Limits:
        return Limits(self.vocabulary, self.length)


def plan(*prompts: PlannedPrompt, claims: tuple[PlannedPrompt, ...] = ()) -> Plan:
    return Plan({}, "c", "bfloat16", {}, {}, prompts, 2, 4, 8, claims=claims, claim_tokens=8)


def ids(*tokens: int, id_: str = "p", **more: Any) -> PlannedPrompt:
    return PlannedPrompt(id_, tokens, **more)


def test_ids_and_texts() -> None:
    """Forced ids follow the prompt's; a text's continuation gets no beginning of its own."""
    one, two = ids(3, 4, forced_ids=(5,)), PlannedPrompt("t", text="ab", forced_text="c")

    found = encoded(Loaded(), plan(one, claims=(two,)))

    assert {one: Request([3, 4, 5], 2), two: Request([BOS, 7, 8, 9], 3)} == found


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (ids(3, 64), "p: needs ids from 0 to 63, has 64"),
        (ids(3, -1), "p: needs ids from 0 to 63, has -1"),
        (ids(3, 4, forced_ids=(99,)), "p: needs ids from 0 to 63, has 99"),
        (ids(*range(13)), "p: needs 17 tokens (13 of the prompt, 4 generated), the engine has room for 16 (max_model_len)"),
        (ids(3, 4, content_start=2), "p: needs its content to begin before its end, content_start 2 of 2 tokens"),
        (ids(3), "p: needs at least 2 tokens, has 1"),
        (PlannedPrompt("t", text="<ab"), "t: needs one token 1 at its beginning (BOS), has two"),
        (PlannedPrompt("t", text="abcdefghijkl"), "t: needs 17 tokens (13 of the prompt, 4 generated)"),
    ],
)
def test_a_prompt_that_cannot_be_measured(prompt: PlannedPrompt, words: str) -> None:
    """What it needs, and what there is."""
    with pytest.raises(InvalidMeasurement) as caught:
        encoded(Loaded(), plan(ids(3, 4), prompt))

    assert str(caught.value).startswith(f"prompts that cannot be measured: {words}")


def test_what_just_fits() -> None:
    """The last id, the last place, content at the last token; ids may begin with two of any token: they were asked for."""
    encoded(Loaded(), plan(ids(63, *range(11), content_start=11), ids(BOS, BOS)))
    encoded(Loaded(None, None, Tokenizer(None)), plan(ids(3, 10**6), PlannedPrompt("t", text="<ab")))


def test_claims_generate_more() -> None:
    """A prompt that has room for 4 tokens has none for a claim's 8."""
    prompt = ids(*range(12))

    encoded(Loaded(), plan(prompt))
    with pytest.raises(InvalidMeasurement, match="needs 20 tokens"):
        encoded(Loaded(), plan(prompt, claims=(prompt,)))


def test_all_of_them_at_once() -> None:
    """And each once, where a prompt is a claim too; beyond five, how many more."""
    wrong = [ids(3, 99, id_=f"p{number}") for number in range(7)]

    with pytest.raises(InvalidMeasurement) as caught:
        encoded(Loaded(), plan(*wrong, claims=(wrong[0],)))

    message = str(caught.value)
    assert all(f"p{number}: " in message for number in range(5))
    assert "p5" not in message and message.endswith("; and 2 more")


# ------------------------------------------------------------------------------------------- what counts as a refusal


def raised(error: Exception) -> Exception | None:
    """What comes out of an engine's start that raises `error`."""
    try:
        with refusing():
            raise error
    except Exception as found:
        return found
    return None


@pytest.mark.parametrize(
    "error", [AttributeError("'x' has no y"), NameError("x"), UnboundLocalError("x"), KeyError("bits"), IndexError("3")]
)
def test_a_mistake_inside_the_engine_is_no_refusal(error: Exception) -> None:
    """The engine did not mean to say it: an ERROR, in the exception's own words."""
    assert raised(error) is error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no kernel"), AssertionError("group"), RuntimeError("static_scaled_fp8_quant()"), NotImplementedError(),
        AttributeError("'_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'"),
    ],
)  # fmt: skip
def test_a_refusal_stays_one(error: Exception) -> None:
    """What the engine says, and an operator that its library lacks."""
    assert isinstance(raised(error), EngineRefused)


def test_what_makes_a_measurement_invalid_passes_through() -> None:
    """It is raised while the engine starts."""
    with pytest.raises(InvalidMeasurement, match="norm"), refusing():
        raise InvalidMeasurement("norm")
