"""Bug bundles of whole runs with the fake engine: what is in them, when they are written, and that nothing old stays."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from quantdet.checkpoints import Checkpoint
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import Cell
from quantdet.matrix.models import Model
from quantdet.observations.observation import TENSORS_FILE, Observation, read
from quantdet.observations.pack import pack
from quantdet.report.bundle import differences, readme, repro, weights
from selftest.fakes.engine import executed
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import EXPERTS, MATRIX, expect, setting
from selftest.fakes.observation import changed_output, last_repeat, observation

AWQ_CELL = Cell("alpha", "awq", "cpu-here")

pytest_plugins = ["pytester"]

AWQ = "alpha/awq/cpu-here"
DECODE = f"test_repeat[{AWQ}-decode]"
ONE = "alpha and cpu-here and (awq or bf16) and not distinct"
FILES = {"README.md", "repro.py", "environment.json", "kernels.json", "divergence.json", "observations", "checkpoint"}


def bundles(report: Path = Path("r")) -> dict[str, Path]:
    return {path.name: path for path in sorted((report / "bundles").iterdir())}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def constants(script: Path) -> dict[str, Any]:
    """The literals that a script assigns at its top."""
    found = {}
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def observed(folder: Path) -> list[Observation]:
    return [read(path.parent) for path in sorted((folder / "observations").rglob("observation.json"))]


def test_a_noisy_cell_leaves_a_bundle(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder, for the cell that is noisy; its parts say the same as the case."""
    monkeypatch.setenv("QUANTDET_INJECT", "noise:awq")

    run = suite("-k", ONE, "--report", "r", "--store", "s")

    assert {DECODE: "NOISY"} == run.failures(), run.output
    (folder,) = bundles().values()
    assert "alpha.awq.cpu-here" == folder.name
    assert FILES | {"layers.json"} == names(folder)
    case = run.cases[DECODE]
    named = "layers.1.down (RowParallelLinear, Fake4Kernel) in decode step 1; 1 of 10 traced repeats differ"
    assert (named, "bundles/alpha.awq.cpu-here") == (case.properties["first_divergent_layer"], case.properties["bundle"])
    assert f"first divergent layer: {named}" in run.words
    layers = json.loads((folder / "layers.json").read_text())
    assert (named, "len20", 10) == (
        layers["first_divergent_layer"], layers["diagnosis"]["prompt"], len(layers["trace"]["repeats"])
    )  # fmt: skip
    kept = json.loads((folder / "divergence.json").read_text())
    message = case.message.splitlines()[0]
    assert ("NOISY", message) == tuple(kept["cases"][DECODE][key] for key in ("verdict", "message"))
    (row,) = kept["divergences"]
    at = {"prompt": "len20", "phase": "decode", "position": 1, "repeat": 2, "token": 0, "ulp": 1, "dtype": "float32"}
    assert at.items() <= row.items()
    text = (folder / "README.md").read_text()
    assert text.startswith(
        "# [Bug]: Fake4Kernel: the same request gives other logits when repeated (alpha/awq/cpu-here; fake cpu, vLLM"
    )
    for words in (
        message,
        f"## First divergent layer\n\n{named}",
        "This is no bug of the engine",
        "| len20 | decode | 1 | 2 |",
    ):
        assert words in text, words
    assert "Fake4Kernel x4" == json.loads((folder / "kernels.json").read_text())["summary"]
    environment = json.loads((folder / "environment.json").read_text())
    assert ("0.32.0", "fake cpu") == (environment["vllm"], environment["cpu"])
    assert {"config.json", "model.safetensors"} == names(folder / "checkpoint")


