"""Observations on disk: what is written comes back bit by bit, and what somebody else wrote is checked before use."""

import contextlib
import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load, save

from quantdet.judging import kernel, repeat
from quantdet.judging.distinct import distinctness
from quantdet.judging.restart import restart
from quantdet.matrix.cell import PHASES
from quantdet.matrix.expectations import Expectations
from quantdet.metrics.bits import bits_equal
from quantdet.observations.checks import check_claims
from quantdet.observations.header import Header
from quantdet.observations.observation import HEADER_FILE, TENSORS_FILE, Observation, ObservationError, read, read_header, write
from selftest.fakes.observation import changed_output, last_repeat, observation

FUZZ = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one good observation of two prompts, the first with two different outputs."""
    return put(tmp_path / "o", sample())


def sample() -> Observation:
    whole = observation()

    def edit(array: Any) -> None:
        array[1, 0] ^= 1

    return last_repeat(whole, 0, changed_output(whole.prompts[0].outputs[0], "decode", digests=edit))


def put(place: Path, whole: Observation) -> Path:
    place.mkdir(exist_ok=True)
    write(place, whole.header, whole.prompts)
    return place


def edit_header(place: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = place / HEADER_FILE
    raw = json.loads(path.read_text())
    edit(raw)
    with contextlib.suppress(ValidationError):  # sealed again, as somebody with intent would
        raw["header_sha256"] = Header.model_validate(raw).digest()
    path.write_text(json.dumps(raw))


def edit_tensors(place: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change arrays and put the right SHA-256 into the header, as somebody with intent would."""
    tensors = {name: array.copy() for name, array in load((place / TENSORS_FILE).read_bytes()).items()}
    edit(tensors)
    put_payload(place, save(tensors))


def put_payload(place: Path, payload: bytes) -> None:
    (place / TENSORS_FILE).write_bytes(payload)
    edit_header(place, lambda raw: raw.update(tensors_sha256=hashlib.sha256(payload).hexdigest()))


def refused(place: Path, *words: str) -> None:
    """Reading gives an ObservationError that names a file of `place`, and every one of `words`."""
    with pytest.raises(ObservationError) as caught:
        read(place)
    text = str(caught.value)
    assert str(place / HEADER_FILE) in text or str(place / TENSORS_FILE) in text
    assert [] == [word for word in words if word not in text], text


# ---------------------------------------------------------------------------------------------------------- round trip


def test_round_trip(folder: Path) -> None:
    """Header, ids and every bit of every array come back, in the arrays' dtypes."""
    whole, found = sample(), read(folder)

    assert whole.header == found.header.model_copy(update={"tensors_sha256": "", "header_sha256": ""})
    assert folder == found.path
    assert (0, 0, 1) == found.prompts[0].header.runs
    for prompt, back in zip(whole.prompts, found.prompts, strict=True):
        assert bits_equal(prompt.prompt_ids, back.prompt_ids)
        assert len(prompt.outputs) == len(back.outputs)
        for output, again in zip(prompt.outputs, back.outputs, strict=True):
            assert bits_equal(output.output_ids, again.output_ids)
            assert output.fingerprint == again.fingerprint
    assert [whole.logits_sha256(phase) for phase in PHASES] == [found.logits_sha256(phase) for phase in PHASES]


def test_the_number_of_ranks_is_sealed(tmp_path: Path) -> None:
    """It is younger than the first recordings: left out where it is 1, and nowhere else."""
    whole = sample()
    executed = {**whole.header.executed.model_dump(), "tensor_parallel_size": 2} if whole.header.executed is not None else {}
    place = put(
        tmp_path / "o",
        dataclasses.replace(
            whole, header=Header.model_validate({**whole.header.model_dump(by_alias=True), "executed": executed})
        ),
    )
    assert "each on 2 ranks" in read(place).header.executed.summary  # type: ignore[union-attr]

    for size in (1, 3):
        raw = json.loads((place / HEADER_FILE).read_text())
        raw["executed"]["tensor_parallel_size"] = size
        (place / HEADER_FILE).write_text(json.dumps(raw))
        refused(place, "header_sha256")


