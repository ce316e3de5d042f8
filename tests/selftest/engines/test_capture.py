"""Logits at their source: what the tap takes, what it refuses to assign, and what a digest covers."""

import hashlib
import sys
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantdet.engines.child.capture import CaptureError, LogitsTap, digest_rows


class Tensor:
    """As much of a torch tensor as the tap touches."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def detach(self) -> "Tensor":
        return self

    def to(self, device: str) -> "Tensor":
        return self

    def contiguous(self) -> "Tensor":
        return self

    def numpy(self) -> Any:
        return self.array

    def element_size(self) -> int:
        return int(self.array.itemsize)

    def view(self, dtype: Any) -> Any:
        return self.array.view(dtype)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that answers with the rows it is given; its torch is numpy."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(int16=np.int16, int32=np.int32, bfloat16=ml_dtypes.bfloat16))
    return SimpleNamespace(compute_logits=Tensor)


def rows(count: int, first: float = 0.0) -> Any:
    """float32 (count, 8), no two rows alike."""
    return first + np.arange(count * 8, dtype=np.float32).reshape(count, 8)


def test_rows_are_assigned_to_their_phase(model: Any) -> None:
    """One row is a sampled step, several are the prompt's; what came before the request is not in it."""
    tap = LogitsTap(model)
    model.compute_logits(rows(1, 900.0))
    tap.start()
    for part in (rows(3), rows(2, 100.0), rows(1, 200.0), rows(1, 300.0)):
        model.compute_logits(part)

    decode, prefill = tap.assemble(prompt_length=6, decode_tokens=2)

    assert np.concatenate([rows(1, 200.0), rows(1, 300.0)]).tolist() == decode.tolist()
    assert np.concatenate([rows(3), rows(2, 100.0)]).tolist() == prefill.tolist()


def test_the_last_prompt_row_of_the_second_runner_is_left_out(model: Any) -> None:
    """It is the first sampled step over again."""
    tap = LogitsTap(model)
    tap.start()
    model.compute_logits(rows(4))
    model.compute_logits(rows(1, 50.0))

    _, prefill = tap.assemble(prompt_length=4, decode_tokens=1)

    assert rows(4)[:3].tolist() == prefill.tolist()


@pytest.mark.parametrize(
    ("prefill", "decode"), [(5, 1), (5, 3), (4, 2), (7, 2)], ids=["step lost", "step twice", "row lost", "row too many"]
)
def test_calls_that_do_not_add_up_are_refused(model: Any, prefill: int, decode: int) -> None:
    """A lost or repeated row would shift all others to wrong positions."""
    tap = LogitsTap(model)
    tap.start()
    model.compute_logits(rows(prefill))
    for step in range(decode):
        model.compute_logits(rows(1, 10.0 * step))

    with pytest.raises(CaptureError, match=f"captured {decode} sampled and {prefill} prompt rows"):
        tap.assemble(prompt_length=6, decode_tokens=2)


def test_what_is_taken_does_not_change_afterwards(model: Any) -> None:
    """An engine reuses its buffers."""
    tap, buffer = LogitsTap(model), rows(1)
    tap.start()
    model.compute_logits(rows(2, 7.0))
    model.compute_logits(buffer)
    buffer += 1

    decode, _ = tap.assemble(prompt_length=3, decode_tokens=1)

    assert rows(1).tolist() == decode.tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_seeded_flip_is_one_bit_of_one_logit_of_one_step(model: Any, dtype: Any) -> None:
    """In the engine's own tensor, so that it goes the way of a real one."""
    tap = LogitsTap(model)
    tap.start({"decode": (1, 3)})
    answers = [model.compute_logits(rows(1, 10.0 * step).astype(dtype)) for step in range(3)]
    model.compute_logits(rows(2).astype(dtype))

    decode, _ = tap.assemble(prompt_length=3, decode_tokens=3)

    integer = f"i{np.dtype(dtype).itemsize}"
    honest = np.concatenate([rows(1, 10.0 * step).astype(dtype) for step in range(3)])
    changed = honest.view(integer) ^ decode.view(integer)
    assert [(1, 3)] == list(zip(*map(list, np.nonzero(changed)), strict=True))
    assert 1 == changed[1, 3]
    assert decode[1].tolist() == answers[1].array[0].tolist()


@pytest.mark.parametrize("position", range(5))
def test_a_seeded_flip_of_the_prompt_is_at_its_position(model: Any, position: int) -> None:
    """Whichever of several blocks has it; the sampled steps are not touched, nor is a request without a defect."""
    tap = LogitsTap(model)
    answered = []
    for flips in ({"prefill": (position, 3)}, {}):
        tap.start(flips)
        for part in (rows(1, 200.0), rows(3), rows(1, 300.0), rows(2, 100.0)):
            model.compute_logits(part)
        answered.append(tap.assemble(prompt_length=6, decode_tokens=2))

    (decode, prefill), (untouched, honest) = answered
    changed = prefill.view(np.int32) ^ honest.view(np.int32)
    assert [(position, 3)] == list(zip(*map(list, np.nonzero(changed)), strict=True))
    assert 1 == changed[position, 3]
    assert untouched.tolist() == decode.tolist()
    assert np.concatenate([rows(3), rows(2, 100.0)]).tolist() == honest.tolist()


# -------------------------------------------------------------------------------------------------------------- digests


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_digest_is_of_the_exact_float32_row(dtype: Any) -> None:
    """SHA-256 of the little-endian float32 bytes of every logit, whatever the model's dtype."""
    logits = rows(3).astype(dtype)

    wanted = [hashlib.sha256(row.astype("<f4").tobytes()).digest() for row in logits]
    assert wanted == [row.tobytes() for row in digest_rows(logits)]


@pytest.mark.parametrize("token", [0, 1, 4095])
def test_the_lowest_bit_of_any_logit_is_in_its_rows_digest(token: int) -> None:
    """First, last and in between; the other rows' digests stay."""
    logits = np.linspace(-3, 3, 2 * 4096, dtype=np.float32).reshape(2, 4096)
    before = digest_rows(logits)
    logits.view(np.int32)[1, token] ^= 1

    assert [False, True] == (before != digest_rows(logits)).any(axis=1).tolist()


def test_zeros_of_either_sign_have_other_digests() -> None:
    """Bits, not values."""
    assert (digest_rows(np.array([[0.0]], np.float32)) != digest_rows(np.array([[-0.0]], np.float32))).any()
