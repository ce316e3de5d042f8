"""Every Markdown page of the checkout: links and anchors lead somewhere, no page is an orphan, and commands parse."""

import importlib.util
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

from quantdet.judging.verdicts import Verdict
from quantdet.matrix import load
from quantdet.session import option_table, options
from quantdet.session.cases.judge import PROPERTIES
from selftest.fakes.matrix import ROOT, TESTS

# Folders with pages; reports and stores that people leave in the checkout have pages of their own, which are not the suite's.
FOLDERS = (".ci", ".github", "fixtures", "tests")
PAGES = [
    str(path.relative_to(ROOT))
    for path in sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
]
RECIPES = [
    ".ci/run", ".ci/run-gpu", ".ci/gitlab-ci.yml", ".ci/Jenkinsfile", ".ci/buildkite.yml", ".github/workflows/cpu.yml",
    ".github/workflows/gpu.yml",
]  # fmt: skip
PYTESTS_OWN = {"--junitxml"}
MUTATIONS = {"--part"}  # of tests/mutation
SHELLS = ("sh", "bash", "console", "shell")


def raw(place: str) -> str:
    return (ROOT / place).read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and contents of the fenced code blocks of a page."""
    for _, language, body in re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.M | re.S):
        yield language, body


def prose(place: str) -> str:
    """A page without its code, fenced or inline."""
    text = re.sub(r"^( *)```.*?^\1```$", "", raw(place), flags=re.M | re.S)
    return re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", text, flags=re.S)


def links(place: str) -> list[str]:
    """Targets of links and pictures, inline and by reference, and of HTML."""
    text = prose(place)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    found += re.findall(r"^ {0,3}\[[^\]^]+\]:\s+<?([^\s>]+)", text, re.M)
    return found + re.findall(r"\b(?:href|src)=\"([^\"]+)\"", text)


def anchors(place: str) -> set[str]:
    """Anchors as GitHub makes them of headings: lower case, no punctuation, dashes; a number where one comes again."""
    text = re.sub(r"^( *)```.*?^\1```$", "", raw(place), flags=re.M | re.S)
    found: dict[str, int] = {}
    made = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", text, re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        count = found.get(anchor, 0)
        found[anchor] = count + 1
        made.add(f"{anchor}-{count}" if count else anchor)
    return made


def resolved(place: str, target: str) -> tuple[Path, str]:
    """The file or folder that a relative link of a page leads to, and the anchor in it."""
    path, _, anchor = target.partition("#")
    return (ROOT / place if not path else (ROOT / place).parent / path).resolve(), anchor


def wrong_links(place: str) -> list[str]:
    wrong = []
    for target in links(place):
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue
        path, anchor = resolved(place, target)
        inside = path.is_relative_to(ROOT.resolve())
        if not inside or not path.exists():
            wrong.append(f"{target}: no such file in the checkout")
        elif anchor and (path.suffix != ".md" or anchor not in anchors(str(path.relative_to(ROOT.resolve())))):
            wrong.append(f"{target}: no such heading")
    return wrong


@pytest.mark.parametrize("place", PAGES)
def test_links_lead_somewhere(place: str) -> None:
    """Relative links and their anchors, to other pages, files, folders and pictures."""
    assert not wrong_links(place)


def test_no_page_is_an_orphan() -> None:
    """From README.md every page can be reached by links."""
    reached, todo = {"README.md"}, ["README.md"]
    while todo:
        place = todo.pop()
        for target in links(place):
            if "://" in target:
                continue
            path, _ = resolved(place, target)
            path = path / "README.md" if path.is_dir() else path
            name = str(path.relative_to(ROOT.resolve())) if path.is_relative_to(ROOT.resolve()) else ""
            if name in PAGES and name not in reached:
                reached.add(name)
                todo.append(name)

    assert reached == set(PAGES)


def test_all_pages_are_looked_at() -> None:
    """No page that git keeps lies where this module does not look."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:  # a copy without history
        assert {"README.md", "CONTRIBUTING.md", ".ci/README.md", "tests/determinism/README.md"} <= set(PAGES)
    else:
        assert {place for place in listed.stdout.splitlines() if (ROOT / place).exists()} <= set(PAGES)


