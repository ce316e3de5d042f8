"""Claims re-executed by the fake engine: identified, not separable, doctored, or not to be judged here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quantdet import checkpoints
from quantdet.judging.results import Measured, Missing
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix import load
from quantdet.matrix.cell import Cell
from quantdet.matrix.expectations import Expectations
from quantdet.observations.claims import Claim
from quantdet.observations.header import NonFinite
from quantdet.observations.observation import Observation, ObservationError, PromptRecord, read, write
from quantdet.observations.pack import pack
from quantdet.session import reexecution
from selftest.fakes.inner import Run, Suite
from selftest.fakes.matrix import MATRIX, expect, setting
from selftest.fakes.observation import observation

pytest_plugins = ["pytester"]

ALPHA = 'memory_gib = 1\nformats = ["*"]\n'
# Three formats in one dtype: two with the same numbers, one with others.
WITH_CLAIMS = MATRIX.replace(
    ALPHA,
    'memory_gib = 1\nformats = ["gptq", "ct", "awq"]\nclaims = { workload = "claims-v1", decode_tokens = 6, top_k = 4 }\n',
).replace('dtype = { cpu = "bfloat16", default = "float16" }', 'dtype = "float16"')
_recorded: list[Path] = []


@pytest.fixture
def recordings(suite: Suite, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of recordings of model alpha's formats by the fake engine, which are made once."""
    if not _recorded:
        kept = tmp_path_factory.mktemp("recorded") / "kept"
        run: Run = suite("-k", "alpha and cpu-here and test_kernel", f"--record={kept}", matrix=WITH_CLAIMS)
        assert 0 == run.code, run.output
        _recorded.append(kept)
    shutil.copytree(_recorded[0], tmp_path / "kept")
    return tmp_path / "kept"


def folder_of(recordings: Path, format_id: str) -> Path:
    (found,) = (path.parent for path in recordings.rglob(f"alpha/{format_id}/*/observation.json"))
    return found


def rewrite(folder: Path, whole: Observation, **header: Any) -> None:
    """Write an observation again, sealed anew: what a forger would do."""
    shutil.rmtree(folder)
    folder.mkdir()
    write(folder, whole.header.model_copy(update=header), whole.prompts, whole.claims)


def verdicts(run: Run) -> dict[str, str]:
    return {name: case.verdict for name, case in run.cases.items() if name.startswith("test_reexecution")}


def test_honest_claims_are_identified(suite: Suite, recordings: Path) -> None:
    """Each claim is nearest to its own numbers in every prompt; formats with the same numbers are not separable."""
    run = suite("-k", "reexecution", f"--reference={recordings}", matrix=WITH_CLAIMS)

    assert 0 == run.code, run.output
    assert {"DETECTABLE"} == set(verdicts(run).values())
    case = run.cases["test_reexecution[alpha/gptq/cpu-here-by-cpu-here]"]
    assert "32/32 [0.8" in case.properties["identified"]
    assert "own=0 published=0" == case.properties["distance.decode.ct"]  # the same integers, the same kernel
    assert "PAIRWISE SNR SUMMARY" in run.output
    assert "NOT_DETECTABLE" in run.output
    # Three claims, each told from the formats with other numbers by a p-value of its own: all count in the run's Holm.
    assert "3 cases rest on a p-value: of 3 that found a difference 3 stay" in run.suite["multiplicity"]


def test_packed_claims_are_the_same_claims(suite: Suite, recordings: Path) -> None:
    """Re-executed against a packed recording: every figure of every case is that of the plain one."""
    plain = suite("-k", "reexecution", f"--reference={recordings}", "--store=s", matrix=WITH_CLAIMS)
    pack(recordings)

    run = suite("-k", "reexecution", f"--reference={recordings}", "--store=s", matrix=WITH_CLAIMS)

    assert [] == list(recordings.rglob("tensors.safetensors"))
    assert {"DETECTABLE"} == set(verdicts(run).values())
    assert (plain.code, plain.cases) == (run.code, run.cases)


