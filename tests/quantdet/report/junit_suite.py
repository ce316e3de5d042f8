"""The JUnit file: case properties come from the items; suite properties (environment, summary) are added here."""

from collections import Counter
from typing import Any

import pytest
from _pytest.junitxml import xml_key

from quantdet.report import confidence, effects, entries, reexecution_properties
from quantdet.report.record import RECORDS, Records
from quantdet.report.run import RUN, Run


def finish(session: pytest.Session) -> None:
    """Add suite properties. On the controller: the `record_testsuite_property` fixture is lost on xdist workers."""
    config = session.config
    xml: Any = config.stash.get(xml_key, None)
    if xml is None or hasattr(config, "workerinput"):
        return
    for name, value in properties(config.stash[RUN], config.stash[RECORDS]):
        xml.add_global_property(name, value)


def summary(records: Records) -> str:
    """One line: how many cases have which verdict, how sure that is, what is unexpected, what was skipped."""
    verdicts = Counter(f"{case.test.removeprefix('test_')} {case.verdict}" for case in records.cases)
    unexpected = entries.of(records.cases)
    wrong = sum(len(one.cases) for one in unexpected)
    causes = f" ({entries.counted(len(unexpected), 'cause')})" if len(unexpected) < wrong else ""
    text = "; ".join(f"{count} {word}" for word, count in sorted(verdicts.items())) or "nothing was measured"
    text = f"{records.cut}; {text}" if records.cut else text
    return f"{text}; {confidence.counted(records.cases)}; {wrong} unexpected{causes}; {len(records.skipped)} cases skipped"


def properties(run: Run, records: Records) -> list[tuple[str, str]]:
    """Summary first, then what the figures depend on."""
    found = [
        ("summary", summary(records)),
        ("unexpected", " | ".join(one.first for one in entries.of(records.cases)[:5])),
        ("hardware", ",".join(run.here)),
        ("replay", ",".join(map(str, run.replay))),
        ("suite.version", run.version),
        ("suite.revision", run.revision),
        ("vllm.newer", run.newer),
        ("suite.injected", run.injected),
    ]
    found += [(f"controls.{place}", text) for place, text in confidence.controls(records.cases).items()]
    found += [("bounds.at_once", confidence.at_once(records.cases)), ("multiplicity", confidence.multiplicity(records.cases))]
    order = list(run.formats)
    found += effects.properties(records.cases, order) + reexecution_properties.properties(records.cases, order)
    environment = dict(run.environment)
    variables = environment.pop("variables", {})
    found += [(f"env.{name}", str(value)) for name, value in environment.items()]
    found += [(f"env.variable.{name}", value) for name, value in variables.items()]
    return found
