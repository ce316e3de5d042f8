"""Formats against formats as the published tables print them, from hand-made records."""

import json
from itertools import combinations

import pytest

from quantdet.judging.verdicts import Pair
from quantdet.report import compared, effects
from quantdet.report.case import Case
from selftest.fakes.cases import a_pair, case

AWQ, MARLIN, GPTQ = "awq", "awq_marlin", "gptq_marlin"
# Published for an H100 (Floating_point_noise_GPU_verification, revision 0c12bda): prefill, row against column.
PUBLISHED = {
    (AWQ, MARLIN): 0.0387978085195589, (AWQ, GPTQ): 4.2346157614092625, (MARLIN, AWQ): 0.0387978085195589,
    (MARLIN, GPTQ): 4.2405295078492475, (GPTQ, AWQ): 4.161723748014928, (GPTQ, MARLIN): 4.168213904462496,
}  # fmt: skip
INF = float("inf")
H100 = "qwen3-8b on sm90, vLLM 0.11.2"


def cases(*pairs: Pair, model: str = "qwen3-8b", vllm: str = "0.11.2") -> list[Case]:
    """One record of test_distinct per format, each with its pairs as seen from it."""
    names = dict.fromkeys(name for pair in pairs for name in (pair.a, pair.b))
    where = {"model": model, "hardware": "sm90", "vllm": vllm}
    own = {name: tuple(p if p.a == name else p.swapped for p in pairs if name in (p.a, p.b)) for name in names}
    return [case("test_distinct", "DISTINCT", format=name, pairs=some, **where) for name, some in own.items()]


def h100() -> list[Case]:
    return cases(
        *(
            a_pair(
                a, b, prefill_published=PUBLISHED[a, b], prefill_published_back=PUBLISHED[b, a], decode_published=INF,
                decode_published_back=INF, l2=PUBLISHED[a, b] * 2, decode_l2=PUBLISHED[a, b] / 2,
            )
            for a, b in combinations((AWQ, MARLIN, GPTQ), 2)
        )
    )  # fmt: skip


def text(records: list[Case], width: int = 80, order: tuple[str, ...] = ()) -> str:
    return "\n".join(effects.within_hardware(records, order, width))


GOLDEN = """\
WITHIN-HARDWARE QUANTIZATION EFFECTS (PREFILL): qwen3-8b on sm90, vLLM 0.11.2
                       awq_      gptq_
published    awq       marlin    marlin
awq          -         3.88e-02  4.23e+00
awq_marlin   3.88e-02  -         4.24e+00
gptq_marlin  4.16e+00  4.17e+00  -
published: off-diagonal mean 2.81e+00, range [3.88e-02, 4.24e+00]
"""


# ------------------------------------------------------------------------------------------------------------- matrices


def test_the_published_prefill_matrix_prints_as_published() -> None:
    """The H100's matrix, rows against columns, with off-diagonal mean and range; not one value symmetrised."""
    said = text(h100())

    assert GOLDEN in said
    assert "classes, qwen3-8b on sm90, vLLM 0.11.2: none (3 classes of 3 formats)" in " ".join(said.split())


def test_the_published_metric_keeps_its_direction() -> None:
    """Whichever format's record comes first, and also where only one side was collected."""
    for records in (h100(), h100()[::-1], h100()[2:] + h100()[:1]):
        place = compared.places(records, (AWQ, MARLIN, GPTQ))[0]
        assert PUBLISHED == {ids: place.value("prefill_published", *ids) for ids in PUBLISHED}


def test_decode_is_inf_where_tokens_part_beside_the_forced_distance() -> None:
    """No finite pair: no mean, all inf; the distance on forced tokens stands there."""
    said = " ".join(text(h100()).split())

    assert "published: off-diagonal mean n/a (no pair is finite); 6 of 6 pairs inf (tokens part)" in said
    assert "on the same forced tokens their own L2 is 7.76e-02 to 8.48e+00" in said
    assert "awq - inf inf" in said


def test_the_mean_is_over_the_finite_pairs() -> None:
    """inf enters neither the mean nor the range, and its number is told."""
    records = cases(
        a_pair("a", "b", decode_published=0.1, decode_published_back=0.3),
        a_pair("a", "c", decode_published=INF, decode_published_back=INF, l2=7.0),
        a_pair("b", "c", decode_published=INF, decode_published_back=0.2, l2=8.0),
    )

    said = " ".join(text(records).split())

    assert "mean 2.00e-01 over the 3 finite, range [1.00e-01, 3.00e-01]; 3 of 6 pairs inf" in said
    assert "their own L2 is 7.00e+00 to 8.00e+00" in said


def absent() -> list[Case]:
    """a and b by decode alone, without a published figure of prefill; a and c whole, of which a measured 0; b and c apart."""
    return cases(
        a_pair("a", "b", basis="decode", prefill_published=None, prefill_published_back=None, decode_published=None,
               decode_published_back=None, within=None),
        a_pair("a", "c", decode_published=0.0, decode_published_back=0.0, l2=0.25),
        a_pair("b", "c", decode_published=INF, decode_published_back=INF, decode_l2=None, l2=0.75),
    )  # fmt: skip


