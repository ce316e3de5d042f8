"""Whole runs with --model, the fake engine in vLLM's place: what is judged, what is told once, what fails."""

import json
import shutil
from pathlib import Path

import pytest

from quantdet import checkpoints
from quantdet.checkpoints.tensors import load, save
from selftest.fakes.checkpoints import BF16, make_format, make_model
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import MATRIX

pytest_plugins = ["pytester"]
CELL = "mine/gptq-int4-g128/cpu-here"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `mine`, GPTQ, and `plain`."""
    root = tmp_path_factory.mktemp("own")
    for name, format_ in ("mine", make_format("gptq", "int4-sym")), ("plain", BF16):
        shutil.copytree(checkpoints.resolve("m", make_model(), format_, cache=root / "cache").path, root / name)
    return root


def argument(**args: str) -> list[str]:
    return [f"--engine-arg={name}={value}" for name, value in args.items()]


def test_one_command_judges_a_checkpoint(suite: Suite, made: Path) -> None:
    """vLLM's choice, the kernel that can be pinned, and the twin; nothing of the matrix's own models."""
    run = suite(f"--model={made / 'mine'}", f"--base={made / 'plain'}")

    assert {"mine"} == {case.properties["case.model"] for case in run.cases.values()}
    formats = {case.properties["case.format"] for case in run.ran().values()}
    assert {"gptq-int4-g128", "gptq-int4-g128-fake4", "bf16"} == formats
    assert "BIT_EXACT" == run.cases[f"test_repeat[{CELL}-decode]"].verdict
    assert "DISTINCT" == run.cases[f"test_distinct[{CELL}]"].verdict


def test_relative_to_where_pytest_was_started(suite: Suite, made: Path, pytester: pytest.Pytester) -> None:
    shutil.copytree(made / "mine", pytester.path / "mine")

    assert CELL in str(suite("--model=mine").cases)


def test_a_refusal_is_told_by_one_case_of_the_cell(suite: Suite, made: Path) -> None:
    """Of vLLM's choice; a kernel that the suite tried is skipped with the engine's words. Nothing was measured: exit 1."""
    run = suite(f"--model={made / 'mine'}", *argument(behaviour="refuse"))

    assert 1 == run.code
    assert ["UNSUPPORTED"] == list(run.failures().values())
    skipped = [case.message for name, case in run.cases.items() if case.outcome == "skipped" and f"[{CELL}" in name]
    assert skipped and all("told by test_repeat" in message for message in skipped)
    tried = [case for name, case in run.cases.items() if "fake4/" in name]
    assert tried and all(case.outcome == "skipped" and "the fake does not take this format" in case.message for case in tried)
    assert "nothing was measured" in run.words


def test_a_twin_does_not_count_for_its_checkpoint(suite: Suite, made: Path) -> None:
    """It was measured, and nothing of what was asked for could be; who chooses other cases did not ask for it."""
    plugin = '\n[engine.plugins]\ngptq = { "" = "no-such-package" }\n'
    run = suite(f"--model={made / 'mine'}", f"--base={made / 'plain'}", matrix=MATRIX + plugin)
    assert {} == run.failures()
    assert (1, True) == (run.code, f"--model {made / 'mine'}: nothing was measured" in run.words)
    assert "needs no-such-package (pip install no-such-package), have none" in run.words

    chosen = suite(f"--model={made / 'mine'}", f"--base={made / 'plain'}", "-k", "bf16")
    assert (0, False) == (chosen.code, "nothing was measured" in chosen.words)
    alone = suite(f"--model={made / 'mine'}", f"--base={made / 'plain'}", "-k", f"{CELL} and test_repeat")
    assert (0, False) == (alone.code, "nothing was measured" in alone.words)


def test_expectations_may_speak_of_made_formats(suite: Suite, made: Path, tmp_path: Path) -> None:
    """A file with a row about a cell of --model; a row about none is a mistake as in any run."""
    row = '[[expect]]\nwhen = {{ format = "{}" }}\noutcome = "unsupported"\nmatch = "the fake"\nreason = "r"\nsource = "s"\n'
    for name, format_id in ("right", "gptq-int4-g128"), ("wrong", "gptq-int8"):
        (tmp_path / f"{name}.toml").write_text(row.format(format_id))
    right, wrong = (
        suite(f"--model={made / 'mine'}", f"--expect={tmp_path / name}.toml", *argument(behaviour="refuse"))
        for name in ("right", "wrong")
    )

    assert "passed" == right.cases[f"test_refusal[{CELL}]"].outcome
    assert (4, True) == (wrong.code, "'gptq-int8' matches no format" in wrong.words)


def test_a_run_that_measured_nothing_fails_though_every_case_is_skipped(suite: Suite, made: Path) -> None:
    run = suite(f"--model={made / 'mine'}", "-k", "fake4", *argument(behaviour="refuse"))

    assert {} == run.failures()
    assert 1 == run.code
    assert f"--model {made / 'mine'}: nothing was measured" in run.words


def test_each_model_counts(suite: Suite, made: Path, tmp_path: Path) -> None:
    """One of two that could not be measured is not hidden by the other."""
    shutil.copytree(made / "mine", tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    tensors = dict(load(path))
    name = next(name for name in tensors if name.endswith(".scales"))
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[0] = float("nan")
    save(tensors, tmp_path / "new")  # the old file is mapped
    (tmp_path / "new").replace(path)

    run = suite(
        f"--model={made / 'mine'}", f"--model={tmp_path / 'broken'}", *argument(executes="Fake4Kernel", numerics="int4-sym")
    )

    assert 1 == run.code
    assert {"INVALID"} == set(run.failures().values())
    told = [case.message for label, case in run.cases.items() if label in run.failures()]
    assert told and all(f"{name}: NaN or infinity" in message for message in told)
    assert "BIT_EXACT" == run.cases[f"test_repeat[{CELL}-decode]"].verdict


def test_mistakes_come_at_once_before_anything_starts(suite: Suite, made: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"ids": [1, 2, 3, 4, 5_000]}) + "\n")
    run = suite(
        f"--model={made / 'mine'}", f"--prompts={prompts}", "--engine-arg=trust_remote_code=true", "--engine-arg=nonsense"
    )

    assert 4 == run.code
    assert {} == run.cases
    for part in "nothing runs the code of a checkpoint", "needs NAME=VALUE", "5000":
        assert part in run.words


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--base=x"], "--base is about the checkpoints of --model"),
        (["--prompts=x"], "--prompts is about"),
        (["--engine-arg=a=1"], "--engine-arg is about"),
        (["--same-base", "--model=mine"], "needs --model twice"),
        (["--model=/no/such/folder"], "/no/such/folder: need a folder"),
        (["--model="], "need an existing folder"),
    ],
)
def test_options_that_make_no_sense(suite: Suite, args: list[str], words: str) -> None:
    run = suite(*args)

    assert 4 == run.code
    assert words in run.words


def test_arguments_are_part_of_what_an_observation_is_known_by(suite: Suite, made: Path) -> None:
    """Another argument is measured anew; the same one is taken from the store."""
    first = suite(f"--model={made / 'mine'}", "-k", "test_kernel", *argument(numerics="1"))
    again = suite(f"--model={made / 'mine'}", "-k", "test_kernel", *argument(numerics="1"))
    other = suite(f"--model={made / 'mine'}", "-k", "test_kernel", *argument(numerics="2"))

    assert ["0 started" in run.words for run in (first, again, other)] == [False, True, False]


def test_two_makers_of_one_base(suite: Suite, made: Path, tmp_path: Path) -> None:
    """Compared on the same tokens, and the message says what of the numbers differs."""
    spec = make_model().synthetic
    assert spec is not None
    other = make_model(synthetic={**spec.model_dump(), "seed": 1})
    second = checkpoints.resolve("m", other, make_format("gptq", "int4-sym"), cache=tmp_path / "cache").path
    shutil.copytree(second, tmp_path / "second")
    run = suite(f"--model={made / 'mine'}", f"--model={tmp_path / 'second'}", "--same-base", "-k", "not fake4")

    case = run.cases["test_distinct[mine-vs-second/mine/cpu-here]"]
    assert ("passed", "DISTINCT") == (case.outcome, case.verdict)
    told = case.properties["apart.second"]
    assert "integers" in told and "the same kernels" in told
    assert "mine | second:" in run.words


def test_a_row_of_the_matrix_does_the_same(suite: Suite, made: Path) -> None:
    row = f'\n[models.mine]\ntitle = "mine"\ncheckpoint = "{made / "mine"}"\nhidden_states = true\n'
    run = suite("-k", "mine", matrix=MATRIX + row)

    assert "BIT_EXACT" == run.cases[f"test_repeat[{CELL}-decode]"].verdict


def test_false_green_a_repository_of_another_layout_under_a_row(suite: Suite, made: Path) -> None:
    """The row's word is no evidence: INVALID before an engine starts, and a folder may stand where a repository does."""
    hub = ", ".join(f'{layout} = "{made / "mine"}"' for layout in ("gptq", "awq"))
    row = f'\n[models.mine]\ntitle = "mine"\nworkload = "synthetic-v1"\nformats = ["gptq", "awq"]\nhub = {{ {hub} }}\n'
    run = suite("-k", "mine and test_kernel", "--store=s", matrix=MATRIX + row)

    wrong, right = (run.cases[f"test_kernel[mine/{name}/cpu-here]"] for name in ("awq", "gptq"))
    assert ("failure", "INVALID") == (wrong.outcome, wrong.verdict)
    assert "the row needs layout awq, the checkpoint has gptq" in wrong.message
    assert "passed" == right.outcome