def test_engines_verify_once(suite: Suite, recordings: Path, tmp_path: Path) -> None:
    """One engine for each format, whatever the number of claims; a rerun takes them from the store."""
    starts = tmp_path / "starts"
    every = f'\n[[setting]]\nwhen = {{}}\nargs = {{ starts = "{starts}" }}\nreason = "counts"\n'
    for _ in range(2):
        suite("-k", "reexecution and alpha", f"--reference={recordings}", "--store=s", matrix=WITH_CLAIMS + every)

    assert 3 == len(starts.read_text().splitlines())


def test_a_claim_under_another_name_is_found_out(suite: Suite, recordings: Path) -> None:
    """AWQ's tokens and logprobs recorded as GPTQ's: the claim fails, and says whose numbers match."""
    awq, gptq = read(folder_of(recordings, "awq")), read(folder_of(recordings, "gptq"))
    rewrite(gptq.path, Observation(gptq.header, gptq.prompts, claims=awq.claims), claims=awq.header.claims)  # type: ignore[arg-type]

    run = suite("-k", "reexecution and gptq", f"--reference={recordings}", matrix=WITH_CLAIMS)

    assert {"test_reexecution[alpha/gptq/cpu-here-by-cpu-here]": "DETECTABLE"} == run.failures(), run.output
    assert "not what it claims: awq matches it better than gptq" in run.words


TWO_MAKERS = (
    MATRIX.partition("\n[[expect]]")[0]  # no row says which formats are the same
    + "\n"
    + setting("ct", "honest", numerics="maker-b")
    + """
[models.gamma]
title = "one base, quantized by two makers"
workload = "synthetic-v1"
group_size = 32
memory_gib = 1
formats = ["gptq", "ct"]
hardware = ["cpu-here"]
claims = { workload = "claims-v1", decode_tokens = 6, top_k = 4 }
hub = { gptq = "maker-a/x", ct = "maker-b/x" }
"""
)


@pytest.fixture
def two_makers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub's cache with GPTQ of one maker and compressed-tensors of another: one word in the matrix, other integers."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for seed, (maker, format_id) in enumerate((("a", "gptq"), ("b", "ct"))):
        found = load.load(_written(tmp_path / "matrix.toml", MATRIX))
        model = found.models["alpha"]
        assert model.synthetic is not None
        model = model.model_copy(update={"synthetic": model.synthetic.model_copy(update={"seed": seed})})
        made = checkpoints.resolve("alpha", model, found.formats[format_id], cache=tmp_path / "made")
        repository, commit = tmp_path / "hub" / f"models--maker-{maker}--x", f"{seed}" * 40
        shutil.copytree(made.path, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit, encoding="utf-8")


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_one_makers_tokens_do_not_pass_under_another_makers_name(suite: Suite, two_makers: None, tmp_path: Path) -> None:
    """Tokens of B's integers, sealed under A's name and hash, with B running beside it: "the same numbers" are the tensors'."""
    run = suite("-k", "gamma and (test_kernel or test_distinct)", f"--record={tmp_path / 'kept'}", matrix=TWO_MAKERS)
    assert {} == run.failures(), run.output
    assert "DISTINCT" == run.cases["test_distinct[gamma/ct/cpu-here]"].verdict  # expected of other integers
    honest = suite("-k", "reexecution and gamma", f"--reference={tmp_path / 'kept'}", matrix=TWO_MAKERS)
    assert 2 == len(verdicts(honest)) and {} == honest.failures(), honest.output

    forge(tmp_path / "kept")
    forged = suite("-k", "reexecution and gamma and gptq", f"--reference={tmp_path / 'kept'}", matrix=TWO_MAKERS)

    assert ["DETECTABLE"] == list(forged.failures().values()), forged.output
    (case,) = (case for name, case in forged.cases.items() if name.startswith("test_reexecution"))
    assert "not what it claims: ct matches it better than gptq" in case.message


OTHER, BYTES, BYTES_TOO = f"decoded:{'0' * 64}", f"bytes:{'1' * 64}", f"bytes:{'2' * 64}"


