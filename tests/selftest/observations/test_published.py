"""Published tables, recomputed from the published files; the importer, and what a replay says of what it wrote."""

import contextlib
import copy
import json
import math
import os
import tomllib
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantdet.judging import kernel, repeat, reported
from quantdet.judging.distinct import distinctness
from quantdet.judging.pairs import pair
from quantdet.judging.verdicts import Verdict
from quantdet.matrix import load
from quantdet.metrics.classes import equivalence_classes
from quantdet.metrics.distances import published_chosen
from quantdet.observations.comparable import comparable
from quantdet.observations.header import Header
from quantdet.observations.observation import HEADER_FILE, Observation, ObservationError, read
from quantdet.observations.published import __main__, checked, layouts
from quantdet.observations.store import Store
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import ROOT
from selftest.fakes.observation import observation
from selftest.fakes.published import generation, reference

pytest_plugins = ["pytester"]

FOLDER = ROOT / "fixtures" / "published"
EXTRACTS = FOLDER / "extracts"
RAW = Path(os.environ.get("QUANTDET_PUBLISHED") or ROOT / "no published files")
TABLES = tomllib.loads((FOLDER / "tables.toml").read_text(encoding="utf-8"))
MATRIX = load.load(ROOT / "quant_matrix.toml")
KNOWN = MATRIX.expectations("0.11.2")
GENERATION = "INT4_H100_generation.json"

needs_raw = pytest.mark.skipif(
    not RAW.is_dir(), reason="UNAVAILABLE published files: needs QUANTDET_PUBLISHED (the folder of the whole files), have none"
)
sources = pytest.mark.parametrize("folder", [EXTRACTS, pytest.param(RAW, marks=needs_raw)], ids=["extracts", "raw"])


def imported(folder: Path, pattern: str, hardware: str | None = None) -> dict[str, Observation]:
    """The observations of a folder's files, by format; nothing is written."""
    found = {}
    for path in sorted(folder.rglob(pattern)):
        for report in layouts.read(checked.load(path)):
            cell = __main__.Cell(__main__.MODEL, report.format_id, __main__.hardware_of(report, MATRIX, hardware))
            found[report.format_id] = __main__.observe(report, cell)
    return found


def raw_json(name: str) -> Any:
    return json.loads((EXTRACTS / name).read_text(encoding="utf-8"))


def written(directory: Path, value: Any, name: str = "file.json") -> Path:
    path = directory / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def main(*arguments: object) -> int:
    return __main__.main([str(argument) for argument in arguments])


# --------------------------------------------------------------------------------------------------------------- tables


@sources
def test_the_ten_pairs(folder: Path) -> None:
    """L2 and largest difference of every pair, to the printed digits."""
    found = imported(folder, "*_investigation.json", "sm80")
    rows = {tuple(row["pair"]): (row["l2"], row["max"]) for row in TABLES["int4_pairs"]["rows"]}

    assert set(combinations(sorted(found), 2)) == set(rows)
    for (a, b), printed in rows.items():
        l2, largest = published_chosen(*(found[name].prompts[0].run(0).decode.chosen for name in (a, b)))
        assert printed == (f"{l2:.6e}", f"{largest:.6e}"), (a, b)


@sources
def test_distinct_logprob_vectors(folder: Path) -> None:
    """gptq: five of five repeats, with the same tokens; the others repeat."""
    found = imported(folder, "*_investigation.json", "sm80")

    assert TABLES["int4_pairs"]["distinct_of_5_repeats"] == {name: len(one.prompts[0].outputs) for name, one in found.items()}
    assert 1 == len({output.output_ids.tobytes() for output in found["gptq"].prompts[0].outputs})


