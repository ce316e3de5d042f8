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


DECODED, BYTES = f"decoded:{'5' * 64}", f"bytes:{'6' * 64}"


@pytest.mark.parametrize(
    ("mine", "its", "same"),
    [
        (DECODED, DECODED, True), (DECODED, f"decoded:{'7' * 64}", False), (BYTES, BYTES, True),
        (BYTES, f"bytes:{'7' * 64}", None), (DECODED, BYTES, None), (BYTES, DECODED, None),
    ],
)  # fmt: skip
def test_false_red_digests_of_stored_bytes_make_no_strangers(mine: str, its: str, same: bool | None) -> None:
    """Two layouts that nobody decodes may hold the same numbers: only decoded ones are others."""
    found = sameness(format_of(numbers=mine), format_of("ct", numbers=its, checkpoint_sha256="9" * 64))

    assert same is found.same
    if same is None:
        assert "it is not known whether " in found.why and "are the same numbers" in found.why


FP8, PLAIN = ("weight:F8_E4M3", "weight_scale:F32"), ("weight:BF16",)


def loaded(name: str, stored: tuple[str, ...], asked: str = "", kernel: str = "Fp8Kernel", **header: Any) -> Observation:
    """A format whose checkpoint stores `stored`, under `quantization=asked`."""
    args = {"quantization": asked} if asked else {}
    sha256 = ("7" if stored is PLAIN else "8") * 64
    given: dict[str, Any] = {"numbers": f"decoded:{sha256}", "checkpoint_sha256": sha256, "engine_args": args}
    return executed(format_of(name, (kernel,), **(given | header)), layers={"stored": stored})


def test_false_red_what_is_made_while_loading_may_be_a_checkpoints_numbers() -> None:
    """Online FP8 against the FP8 checkpoint of the same base: neither the same by digest, nor others."""
    checkpoint, online = loaded("fp8", FP8), loaded("online", PLAIN, "fp8_per_channel")

    for found in (sameness(checkpoint, online), sameness(online, checkpoint)):
        assert (None, True) == (found.same, found.made)
        assert "which the engine made while loading" in found.why
    told = sameness(checkpoint, loaded("online", FP8, numbers=f"online:{'4' * 64}"))
    assert (None, True) == (told.same, told.made)
    asked = sameness(checkpoint, loaded("own", FP8, "fp8"))  # the name of its own quantization makes nothing
    assert (True, False) == (asked.same, asked.made)


def test_what_is_made_while_loading_is_the_same_by_what_it_is_made_of() -> None:
    """The same plain numbers and the same arguments; the digest of the plain ones says nothing by itself."""
    one = loaded("a", PLAIN, "fp8_per_tensor")

    assert sameness(one, loaded("b", PLAIN, "fp8_per_tensor")).same is True
    assert sameness(one, loaded("b", PLAIN, "fp8_per_channel")).same is None
    assert sameness(one, loaded("b", PLAIN, "fp8_per_tensor", numbers=DECODED)).same is None
    silent = [loaded(name, PLAIN, how, numbers="") for name, how in (("a", "x"), ("b", "x"), ("c", "y"))]
    assert sameness(silent[0], silent[1]).same is True
    assert sameness(silent[0], silent[2]).same is None
    assert sameness(silent[0], format_of("c", ("Fp8Kernel",), numbers="", checkpoint_sha256="7" * 64)).same is None


UNQUANTIZED = "UnquantizedLinearMethod"


@pytest.mark.parametrize("numbers", [f"decoded:{'7' * 64}", f"online:{'4' * 64}", ""])
@pytest.mark.parametrize("stored", [PLAIN, ()])
def test_a_quantization_that_quantized_nothing_has_the_plain_numbers(numbers: str, stored: tuple[str, ...]) -> None:
    """By the layers that ran, whatever was asked for: the same as the plain checkpoint, and its copies."""
    own = loaded("bf16", PLAIN, kernel=UNQUANTIZED)
    asked = loaded("asked", stored, "nvfp4_per_token", UNQUANTIZED, numbers=numbers, checkpoint_sha256="7" * 64)

    assert sameness(own, asked).same is True and sameness(asked, own).same is True
    other = loaded("other", stored, "nvfp4_per_token", UNQUANTIZED, numbers=numbers, checkpoint_sha256="9" * 64)
    assert sameness(own, other).same is (True if numbers == own.header.numbers else None)


@pytest.mark.parametrize(
    ("mine", "its", "words"),
    [
        (("fp8_e4m3",), ("bfloat16",), "KV cache fp8_e4m3 against bfloat16"),
        (("fp8_e4m3, k_scale 0.5",), ("fp8_e4m3, k_scale 0.25",), "k_scale 0.5 against fp8_e4m3, k_scale 0.25"),
        (("fp8_e4m3", "bfloat16"), ("bfloat16", "fp8_e4m3"), ""),
        (("bfloat16",), ("bfloat16",), ""),
    ],
)
def test_the_kv_cache_that_was_loaded_counts(mine: tuple[str, ...], its: tuple[str, ...], words: str) -> None:
    """Dtype and scales; where both are known, not what was asked for."""
    own = executed(OWN, kv_cache=mine)
    peer = executed(format_of("ct", engine_args={"kv_cache_dtype": "bfloat16"}), kv_cache=its)

    found = sameness(own, peer)

    assert (not words) is found.same
    assert words in found.why
    assert sameness(OWN, peer).same is False  # an older recording: by what was asked for


@pytest.mark.parametrize(
    "args", [{"max_model_len": 8192}, {"enable_lora": True, "max_lora_rank": 8}, {"max_num_batched_tokens": 4096}]
)
def test_false_red_arguments_that_change_nothing(args: dict[str, Any]) -> None:
    """A longer `max_model_len`, LoRA without an adapter: the same numerics."""
    assert sameness(OWN, format_of("ct", engine_args=args)).same is True


@pytest.mark.parametrize(
    ("wrapper", "module"),
    [
        ("RowParallelLinearWithLoRA", "RowParallelLinear"), ("MergedQKVParallelLinearWithLoRA", "QKVParallelLinear"),
        ("QKVParallelLinearWithShardedLoRA", "QKVParallelLinear"),
        ("MergedColumnParallelLinearWithLoRA", "MergedColumnParallelLinear"),
        ("MergedColumnParallelLinearVariableSliceWithLoRA", "MergedColumnParallelLinear"),
    ],
)  # fmt: skip
def test_false_red_loras_wrappers_are_the_layers_in_them(wrapper: str, module: str) -> None:
    """Whatever they wrap; another layer stays another one."""
    own = executed(OWN, layers={"module": module})

    assert sameness(own, executed(format_of("ct"), layers={"module": wrapper})).same is True
    assert sameness(own, executed(format_of("ct"), layers={"module": f"Other{wrapper}"})).same is False


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
