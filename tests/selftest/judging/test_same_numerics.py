"""The same numerics: every part of the rule counts, and what differs is told."""

from typing import Any

import pytest

from quantdet.judging import same_numerics
from quantdet.judging.same_numerics import same_kernels, sameness
from quantdet.observations.header import Executed, Layer
from quantdet.observations.observation import Observation
from selftest.fakes.observation import observation

MARLIN = ("MarlinLinearKernel",)


def format_of(name: str = "gptq", kernels: tuple[str, ...] = MARLIN, **header: Any) -> Observation:
    return observation(name, **{"numerics": "int4", "kernels": kernels, "dtype": "float16", **header})


def executed(whole: Observation, **changes: Any) -> Observation:
    """`whole`, whose model ran otherwise; `layers` are changes to each of its layers."""
    found = whole.header.executed
    assert found is not None
    edits = changes.pop("layers", {})
    layers = tuple(layer.model_copy(update=edits) for layer in found.layers)
    return Observation(
        whole.header.model_copy(update={"executed": found.model_copy(update={"layers": layers, **changes})}), whole.prompts
    )


OWN = format_of()


def test_layouts_do_not_count() -> None:
    """Another format, another method of another layout, a class for an unquantized KV cache: the same numerics."""
    peer = executed(format_of("ct"), layers={"method": "CompressedTensorsLinearMethod", "scheme": "CompressedTensorsWNA16"})
    found = peer.header.executed
    assert found is not None
    cache = Layer(kind="other", module="Attention", method="CompressedTensorsKVCacheMethod", count=2)
    found = found.model_copy(update={"layers": (*found.layers, cache)})
    peer = Observation(peer.header.model_copy(update={"executed": found}), peer.prompts)

    derived = sameness(OWN, peer)

    assert derived.same is True
    assert derived.why.startswith("the same numbers (") and derived.why.endswith(
        "MarlinLinearKernel x4 in both, float16, eager"
    )


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        (format_of("ct", numerics="other"), "other numbers ("),
        (format_of("ct", ("MacheteLinearKernel",)), "MarlinLinearKernel x4 against MacheteLinearKernel x4"),
        (executed(OWN, layers={"detail": "w4a8"}), "MarlinLinearKernel x4 against MarlinLinearKernel[w4a8] x4"),
        (executed(OWN, layers={"count": 5}), "MarlinLinearKernel x4 against MarlinLinearKernel x5"),
        (executed(OWN, layers={"module": "RowParallelLinear"}), "both ran MarlinLinearKernel x4, but not in the same layers"),
        (executed(OWN, layers={"kind": "moe"}), "both ran MarlinLinearKernel x4, but not in the same layers"),
        (executed(OWN, tensor_parallel_size=2), "against MarlinLinearKernel x4, each on 2 ranks"),
        (executed(OWN, mode="compiled"), "mode eager against compiled"),
        (executed(OWN, attention=("FLASH_ATTN FA3",)), "attention FAKE_ATTENTION against FLASH_ATTN FA3"),
        (format_of("ct", dtype="bfloat16"), "dtype float16 against bfloat16"),
        (format_of("ct", engine_args={"kv_cache_dtype": "fp8"}), "KV cache auto against fp8"),
        (format_of("ct", environment={"onednn_fp8": False}), "FP8 outside oneDNN True against False"),
        (format_of("ct", engine_env={"ATOMIC_ADD": "1"}), "ATOMIC_ADD not set against 1"),
    ],
)  # fmt: skip
def test_every_part_of_the_rule_counts(peer: Observation, words: str) -> None:
    """One difference makes other numerics, from either side, and is named."""
    found, back = sameness(OWN, peer, ["ATOMIC_ADD"]), sameness(peer, OWN, ["ATOMIC_ADD"])

    assert (False, False) == (found.same, back.same)
    assert words in found.why


def test_variables_that_no_kernel_reads_do_not_count() -> None:
    """Only those that the matrix names change what a kernel computes."""
    assert sameness(OWN, format_of("ct", engine_env={"OMP_WAIT_POLICY": "ACTIVE"}), ["ATOMIC_ADD"]).same is True


def test_numbers_that_nobody_told() -> None:
    """Unknown numbers are neither the same nor others; copies of one checkpoint hold the same."""
    silent, copy = (format_of(name, numbers="", checkpoint_files_sha256="f" * 64) for name in ("ct", "other"))

    unknown = sameness(OWN, silent)
    assert unknown.same is None and "it is not known which numbers ct holds" in unknown.why
    assert sameness(silent, copy).same is True
    assert sameness(silent, format_of("x", numbers="", checkpoint_sha256="5" * 64)).same is None


def test_evidence_without_kernels_is_never_the_same() -> None:
    """Reported logprobs do not say what ran."""
    silent = Observation(OWN.header.model_copy(update={"executed": None}), OWN.prompts)

    assert sameness(OWN, silent).same is False


def test_older_recordings_are_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """By the hashes of tensors and other files, both."""
    table = tmp_path / "numbers.json"
    row = f'{{"tensors": "{"1" * 64}", "files": "{"f" * 64}", "numbers": "decoded:{"3" * 64}"}}'
    table.write_text(f'{{"schema": 1, "checkpoints": [{row}]}}', encoding="utf-8")
    monkeypatch.setattr(same_numerics, "KNOWN", table)
    same_numerics._known.cache_clear()

    assert f"decoded:{'3' * 64}" == same_numerics.numbers(format_of(numbers="", checkpoint_files_sha256="f" * 64))
    assert "" == same_numerics.numbers(format_of(numbers="", checkpoint_files_sha256="e" * 64))
    assert OWN.header.numbers == same_numerics.numbers(OWN)
    forged = format_of(numbers=f"decoded:{'4' * 64}", checkpoint_files_sha256="f" * 64)
    assert f"decoded:{'3' * 64}" == same_numerics.numbers(forged)  # what is known by the hashes is not another's to say
    same_numerics._known.cache_clear()


def test_kernels_of_one_name_are_one_family() -> None:
    """Marlin has another class in another layout; a row with `same_kernel` goes by the matrix's name for both."""
    family = {"MarlinLinearKernel": "marlin", "MarlinNvFp4LinearKernel": "marlin"}
    peer = format_of("ct", ("MarlinNvFp4LinearKernel",))

    assert same_kernels(OWN, peer, lambda name: family.get(name, name))
    assert not same_kernels(OWN, peer, str)
    assert not same_kernels(OWN, Observation(peer.header.model_copy(update={"executed": None})), str)
    assert isinstance(OWN.header.executed, Executed)
