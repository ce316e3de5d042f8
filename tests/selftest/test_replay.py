"""Recordings in place of an engine: what belongs together, and what is not taken for a measurement of the cell."""

from pathlib import Path
from typing import Any

import pytest

from quantdet.observation import Observation, ObservationError, write
from quantdet.replay import Replay
from quantdet.results import Measured, Missing
from quantdet.schema import Cell
from quantdet.verdicts import Verdict
from selftest.fakes import MATRIX, observation
from selftest.inner import Suite

pytest_plugins = ["pytester"]

CELL = Cell("alpha", "bf16", "cpu-here")


def put(folder: Path, name: str, whole: Observation) -> Path:
    header = whole.header
    place = folder / header.hardware / "environment" / header.model / header.format / name
    place.mkdir(parents=True)
    write(place, whole.header, whole.prompts)
    return place


def result(folder: Path, *observations: Observation, cell: Cell = CELL) -> Any:
    for number, whole in enumerate(observations):
        put(folder, str(number), whole)
    return Replay(folder).result(cell)


def test_lifetimes_of_one_run_belong_together(tmp_path: Path) -> None:
    """In their order, whatever the folders are called."""
    found = result(tmp_path, observation(lifetime=1), observation(lifetime=0))

    assert isinstance(found, Measured)
    assert [0, 1] == [one.header.lifetime for one in found.observations]


def test_a_copy_is_no_second_run_and_a_second_run_is_no_copy(tmp_path: Path) -> None:
    """The same observation twice counts once; another run of the same lifetime is judged too, above all if it differs."""
    again = observation(numerics="other", created="2026-01-02T00:00:00+00:00")

    found = result(tmp_path, observation(), observation(), again)

    assert isinstance(found, Measured)
    assert 2 == len(found.observations)
    assert 2 == len({one.logits_sha256("decode") for one in found.observations})


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"checkpoint_sha256": "9" * 64}, "checkpoint_sha256"),
        ({"engine_args": {"a": 1}}, "engine_args"),
        ({"environment": {"cpu": "another"}}, "environment"),
        ({"repeats": 4}, "repeats"),
    ],
)
def test_runs_of_two_kinds_are_not_judged_as_one(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    """Other weights, arguments, versions or lengths: INVALID, naming what differs."""
    repeats = changes.get("repeats", 3)
    other = observation(lifetime=1, **{**changes, "repeats": repeats})

    found = result(tmp_path, observation(), other)

    assert isinstance(found, Missing)
    assert (Verdict.INVALID, True) == (found.verdict, word in found.reason)


def test_a_seeded_defect_is_never_evidence(tmp_path: Path) -> None:
    """Alone it is no recording of the cell, beside an honest one it is left out."""
    seeded = observation(inject="bitflip", lifetime=1)

    alone = result(tmp_path / "a", seeded)
    beside = result(tmp_path / "b", seeded, observation())

    assert isinstance(alone, Missing) and isinstance(beside, Measured)
    assert Verdict.UNAVAILABLE is alone.verdict
    assert [""] == [one.header.inject for one in beside.observations]


def test_one_edited_recording_refuses_the_folder(tmp_path: Path) -> None:
    """Nothing is replayed beside it: the file is named."""
    put(tmp_path, "good", observation())
    path = put(tmp_path, "bad", observation("gptq")) / "observation.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"dtype": ""', '"dtype": "bfloat16"'), encoding="utf-8")

    with pytest.raises(ObservationError, match=r"gptq/bad/observation\.json: header_sha256: differs"):
        Replay(tmp_path)


def test_re_executions_are_for_the_claims_they_were_made_of(tmp_path: Path) -> None:
    """They are no measurement of the cell, and others' sequences are not those that were asked for."""
    put(tmp_path, "v", observation(role="verify", workload_sha256="5" * 64))
    put(tmp_path, "seeded", observation(role="verify", workload_sha256="6" * 64, inject="bitflip"))

    replay = Replay(tmp_path)

    assert isinstance(replay.verified(CELL, "5" * 64), Measured)
    assert isinstance(replay.verified(CELL, "6" * 64), Missing)
    assert isinstance(replay.result(CELL), Missing)


def test_the_kernel_of_every_lifetime_is_judged(suite: Suite, tmp_path: Path) -> None:
    """A second engine process that picked another kernel is not hidden behind the first."""
    for lifetime, kernel in enumerate(["Fake4Kernel", "OtherKernel"]):
        put(tmp_path, str(lifetime), observation("ct", model="beta", kernels=(kernel,), lifetime=lifetime))

    run = suite(f"--replay={tmp_path}", "-k", "test_kernel and beta/ct", matrix=MATRIX)

    assert {"test_kernel[beta/ct/cpu-here]": "INVALID"} == run.failures(), run.output
    assert "executed OtherKernel x4" in run.cases["test_kernel[beta/ct/cpu-here]"].message
