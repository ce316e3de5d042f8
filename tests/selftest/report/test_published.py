"""Published tables as a replay prints them: on the terminal, in the JUnit file and on the page; and files like the published.

Each test imports files, replays them with the suite's own matrix, and reads what is printed, not what a function gives.
"""

import json
import re
import tomllib
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from quantdet.observations.published import __main__
from selftest.fakes.inner import Run, Suite
from selftest.fakes.matrix import ROOT
from selftest.fakes.published import figures, generation, investigation, matrix, reference, tokens
from selftest.report.test_html import lines, page

pytest_plugins = ["pytester"]

EXTRACTS = ROOT / "fixtures" / "published" / "extracts"
TABLES = tomllib.loads((ROOT / "fixtures" / "published" / "tables.toml").read_text(encoding="utf-8"))
WITHIN = "WITHIN-HARDWARE QUANTIZATION EFFECTS"
ONCE = "needs two runs of a request, have one in what was reported"


def replayed(suite: Suite, folder: Path, files: list[Path], hardware: str, *, named: bool = True) -> Run:
    """The run over what was imported; its page is in `r`."""
    given = [] if named else ["--hardware", hardware]
    assert 0 == __main__.main([*map(str, files), "--out", str(folder / "out"), *given])
    chosen = (f"--replay={folder / 'out'}", f"--hardware={hardware}", "-k", "qwen3-8b/", "--report=r")
    return suite(*chosen, matrix=(ROOT / "quant_matrix.toml").read_text(encoding="utf-8"), controls=True)


def tables_of_page(name: str) -> dict[tuple[str, str], str]:
    """The cells of a table of figures on the page, by row and column."""
    text = Path("r", "report.html").read_text(encoding="utf-8")
    caption = rf'<caption class="hidden">{re.escape(name)}[^<]*</caption>'
    found = re.search(rf"{caption}(.*?)</table>", text, re.DOTALL)
    assert found is not None, name
    plain = found[1].replace("<wbr>", "")
    columns = re.findall(r'<th scope="col">([^<]*)</th>', plain)[1:]
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th>(.*?)</tr>', plain, re.DOTALL)
    return {
        (row, column): cell
        for row, cells in rows
        for column, cell in zip(columns, re.findall(r"<td>([^<]*)</td>", cells), strict=True)
    }


def effects(run: Run, name: str) -> Any:
    """A suite property about the one place of a run."""
    (found,) = json.loads(run.suite[f"effects.{name}"]).values()
    return found


def of_pair(run: Run, hardware: str, a: str, b: str) -> dict[str, str]:
    return figures(run.cases[f"test_distinct[qwen3-8b/{a}/{hardware}]"].properties[f"pair.{b}"])


# -------------------------------------------------------------------------------------------------- the published tables


def test_the_h100_tables_are_printed(suite: Suite, tmp_path: Path) -> None:
    """Prefill with mean, range and classes, decode, and the one reference that was printed of it: every digit, three times."""
    run = replayed(suite, tmp_path, [EXTRACTS / "INT4_H100_generation.json"], "sm90")

    assert (0, {}) == (run.code, run.failures())
    table, words = TABLES["h100_within"], " ".join(run.output.split())
    names = table["formats"]
    printed = {
        (a, b): (table["prefill"][i][j], table["decode"][i][j], table["decode_printed"][i][j])
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if a != b
    }
    reference_ = f"ref{table['decode_printed_reference']}"
    for at, (heading, caption) in enumerate(
        [
            (f"{WITHIN} (PREFILL)", "Prefill distances"), (f"{WITHIN} (DECODE)", "Decode distances"),
            (f"DECODE STEP BY STEP, {reference_}", f"Decode step by step, {reference_}"),
        ]
    ):  # fmt: skip
        said, shown = matrix(run.output, heading, "published"), tables_of_page(caption)
        for ids, values in printed.items():
            assert values[at] == said[ids] == shown[ids], (heading, ids)
    assert 1 == run.output.count("DECODE STEP BY STEP")  # no other reference has a figure of every pair
    for a, b in printed:
        one = of_pair(run, "sm90", a, b)
        found = [f"{float(one[name]):.2e}" for name in ("prefill_published", "decode_published")]
        assert (printed[a, b][0], printed[a, b][1]) == tuple(found)
        assert printed[a, b][0] == f"{float(of_pair(run, 'sm90', b, a)['prefill_published_back']):.2e}"
        steps = effects(run, "references")[reference_]["steps"][names.index(a)][names.index(b)]
        assert printed[a, b][2] == f"{steps:.2e}"
    low, high = table["prefill_off_diagonal_range"]
    assert f"published: off-diagonal mean {table['prefill_off_diagonal_mean']}, range [{low}, {high}]" in words
    assert f"none ({len(table['classes'])} classes of {len(names)} formats)" in words
    assert table["classes"] == effects(run, "prefill")["classes"]
    for (a, b), values in printed.items():
        if a < b:
            row = re.search(rf"qwen3-8b {a} \|(?: {b})? DISTINCT \S+ (\S+) \S+ 12/12(?: {b})?\b", words)
            assert row is not None
            assert float(values[0]) == pytest.approx(float(row[1]), rel=5e-3)