def told(monkeypatch: pytest.MonkeyPatch, a: str | None, b: str | None) -> None:
    """What is known of the makers' numbers: these texts; None: what their tensors say."""
    real = checkpoints.numbers.of

    def of(path: Path, sha256: str, cache: Path) -> str:
        said = a if "maker-a" in str(path) else b
        return real(path, sha256, cache) if said is None else said

    monkeypatch.setattr(checkpoints.numbers, "of", of)


def forge(kept: Path) -> None:
    """Claims of B sealed anew under A's name and A's checkpoint hash."""
    a, b = (read(path.parent) for name in ("gptq", "ct") for path in kept.rglob(f"gamma/{name}/*/observation.json"))
    rewrite(a.path, Observation(a.header, a.prompts, claims=b.claims), claims=b.header.claims)  # type: ignore[arg-type]


@pytest.mark.parametrize(("a", "b"), [("", None), (None, ""), ("", ""), (None, BYTES), (BYTES, BYTES_TOO)])
def test_false_accept_of_another_makers_tokens_whatever_is_known_of_the_numbers(
    suite: Suite, two_makers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, a: str | None, b: str | None
) -> None:
    """Numbers that nobody knows, or decodes, are nobody else's: honest makers pass, B's tokens under A's name do not."""
    told(monkeypatch, a, b)
    kept = tmp_path / "kept"
    run = suite("-k", "gamma and (test_kernel or test_distinct)", f"--record={kept}", matrix=TWO_MAKERS)
    assert {} == run.failures(), run.output
    honest = suite("-k", "reexecution and gamma", f"--reference={kept}", "--store=s", matrix=TWO_MAKERS)
    assert ["DETECTABLE"] * 2 == list(verdicts(honest).values()) and {} == honest.failures(), honest.output

    forge(kept)
    forged = suite("-k", "reexecution and gamma and gptq", f"--reference={kept}", matrix=TWO_MAKERS)

    assert ["DETECTABLE"] == list(forged.failures().values()), forged.output
    assert "not what it claims: ct matches it better than gptq" in forged.words


@pytest.mark.parametrize("b", [None, BYTES])
def test_two_layouts_of_the_same_numbers_pass_whether_or_not_that_is_known(
    suite: Suite, two_makers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, b: str | None
) -> None:
    """Equal logits: expected of equal digests, and no contradiction where one layout is not decoded."""
    told(monkeypatch, OTHER, b or OTHER)
    kept, same = tmp_path / "kept", TWO_MAKERS.replace('numerics = "maker-b"', 'numerics = "int4-sym"')
    run = suite("-k", "gamma and (test_kernel or test_distinct)", f"--record={kept}", matrix=same)
    assert {} == run.failures() and "IDENTICAL" == run.cases["test_distinct[gamma/ct/cpu-here]"].verdict, run.output

    found = suite("-k", "reexecution and gamma", f"--reference={kept}", matrix=same)

    assert {} == found.failures(), found.output
    wanted = {"skipped"} if b is None else {"passed"}  # nothing with other numbers is here, or nothing that is known to be
    assert wanted == {case.outcome for name, case in found.cases.items() if "gamma" in name}


# A plain model, the same quantized while loading, and a third format that both can be told from.
ONLINE = (
    WITH_CLAIMS.partition("\n[[expect]]")[0].replace('"gptq", "ct", "awq"', '"half", "online", "awq"')
    + """
[formats.half]
title = "unquantized in half precision"
layout = "plain"
weights = "bf16"
kernel = "unquantized"
dtype = "float16"

[formats.online]
title = "the same weights, quantized while loading"
layout = "plain"
weights = "bf16"
kernel = "auto"
dtype = "float16"

[[setting]]
when = { format = "online" }
args = { quantization = "fp8", executes = "Fake8Kernel", stored = "weight:BF16" }
reason = "asked for"
"""
)