def test_a_rerun_of_one_case_passes_though_other_models_are_named(suite: Suite, made: Path, tmp_path: Path) -> None:
    """The command that an entry prints has every --model of its run."""
    shutil.copytree(made / "mine", tmp_path / "other")
    run = suite(f"--model={made / 'mine'}", f"--model={tmp_path / 'other'}", "-k", f"{CELL} and decode and test_repeat")

    assert (0, 1) == (run.code, len(run.cases))


def test_what_is_measured_is_told_at_the_head(suite: Suite, made: Path) -> None:
    """Source, scheme, prompts and arguments; and in every case's properties."""
    run = suite(f"--model={made / 'mine'}", *argument(numerics="7"), "-k", CELL)

    assert "mine: folder mine (gptq-int4-g128); formats gptq-int4-g128, gptq-int4-g128-fake4;" in run.words
    assert "prompts synthetic-v1-mod128; engine arguments numerics=7" in run.words
    case = run.cases[f"test_repeat[{CELL}-decode]"]
    assert ("folder mine", "synthetic-v1-mod128") == (case.properties["checkpoint.source"], case.properties["workload"])


def test_rows_about_a_model_whose_formats_are_made(suite: Suite, made: Path) -> None:
    """A setting and an expectation of the matrix may name it, and a format that it will have."""
    rows = f'''
[models.mine]
title = "mine"
checkpoint = "{made / "mine"}"
[[setting]]
when = {{ model = "mine" }}
args = {{ behaviour = "refuse" }}
reason = "r"
[[expect]]
when = {{ model = "mine", format = "gptq-int4-g128" }}
outcome = "unsupported"
match = "the fake does not take"
reason = "r"
source = "s"
'''
    run = suite("-k", f"mine and {CELL}", matrix=MATRIX + rows)

    assert "passed" == run.cases[f"test_refusal[{CELL}]"].outcome