def test_a_figure_that_is_not_there_is_blank() -> None:
    """Neither 0 nor taken from another phase; what was measured as 0 is told, and the others' number stands beside."""
    place, said = compared.places(absent())[0], " ".join(text(absent()).split())

    assert (None, None, 0.25) == (place.value("l2", "a", "b"), place.value("l2", "b", "a"), place.value("l2", "a", "c"))
    assert "published a b c a - 7.50e-01 b - 7.50e-01 c 7.50e-01 7.50e-01 -" in said
    assert "published a b c a - 0.00e+00 b - inf c 0.00e+00 inf -" in said
    assert "over the 2 finite, range [0.00e+00, 0.00e+00]; 2 of 6 pairs have no figure; 2 of 6 pairs inf" in said
    assert "their own L2 is 7.50e-01 to 7.50e-01" in said
    row = " ".join("\n".join(effects.comparison_results(absent(), 80)).split())
    assert "a | b DISTINCT 1 - 2 12/12" in row
    assert "of decode, tokens in common, where no prefill was reported; - : no figure" in row
    prefill = json.loads(dict(effects.properties(absent()))["effects.prefill"])[H100]
    assert [None, None, 0.75] == prefill["published"]["matrix"][0]
    assert (2, 0.75) == (prefill["published"]["absent"], prefill["published"]["mean"])


def test_without_any_figure_there_is_no_matrix() -> None:
    """Of a metric, or of a whole phase: a line says what was lacking."""
    bare = a_pair("a", "b", basis="decode", prefill_published=None, prefill_published_back=None, decode_l2=None)
    said = " ".join(text(cases(bare)).split())

    assert "EFFECTS (PREFILL): qwen3-8b on sm90, vLLM 0.11.2: no figure, nothing of prefill was reported" in said
    assert "own L2: no figure, no step after the same tokens was reported of two formats" in said
    assert "published a b a - 2.50e-01" in said


def test_both_metrics_are_there_and_say_which_is_which() -> None:
    """The published metric and the suite's own have a matrix each, in both phases."""
    said = text(h100())

    for word in ("\npublished  ", "\nown L2  ", "\npublished: ", "\nown L2: "):
        assert 2 == said.count(word), word
    assert "published: the published metric" in said.splitlines()[0]


@pytest.mark.parametrize("order", [(GPTQ, AWQ, MARLIN), (MARLIN, GPTQ, AWQ)])
def test_formats_stand_in_the_order_of_the_matrix_file(order: tuple[str, ...]) -> None:
    """Rows and columns follow the matrix, not the order of the tests."""
    lines = text(h100(), order=order).splitlines()

    assert list(order) == [line.split()[0] for line in lines if line.startswith(("awq", "gptq"))][:3]
    assert list(order) == compared.places(h100(), order)[0].formats


NAMES = ("bf16", "awq_marlin_compiled", "gptq_machete_compiled", *(f"int{n}_w{n}a16_asym" for n in range(2, 40)))


@pytest.mark.parametrize(("count", "width"), [(2, 80), (3, 80), (8, 80), (8, 120), (9, 80), (40, 80)])
def test_every_line_fits_and_no_value_is_cut(count: int, width: int) -> None:
    """Blocks of columns: no line is longer than the screen, every value is there whole; above 8 formats no matrix."""
    names = NAMES[:count]
    records = cases(*(a_pair(a, b, verdict="IDENTICAL") for a, b in combinations(names, 2)))

    said = text(records, width, names)

    assert all(len(line) <= width for line in said.splitlines()), said
    assert said == "\n".join(line.rstrip() for line in said.splitlines())
    assert said.isascii()
    values = count * (count - 1) if count <= 8 else 0
    assert values == said.count("2.50e-01") - 3  # decode, published; its mean and the ends of its range
    assert (f"{count} formats: a matrix is shown for up to 8" in " ".join(said.split())) is (count > 8)
    results = "\n".join(effects.comparison_results(records, width))
    assert all(len(line) <= width for line in results.splitlines()), results
    assert results.isascii()


def test_classes_are_formats_with_identical_logits() -> None:
    """Chains of identical pairs make a class; a chain that does not close is told; parts of a matrix claim no classes."""
    same = {("a", "b"), ("b", "c")}
    pairs = [
        a_pair(*ids, verdict="IDENTICAL" if ids in same else "INDISTINCT" if "d" in ids else "DISTINCT")
        for ids in combinations("abcd", 2)
    ]

    whole, part = text(cases(*pairs)), text(cases(*pairs[:4]))

    assert "kernel equivalence classes, qwen3-8b on sm90, vLLM 0.11.2: a = b = c (2" in whole
    assert "not transitive: a = b, b = c, but not a = c" in whole
    assert "a = b; b = c (of 4 compared pairs)" in " ".join(part.split())
    assert "classes of" not in part