def test_pictures_say_what_they_show() -> None:
    """Each has words for those who do not see it, and is small enough to load with the page."""
    found = [(place, *picture) for place in PAGES for picture in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", raw(place))]

    assert found
    for place, words, target in found:
        assert len(words) > 20, (place, target)
        assert resolved(place, target)[0].stat().st_size < 200_000, target


def test_the_first_page_is_short() -> None:
    """One screen or two: what else there is to say stands beside its subject."""
    assert len(raw("README.md").splitlines()) <= 90


def test_each_verdict_has_its_section() -> None:
    """Whoever meets a verdict finds what to do about it, and what it claims."""
    failed = anchors("tests/determinism/a-case-failed.md")
    told = raw("tests/determinism/README.md")

    assert {str(verdict).lower() for verdict in Verdict} <= failed
    assert not [verdict for verdict in Verdict if f"`{verdict}`" not in told]


def test_each_property_of_a_case_is_described() -> None:
    told = raw("tests/quantdet/report/README.md")

    assert not [name for name in PROPERTIES if f"`{name}`" not in told]


def test_the_modules_that_contributors_are_sent_to_exist() -> None:
    """CONTRIBUTING.md names files below tests/quantdet, and files and folders of the checkout."""
    named = re.findall(r"`([\w.-]+(?:/[\w.-]+)*(?:/|\.(?:py|toml|md|json)))`", raw("CONTRIBUTING.md"))
    absent = {"reports/", "model_executor/kernels/linear/__init__.py"}  # of a run, of vLLM

    assert len(named) > 50
    places = (ROOT, TESTS / "quantdet")
    assert not [name for name in named if name not in absent and not any((place / name).exists() for place in places)]


# ---------------------------------------------------------------------------------------------------- commands that people copy


def text(place: str) -> str:
    """A file, continued lines joined."""
    return raw(place).replace("\\\n", " ")


def commands(place: str) -> list[str]:
    """What follows `pytest` wherever it is called: in a shell's line, up to its end or a quote that closes it."""
    return re.findall(r"(?:^|[\s`'/\"&])pytest\"?((?: +(?:\"[^\"]*\"|'[^']*'|[^\s`';&|]+))+)", text(place), re.M)


class Parser:
    """Takes what `options.add` declares."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def getgroup(self, *_: str) -> "Parser":
        return self

    def addoption(self, name: str, **_: object) -> None:
        self.names.add(name)


def test_each_option_has_its_row() -> None:
    """The table of options has all that the suite declares."""
    parser = Parser()
    options.add(parser)  # type: ignore[arg-type]
    table = raw("tests/determinism/running.md").partition("## Options\n")[2].partition("\n## ")[0]
    told = {option for row in re.findall(r"^\|([^|]*)\|", table, re.M) for option in re.findall(r"`(--[a-z-]+)", row)}

    assert parser.names <= told
    assert option_table.markdown() in table


@pytest.mark.parametrize("place", [*PAGES, *RECIPES])
def test_options_exist(place: str) -> None:
    """Each `--option` of each call of pytest is the suite's, or one of the few of pytest that the texts use."""
    parser = Parser()
    options.add(parser)  # type: ignore[arg-type]
    given = {option for command in commands(place) for option in re.findall(r"(?<!\S)--[a-z][a-z-]+", command)}

    assert given <= parser.names | PYTESTS_OWN | MUTATIONS


@pytest.mark.parametrize("place", [*PAGES, *RECIPES])
def test_paths_and_hardware_exist(place: str) -> None:
    """What a call of pytest reads is in the repository; hardware is a row of the matrix; an expression selects."""
    table = load.load(ROOT / "quant_matrix.toml")
    for command in commands(place):
        for path in re.findall(r"(?<![\w./$])(?:tests|fixtures)/[\w./-]*\w", command):
            assert (ROOT / path).exists(), command
        for row in re.findall(r"--(?:require-)?hardware[ =]([a-z][\w-]*)", command):
            assert row in table.hardware, command
        for quoted in re.findall(r"(?:^| )-[km] (\"[^\"]*\"|'[^']*'|[^\s#]+)", command):
            if "$" not in quoted:  # a recipe's variable
                assert Expression.compile(quoted.strip("\"'")), command


@pytest.mark.parametrize("place", [*PAGES, *RECIPES])
def test_files_and_extras_exist(place: str) -> None:
    """Constraints, scripts and extras that an install command names."""
    extras = tomllib.loads(raw("pyproject.toml"))["project"]["optional-dependencies"]
    for group in re.findall(r"'\.\[([\w,]+)\]'", text(place)):
        assert set(group.split(",")) <= extras.keys()
    for path in re.findall(r"(?<![\w/])\.ci/[\w.-]*\w", text(place)):
        assert (ROOT / path).exists()


@pytest.mark.parametrize("place", PAGES)
def test_shells_and_toml_parse(place: str) -> None:
    """bash takes each block of shell commands, TOML each block of the matrix; each block says what it is."""
    for language, body in blocks(raw(place)):
        assert language, (place, body)
        if language in SHELLS:
            checked = subprocess.run(["bash", "-n"], input=body, capture_output=True, text=True, check=False)
            assert not checked.returncode, (place, body, checked.stderr)
            for module in re.findall(r"python3? -m ([\w.]+)", body):
                assert module == "venv" or importlib.util.find_spec(module) is not None, (place, module)
        if language == "toml":
            tomllib.loads(body)


def test_something_was_found() -> None:
    """These tests are about something: calls of pytest, shell blocks and links, and recipes call the two scripts."""
    assert {"README.md", "CONTRIBUTING.md", ".ci/README.md", ".ci/run", ".ci/run-gpu"} <= {
        place for place in [*PAGES, *RECIPES] if commands(place)
    }
    assert len([body for place in PAGES for language, body in blocks(raw(place)) if language in SHELLS]) > 10
    assert len([target for place in PAGES for target in links(place)]) > 50
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_what_is_wrong_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page with a link to nowhere, to no heading and out of the checkout, between such that are right."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A [page](page.md), `really`\n## Twice\n## Twice\n```sh\n# [no](link.md)\n```\n`[no](link.md)` [a](#a-page-really) "
        "[b](page.md#twice-1)\n[c](#nowhere) [d](gone.md) ![e](../out.png) [f](https://example.org/x) [g][g]\n\n[g]: away.md\n",
        encoding="utf-8",
    )
    (tmp_path.parent / "out.png").touch()
    monkeypatch.setitem(globals(), "ROOT", tmp_path)

    assert ["#nowhere", "gone.md", "../out.png", "away.md"] == [one.partition(": ")[0] for one in wrong_links("page.md")]