def test_the_script_has_the_request_of_the_first_noisy_prompt(suite: Suite) -> None:
    """Token ids, arguments, environment, and which digests were seen in which repeats."""
    suite("-k", ONE, "--report", "r", matrix=MATRIX + setting("awq", "flip_decode") + expect("awq", "noisy", "decode"))

    (folder,) = bundles().values()
    (whole,) = observed(folder)
    values = constants(folder / "repro.py")
    assert "len44" == whole.prompts[1].header.id  # the second prompt is the one with noise
    assert whole.prompts[1].prompt_ids.tolist() == values["IDS"]
    assert {**whole.header.engine_args} == values["ARGS"]
    assert (whole.header.dtype, whole.header.decode_tokens, 10, 1) == tuple(
        values[name] for name in ("DTYPE", "DECODE_TOKENS", "REPEATS", "LIFETIMES")
    )
    digests = [repro.digest(whole, 1, output, "decode") for output in (0, 1)]
    assert dict(zip(digests, ("0, 1", "2"), strict=True)) == values["SEEN"]["decode"]
    assert {repro.digest(whole, 1, 0, "prefill"): "0, 1, 2"} == values["SEEN"]["prefill"]
    assert "checkpoint" == values["MODEL"]
    compile((folder / "repro.py").read_text(), "repro.py", "exec")


def test_expected_noise_leaves_a_bundle_too(suite: Suite) -> None:
    """An xfail has its property and its folder, which says what the matrix says."""
    run = suite("-k", ONE, "--report", "r", matrix=MATRIX + setting("awq", "noise") + expect("awq", "noisy"))

    assert {} == run.failures()
    case = run.cases[DECODE]
    assert "xfail" == case.outcome
    assert case.properties["first_divergent_layer"].startswith(
        "layers.0.qkv (QKVParallelLinear, Fake4Kernel) in prefill; 9 of 10"
    )
    assert case.properties["first_divergent_layer"].endswith("others differ first in layers.1.down")
    (folder,) = bundles().values()
    assert "matrix says of this cell: noisy: for the test [the test]" in (folder / "README.md").read_text()
    kept = json.loads((folder / "divergence.json").read_text())
    assert {f"test_repeat[{AWQ}-{phase}]" for phase in ("decode", "prefill")} == set(kept["cases"])


def test_without_the_option_nothing_is_diagnosed(suite: Suite, tmp_path: Path) -> None:
    """No folder, no property, no engine beside those that measure; with it, one diagnosis a cell, kept in the store."""
    starts = tmp_path / "starts"
    matrix = MATRIX + setting("awq", "noise", starts=str(starts))
    counts = []
    for extra in ((), ("--report", "r"), ("--report", "r"), ("--report", "r", "--fresh")):
        run = suite("-k", f"{AWQ.replace('/', ' and ')} and repeat", "--store", "s", *extra, matrix=matrix)
        assert ("first_divergent_layer" in run.cases[DECODE].properties) is bool(extra)
        counts.append(len(starts.read_text().splitlines()))

    assert [1, 2, 2, 4] == counts


def test_noise_that_does_not_come_again_is_said(suite: Suite) -> None:
    """The diagnosis names no layer where no traced repeat differs."""
    run = suite("-k", ONE, "--report", "r", matrix=MATRIX + setting("awq", "flip_prefill"))

    words = "not reproduced in 10 repeats of prompt len96 with hooks on every layer"
    assert words == run.cases[f"test_repeat[{AWQ}-prefill]"].properties["first_divergent_layer"]
    assert f"## First divergent layer\n\n{words}." in (bundles()["alpha.awq.cpu-here"] / "README.md").read_text()


def test_compiled_cells_have_no_diagnosis(suite: Suite) -> None:
    """No hook is called in compiled code; the bundle says so and has everything else."""
    compiled = MATRIX.replace("[formats.awq]\n", '[formats.awq]\nmode = "compiled"\n')

    run = suite("-k", ONE, "--report", "r", matrix=compiled + setting("awq", "noise"))

    words = "not possible: the cell is compiled, and compiled code calls no hooks"
    assert words == run.cases[DECODE].properties["first_divergent_layer"]
    (folder,) = bundles().values()
    assert FILES | {"layers.json"} == names(folder)
    assert json.loads((folder / "layers.json").read_text())["trace"] is None