@sources
def test_the_h100_matrices(folder: Path) -> None:
    """Prefill with its summary figures and classes; decode over all references, and the one that was printed."""
    table, found = TABLES["h100_within"], imported(folder, GENERATION)
    names = table["formats"]
    assert set(names) == set(found)
    values = np.array([[reported.published(found[a], found[b], "prefill") for b in names] for a in names])
    decode = [[reported.published(found[a], found[b], "decode") for b in names] for a in names]
    index = table["decode_printed_reference"]
    one = [
        [reported.published_per_prompt(found[a], found[b], "decode", same_tokens=False)[index] for b in names] for a in names
    ]

    assert table["prefill"] == [[f"{value:.2e}" for value in row] for row in values]
    off = values[~np.eye(len(names), dtype=bool)]
    assert table["prefill_off_diagonal_mean"] == f"{off.mean():.2e}"
    assert table["prefill_off_diagonal_range"] == [f"{off.min():.2e}", f"{off.max():.2e}"]
    same = [(a, b) for (i, a), (j, b) in combinations(enumerate(names), 2) if values[i, j] < table["classes_tolerance"]]
    assert table["classes"] == [list(group) for group in equivalence_classes(names, same)]
    assert table["decode"] == [[f"{value:.2e}" if math.isfinite(value) else "inf" for value in row] for row in decode]
    assert table["decode_printed"] == [[f"{value:.2e}" for value in row] for row in one]


def test_a_printed_decode_figure_is_of_parted_tokens() -> None:
    """The printed 6.18 is a run whose tokens part at step 6: `inf` by the metric's own rule."""
    found = imported(EXTRACTS, GENERATION)
    awq, gptq = (found[name].prompts[3].run(0).output_ids for name in ("awq", "gptq_marlin"))

    assert 6 == int(np.flatnonzero(awq != gptq)[0])
    assert math.inf == reported.published_per_prompt(found["awq"], found["gptq_marlin"], "decode")[3]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_cross_hardware_ratios(phase: str) -> None:
    """SNR = signal / noise from the printed matrices, within the rounding of three digits."""
    table = TABLES["a100_to_h100"]
    names, values = table["formats"], np.array(table[phase], np.float64)
    for row in table["snr"]:
        i, j = (names.index(name) for name in row["pair"])
        assert (values[i, j] + values[j, i]) / (values[i, i] + values[j, j]) == pytest.approx(row[phase], rel=0.01)
    off = values[~np.eye(len(names), dtype=bool)]
    assert off.mean() / values.diagonal().mean() == pytest.approx(table["snr_all_pairs"][phase], rel=0.01)


def test_the_cross_hardware_summary() -> None:
    """81.1, 76.1 and 1.0 are signal / noise of the row that they stand in."""
    rows = TABLES["a100_to_h100_summary"]["snr"]
    assert [81.1, 76.1, 1.0] == [row["snr"] for row in rows]
    for row in rows:
        assert float(row["signal"]) / float(row["noise"]) == pytest.approx(row["snr"], abs=0.3 if row["snr"] > 2 else 0.05)


# ----------------------------------------------------------------------------------------------------------- judgements


def test_five_repeats_of_generated_tokens() -> None:
    """gptq NOISY, the others BIT_EXACT with n and bound; each says what was compared."""
    for name, one in imported(EXTRACTS, "*_investigation.json", "sm80").items():
        found = repeat.repeat([one], "decode", KNOWN)
        assert (Verdict.NOISY if name == "gptq" else Verdict.BIT_EXACT) == found.verdict
        assert 5 == found.figures["runs"]
        assert found.message.endswith(reported.NOTE)
        assert "logits.sha256" not in found.figures
        if name == "gptq":
            assert "5 of 5 repeats differ from each other, first prompt investigation step 2" in found.message
            assert 5 == found.figures["distinct_outputs"]
        else:
            assert "0 of 5 repeats differ, flip rate < 0.451" in found.message


def test_what_a_report_cannot_answer() -> None:
    """Prefill of generated tokens, one run only, and kernels: UNAVAILABLE, with need and have."""
    many, once = imported(EXTRACTS, "*_investigation.json", "sm80")["awq"], imported(EXTRACTS, GENERATION)["awq"]
    for found, words in [
        (repeat.repeat([many], "prefill", KNOWN), "needs logprobs of prefill, have none in what was reported"),
        (repeat.repeat([once], "prefill", KNOWN), "needs two runs of a request, have one"),
        (repeat.repeat([once], "decode", KNOWN), "needs two runs of a request, have one"),
        (kernel.kernel(many, "marlin", (), "all"), "needs the layers of the loaded model"),
    ]:
        assert (Verdict.UNAVAILABLE, False) == (found.verdict, found.expected)
        assert words in found.message
        assert reported.NOTE in found.message


