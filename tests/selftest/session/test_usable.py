"""Arguments that would be lost, or that do not fit the requests."""

import pytest

from quantdet.engines.signatures import Type
from quantdet.matrix import load
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.selectors import Setting, When
from quantdet.session.usable import too_small, unobeyed, unusable
from selftest.fakes.matrix import ROOT

COMPUTED = {"max_model_len": 300, "max_num_batched_tokens": 2048, "max_logprobs": 20, "tensor_parallel_size": 1}
KNOWN = {name: Type(anything=True) for name in ("seed", "max_model_len", "enable_prefix_caching", "kv_cache_dtype")}


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return load.load(ROOT / "quant_matrix.toml")


def with_setting(matrix: Matrix, format_id: str = "*", **args: object) -> Matrix:
    row = Setting(when=When(format=format_id), reason="r", args=args)  # type: ignore[arg-type]
    return matrix.model_copy(update={"setting": (row,), "engine": matrix.engine.model_copy(update={"args": {"seed": 0}})})


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max_model_len": 299}, "max_model_len: needs at least 300, have 299"),
        ({"max_num_batched_tokens": 299}, "max_num_batched_tokens: needs at least 300, have 299"),
        ({"max_logprobs": 5}, "max_logprobs: needs at least 20, have 5"),
    ],
)
def test_arguments_that_are_too_small(args: dict[str, int], words: str) -> None:
    """A chunk has to hold the longest request; a limit of its own may be wider than what is asked."""
    assert [words] == too_small({**COMPUTED, **args}, COMPUTED)


def test_arguments_that_fit() -> None:
    fits = {"max_model_len": 300, "max_num_batched_tokens": 300, "max_logprobs": -1, "tensor_parallel_size": 2}
    assert [] == too_small(fits, COMPUTED)


def test_settings_that_would_be_lost(matrix: Matrix, tmp_path: object) -> None:
    """What a cell is has keys of its own; what follows from the requests may be set."""
    row = with_setting(matrix, dtype="float16", enforce_eager=False, max_model_len=4096, tensor_parallel_size=2)
    found = unusable(row, ROOT / "fixtures" / "prompts", ROOT)

    assert ["setting.0.args.dtype", "setting.0.args.enforce_eager"] == [one.partition(":")[0] for one in found]


def test_settings_that_vllm_does_not_have_or_the_suite_cannot_obey(matrix: Matrix) -> None:
    assert [] == unobeyed(with_setting(matrix, kv_cache_dtype="fp8"), KNOWN)
    (unknown,) = unobeyed(with_setting(matrix, kv_cache_dtyp="fp8"), KNOWN)
    assert "setting.0.args.kv_cache_dtyp" in unknown and "kv_cache_dtype" in unknown
    (vacuous,) = unobeyed(with_setting(matrix, enable_prefix_caching=True), KNOWN)
    assert "setting.0.args.enable_prefix_caching: cannot be obeyed" in vacuous


def test_settings_of_another_engine_are_its_own(matrix: Matrix) -> None:
    assert [] == unobeyed(with_setting(matrix, "tf_*", torchao="{}"), KNOWN)