def test_an_engine_that_dies_while_it_is_traced_is_said(suite: Suite, tmp_path: Path) -> None:
    """The verdict stands; the diagnosis says why there is none."""
    poison = tmp_path / "poison"
    suite("-k", ONE, "--store", "s", matrix=MATRIX + setting("awq", "noise", only_not=str(poison)))

    poison.touch()
    run = suite("-k", ONE, "--store", "s", "--report", "r", matrix=MATRIX + setting("awq", "noise", only_not=str(poison)))

    assert "NOISY" == run.cases[DECODE].verdict
    said = run.cases[DECODE].properties["first_divergent_layer"]
    assert said.startswith("not possible: the engine failed: engine process ended with exit code 3"), said


@pytest.mark.parametrize(
    ("behaviour", "case", "words", "parts"),
    [
        ("nan", DECODE, "non-finite logits, first prompt len44 step 2", FILES),
        ("wrong_kernel", f"test_kernel[{AWQ}]", "executed OtherKernel x4", FILES),
        ("invalid", DECODE, "the fake's rows do not add up", FILES - {"observations"}),
    ],
)
def test_invalid_cells_leave_a_bundle(suite: Suite, behaviour: str, case: str, words: str, parts: set[str]) -> None:
    """Without divergence and without a diagnosis, but with the message and the request."""
    run = suite("-k", ONE, "--report", "r", matrix=MATRIX + setting("awq", behaviour))

    assert "INVALID" == run.cases[case].verdict
    assert "first_divergent_layer" not in run.cases[case].properties
    (folder,) = bundles().values()
    assert parts == names(folder)
    kept = json.loads((folder / "divergence.json").read_text())
    assert [] == kept["divergences"]
    assert words in kept["cases"][case]["message"]
    text = (folder / "README.md").read_text()
    assert words in text
    assert "other logits" not in text
    assert ("len44" if behaviour == "nan" else "len20") in (folder / "repro.py").read_text()
    assert 20 <= len(constants(folder / "repro.py")["IDS"])


def test_substituted_experts_leave_a_bundle(suite: Suite) -> None:
    """The kernels of experts are in it."""
    suite("-k", "mixture and moe", "--report", "r", matrix=MATRIX + EXPERTS + setting("moe", "wrong_experts"))

    (folder,) = bundles().values()
    assert "Fake4Kernel x4 + OtherExperts x2" == json.loads((folder / "kernels.json").read_text())["summary"]


def test_an_old_bundle_is_replaced_whole(suite: Suite) -> None:
    """Judged again, a cell's old folder goes: for a new one, or for none where nothing is wrong now. Others stay."""
    noisy = MATRIX + setting("awq", "noise") + setting("bf16", "noise")
    suite("-k", ONE, "--report", "r", matrix=noisy)
    assert {"alpha.awq.cpu-here", "alpha.bf16.cpu-here"} == set(bundles())
    for folder in bundles().values():
        (folder / "old").touch()

    suite("-k", "alpha/awq and repeat", "--report", "r", matrix=noisy)
    assert "old" not in names(bundles()["alpha.awq.cpu-here"])
    assert "old" in names(bundles()["alpha.bf16.cpu-here"])

    suite("-k", "alpha/awq and repeat", "--report", "r")
    assert {"alpha.bf16.cpu-here"} == set(bundles())


