"""No figure without its measurement: what nobody computed has no default that reads like a number."""

import ast
import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import quantdet
from quantdet.engines.child import lifetime
from quantdet.engines.clock import Clock
from quantdet.judging import hidden_states
from quantdet.judging.distinct import above_lifetimes, distinctness
from quantdet.judging.first_layer import impossible
from quantdet.judging.pairs import pair
from quantdet.judging.reexecution import claim as attribution
from quantdet.judging.results import Measured
from quantdet.judging.verdicts import Pair, Reference, Verdict
from quantdet.matrix.cell import Cell
from quantdet.matrix.expectations import Expectations
from quantdet.observations.header import HiddenStatesTaken
from quantdet.observations.observation import Observation
from quantdet.report import compared, confidence, reexecution, speed, terminal
from quantdet.report.html import reexecutions
from quantdet.session import session
from quantdet.session.cases import judge
from quantdet.session.controls import Controls
from selftest.fakes.cases import case
from selftest.fakes.observation import observation

# Fields whose default is 0, and why that is no figure that nobody computed.
ALLOWED = {
    "Clock": "sums and counts of a run, which begin at 0",
    "Plan.claim_tokens": "asked for, not measured; sealed in keys",
    "Plan.claim_top_k": "asked for, not measured; sealed in keys",
    "Header.max_flip_rate": "asked for, 0: the number of repeats was given; sealed",
    "Header.claim_tokens": "asked for; sealed",
    "Header.claim_top_k": "asked for; sealed",
    "HiddenStatesTaken.width": "a shape, told nowhere; sealed, and 0 beside `problem` only",
    "HiddenStatesTaken.repeats": "counts requests that were repeated; sealed",
    "Drawn.mean": "of the generator of weights",
    "LinearLayer.experts": "of a model's configuration: 0 where it has none",
    "LinearLayer.experts_per_token": "of a model's configuration: 0 where it has none",
    "Synthetic.seed": "of the generator of weights",
}
PACKAGE = Path(quantdet.__file__).parent
# They are run as programs, or need an engine.
_APART = ("__main__", "sitecustomize", "preload")


def modules() -> Iterator[Any]:
    for found in pkgutil.walk_packages([str(PACKAGE)], "quantdet."):
        if found.name.rpartition(".")[2] not in _APART:
            yield importlib.import_module(found.name)


def defaults() -> Iterator[tuple[str, str, Any]]:
    """(class, field, default) of every dataclass, named tuple and pydantic model of the suite."""
    seen: set[type] = set()
    for module in modules():
        for value in vars(module).values():
            if not isinstance(value, type) or not value.__module__.startswith("quantdet") or value in seen:
                continue
            seen.add(value)
            if dataclasses.is_dataclass(value):
                yield from ((value.__name__, field.name, field.default) for field in dataclasses.fields(value))
            elif issubclass(value, tuple) and hasattr(value, "_field_defaults"):
                yield from ((value.__name__, name, default) for name, default in value._field_defaults.items())
            elif issubclass(value, BaseModel):
                yield from ((value.__name__, name, field.default) for name, field in value.model_fields.items())


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def test_no_field_has_a_default_of_zero() -> None:
    """Dataclasses and models: 0 is the default of counters and of what was asked for, each with its reason."""
    found = {(name, field) for name, field, value in defaults() if is_number(value) and value == 0}
    unexplained = {f"{name}.{field}" for name, field in found if not {name, f"{name}.{field}"} & set(ALLOWED)}

    assert set() == unexplained
    known = {name for name, _ in found} | {f"{name}.{field}" for name, field in found}
    assert set() == set(ALLOWED) - known, "allowed, and no longer there"


def test_the_walk_sees_the_classes_that_carry_figures() -> None:
    """Or it would pass by seeing nothing."""
    names = {name for name, _, _ in defaults()}
    assert {"Pair", "Judgement", "Header", "HiddenStatesTaken", "Spread", "Comparison", "Identification", "Distance"} <= names


