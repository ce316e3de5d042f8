"""Claims re-executed elsewhere: directional distances, SNR as published, identification, from hand-made records."""

import json
from itertools import product
from typing import Any

import pytest

from quantdet.report import reexecution, reexecution_properties
from quantdet.report.case import Case
from selftest.fakes.cases import case

INF = float("inf")
# claimed -> verified -> nats; not symmetric: a claim of gptq is matched better by marlin than by gptq itself.
DECODE = {
    "awq": {"awq": 0.05, "gptq": 5.0, "marlin": 5.2},
    "gptq": {"awq": 5.4, "gptq": 0.08, "marlin": 0.06},
    "marlin": {"awq": 5.0, "gptq": 0.12, "marlin": 0.05},
}


def claim(claimed: str, distances: dict[str, float], **more: Any) -> Case:
    """A record of test_reexecution; the published metric is half the suite's, prefill twice decode."""

    def metrics(factor: float) -> dict[str, dict[str, float]]:
        return {
            "own_metric": {name: value * factor for name, value in distances.items()},
            "published": {name: value * factor / 2 for name, value in distances.items()},
        }

    nearest = min(distances, key=lambda name: distances[name])
    data: dict[str, Any] = {
        "model": "qwen3-8b", "claimed": claimed, "source": "sm80, vLLM 0.11.2, NVIDIA A100", "by": "sm90",
        "by_text": "sm90, vLLM 0.11.2", "weights": "int4-sym", "prompts": 32, "own": [claimed],
        "distances": {"decode": metrics(1.0), "prefill": metrics(2.0)},
        "comparisons": {
            name: {
                "verdict": "DETECTABLE" if value > 1 else "NOT_DETECTABLE", "difference": value, "low": value / 2,
                "high": value * 2, "mde": 0.034, "snr": 1.5, "p": 0.01, "energy": None,
            }
            for name, value in distances.items() if name != claimed
        },
        "nearest": {nearest: 0.75, "awq" if nearest != "awq" else "gptq": 0.25},
        "identified": {"share": 0.75, "low": 0.58, "high": 0.87},
    }  # fmt: skip
    return case("test_reexecution", "DETECTABLE", model="qwen3-8b", hardware="sm90", reexecution=data | more)


def seed() -> list[Case]:
    return [claim(name, distances) for name, distances in DECODE.items()]


def said(records: list[Case], width: int = 80) -> str:
    return "\n".join(reexecution.whole(records, tuple(DECODE), width))


def only(records: list[Case]) -> reexecution.Verification:
    (found,) = reexecution.verifications(records, tuple(DECODE))
    return found


def snr(records: list[Case]) -> dict[tuple[str, str], float | None]:
    return {(row.a, row.b): row.snr for row in reexecution.ratios(only(records), "decode", "own_metric")}


GOLDEN = """\
DIRECTIONAL DISTANCES (DECODE): qwen3-8b: sm80, vLLM 0.11.2, NVIDIA A100 ->
  sm90, vLLM 0.11.2
own L2  awq        gptq       marlin
awq     5.00e-02*  5.00e+00   5.20e+00
gptq    5.40e+00   8.00e-02*  6.00e-02
marlin  5.00e+00   1.20e-01   5.00e-02*
published  awq        gptq       marlin
awq        2.50e-02*  2.50e+00   2.60e+00
gptq       2.70e+00   4.00e-02*  3.00e-02
marlin     2.50e+00   6.00e-02   2.50e-02*
"""
SNR = """\
PAIRWISE SNR SUMMARY (DECODE, own L2): qwen3-8b: sm80, vLLM 0.11.2, NVIDIA A100
  -> sm90, vLLM 0.11.2
pair a | b    signal   noise    SNR    a->b   b->a
awq | marlin  5.10e+00 5.00e-02 102.00 104.00 100.00
awq | gptq    5.20e+00 6.50e-02 80.00  100.00 67.50
gptq | marlin 9.00e-02 6.50e-02 1.38   0.75   2.40
overall: mean signal 3.46e+00 over mean noise 6.00e-02: SNR 57.72; mean of the 3
  SNRs 61.13
"""


def test_directional_distances_are_not_symmetrised() -> None:
    """Rows claimed, columns verified, both metrics under their names, own formats marked."""
    assert GOLDEN in said(seed())
    assert only(seed()).distance("prefill", "own_metric", "marlin", "gptq") == pytest.approx(0.24)


def test_snr_is_the_published_one_with_both_directions_beside_it() -> None:
    """Signal is the mean of both directions, noise that of the own distances; gptq as marlin stays visible below 1."""
    assert SNR in said(seed())