def test_plain_tokens_do_not_pass_as_those_of_a_quantization_while_loading(suite: Suite, tmp_path: Path) -> None:
    """Both read one folder, whose digest says what one of them computes with and not what the other does."""
    kept = tmp_path / "kept"
    run = suite("-k", "alpha and cpu-here and test_kernel", f"--record={kept}", matrix=ONLINE)
    assert {} == run.failures() and 3 == len(run.ran()), run.output
    honest = suite("-k", "reexecution and alpha", f"--reference={kept}", "--store=s", matrix=ONLINE)
    assert 3 == len(verdicts(honest)) and {} == honest.failures(), honest.output

    online, half = (read(folder_of(kept, name)) for name in ("online", "half"))
    rewrite(online.path, Observation(online.header, online.prompts, claims=half.claims), claims=half.header.claims)  # type: ignore[arg-type]
    forged = suite("-k", "reexecution and alpha and online", f"--reference={kept}", "--store=s", matrix=ONLINE)

    assert ["DETECTABLE"] == list(forged.failures().values()), forged.output
    assert "not what it claims: half matches it better than online" in forged.words


def test_tokens_of_one_format_under_logprobs_of_another(suite: Suite, recordings: Path) -> None:
    """Logprobs that were not made from these tokens match no format."""
    awq, ct = read(folder_of(recordings, "awq")), read(folder_of(recordings, "ct"))
    from dataclasses import replace

    mixed = tuple(
        replace(theirs, outputs=(replace(theirs.outputs[0], output_ids=ours.outputs[0].output_ids),))
        for ours, theirs in zip(awq.claims, ct.claims, strict=True)
    )
    rewrite(ct.path, Observation(ct.header, ct.prompts, claims=mixed))  # type: ignore[arg-type]

    run = suite("-k", "reexecution and /ct/", f"--reference={recordings}", matrix=WITH_CLAIMS)

    assert 4 == run.code
    assert "chosen" in run.output


def test_logprobs_far_from_every_format_are_not_taken_for_a_hardware_difference(suite: Suite, recordings: Path) -> None:
    """A claim whose logprobs are off by nats everywhere, consistently and sealed anew, matches no format."""
    whole = read(folder_of(recordings, "awq"))
    for claim in whole.claims:
        block = claim.outputs[0].decode
        for array in (block.topk_logprobs, block.chosen):
            array.flags.writeable = True
        block.topk_logprobs[:] -= np.arange(4, dtype=np.float32) * 5 + 1
        block.chosen[:] -= 1
    rewrite(folder_of(recordings, "awq"), whole)

    run = suite("-k", "reexecution and awq", f"--reference={recordings}", matrix=WITH_CLAIMS)

    assert {"test_reexecution[alpha/awq/cpu-here-by-cpu-here]": "DETECTABLE"} == run.failures(), run.output
    assert "matches no format here" in run.output


def test_tokens_that_are_not_the_most_likely_are_refused(recordings: Path) -> None:
    """A claim is greedy: the second most likely token, with its own logprob, is not what was asked for."""
    whole = read(folder_of(recordings, "awq"))
    output = whole.claims[0].outputs[0]
    for array in (output.output_ids, output.decode.chosen):
        array.flags.writeable = True
    output.output_ids[2], output.decode.chosen[2] = output.decode.topk_ids[2, 1], output.decode.topk_logprobs[2, 1]
    rewrite(folder_of(recordings, "awq"), whole)

    with pytest.raises(ObservationError, match=r"claim0\.0\.output_ids: step 2 is not the most likely token"):
        read(folder_of(recordings, "awq"))


def test_one_prompt_many_times_is_refused(recordings: Path) -> None:
    """Copies of one claim are no independent evidence."""
    whole = read(folder_of(recordings, "awq"))
    copies = tuple(
        PromptRecord(header=claim.header, prompt_ids=whole.claims[0].prompt_ids, outputs=whole.claims[0].outputs)
        for claim in whole.claims
    )
    rewrite(folder_of(recordings, "awq"), Observation(whole.header, whole.prompts, claims=copies))

    with pytest.raises(ObservationError, match=r"claim1\.prompt_ids: the same as claim0's"):
        read(folder_of(recordings, "awq"))