def test_pairs_of_generated_tokens() -> None:
    """Distances on the tokens in common; the published value is `inf` where tokens part, and the vector's L2 otherwise."""
    found = imported(EXTRACTS, "*_investigation.json", "sm80")
    near, far = pair(found["awq"], found["awq_marlin"]), pair(found["awq"], found["gptq"])

    assert (Verdict.DISTINCT, 50, "1.516037e-02") == (near.verdict, near.decode_steps, f"{near.decode_published:.6e}")
    assert near.max_abs == pytest.approx(8.132815e-03)
    assert (5, math.inf) == (far.decode_steps, far.decode_published)
    assert far.l2 < 0.01
    assert all(Verdict.DISTINCT == pair(a, b).verdict for a, b in combinations(found.values(), 2))


def test_pairs_of_top_k() -> None:
    """Compared on the prompt's positions; nothing more is claimed than one run each can show."""
    found = imported(EXTRACTS, GENERATION)
    for a, b in combinations(found.values(), 2):
        result = pair(a, b)
        assert (Verdict.DISTINCT, 12, 12) == (result.verdict, result.differing, result.positions)
    told = distinctness(found["awq"], {o.header.cell: o for n, o in found.items() if n != "awq"}, KNOWN)
    assert (Verdict.DISTINCT, True) == (told.verdict, told.expected)
    assert told.message.endswith(f"{reported.NOTE}; one run each, repeat noise is not known")


def test_a_pair_of_top_k_has_the_published_figures() -> None:
    """Both directions of both phases, prompt by prompt too; None is what one run cannot say, and what was not reported."""
    table, found = TABLES["h100_within"], imported(EXTRACTS, GENERATION)
    names = table["formats"]
    for (i, a), (j, b) in combinations(enumerate(names), 2):
        result = pair(found[a], found[b])
        prefill = (result.prefill_published, result.prefill_published_back)
        assert [table["prefill"][i][j], table["prefill"][j][i]] == [f"{value:.2e}" for value in prefill]
        assert (math.inf, math.inf) == (result.decode_published, result.decode_published_back)
        one = result.references[table["decode_printed_reference"]]
        assert [table["decode_printed"][i][j], table["decode_printed"][j][i]] == [f"{one.steps:.2e}", f"{one.steps_back:.2e}"]
        assert (result.prefill_published, "ref0") == (
            pytest.approx(np.mean([row.prefill for row in result.references])),
            result.references[0].id,
        )
        assert (None, None, None, "prefill") == (result.within, result.chosen_l2, result.chosen_max, result.basis)
    # The decode rows of AWQ and GPTQ are behind the parting of every prompt: no step in common was reported.
    assert (0, None) == (
        pair(found["awq"], found["gptq_marlin"]).decode_steps,
        pair(found["awq"], found["gptq_marlin"]).decode_l2,
    )


def test_a_pair_of_generated_tokens_has_the_published_figures() -> None:
    """Seven digits of every pair, whichever is first; nothing of prefill; what is within was measured."""
    found = imported(EXTRACTS, "*_investigation.json", "sm80")
    for row in TABLES["int4_pairs"]["rows"]:
        a, b = row["pair"]
        for result in (pair(found[a], found[b]), pair(found[b], found[a])):
            assert (row["l2"], row["max"]) == (f"{result.chosen_l2:.6e}", f"{result.chosen_max:.6e}")
            assert (None, None, "decode") == (result.prefill_published, result.prefill_published_back, result.basis)
            assert result.within is not None
            assert (result.within > 0) is ("gptq" in (a, b))
            assert [(None, None)] == [(one.prefill, one.prefill_back) for one in result.references]