# Calls that give 0 where nothing is known: (module, source), and why each is right.
SUMMED = {
    (
        "judging/reported.py",
        "max((_mean(_gap(record, record, i, j, phase, last)) for i, j in combinations(seen, 2)), default=0.0)",
    ): "one output of several repeats: they are equal, which was seen",
    ("judging/reported.py", "max(own, default=0.0)"): "for the verdict, as far as was seen; None unless both repeat",
    ("judging/distinct.py", "spreads.get(cell, 0.0)"): "a bound of what is no farther, not told",
    ("judging/distinct.py", "spreads.get(other, 0.0)"): "as above",
    ("judging/questions.py", "spreads.get(a, 0.0)"): "as above",
    ("judging/questions.py", "spreads.get(b, 0.0)"): "as above",
    ("report/reexecution.py", "row.snr or 0.0"): "the order of rows",
}  # fmt: skip


def zeros(path: Path) -> Iterator[str]:
    """Sources of `default=0.0`, `.get(name, 0.0)` and `or 0.0` in a module: floats, so no counters."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        given: list[ast.expr] = []
        if isinstance(node, ast.Call):
            given = [word.value for word in node.keywords if word.arg == "default"]
            if isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                given += node.args[1:2]
        elif isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            given = node.values[-1:]
        flat = [value for one in given for value in (one.elts if isinstance(one, ast.Tuple) else [one])]
        if any(isinstance(one, ast.Constant) and isinstance(one.value, float) and one.value == 0 for one in flat):
            yield ast.unparse(node)


def test_nothing_unknown_is_read_as_zero() -> None:
    """In the source: a float 0 in place of what is not there, but for places that have a reason."""
    found = {(str(path.relative_to(PACKAGE)), text) for path in PACKAGE.rglob("*.py") for text in zeros(path)}

    assert set(SUMMED) == found


# ------------------------------------------------------------------------------------------------------- pairs and repeats


def once(whole: Observation) -> Observation:
    """The same with its first run alone."""
    prompts = tuple(
        dataclasses.replace(
            one, header=one.header.model_copy(update={"runs": one.header.runs[:1]}), outputs=one.outputs[:1]
        )
        for one in whole.prompts
    )  # fmt: skip
    return Observation(whole.header.model_copy(update={"repeats": 1}), prompts)


def test_what_is_within_is_known_of_repeats_only() -> None:
    """Equal repeats are 0 apart, as was seen; of one run nobody knows, whichever side it is."""
    one, other = observation("gptq", numerics="int4"), observation("bf16")

    assert 0.0 == pair(one, other).within
    assert [None] * 3 == [pair(*ids).within for ids in ((once(one), other), (one, once(other)), (once(one), once(other)))]


def test_a_pair_tells_the_figures_that_it_has() -> None:
    """No name without a value; printed figures keep their digits; a measured 0 is told."""
    bare = Pair("a", "b", Verdict.DISTINCT, 0.5, 0.25, 3, 4)
    told = dataclasses.replace(bare, basis="decode", chosen_l2=1.516037e-02, chosen_max=8.132815e-03, prefill_published=0.0)

    assert "DISTINCT l2=0.5 max_abs=0.25 differing=3/4" == bare.figures
    assert "basis=decode prefill_published=0 chosen_l2=1.516037e-02 chosen_max=8.132815e-03" == told.figures.partition("4 ")[2]


def test_references_turn_round_with_their_pair() -> None:
    """Every directed figure changes places, None too."""
    one = Reference("ref0", 1.0, 2.0, 3.0, None, 5.0, 6.0)
    whole = Pair("a", "b", Verdict.DISTINCT, 0.5, 0.25, 3, 4, references=(one,))

    assert (Reference("ref0", 2.0, 1.0, None, 3.0, 6.0, 5.0),) == whole.swapped.references
    assert whole == whole.swapped.swapped


def test_lifetimes_apart_are_a_distance_within() -> None:
    """Where repeats say nothing, engine lifetimes do; a message needs no figure that there is not."""
    bare = Pair("a", "b", Verdict.DISTINCT, 0.5, 0.25, 3, 4, p=0.01, p_smallest=0.01)

    assert (Verdict.INDISTINCT, 0.75) == (above_lifetimes(bare, 0.75).verdict, above_lifetimes(bare, 0.75).within)
    own, peer = observation("gptq", numerics="int4"), observation("bf16")
    told = distinctness(own, {peer.header.cell: peer}, Expectations(()), lambda a, b: bare)
    assert "within not known, p = 0.01" in told.message


def test_one_lifetime_has_no_spread() -> None:
    """A distance between lifetimes needs two of them."""
    cell, one = Cell("alpha", "bf16", "cpu-here"), observation("bf16")

    def spread(*found: Observation) -> float | None:
        known: Any = type("Known", (), {"_results": {cell: Measured(found)} if found else {}})()
        return session.Session.spread(known, cell)

    assert (None, None, 0.0) == (spread(), spread(one), spread(one, one))


# -------------------------------------------------------------------------------------------------------------- what ran


@pytest.mark.parametrize(
    ("timings", "rate"), [({}, None), ({"tokens_per_second": 0.0}, None), ({"tokens_per_second": 12.34}, 12.34)]
)
def test_a_rate_that_was_not_timed_is_none(timings: dict[str, float], rate: float | None) -> None:
    """Not 0.0, which would be an engine that stands still."""
    assert rate == judge._rate(timings)


def test_counts_of_speed_are_those_that_are_known() -> None:
    """An observation that does not say how many rounds there were has none, not 0."""
    header = observation("bf16").header.model_copy(
        update={"timings": {"prefill_tokens_per_second": 50.0, "speed_rounds": 3.0}}
    )  # fmt: skip
    matrix: Any = type("Matrix", (), {"cells": list, "hardware": {}, "formats": {}})()
    assert {"rounds": 3} == speed.figures(header, matrix)["tokens_per_second.n"]


def test_a_part_that_was_not_timed_is_blank() -> None:
    """A cell whose engine has no such part, beside one that has; and 0.0 where it took no time."""
    cases = [
        case(format=name, figures={"seconds": parts})
        for name, parts in (("a", {"load": 1.0, "compile": 2.0}), ("b", {"load": 0.0}))
    ]
    (table,) = terminal.time_tables(terminal.Records(cases), 80)
    assert [["a", "1.0", "2.0", "3.0"], ["b", "0.0", "0.0"]] == [line.split() for line in table.splitlines()[2:]]


def test_an_engine_that_does_not_say_is_counted() -> None:
    """The seconds of measuring are of those that said."""
    clock = Clock(cells=2, lifetimes=2)
    for seconds in (1.5, None):
        clock.measured(seconds)
    assert "of these 1.5 s measuring (1 did not say); " in terminal.engines(clock)


def test_nothing_timed_is_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`engines.lifetime.save` leaves a rate out where the calls took no time that could be told."""
    written: list[Any] = []
    monkeypatch.setattr(lifetime, "write", lambda directory, header, *rest: written.append(header))
    whole = observation("bf16")
    for seconds in (0.0, 2.0):
        recorder: Any = type("Recorder", (), {
            "generate_s": seconds, "first_call_s": 0.0, "tokens": 8, "logits_dtype": "float32", "nonfinite": [],
            "divergences": [], "records": whole.prompts, "repeats": whole.header.repeats,
        })()  # fmt: skip
        claims: Any = type("Claims", (), {"nonfinite": [], "records": []})()
        plan: Any = type("Plan", (), {"identity": whole.header.model_dump(mode="json", by_alias=True)})()
        monkeypatch.setattr(lifetime, "environment", lambda plan: {})
        assert whole.header.executed is not None
        lifetime.save(plan, tmp_path, whole.header.executed, lifetime.Done(recorder, claims, None, 0.0, {}), {})
    assert [None, 4.0] == [header.timings.get("tokens_per_second") for header in written]