def test_every_phase_and_metric_has_its_summary() -> None:
    """Decode and prefill, the published metric and the suite's."""
    text = said(seed())

    for phase, metric in product(("DECODE", "PREFILL"), ("own L2", "published")):
        assert f"PAIRWISE SNR SUMMARY ({phase}, {metric})" in text
    assert "own L2: this suite's metric" in " ".join(text.split())


def test_no_noise_is_inf_and_nothing_over_nothing_is_no_figure() -> None:
    """Noise 0: inf if there is a signal, n/a if there is none; the mean is over the finite ones."""
    same = {name: {other: 0.0 if {name, other} <= {"gptq", "marlin"} else 2.0 for other in DECODE} for name in DECODE}
    same["awq"]["awq"] = 0.0
    records = [claim(name, distances) for name, distances in same.items()]

    assert {("awq", "gptq"): INF, ("awq", "marlin"): INF, ("gptq", "marlin"): None} == snr(records)
    text = said(records)
    assert "awq | gptq    2.00e+00 0.00e+00 inf inf  inf" in text
    assert "gptq | marlin 0.00e+00 0.00e+00 n/a n/a  n/a" in text
    assert "SNR inf; mean of the 0 finite of 3 SNRs n/a" in " ".join(text.split())


def test_infinite_distances_are_carried() -> None:
    """A direction that is inf makes the signal inf, whatever the other; an own distance of inf makes no figure."""
    endless = {name: dict(row) for name, row in DECODE.items()}
    endless["awq"]["gptq"] = INF
    endless["marlin"]["marlin"] = endless["marlin"]["awq"] = INF

    found = snr([claim(name, distances) for name, distances in endless.items()])

    assert INF == found["awq", "gptq"]
    assert None is found["awq", "marlin"]
    assert 0.0 == found["gptq", "marlin"]


def test_a_claim_is_verified_by_a_format_with_its_numbers() -> None:
    """Where the claimed format does not run here, its numbers in another one are the noise; that is told."""
    elsewhere = {
        "gptq": {"ct": 0.1, "awq_cpu": 4.0}, "awq": {"ct": 5.0, "awq_cpu": 0.2}, "marlin": {"ct": 0.3, "awq_cpu": 4.0},
        "fp8": {"ct": 9.0, "awq_cpu": 9.0},
    }  # fmt: skip
    own = {"gptq": ["ct"], "awq": ["awq_cpu"], "marlin": ["ct"], "fp8": []}
    records = [claim(name, distances, own=own[name]) for name, distances in elsewhere.items()]

    found = snr(records)

    assert {("awq", "gptq"): 4.5 / 0.15, ("awq", "marlin"): 4.5 / 0.25} == pytest.approx(found)
    words = " ".join(said(records).split())
    assert "verified by another format with the same numbers: awq as awq_cpu, gptq as ct, marlin as ct, fp8 by none" in words


def test_identification_says_share_interval_nearest_and_verdicts() -> None:
    """Per claim; the confusion matrix marks what would be right; what was not told apart stands with its MDE."""
    text = said(seed())
    words = " ".join(text.split())

    assert "awq 0.75 [0.58, 0.87] awq 0.75, gptq 0.25 2 DETECTABLE 32" in words
    assert "gptq 0.75 [0.58, 0.87] marlin 0.75, awq 0.25 1 DETECTABLE 32 1 NOT_DETECTABLE" in words
    assert "claimed awq gptq marlin awq 0.75* 0.25 - gptq 0.25 -* 0.75 marlin 0.25 - 0.75*" in words
    assert "gptq -> marlin NOT_DETECTABLE 6.00e-02 3.40e-02 1.50 [3.00e-02, 1.20e-01]" in words
    assert "MDE: minimum detectable effect" in words


def test_a_format_that_matches_better_and_one_with_the_same_numbers_are_told_apart() -> None:
    """DETECTABLE the wrong way round is NEARER; the same numbers enter no count, and are marked and last in the list."""
    records = seed()
    first, last = records[0].reexecution, records[2].reexecution
    assert first is not None and last is not None
    first |= {"own": ["awq", "gptq"]}
    first["comparisons"]["gptq"] |= {"verdict": "NOT_DETECTABLE"}
    last["comparisons"]["awq"] |= {"difference": -5.0}

    words = " ".join(said(records).split())

    assert "marlin 0.75 [0.58, 0.87] marlin 0.75, awq 0.25 1 NEARER 32 1 NOT_DETECTABLE" in words
    assert "awq 0.75 [0.58, 0.87] awq 0.75, gptq 0.25 1 DETECTABLE 32 gptq" in words
    assert "marlin -> awq NEARER -5.00e+00" in words
    assert words.index("awq -> gptq* NOT_DETECTABLE") > words.index("marlin -> gptq NOT_DETECTABLE")


