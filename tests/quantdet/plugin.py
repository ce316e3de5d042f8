"""pytest hooks, nothing else: each calls a module of the suite.

Hook reference: https://docs.pytest.org/en/stable/reference/reference.html#hooks
"""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from quantdet.engines.process import interrupts, process
from quantdet.report import absent_hardware, html, interrupted, junit_suite, markdown, progress, record, terminal, unexpected
from quantdet.report.run import RUN
from quantdet.session import header, make_run, make_session, options
from quantdet.session.cases import collect, workers
from quantdet.session.cases.judge import Judge
from quantdet.session.controls import CONTROLS, Controls
from quantdet.session.machine import machine
from quantdet.session.session import SESSION

_PROMPTS = Path(__file__).resolve().parents[2] / "fixtures" / "prompts"


class Hooks:
    """Hooks that a conftest may implement."""

    @staticmethod
    @pytest.hookspec(firstresult=True)
    def pytest_quantdet_engine(config: pytest.Config) -> process.EngineSpec | None:
        """The engine that measures; vLLM if nobody says otherwise."""

    @staticmethod
    @pytest.hookspec(firstresult=True)
    def pytest_quantdet_machine(config: pytest.Config) -> tuple[machine.Machine, machine.Software] | None:
        """This machine and its vLLM; detected if nobody says otherwise."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """The hooks of `Hooks`."""
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of `session/option_table.py`."""
    options.add(parser)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Options, matrix, machine and evidence become a session; whatever is wrong with them is a usage error."""
    for line in collect.MARKERS:
        config.addinivalue_line("markers", line)
    if config.option.help or config.option.version:
        return
    config.add_cleanup(interrupts.install())
    workers.refuse_reruns(config)
    session = make_session.session_of(config, _PROMPTS)
    session.measuring.on_start = progress.announcer(config)
    config.stash[SESSION] = session
    config.stash[CONTROLS] = Controls(session)
    config.stash[record.RECORDS] = record.Records()


def pytest_report_header(config: pytest.Config) -> list[str]:
    """The machine, the versions, and every variable that could change a kernel."""
    return header.lines(config.stash[SESSION])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests get their cells, claims and questions."""
    collect.parametrize(metafunc, metafunc.config.stash[SESSION], metafunc.config.stash[CONTROLS])


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, None, None]:
    """Marks before `-k` and `-m` deselect; what is left is skipped, or gets its properties, and its order."""
    session = config.stash[SESSION]
    config.hook.pytest_deselected(items=collect.prune(items))
    collect.mark(items, session)
    yield  # -k and -m deselect here
    collect.settle(items, session)
    collect.order(items, session)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """--require-hardware: what would be skipped there is an error."""
    reason = item.stash.get(collect.REQUIRED, None)
    if reason is not None:
        pytest.fail(f"{reason} (--require-hardware)", pytrace=False)


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Judge:
    """Measures the test's cell where needed and judges it."""
    return Judge(request.config.stash[SESSION], request.config.stash[CONTROLS], request.node)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, Any, Any]:
    """Percentages are of the cases that are shown."""
    with absent_hardware.uncounted(session):
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Cases of hardware that is not here run unannounced."""
    return absent_hardware.protocol(item, nextitem)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """The case's record rides on its report."""
    report = yield
    absent_hardware.attach(item, report)
    return record.attach(item, call, report)


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: Any, config: pytest.Config) -> tuple[str, str, str] | None:
    """Cases of hardware that is not here have no letter."""
    return absent_hardware.status(report, config)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """The records listen to reports from now on."""
    session.config.pluginmanager.register(session.config.stash[record.RECORDS], "quantdet-records")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """What the run is goes to the reports: JUnit properties, page, job summary."""
    interrupted.finish(session)
    if not hasattr(session.config, "workerinput"):
        session.config.stash[RUN] = make_run.run_of(session.config)
    junit_suite.finish(session)
    html.finish(session)
    markdown.append(session)
    session.config.stash[SESSION].measuring.close()
    workers.require(session)
    workers.require_models(session)
    workers.report_clock(session.config)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest's own
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Generator[None, None, None]:
    """The suite's tables; pytest's own summaries without what has been judged."""
    with unexpected.apart(terminalreporter):
        yield
        terminal.summary(terminalreporter, config)
        html.announce(terminalreporter, config)
        markdown.announce(terminalreporter, config)
    unexpected.summary(terminalreporter, config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker's clock is added to the controller's."""
    workers.add_clock(node.config, node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one model and hardware stay on one worker."""
    return workers.scheduler(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Each worker has a GPU of its own."""
    workers.pin(config, specs)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """`-n auto`: one worker for each GPU."""
    return workers.count(config)
