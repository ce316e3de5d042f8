"""Hidden states in an observation: written, read, and bad ones named."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantdet.judging import hidden_states
from quantdet.matrix.cell import PHASES
from quantdet.matrix.expectations import Expectations
from quantdet.observations.header import Header
from quantdet.observations.observation import Observation, read, write
from selftest.fakes.hidden_states import LAYERS, differing, hidden
from selftest.fakes.matrix import ROOT
from selftest.fakes.observation import observation
from selftest.observations.test_observation import FUZZ, edit_header, edit_tensors, only_observation_errors, refused

DECODE, PREFILL, PRINT = "activations.1.decode.0", "activations.0.prefill.0", "activations.fingerprint.0"


def with_claims() -> Observation:
    whole = observation(claim_tokens=4, claim_top_k=4)
    claims = tuple(
        dataclasses.replace(one, header=one.header.model_copy(update={"id": f"c{n}", "runs": (0,)}))
        for n, one in enumerate(observation(lengths=(5, 8)).prompts)
    )
    header = whole.header.model_copy(update={"claims": tuple(one.header for one in claims)})
    whole = dataclasses.replace(whole, header=header, claims=claims)
    return differing(dataclasses.replace(whole, hidden=hidden(whole, fingerprints="a")), 1, "decode", (1, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put(tmp_path / "o", with_claims())


def put(place: Path, whole: Observation) -> Path:
    place.mkdir(exist_ok=True)
    write(place, whole.header, whole.prompts, whole.claims, whole.hidden)
    return place


def test_round_trip(folder: Path) -> None:
    """Every bit of what was taken comes back; of repeats, the distinct ones."""
    whole, found = with_claims().hidden, read(folder).hidden

    assert whole is not None
    assert found is not None
    assert whole.header == found.header
    assert [(0, 0, 0), (0, 0, 1)] == [runs["decode"] for runs in found.header.runs]
    assert {name: one.tobytes() for name, one in whole.arrays().items()} == {n: a.tobytes() for n, a in found.arrays().items()}


def test_an_observation_without_them_is_sealed_as_before() -> None:
    """Older recordings have no such field, and their seals hold."""
    path = next((ROOT / "fixtures" / "lifetimes").rglob("observation.json"))
    raw = json.loads(path.read_text(encoding="utf-8"))

    assert "activations" not in raw
    assert raw["header_sha256"] == Header.model_validate(raw).digest()


MISTAKES: dict[str, tuple[Callable[[Any], object], str]] = {
    "layers": (lambda raw: raw["layers"].append("more"), "activations.0.decode.0"),
    "layers twice": (lambda raw: raw["layers"].__setitem__(1, LAYERS[0]), "activations.layers"),
    "no layers": (lambda raw: raw.update(layers=[]), "activations.layers"),
    "layers without end": (lambda raw: raw.update(layers=[str(n) for n in range(2000)]), "activations.layers"),
    "a layer's name": (lambda raw: raw["layers"].__setitem__(1, "\x1b[2J"), "activations.layers.1"),
    "width": (lambda raw: raw.update(width=-1), "activations.width"),
    "stream": (lambda raw: raw.update(stream="other"), "activations.stream"),
    "runs of a prompt": (lambda raw: raw["runs"].pop(), "activations.runs"),
    "runs of a phase": (lambda raw: raw["runs"][0].pop("decode"), "activations.runs.0.decode"),
    "runs too few": (lambda raw: raw["runs"][0].update(decode=[0, 0]), "activations.runs.0.decode"),
    "runs unordered": (lambda raw: raw["runs"][0].update(decode=[1, 0, 0]), "activations.runs.0.decode"),
    "runs negative": (lambda raw: raw["runs"][0].update(decode=[0, -1, 0]), "activations.runs.0.decode"),
    "runs huge": (lambda raw: raw["runs"][0].update(decode=[0, 10**15, 0]), "activations.runs.0.decode"),
    "repeats": (lambda raw: raw.update(repeats=0), "activations.runs"),
    "projection": (lambda raw: raw.update(projection="mine"), "activations.projection"),
    "projected twice": (lambda raw: raw.update(projected=[1, 1]), "activations.projected"),
    "projected beyond": (lambda raw: raw.update(projected=[0, 3]), "activations.projected"),
    "projected one": (lambda raw: raw.update(projected=[0]), "activations.fingerprint.0"),
    "a problem with runs": (lambda raw: raw.update(problem="x"), "activations.problem"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_header_is_named(folder: Path, mistake: str) -> None:
    """Each wrong field is an ObservationError that names file and field."""
    edit, words = MISTAKES[mistake]
    edit_header(folder, lambda raw: edit(raw["activations"]))

    refused(folder, words)


def changed(name: str, change: Callable[[Any], Any], new: str = "") -> Callable[[dict[str, Any]], object]:
    """Put what `change` makes of an array in its place, or under a new name."""
    return lambda arrays: arrays.update({new or name: np.ascontiguousarray(change(arrays[name]))})


def spoiled(value: float) -> Callable[[dict[str, Any]], object]:
    return lambda arrays: arrays[PRINT].__setitem__((1, 2, 3), value)


ARRAYS: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, ...]]] = {
    "missing": (lambda arrays: arrays.pop("activations.1.decode.1"), ("activations.1.decode.1", "missing")),
    "a layer missing": (changed(DECODE, lambda a: a[1:]), (DECODE, "(3, 3, 16)")),
    "a position missing": (changed(PREFILL, lambda a: a[:, 1:]), (PREFILL, "(4, 5, 16)")),
    "longer digests": (changed(PREFILL, lambda a: np.repeat(a, 2, axis=2)), (PREFILL, "(4, 6, 32)")),
    "dtype": (changed(PRINT, lambda a: a.astype(np.float32)), (PRINT, "float32")),
    "NaN": (spoiled(np.nan), (PRINT, "not finite")),
    "infinite": (spoiled(-np.inf), (PRINT, "not finite")),
    "fewer dimensions": (changed(PRINT, lambda a: a[..., :8]), (PRINT, "(2, 4, 8)")),
    "surplus": (changed(DECODE, np.copy, "activations.2.decode.0"), ("activations.2.decode.0", "belongs to no prompt")),
}


@pytest.mark.parametrize("mistake", ARRAYS)
def test_bad_arrays_are_named(folder: Path, mistake: str) -> None:
    """With the right SHA-256 and the wrong shape, dtype, name or values."""
    edit, words = ARRAYS[mistake]
    edit_tensors(folder, edit)

    refused(folder, *words)


def test_fingerprints_are_of_claims(tmp_path: Path) -> None:
    """A recording without claims has none; a refusal has no hidden states at all."""
    whole = observation()
    found = hidden(whole, fingerprints="a")
    refused(put(tmp_path / "o", dataclasses.replace(whole, hidden=found)), "activations.projected")

    refusal = whole.header.model_copy(update={"kind": "refusal", "refusal": "no", "prompts": ()})
    refused(put(tmp_path / "r", Observation(refusal, hidden=found)), "no hidden states")


@FUZZ
@given(data=st.data())
def test_what_is_read_can_be_judged(folder: Path, data: st.DataObject) -> None:
    """An array replaced by any numbers of its dtype and shape: refused, or a judgement can be made of it."""
    put(folder, with_claims())
    name = data.draw(st.sampled_from(sorted((with_claims().hidden or hidden(observation())).arrays())))
    seed = data.draw(st.integers(0, 2**16))

    def scramble(tensors: dict[str, Any]) -> None:
        array = tensors[name]
        raw = np.random.default_rng(seed).integers(0, 256, array.nbytes, dtype=np.uint8)
        tensors[name] = raw.view(array.dtype).reshape(array.shape)

    edit_tensors(folder, scramble)
    found = only_observation_errors(folder)
    if found is not None:
        for phase in PHASES:
            hidden_states.repeat([found], phase, Expectations(()))