def made(folder: Path, rows: dict[str, dict[int, float]], top_k: int = 2) -> dict[str, Observation]:
    """Observations of a made-up file: two references of three equal rows, the second without decode."""
    block = {name: dict.fromkeys((-3, -2, -1), row) for name, row in rows.items()}
    files = {
        name: [reference(0, 9, [4, 4, 4], one, one), reference(1, 12, [4, 4, 4], one, {})] for name, one in block.items()
    }  # fmt: skip
    generation(folder, files, top_k)
    return imported(folder, "made_generation.json")


def test_the_mean_over_prompts_needs_all_of_them(tmp_path: Path) -> None:
    """A prompt without rows leaves no mean: not that of the others, not 0, not inf."""
    found = made(tmp_path, {"awq": {1: -1.0, 2: -2.0}, "gptq_marlin": {1: -1.3, 2: -2.4}})
    result = pair(found["awq"], found["gptq_marlin"])

    assert (0.5, 0.5) == (pytest.approx(result.prefill_published), pytest.approx(result.prefill_published_back))
    assert [pytest.approx(0.5), None] == [one.decode for one in result.references]
    assert (None, None) == (result.decode_published, result.decode_published_back)
    assert (3, pytest.approx(0.5)) == (result.decode_steps, result.decode_l2)


def test_top_1_of_some_rows_is_a_mean(tmp_path: Path) -> None:
    """One id a row is no vector of generated tokens: three rows that are 0.25 apart are 0.25 apart."""
    found = made(tmp_path, {"awq": {4: -1.0}, "gptq_marlin": {4: -1.25}}, top_k=1)
    result = pair(found["awq"], found["gptq_marlin"])

    assert (0.25, 0.25, None) == (result.prefill_published, result.references[0].decode, result.chosen_l2)


def test_equal_reports_are_not_identical_formats() -> None:
    """Equal rows under two names say nothing of the logits that were not reported."""
    raw = raw_json(GENERATION)
    raw["generations"]["gptq"] = raw["generations"]["gptq_marlin"]
    raw["metadata"]["model_configs"]["gptq"] = {"model_name": "x", "quantization": "gptq"}
    found = {
        report.format_id: __main__.observe(report, __main__.Cell("qwen3-8b", report.format_id, "sm90"))
        for report in layouts.read(checked.Field("f", "", raw))
    }
    result = pair(found["gptq"], found["gptq_marlin"])

    assert (Verdict.INDISTINCT, 0, 0.0) == (result.verdict, result.differing, result.l2)


def test_a_report_and_logits_are_not_compared() -> None:
    """Evidence of two kinds is told apart whatever else agrees."""
    one = observation("awq")
    other = Observation(one.header.model_copy(update={"evidence": "reported"}), one.prompts)
    assert "one has full-vocabulary logits, the other reported logprobs only" == comparable(one, other)


def test_the_default_evidence_is_not_sealed() -> None:
    """Recordings from before there was a kind of evidence keep their seal; a report is sealed with what it covers."""
    header = imported(EXTRACTS, GENERATION)["awq"].header
    assert observation("awq").header.digest() == observation("awq").header.model_copy(update={"evidence": "logits"}).digest()
    assert header.digest() != header.model_copy(update={"reported": header.reported[:1]}).digest()


# ------------------------------------------------------------------------------------------------------------- importer


@pytest.mark.parametrize(
    ("gpu", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "sm90"), ("NVIDIA H100 NVL", "sm90"), ("NVIDIA H200", "sm90"),
        ("NVIDIA A100-SXM4-80GB", "sm80"), ("NVIDIA L40S", "sm89"), ("NVIDIA GeForce RTX 4090", "sm89"),
        ("NVIDIA A40", "sm86"), ("NVIDIA A10G", "sm86"), ("NVIDIA A10", "sm86"), ("NVIDIA GeForce RTX 3090", "sm86"),
        ("NVIDIA B200", "sm100"),
    ],
)  # fmt: skip
def test_the_hardware_that_a_file_names(tmp_path: Path, gpu: str, row: str) -> None:
    """A GPU's name leads to the matrix's row of its compute capability."""
    raw = raw_json(GENERATION)
    raw["metadata"]["environment"]["gpu_name"] = gpu
    assert 0 == main(written(tmp_path, raw), "--out", tmp_path / "out")
    assert {row} == {one.header.hardware for one in Store(tmp_path / "out").all()}