@pytest.mark.parametrize("field", ["executed", "checkpoint_sha256", "engine_args", "dtype", "environment"])
def test_an_edited_header_is_refused(folder: Path, field: str) -> None:
    """What was measured, and how, cannot be changed without a trace."""
    path = folder / HEADER_FILE
    raw = json.loads(path.read_text())
    raw[field] = {
        "executed": {**raw["executed"], "runner": "V9"}, "checkpoint_sha256": "0" * 64, "engine_args": {"a": 1},
        "dtype": "float64", "environment": {"vllm": "9"},
    }[field]  # fmt: skip
    path.write_text(json.dumps(raw))

    with pytest.raises(ObservationError, match="header_sha256: differs"):
        read_header(folder)


def test_writing_is_reproducible(tmp_path: Path) -> None:
    """The same observation gives the same bytes."""
    one, other = put(tmp_path / "a", sample()), put(tmp_path / "b", sample())

    for name in (HEADER_FILE, TENSORS_FILE):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_refusal_needs_no_arrays(tmp_path: Path) -> None:
    """A refusal is a header alone, and its message comes back."""
    header = sample().header.model_copy(update={"kind": "refusal", "refusal": "no: \u00e4 \n b", "prompts": ()})
    write(tmp_path, header, ())

    assert "no: \u00e4 \n b" == read(tmp_path).header.refusal
    assert not (tmp_path / TENSORS_FILE).exists()


# ------------------------------------------------------------------------------------------------------ hostile header

HEADER_MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, ...]]] = {
    "other schema": (lambda raw: raw.update(schema=2), ("schema", "is 2, this suite reads 1")),
    "no schema": (lambda raw: raw.pop("schema"), ("schema",)),
    "unknown key": (lambda raw: raw.update(surprise=1), ("surprise",)),
    "unknown key inside": (lambda raw: raw["prompts"][0].update(surprise=1), ("prompts.0.surprise",)),
    "missing key": (lambda raw: raw.pop("workload_sha256"), ("workload_sha256",)),
    "kind": (lambda raw: raw.update(kind="guess"), ("kind",)),
    "model path": (lambda raw: raw.update(model="../../etc"), ("model",)),
    "format absolute": (lambda raw: raw.update(format="/etc/passwd"), ("format",)),
    "hardware dots": (lambda raw: raw.update(hardware=".."), ("hardware",)),
    "id with newline": (lambda raw: raw.update(model="alpha\n"), ("model",)),
    "id with NUL": (lambda raw: raw.update(model="al\0pha"), ("model",)),
    "id too long": (lambda raw: raw.update(model="a" * 65), ("model",)),
    "key": (lambda raw: raw.update(key="../" * 16), ("key",)),
    "key upper case": (lambda raw: raw.update(key="A" * 64), ("key",)),
    "repeats": (lambda raw: raw.update(repeats=0), ("repeats",)),
    "repeats text": (lambda raw: raw.update(repeats="many"), ("repeats",)),
    "lifetime": (lambda raw: raw.update(lifetime=-1), ("lifetime",)),
    "no prompts": (lambda raw: raw.update(prompts=[]), ("prompts",)),
    "no kernels": (lambda raw: raw.update(executed=None), ("executed",)),
    "variables that are no table": (lambda raw: raw["environment"].update(variables="x"), ("environment", "variables")),
    "a variable that is no text": (lambda raw: raw["environment"].update(variables={"A": 5}), ("environment", "variables")),
    "layer count": (lambda raw: raw["executed"]["layers"][0].update(count=0), ("executed.layers.0.count",)),
    "runs too few": (lambda raw: raw["prompts"][1].update(runs=[0]), ("prompts.1.runs",)),
    "runs unordered": (lambda raw: raw["prompts"][1].update(runs=[1, 0, 1]), ("prompts.1.runs",)),
    "runs with a hole": (lambda raw: raw["prompts"][1].update(runs=[0, 2, 0]), ("prompts.1.runs",)),
    "runs negative": (lambda raw: raw["prompts"][1].update(runs=[0, -1, 0]), ("prompts.1.runs",)),
    "length": (lambda raw: raw["prompts"][0].update(length=7), ("0.prompt_ids",)),
    "length huge": (lambda raw: raw["prompts"][0].update(length=10**15), ("0.prompt_ids",)),
    "top_k": (lambda raw: raw.update(top_k=5), ("topk_ids",)),
    "decode_tokens": (lambda raw: raw.update(decode_tokens=10**12), ("0.0.output_ids",)),
    "more prompts than arrays": (
        lambda raw: raw["prompts"].append({**raw["prompts"][1], "id": "p9"}), ("2.prompt_ids", "missing"),
    ),
    "fewer prompts than arrays": (lambda raw: raw["prompts"].pop(), ("belongs to no prompt",)),
    "tensors_sha256": (lambda raw: raw.update(tensors_sha256="0" * 64), ("SHA-256", "tensors_sha256")),
}  # fmt: skip


