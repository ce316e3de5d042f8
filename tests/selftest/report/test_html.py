"""The HTML report: what it says, that nothing in it is obeyed, that the same cases give the same bytes."""

import json
import math
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import Cell
from quantdet.observations.observation import write
from quantdet.report import evidence
from quantdet.report.html import data, gather, svg
from quantdet.report.html import page as html_page
from quantdet.report.html.__main__ import main
from quantdet.report.record import Records
from selftest.fakes.cases import a_pair, case
from selftest.fakes.inner import Run, Suite
from selftest.fakes.matrix import MATRIX, QUESTIONS, make_suite, setting
from selftest.fakes.observation import changed_output, last_repeat, observation
from selftest.whole.test_hidden_states import ASKED

pytest_plugins = ["pytester"]

FEW = "alpha and cpu-here and (bf16 or gptq or /ct/)"
NOISY = MATRIX + setting("ct", "flip_decode")
VOID = {"meta", "link", "br", "wbr"}


class Page(HTMLParser):
    """Elements with their attributes, text by section, and whether all that was opened is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.sections: dict[str, str] = {}
        self.section = ""
        self.feed(self.source)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "section":
            self.section = dict(attrs).get("aria-labelledby") or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.open.pop(), f"</{tag}> closes something else"
        if tag == "section":
            self.section = ""

    def handle_data(self, text: str) -> None:
        self.sections[self.section] = self.sections.get(self.section, "") + text

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page(folder: str = "r") -> Page:
    return Page(Path(folder, "report.html"))


def lines(folder: str = "r") -> Iterator[dict[str, Any]]:
    for line in Path(folder, "cases.jsonl").read_text().splitlines():
        yield json.loads(line)


def test_the_page_says_what_was_found(suite: Suite) -> None:
    """Unexpected verdicts with message and command first; verdicts, classes, kernels, noise, links that lead somewhere."""
    run: Run = suite("-k", FEW, "--store", "s", "--report", "r", matrix=NOISY)

    found = page()
    message = "NOISY alpha/ct/cpu-here decode: 1 of 3 repeats differ"
    assert f"report: {Path('r').resolve()}/report.html" in run.output
    assert message in found.sections["unexpected"]
    assert "pytest 'test_repeat.py::test_repeat[alpha/ct/cpu-here-decode]' --store=s" in found.sections["unexpected"]
    assert found.source.index(message) < found.source.index('id="matrix"')
    assert run.suite["summary"] in found.sections["unexpected"]
    assert "gptq" in found.sections["matrix"]
    assert "0.632 per call, at 95 %" in found.sections["matrix"]
    assert "Fake4Kernel x4" in found.sections["matrix"]
    assert "QKVParallelLinear \N{MULTIPLICATION SIGN}4" in found.sections["kernels"]
    assert "1 of 3 runs differ, first at position 2 of 4" in found.sections["noise"]
    assert "hardware: needs sm90 (a GPU that is not here), have cpu-here" in found.sections["coverage"]
    assert "x86" not in found.sections["environment"]
    links = [a["href"] for a in found.all("a") if not a["href"].startswith("#")]
    assert {"cases.jsonl", "../report.xml", "bundles/alpha.ct.cpu-here/README.md"} <= set(links)
    assert [] == [link for link in links if not Path("r", link).exists()]


def test_links_lead_to_folders_of_any_name(suite: Suite) -> None:
    """A browser takes what follows a `#` as a fragment, and `%41` as an A."""
    given = ("--store", "s ü#%41&x", "--junitxml", "j ü#%41&x/re port#1.xml")
    suite("-k", "alpha/bf16/cpu-here", "--report", "r é%42", *given)

    links = [a["href"] for a in page("r é%42").all("a") if not a["href"].startswith("#")]
    assert "../j%20%C3%BC%23%2541%26x/re%20port%231.xml" in links
    assert any(link.startswith("../s%20%C3%BC%23%2541%26x/") for link in links)
    assert [] == [link for link in links if "#" in link or not Path("r é%42", unquote(link)).exists()]


def test_questions_have_their_answers(suite: Suite) -> None:
    """Expected or not: what was asked, where, the verdict with its symbol, the answer; and nothing of it is markup."""
    run = suite("-k", "test_question and cpu-here", "--report", "r", matrix=NOISY + QUESTIONS)

    found = page()
    said = " ".join(found.sections["questions"].split())
    outcomes = {name: (case.outcome, case.verdict) for name, case in run.ran().items() if "[alpha/" in name}
    assert {
        "test_question[alpha/three/cpu-here]": ("failure", "DISTINCT"),
        "test_question[alpha/which/cpu-here]": ("passed", "BIT_EXACT"),
    } == outcomes
    assert "Are <b>three</b> formats | apart? three" in said
    assert "alpha on cpu-here \N{NOT EQUAL TO} DISTINCT ! unexpected ct NOISY in decode, awq BIT_EXACT (n = 3), int8" in said
    assert "alpha on cpu-here = BIT_EXACT BIT_EXACT: bf16 (UnquantizedLinearMethod), awq (Fake4Kernel)" in said
    assert "beta on cpu-here" in said
    assert {"href": "#questions"} in found.all("a")
    assert "Nothing was measured" not in found.sections["unexpected"]


def test_hidden_states_stand_in_the_matrix(suite: Suite) -> None:
    """A column for both phases, the message of each with the figures; not among the control cases."""
    suite("-k", "cpu-here and (bf16 or beta)", "--report", "r", matrix=ASKED + setting("bf16", "hidden_noise"))

    found = page()
    matrix = " ".join(found.sections["matrix"].split())
    assert 1 == found.source.count('<th scope="col">hidden states</th>')
    assert 2 == matrix.count("hidden states, decode") == matrix.count("hidden states, prefill")
    assert "hidden states, decodeNOISY beta/bf16/cpu-here decode hidden states: 1 of 3 repeats differ" in matrix
    row = matrix.partition("Verdicts of beta")[2].partition("bf16")[2]
    assert "~ NOISY ! unexpected" in row.partition(" ct = BIT_EXACT")[0]
    assert "control cases" not in matrix


def test_hidden_states_alone_lend_no_figure_to_the_logits(suite: Suite) -> None:
    """Their n and bound are of other requests."""
    suite("-k", "beta and test_hidden_states", "--report", "r", matrix=ASKED)

    matrix = page().sections["matrix"]
    assert "= BIT_EXACT" in " ".join(matrix.partition("Verdicts of beta")[2].split())
    assert "repeats n" not in matrix and "flip rate below" not in matrix


def test_paths_begin_at_the_root_folder(suite: Suite, pytester: pytest.Pytester) -> None:
    """A page that is uploaded does not say where the machine keeps its files."""
    suite("-k", "alpha/bf16/cpu-here", "--record", "kept/here")
    for required in ((), ("--require-hardware=cpu-here",)):
        suite("--replay=kept/here", "--report", f"r{len(required)}", "-k", "cpu-here", *required)

    skipped, broken = page("r0"), page("r1")
    assert "replay of kept/here" in skipped.sections[""]
    assert "replay: needs a recording, have none in kept/here" in skipped.sections["coverage"]
    assert "replay: needs a recording, have none in kept/here" in broken.sections["unexpected"]
    for folder in ("r0", "r1"):
        assert str(pytester.path) not in page(folder).source
        assert str(pytester.path) not in Path(folder, "cases.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("none in /a/b/c, /a/b/d/e", "none in c, d/e"), ("none in /a/b", "none in ."), ("'/a/b'", "'.'"), ("/a/b/", "/a/b/"),
        ("/a/bc/d", "/a/bc/d"), ("/x/a/b/c", "/x/a/b/c"), ("--store=/a/b/s", "--store=s"), ("/else/where", "/else/where"),
    ],
)  # fmt: skip
def test_only_paths_below_the_root_are_shortened(text: str, shown: str) -> None:
    assert shown == gather._inside(text, Path("/a/b"))
    assert text == gather._inside(text, Path("/"))


def test_devices_of_all_machines() -> None:
    """A CPU and a GPU on one page: both are named, and not the CPU of the GPU's host."""
    places = [
        {"hardware": "cpu-here", "vllm": "1", "facts": {"cpu": ["Xeon"], "gpu": [""]}},
        {"hardware": "sm90", "vllm": "1", "facts": {"cpu": ["EPYC"], "gpu": ["H200"]}},
        {"hardware": "sm90", "vllm": "2", "facts": {"cpu": ["EPYC"], "gpu": ["H200"]}},
    ]
    machine = {"hardware": "", "cpu": "here", "gpu": "", "vllm": "", "torch": ""}
    run = {
        "environments": places, "machine": machine, "titles": {"hardware": {}}, "mode": "replay", "replay": ["a"],
        "suite": {}, "date": "",
    }  # fmt: skip

    assert dict(html_page.facts(data.Data(run)))["Device"] == "Xeon, H200"
    assert dict(html_page.facts(data.Data({**run, "environments": [], "mode": "live"})))["Device"] == "here"