def test_a_verifier_that_died_is_not_passed_over(suite: Suite, recordings: Path) -> None:
    """A format that should have re-executed the claim and crashed fails the case, though the rest would do."""
    run = suite("-k", "reexecution and awq", f"--reference={recordings}", matrix=WITH_CLAIMS + setting("ct", "kill"))

    assert {"test_reexecution[alpha/awq/cpu-here-by-cpu-here]": "ERROR"} == run.failures(), run.output
    assert "did not run: ct" in run.cases["test_reexecution[alpha/awq/cpu-here-by-cpu-here]"].message


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda folder: header(folder, schema=7), "schema: is 7, this suite reads 1"),
        (lambda folder: header(folder, claim_tokens=10**9), "header_sha256"),
        (lambda folder: header(folder, model="../../etc"), "model"),
        (lambda folder: (folder / "tensors.safetensors").write_bytes(b"\0" * 7), "tensors_sha256"),
        (lambda folder: (folder / "observation.json").write_text("{"), "not JSON"),
    ],
    ids=["schema", "edited", "path", "truncated", "json"],
)
def test_a_bad_reference_is_refused(suite: Suite, recordings: Path, edit: Callable[[Path], Any], words: str) -> None:
    """Unknown schema, edited, truncated or unreadable: file and field are named, nothing is judged from it."""
    folder = folder_of(recordings, "awq")
    edit(folder)

    run = suite("-k", "reexecution and awq", f"--reference={recordings}", matrix=WITH_CLAIMS)

    assert 0 != run.code
    assert words in run.output
    assert str(folder.name) in run.output
    assert "Traceback" not in run.output


def header(folder: Path, **fields: Any) -> None:
    path = folder / "observation.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | fields))


@pytest.mark.parametrize("ulps", [1])
def test_one_logprob_shifted_by_one_ulp_is_refused(suite: Suite, recordings: Path, ulps: int) -> None:
    """Without a new seal: the file's hash. With one: the chosen token's logprob has to be the one in its top-k."""
    folder = folder_of(recordings, "awq")
    whole = read(folder)
    block = whole.claims[3].outputs[0].decode
    row = int(np.flatnonzero((block.topk_ids == whole.claims[3].outputs[0].output_ids[:, None]).any(axis=1))[0])
    block.chosen.flags.writeable = True
    block.chosen.view(np.int32)[row] += ulps
    rewrite(folder, whole)

    run = suite("-k", "reexecution and awq", f"--reference={recordings}", matrix=WITH_CLAIMS)

    assert 4 == run.code
    assert "claim3.0.decode.chosen" in run.output


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda row: row.__setitem__(slice(1, 3), row[[2, 1]]), "not in order"),
        (lambda row: row.__iadd__(6.0), "probabilities add up to"),
        (lambda row: row.__setitem__(2, np.nan), "no logprob"),
    ],
    ids=["order", "mass", "nan"],
)
def test_logprobs_that_no_engine_answers_are_refused(recordings: Path, edit: Callable[[Any], Any], words: str) -> None:
    """Sealed anew: swapped, raised or missing logprobs of one position are named all the same."""
    whole = read(folder_of(recordings, "awq"))
    block = whole.claims[3].outputs[0].prefill
    block.topk_logprobs.flags.writeable = True
    edit(block.topk_logprobs[5])
    if words == "probabilities add up to":  # and so is the token's own, not to be found by that
        block.chosen.flags.writeable = True
        block.chosen[5] += 6.0
    rewrite(folder_of(recordings, "awq"), whole)

    with pytest.raises(ObservationError, match=f"claim3.0.prefill.topk_logprobs: .*{words}"):
        read(folder_of(recordings, "awq"))


def test_ids_and_dtypes_that_the_model_does_not_have_are_refused(suite: Suite, recordings: Path) -> None:
    """They would spoil the plan that all claims share: named before any engine starts."""
    folder = folder_of(recordings, "awq")
    rewrite(folder, read(folder), dtype="evil")
    assert "dtype: 'evil', needs one of bfloat16" in suite("-k", "reexecution", f"--reference={recordings}").output

    whole = read(folder)
    whole.claims[1].prompt_ids.flags.writeable = True
    whole.claims[1].prompt_ids[0] = 10**9
    rewrite(folder, whole, dtype="float16")
    run = suite("-k", "reexecution", f"--reference={recordings}")
    assert 4 == run.code
    assert "claim1: token id 1000000000 of a vocabulary of 1024" in run.output