def test_four_formats_on_an_a100(tmp_path: Path) -> None:
    """The same layout with other contents: format ids, checkpoints and hardware are the file's."""
    raw = raw_json(GENERATION)
    raw["metadata"]["environment"]["gpu_name"] = "NVIDIA A100-SXM4-80GB"
    raw["metadata"]["model_configs"]["gptq"] = {"model_name": "JunHowie/Qwen3-8B-GPTQ-Int4", "quantization": "gptq"}
    raw["generations"]["gptq"] = copy.deepcopy(raw["generations"]["gptq_marlin"])
    for one in raw["generations"]["gptq"]:
        for signal in one["prefill_signals"].values():
            signal["logprobs"]["log_probs"] = [value - 0.25 for value in signal["logprobs"]["log_probs"]]

    assert 0 == main(written(tmp_path, raw), "--out", tmp_path / "out")

    found = {one.header.format: one for one in Store(tmp_path / "out").all()}
    assert {"awq", "awq_marlin", "gptq", "gptq_marlin"} == set(found)
    assert "JunHowie/Qwen3-8B-GPTQ-Int4" == found["gptq"].header.checkpoint_source
    assert found["gptq"].header.checkpoint_sha256 != found["gptq_marlin"].header.checkpoint_sha256
    assert pair(found["gptq"], found["gptq_marlin"]).max_abs == pytest.approx(0.25, rel=1e-4)


def test_a_second_import_changes_nothing(tmp_path: Path) -> None:
    """Written once, the same again: observations read back equal to what was imported."""
    for _ in range(2):
        assert 0 == main(EXTRACTS / GENERATION, "--out", tmp_path)
    there = {one.header.format: one for one in Store(tmp_path).all()}
    for name, one in imported(EXTRACTS, GENERATION).items():
        assert one.header.key == there[name].header.key
        assert [o.fingerprint for p in one.prompts for o in p.outputs] == [
            o.fingerprint for p in there[name].prompts for o in p.outputs
        ]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused import says."""
    capsys.readouterr()
    assert 2 == main(*arguments)
    told = capsys.readouterr()
    assert ("", 1) == (told.out, told.err.count("\n"))
    return told.err


def test_two_layouts_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What one replay cannot judge is refused before anything is written, beside another import and in one call."""
    many, once, out = EXTRACTS / "awq_investigation.json", EXTRACTS / GENERATION, tmp_path / "out"
    both = (many, once, "--hardware", "sm90", "--vllm", "0.11.2")

    assert "give another --out" in error_of(capsys, *both, "--out", out)
    assert not out.exists()
    assert 0 == main(once, "--out", out)
    assert "two runs of awq" in error_of(capsys, many, *both[2:], "--out", out)
    assert "another none" in error_of(capsys, many, "--hardware", "sm90", "--out", out)
    assert 0 == main(many, "--hardware", "sm80", "--out", out)