@pytest.mark.parametrize("asked", ["", "sm90"])
def test_a_replay_without_observations_names_no_device(suite: Suite, tmp_path: Path, asked: str) -> None:
    """The machine that judges is not what was asked about; also where all that was selected is skipped."""
    whole = observation("bf16", hardware="sm90", environment={"vllm": "0.32.0"})
    place = tmp_path / "kept" / "sm90" / "environment" / "alpha" / "bf16" / "one"
    place.mkdir(parents=True)
    write(place, whole.header, whole.prompts)
    hardware = [f"--hardware={asked}"] if asked else []
    for number, names in enumerate(("nosuch", "ct")):
        suite(f"--replay={tmp_path}/kept", *hardware, "-k", names, "--report", f"r{number}")

        header = page(f"r{number}").sections[""].split("\n")
        assert "Hardwareno observation" + (f"; asked for {asked}" if asked else "") in header
        assert [] == [line for line in header if line.startswith(("Device", "vLLM", "torch"))]


def test_the_page_is_for_everybody(suite: Suite) -> None:
    """Headers have their scope, tables a caption, pictures a title, regions that scroll the keyboard; words beside symbols."""
    suite("-k", FEW, "--store", "s", "--report", "r", matrix=NOISY)

    found = page()
    assert all(th.get("scope") in ("row", "col", "colgroup") for th in found.all("th"))
    assert len(found.all("table")) == len(found.all("caption"))
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = [one for one in found.all("svg") if "aria-hidden" not in one]
    assert pictures
    assert all(one["role"] == "img" and set(one["aria-labelledby"].split()) <= set(ids) for one in pictures)
    assert all(one["tabindex"] == "0" and one["aria-label"] for one in found.all("div") if one.get("role") == "region")
    assert {a["href"][1:] for a in found.all("a") if a["href"].startswith("#")} <= set(ids)
    assert [] == found.all("script")
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on") or name == "style"]
    policy = next(meta["content"] for meta in found.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")


def test_what_others_wrote_is_shown_and_not_obeyed(suite: Suite, tmp_path: Path) -> None:
    """A recording's kernel, environment and the matrix's titles hold markup: it is text, in HTML and in SVG."""
    hostile = "</title><script>alert(1)</script><img src=//x onerror=alert(2)>\"'"
    whole = observation("ct", model="beta", kernels=(hostile,), environment={"vllm": "0.32.0", hostile: hostile})
    changed = last_repeat(whole, 0, changed_output(whole.prompts[0].outputs[0], "decode", digests=lambda d: d.__ixor__(1)))
    place = tmp_path / "kept" / "cpu-here" / "environment" / "beta" / "ct" / "one"
    place.mkdir(parents=True)
    write(place, changed.header, changed.prompts)
    matrix = MATRIX.replace('title = "two formats, one hardware"', f"title = '''{hostile[:-1]}'''")

    suite(f"--replay={tmp_path}/kept", "--report", "r", "-k", "beta and not versions", matrix=matrix)

    found = page()
    assert not found.all("script") and not found.all("img")
    assert hostile in found.sections["kernels"]
    assert hostile in found.sections["environment"]
    assert hostile[:-1] in found.sections["matrix"]
    assert hostile in found.sections["unexpected"]


def test_the_same_cases_give_the_same_bytes(suite: Suite) -> None:
    """Rendered again, on one process or on workers: the same page but for its date."""
    pages = []
    for number, extra in enumerate(((), (), ("-n", "2"))):
        suite("-k", FEW, "--store", "s", "--report", f"r{number}", *extra, matrix=NOISY, apart=bool(extra))
        run, *cases = lines(f"r{number}")
        pages.append([{**run, "date": ""}, *cases])
        before = page(f"r{number}").source
        assert 0 == main([f"r{number}"])
        assert before == page(f"r{number}").source
    measured, stored, workers = (json.dumps(one).replace(f"r{number}", "r") for number, one in enumerate(pages))

    assert measured == stored == workers


def test_a_crashed_worker_is_in_the_report(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The crash stands there as a case without a verdict; the other cases have theirs."""
    crash = """
import os
from pathlib import Path

def pytest_runtest_call(item):
    if item.name == "test_kernel[beta/ct/cpu-here]" and not Path("crashed").exists():
        Path("crashed").touch()
        os._exit(1)
"""
    make_suite(pytester.path, machine=crash)
    for name in ("CI", "PYTEST_ADDOPTS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD"):
        monkeypatch.delenv(name, raising=False)

    pytester.runpytest_subprocess("-k", "beta", "-n", "2", "--report", "r", "--no-controls")

    found = page()
    assert "No verdict: test_kernel.py::test_kernel[beta/ct/cpu-here]" in found.sections["unexpected"]
    assert "crashed while running" in found.sections["unexpected"]
    assert "BIT_EXACT" in found.sections["matrix"]


def test_a_failure_without_a_verdict_is_kept() -> None:
    """What pytest-xdist reports of a crashed worker: a failure that no judgement came with."""
    records = Records()
    where = ("test_kernel.py", 1, "test_kernel")
    records.pytest_runtest_logreport(pytest.TestReport("test_kernel.py::x", where, {}, "failed", "worker crashed", "???"))

    assert [("test_kernel.py::x", "worker crashed")] == records.broken


def test_a_run_without_cases_has_a_page(suite: Suite) -> None:
    """Nothing was selected: the page says so, and what the machine is."""
    suite("-k", "nosuch", "--report", "r")

    found = page()
    assert "Nothing was measured" in found.sections["unexpected"]
    assert "fake cpu" in found.sections["environment"]
    assert "not selected in this run" in found.sections["coverage"]
    assert "matrix" not in found.sections


def test_folders_are_judged_together(suite: Suite, tmp_path: Path) -> None:
    """Two machines' recordings side by side: equal logits across them, an observation in both folders once."""
    for hardware, numerics in (("cpu-here", "same"), ("cpu-elsewhere", "same"), ("sm90", "other")):
        whole = observation("bf16", numerics=numerics, hardware=hardware, environment={"vllm": "0.32.0"})
        place = tmp_path / hardware / hardware / "environment" / "alpha" / "bf16" / "one"
        place.mkdir(parents=True)
        write(place, whole.header, whole.prompts)
    shutil.copytree(tmp_path / "cpu-here" / "cpu-here", tmp_path / "sm90" / "cpu-here")
    folders = [f"--replay={tmp_path}/{name}" for name in ("cpu-here", "cpu-elsewhere", "sm90")]

    run: Run = suite(*folders, "--report", "r", "-k", "test_repeat or test_kernel")

    assert 0 == run.code, run.output
    assert {"cpu-here", "cpu-elsewhere", "sm90"} == {case.properties["case.hardware"] for case in run.ran().values()}
    assert {"3"} == {case.properties["runs"] for case in run.ran().values()}
    assert ",".join(folder.removeprefix("--replay=") for folder in folders) == run.suite["replay"]
    found = page()
    assert "0 of 1 formats that were measured at several places" in found.sections["machines"]
    assert "1bf16bf16\N{EN DASH}" in found.sections["machines"].split("\n")
    assert all(f"{tmp_path}/{name}" in found.sections[""] for name in ("cpu-here", "cpu-elsewhere", "sm90"))


def test_a_missing_folder_among_several_ends_the_run(suite: Suite, tmp_path: Path) -> None:
    """Each folder has to be there and to hold something."""
    (tmp_path / "empty").mkdir()
    assert "--replay: no such folder" in suite(f"--replay={tmp_path}/empty", "--replay=nosuch").output
    assert "empty: no observation in this folder" in suite(f"--replay={tmp_path}/empty", f"--replay={tmp_path}/empty").output


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json\n",
        '{"kind": "run", "schema": 99}\n',
        '{"kind": "case"}\n',
        '{"kind": "x"}\n',
        "[]\n",
        '{"kind": "run", "schema": 2}\n{"kind": "case", "nodeid": 5}\n',
    ],
)
def test_what_is_no_data_file_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Rendering again names the file."""
    (tmp_path / "cases.jsonl").write_text(text)

    assert 1 == main([str(tmp_path)])
    assert "cases.jsonl" in capsys.readouterr().err


def test_numbers_that_json_does_not_have_come_back(tmp_path: Path) -> None:
    """An infinite distance stays one."""
    inf, nan = float("inf"), float("nan")
    given = case(why="\x1b[1mx\ny", pairs=(a_pair("a", "b", l2=inf),), figures={"l2": inf, "max_abs_diff": nan, "runs": 5})

    data.write(data.Data({"schema": data.SCHEMA}, [given]), tmp_path)

    (found,) = data.read(tmp_path / "cases.jsonl").cases
    assert ("x\ny", (a_pair("a", "b", l2=inf),), inf, 5) == (found.why, found.pairs, found.number("l2"), found.runs)
    assert math.isnan(found.figures["max_abs_diff"])
    assert isinstance(found.runs, int)


def test_scale_has_a_class_for_every_value() -> None:
    """Logarithmic from the smallest to the largest; 0, inf and nothing are classes of their own."""
    scale = svg.Scale.of([1e-4, 1.0, 0.0, float("inf"), None])

    words = [scale.word(value) for value in (1e-4, 1e-2, 1.0, 0.0, float("inf"), None, float("nan"))]
    assert ["c1", "c5", "c8", "zero", "inf", "no", "no"] == words
    assert "zero" == svg.Scale.of([]).word(0.0)


def test_heat_map_outlines_classes() -> None:
    """One outline around each class of several formats, at the place of its rows."""
    picture = svg.heat_map("m", "title", ["a", "b", "c"], lambda a, b: 0.0, svg.Scale(-4, 0), [("a", "b"), ("c",)])

    assert 1 == picture.count('class="outline"')
    assert "<title>same logits: a = b</title>" in picture


def test_forest_has_zero_where_an_interval_reaches_it() -> None:
    """Above 0 the axis is logarithmic; an interval that reaches 0 needs a linear one with the line of no difference."""
    above = svg.forest("f", "title", [svg.Estimate("a", 0.02, 0.01, 0.03)], "nats")
    across = svg.forest("f", "title", [svg.Estimate("a", 0.02, -0.01, 0.03)], "nats")

    assert ("logarithmic" in above, "zero-line" in above) == (True, False)
    assert ("linear" in across, "zero-line" in across) == (True, True)
    assert "interval -0.01 to 0.03" in across


def test_noise_is_a_row_per_run_that_differs() -> None:
    """Positions of the other logits, and of the other token."""
    whole = observation()
    first = whole.prompts[0].outputs[0]

    def turn(digests: Any) -> None:
        digests[2] ^= 1

    def other(ids: Any) -> None:
        ids[3] += 1

    seen = last_repeat(whole, 0, changed_output(first, "decode", digests=turn, output_ids=other))
    (found,) = evidence.noise([seen], restarts=False)

    assert ("decode", 2, 4, 1) == (found["phase"], found["first"], found["positions"], found["differing"])
    assert [["repeat 2", "..x#"]] == found["rows"]
    assert [["lifetime 1", "..x#"]] == evidence.noise(
        [whole, observation_of(seen)], restarts=True, phase="decode"
    )[0]["rows"]  # fmt: skip


def observation_of(seen: Any) -> Any:
    """A second lifetime whose only run is the last one of `seen`."""
    prompts = tuple(
        type(one)(one.header.model_copy(update={"runs": (0,) * len(one.header.runs)}), one.prompt_ids, (one.outputs[-1],))
        for one in seen.prompts
    )
    header = seen.header.model_copy(update={"lifetime": 1})
    return type(seen)(header, prompts)


def test_evidence_is_of_what_was_judged() -> None:
    """No observation, nothing; layers for the kernel's case only."""
    judgement = Judgement(Verdict.CONFIRMED, Cell("alpha", "awq", "cpu-here"), "kernel", "x", True)

    assert evidence.of(judgement, (), "test_kernel") is None
    found = evidence.of(judgement, (observation(),), "test_kernel")
    assert found is not None
    assert [["linear", "QKVParallelLinear", "UnquantizedLinearMethod", 4]] == found["layers"]
    assert "layers" not in (evidence.of(judgement, (observation(),), "test_repeat") or {})
