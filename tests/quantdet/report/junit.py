"""The JUnit file: case properties come from the items; suite properties (environment, summary) are added here."""

from collections import Counter
from typing import Any

import pytest
from _pytest.junitxml import xml_key

from quantdet import __version__
from quantdet.report import confidence, effects, entries, reexecution_properties
from quantdet.report.record import RECORDS
from quantdet.session.machine.environment import git_revision
from quantdet.session.session import SESSION


def finish(session: pytest.Session) -> None:
    """Add suite properties. On the controller: the `record_testsuite_property` fixture is lost on xdist workers."""
    config = session.config
    xml: Any = config.stash.get(xml_key, None)
    if xml is None or hasattr(config, "workerinput"):
        return
    for name, value in properties(config):
        xml.add_global_property(name, value)


def properties(config: pytest.Config) -> list[tuple[str, str]]:
    """Summary first, then what the figures depend on."""
    session, records = config.stash[SESSION], config.stash[RECORDS]
    verdicts = Counter(f"{case['test'].removeprefix('test_')} {case['verdict']}" for case in records.cases)
    unexpected = entries.of(records.cases)
    wrong = sum(len(one.cases) for one in unexpected)
    causes = f" ({entries.counted(len(unexpected), 'cause')})" if len(unexpected) < wrong else ""
    summary = "; ".join(f"{count} {word}" for word, count in sorted(verdicts.items())) or "nothing was measured"
    summary = f"{records.cut}; {summary}" if records.cut else summary
    counted = confidence.counted(records.cases)
    found = [
        ("summary", f"{summary}; {counted}; {wrong} unexpected{causes}; {len(records.skipped)} cases skipped"),
        ("unexpected", " | ".join(one.first for one in unexpected[:5])),
        ("hardware", ",".join(session.machine.rows(session.matrix))),
        ("replay", ",".join(map(str, session.options.replay))),
        ("suite.version", __version__),
        ("suite.revision", git_revision(config.rootpath)),
        ("vllm.newer", session.newer()),
        ("suite.injected", ":".join(session.inject) if session.inject else ""),
    ]
    found += [(f"controls.{place}", text) for place, text in confidence.controls(records.cases).items()]
    found += [("bounds.at_once", confidence.at_once(records.cases)), ("multiplicity", confidence.multiplicity(records.cases))]
    order = list(session.matrix.formats)
    found += effects.properties(records.cases, order) + reexecution_properties.properties(records.cases, order)
    environment = session.measured_environment()
    variables = environment.pop("variables", {})
    found += [(f"env.{name}", str(value)) for name, value in environment.items()]
    found += [(f"env.variable.{name}", value) for name, value in variables.items()]
    return found