def test_a_file_without_hardware_needs_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message says what to give; an option that contradicts the file, or leads nowhere, is refused."""
    many, once, out = EXTRACTS / "awq_investigation.json", EXTRACTS / GENERATION, ("--out", tmp_path / "out")
    raw = raw_json(GENERATION)
    raw["metadata"]["environment"]["gpu_name"] = "Quantum 9000"

    assert "names no GPU: give --hardware" in error_of(capsys, many, *out)
    assert "'Quantum 9000': give --hardware" in error_of(capsys, written(tmp_path, raw), *out)
    assert "which is sm90; --hardware says sm80" in error_of(capsys, once, "--hardware", "sm80", *out)
    assert "no 'sm77' in the matrix" in error_of(capsys, once, "--hardware", "sm77", *out)
    assert "the matrix has no cell" in error_of(capsys, many, "--hardware", "cpu-amx", *out)
    assert "names vLLM 0.11.2; --vllm says 0.12.0" in error_of(capsys, once, "--vllm", "0.12.0", *out)
    assert "is no version" in error_of(capsys, once, "--vllm", "../x", *out)


def put(*path: Any, to: Any) -> Callable[[Any], None]:
    """An edit of one field."""

    def edit(raw: Any) -> None:
        for part in path[:-1]:
            raw = raw[part]
        raw[path[-1]] = to

    return edit


FIRST = ("generations", "awq", 0)
ROW = (*FIRST, "prefill_signals", "pos_-3", "logprobs")


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("awq", put("variant", to="../../escape"), "variant: format '../../escape' is not known"),
        ("awq", put("variant", to=["awq"]), "variant: format"),
        ("awq", put("quantization", to="gptq"), "quantization: is another format than variant 'awq'"),
        ("awq", put("baseline", "logprobs", 0, 0, to=math.nan), "baseline.logprobs[0][0]: needs a finite number, is nan"),
        ("awq", put("baseline", "logprobs", 0, 0, to=-math.inf), "baseline.logprobs[0][0]: needs a finite number, is -inf"),
        ("awq", put("baseline", "logprobs", 0, 0, to=-1e300), "baseline.logprobs[0][0]: needs a finite number, is -1e+300"),
        ("awq", put("baseline", "logprobs", 0, 0, to=2.5), "baseline.logprobs[0][0]: is no log probability"),
        ("awq", put("baseline", "logprobs", 0, 0, to="-1"), "baseline.logprobs[0][0]: needs a number, is text"),
        ("awq", put("baseline", "logprobs", 4, to=[-1.0]), "baseline.logprobs[4]: needs 50 elements, has 1"),
        ("awq", put("baseline", "logprobs", to=[]), "baseline.logprobs: needs 5 elements, has 0"),
        ("awq", put("baseline", "tokens", 1, to=[1]), "baseline.tokens[1]: has 1 tokens, the first repeat 50"),
        ("awq", put("baseline", "tokens", 1, 3, to=-1), "baseline.tokens[1][3]: needs 0 to"),
        ("awq", put("baseline", "tokens", 1, 3, to=True), "baseline.tokens[1][3]: needs an integer"),
        ("awq", put("baseline", "tokens", to=[]), "baseline.tokens: needs 1 to 10000 elements, has 0"),
        ("awq", put("prompt_length", to=10**9), "prompt_length: needs 2 to 1048576, is 1000000000"),
        ("awq", put("prompt_length", to=10**4000), "prompt_length: needs 2 to 1048576, is a number of more"),
        ("awq", put("config", "repetitions", to=10**9), "config.repetitions: needs 1 to 10000"),
        ("awq", put("config", "temperature", to=1.0), "config.temperature: not greedy"),
        ("awq", put("model", to="a\nb"), "model: needs 1 to 200 printable characters"),
        ("awq", put("success", to=False), "success: the run did not succeed"),
        ("generation", put("generations", "../x", to=[]), "format '../x' is not known"),
        ("generation", put("generations", "torchao", to=[]), "generations.torchao: needs 1 to 1000 elements, has 0"),
        ("generation", put("generations", to={}), "generations: needs 1 to 9 elements, has 0"),
        ("generation", put("generations", to=5), "generations: needs an object, is a number"),
        ("generation", put("metadata", to=None), "metadata: needs an object, is null"),
        ("generation", put("metadata", "model_configs", to={}), "metadata.model_configs.awq: missing"),
        ("generation", put("metadata", "max_new_tokens", to=10**9), "metadata.max_new_tokens: needs 100 to 4096"),
        ("generation", put("metadata", "top_k_logprobs", to=1), "metadata.top_k_logprobs: needs 5 to 1000, is 1"),
        ("generation", put("metadata", "environment", "vllm_version", to=7), "vllm_version: needs text, is a number"),
        ("generation", put(*FIRST, "ref_idx", to=1), "generations.awq: a ref_idx stands twice"),
        ("generation", put(*FIRST, "ref_idx", to="../../x"), "ref_idx: needs an integer, is text"),
        ("generation", put(*FIRST, "prompt_ids", to=[1, 2, 3]), "prompt_length: is 8067, prompt_ids has 3"),
        ("generation", put(*FIRST, "prompt_length", to=2), "prefill_signals.pos_-3: lies before the first of 2 tokens"),
        ("generation", put(*FIRST, "prompt_length", to=3), "prefill_signals: the first token of a prompt has no logprob"),
        ("generation", put(*FIRST, "num_generated", to=99), "num_generated: is 99, generated_ids has 100"),
        ("generation", put(*FIRST, "prefill_signals", "pos_../..", to={}), "needs a name like pos_-3"),
        ("generation", put(*ROW, "token_ids", 0, to=2**31), "token_ids[0]: needs 0 to 2147483647"),
        ("generation", put(*ROW, "token_ids", 0, to=151668), "token_ids: an id stands twice"),
        ("generation", put(*ROW, "log_probs", 1, to=math.nan), "log_probs[1]: needs a finite number"),
        ("generation", put(*ROW, "log_probs", to=[-1.0]), "log_probs: needs 5 elements, has 1"),
        ("generation", put(*ROW, "log_probs", to={}), "log_probs: needs a list, is an object"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, edit: Callable[[Any], None], words: str
) -> None:
    """One line with file and field, exit code 2, and nothing is written."""
    raw = raw_json(GENERATION if name == "generation" else f"{name}_investigation.json")
    edit(raw)
    given_ = () if name == "generation" else ("--hardware", "sm80")
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(raw), encoding="utf-8")

    found = error_of(capsys, path, "--out", tmp_path / "out", *given_)

    assert f"{path}: " in found
    assert words in found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"), ("[]", "of neither layout"), ("{}", "of neither layout"), ('{"generations": ', "not JSON"),
        ('{"a": 1, "a": 2}', "a name is given twice"), ("[" * 100_000, "not JSON"), ("9" * 5000, "not JSON"),
        ('{"baseline": 1}', "variant: missing"), ("\ud800", "not JSON"),
    ],
    ids=["empty", "list", "object", "cut", "twice", "deep", "digits", "half", "surrogate"],
)  # fmt: skip
def test_a_file_that_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    """Whatever it is: one line."""
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert words in error_of(capsys, path, "--out", tmp_path / "out")


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing, a folder, a pipe, too large, a name with a line break."""
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(checked.MAX_BYTES + 1)
    for name, words in [
        ("none", "No such file"), ("", "not a regular file"), ("pipe", "not a regular file"), ("large", "larger than 64 MiB"),
        ("a\nb", "No such file"),
    ]:  # fmt: skip
        assert words in error_of(capsys, tmp_path / name, "--out", tmp_path / "out")
    written(tmp_path, "x", "file")
    assert "no such folder" in error_of(capsys, EXTRACTS / GENERATION, "--out", tmp_path / "file")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_a_line_or_an_observation(data: st.DataObject, tmp_path: Path) -> None:
    """Any value at any place: the file is refused by name, or what was imported reads back."""
    name = data.draw(st.sampled_from([GENERATION, "gptq_investigation.json"]))
    raw = raw_json(name)
    raw.get("generations", {}).pop("awq_marlin", None)
    parent, key = raw, data.draw(st.sampled_from(sorted(raw)))
    while isinstance(parent[key], dict | list) and parent[key] and data.draw(st.integers(0, 7)):
        parent = parent[key]
        key = data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
    leaves = st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=5)
    parent[key] = data.draw(st.recursive(leaves, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=3), s)))
    try:
        for report in layouts.read(checked.Field("f", "", raw)):
            __main__.observe(report, __main__.Cell("qwen3-8b", report.format_id, "sm90"))
    except checked.ImportRefused as error:
        assert str(error).startswith("f: ")
        assert "\n" not in str(error)