def test_another_checkpoint_under_the_same_name_is_invalid(suite: Suite, recordings: Path) -> None:
    """The claim's weights are not the ones here: INVALID, with both hashes."""
    folder = folder_of(recordings, "awq")
    rewrite(folder, read(folder), checkpoint_sha256="ab" * 32)

    run = suite("-k", "reexecution and awq", f"--reference={recordings}", matrix=WITH_CLAIMS)

    assert {"test_reexecution[alpha/awq/cpu-here-by-cpu-here]": "INVALID"} == run.failures(), run.output
    assert "another checkpoint under the same name: the claim's sha256 is abababab" in run.words


def test_a_model_that_is_not_here_is_unavailable(suite: Suite, recordings: Path) -> None:
    """A claim of a model that the matrix does not know: skipped, with the checkpoint's id."""
    folder = folder_of(recordings, "awq")
    whole = read(folder)
    rewrite(folder, whole, model="omega")

    run = suite("-k", "reexecution and omega", f"--reference={recordings}", matrix=WITH_CLAIMS)

    (case,) = (case for name, case in run.cases.items() if "omega" in name)
    assert ("skipped", "UNAVAILABLE") == (case.outcome, case.verdict)
    assert f"needs model omega (checkpoint sha256 {whole.header.checkpoint_sha256[:16]}" in case.message


def test_another_vllm_version_is_named(suite: Suite, recordings: Path) -> None:
    """Judged all the same; what differs beside the hardware is in the verdict."""
    folder = folder_of(recordings, "awq")
    whole = read(folder)
    rewrite(folder, whole, environment={**whole.header.environment, "vllm": "0.20.2"})

    run = suite("-k", "reexecution and awq", f"--reference={recordings}", "-rP", matrix=WITH_CLAIMS)

    assert 0 == run.code, run.output
    (case,) = (case for name, case in run.ran().items() if "alpha/awq" in name)
    assert "vllm 0.20.2 -> 0.32.0" in case.properties["beside"]


def test_a_claim_with_nothing_to_be_told_from_is_unavailable(suite: Suite, recordings: Path, tmp_path: Path) -> None:
    """Every format with other numbers is refused here, as declared: a skip with need and have, and no engine starts."""
    starts = tmp_path / "starts"
    every = f'\n[[setting]]\nwhen = {{}}\nargs = {{ starts = "{starts}" }}\nreason = "counts"\n'
    matrix = WITH_CLAIMS + expect("awq", "unsupported") + every

    run = suite("-k", "reexecution and (gptq or /ct/)", f"--reference={recordings}", matrix=matrix)

    assert 0 == run.code, run.output
    found = [case for name, case in run.cases.items() if name.startswith("test_reexecution")]
    assert 2 == len(found) and {"UNAVAILABLE"} == {case.verdict for case in found}
    told = " ".join(case.message for case in found)
    assert "needs a format with other numbers than gptq on cpu-here, have ct, gptq" in told
    assert not starts.exists()


# ------------------------------------------------------------------------------------------ before anything is re-executed

CLAIM = Claim("alpha", "awq", "cpu-here", source="elsewhere")


def session(recorded: Observation, weights: str = "1" * 64, dtype: str = "float16") -> Any:
    """As much of a session as is asked before any engine starts; it re-executes nothing."""
    format_ = SimpleNamespace(weights="int4-asym", activations="none", engine="vllm", layout="awq")
    return SimpleNamespace(
        references=SimpleNamespace(observation=lambda claim: recorded, header=lambda claim: recorded.header),
        measuring=SimpleNamespace(weights=lambda model, name: SimpleNamespace(sha256=weights, numbers="")),
        matrix=SimpleNamespace(
            models={"alpha": SimpleNamespace(synthetic=None, package=None)}, formats={"awq": format_},
            verifying_dtype=lambda cell, claimed: dtype,
            cells=lambda: [Cell("alpha", "awq", "cpu-here")],
        ),
        evidence=SimpleNamespace(verifies=lambda cell: True), expectations=lambda cell: Expectations(()),
        verified=lambda cell, claimed: Missing(Verdict.ERROR, "re-executes nothing"), sequences=lambda model, claimed: None,
    )  # fmt: skip