@pytest.mark.parametrize("mistake", HEADER_MISTAKES)
def test_a_bad_header_is_named(folder: Path, mistake: str) -> None:
    """Each wrong field of the header is an ObservationError that names file and field."""
    edit, words = HEADER_MISTAKES[mistake]
    edit_header(folder, edit)

    refused(folder, *words)


@pytest.mark.parametrize("text", ["", "[]", "null", "7", '"x"', "{", '{"schema": 1}', "[" * 100_000, "\ufeff{}"])
def test_a_header_that_is_no_header(folder: Path, text: str) -> None:
    """Other JSON, no JSON and endless nesting are errors of the file, not of the reader."""
    (folder / HEADER_FILE).write_text(text, encoding="utf-8")

    refused(folder, HEADER_FILE)


def test_a_header_that_is_not_text(folder: Path) -> None:
    """Bytes that are not UTF-8 are named, not raised as UnicodeDecodeError."""
    (folder / HEADER_FILE).write_bytes(b"\xff\xfe\x00{")

    refused(folder, HEADER_FILE, "not JSON")


def test_a_huge_header_is_not_loaded(folder: Path) -> None:
    """Sizes are checked before reading (the file here is sparse)."""
    with (folder / HEADER_FILE).open("r+b") as file:
        file.truncate(1 << 34)

    refused(folder, HEADER_FILE, "larger than")


@pytest.mark.parametrize("name", [HEADER_FILE, TENSORS_FILE])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    """A folder without header, or without arrays, is an ObservationError."""
    (folder / name).unlink()

    refused(folder, name)


@pytest.mark.parametrize("name", [HEADER_FILE, TENSORS_FILE])
def test_a_folder_in_place_of_a_file(folder: Path, name: str) -> None:
    """A directory of the file's name is an ObservationError."""
    (folder / name).unlink()
    (folder / name).mkdir()

    refused(folder, name)


@pytest.mark.parametrize("index", [10**5, 10**30])
def test_a_huge_run_index_is_refused(folder: Path, index: int) -> None:
    """Nothing of the size of a hostile run index is built to find out that it is wrong."""
    edit_header(folder, lambda raw: raw["prompts"][1].update(runs=[0, index, 0]))

    refused(folder, "prompts.1.runs")


def test_content_has_to_start_inside_the_prompt(folder: Path) -> None:
    """A prompt without content has no distance: refused, not divided by."""
    edit_header(folder, lambda raw: raw["prompts"][1].update(content_start=9))

    refused(folder, "prompts.1.content_start")


# ------------------------------------------------------------------------------------------------------ hostile arrays