def same_base(suite: Suite, made: Path, other: Path, **args: str) -> tuple[str, str, str]:
    """Outcome, verdict and what is said of `mine` against another checkpoint of its base."""
    run = suite(f"--model={made / 'mine'}", f"--model={other}", "--same-base", "-k", "not fake4", *argument(**args))
    case = run.cases["test_distinct[mine-vs-other/mine/cpu-here]"]
    return case.outcome, case.verdict, case.properties["apart.other"]


def test_false_red_other_numbers_that_are_the_same_bits(suite: Suite, made: Path, tmp_path: Path) -> None:
    """Scales may round to the same in the model's dtype. Whether two checkpoints differ was asked: either passes."""
    other = tmp_path / "other"
    shutil.copytree(made / "mine", other)
    tensors = dict(load(other / "model.safetensors"))
    name = next(name for name in tensors if name.endswith(".scales"))
    tensors[name] = tensors[name] * 2
    save(tensors, tmp_path / "new")
    (tmp_path / "new").replace(other / "model.safetensors")

    outcome, verdict, told = same_base(suite, made, other, numerics="one")

    assert ("passed", "IDENTICAL") == (outcome, verdict)
    assert told.startswith("scales differ in 1 of 14")


def test_the_same_numbers_have_to_be_identical(suite: Suite, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "mine", tmp_path / "other")

    outcome, verdict, told = same_base(suite, made, tmp_path / "other")

    assert ("failure", "DISTINCT") == (outcome, verdict)  # the fake's logits follow a format's name
    assert told.startswith("the same numbers in 14 quantized modules")


def test_false_red_one_set_of_tensors_in_two_models(suite: Suite, made: Path, tmp_path: Path) -> None:
    """Another configuration is another model, which the numbers do not tell."""
    other = tmp_path / "other"
    shutil.copytree(made / "mine", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))

    outcome, verdict, told = same_base(suite, made, other)

    assert ("passed", "DISTINCT") == (outcome, verdict)
    assert "other configurations (rope_theta)" in told


def test_a_recording_keeps_claims_of_an_own_checkpoint(suite: Suite, made: Path, tmp_path: Path) -> None:
    """Its prompts are measured and claimed; each has a name of its own."""
    run = suite(f"--model={made / 'mine'}", f"--record={tmp_path / 'r'}", "-k", f"{CELL} and test_repeat")
    again = suite(f"--model={made / 'mine'}", f"--replay={tmp_path / 'r'}", "-k", f"{CELL} and test_repeat")

    assert (0, 0) == (run.code, again.code)
    assert {"passed"} == {case.outcome for case in again.ran().values()}
    claimed = suite(f"--model={made / 'mine'}", f"--reference={tmp_path / 'r'}", "-k", "reexecution", "--collect-only")
    assert "test_reexecution[mine/gptq-int4-g128/" in claimed.output