def test_noise_between_lifetimes(suite: Suite) -> None:
    """Both observations are there, the script compares processes, and the diagnosis traces two of them."""
    run = suite("-k", ONE, "--lifetimes", "3", "--report", "r", matrix=MATRIX + setting("awq", "restart_noise"))

    case = run.cases[f"test_restart[{AWQ}]"]
    named = "layers.0.attn (Attention, FAKE_ATTENTION) in prefill; 2 of 4 traced repeats differ"
    assert ("NOISY", named) == (case.verdict, case.properties["first_divergent_layer"])
    (folder,) = bundles().values()
    assert {0, 1} == {one.header.lifetime for one in observed(folder)}
    assert 2 == constants(folder / "repro.py")["LIFETIMES"]
    rows = json.loads((folder / "divergence.json").read_text())["divergences"]
    assert {("len20", "prefill", 0, 1)} == {(r["prompt"], r["phase"], r["position"], r["lifetime"]) for r in rows[:1]}
    assert "in another process" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("mode", "lifetimes", "words"), [
    ("compiled", 2, "another process of a compiled engine gives other logits for the same request (alpha/awq/cpu-here; "),
    ("compiled", 1, "Fake4Kernel: the same request gives other logits when repeated (alpha/awq/cpu-here; "),
    ("eager", 2, "Fake4Kernel: the same request gives other logits in another process (alpha/awq/cpu-here; "),
])  # fmt: skip
def test_the_title_blames_no_kernel_for_what_is_compiled(
    mode: Literal["eager", "compiled"], lifetimes: int, words: str
) -> None:
    """Processes of a compiled engine differ, whatever the kernel: each compiles for itself. Within a process it is named."""
    request = repro.Request({}, {}, {}, "float16", "len20", (1, 2), 3, 4, 4, lifetimes=lifetimes)
    about = readme.About(
        cell=AWQ_CELL, cases={"restart": Judgement(Verdict.NOISY, AWQ_CELL, "", "x", True)}, environment={},
        identity={}, inject="", executed=executed("Fake4Kernel").model_copy(update={"mode": mode}), requested="fake4",
        diagnosis=None, divergences=(), replayed=True, request=request,
    )  # fmt: skip

    assert about.title.startswith(words)


@pytest.mark.parametrize(
    ("engine", "words"), [("vllm", "vLLM 0.26.0)"), ("transformers", "transformers 5.17.0)"), ("a.stand:In", "vLLM 0.26.0)")]
)
def test_the_title_names_the_engine(engine: str, words: str) -> None:
    """The one whose maintainers read it."""
    about = readme.About(
        cell=AWQ_CELL, cases={"repeat": Judgement(Verdict.NOISY, AWQ_CELL, "", "x", True)},
        environment={"vllm": "0.26.0", "transformers": "5.17.0"}, identity={"engine": engine}, inject="",
        executed=executed("Fake4Kernel"), requested="fake4", diagnosis=None, divergences=(), replayed=True, request=None,
    )  # fmt: skip

    assert about.title.endswith(words)


def test_a_replay_writes_bundles_without_a_diagnosis(suite: Suite) -> None:
    """From the recording, with the weights where they are quickly made; what an engine would have to say is left out."""
    matrix = MATRIX + setting("awq", "noise")
    suite("-k", ONE, "--record", "recording", matrix=matrix)

    run = suite("-k", ONE, "--replay", "recording", "--report", "r", matrix=matrix)

    assert "not possible: a replay starts no engine" == run.cases[DECODE].properties["first_divergent_layer"]
    (folder,) = bundles().values()
    assert FILES | {"layers.json"} == names(folder)
    assert "Written from a recording, without an engine." in (folder / "README.md").read_text()
    again = suite("-k", ONE, "--replay", str(folder / "observations"), matrix=matrix)
    assert "NOISY" == again.cases[DECODE].verdict


def test_a_packed_recording_has_the_same_cases_and_bundles(suite: Suite) -> None:
    """Outcomes, messages, properties and the bundles' files; a bundle has plain arrays and is replayed by itself."""
    matrix = MATRIX + setting("awq", "noise")
    asked = ("-k", "alpha and cpu-here")
    suite(*asked, "--record", "recording", matrix=matrix)
    plain = suite(*asked, "--replay", "recording", "--report", "r", matrix=matrix)
    evidence = {path: path.read_bytes() for path in Path("r/bundles").rglob("observations/**/*") if path.is_file()}

    pack(Path("recording").resolve())
    packed = suite(*asked, "--replay", "recording", "--report", "r", matrix=matrix)

    assert [] == list(Path("recording").rglob(TENSORS_FILE))
    assert (plain.code, plain.cases) == (packed.code, packed.cases)
    assert "NOISY" == packed.cases[DECODE].verdict
    assert evidence == {path: path.read_bytes() for path in Path("r/bundles").rglob("observations/**/*") if path.is_file()}
    assert [TENSORS_FILE] == [path.name for path in evidence if path.name != "observation.json"]
    again = suite("-k", ONE, "--replay", "r/bundles/alpha.awq.cpu-here/observations", matrix=matrix)
    assert "NOISY" == again.cases[DECODE].verdict


