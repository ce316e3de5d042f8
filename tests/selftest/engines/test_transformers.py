"""Formats of a second engine: what they need, are given, and what vouches for them; what vLLM's rows leave unsaid of them.

No engine is started but the fake; the engine itself is run by `pytest -k tf_`.
"""

import multiprocessing.forkserver
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantdet.engines.child import lifetime
from quantdet.engines.plan import Plan
from quantdet.engines.process import outcome, process
from quantdet.matrix.cell import Cell
from quantdet.matrix.load import MatrixError, load
from quantdet.observations.observation import write
from quantdet.session import plans, reexecution
from quantdet.session.machine.gate import gate
from quantdet.session.machine.gpus import Gpu
from quantdet.session.machine.machine import Machine, Software
from quantdet.session.replay import Replay
from quantdet.session.session import Session
from selftest.engines.test_process import plan
from selftest.fakes.engine import FAKE
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import MATRIX, expect, setting
from selftest.fakes.observation import observation
from selftest.session.test_plans import given, matrix

pytest_plugins = ["pytester"]

TF = """
[transformers]
args = { executes = "TfLinear", attention = "sdpa" }
env = { QUANTDET_TF = "1" }

[kernels.tf_linear]
hardware = ["cpu-*", "sm90"]
classes = ["TfLinear"]

[formats.tf_bf16]
title = "the second engine"
engine = "transformers"
layout = "plain"
weights = "bf16"
kernel = "tf_linear"
dtype = "bfloat16"

[formats.tf_int4]
title = "the second engine, integers"
engine = "transformers"
layout = "ct"
weights = "int4-sym"
kernel = "tf_linear"
dtype = "bfloat16"
"""
BOTH = MATRIX + TF
BF16, TF_BF16, TF_INT4 = (Cell("alpha", name, "cpu-here") for name in ("bf16", "tf_bf16", "tf_int4"))
GPU_CELL = Cell("alpha", "tf_bf16", "sm90")
H100 = Gpu("H100", "GPU-h", "9.0", 80.0)
INSTALLED = Software("0.32.0", "cpu", "2.0", "5.17", "0.17", "cpu")


def machine(*gpus: Gpu) -> Machine:
    return Machine("fake cpu", frozenset({"avx2"}), 64.0, gpus)


def hook(software: str) -> str:
    """Code of a conftest for a machine with this software."""
    return f"\n\ndef pytest_quantdet_machine(config):\n    return Machine('fake', frozenset({{'avx2'}}), 64.0), {software}\n"


BESIDE = hook("Software('0.32.0', 'cpu', '2.0', '5.17', '0.17', 'cpu')")


# ------------------------------------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize(
    ("place", "gpus", "software", "reason"),
    [
        (TF_BF16, (), INSTALLED, None),
        (TF_BF16, (), replace(INSTALLED, vllm=None, flavour=None), None),  # vLLM is not asked for
        (TF_BF16, (), replace(INSTALLED, torch_flavour="cuda"), None),  # nor is a CPU build, where there is no GPU
        (GPU_CELL, (H100,), replace(INSTALLED, torch_flavour="cuda"), None),
        (
            TF_BF16, (H100,), replace(INSTALLED, torch_flavour="cuda"),
            "torch: needs a CPU build of torch, have 2.0 for CUDA",
        ),
        (GPU_CELL, (H100,), INSTALLED, "torch: needs a CUDA build of torch, have 2.0 for CPU"),
        (
            TF_BF16, (), replace(INSTALLED, transformers=None),
            "transformers: needs transformers and torch (pip install -e '.[transformers]'), have none",
        ),
        (
            TF_BF16, (), replace(INSTALLED, torch=None),
            "transformers: needs transformers and torch (pip install -e '.[transformers]'), have none",
        ),
        (GPU_CELL, (), INSTALLED, "hardware: needs sm90 (a GPU that is not here), have cpu-here"),
    ],
)  # fmt: skip
def test_what_the_engine_needs(
    tmp_path: Path, place: Cell, gpus: tuple[Gpu, ...], software: Software, reason: str | None
) -> None:
    """transformers and a torch that computes on the row's hardware; whether vLLM is there says nothing."""
    assert reason == gate(matrix(tmp_path, BOTH), place, machine(*gpus), software)