# ------------------------------------------------------------------------------------------- reported observations, read


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An imported observation."""
    assert 0 == main(EXTRACTS / "gptq_investigation.json", "--out", tmp_path, "--hardware", "sm80")
    return next(tmp_path.rglob(HEADER_FILE)).parent


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("evidence", to="logits"), "needs 'executed'"),
        (put("evidence", to="hearsay"), "evidence"),
        (put("reported", to=[]), "reported: 0 rows for 1 prompts"),
        (put("reported", 0, "decode", to=[3, 2]), "reported.0.decode: rows are not ascending"),
        (put("reported", 0, "decode", to=[49, 50]), "reported.0.decode: rows are not ascending below 50"),
        (put("reported", 0, "prefill", to=[3789]), "reported.0.prefill: rows are not ascending below 3789"),
        (put("reported", 0, "decode", to=[]), "reported.0: covers nothing"),
        (put("reported", 0, "generated", to=51), "reported.0.generated: 51 of 50 tokens"),
        (put("reported", 0, "width", to=10**9), "reported.0.width"),
        (put("reported", 0, "width", to=2), "0.0.decode.topk_ids"),
        (put("prompts", 0, "content_start", to=2), "every reported row counts"),
        (put("executed", to={"layers": []}), "executed: evidence 'reported' has none"),
    ],
)
def test_a_report_that_claims_more_is_refused(place: Path, edit: Callable[[Any], None], words: str) -> None:
    """Sealed anew after the edit: the reader checks what the header says against what a report can know."""
    path = place / HEADER_FILE
    raw = json.loads(path.read_text(encoding="utf-8"))
    edit(raw)
    with contextlib.suppress(ValueError):
        raw["header_sha256"] = Header.model_validate(raw).digest()
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ObservationError, match=words):
        read(place)


# --------------------------------------------------------------------------------------------------------------- replay


def test_replay_of_five_repeats(suite: Suite, tmp_path: Path) -> None:
    """gptq's decode is the declared noise, the others repeat; pairs are judged; kernels and prefill are not known."""
    out = tmp_path / "out"
    files = sorted(EXTRACTS.glob("*_investigation.json"))
    assert 0 == main(*files, "--out", out, "--hardware", "sm80")

    run = suite(f"--replay={out}", "--hardware=sm80", "-k", "qwen3-8b/", matrix=(ROOT / "quant_matrix.toml").read_text())

    assert (0, {}) == (run.code, run.failures())
    for name in ("awq", "awq_marlin", "gptq", "gptq_marlin", "pytorch_int4"):
        cell = f"qwen3-8b/{name}/sm80"
        case = run.cases[f"test_repeat[{cell}-decode]"]
        expected = ("xfail", "NOISY", "5") if name == "gptq" else ("passed", "BIT_EXACT", "1")
        assert expected == (case.outcome, case.verdict, case.properties["distinct_outputs"])
        assert "5" == case.properties["runs"]
        assert ("skipped", "UNAVAILABLE") == (
            run.cases[f"test_kernel[{cell}]"].outcome,
            run.cases[f"test_kernel[{cell}]"].verdict,
        )
        assert "have none in what was reported" in run.cases[f"test_repeat[{cell}-prefill]"].message
        case = run.cases[f"test_distinct[{cell}]"]
        assert ("passed", "DISTINCT", "reported") == (case.outcome, case.verdict, case.properties["evidence"])
    assert "decode_published=inf" in run.cases["test_distinct[qwen3-8b/awq/sm80]"].properties["pair.gptq"]
    assert "5 of 5 repeats differ" in run.cases["test_repeat[qwen3-8b/gptq/sm80-decode]"].message
    assert reported.NOTE in run.cases["test_repeat[qwen3-8b/gptq/sm80-decode]"].message


def test_replay_of_one_run_each(suite: Suite, tmp_path: Path) -> None:
    """Three formats on an H100: DISTINCT by what was reported, and no word on repeats."""
    out = tmp_path / "out"
    assert 0 == main(EXTRACTS / GENERATION, "--out", out)

    run = suite(f"--replay={out}", "--hardware=sm90", "-k", "qwen3-8b/", matrix=(ROOT / "quant_matrix.toml").read_text())

    assert (0, {}) == (run.code, run.failures())
    ran = {name: case.verdict for name, case in run.ran().items()}
    assert {f"test_distinct[qwen3-8b/{name}/sm90]": "DISTINCT" for name in ("awq", "awq_marlin", "gptq_marlin")} == ran
    assert "needs two runs of a request, have one" in run.cases["test_repeat[qwen3-8b/awq/sm90-decode]"].message