def test_workers_write_their_own_cells(suite: Suite) -> None:
    """Under pytest-xdist every worker writes the bundles of its models."""
    matrix = MATRIX + setting("ct", "noise")

    run = suite("-k", "/ct/ and cpu-here and decode", "-n", "2", "--report", "r", matrix=matrix, apart=True)

    assert 2 == len(run.failures()), run.output
    assert {"alpha.ct.cpu-here", "beta.ct.cpu-here"} == set(bundles())


# ----------------------------------------------------------------------------------------------------- pure functions


def test_first_positions_by_prompt_and_phase() -> None:
    """The earliest position over all repeats, with the margin of the run that is compared with."""
    whole = observation(repeats=3)
    output = changed_output(whole.prompts[1].outputs[0], "prefill", digests=lambda d: d.__setitem__((5, 0), d[5, 0] ^ 1))
    noisy = last_repeat(whole, 1, output)

    assert ("p1", 1) == differences.where([noisy])
    assert (None, 1) == differences.where([whole])
    (row,) = differences.found([noisy], 1)
    assert ("p1", "prefill", 5, 2) == tuple(row[key] for key in ("prompt", "phase", "position", "repeat"))
    base = whole.prompts[1].outputs[0].prefill.topk_logprobs[5]
    assert float(base[0] - base[1]) == row["margin_nats"]
    assert (noisy,) == differences.involved([whole, noisy], 1)


def test_logprobs_alone_may_differ() -> None:
    """Equal logits with another reported logprob are a difference too, at its position."""
    whole = observation()
    output = changed_output(whole.prompts[0].outputs[0], "decode", chosen=lambda c: c.__setitem__(2, c[2] - 1))

    (row,) = differences.found([last_repeat(whole, 0, output)], 1)

    assert ("decode", 2) == (row["phase"], row["position"])


