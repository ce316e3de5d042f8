"""Recordings in place of an engine: what belongs together, and what is not taken for a measurement of the cell."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantdet.judging.results import Measured, Missing
from quantdet.judging.verdicts import Verdict
from quantdet.matrix.cell import Cell
from quantdet.matrix.workload import Workload
from quantdet.observations.claims import Sequences
from quantdet.observations.observation import Observation, ObservationError, write
from quantdet.report.html import PAGE
from quantdet.session.replay import Replay
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import MATRIX, expect
from selftest.fakes.observation import changed_output, last_repeat, observation

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


def test_lifetimes_that_noise_or_cold_caches_tell_apart_are_of_one_run(tmp_path: Path) -> None:
    """A bound on the flip rate ended them at different numbers of repeats; the last one was spawned with cold caches."""
    found = result(
        tmp_path, observation(max_flip_rate=0.05, repeats=59, environment={"vllm": "1", "start": "forkserver"}),
        observation(max_flip_rate=0.05, repeats=4, lifetime=1, caches="cold", environment={"vllm": "1", "start": "spawn"}),
    )  # fmt: skip

    assert isinstance(found, Measured)
    assert [59, 4] == [one.header.repeats for one in found.observations]


def test_the_same_bytes_from_two_places_are_of_one_run(tmp_path: Path) -> None:
    """Hashes say what was measured: a hub's later commit may change a file that nothing reads."""
    sources = ("hub o/x", f"hub o/x@{'a' * 40}")
    found = result(tmp_path, *(observation(lifetime=number, checkpoint_source=name) for number, name in enumerate(sources)))

    assert isinstance(found, Measured)
    assert 2 == len(found.observations)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"max_flip_rate": 0.05, "repeats": 4}, "repeats, max_flip_rate"),
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


def test_a_control_is_told_from_its_cell_and_by_its_defect(tmp_path: Path) -> None:
    """It is no measurement, and the control of one defect is not that of another, nor of another cell."""
    put(tmp_path, "c", observation(role="control", inject="control", checkpoint_source="renamed"))
    put(tmp_path, "i", observation(role="control", inject="integer", checkpoint_source="altered"))
    replay = Replay(tmp_path)

    sources = {}
    for kind in ("control", "integer"):
        found = replay.control(CELL, kind)
        assert isinstance(found, Measured)
        sources[kind] = found.observations[0].header.checkpoint_source

    assert {"control": "renamed", "integer": "altered"} == sources
    assert isinstance(replay.control(replace(CELL, format_id="ct"), "control"), Missing)
    assert isinstance(replay.result(CELL), Missing)
    assert [] == replay.versions("cpu-here")


def test_the_control_of_another_vllm_is_none_of_this_one(tmp_path: Path) -> None:
    """Where a row was recorded with two versions, each has its own."""
    for version in ("0.20.2", "0.26.0"):
        put(tmp_path, version, observation(environment={"vllm": version}))
    put(tmp_path, "c", observation(role="control", inject="control", environment={"vllm": "0.26.0"}))
    replay = Replay(tmp_path)

    kinds = [type(replay.control(replace(CELL, vllm=version), "control")) for version in ("0.20.2", "0.26.0")]

    assert [Missing, Measured] == kinds


@pytest.mark.parametrize("noisy", [False, True])
def test_a_recording_without_a_bit_flip_says_so(suite: Suite, tmp_path: Path, noisy: bool) -> None:
    """No BIT_EXACT counts, though known noise was caught: a flip has to be found everywhere."""
    put(tmp_path, "ct", observation("ct", model="beta"))
    awq = observation("awq")
    output = changed_output(awq.prompts[0].outputs[0], "decode", digests=lambda array: array.__setitem__((1, 0), 0))
    put(tmp_path, "awq", last_repeat(awq, 0, output))
    matrix = MATRIX + (expect("awq", "noisy", "decode") if noisy else "")

    run = suite(f"--replay={tmp_path}", "-k", "beta/ct and test_repeat or test_controls", matrix=matrix, controls=True)

    assert 0 == run.code, run.output
    found = run.cases["test_repeat[beta/ct/cpu-here-decode]"].properties
    noise = "known noise caught in alpha/awq" if noisy else "no kernel known to be noisy is eligible here (none in the matrix)"
    assert ("no", f"no bit flip recorded; {noise}") == (found["controlled"], found["control"])
    controls = {name for name in run.cases if name.startswith(("test_bit", "test_same", "test_one", "test_known"))}
    assert ({"test_known_noise[alpha/awq/cpu-here]"} if noisy else set()) == controls
    assert "UNCONTROLLED: none of 2 BIT_EXACT counts" in run.suite["summary"]


def test_one_edited_recording_refuses_the_folder(tmp_path: Path) -> None:
    """Nothing is replayed beside it: the file is named."""
    put(tmp_path, "good", observation())
    path = put(tmp_path, "bad", observation("gptq")) / "observation.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"dtype": ""', '"dtype": "bfloat16"'), encoding="utf-8")

    with pytest.raises(ObservationError, match=r"gptq/bad/observation\.json: header_sha256: differs"):
        Replay(tmp_path)


def asked(sha256: str) -> Sequences:
    """Sequences that are known by the hash of their workload alone."""
    return Sequences(Workload("reexecution", sha256, ()), {}, 2)


def test_re_executions_are_for_the_claims_they_were_made_of(tmp_path: Path) -> None:
    """They are no measurement of the cell, and others' sequences are not those that were asked for."""
    put(tmp_path, "v", observation(role="verify", workload_sha256="5" * 64))
    put(tmp_path, "seeded", observation(role="verify", workload_sha256="6" * 64, inject="bitflip"))

    replay = Replay(tmp_path)

    assert isinstance(replay.verified(CELL, "float16", asked("5" * 64)), Measured)
    assert isinstance(replay.verified(CELL, "float16", asked("6" * 64)), Missing)
    assert isinstance(replay.result(CELL), Missing)


def test_the_kernel_of_every_lifetime_is_judged(suite: Suite, tmp_path: Path) -> None:
    """A second engine process that picked another kernel is not hidden behind the first."""
    for lifetime, kernel in enumerate(["Fake4Kernel", "OtherKernel"]):
        put(tmp_path, str(lifetime), observation("ct", model="beta", kernels=(kernel,), lifetime=lifetime))

    run = suite(f"--replay={tmp_path}", "-k", "(test_kernel or decode) and beta/ct", "--report", "r", matrix=MATRIX)

    assert {"test_kernel[beta/ct/cpu-here]": "INVALID"} == run.failures(), run.output
    assert "executed OtherKernel x4" in run.cases["test_kernel[beta/ct/cpu-here]"].message
    (row,) = re.findall(r"(?m)^ct +BIT_EXACT .*$", run.output)
    assert "OtherKernel x4 INVALID !" in row
    page = Path("r", PAGE).read_text()
    kernels = page[page.index('id="kernels"') : page.index('id="environment"')]
    assert ["OtherKernel"] == re.findall(r"&rarr; <strong>(\w+)</strong>", kernels)


def test_the_environment_is_what_all_have(tmp_path: Path) -> None:
    """A fact, or a variable, that differs is `several`; a variable that some had not set differs too."""
    told = ({"A": "1", "B": "2", "C": "3"}, {"A": "1", "B": "x"})
    for number, variables in enumerate(told):
        put(tmp_path, str(number), observation(f"f{number}", environment={"vllm": "0", "cpus": number, "variables": variables}))

    found = Replay(tmp_path).environment()

    assert {"vllm": "0", "cpus": "several", "variables": {"A": "1", "B": "several", "C": "several"}} == found
