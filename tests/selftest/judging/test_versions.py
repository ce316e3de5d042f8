"""One cell under several vLLM versions: equal logits, drift, and what excuses it; cells per version in a replay."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantdet.judging import versions as drift
from quantdet.judging.verdicts import Verdict
from quantdet.matrix.expectations import Expect
from quantdet.observations.observation import Observation, read, write
from selftest.fakes.engine import executed
from selftest.fakes.inner import Run, Suite
from selftest.fakes.judged import flipped
from selftest.fakes.matrix import MATRIX
from selftest.fakes.observation import changed_output, last_repeat, observation, with_outputs

pytest_plugins = ["pytester"]

ROW = Expect.model_validate({"when": {}, "outcome": "may_drift", "reason": "another reduction", "source": "the test"})


def seen(version: str, torch: str = "2.11.0", **changes: Any) -> Observation:
    environment = {"vllm": version, "torch_package": torch}
    return replace(observation(environment=environment, **changes), vllm=version)


def family(name: str) -> str:
    return {"OldMarlin": "marlin", "NewMarlin": "marlin"}.get(name, name)


def one_bit(whole: Observation, prompt: int = 1, position: int = 3) -> Observation:
    """One bit of one forced position's digest, in every repeat."""
    output = changed_output(whole.prompts[prompt].outputs[0], "prefill", digests=flipped(position))
    return with_outputs(whole, prompt, (output,), whole.prompts[prompt].header.runs)


def test_equal_logits_of_two_versions() -> None:
    """The same raw logits: IDENTICAL, with both digests and the number of positions."""
    found = drift.across([seen("0.20.2"), seen("0.26.0")], [None], family)

    assert (Verdict.IDENTICAL, True) == (found.verdict, found.expected)
    assert "0.20.2 -> 0.26.0 same raw logits at 13 forced positions and 8 decode steps (the same kernels)" in found.message
    assert "the same kernels" == found.figures["changes"]
    assert found.figures["logits.sha256@0.20.2"] == found.figures["logits.sha256@0.26.0"]


def test_one_flipped_bit_is_drift_where_the_kernels_are_the_same() -> None:
    """One bit of one position: DISTINCT and not expected."""
    found = drift.across([seen("0.20.2"), one_bit(seen("0.26.0"))], [None], family)

    assert (Verdict.DISTINCT, False) == (found.verdict, found.expected)
    assert "other raw logits: 1/13 forced positions differ" in found.message


@pytest.mark.parametrize(
    ("newer", "words"),
    [
        (seen("0.26.0", kernels=("MacheteKernel",)), "kernel UnquantizedLinearMethod -> MacheteKernel"),
        (seen("0.26.0", torch="2.13.0"), "torch 2.11.0 -> 2.13.0"),
        (
            seen("0.26.0", executed=executed("UnquantizedLinearMethod").model_copy(update={"mode": "compiled"}).model_dump()),
            "mode eager -> compiled",
        ),
        (
            seen("0.26.0", executed=executed("UnquantizedLinearMethod").model_copy(update={"attention": ("X",)}).model_dump()),
            "attention FAKE_ATTENTION -> X",
        ),
    ],
    ids=["kernel", "torch", "mode", "attention"],
)
def test_what_ran_differently_explains_drift(newer: Observation, words: str) -> None:
    """Other kernels, attention, mode or torch: drift is reported, not held against anybody."""
    found = drift.across([seen("0.20.2"), one_bit(newer)], [None], family)

    assert (Verdict.DISTINCT, True) == (found.verdict, found.expected)
    assert words in found.message


def test_a_renamed_class_is_the_same_kernel() -> None:
    """Class names change between versions; families do not, so that drift under a new name still fails."""
    versions = [seen("0.20.2", kernels=("OldMarlin",)), one_bit(seen("0.26.0", kernels=("NewMarlin",)))]

    assert not drift.across(versions, [None], family).expected


def test_declared_drift_is_expected() -> None:
    """`may_drift` excuses it and gives the reason."""
    found = drift.across([seen("0.20.2"), one_bit(seen("0.26.0"))], [ROW], family)

    assert (Verdict.DISTINCT, True) == (found.verdict, found.expected)
    assert "may_drift (0.26.0): another reduction" == found.figures["expectation"]


def test_noise_is_not_drift() -> None:
    """Repeats that differ among themselves: what they share is no drift."""
    whole = seen("0.20.2")
    noisy = last_repeat(whole, 0, changed_output(whole.prompts[0].outputs[0], "decode", digests=flipped(2)))

    assert drift.across([noisy, seen("0.26.0")], [None], family).expected


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (seen("0.26.0", checkpoint_sha256="3" * 64), "checkpoints differ"),
        (seen("0.26.0", workload_sha256="3" * 64), "workloads differ"),
        (seen("0.26.0", lengths=(6, 8)), "token ids of prompt p1 differ"),
        (seen("0.26.0", nonfinite=[{"prompt": "p0", "phase": "decode", "repeat": 0, "position": 0}]), "non-finite logits"),
    ],
    ids=["checkpoint", "workload", "ids", "nan"],
)
def test_what_cannot_be_compared_is_invalid(other: Observation, words: str) -> None:
    """Other weights or requests, or logits that are no numbers: nothing is said of the versions."""
    found = drift.across([seen("0.20.2"), other], [None], family)

    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert words in found.message