def test_the_ten_pairs_are_printed(suite: Suite, tmp_path: Path) -> None:
    """L2 and largest difference of every pair with seven digits, and where the tokens part."""
    run = replayed(suite, tmp_path, sorted(EXTRACTS.glob("*_investigation.json")), "sm80", named=False)

    assert (0, {}) == (run.code, run.failures())
    rows = {tuple(row["pair"]): (row["l2"], row["max"]) for row in TABLES["int4_pairs"]["rows"]}
    shown = tables_of_page("Logprobs of the generated tokens")
    assert rows == {ids: values[:2] for ids, values in tokens(run.output).items()}
    assert rows == {(row["a"], row["b"]): (row["l2"], row["max"]) for row in effects(run, "tokens")}
    for (a, b), values in rows.items():
        assert values == (shown[f"{a} | {b}", "L2"], shown[f"{a} | {b}", "max"])
        for one in (of_pair(run, "sm80", a, b), of_pair(run, "sm80", b, a)):
            assert values == (one["chosen_l2"], one["chosen_max"])
    assert ("part at step 4", "the same") == (
        tokens(run.output)["awq", "gptq"][2],
        tokens(run.output)["awq", "awq_marlin"][2],
    )
    runs = {name: run.cases[f"test_repeat[qwen3-8b/{name}/sm80-decode]"] for name in ("awq", "gptq")}
    assert {"awq": "1", "gptq": "5"} == {name: case.properties["distinct_outputs"] for name, case in runs.items()}