def test_a_package_that_is_missing_is_told(tmp_path: Path) -> None:
    """Need and have."""
    table = matrix(tmp_path, BOTH.replace('title = "the second engine"\n', 'title = "x"\npackages = ["no-such-package"]\n'))

    assert "package: needs no-such-package (pip install no-such-package), have none" == gate(
        table, TF_BF16, machine(), INSTALLED
    )


def test_transformers_divides_nothing(tmp_path: Path) -> None:
    """A model for two GPUs has no cell there, and a format cannot ask for it."""
    two = matrix(tmp_path, BOTH.replace("[models.alpha]\n", "[models.alpha]\ntensor_parallel_size = 2\n"))

    assert "tensor parallelism: needs size 2, have size 1 in transformers" == gate(two, TF_BF16, machine(), INSTALLED)
    assert gate(two, BF16, machine(), INSTALLED) is None
    with pytest.raises(MatrixError, match="'tensor_parallel_size' is for engine = 'vllm' only"):
        matrix(tmp_path, BOTH.replace("[formats.tf_bf16]\n", "[formats.tf_bf16]\ntensor_parallel_size = 2\n"))


# ------------------------------------------------------------------------------------------------------------- the plan


def made(tmp_path: Path, cell: Cell, text: str = BOTH, **changes: Any) -> Plan:
    found = plans.plan_for(**{**given(tmp_path), "matrix": matrix(tmp_path, text), "cell": cell, **changes})
    assert isinstance(found, Plan)
    return found


def test_the_plan_has_nothing_of_vllm(tmp_path: Path) -> None:
    """Its own arguments and environment, no pin and no argument of vLLM's, in any version of vLLM or none."""
    for version in ("0.20.2", "0"):
        found = made(tmp_path, TF_INT4, vllm_version=version, engine="transformers")

        assert {"executes": "TfLinear", "attention": "sdpa"} == found.args
        assert ({"QUANTDET_TF": "1"}, "cpu") == (found.env, found.device)
        assert "transformers" == found.identity["engine"]
    assert "QUANTDET_TF" not in made(tmp_path, BF16).env
    assert made(tmp_path, BF16).device is None


def test_settings_are_an_engines(tmp_path: Path) -> None:
    """A setting reaches the cells of the engine that it names; the model's group size stands in its texts."""
    row = '\n[[setting]]\nwhen = {{ engine = "{}" }}\nargs = {{ config = "g$group_size" }}\nreason = "x"\n'

    for engine, cell, other in ("transformers", TF_INT4, BF16), ("vllm", BF16, TF_INT4):
        text = BOTH + row.format(engine)

        assert "g32" == made(tmp_path, cell, text).args["config"]
        assert "config" not in made(tmp_path, other, text).args


def test_packages_that_compute_are_in_the_key(tmp_path: Path) -> None:
    """Another version of what computes is another measurement; of a vLLM cell nothing changes."""
    text = BOTH.replace('title = "the second engine"\n', 'title = "x"\npackages = ["numpy"]\n')
    with_it, without = (made(tmp_path, TF_BF16, matrix_text) for matrix_text in (text, BOTH))

    assert "numpy" in with_it.identity["environment"]["engine_packages"]
    assert "numpy" not in without.identity["environment"]["engine_packages"]
    assert plans.key_of(with_it, 0) != plans.key_of(without, 0)
    assert "engine_packages" not in made(tmp_path, BF16).identity["environment"]


# --------------------------------------------------------------------------------------------------------- expectations