def test_what_was_not_traced_has_no_counts() -> None:
    """A bug bundle's `layers.json` without a trace."""
    assert (None, None) == (impossible("x").repeats, impossible("x").differ)


def test_hidden_states_that_were_not_timed() -> None:
    """No seconds in the header, none in the figures; a recording that says 0.0 keeps its seal."""
    assert HiddenStatesTaken(problem="x").seconds is None
    assert "hidden_states.seconds" not in hidden_states.repeat([observation("bf16")], "decode", Expectations(())).figures
    whole = observation("bf16").header
    old = whole.model_copy(update={"hidden_states": HiddenStatesTaken(problem="x", seconds=0.0)})
    assert '"seconds":0.0' in old.model_dump_json()
    assert old.digest() == type(old).model_validate_json(old.model_dump_json(by_alias=True)).digest()


# ------------------------------------------------------------------------------------------------------------ re-execution


def test_noise_of_a_claim_that_was_not_repeated() -> None:
    """0 where repeats were equal; None where there was one."""
    assert (0.0, None) == (attribution.within(observation("bf16")), attribution.within(once(observation("bf16"))))


def test_a_share_is_told_where_it_is_zero_and_left_out_where_it_is_not() -> None:
    """Of the confusion matrix, on the terminal and on the page."""
    claim = {
        "nearest": {"a": 1.0, "b": 0.0}, "own": ["a"], "prompts": 4, "comparisons": {},
        "identified": {"share": 1.0, "low": 0.5, "high": 1.0}, "distances": {},
    }  # fmt: skip
    other = {**claim, "nearest": {"a": 0.0, "b": 0.5, "c": 0.5}, "own": ["b"]}
    one = reexecution.Verification("here", {"a": claim, "b": other}, ["a", "b", "c"])
    lines = [line.split() for text in reexecution.identification(one, 80) for line in text.splitlines()]

    assert ["a", "1.00*", "0.00", "-"] in lines
    assert ["b", "0.00", "0.50*", "0.50"] in lines
    assert (("0.00", "zero"), ("", "no")) == (reexecutions._share(0.0), reexecutions._share(None))


