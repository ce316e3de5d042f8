"""The JUnit file in readers that are not ours: junitparser and junit2html, from one process and from xdist workers.

No XSD: the one in circulation, junit-10.xsd of Jenkins' xUnit plugin, is of pytest's other family (xunit2).
"""

import html
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from junit2htmlreport.parser import Junit
from junitparser import JUnitXml, Properties, Property, TestCase, TestSuite

from quantdet.judging.verdicts import Verdict
from selftest.fakes.matrix import MATRIX, expect, make_suite, setting

# What a reason may hold: markup, quotes, the end of a CDATA section, other scripts.
WORDS = """<b>bold</b> & "quoted" 'single' ]]> Grüße 中文 😀"""
_LEGAL = re.compile("[\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]*")  # XML 1.0, production 2 (Char)
# One outcome of each kind: expected noise (xfail), another kernel and a refusal that nobody declared (failures), an engine
# that dies with bytes in its log that are no text, a terminal's escapes and characters that XML 1.0 has no way to write.
MATRIX_HERE = (
    MATRIX
    + setting("ct", "flip_decode")
    + expect("ct", "noisy", "decode").replace("for the test", WORDS.replace('"', '\\"'))
    + setting("int8", "wrong_kernel")
    + setting("gptq", "refuse")
    + setting("awq", "garbage")
)


@pytest.fixture(scope="module", params=["one process", "xdist"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JUnit file of a whole run with the fake engine."""
    folder = tmp_path_factory.mktemp("run")
    make_suite(folder, MATRIX_HERE)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "QUANTDET_", "CI"))}
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml=report.xml", "-k", "alpha"]
    workers = ["-n", "2"] if request.param == "xdist" else []
    run = subprocess.run([*command, *workers], cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stdout + run.stderr
    return folder / "report.xml"


@pytest.fixture
def suite(written: Path) -> TestSuite:
    """Its one suite."""
    suites = list(JUnitXml.fromfile(str(written)))
    assert len(suites) == 1
    return suites[0]


def properties(case: TestCase) -> dict[str, str]:
    """A case's properties; each name once."""
    found = [(str(one.name), str(one.value)) for group in case.iterchildren(Properties) for one in group.iterchildren(Property)]
    assert len(found) == len(dict(found)), case.name
    return dict(found)


def cells(suite: TestSuite) -> Iterator[TestCase]:
    """Cases of cells; `test_refusal` and others without a cell have names without slashes."""
    return (case for case in suite if "/" in case.name)


def test_counts(suite: TestSuite) -> None:
    """What the suite says of itself is what is in it: Jenkins and GitLab show either."""
    cases = list(suite)

    assert suite.tests == len(cases) == len({(case.classname, case.name) for case in cases})
    assert suite.failures == sum(case.is_failure for case in cases) > 0
    assert suite.skipped == sum(case.is_skipped for case in cases) > 0
    assert suite.errors == sum(case.is_error for case in cases) == 0


def test_the_verdict_is_the_first_line(suite: TestSuite) -> None:
    """Of every message, and of every failure's text: most readers show one of the two, and only its start."""
    verdicts = set()
    for case in cells(suite):
        assert len(case.result) <= 1
        for result in case.result:
            first = result.message.splitlines()[0]
            assert first.split()[0] in set(Verdict), (case.name, first)
            verdicts.add((type(result).__name__, result.type, first.split()[0]))
            if case.is_failure:
                assert result.text.splitlines()[0] == first
                assert first.split()[1].startswith(properties(case)["case.model"] + "/")

    assert {
        ("Failure", None, "INVALID"), ("Failure", None, "UNSUPPORTED"), ("Failure", None, "ERROR"),
        ("Skipped", "pytest.xfail", "NOISY"), ("Skipped", "pytest.skip", "UNAVAILABLE"),
    } <= verdicts  # fmt: skip


def test_properties(suite: TestSuite) -> None:
    """Of the suite: the summary first, then versions. Of a case: its cell, and the verdict that its message starts with."""
    of_suite = {one.name: one.value for one in suite.properties()}
    assert next(iter(of_suite)) == "summary"
    assert {"unexpected", "suite.version", "controls.cpu-here"} <= of_suite.keys()
    assert any(name.startswith("env.") for name in of_suite)
    for case in cells(suite):
        found = properties(case)
        assert found["verdict"] in set(Verdict), case.name
        assert "/".join(found[f"case.{name}"] for name in ("model", "format", "hardware")) in case.name
        for result in case.result:
            assert found["verdict"] == result.message.split()[0], case.name
        if not case.result:
            assert {"expectation", "runs", "kernel.requested", "kernel.executed"} <= found.keys(), case.name


def test_special_characters_survive(suite: TestSuite) -> None:
    """What XML can write is read back as it was; what it cannot is spelt out, and a terminal's colours are gone."""
    noisy = next(case for case in cells(suite) if case.name == "test_repeat[alpha/ct/cpu-here-decode]")
    assert WORDS in noisy.result[0].message
    dead = next(case for case in cells(suite) if case.name == "test_kernel[alpha/awq/cpu-here]")
    assert "\ufffd\ufffd not UTF-8 \\x00 red \\x07 \\ufffe" in dead.result[0].message


def test_no_character_that_xml_forbids(written: Path) -> None:
    """Strict readers refuse the whole file for one of them, while Python's lets U+FFFE pass."""
    text = written.read_text(encoding="utf-8")

    assert _LEGAL.fullmatch(text)
    assert not re.search(r"&#(x[0-9a-fA-F]+|\d+);", re.sub("&#(10|13|9);", "", text))


def test_junit2html(written: Path) -> None:
    """Its pages show every case, the first line of every message and the properties."""
    report = Junit(str(written))
    page = html.unescape(report.html())

    cases = [case for suite in report for testclass in suite.classes.values() for case in testclass.cases]
    assert len(cases) == len(list(next(iter(JUnitXml.fromfile(str(written))))))
    for case in cases:
        assert case.name in page
        for message in filter(None, (case.failure_msg, case.skipped_msg)):
            assert message.splitlines()[0] in page
    assert {"summary", "suite.version"} <= {one.name for suite in report for one in suite.properties}
    assert {"verdict", "kernel.executed"} <= {one.name for case in cases for one in case.properties}
    assert WORDS in page