def test_rows_of_vllm_versions_say_nothing_of_another_engine(tmp_path: Path) -> None:
    """And a row for an engine is for that one; a row that could only be about the other matches no cell."""
    row = '\n[[expect]]\nwhen = {{ {}hardware = "cpu-here" }}\noutcome = "may_be_noisy"\nreason = "r"\nsource = "s"\n{}'
    cases = [
        (row.format("", 'vllm = ">=0.1"\n'), True, False),
        (row.format('engine = "transformers", ', ""), False, True),
        (row.format('engine = "vllm", ', ""), True, False),
        (row.format("", ""), True, True),
    ]
    for text, vllm, other in cases:
        known = matrix(tmp_path, BOTH + text).expectations("0.32.0")
        assert (vllm, other) == tuple(known.noise(cell, "decode") is not None for cell in (BF16, TF_BF16)), text

    for text in (
        expect("tf_bf16", "noisy") + 'vllm = ">=0.1"\n',
        row.format('engine = "transformers", format = "bf16", ', ""),
    ):
        (tmp_path / "m.toml").write_text(BOTH + text)
        with pytest.raises(MatrixError, match=r"expect\.1: matches no cell"):
            load(tmp_path / "m.toml")


def test_an_engine_that_nobody_knows_is_a_mistake(tmp_path: Path) -> None:
    """In a format and in a selector; and no choice of vLLM's is the other's."""
    for text, word in (
        (BOTH.replace('engine = "transformers"', 'engine = "trt"', 1), "formats.tf_bf16.engine"),
        (BOTH + '\n[[setting]]\nwhen = { engine = "trt" }\nreason = "x"\n', "setting.1.when.engine"),
        (BOTH.replace('kernel = "tf_linear"', 'kernel = "auto"', 1), "runs eager, with a kernel that the row names"),
    ):
        (tmp_path / "m.toml").write_text(text)
        with pytest.raises(MatrixError, match=word):
            load(tmp_path / "m.toml")


# ------------------------------------------------------------------------------------------------------------ whole runs


def test_a_run_without_vllm(suite: Suite) -> None:
    """Cells of the other engine are measured, vLLM's say what they need."""
    software = hook("Software(None, None, '2.0', '5.17', '0.17', 'cpu')")

    run = suite("-k", "alpha and cpu-here and (test_kernel or test_repeat)", matrix=BOTH, machine=software, controls=True)

    ran = run.ran()
    assert 0 == run.code, run.output
    assert {"tf_bf16", "tf_int4"} == {case.properties["case.format"] for case in ran.values()}
    assert {"BIT_EXACT", "CONFIRMED"} == {case.verdict for case in ran.values()}
    assert {"transformers"} == {case.properties["case.engine"] for case in ran.values()}
    assert "bit flip caught in alpha/tf_bf16" in run.suite["controls.cpu-here transformers"]
    skipped = run.cases["test_kernel[alpha/bf16/cpu-here]"]
    assert "vllm: needs vLLM" in skipped.message


def test_formats_of_two_engines_are_compared(suite: Suite) -> None:
    """Every pair of the model on the hardware, whichever engine; numbers that are the same have to be declared."""
    same = setting("tf_int4", "honest", numerics="int4-sym")

    run = suite("-k", "alpha and cpu-here", matrix=BOTH + same, machine=BESIDE)

    found = run.cases["test_distinct[alpha/tf_bf16/cpu-here]"].properties["compared_with"]
    assert {"bf16", "gptq", "ct", "awq", "int8", "tf_int4"} == set(found.split(","))
    assert "IDENTICAL" == run.failures()["test_distinct[alpha/tf_int4/cpu-here]"]


def test_an_engine_in_which_no_flip_is_seen_has_no_bit_exact(suite: Suite) -> None:
    """What was caught in vLLM does not vouch for it, and what was missed in it takes nothing from vLLM."""
    blind = setting("tf_bf16", "blind")

    run = suite("-k", "alpha and cpu-here and test_repeat", matrix=BOTH + blind, machine=BESIDE, controls=True)

    verdicts = {name: case.verdict for name, case in run.ran().items()}
    assert {"INVALID"} == {verdict for name, verdict in verdicts.items() if "/tf_" in name}
    assert {"BIT_EXACT"} == {verdict for name, verdict in verdicts.items() if "/tf_" not in name}
    assert "10 of 10 BIT_EXACT count" in run.suite["controls.cpu-here"]


