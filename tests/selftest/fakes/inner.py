"""Inner pytest runs of the measured tests with the fake engine, read back from their JUnit files."""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One `<testcase>`."""

    outcome: str
    message: str
    properties: dict[str, str]

    @property
    def verdict(self) -> str:
        return self.properties.get("verdict", "")


@dataclass(frozen=True)
class Run:
    """One inner pytest run, read back from its JUnit file and its terminal output."""

    code: int
    output: str
    cases: dict[str, Case] = field(default_factory=dict)
    suite: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The terminal's output as if its lines had no end."""
        return " ".join(self.output.split())

    def failures(self) -> dict[str, str]:
        """Cases that did not pass, with the verdict; skipped ones left out."""
        return {name: c.verdict for name, c in self.cases.items() if c.outcome not in ("passed", "skipped", "xfail")}

    def ran(self) -> dict[str, Case]:
        return {name: case for name, case in self.cases.items() if case.outcome != "skipped"}


def read_junit(path: Path) -> tuple[dict[str, Case], dict[str, str]]:
    """Cases by name, and the suite's properties."""
    suite = ET.parse(path).getroot().find("testsuite")
    assert suite is not None
    cases: dict[str, Case] = {}
    for element in suite.iter("testcase"):
        found = [child for child in element if child.tag in ("failure", "error", "skipped")]
        outcome = found[0].tag if found else "passed"
        if outcome == "skipped" and found[0].get("type") == "pytest.xfail":
            outcome = "xfail"
        name = str(element.get("name"))
        assert name not in cases
        properties = {str(p.get("name")): str(p.get("value")) for p in element.iter("property")}
        cases[name] = Case(outcome, str(found[0].get("message")) if found else "", properties)
    properties = {str(p.get("name")): str(p.get("value")) for p in suite.findall("./properties/property")}
    return cases, properties


Suite = Callable[..., Run]