def test_variables_of_one_machine_are_not_in_the_script() -> None:
    """Devices by index or UUID mean nothing elsewhere; what chooses kernels does."""
    request = repro.Request(
        args={"a": 1, "trust_remote_code": True}, dtype="float16", prompt="p", ids=(1, 2),
        env={"CUDA_VISIBLE_DEVICES": "GPU-1", "VLLM_X": "1"}
        | dict.fromkeys(("PYTHONPATH", "VLLM_PLUGINS", "TRITON_PTXAS_PATH"), "x"),
        environment={"variables": {"OMP_NUM_THREADS": "2", "LD_PRELOAD": "x", "VLLM_X": "0"}, "masked": "torchaudio,torchao"},
        decode_tokens=4, top_k=2, repeats=59,
    )  # fmt: skip

    text = repro.script(request, title='t """ \\', note="n", model=None, hides=("amx_tile",), made=True, known={"a"})

    module = {node.targets[0].id: node for node in ast.parse(text).body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    values = {name: ast.literal_eval(module[name].value) for name in ("ENV", "ALSO_SET", "HIDDEN", "DENIED", "REPEATS", "ARGS")}
    assert {
        "ENV": {"VLLM_X": "1"}, "ALSO_SET": {"OMP_NUM_THREADS": "2"}, "HIDDEN": ["torchaudio"], "DENIED": ["amx_tile"],
        "REPEATS": 59, "ARGS": {"a": 1, "skip_tokenizer_init": True},
    } == values  # fmt: skip
    assert "@@" not in text
    assert (
        "Left out, since the suite's matrix has none such: PYTHONPATH, TRITON_PTXAS_PATH, VLLM_PLUGINS, trust_remote_code."
        in text
    )


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("checkpoint", {"model": "bundle/checkpoint"}),
        ("elsewhere@int4", {"model": "elsewhere@int4"}),
        ("o/x", {"model": "o/x", "revision": None}),
        ("o/x@v1", {"model": "o/x", "revision": "v1"}),
    ],
)
def test_the_script_loads_a_folder_or_a_revision_of_a_hub(
    model: str, told: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may have an `@` in its name."""
    (tmp_path / "bundle" / "checkpoint").mkdir(parents=True)
    (tmp_path / "elsewhere@int4").mkdir()
    monkeypatch.chdir(tmp_path)
    text = (Path(repro.__file__).parents[1] / "templates" / "repro.py.txt").read_text()
    (function,) = (node for node in ast.parse(text.replace("@@", "_")).body if getattr(node, "name", "") == "place")
    namespace: dict[str, Any] = {"HERE": Path("bundle"), "Path": Path}
    exec(compile(ast.Module([function], []), "repro.py", "exec"), namespace)

    assert told == namespace["place"](model)


def test_weights_of_a_hub_are_named_by_their_commit(tmp_path: Path) -> None:
    """They are not copied into a bundle."""
    source = f"o/x@{'a' * 40}"
    model = Model(title="t", workload="w", formats=("*",), hub={"plain": "o/x"})
    format_: Any = SimpleNamespace(layout="plain")
    found = weights.place(model, format_, Checkpoint(tmp_path, "b" * 64, f"hub {source}"), tmp_path / "bundle")

    assert source == found.model
    assert f"`{source}`, tensors' SHA-256 `{'b' * 64}`." == found.sentence


def test_what_a_recording_says_is_shown_and_not_obeyed() -> None:
    """In the README of a bundle, where a kernel may be called as it likes."""
    kernel = "Fake<script>x</script>|[a](javascript:b)![i](http://e.x/i.png)"
    layers = executed("Fake4Kernel").layers
    evil = executed("Fake4Kernel").model_copy(
        update={"layers": tuple(one.model_copy(update={"kernel": kernel}) for one in layers), "attention": ("<b>*a*</b>",)}
    )
    about = readme.About(
        cell=AWQ_CELL, cases={"c": Judgement(Verdict.INVALID, AWQ_CELL, "c", "x", False)},
        environment={"vllm": "1 <img src=x>", "torch": "|"}, identity={}, executed=evil, requested="fake4",
        inject="", diagnosis=None, divergences=(), replayed=True, request=None,
    )  # fmt: skip

    text = readme.text(about)

    shown = "Fake&lt;script&gt;x&lt;/script&gt;\\|\\[a\\](javascript:b)!\\[i\\](http://e.x/i.png)"
    assert f" {shown} |" in text
    assert text.startswith(f"# [Bug]: {shown}")
    assert "&lt;b&gt;\\*a\\*&lt;/b&gt;" in text
    assert "| torch | \\| |" in text
    assert not [word for word in ("<script", "<img", "<b>") if word in text]


def test_what_a_recording_says_stays_a_constant_of_the_script() -> None:
    """Placeholders among the values, quotes and code in names: every constant is a literal, and no statement is added."""
    evil = "'+__import__('os').system('true')+'\n@@ARGS@@ @@IDS@@ \"\"\""
    request = repro.Request(
        args={"a": "@@DEVICE@@ @@TITLE@@"}, env={"VLLM_X": evil}, dtype=evil, prompt=evil, ids=(1, 2), decode_tokens=4, top_k=2,
        environment={"device": evil, "vllm": evil, "torch": evil, "variables": {"OMP_X": evil}, "masked": evil}, repeats=59,
    )  # fmt: skip
    honest = repro.Request(
        args={}, env={}, dtype="float16", prompt="p", ids=(1, 2), decode_tokens=4, top_k=2, environment={}, repeats=59
    )

    hostile, plain = (
        ast.parse(repro.script(one, title=evil, note=evil, model=evil, hides=(evil,), made=False, known={"a"}))
        for one in (request, honest)
    )

    def constants(module: ast.Module) -> dict[str, Any]:
        found = [node for node in module.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
        named = {node.targets[0].id: node.value for node in found}  # type: ignore[attr-defined]
        return {name: ast.literal_eval(value) for name, value in named.items() if name not in ("HERE", "TORCH_DTYPES")}

    assert [type(node) for node in plain.body] == [type(node) for node in hostile.body]
    assert {"a": "@@DEVICE@@ @@TITLE@@"} == constants(hostile)["ARGS"]
    assert {"VLLM_X": evil} == constants(hostile)["ENV"]