def test_what_only_the_engine_finds_missing_is_unavailable(suite: Suite) -> None:
    """A package or a kernel that it looks for when it loads: a skip with its words, unless the hardware is required."""
    lacking = BOTH + setting("tf_int4", "lacking")
    chosen = ("-k", "tf_int4 and cpu-here and test_repeat")

    run = suite(*chosen, matrix=lacking, machine=BESIDE)
    required = suite(*chosen, "--require-hardware=cpu-here", matrix=lacking, machine=BESIDE)

    name = f"test_repeat[{TF_INT4.id}-decode]"
    assert ("skipped", "UNAVAILABLE engine: no-such-kernel") == (run.cases[name].outcome, run.cases[name].message)
    assert "UNAVAILABLE" == required.failures()[name]


def test_each_engine_has_controls_of_its_own(suite: Suite) -> None:
    """One case of each control for each engine, in the first format of the engine that will do."""
    run = suite("-k", "test_controls or test_bit_flip", matrix=BOTH, machine=BESIDE, controls=True)

    names = {name for name in run.ran() if name.startswith(("test_bit", "test_same", "test_one"))}
    assert names == {
        *(f"{test}[{cell.id}]" for test in ("test_bit_flip", "test_same_weights") for cell in (BF16, TF_BF16)),
        "test_one_integer[alpha/gptq/cpu-here]",
        f"test_one_integer[{TF_INT4.id}]",
    }
    assert 0 == run.code, run.output