def test_three_versions_are_compared_one_after_another() -> None:
    """Each with the one before; the worst names the verdict."""
    found = drift.across([seen("0.20.2"), seen("0.26.0"), one_bit(seen("0.33.0"))], [None, None], family)

    assert (Verdict.DISTINCT, False) == (found.verdict, found.expected)
    assert "0.20.2 -> 0.26.0 same raw logits" in found.message
    assert "0.26.0 -> 0.33.0 other raw logits" in found.message


@pytest.mark.parametrize("place", [0, 1])
def test_a_row_excuses_the_step_to_its_own_version(place: int) -> None:
    """Of three versions: a row about the second, or the third, says nothing of the other step."""
    changed = one_bit(seen("0.26.0"))
    known = [seen("0.20.2"), changed, replace(changed, vllm="0.33.0")] if place == 0 else [
        seen("0.20.2"), seen("0.26.0"), one_bit(seen("0.33.0"))
    ]  # fmt: skip
    rows = [ROW, None] if place == 0 else [None, ROW]

    assert drift.across(known, rows, family).expected
    assert not drift.across(known, rows[::-1], family).expected


# ------------------------------------------------------------------------------------------------------------- replayed


def recorded(folder: Path, version: str, change: Any = None) -> None:
    """Recordings of model beta, two formats, by one vLLM version."""
    for format_id, kernel in ("bf16", "UnquantizedLinearMethod"), ("ct", "Fake4Kernel"):
        whole = observation(
            format_id, model="beta", kernels=(kernel,), environment={"vllm": version, "torch_package": "2.11.0"},
        )  # fmt: skip
        whole = change(whole) if change is not None and format_id == "ct" else whole
        place = folder / "cpu-here" / f"vllm-{version}" / "beta" / format_id / version
        place.mkdir(parents=True)
        write(place, whole.header, whole.prompts)


def test_each_version_is_a_cell_of_its_own(suite: Suite, tmp_path: Path) -> None:
    """Two versions in one folder: cases of both, formats compared within each, and the versions with each other."""
    for version in "0.20.2", "0.26.0":
        recorded(tmp_path / "kept", version)

    run: Run = suite(f"--replay={tmp_path}/kept")

    assert 0 == run.code, run.output
    names = "\n".join(run.ran())
    for version in "0.20.2", "0.26.0":
        assert f"test_repeat[beta/ct/cpu-here@{version}-decode]" in names
        assert f"test_distinct[beta/ct/cpu-here@{version}]" in names
    assert "test_versions[beta/ct/cpu-here]" in names
    assert "raw logits, vLLM 0.20.2 against 0.26.0" in run.output


def test_a_version_that_drifts_fails(suite: Suite, tmp_path: Path) -> None:
    """One flipped bit in the newer version's recording fails its versions case and no other."""
    recorded(tmp_path / "kept", "0.20.2")
    recorded(tmp_path / "kept", "0.26.0", one_bit)

    run: Run = suite(f"--replay={tmp_path}/kept")

    assert {"test_versions[beta/ct/cpu-here]": "DISTINCT"} == run.failures(), run.output


def test_one_version_has_no_versions_case(suite: Suite, tmp_path: Path) -> None:
    """Recordings of one version keep the ids that a measuring run has."""
    recorded(tmp_path / "kept", "0.26.0")

    run: Run = suite(f"--replay={tmp_path}/kept")

    assert 0 == run.code, run.output
    assert not [name for name in run.cases if "@" in name or "test_versions" in name]


# --------------------------------------------------------------------------------------------------------------- claims


def test_claims_are_kept_by_a_recording(suite: Suite, tmp_path: Path) -> None:
    """--record adds the claims of the model; a plain run has none."""
    claims = 'formats = ["bf16", "ct"]\nclaims = { workload = "claims-v1", decode_tokens = 6, top_k = 3 }\n'
    matrix = MATRIX.replace('formats = ["bf16", "ct"]\n', claims)

    suite("-k", "beta/ct", "--store", str(tmp_path / "plain"), matrix=matrix)
    suite("-k", "beta/ct", "--record", str(tmp_path / "kept"), matrix=matrix)

    (plain,) = (tmp_path / "plain").rglob("observation.json")
    (kept,) = (tmp_path / "kept").rglob("observation.json")
    assert () == read(plain.parent).claims
    found = read(kept.parent)
    assert 32 == len(found.claims)
    assert {(6,)} == {claim.outputs[0].output_ids.shape for claim in found.claims}
    assert {(6, 3)} == {claim.outputs[0].decode.topk_ids.shape for claim in found.claims}
    assert {(39, 3)} == {claim.outputs[0].prefill.topk_ids.shape for claim in found.claims}
    assert np.array_equal(found.prompts[0].outputs[0].output_ids, read(plain.parent).prompts[0].outputs[0].output_ids)