def test_truncated_arrays(folder: Path) -> None:
    """Arrays cut short differ from the SHA-256 in the header."""
    path = folder / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-1])

    refused(folder, TENSORS_FILE, "SHA-256")


@FUZZ
@given(where=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_arrays_is_found(folder: Path, where: int, bit: int) -> None:
    """Whichever bit of the file is turned over, the observation is refused."""
    whole = put(folder, sample())
    path = whole / TENSORS_FILE
    payload = bytearray(path.read_bytes())
    payload[where % len(payload)] ^= 1 << bit
    path.write_bytes(payload)

    refused(folder, TENSORS_FILE, "SHA-256")


def test_huge_arrays_are_not_loaded(folder: Path) -> None:
    """Sizes are checked before reading (the file here is sparse)."""
    with (folder / TENSORS_FILE).open("r+b") as file:
        file.truncate(1 << 34)

    refused(folder, TENSORS_FILE, "larger than")


TENSOR_MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, ...]]] = {
    "missing": (lambda t: t.pop("1.0.decode.chosen"), ("1.0.decode.chosen", "missing")),
    "surplus": (lambda t: t.update({"9.x": t["0.prompt_ids"]}), ("9.x", "belongs to no prompt")),
    "surplus path": (lambda t: t.update({"../../x": t["0.prompt_ids"]}), ("../../x", "belongs to no prompt")),
    "dtype": (
        lambda t: t.update({"0.0.decode.chosen": t["0.0.decode.chosen"].astype(np.float64)}),
        ("0.0.decode.chosen", "float64"),
    ),
    "shape": (
        lambda t: t.update({"0.0.prefill.digests": t["0.0.prefill.digests"][:-1]}), ("0.0.prefill.digests", "(4, 32)"),
    ),
    "rank": (lambda t: t.update({"0.prompt_ids": t["0.prompt_ids"][None]}), ("0.prompt_ids", "(1, 6)")),
    "NaN logprob": (lambda t: t["0.0.decode.chosen"].__setitem__(0, np.nan), ("0.0.decode.chosen", "no logprob")),
    "NaN top-k": (
        lambda t: t["1.0.prefill.topk_logprobs"].__setitem__((2, 1), np.nan), ("1.0.prefill.topk_logprobs", "no logprob"),
    ),
    "logprobs of more than one": (
        lambda t: t["1.0.decode.topk_logprobs"].__iadd__(np.float32(6)),
        ("1.0.decode.topk_logprobs", "probabilities add up to"),
    ),
    "logprobs out of order": (
        lambda t: t["1.0.decode.topk_logprobs"].__setitem__(3, t["1.0.decode.topk_logprobs"][3, ::-1].copy()),
        ("1.0.decode.topk_logprobs", "position 3: not in order"),
    ),
    "another token's logprob": (
        lambda t: t["1.0.decode.chosen"].view(np.int32).__setitem__(2, t["1.0.decode.chosen"].view(np.int32)[2] + 1),
        ("1.0.decode.chosen", "position 2: not the logprob that the top-k gives"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", TENSOR_MISTAKES)
def test_bad_arrays_are_named(folder: Path, mistake: str) -> None:
    """Arrays with the right SHA-256 and the wrong shape, dtype, name or values are refused by name."""
    edit, words = TENSOR_MISTAKES[mistake]
    edit_tensors(folder, edit)

    refused(folder, TENSORS_FILE, *words)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**6) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}'[:60],
    ],
)
def test_arrays_that_are_not_safetensors(folder: Path, payload: bytes) -> None:
    """A file with the right SHA-256 that is no safetensors file, or an empty one, is refused."""
    put_payload(folder, payload)

    refused(folder, TENSORS_FILE)


# -------------------------------------------------------------------------------------------------------------- claims