def test_a_seeded_flip_fails_its_case_alone(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """In decode of the format that it was seeded in."""
    monkeypatch.setenv("QUANTDET_INJECT", "bitflip:tf_bf16")

    run = suite("-k", "alpha and cpu-here and (test_repeat or test_kernel)", matrix=BOTH, machine=BESIDE)

    assert {f"test_repeat[{TF_BF16.id}-decode]": "NOISY"} == run.failures()


# --------------------------------------------------------------------------------------------------------------- replays


def recorded(folder: Path, version: str, format_id: str, engine: str, number: int) -> None:
    environment = {"vllm": version, "torch_package": "2.11.0"}
    whole = observation(
        format_id, kernels=("TfLinear" if engine == "transformers" else "UnquantizedLinearMethod",), engine=engine,
        environment=environment, created=f"2026-01-0{number}T00:00:00+00:00",
    )  # fmt: skip
    place = folder / "cpu-here" / f"vllm-{version or 'none'}" / "alpha" / format_id / str(number)
    place.mkdir(parents=True)
    write(place, whole.header, whole.prompts)


@pytest.mark.parametrize("version", ["0.26.0", ""])
def test_recordings_stand_beside_a_vllm_version(suite: Suite, tmp_path: Path, version: str) -> None:
    """That of their environment, or the newest; they make no version of their own and are in no comparison of versions."""
    for number, one in enumerate(("0.20.2", "0.26.0"), 1):
        recorded(tmp_path / "kept", one, "bf16", "vllm", number)
    recorded(tmp_path / "kept", version, "tf_bf16", "transformers", 3)

    run = suite(f"--replay={tmp_path}/kept", matrix=BOTH)

    ran = run.ran()
    assert 0 == run.code, run.output
    assert ["0.20.2", "0.26.0"] == Replay(tmp_path / "kept").versions("cpu-here")
    assert "test_repeat[alpha/tf_bf16/cpu-here@0.26.0-decode]" in ran
    assert "bf16" == ran["test_distinct[alpha/tf_bf16/cpu-here@0.26.0]"].properties["compared_with"]
    assert ["test_versions[alpha/bf16/cpu-here]"] == [name for name in run.cases if "test_versions" in name and "alpha" in name
                                                      and run.cases[name].outcome != "skipped"]  # fmt: skip
    assert not [name for name in run.cases if name.startswith("test_versions[alpha/tf_")]


def test_recordings_of_it_alone_have_plain_ids(suite: Suite, tmp_path: Path) -> None:
    """Where no vLLM was."""
    recorded(tmp_path / "kept", "", "tf_bf16", "transformers", 1)

    run = suite(f"--replay={tmp_path}/kept", matrix=BOTH)

    assert 0 == run.code, run.output
    assert f"test_repeat[{TF_BF16.id}-decode]" in run.ran()


# ------------------------------------------------------------------------------------------------------------- processes


def test_the_engine_forks_from_a_server_of_its_own(tmp_path: Path) -> None:
    """Its processes hold nothing of another engine's server; multiprocessing's own server stays what it was."""
    before = multiprocessing.forkserver.connect_to_new_process
    apart = replace(FAKE, apart=True)
    servers = []
    for name, spec in ("a", FAKE), ("b", apart), ("c", apart):
        (tmp_path / name).mkdir()
        pids = tmp_path / f"{name}.pids"
        asked = replace(plan(), args={"behaviour": "parent", "pids": str(pids)})
        assert isinstance(process.run(spec, asked, tmp_path / name, tmp_path / "log", 60), outcome.Completed)
        servers.append(pids.read_text().split()[1])

    assert servers[0] != servers[1] == servers[2]
    assert str(os.getpid()) not in servers
    assert before == multiprocessing.forkserver.connect_to_new_process


def test_claims_are_verified_by_the_engine_that_made_them(tmp_path: Path) -> None:
    """The formats of another engine have the same numbers, and are left out."""
    replayed = SimpleNamespace(verifies=lambda cell: True)
    session: Any = SimpleNamespace(matrix=matrix(tmp_path, BOTH), evidence=replayed)
    claim: Any = SimpleNamespace(model_id="alpha", hardware_id="cpu-here")

    assert ["bf16", "gptq", "ct", "awq", "int8"] == [cell.format_id for cell in reexecution.verifiers(claim, session)]


def test_which_engine_a_cell_has(tmp_path: Path) -> None:
    """vLLM's formats and the other's, on the real engines; something that stands in for vLLM stands in for both."""
    session: Any = SimpleNamespace(matrix=matrix(tmp_path, BOTH), engine=process.VLLM)
    specs = [Session.engine_for(session, cell) for cell in (BF16, TF_BF16)]
    names = [Session.engine_name(session, cell) for cell in (BF16, TF_BF16)]
    session.engine = FAKE

    assert ([process.VLLM, process.TRANSFORMERS], ["vllm", "transformers"]) == (specs, names)
    assert [FAKE, FAKE] == [Session.engine_for(session, cell) for cell in (BF16, TF_BF16)]
    assert [FAKE.target, "transformers"] == [Session.engine_name(session, cell) for cell in (BF16, TF_BF16)]


@pytest.mark.parametrize(("where", "named"), [("cpu", False), ("cuda", True)])
def test_a_cpu_cell_beside_a_gpu_names_no_device(where: str, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed on the CPU of a GPU box is not told as the GPU's: its threads matter."""
    properties = SimpleNamespace(name="GPU", uuid="u", major=9, minor=0)
    fake: Any = SimpleNamespace(
        __version__="2", version=SimpleNamespace(cuda="13"), get_num_threads=lambda: 2, cpu=SimpleNamespace(),
        backends=SimpleNamespace(cpu=SimpleNamespace(get_cpu_capability=lambda: "AVX2")),
        cuda=SimpleNamespace(is_available=lambda: True, get_device_properties=lambda _: properties),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", fake)

    facts = lifetime.environment(replace(plan(), device=where))

    assert named == ("device_uuid" in facts) == ("compute_capability" in facts)