def test_what_was_not_reported_has_no_figure(suite: Suite, tmp_path: Path) -> None:
    """Of the generated tokens' logprobs alone: no prefill on the terminal, in the properties and on the page."""
    run = replayed(suite, tmp_path, sorted(EXTRACTS.glob("*_investigation.json")), "sm80", named=False)

    words = " ".join(run.output.split())
    assert f"{WITHIN} (PREFILL): qwen3-8b on sm80: no figure, nothing of prefill was reported of two formats" in words
    assert re.search(r"awq \| awq_marlin DISTINCT 0\.000918 - 0\.00813 41/50", words)
    assert "of decode, tokens in common, where no prefill was reported" in words
    prefill = effects(run, "prefill")
    for metric in ("published", "own_l2"):
        assert {None} == {value for row in prefill[metric]["matrix"] for value in row}
        assert (20, 20, None) == tuple(prefill[metric][name] for name in ("pairs", "absent", "mean"))
    one = of_pair(run, "sm80", "awq", "gptq")
    assert "decode" == one["basis"]
    assert not {"prefill_published", "prefill_published_back", "p"} & set(one)
    assert 2 == page().sections["distances"].count("No figure: ")
    assert "Prefill distances" not in Path("r", "report.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------- files like these, made up

# Format -> how far its logprobs are moved: 3 parts on id 1 and 4 on id 2, so that two formats are 5 times the difference apart.
MOVED = {"awq": 0.0, "awq_marlin": 0.01, "gptq": 0.05, "gptq_marlin": 0.06, "torchao": 0.2}
MATRIX_NAMES = {"torchao": "pytorch_int4"}


def moved(by: float, weight: float = 1.0) -> dict[int, float]:
    return {1: -1.0 - 3 * weight * by, 2: -2.0 - 4 * weight * by}


@pytest.mark.parametrize("count", [3, 4, 5])
def test_formats_of_made_up_files(suite: Suite, tmp_path: Path, count: int) -> None:
    """Prompts of different length, weights 1 and 3: prefill is 5 * 2 * the difference, decode, weight 2, 5 * 2 * it as well."""
    names = list(MOVED)[:count]
    file = generation(
        tmp_path,
        {
            name: [
                reference(
                    n,
                    10 + 5 * n,
                    [4, 5, 6],
                    {-2: moved(MOVED[name], w), -1: moved(MOVED[name], w)},
                    {-1: moved(MOVED[name], 2)},
                )
                for n, w in ((0, 1.0), (1, 3.0))
            ]
            for name in names
        },
    )

    run = replayed(suite, tmp_path, [file], "sm90")

    assert (0, {}) == (run.code, run.failures())
    for phase, caption in (("PREFILL", "Prefill distances"), ("DECODE", "Decode distances")):
        for metric in ("published", "own L2"):
            said = matrix(run.output, f"{WITHIN} ({phase})", metric)
            assert count * count == len(said)
            for one, other in combinations(names, 2):
                a, b = (MATRIX_NAMES.get(name, name) for name in (one, other))
                value = f"{10 * abs(MOVED[one] - MOVED[other]):.2e}"
                assert value == said[a, b] == said[b, a], (phase, metric)
                if metric == "published":
                    assert value == tables_of_page(caption)[a, b]
    assert "STEP BY STEP" not in run.output  # nothing that the matrix of decode does not say
    assert "GENERATED TOKENS" not in run.output
    nothing_is_zero(run)


def test_the_first_side_decides_which_ids_count(suite: Suite, tmp_path: Path) -> None:
    """Top-2 of a row of three, and of two: there over both ids, 5 times the difference, back over one, 4 times it."""
    wide = {1: -1.0, 2: -2.0, 7: -9.0}
    other = {2: -2.4, 3: -3.0, 1: -1.3}  # of its first two ids the other side has only 2
    narrow = {1: -1.6, 2: -2.8}
    rows = {"awq": wide, "gptq_marlin": other, "awq_marlin": narrow}
    file = generation(tmp_path, {name: [reference(0, 9, [4], {-1: row}, {-1: row})] for name, row in rows.items()})

    run = replayed(suite, tmp_path, [file], "sm90")

    said = matrix(run.output, f"{WITHIN} (PREFILL)", "published")
    assert ("5.00e-01", "4.00e-01") == (said["awq", "gptq_marlin"], said["gptq_marlin", "awq"])
    assert ("1.00e+00", "1.00e+00") == (said["awq", "awq_marlin"], said["awq_marlin", "awq"])
    assert ("5.00e-01", "4.00e-01") == (said["awq_marlin", "gptq_marlin"], said["gptq_marlin", "awq_marlin"])


def test_one_id_a_row_is_a_mean_over_the_rows(suite: Suite, tmp_path: Path) -> None:
    """A generation file with top-1: 0.125, 0.25 and 0.375 in three rows are 0.25, not the 0.468 of their vector."""
    base = {at: {3: -1.0} for at in (-3, -2, -1)}
    far = {at: {3: -1.0 + at / 8} for at in base}
    file = generation(
        tmp_path, {n: [reference(0, 9, [3, 3, 3], rows, rows)] for n, rows in (("awq", base), ("awq_marlin", far))}, top_k=1
    )

    run = replayed(suite, tmp_path, [file], "sm90")

    for phase in ("PREFILL", "DECODE"):
        assert "2.50e-01" == matrix(run.output, f"{WITHIN} ({phase})", "published")["awq", "awq_marlin"]
    assert "chosen_l2" not in of_pair(run, "sm90", "awq", "awq_marlin")


def test_absent_stays_absent_where_others_have_a_figure(suite: Suite, tmp_path: Path) -> None:
    """Decode rows of one format are missing, another's tokens part: no figure, inf, and a figure, in one matrix."""
    row, far = {1: -1.0, 2: -2.0}, {1: -1.3, 2: -2.4}
    near, middle = {1: -1.0, 2: -2.5}, {1: -2.0, 2: -2.0}

    def both(prefill: dict[int, float], generated: list[int], decode: dict[int, dict[int, float]]) -> list[dict[str, Any]]:
        return [reference(n, 9, generated, {-1: prefill}, decode) for n in (0, 1)]

    part = both(middle, [4, 4], {-1: middle})
    part[1] = reference(1, 9, [4, 4], {-1: middle}, {})  # of the second reference decode is missing
    file = generation(
        tmp_path,
        {
            "awq": both(row, [4, 4], {-1: row}), "awq_marlin": both(far, [4, 4], {-1: far}), "gptq": both(near, [4, 4], {}),
            "gptq_marlin": part, "torchao": both({1: -3.0, 2: -2.0}, [4, 5], {-1: {1: -1.9, 2: -2.2}}),
        },
    )  # fmt: skip

    run = replayed(suite, tmp_path, [file], "sm90")

    assert (0, {}) == (run.code, run.failures())
    said, shown = matrix(run.output, f"{WITHIN} (DECODE)", "published"), tables_of_page("Decode distances")
    names = ["awq", "awq_marlin", "gptq", "gptq_marlin", "pytorch_int4"]
    for a, b in combinations(names, 2):
        expected = "5.00e-01" if (a, b) == ("awq", "awq_marlin") else "inf" if b == "pytorch_int4" else ""
        assert expected == said[a, b] == said[b, a] == shown[a, b], (a, b)
        value = effects(run, "decode")["published"]["matrix"][names.index(a)][names.index(b)]
        assert (None if not expected else "inf" if expected == "inf" else 0.5) == value
        assert ("decode_published" in of_pair(run, "sm90", a, b)) is bool(expected)
    assert "10 of 20 pairs have no figure; 8 of 20 pairs inf (tokens part)" in " ".join(run.output.split())
    # gptq has no decode rows: no step in common was reported; gptq_marlin's are those of the first reference.
    own = matrix(run.output, f"{WITHIN} (DECODE)", "own L2")
    assert ("", "1.00e+00") == (own["awq", "gptq"], own["awq", "gptq_marlin"])
    assert "decode_l2" not in of_pair(run, "sm90", "awq", "gptq")
    nothing_is_zero(run)


def test_what_needs_repeats_is_unavailable_of_one_run(suite: Suite, tmp_path: Path) -> None:
    """Five formats with one run each: repeats and known noise are skipped with need and have, and nothing fails."""
    names = list(MOVED)
    file = generation(
        tmp_path, {n: [reference(0, 9, [4], {-1: moved(MOVED[n])}, {-1: moved(MOVED[n])})] for n in names}
    )  # fmt: skip

    run = replayed(suite, tmp_path, [file], "sm90")

    assert (0, {}) == (run.code, run.failures())
    noise = run.cases["test_known_noise[qwen3-8b/gptq/sm90]"]
    assert ("skipped", "UNAVAILABLE") == (noise.outcome, noise.verdict)
    assert f"UNAVAILABLE decode: {ONCE}" in noise.message
    for phase in ("decode", "prefill"):
        for name in ("awq", "gptq"):
            case = run.cases[f"test_repeat[qwen3-8b/{name}/sm90-{phase}]"]
            assert ("skipped", "UNAVAILABLE") == (case.outcome, case.verdict)
            assert ONCE in case.message
    ran = {name.partition("[")[0] for name, case in run.ran().items()}
    assert {"test_distinct"} == ran
    properties = run.cases["test_distinct[qwen3-8b/gptq/sm90]"].properties
    for name in ("flip_rate_upper95", "distinct_outputs", "tokens_per_second", "seconds", "kernel.executed"):
        assert "" == properties[name]
    assert all("within" not in figures(text) for name, text in properties.items() if name.startswith("pair."))
    assert "known noise NOT SEEN" not in run.output
    nothing_is_zero(run)


def test_one_run_of_generated_tokens(suite: Suite, tmp_path: Path) -> None:
    """0.375 and 0.5 are 0.625 apart, 0.5 at most; repeats, noise and what is within are not known."""
    ids = [7, 8]
    files = [
        investigation(tmp_path, "awq", [(ids, [-1.0, -2.0])]), investigation(tmp_path, "gptq", [(ids, [-1.375, -2.5])]),
        investigation(tmp_path, "gptq_marlin", [([7, 9], [-1.375, -2.0])]),
    ]  # fmt: skip

    run = replayed(suite, tmp_path, files, "sm80", named=False)

    assert (0, {}) == (run.code, run.failures())
    assert {
        ("awq", "gptq"): ("6.250000e-01", "5.000000e-01", "the same"),
        ("awq", "gptq_marlin"): ("3.750000e-01", "3.750000e-01", "part at step 1"),
        ("gptq", "gptq_marlin"): ("5.000000e-01", "5.000000e-01", "part at step 1"),
    } == tokens(run.output)
    said = matrix(run.output, f"{WITHIN} (DECODE)", "published")
    assert ("6.25e-01", "inf") == (said["awq", "gptq"], said["awq", "gptq_marlin"])
    assert "skipped" == run.cases["test_known_noise[qwen3-8b/gptq/sm80]"].outcome
    assert "within" not in of_pair(run, "sm80", "awq", "gptq")
    assert "one run each, repeat noise is not known" in " ".join(run.output.split())


def test_repeats_of_one_format_only(suite: Suite, tmp_path: Path) -> None:
    """Noise is known of the one that was repeated, and of a pair of both nothing within: the message says whose is not."""
    ids = [7, 8]
    files = [
        investigation(tmp_path, "awq", [(ids, [-1.0, -2.0])]), investigation(tmp_path, "awq_marlin", [(ids, [-1.5, -2.0])] * 3),
        investigation(tmp_path, "gptq", [(ids, [-3.0, -2.0]), (ids, [-3.25, -2.0])]),
    ]  # fmt: skip

    run = replayed(suite, tmp_path, files, "sm80", named=False)

    assert (0, {}) == (run.code, run.failures())
    messages = [row["message"] for row in lines() if row.get("test") == "test_distinct"]
    assert 3 == len(messages)
    assert all(text.endswith("; one run of awq, repeat noise is not known") for text in messages)
    assert ("0.125", None, None) == tuple(
        of_pair(run, "sm80", a, b).get("within") for a, b in (("awq_marlin", "gptq"), ("awq", "gptq"), ("awq", "awq_marlin"))
    )
    assert "xfail" == run.cases["test_repeat[qwen3-8b/gptq/sm80-decode]"].outcome
    assert "passed" == run.cases["test_known_noise[qwen3-8b/gptq/sm80]"].outcome
    exact = run.cases["test_repeat[qwen3-8b/awq_marlin/sm80-decode]"].properties
    assert ("3", "0.0", "0.0") == (exact["runs"], exact["l2"], exact["max_abs_diff"])  # measured: three runs were equal


def test_a_format_alone_has_no_tables(suite: Suite, tmp_path: Path) -> None:
    """Nothing to compare with is no distance of 0."""
    row = {1: -1.0, 2: -2.0}
    run = replayed(suite, tmp_path, [generation(tmp_path, {"awq": [reference(0, 9, [4], {-1: row}, {-1: row})]})], "sm90")

    assert {} == run.ran()
    assert "QUANTIZATION EFFECTS" not in run.output
    assert not [name for name in run.suite if name.startswith("effects")]
    assert "no BIT_EXACT to count" in run.suite["summary"]


def test_a_measured_zero_stays(suite: Suite, tmp_path: Path) -> None:
    """Equal rows under two names: 0 in every output, INDISTINCT, and how many classes there are is not known."""
    row, far = {1: -1.0, 2: -2.0}, {1: -1.3, 2: -2.4}
    rows = {"awq": row, "awq_marlin": row, "gptq": far}
    file = generation(tmp_path, {name: [reference(0, 9, [4], {-1: one}, {-1: one})] for name, one in rows.items()})

    run = replayed(suite, tmp_path, [file], "sm90")

    words = " ".join(run.output.split())
    assert "0.00e+00" == matrix(run.output, f"{WITHIN} (PREFILL)", "published")["awq", "awq_marlin"]
    assert "0.00e+00" == tables_of_page("Prefill distances")["awq", "awq_marlin"]
    assert "0" == of_pair(run, "sm90", "awq", "awq_marlin")["prefill_published"]
    assert re.search(r"awq \| awq_marlin INDISTINCT 0 0 0 0/1", words)
    assert "1 not told apart" in words
    assert "none (3 classes of 3 formats at most: 1 pair not told apart)" in words


# --------------------------------------------------------------------------------------------------------------- no zeros

_ZERO = re.compile(r"(?<![\w./-])0(?:\.0+)?(?:e[+-]?0+)?(?![\w./])")
# Counts of this run, of which none is a distance.
_COUNTED = re.compile(r"\b0 (?:identical pairs|unexpected|of \d+ cells judged)")


def nothing_is_zero(run: Run) -> None:
    """No 0 in tables, properties and page of files in which no two formats are equal anywhere, and nothing was timed."""
    tables = run.output.partition("quantdet: verdicts")[2].partition("quantdet: not measured")[0]
    assert [] == [line for line in tables.splitlines() if _ZERO.search(_COUNTED.sub("", line))]
    for name, case in run.cases.items():
        for key, text in case.properties.items():
            found = (
                {part: value for part, value in figures(text).items() if part != "decode_steps"}
                if "pair." in key
                else {key: text}
            )
            assert not [part for part, value in found.items() if _ZERO.fullmatch(value)], (name, key, text)
    for key, text in run.suite.items():
        if key.startswith("effects."):
            assert not _zeros(json.loads(text)), key
    shown = page().sections
    for section in ("matrix", "distances"):
        scale = shown[section].partition("no figure")[2] if section == "distances" else shown[section]
        assert not _ZERO.search(_COUNTED.sub("", scale)), section


def _zeros(value: Any, name: str = "") -> list[str]:
    """Names of the figures that are 0 below a JSON value; how many pairs are inf or absent is counted."""
    if isinstance(value, dict):
        return [found for key, one in value.items() if key not in ("infinite", "absent") for found in _zeros(one, key)]
    if isinstance(value, list):
        return [found for one in value for found in _zeros(one, name)]
    return [name] if value == 0 and value is not False else []