# ------------------------------------------------------------------------------------------------------------ the report


def test_absent_figures_are_counted_and_in_no_mean() -> None:
    """Neither 0 nor left out without a word."""
    found = compared.Spread.of([1.0, None, 3.0, float("inf")])

    assert (4, 1, 1, 2.0, 1.0, 3.0) == dataclasses.astuple(found)
    assert "mean 2.00e+00 over the 2 finite, range [1.00e+00, 3.00e+00]; 1 of 4 pairs have no figure" in str(found)
    assert "no figure of any pair" == str(compared.Spread.of([None, None]))


def test_no_verdict_is_no_count() -> None:
    """Without a BIT_EXACT nothing is counted, not 0 of 0."""
    assert "no BIT_EXACT to count" == confidence.counted([])


def test_known_noise_that_could_not_be_asked_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one reported run: not tried, with the need, so that BIT_EXACT of others is not held against it."""
    cell = Cell("alpha", "awq", "cpu-here")
    whole = observation("awq")
    one = once(Observation(whole.header.model_copy(update={"evidence": "reported"}), whole.prompts))
    monkeypatch.setattr(Controls, "_first", lambda self, name, cell: cell)
    known: Any = type(
        "Known", (), {"result": lambda self, cell: Measured((one,)), "expectations": lambda self, cell: Expectations(())}
    )
    caught, text = Controls(known())._noise(cell)

    assert caught is None
    assert text.startswith("known noise not tried, alpha/awq/cpu-here decode: needs two runs of a request, have one")