def test_claims_are_greedy_and_of_different_prompts() -> None:
    """A token that is not the most likely one was not asked for; copies of one claim are no independent evidence."""
    honest = observation().prompts
    check_claims("file", honest)

    def less(array: Any) -> None:
        array[2] -= 1

    forged = dataclasses.replace(honest[1], outputs=(changed_output(honest[1].outputs[0], "decode", chosen=less),))
    with pytest.raises(ObservationError, match=r"file: claim1\.0\.output_ids: step 2 is not the most likely token"):
        check_claims("file", (honest[0], forged))
    with pytest.raises(ObservationError, match=r"file: claim2\.prompt_ids: the same as claim0's"):
        check_claims("file", (*honest, honest[0]))


# ---------------------------------------------------------------------------------------------------------------- fuzz

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["../x", 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def paths_of(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    found = [here] if here else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += paths_of(inner, (*here, key))
    return found


def replace(document: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


def only_observation_errors(place: Path) -> Observation | None:
    try:
        return read(place)
    except ObservationError as error:
        assert str(place) in str(error)
        return None


@FUZZ
@given(data=st.data())
def test_any_junk_in_the_header_is_an_observation_error(folder: Path, data: st.DataObject) -> None:
    """One field replaced by anything: the file is read, or refused with an ObservationError that names it."""
    put(folder, sample())
    raw = json.loads((folder / HEADER_FILE).read_text())
    replace(raw, data.draw(st.sampled_from(paths_of(raw))), data.draw(JUNK))
    (folder / HEADER_FILE).write_text(json.dumps(raw))

    only_observation_errors(folder)


@FUZZ
@given(data=st.data())
def test_any_bytes_in_the_header_are_an_observation_error(folder: Path, data: st.DataObject) -> None:
    """Bytes cut, changed or put in anywhere: read, or refused with an ObservationError."""
    put(folder, sample())
    payload = (folder / HEADER_FILE).read_bytes()
    start = data.draw(st.integers(0, len(payload)))
    end = data.draw(st.integers(start, min(len(payload), start + 40)))
    (folder / HEADER_FILE).write_bytes(payload[:start] + data.draw(st.binary(max_size=20)) + payload[end:])

    only_observation_errors(folder)


@FUZZ
@given(data=st.data())
def test_any_bytes_in_the_arrays_are_an_observation_error(folder: Path, data: st.DataObject) -> None:
    """Bytes of the safetensors header changed, with the right SHA-256: read, or refused with an ObservationError."""
    put(folder, sample())
    payload = (folder / TENSORS_FILE).read_bytes()
    start = data.draw(st.integers(0, 1600))
    end = data.draw(st.integers(start, start + 40))
    put_payload(folder, payload[:start] + data.draw(st.binary(max_size=20)) + payload[end:])

    only_observation_errors(folder)


@FUZZ
@given(data=st.data())
def test_what_is_read_can_be_judged(folder: Path, data: st.DataObject) -> None:
    """An array replaced by any numbers of its dtype and shape: refused, or every judgement can be made of it."""
    put(folder, sample())
    names = sorted(load((folder / TENSORS_FILE).read_bytes()))
    name = data.draw(st.sampled_from(names))
    seed = data.draw(st.integers(0, 2**16))

    def scramble(tensors: dict[str, Any]) -> None:
        array = tensors[name]
        raw = np.random.default_rng(seed).integers(0, 256, array.nbytes, dtype=np.uint8)
        tensors[name] = raw.view(array.dtype).reshape(array.shape)

    edit_tensors(folder, scramble)
    found = only_observation_errors(folder)
    if found is not None:
        for phase in PHASES:
            repeat.repeat([found], phase, Expectations(()))
        kernel.kernel(found, "k", (), "")
        restart([found, sample()], Expectations(()))
        distinctness(found, {observation("gptq").header.cell: observation("gptq")}, Expectations(()))


def test_the_header_can_be_read_alone(folder: Path) -> None:
    """`read_header` does not look at the arrays."""
    (folder / TENSORS_FILE).unlink()

    assert "alpha" == read_header(folder).model
