"""Commands that people copy, from the documentation and the CI files: options, paths, extras and artefacts exist."""

import re
import tomllib
from pathlib import Path

import pytest

from quantdet import matrix, options
from selftest.fakes import ROOT

PLACES = [
    "README.md", "CONTRIBUTING.md", "fixtures/recordings/README.md", ".ci/README.md", ".ci/run", ".ci/gitlab-ci.yml",
    ".ci/Jenkinsfile", ".ci/buildkite.yml", ".github/workflows/cpu.yml", ".github/workflows/gpu.yml",
]  # fmt: skip
RECIPES = [place for place in PLACES if not place.endswith("README.md") and place != "CONTRIBUTING.md"]
PYTESTS_OWN = {"--junitxml"}
MUTATIONS = {"--part"}  # of tests/mutation


def text(place: str) -> str:
    """A file, continued lines joined."""
    return (ROOT / place).read_text(encoding="utf-8").replace("\\\n", " ")


def commands(place: str) -> list[str]:
    """What follows `pytest` wherever it is called: in a shell's line, up to its end or a quote that closes it."""
    return re.findall(r"(?:^|[\s`'/\"&])pytest\"?((?: +(?:\"[^\"]*\"|'[^']*'|[^\s`';&]+))+)", text(place), re.M)


class Parser:
    """Takes what `options.add` declares."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def getgroup(self, *_: str) -> "Parser":
        return self

    def addoption(self, name: str, **_: object) -> None:
        self.names.add(name)


@pytest.mark.parametrize("place", PLACES)
def test_options_exist(place: str) -> None:
    """Each `--option` of each call of pytest is the suite's, or one of the few of pytest that the texts use."""
    parser = Parser()
    options.add(parser)  # type: ignore[arg-type]
    given = {option for command in commands(place) for option in re.findall(r"(?<!\S)--[a-z][a-z-]+", command)}

    assert given <= parser.names | PYTESTS_OWN | MUTATIONS


@pytest.mark.parametrize("place", PLACES)
def test_paths_and_hardware_exist(place: str) -> None:
    """What a call of pytest reads is in the repository; hardware is a row of the matrix."""
    table = matrix.load(ROOT / "quant_matrix.toml")
    for command in commands(place):
        for path in re.findall(r"(?<![\w./$])(?:tests|fixtures)/[\w./-]*\w", command):
            assert (ROOT / path).exists(), command
        for row in re.findall(r"--(?:require-)?hardware[ =]([a-z][\w-]*)", command):
            assert row in table.hardware, command


def test_something_was_found() -> None:
    """These tests are about something: every place calls pytest, but for the workflow that calls `.ci/run`."""
    assert {place for place in PLACES if not commands(place)} == {".github/workflows/cpu.yml"}


@pytest.mark.parametrize("place", PLACES)
def test_files_and_extras_exist(place: str) -> None:
    """Constraints, scripts and extras that an install command names."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for group in re.findall(r"'\.\[([\w,]+)\]'", text(place)):
        assert set(group.split(",")) <= extras.keys()
    for path in re.findall(r"\.ci/[\w.-]*\w", text(place)):
        assert (ROOT / path).exists()


def test_links_lead_somewhere() -> None:
    """Relative links of the documentation, and anchors within a page."""
    for place in (place for place in PLACES if place.endswith(".md")):
        headings = re.findall(r"^#+ (.*)$", text(place), re.M)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        for target in re.findall(r"\]\(([^)\s]+)\)", text(place)):
            if target.startswith("#"):
                assert target[1:] in anchors, (place, target)
            elif "://" not in target:
                assert (Path(ROOT, place).parent / target.partition("#")[0]).exists(), (place, target)


def test_ci_uploads_what_its_run_writes() -> None:
    """JUnit files and pages lie under the folder that every recipe keeps, and git ignores it."""
    for place in (".ci/run", ".github/workflows/gpu.yml", ".ci/gitlab-ci.yml", ".ci/Jenkinsfile", ".ci/buildkite.yml"):
        written = re.findall(r"--(?:junitxml|report)[ =](\S+)", text(place))
        assert written, place
        assert all(path.startswith("reports/") for path in written), place
    for place in set(RECIPES) - {".ci/run"}:
        assert "reports/*.xml" in text(place), place
    assert "reports/" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


def test_the_job_summary_is_of_runs_that_measure() -> None:
    """Tests start hundreds of runs: none of them may write to the job's page, which GitHub drops above 1 MiB."""
    run = text(".ci/run")
    given = [line for line in run.splitlines() if line.startswith("GITHUB_STEP_SUMMARY=")]

    assert run.index("unset GITHUB_STEP_SUMMARY") < run.index("\npytest ")
    assert len(given) == 2
    assert all("--report" in line and "tests/" not in line for line in given)


def test_actions_are_pinned_by_major_version() -> None:
    """And nothing else than checked out code runs with a token that can write."""
    for place in (".github/workflows/cpu.yml", ".github/workflows/gpu.yml"):
        uses = re.findall(r"uses: (\S+)", text(place))
        assert uses
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", use) for use in uses)
        assert "permissions:\n  contents: read\n" in text(place)
        assert "persist-credentials: false" in text(place)


def test_gpu_jobs_demand_their_hardware_and_versions() -> None:
    """A GPU job must not go green by skipping, and measures the versions that are pinned."""
    for place in (".github/workflows/gpu.yml", ".ci/gitlab-ci.yml", ".ci/Jenkinsfile", ".ci/buildkite.yml"):
        assert "--require-hardware" in text(place)
        assert "-c .ci/constraints-gpu.txt" in text(place)