def test_a_claim_names_the_recording_it_is_from() -> None:
    """gptq@0.26.0 is the format gptq: verified by gptq, at its place in the order."""
    records = [claim(f"{name}@0.26.0", row, own=[name]) for name, row in DECODE.items()]

    assert ["awq@0.26.0", "gptq@0.26.0", "marlin@0.26.0"] == list(only(records[::-1]).claims)
    assert list(snr(seed()).values()) == list(snr(records).values())
    assert "verified by another" not in said(records)


def test_sources_and_verifiers_are_not_mixed() -> None:
    """Claims of two sources, or verified at two places, have tables of their own."""
    other = [claim(name, row, source="sm90, vLLM 0.26.0, NVIDIA H200") for name, row in DECODE.items()]

    found = reexecution.verifications(seed() + other, ())

    assert 2 == len(found)
    assert [list(DECODE)] * 2 == [list(one.claims) for one in found]
    assert said(seed()) != said(seed() + other)


LONG = ("bf16", "awq_marlin_compiled", "gptq_machete_compiled", *(f"int{n}_w{n}a16_asym" for n in range(2, 30)))


@pytest.mark.parametrize(("claims", "columns", "width"), [(1, 1, 80), (3, 9, 80), (8, 12, 80), (22, 9, 80), (22, 30, 120)])
def test_every_line_fits(claims: int, columns: int, width: int) -> None:
    """No line is longer than the screen, whatever the number and length of names; large matrices become a table."""
    rows = {
        name: {other: 1e-3 if name == other else 1.2345e-7 * (3 + at) for at, other in enumerate(LONG[:columns])}
        for name in LONG[:claims]
    }
    records = [
        claim(name, row, own=[LONG[0]], source="sm90, vLLM 0.26.0.dev1234+gabcdef, NVIDIA H200") for name, row in rows.items()
    ]

    text = said(records, width)

    assert all(len(line) <= width for line in text.splitlines()), text
    assert text == "\n".join(line.rstrip() for line in text.splitlines())
    assert text.isascii()
    large = claims * columns > reexecution.LIMIT
    assert large == ("the full matrix is in the JUnit property snr.decode" in " ".join(text.split()))
    if not large and columns > 1:
        assert claims * columns <= text.count("1.00e-03*") + text.count("e-07") + text.count("e-06")


def test_of_many_pairs_the_largest_and_the_smallest_snr() -> None:
    """231 pairs: ten at either end, and how many are between."""
    names = LONG[:22]
    records = [claim(a, {b: 0.1 if a == b else 1.0 + i + j for j, b in enumerate(names)}) for i, a in enumerate(names)]

    lines = "\n".join(reexecution.snr_summary(only(records), "decode", 80)[:2])

    assert "... 211 pairs between" in lines
    assert 20 == lines.count("1.00e-01")


def test_the_properties_hold_everything_in_one_line() -> None:
    """Distances in both directions, ratios and identification as JSON that any parser takes."""
    found = dict(reexecution_properties.properties(seed(), tuple(DECODE)))

    assert ["snr.decode", "snr.prefill", "identification"] == list(found)
    assert not any("\n" in value for value in found.values())
    (decode,), (nearest,) = (json.loads(found[name]).values() for name in ("snr.decode", "identification"))
    assert DECODE == decode["own_metric"]["distances"]
    assert [102.0, 80.0, 1.38462] == [row["snr"] for row in decode["own_metric"]["pairs"]]
    assert (0.75, 2.4) == tuple(decode["own_metric"]["pairs"][2][key] for key in ("forth", "back"))
    assert 57.7222 == decode["own_metric"]["overall"]["snr"]
    assert {"marlin": 0.75, "awq": 0.25} == nearest["gptq"]["nearest"]


def test_without_re_executions_nothing_is_said() -> None:
    """Nor of a claim that could not be judged."""
    records = [case("test_reexecution", "ERROR"), case()]

    assert ([], []) == (reexecution.whole(records, (), 80), reexecution_properties.properties(records))


@pytest.mark.parametrize("swap", [False, True])
def test_a_transposed_matrix_is_another_report(swap: bool) -> None:
    """Seeded defect: rows and columns exchanged. The published SNR cannot see it; distances and directions do."""
    rows = {a: {b: DECODE[b][a] if swap else DECODE[a][b] for b in DECODE} for a in DECODE}
    records = [claim(name, row) for name, row in rows.items()]

    assert snr(seed()) == pytest.approx(snr(records))
    assert (said(seed()) == said(records)) is not swap
    assert (GOLDEN in said(records)) is not swap
    assert (SNR in said(records)) is not swap