def test_places_are_not_mixed() -> None:
    """Two vLLM versions of one model are two matrices, and the comparisons say which is which."""
    records = cases(a_pair("a", "b", l2=3.0)) + cases(a_pair("a", "b", l2=4.0), vllm="0.12.0")

    said = text(records)
    results = "\n".join(effects.comparison_results(records, 80))

    assert [H100, "qwen3-8b on sm90, vLLM 0.12.0"] == [str(one.where) for one in compared.places(records)]
    assert "own L2: off-diagonal mean 3.00e+00" in said
    assert "own L2: off-diagonal mean 4.00e+00" in said
    assert "sm90 0.12.0" in " ".join(results.split())


def test_the_selected_of_many_get_their_matrix() -> None:
    """Each is compared with every other format; selected as the text says, two formats are shown without the rest."""
    names = [f"f{i}" for i in range(compared.LIMIT + 1)]
    every = cases(*(a_pair(a, b) for a, b in combinations(names, 2)))

    assert "a matrix is shown for up to 8, as with -k 'qwen3-8b and (f0 or f1)'" in " ".join(text(every).split())
    (found,) = compared.places([one for one in every if one.format in ("f0", "f1")])
    assert (["f0", "f1"], [("f0", "f1")]) == (found.formats, list(found.pairs))
    (alone,) = compared.places([one for one in every if one.format == "f0"])
    assert names == alone.formats


def test_nothing_compared_is_nothing_said() -> None:
    """No pairs: no section, no property."""
    records = [case()]

    assert ([], [], []) == (
        effects.within_hardware(records, (), 80), effects.comparison_results(records, 80), effects.properties(records),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- comparisons


def test_comparisons_are_counted_and_sorted() -> None:
    """Identical pairs first, then the others by distance; a pair that two tests saw is there once."""
    records = cases(
        a_pair("a", "b", l2=0.3, max_abs=0.9), a_pair("a", "c", l2=0.1, prefill_published=0.05), a_pair("b", "c", l2=0.2),
        a_pair("a", "d", l2=0.0, verdict="IDENTICAL", differing=0), a_pair("b", "d", verdict="INDISTINCT"),
    )  # fmt: skip

    title, _, body = effects.comparison_results(records, 80)

    assert "LOGPROB COMPARISON RESULTS: 1 identical pairs, 3 different, 1 within repeat noise" == " ".join(title.split())
    rows = [line.split()[1:4] for line in body.splitlines()[1:]]
    assert [["a", "|", "d"], ["a", "|", "c"], ["b", "|", "c"], ["a", "|", "b"], ["b", "|", "d"]] == rows
    assert "qwen3-8b a | c DISTINCT 0.1 0.05 2 12/12" in " ".join(body.split())


def test_of_many_comparisons_the_closest_ten_of_each_kind() -> None:
    """Forty formats make 780 pairs: 10 identical and 10 others are shown, and the title has the whole numbers."""
    names = [f"f{n}" for n in range(40)]
    pairs = [
        a_pair(a, b, verdict="IDENTICAL" if int(b[1:]) < 8 else "DISTINCT", l2=float(b[1:]) / 100)
        for a, b in combinations(names, 2)
    ]

    title, legend, body = effects.comparison_results(cases(*pairs), 80)

    assert "28 identical pairs, 752 different" in title
    assert "10 of each" in legend
    assert (10, 10) == (body.count("IDENTICAL"), body.count("DISTINCT"))
    assert {"0.08", "0.09"} >= {line.split()[5] for line in body.splitlines() if "DISTINCT" in line}


# ----------------------------------------------------------------------------------------------------------- properties


def test_the_properties_hold_the_whole_matrix_in_one_line() -> None:
    """JSON that any parser takes (inf is a word), full matrix, figures and classes per place."""
    found = dict(effects.properties(h100(), (AWQ, MARLIN, GPTQ)))

    assert ["effects.prefill", "effects.decode"] == list(found)
    assert not any("\n" in value or "Infinity" in value or "NaN" in value for value in found.values())
    prefill, decode = (json.loads(value)[H100] for value in found.values())
    assert [AWQ, MARLIN, GPTQ] == prefill["formats"]
    assert [[None, 0.0387978, 4.23462], [0.0387978, None, 4.24053], [4.16172, 4.16821, None]] == prefill["published"]["matrix"]
    assert (2.81378, 0.0387978, 4.24053, 6, 0) == tuple(
        prefill["published"][key] for key in ("mean", "low", "high", "pairs", "infinite")
    )
    assert [[AWQ], [MARLIN], [GPTQ]] == prefill["classes"]
    assert [None, "inf", "inf"] == decode["published"]["matrix"][0]
    assert (None, 6) == (decode["published"]["mean"], decode["published"]["infinite"])
    assert 0.0193989 == decode["own_l2"]["matrix"][0][1]