def test_weights_of_another_hash_are_not_re_executed() -> None:
    """The same name is no evidence that it is the same checkpoint."""
    found = reexecution.judge(CLAIM, session(observation("awq", checkpoint_sha256="a" * 64)))

    assert isinstance(found, Judgement)
    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert "the claim's sha256 is aaaaaaaaaaaaaaaa, here it is 1111111111111111" in found.message


def test_a_claim_with_logits_that_are_no_numbers_is_invalid() -> None:
    """Also where every logprob that it reports is finite."""
    bad = NonFinite(prompt="p1", phase="decode", repeat=0, position=2)

    found = reexecution.judge(CLAIM, session(observation("awq", nonfinite=(bad,))))

    assert isinstance(found, Judgement)
    assert (Verdict.INVALID, False) == (found.verdict, found.expected)
    assert "non-finite logits, first prompt p1 decode 2" in found.message


def test_a_claim_in_a_dtype_that_nothing_computes_here_is_unavailable() -> None:
    """Other numbers in another dtype would be nearer to it than its own."""
    recorded = observation("awq", dtype="float16")

    assert reexecution.gate(CLAIM, session(recorded)) is None
    need = "reexecution: needs a format with weights int4-asym in float16 on cpu-here, have bfloat16"
    assert need == reexecution.gate(CLAIM, session(recorded, dtype="bfloat16"))


def test_the_folders_numbers_are_not_those_of_what_the_engine_makes_of_it() -> None:
    """A format that is quantized while loading and cannot run here: the plain one beside it does not answer for it."""
    recorded, plain = observation("awq"), observation("bf16", numbers=f"decoded:{'5' * 64}")
    found = session(recorded)
    formats = {
        name: SimpleNamespace(weights="bf16", activations="none", engine="vllm", layout="plain") for name in ("awq", "bf16")
    }
    found.measuring = SimpleNamespace(
        weights=lambda model, name: SimpleNamespace(sha256="1" * 64, numbers=plain.header.numbers)
    )
    found.matrix.formats, found.matrix.engine = formats, SimpleNamespace(args={})
    found.verified = lambda cell, claimed: (
        Measured((plain,)) if cell.format_id == "bf16" else Missing(Verdict.UNAVAILABLE, "needs a GPU")
    )
    found.evidence = SimpleNamespace(verifies=lambda cell: cell.format_id == "bf16")

    for args, words in (({"quantization": "fp8"}, "have bf16 with others"), ({}, "a format with other numbers than awq")):
        found.matrix.settings = lambda cell, args=args: [SimpleNamespace(args=args)]
        assert words in str(reexecution.judge(CLAIM, found))
    found.matrix.formats["awq"].layout = "torchao"
    assert "have bf16 with others" in str(reexecution.judge(CLAIM, found))


def test_a_missing_reference_folder_is_a_usage_error(suite: Suite) -> None:
    """Exit code 4, naming the option."""
    run = suite("--reference=/no/such/folder")

    assert 4 == run.code
    assert "--reference: no such folder" in run.output


def test_labels_are_the_numbers_and_not_the_words() -> None:
    """The same word for other numbers is told apart, other words for the same numbers are one, unknown is nobody else's."""
    held = {"a": "decoded:11112222x", "b": "decoded:33334444x", "c": "decoded:11112222x", "d": "", "e": ""}
    words = {"a": "int4-sym", "b": "int4-sym", "c": "int4", "d": "int4-sym", "e": "int4-sym"}

    found = reexecution.labelled(held, words, "a")

    assert ("int4-sym", "int4-sym (33334444)", "int4-sym") == (found["a"], found["b"], found["c"])
    assert 4 == len(set(found.values()))
    alike = {"a": "decoded:11112222x", "b": "decoded:33334444x", "c": "decoded:33334444y"}  # not in the part that is shown
    assert 3 == len(set(reexecution.labelled(alike, dict.fromkeys(alike, "int4-sym"), "a").values()))
